"""Lists of shards, manifests and servers of somebody else: no command runs, no download goes where it was not sent."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data.dataset import DatasetSpec, open_store
from data.remote.download import Trust, download
from data.remote.shard_cache import ShardCache
from data.shards.writer import read_manifest
from eval.plugins.harness_prompts import image_of
from eval.tasks.sources import shards_of
from flamingo import FlamingoProcessor, ImageTransform
from flamingo.errors import UserError
from flamingo.vision.transform import read_source, to_rgb
from tests.data.helpers import write_documents
from tests.data.server import Behaviour, serving
from tests.model import tiny
from tests.training.world import config
from train import checked_stage


def opened(shards: list[str], tmp_path: Path) -> None:
    open_store(DatasetSpec(name="d", shards=shards, batch_size=1, cache=str(tmp_path / "cache")))


WRITTEN: dict[str, Callable[[str], str]] = {
    "plain": lambda command: f"pipe:{command}",
    "behind ::": lambda command: f"/nowhere/a.tar::pipe:{command}",
    "in braces": lambda command: "{" + f"/nowhere/a.tar,pipe:{command}" + "}",
    "braces inside": lambda command: "{pi,no}pe:" + command,
    "with a range": lambda command: f"pipe:{command} {{0..2}}",
    "uppercase": lambda command: f"PIPE:{command}",
    "mixed case": lambda command: f"Pipe:{command}",
    "leading blanks": lambda command: f"  pipe:{command}",
    "leading tab": lambda command: f"\tpipe:{command}",
    "behind a cache of fsspec": lambda command: f"simplecache::pipe:{command}",
    "behind another": lambda command: f"filecache::pipe:{command}",
    "behind a server": lambda command: f"https://127.0.0.1:9/a.tar::pipe:{command}",
    "behind a bracket": lambda command: f"simplecache::[pipe:{command}",
    "as an address": lambda command: f"pipe://{command}",
    "as a file of fsspec": lambda command: f"file://pipe:{command}",
}


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("cached", [True, False])
def test_a_command_in_a_list_of_shards_does_not_run(tmp_path: Path, written: str, cached: bool) -> None:
    mark = tmp_path / "ran"
    spec = DatasetSpec(
        name="d",
        shards=[WRITTEN[written](f"touch '{mark}'; false")],
        batch_size=1,
        cache=str(tmp_path / "cache") if cached else "",
    )
    with pytest.raises(UserError):
        open_store(spec)
    assert not mark.exists()


def test_the_refusal_says_how_to_allow_it_and_then_it_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    with pytest.raises(UserError, match=r"shell command.*data\.allow_pipe=true"):
        opened([f"pipe:touch '{mark}'; false"], tmp_path)
    cache = ShardCache(tmp_path / "c", 10**9, attempts=1, trust=Trust(allow_pipe=True))
    with pytest.raises(UserError, match="could not be fetched"):
        cache.local(f"pipe:touch '{mark}'; false")
    assert mark.exists()
    with pytest.raises(UserError, match="shell command"):
        download(f"pipe:touch '{mark}'", tmp_path / "x")  # where it would run is a second lock


def test_the_trainers_config_allows_commands_for_all_datasets(tmp_path: Path) -> None:
    settings = config(tmp_path, tmp_path / "run", "language")
    settings.data.datasets["words"] |= {"shards": [f"pipe:cat {tmp_path}/x.tar"], "cache": str(tmp_path / "cache")}
    assert any("shell command" in clause for clause in checked_stage(settings)[1])
    settings.data.allow_pipe, settings.data.storage_minutes = True, 0.0  # nothing is there to be waited for
    (specs, _), problems = checked_stage(settings)
    assert specs[0].allow_pipe
    assert any("could not be fetched: 1 attempts in a row" in problem for problem in problems)
    settings.data.datasets["words"]["allow_pipe"] = False  # one dataset's own word counts
    assert not checked_stage(settings)[0][0][0].allow_pipe


def test_a_file_named_like_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe:touch ran;false #.tar").touch()
    with pytest.raises(UserError, match="shell command"):
        opened(["*.tar"], tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pipe:touch ran", "../../etc/passwd", "/etc/passwd", "a/b.tar", "..", ""])
def test_a_manifest_names_files_beside_it(tmp_path: Path, name: str) -> None:
    folder = write_documents(tmp_path / "folder", count=4)
    body = json.loads((folder / "_dataset.json").read_text())
    next(iter(body["parts"].values()))["shards"][0]["name"] = name
    (folder / "_dataset.json").write_text(json.dumps(body))
    (folder / "_catalogue.json").unlink(missing_ok=True)
    readers = [read_manifest, shards_of, lambda folder: opened([str(folder)], tmp_path)]
    for read in readers[name.startswith("pipe:") :]:  # which is a file's name like any other
        with pytest.raises(UserError, match=r"not a file beside it|does not exist|but missing"):
            read(folder)


@contextmanager
def sending_to(place: str) -> Iterator[str]:
    """A server that answers every request with a redirect."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path.startswith("/end"):
                self.send_response(200)
                self.send_header("Content-Length", "4")
                self.end_headers()
                self.wfile.write(b"tar!")
                return
            self.send_response(302)
            self.send_header("Location", place)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("ftp://127.0.0.1/a.tar", "another scheme"),
        ("file:///etc/passwd", "another scheme|cannot be fetched|could not be fetched"),
        ("http://localhost:1/end", r"another host, localhost.*redirect_hosts=\[localhost\]"),
        ("https://example.invalid/end", "another host, example.invalid"),
    ],
)
def test_a_server_sends_no_download_elsewhere(tmp_path: Path, place: str, message: str) -> None:
    with sending_to(place) as url, pytest.raises(UserError, match=message):
        download(f"{url}/a.tar", tmp_path / "a.tar", attempts=1)
    assert not os.path.getsize(tmp_path / "a.tar")  # noqa: PTH202


