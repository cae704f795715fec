"""`inspect --sampled` shows the row that training cuts, with the image that each token sees."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

from data.shards.document import Document, Image, Text
from data.shards.writer import ShardWriter
from data.tools.show_sampled import COLOURS, sample_document, sampled_as_html, sampled_as_text
from tests.data.helpers import byte_processor
from tests.data.sources import command
from tests.fixtures import byte_tokenizer, png

DOCUMENT = Document(
    "k",
    [
        Text("Intro <b>"),
        Image((0,)),
        Text("A cat."),
        Text(" What?", loss=False),
        Image((1, 2), 1.0),
        Text("It runs."),
    ],
    [png(1, side=10), png(2, side=11), png(3, side=12)],
)


def options(**more: object) -> Namespace:
    usual = {"tokenizer": None, "max_tokens": 256, "max_images": 5, "crop": "start", "labels": "text"}
    return Namespace(**usual | {"next_image": 0.0, "seed": 0} | more)


def seen(text: str) -> list[tuple[bool, str, str]]:
    """(in the loss, what is seen, text) of each line."""
    return [
        (mark == " ", what, piece)
        for mark, what, piece in re.findall(r"^  ([ ?]) \[sees ([^\]]+)\] '(.*)'$", text, re.MULTILINE)
    ]


def test_which_tokens_see_which_image() -> None:
    sampled = sample_document(DOCUMENT, options())
    assert seen(sampled_as_text(sampled, DOCUMENT, "here")) == [
        (True, "nothing", "Intro <b><EOC>"),
        (False, "image 0", "<image>"),
        (True, "image 0", "A cat."),
        (False, "image 0", " What?<EOC>"),
        (False, "image 1", "<image>"),
        (True, "image 1", "It runs.<EOC><eos>"),
    ]
    html = sampled_as_html(sampled, DOCUMENT, "here")
    assert html.count('<img src="data:image/png;base64,') == 3  # an image and a clip of two frames
    spans = re.findall(r'<span class="([^"]*)" style="([^"]*)" title="([^"]*)">([^<]*)</span>', html)
    assert [text for *_, text in spans][:4] == ["Intro", " &lt;b&gt;", "&lt;EOC&gt;", "&lt;image&gt;"]
    by_text = {text: (classes, style, title) for classes, style, title, text in spans}
    assert by_text["Intro"][1] == ""
    assert by_text[" cat."][1] == f"background:{COLOURS[0]}"
    assert by_text[" cat."][2].endswith("sees image 0, in the loss")
    assert by_text[" What?"][0] == "no-loss"
    assert by_text[" runs."][1] == f"background:{COLOURS[1]}"
    assert "<b>" not in html


def test_next_images_windows_and_limits() -> None:
    following = sample_document(DOCUMENT, options(next_image=1.0))
    assert seen(sampled_as_text(following, DOCUMENT, ""))[0] == (True, "image 0", "Intro <b><EOC>")
    assert "each token sees the next image" in sampled_as_text(following, DOCUMENT, "")
    fewer = sample_document(DOCUMENT, options(max_images=1))
    assert "1 of its 3 images" in sampled_as_text(fewer, DOCUMENT, "")
    assert "It" not in fewer.texts
    short = {
        tuple(sample_document(DOCUMENT, options(max_tokens=4, crop="random", seed=seed)).texts) for seed in range(20)
    }
    assert len(short) > 3


def test_the_command_with_words_and_with_tokenizers(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "s") as writer:
        writer.write(DOCUMENT)
    shard = tmp_path / "s-000000.tar"
    status, shown, _ = command("inspect", shard, "--sampled", "--crop", "start", "--next-image", "0")
    assert status == 0
    assert "each token sees the previous image" in shown
    byte_processor().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(str(tmp_path / "tokenizer"))
    expected = seen(shown)
    for folder in ("model", "tokenizer"):
        document = tmp_path / f"{folder}.html"
        arguments = ("--sampled", "--crop", "start", "--next-image", "0", "--tokenizer", tmp_path / folder)
        status, shown, err = command("inspect", shard, *arguments)
        assert status == 0, err
        assert seen(shown)[:-1] == expected[:-1]
        assert command("inspect", shard, *arguments, "--html", document)[0] == 0
        assert "sees image 1, in the loss" in document.read_text()
    (tmp_path / "none").mkdir()
    status, _, err = command("inspect", shard, "--sampled", "--tokenizer", tmp_path / "none")
    assert (status, err.count("\n")) == (2, 1)
    assert "holds no tokenizer" in err
    assert "--max-tokens" in command("inspect", shard, "--sampled", "--max-tokens", "1")[2]
