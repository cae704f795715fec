"""Inputs of `prepare` on S3 (moto's server on loopback): every kind of file, what is not there, and a busy server."""

from __future__ import annotations

import gzip
import json
import threading
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError

import pytest

from data.prepare.images import ImageFolder
from data.prepare.inputs import csv_units, input_files, json_lines, line_units
from data.prepare.units import Dropped
from data.shards.places import RemotePath, place, put
from tests.data.s3 import BUCKET, s3_server
from tests.data.sources import command, jpeg
from tests.data.test_index import make_tar
from tests.data.test_prepare_engine import SMALL, files, write_tars
from tests.data.test_s3 import stored

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[str]:
    with s3_server() as url:
        yield url


def upload(folder: Path, url: str) -> str:
    """The same files in a folder of the store."""
    for path, body in files(folder).items():
        put(place(f"{url}/{path}"), body)
    return url


def warc(*records: tuple[str, str, bytes]) -> bytes:
    parts = []
    for url, kind, body in records:
        answer = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\nContent-Type: application/http\r\n"
        parts.append(f"{head}Content-Length: {len(answer)}\r\n\r\n".encode() + answer + b"\r\n\r\n")
    return b"".join(parts)


def llava(count: int) -> list[dict[str, object]]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A card."}]
    return [{"id": str(n), "image": f"im/{n % 4}.jpg", "conversations": turns} for n in range(count)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    write_tars(root / "tars", tars=3)
    for number in range(4):
        for name, body in ((f"im/{number}.jpg", jpeg(number)), (f"im/{number}.txt", b"a card")):
            (root / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "pictures" / name).write_bytes(body)
    (root / "pictures" / "im" / "odd name [1] #2.PNG").write_bytes(jpeg(9))
    table = "filepath,title\n" + "".join(f"im/{n % 5}.jpg,card {n}\n" for n in range(20))
    (root / "t.csv").write_text(table)
    (root / "one.json").write_text(json.dumps(llava(20)))
    lines = "".join(json.dumps(item) + "\n" for item in llava(30)).encode() + b"{broken\n"
    (root / "lines.jsonl").write_bytes(lines)
    (root / "packed.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (root / "notes").mkdir()
    (root / "notes" / "deep").mkdir()
    (root / "notes" / "deep" / "a.md").write_text("One ![](../p.jpg) two ![[Q.jpg]].")
    (root / "notes" / "p.jpg").write_bytes(jpeg(1))
    (root / "notes" / "q.jpg").write_bytes(jpeg(2))
    page = b"<html><body><p>Hello page.</p><img src='a.jpg'><p>More of it.</p></body></html>"
    (root / "web").mkdir()
    (root / "web" / "i.html").write_bytes(page)
    (root / "web" / "a.jpg").write_bytes(jpeg(3))
    records = ("http://e.org/i.html", "text/html", page), ("http://e.org/a.jpg", "image/jpeg", jpeg(3))
    (root / "x.warc").write_bytes(warc(*records))
    facts = json.dumps({"url": "http://e.org/a.jpg"}).encode()
    make_tar(root / "downloaded.tar", [("0.jpg", jpeg(4)), ("0.json", facts)])
    (root / "map.csv").write_text("url,path\nhttp://e.org/a.jpg,web/a.jpg\n")
    write_parquet(root / "o.parquet")
    return root


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    row = {"images": [None, {"bytes": jpeg(5), "path": None}], "texts": ["a text", None]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 9000), path, row_group_size=4000)


KINDS = {
    "tars": ("pairs", "{}/tars"),
    "pattern": ("pairs", "{}/tars/0000[12].tar"),
    "folder of pairs": ("pairs", "{}/pictures"),
    "table": ("pairs", "{}/t.csv", "--images", "{}/pictures"),
    "JSON array": ("llava", "{}/one.json", "--images", "{}/pictures"),
    "JSON lines": ("messages", "{}/lines.jsonl", "--images", "{}/pictures"),
    "gzip": ("messages", "{}/packed.jsonl.gz", "--images", "{}/pictures"),
    "parquet": ("obelics", "{}/o.parquet"),
    "Markdown": ("folder", "{}/notes"),
    "saved pages": ("html", "{}/web", "--filters", "none"),
    "WARC": ("warc", "{}/x.warc", "--filters", "none"),
    "WARC, images in tars": ("warc", "{}/x.warc", "--filters", "none", "--images", "{}/downloaded.tar"),
    "WARC, images by a map": ("warc", "{}/x.warc", "--filters", "none", "--images", "{}/map.csv"),
}


@pytest.fixture(scope="module")
def there(inputs: Path) -> str:
    return upload(inputs, f"{BUCKET}/in")


@pytest.mark.parametrize("kind", KINDS)
def test_the_store_gives_the_bytes_of_the_disk(inputs: Path, there: str, tmp_path: Path, kind: str) -> None:
    source, *arguments = KINDS[kind]
    out = f"{BUCKET}/out/{kind.replace(' ', '-').replace(',', '')}"
    said = []
    for root, to in ((inputs, tmp_path / "here"), (there, out)):
        filled = [argument.format(root) for argument in arguments]
        status, report, err = command("prepare", source, *filled, "--out", to, "--workers", 1)
        assert status == 0, err
        said.append(report.replace(str(to), "OUT"))
    assert said[0] == said[1]
    assert stored(out) == files(tmp_path / "here")


def test_deduplicated_there_is_deduplicated_here(inputs: Path, there: str, tmp_path: Path) -> None:
    prepared = f"{BUCKET}/out/to-deduplicate"
    for root, to in ((inputs, tmp_path / "here"), (there, prepared)):
        assert command("prepare", "pairs", f"{root}/tars", "--out", to, *SMALL, "--workers", 1)[0] == 0
        status, _, err = command("prepare", "dedupe", to, "--out", f"{to}-once", "--workers", 1)
        assert status == 0, err
    assert stored(f"{prepared}-once") == files(tmp_path / "here-once")


def test_files_are_cut_into_units_there_as_here(inputs: Path, there: str, tmp_path: Path) -> None:
    for root in (str(inputs), there):
        units = line_units([f"{root}/lines.jsonl"], (".jsonl",), 500)
        assert len(units) > 5
        values = [value for unit in units for _, value in json_lines(unit)]
        assert [value["id"] for value in values if isinstance(value, dict)] == [str(n) for n in range(30)]
        assert len(values) == 31
    here = csv_units(inputs / "t.csv", "t.csv", 7, ",")
    assert [unit.digest for unit in here] == [u.digest for u in csv_units(place(f"{there}/t.csv"), "t.csv", 7, ",")]
    with zipfile.ZipFile(tmp_path / "z.jsonl.zip", "w") as archive:
        archive.writestr("a.jsonl", '{"id": 1}\n{"id": 2}\n')
    put(place(f"{there}/z.jsonl.zip"), (tmp_path / "z.jsonl.zip").read_bytes())
    (unit,) = line_units([f"{there}/z.jsonl.zip"], (".jsonl.zip",))
    assert [value["id"] for _, value in json_lines(unit)] == [1, 2]


def test_braces_patterns_and_folders_name_the_same_files(there: str) -> None:
    def names(*items: str) -> list[str]:
        return [label for label, _ in input_files(items, (".tar",))]

    whole = ["00000.tar", "00001.tar", "00002.tar"]
    assert names(f"{there}/tars") == names(f"{there}/tars/") == names(f"{there}/tars/{{00000..00002}}.tar") == whole
    assert names(f"{there}/tars/*1.tar", f"{there}/tars/00001.tar") == ["00001.tar"]
    assert [label for label, _ in input_files([f"{there}/pictures"], (".png",))] == ["im/odd name [1] #2.PNG"]
    assert all(isinstance(path, RemotePath) and path.size for _, path in input_files([there], (".tar",)))


def test_no_name_leads_out_of_a_folder_there(there: str) -> None:
    folder = ImageFolder(f"{there}/pictures")
    assert folder.read("im/0.jpg") == folder.read("./im//0.jpg") == folder.read(f"{there}/pictures/im/0.jpg")
    for name in ("../t.csv", "/t.csv", "im/../../t.csv", "..\\t.csv"):
        with pytest.raises(Dropped, match="leads out of its folder"):
            folder.read(name)
    for name in (f"{there}/t.csv", "s3://other/x.jpg", "none.jpg", "x" * 2000, "im"):
        with pytest.raises(Dropped, match="image is missing"):
            folder.read(name)


def said(*arguments: object) -> str:
    status, _, err = command(*arguments)
    assert (status, err.count("\n")) == (2, 1), err
    assert err.startswith("error: ")
    return err


def test_what_is_not_there_is_one_sentence(there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    for name in ("s3://no-such-bucket/x.tar", f"{there}/none.tar", f"{there}/none"):
        assert f"input {name} does not exist; correct the path" in said("prepare", "pairs", name, "--out", out)
    assert "holds no .tar file" in said("prepare", "pairs", f"{there}/none*.tar", "--out", out)
    assert "holds no .tar file" in said("prepare", "mint", f"{there}/pictures", "--out", out)
    assert "neither tars nor images" in said("prepare", "pairs", f"{there}/notes/deep", "--out", out)
    assert "braces are not balanced" in said("prepare", "pairs", f"{there}/{{0..1.tar", "--out", out)
    assert "is a URL; inputs are files" in said("prepare", "pairs", "https://host/a.tar", "--out", out)
    assert "correct --images" in said("prepare", "llava", f"{there}/one.json", "--images", f"{there}/no", "--out", out)
    put(place(f"{there}/pointer/a.jsonl"), b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "Git-LFS pointer" in said("prepare", "m3it", f"{there}/pointer", "--out", out)
    put(place(f"{there}/cut/a.tar"), (make_tar(tmp_path / "a.tar", [("0.jpg", jpeg(1))])).read_bytes()[:700])
    assert f"shard {there}/cut/a.tar is truncated" in said("prepare", "pairs", f"{there}/cut", "--out", out)
    assert not list(out.glob("*.tar"))


def test_without_credentials_is_one_sentence(there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem  # type: ignore[import-untyped]

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    S3FileSystem.clear_instance_cache()
    try:
        err = said("prepare", "pairs", f"{there}/tars", "--out", tmp_path / "out")
    finally:
        S3FileSystem.clear_instance_cache()
    assert "Unable to locate credentials; give credentials" in err


@contextmanager
def busy(behind: str, faults: int) -> Iterator[tuple[str, list[int]]]:
    """(address, statuses) of a server that answers 503 to each request the first `faults` times, then as `behind`."""
    given: list[int] = []
    asked: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def answer(self) -> None:
            asked[what := f"{self.command} {self.path} {self.headers.get('Range')}"] += 1
            request = urllib.request.Request(behind + self.path, headers=dict(self.headers), method=self.command)
            try:
                if asked[what] <= faults:
                    status, headers, content = 503, {}, b"<Error><Code>ServiceUnavailable</Code></Error>"
                else:
                    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as reply:
                        status, headers, content = reply.status, dict(reply.headers), reply.read()
            except HTTPError as error:
                status, headers, content = error.code, dict(error.headers), error.read()
            given.append(status)
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", 0) if self.command == "HEAD" else len(content)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = answer  # noqa: N815

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{web.server_port}", given
    finally:
        web.shutdown()
        web.server_close()
        thread.join()


@pytest.mark.parametrize("faults", [2, 1_000_000])
def test_a_busy_server_is_asked_again(
    inputs: Path, there: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: int
) -> None:
    from s3fs import S3FileSystem

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("data.shards.places.FIRST_WAIT", 0.01)
    monkeypatch.setattr("data.shards.places.PATIENCE", 60.0 if faults == 2 else 1.0)
    line = ("prepare", "messages", "--workers", 1, "--skip-bad-files", "--out")
    assert command(*line, tmp_path / "here", inputs / "lines.jsonl", "--images", inputs / "pictures")[0] == 0
    try:
        with busy(server, faults) as (address, given):
            monkeypatch.setenv("AWS_ENDPOINT_URL", address)
            S3FileSystem.clear_instance_cache()
            arguments = (*line, tmp_path / "there", f"{there}/lines.jsonl", "--images", f"{there}/pictures")
            if faults > 2:
                assert "could not be reached in" in said(*arguments)
                return
            status, _, err = command(*arguments)
            assert status == 0, err
            assert given.count(503) > 10
    finally:
        S3FileSystem.clear_instance_cache()
    assert files(tmp_path / "there") == files(tmp_path / "here")


def test_copies_of_inputs_do_not_stay(there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "copies"))
    (tmp_path / "copies").mkdir()
    assert command("prepare", "pairs", f"{there}/tars", "--out", tmp_path / "out", "--workers", 1)[0] == 0
    assert list((tmp_path / "copies").iterdir()) == []