def test_a_redirect_on_one_host_and_to_a_named_one_are_followed(tmp_path: Path) -> None:
    with sending_to("/end") as url:
        download(f"{url}/a.tar", tmp_path / "a.tar")
    assert (tmp_path / "a.tar").read_bytes() == b"tar!"
    with sending_to("/end") as there, sending_to(there.replace("127.0.0.1", "localhost") + "/end") as url:
        download(f"{url}/a.tar", tmp_path / "b.tar", trust=Trust(redirect_hosts=("localhost",)))
    assert (tmp_path / "b.tar").read_bytes() == b"tar!"


def processor() -> FlamingoProcessor:
    return FlamingoProcessor(tiny.tokenizer(), ImageTransform(16), chat_template="plain")


FETCHING: dict[str, Callable[[str], object]] = {
    "an image": to_rgb,
    "a prompt's image": lambda url: processor()(images=url, text="<image>"),
    "a chat's image": lambda url: processor()(
        text=[{"role": "user", "content": [{"type": "image", "url": url}, {"type": "text", "text": "a"}]}]
    ),
    "a clip": lambda url: processor()(videos=url, text="<image>"),
    "a harness's image": image_of,
}


@pytest.mark.parametrize("fetching", FETCHING)
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("ftp://127.0.0.1/a.png", "another scheme"),
        ("file:///etc/passwd", "cannot be fetched.*not allowed"),
        ("http://localhost:1/end", r"another host, localhost;.*IMAGE_HOSTS\.add\('localhost'\)"),
    ],
)
def test_a_server_of_an_image_sends_it_nowhere_else(fetching: str, place: str, message: str) -> None:
    with sending_to(place) as url, pytest.raises(UserError, match=message):
        FETCHING[fetching](f"{url}/a.png")


def test_an_images_redirect_to_a_named_host_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flamingo.vision.transform.IMAGE_HOSTS", {"localhost"})
    with sending_to("/end") as there, sending_to(there.replace("127.0.0.1", "localhost") + "/end") as url:
        assert read_source(f"{url}/a.png") == b"tar!"


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (Behaviour(drip=0.05, faults=1, suffix=".png"), "bytes in .* s, less than 10000 a second"),
        (Behaviour(drop_after=100, faults=1, suffix=".png"), r"closed \d+ bytes before its end"),
        (Behaviour(body=b"x" * 5000, faults=1, suffix=".png"), "longer than 4000 bytes"),
    ],
)
def test_a_server_that_drips_or_breaks_off_or_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: Behaviour, message: str
) -> None:
    monkeypatch.setattr("flamingo.vision.transform.FETCH_SECONDS", 0.5)
    monkeypatch.setattr("flamingo.vision.transform.FETCH_BYTES", 4000)
    (tmp_path / "a.png").write_bytes(bytes(2000))
    with serving(tmp_path, behaviour) as server, pytest.raises(UserError, match=message):
        to_rgb(f"{server.url}/a.png")


@pytest.mark.parametrize("text", ["data:image/png;base64,!", "data:image/png;base64,AAA", "data:"])
def test_a_data_url_that_is_none_is_one_sentence(text: str) -> None:
    for read in (to_rgb, FETCHING["a clip"]):
        with pytest.raises(UserError, match=r"data: URL that is not base64|cannot be decoded"):
            read(text)


def test_base64_without_a_slash_is_no_path() -> None:
    data = bytes(600)  # "AAAA...": longer than a file's name may be, shorter than a path
    assert read_source(base64.b64encode(data).decode()) == data
