"""Web pages in: the order of the DOM, the published rules, and images from folders, archives and downloads."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from data.prepare.web.charset import decode_html
from data.prepare.web.dom import WebImage, read_dom
from data.prepare.web.text_filters import RULES, massive, punctuation, repeats, repetition, words_of
from tests.data.sources import flat, jpeg, prepare, refusal
from tests.data.test_index import make_tar
from tests.fixtures import encoded, random_image

PROSE = [
    "The harbour was quiet in the morning, and the boats that had come back during the night lay side by side.",
    "A woman with a red scarf was mending a net on the pier, while her brother counted the boxes of fish.",
    "They had been at it since before the sun was up, because the market opens early and nobody waits for them.",
]


def page(*body: str, head: str = "") -> str:
    return f"<!doctype html><html><head><title>t</title>{head}</head><body>{''.join(body)}</body></html>"


def photo(number: int, side: int = 200) -> bytes:
    return jpeg(number, (side, side - 20))


def test_the_order_is_that_of_the_dom() -> None:
    html = page(
        "<nav>Menu <img src=menu.png></nav><script>x</script><!-- no --><div hidden>h</div><p aria-hidden=true>h</p>",
        "<div style='display: none'>h</div><div role=navigation>h</div><noscript><img src=n.jpg></noscript>",
        "<main><h1>Head  line</h1><p>A <b>bold</b> &amp;\n new<i>s</i>paper.",
        "<img src='/a.png' width=300 height='20px'>after<br>next line<br><br>apart</p>bare text",
        "<ul><li>one</li><li>two</li></ul>",
        "<picture><source srcset='q.webp 1x, r.webp 2x'><img data-src=' z.jpg '></picture>",
        "<img src='data:image/gif;base64,R0lGOD' data-src='lazy.jpg'><img srcset='s.jpg 100w, https://y/l.jpg 900w'>",
        "<img src='javascript:x'><img><img src='http://[bad'></main><footer>f</footer>",
    )
    assert read_dom(html, "http://x/d/page.html") == [
        "Head line",
        "A bold & newspaper.",
        WebImage("http://x/a.png", 300, 20),
        "after\nnext line",
        "apart",
        "bare text",
        "one",
        "two",
        WebImage("http://x/d/z.jpg"),
        WebImage("http://x/d/lazy.jpg"),
        WebImage("https://y/l.jpg"),
    ]
    based = page("<img src=a.png>", head="<base href='//other/deep/'>")
    assert read_dom(based, "http://x/") == [WebImage("http://other/deep/a.png")]
    assert read_dom("", "") == []
    assert read_dom("<div>" * 5000 + "deep" + "</div>" * 5000) == ["deep"]


def test_charsets() -> None:
    text = "<p>größer</p>"
    assert decode_html(text.encode()) == text
    assert decode_html(b"\xef\xbb\xbf" + text.encode()) == text
    assert decode_html(b"\xff\xfe" + text.encode("utf-16-le")) == text
    assert decode_html(text.encode("latin-1"), "ISO-8859-1") == text
    declared = "<meta charset='windows-1251'><p>больше</p>"
    assert decode_html(declared.encode("cp1251")) == declared
    assert decode_html("<p>“x”</p>".encode("cp1252"), "no-such-charset") == "<p>“x”</p>"
    assert decode_html(b"<p>x</p>" * 20, "idna") == "<p>x</p>" * 20
    assert read_dom("<p>a \ud83d</p>") == ["a ?"]


def test_the_measures_against_worked_examples() -> None:
    assert words_of("“Well,” she said ... 3 times!") == ["well", "she", "said", "3", "times"]
    assert repetition("abcdefghijklmnop", 10) == 0.0
    assert repetition("ab" * 50, 10) == pytest.approx(46 / 91)  # two kinds of 91, the commoner (46) counts
    words = ["a", "b", "c", "d", "e"]
    assert repetition([*words, *words], 5) == pytest.approx(2 / 6)
    assert repetition(words[:4], 5) == 0.0
    assert punctuation("One, two.") == pytest.approx(2 / 4)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Too short here", "fewer than 4 words"),
        ("the " * 1001, "more than 1000 words"),
        ("we are here and you are there. " * 8, "characters repeat"),
        ("a1 b2 c3 d4 of the 55,66 77.88 (99)", "too many special characters"),
        ("Buy shoes shirts trousers socks belts gloves", "too few function words"),
        (PROSE[0].replace(",", "").replace(".", ""), "too little punctuation"),
        (PROSE[0], ""),
    ],
)
def test_paragraphs_by_the_rules_of_obelics(text: str, reason: str) -> None:
    assert RULES["obelics"].paragraph.reason(text) == reason


def test_lists_of_words() -> None:
    rule = RULES["obelics"].paragraph
    assert rule.reason(PROSE[0], flagged=frozenset({"harbour"})) == "too many flagged words"
    assert rule.reason(PROSE[0], common=frozenset({"the", "and"})) == "too few common words"
    assert rule.reason(PROSE[0], common=frozenset(words_of(PROSE[0]))) == ""
    spam = frozenset({"harbour", "quiet", "morning"})  # 3 of the 21 words are more than 0.12
    assert rule.reason(PROSE[0], spam=spam) == "too many spam words"
    assert rule.reason(PROSE[0], spam=frozenset({"harbour", "quiet"})) == ""
    assert RULES["obelics"].document.reason(" ".join(PROSE), spam=spam) == ""


def words(*numbers: int) -> str:
    return " ".join(f"word{number:03d}" for number in numbers)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\n".join(["one", "one", *map(words, range(3))]), ""),
        ("\n".join(["a line", "a line", "a line", "other"]), "too many lines return"),
        ("\n\n".join(["one\ntwo", "three\nfour", "one\ntwo"]), "too many lines return"),
        (
            "\n".join([*map(words, range(8)), words(*range(9, 12)), words(*range(9, 12))]),
            "too much of it in lines that return",
        ),
        (words(*range(20)), ""),
        (" ".join(f"{words(1, 2)} {words(n)}" for n in range(10, 20)), "one run of 2 words returns too often"),
        (
            " ".join(f"{words(1, 2, 3, 4)} {words(*range(n, n + 7))}" for n in range(10, 40, 7)),
            "one run of 3 words returns too often",
        ),
        (f"{words(*range(30))} {words(*range(30, 42))} {words(*range(30, 42))}", "too many runs of 5 words return"),
        (f"{words(*range(95))} {words(*range(95, 105))} {words(*range(95, 105))}", ""),
    ],
)
def test_repetition_by_the_rules_of_massivetext(text: str, reason: str) -> None:
    assert repeats(text, words_of(text)) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" ".join(PROSE), ""),
        (PROSE[0], "fewer than 50 or more than 100,000 words"),
        ("a b " * 30, "mean word length outside 3 to 10"),
        (" ".join(PROSE) + " #" * 20, "too many hashes or ellipses"),
        ("\n".join("- " + text for text in PROSE), "mostly bullet points"),
        ("\n".join(text + " ..." for text in PROSE), "too many lines end in an ellipsis"),
        (" ".join(PROSE) + " 1234" * 40, "too few words with letters"),
        ("lorem ipsum dolor " * 20, "fewer than two of the commonest English words"),
    ],
)
def test_documents_by_the_rules_of_massivetext(text: str, reason: str) -> None:
    assert massive(text, words_of(text)) == reason


def story(*images: str) -> str:
    """Prose with an image before each paragraph."""
    places = [f"<img src='{name}'>" for name in images] + [""] * len(PROSE)
    return "".join(f"{place}<p>{text}</p>" for place, text in zip(places, PROSE, strict=False))


def test_saved_pages_with_the_rules_of_obelics(tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / "deep" / "files").mkdir(parents=True)
    bodies = {"a b.jpg": photo(1), "tiny.jpg": photo(2, 100), "wide.jpg": jpeg(3, (450, 200)), "logo.png": photo(4)}
    for name, body in (bodies | {"html.jpg": b"<html>"}).items():
        (root / "deep" / "files" / name).write_bytes(body)
    inline = base64.b64encode(photo(5)).decode()
    images = ("files/a%20b.jpg", "files/a%20b.jpg", "files/tiny.jpg")
    others = ("files/wide.jpg", "files/logo.png", "files/none.jpg", "../../x.jpg", "http://x/y.jpg", "files/html.jpg")
    extra = "".join(f"<img src='{name}'>" for name in others)
    shown = "<img src='files/s.jpg' width=20>"
    spam = "<p>Buy now: cheap shoes!</p>"
    full = page(
        story(*images), spam, extra, shown, f"<img src='data:image/jpeg;base64,{inline}'>", f"<p>{PROSE[0]}</p>"
    )
    (root / "deep" / "a.html").write_text(full)
    (root / "b.htm").write_text(page(story()))
    (root / "c.html").write_text(page("<img src='deep/files/a b.jpg'>"))
    (root / "d.html").write_text(page("<img src='deep/files/a b.jpg'><p>Nothing to see here, at all, is there?</p>"))
    done = prepare(tmp_path / "out", "html", root)
    assert [flat(one) for one in done.documents] == [[photo(1), "\n\n".join(PROSE), photo(5)]]
    assert done.documents[0].meta == {"images": ["files/a%20b.jpg", "data:"]}
    assert done.dropped == {"fewer than 1 images left": 1, "no text": 1, "fewer than 10 words": 1}
    assert done.dropped_images == {
        "image with a side below 150 pixels": 1,
        "image longer than 2 times its width": 1,
        "image with 'logo' in its address": 1,
        "image is missing": 1,
        "image's name leads out of its folder": 1,
        "image is not in the folder; give --images": 1,
        "HTML saved as an image": 1,
        "image shown with a side below 150 pixels": 1,
    }


def test_the_rules_of_m3w(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    plain = encoded(random_image("RGB", (1, 1)).resize((100, 100)), "JPEG")
    for name, body in {"a.jpg": photo(1, 100), "plain.jpg": plain, "tiny.jpg": photo(2, 63)}.items():
        (root / name).write_bytes(body)
    (root / "a.html").write_text(page(story("a.jpg", "plain.jpg", "tiny.jpg")))
    done = prepare(tmp_path / "out", "html", root, "--filters", "m3w")
    assert flat(done.documents[0])[0] == photo(1, 100)
    assert done.dropped_images == {"image of a single colour": 1, "image with a side below 64 pixels": 1}
    done = prepare(tmp_path / "all", "html", root / "a.html", "--filters", "none")
    assert len(done.documents[0].images) == 3


def test_saved_pages_with_downloaded_images(tmp_path: Path) -> None:
    members = [("0.jpg", photo(1)), ("0.json", json.dumps({"url": "http://x/d/a.jpg"}).encode())]
    tar = make_tar(tmp_path / "0.tar", members)
    (tmp_path / "a.html").write_text(page(story("a.jpg"), head="<link rel='canonical' href='http://x/d/page'>"))
    done = prepare(tmp_path / "out", "html", tmp_path / "a.html", "--images", tar)
    assert done.documents[0].images == [photo(1)]
    assert done.documents[0].meta == {"url": "http://x/d/page", "images": ["http://x/d/a.jpg"]}
    told = refusal(tmp_path / "o", "html", tmp_path / "a.html", "--flagged-words", tmp_path / "none")
    assert "word list" in told
    assert "--max-pixels" in refusal(tmp_path / "o", "html", tmp_path / "a.html", "--max-pixels", "0")


def write_warc(path: Path, *answers: tuple[str, str, bytes, Sequence[str]], status: str = "200 OK") -> Path:
    """Responses of (url, content type, body, more headers), each its own gzip member as in Common Crawl."""
    raw = b""
    for number, (url, kind, body, headers) in enumerate(answers):
        answer = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Type: {kind}", *headers, "", ""]).encode() + body
        head = ["WARC/1.0", "WARC-Type: response", "WARC-Date: 2024-01-01T00:00:00Z", f"WARC-Target-URI: {url}"]
        head += [f"WARC-Record-ID: <urn:uuid:{number:032x}>", "Content-Type: application/http; msgtype=response"]
        record = "\r\n".join([*head, f"Content-Length: {len(answer)}", "", ""]).encode() + answer + b"\r\n\r\n"
        raw += gzip.compress(record) if path.name.endswith(".gz") else record
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("name", ["a.warc.gz", "a.warc"])
def test_warc_with_its_own_images(tmp_path: Path, name: str) -> None:
    html = page(story("/1.jpg", "../2.jpg", "none.jpg")).encode()
    latin = page(
        "<p>Über the harbour, in the “evening”, the lights of the boats were to be seen.</p>", "<img src=/1.jpg>"
    )
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(html), html)
    path = write_warc(
        tmp_path / name,
        ("http://x/d/page", "text/html; charset=utf-8", html, []),
        ("http://x/1.jpg", "image/jpeg", photo(1), []),
        ("http://x/2.jpg", "image/jpeg", photo(2), []),
        ("http://x/latin", "text/html;charset=windows-1252", latin.encode("cp1252"), []),
        ("http://x/d/chunked", "text/html", chunked, ["Transfer-Encoding: chunked"]),
        ("http://x/robots.txt", "text/plain", b"x", []),
        ("http://x/bare", "text/html", b"<p>nothing", []),
    )
    done = prepare(tmp_path / "out", "warc", path)
    full = [photo(1), PROSE[0], photo(2), "\n\n".join(PROSE[1:])]
    assert [flat(one) for one in done.documents][::2] == [full, full]
    assert "Über" in str(flat(done.documents[1])[0])
    assert done.documents[0].meta == {"url": "http://x/d/page", "images": ["http://x/1.jpg", "http://x/2.jpg"]}
    assert done.dropped == {"no text": 1}
    assert done.dropped_images == {"image is missing": 2}
    assert not (tmp_path / "out" / ".prepare").exists()


def test_warc_with_downloaded_images_and_mistakes(tmp_path: Path) -> None:
    path = write_warc(tmp_path / "a.warc.gz", ("http://x/p", "text/html", page(story("1.jpg")).encode(), []))
    members = [("0.jpg", photo(1)), ("0.json", json.dumps({"url": "http://x/1.jpg"}).encode())]
    tar = make_tar(tmp_path / "0.tar", members)
    done = prepare(tmp_path / "out", "warc", path, "--images", tar)
    assert done.documents[0].images == [photo(1)]
    path.write_bytes(path.read_bytes()[:-60])
    assert "a.warc.gz" in refusal(tmp_path / "o", "warc", path, "--images", tar)
    (tmp_path / "b.warc").write_bytes(b"<html>no warc</html>" * 50)
    assert "b.warc" in refusal(tmp_path / "p", "warc", tmp_path / "b.warc", "--images", tar)
    other = write_warc(tmp_path / "c.warc", ("http://x/p", "text/html", b"x", []), status="404 Not Found")
    assert "not one document was kept" in refusal(tmp_path / "q", "warc", other, "--images", tar)
