"""A real crawl: Debian's wget over a site on loopback, its WARC read to the last page and image."""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.sources import flat, jpeg, prepare

PAGES = 12


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server of files that says nothing, and calls its pages what servers do."""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".bin": "application/octet-stream"}  # noqa: RUF012

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """A site of pages in two charsets, each with an image of its own, one that all share, and one that is missing."""
    root = tmp_path / "site"
    (root / "deep er").mkdir(parents=True)
    links = "".join(f'<a href="deep%20er/{number}.html">{number}</a> ' for number in range(PAGES))
    (root / "index.html").write_text(f"<p>All pages</p>{links}<img src='all.jpg'>")
    (root / "all.jpg").write_bytes(jpeg(100))
    for number in range(PAGES):
        charset = "windows-1252" if number % 2 else "utf-8"
        name = f"{number}.bin" if number == 3 else f"{number}.jpg"
        (root / "deep er" / name).write_bytes(jpeg(number))
        images = f"<img src='./{name}?v=1#x'><img src=../all.jpg><img src=no.jpg>"
        html = f"<meta charset={charset}><p>Café {number}</p>{images}"
        (root / "deep er" / f"{number}.html").write_bytes(html.encode(charset))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [True, False])
def test_every_page_of_a_real_crawl(tmp_path: Path, site: str, compressed: bool) -> None:
    if shutil.which("wget") is None:
        pytest.skip("wget is not installed: apt-get install wget")
    warc = ["--warc-file=crawl", *([] if compressed else ["--no-warc-compression"])]
    argv = [
        "wget",
        "--quiet",
        "--no-proxy",
        "--recursive",
        "--page-requisites",
        "--directory-prefix=files",
        *warc,
        site,
    ]
    subprocess.run(argv, cwd=tmp_path, timeout=120, check=False)  # 8: the images that are missing
    (path,) = tmp_path.glob("crawl.warc*")
    done = prepare(tmp_path / "out", "warc", path, "--filters", "none")
    pages = {document.meta["url"]: flat(document) for document in done.documents}
    assert pages[site][-1] == jpeg(100)
    for number in range(PAGES):
        assert pages[f"{site}deep%20er/{number}.html"] == [f"Café {number}", jpeg(number), jpeg(100)]
    assert len(pages) == PAGES + 1
    assert done.dropped_images == {"image is missing": PAGES}
    assert not done.dropped
