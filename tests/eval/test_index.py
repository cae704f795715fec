"""An index of images: written, searched, refused when it is another encoder's, and used to choose demonstrations."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.__main__ import main
from eval.retrieval.encoder import load_encoder
from eval.retrieval.index import VectorIndex, entries_of, exact_search, write_index
from flamingo.configs.compose import CONFIGS
from flamingo.errors import UserError
from tests.eval.test_zero_shot import trained_here
from tests.eval.worlds import COLOURS, write_scenes
from tests.fixtures import png
from tests.model import tiny


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 50), st.integers(1, 17))
def test_exact_search_is_a_full_sort_whatever_the_blocks(seed: int, rows: int, k: int, block: int) -> None:
    """Rows of few different vectors, so that most cosines are tied."""
    rng = np.random.default_rng(seed)
    pool = rng.normal(size=(6, 8)).astype(np.float32)
    pool /= np.linalg.norm(pool, axis=1, keepdims=True)
    vectors, queries = pool[rng.integers(0, 6, rows)], pool[:2]
    cosines = np.round(queries.astype(np.float64) @ vectors.T.astype(np.float64), 4)
    wanted = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    scores, found = exact_search(vectors, queries, k, block)
    assert found.tolist() == wanted.tolist()
    np.testing.assert_allclose(scores, np.take_along_axis(cosines, wanted, 1), atol=1e-4)


def photos(folder: Path, count: int = 30) -> Path:
    (folder / "deep").mkdir(parents=True)
    for number in range(count):
        name = list(COLOURS)[number % 4]
        file = folder / ("deep" if number % 2 else ".") / f"{number:02d} {name}.png"
        file.write_bytes(png(COLOURS[name], number, side=20))
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_folder_is_indexed_and_searched_by_text_and_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, source, to = trained_here(tmp_path / "model"), photos(tmp_path / "photos"), tmp_path / "index"
    (source / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    assert main(["index", str(source), f"model={model}", f"to={to}", "batch_size=7"]) == 0
    out = capsys.readouterr().out
    assert "30 images" in out
    assert "1 left out: cannot be decoded, the first is" in out
    assert "broken.png" in out
    assert not list(tmp_path.glob("*.partial"))

    encoder, opened = load_encoder(str(model)), VectorIndex(to)
    kept = [entry for entry in entries_of(source) if "broken" not in entry.id]
    wanted = encoder.encode_images([entry.image for entry in kept])
    np.testing.assert_allclose(opened.vectors, wanted, atol=1e-6)
    assert [opened.row(at)["id"] for at in range(30)] == [entry.id for entry in kept]

    hits = tmp_path / "hits.json"
    assert main(["search", "two red squares", f"index={to}", "k=4", f"out={hits}"]) == 0
    cosines = np.round(wanted @ encoder.encode_texts(["two red squares"])[0], 6)
    best = np.argsort(-cosines, kind="stable")[:4]
    assert [hit["id"] for hit in json.loads(hits.read_text())["hits"]] == [kept[at].id for at in best]
    assert capsys.readouterr().out.splitlines()[0].split()[2] == kept[best[0]].id.split()[0]
    assert main(["search", f"image={source / '04 red.png'}", f"index={to}", "k=1"]) == 0
    assert "04 red.png" in capsys.readouterr().out


def test_names_that_are_not_utf8_are_found_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, source, to = trained_here(tmp_path / "model"), tmp_path / "photos", tmp_path / "index"
    source.mkdir()
    odd, hits = os.fsdecode(b"r\xe9d.png"), tmp_path / "hits.json"
    (source / odd).write_bytes(png(COLOURS["red"], 1))
    (source / os.fsdecode(b"\xff.png")).write_bytes(b"\x89PNG\r\n\x1a\nno more")
    assert main(["index", str(source), f"model={model}", f"to={to}"]) == 0
    assert main(["search", "red", f"index={to}", f"out={hits}"]) == 0
    assert "r\\udce9d.png" in capsys.readouterr().out
    (hit,) = json.loads(hits.read_bytes())["hits"]
    assert (hit["id"], Path(hit["source"])) == (odd, source / odd)
    assert list(VectorIndex(to).rows_by_sha256()) == [hit["sha256"]]


def test_shards_are_indexed_with_their_texts(tmp_path: Path) -> None:
    model, shards = trained_here(tmp_path / "model"), write_scenes(tmp_path / "shards", 12)
    assert main(["index", str(shards), f"model={model}", f"to={tmp_path / 'index'}", "limit=10"]) == 0
    opened = VectorIndex(tmp_path / "index")
    assert [opened.row(at)["text"] for at in range(10)] == [f"a {list(COLOURS)[at % 4]} square" for at in range(10)]
    (shard,) = shards.glob("*.tar")
    one = write_index(tmp_path / "one", entries_of(shard), load_encoder(str(model)), "open_clip", limit=10)
    np.testing.assert_array_equal(one.vectors, opened.vectors)


def test_an_index_of_another_encoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, source, to = trained_here(tmp_path / "model"), photos(tmp_path / "photos", 4), tmp_path / "index"
    other = trained_here(tmp_path / "other", seed=1)
    assert main(["index", str(source), f"model={model}", f"to={to}"]) == 0
    assert main(["search", "red", f"index={to}", f"model={other}"]) == 2
    assert "was made with another encoder" in capsys.readouterr().err
    (model / "open_clip_model.safetensors").write_bytes((other / "open_clip_model.safetensors").read_bytes())
    assert main(["search", "red", f"index={to}"]) == 2  # the same folder, with other weights
    assert "was made with another encoder" in capsys.readouterr().err


def test_faiss_finds_what_exact_search_does(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    model, source = trained_here(tmp_path / "model"), photos(tmp_path / "photos")
    encoder = load_encoder(str(model))
    opened = write_index(tmp_path / "index", entries_of(source), encoder, "open_clip", faiss="Flat")
    queries = encoder.encode_texts(["red", "blue", "a grey thing"])
    for k in (1, 5, 30, 100):
        exact, approximate = opened.search(queries, k), opened.search(queries, k, approximate=True)
        assert exact[1].tolist() == approximate[1].tolist()
        np.testing.assert_allclose(exact[0], approximate[0], atol=2e-6)
    with pytest.raises(UserError, match="faiss=Nonsense cannot be made of 30 vectors of 16"):
        write_index(tmp_path / "bad", entries_of(source), encoder, "open_clip", faiss="Nonsense")
    assert not (tmp_path / "bad").exists()


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (CONFIGS.parent / "docs" / "retrieval.md").read_text()
    lines = [shlex.split(line) for line in re.findall(r"^    python -m eval (.*)$", page, re.M)]
    assert len(lines) == 6
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", 8)
    (tmp_path / "photos" / "a.png").write_bytes(png(COLOURS["red"], 1))
    for name in ("photos", "pairs"):
        rows = [f"photos/{at:02d} {colour}.png,{colour}" for at, colour in [(0, "red"), (4, "red"), (2, "blue")]]
        (tmp_path / f"{name}.csv").write_text("\n".join(["image,answer", *rows]))
    trained_here(tmp_path / "runs" / "demo" / "vision" / "model")
    model, processor = tiny.flamingo("llama")
    for part, options in ((model, {"built_modules": True}), (processor, {})):
        part.save_pretrained(tmp_path / "runs" / "demo" / "flamingo" / "model", **options)
    shards = write_scenes(tmp_path / "shards", 24)
    quiet = ["progress=false", "device=cpu"]
    for line in lines:
        toy = [f"task.toy_vqa.source.path={shards}", "task.toy_vqa.queries=4", "cache=null"]
        toy += ["task.toy_vqa.source.fields={question: question, answer: answer}"]
        more = [] if line[0] in ("index", "search") else [*quiet, *(toy if line[0] == "task=toy_vqa" else [])]
        assert main([*line, *more]) == 0, line
    assert json.loads((tmp_path / "hits.json").read_text())["hits"][0]["id"] == "a.png"


def test_damaged_indexes_are_refused(tmp_path: Path) -> None:
    model, source = trained_here(tmp_path / "model"), photos(tmp_path / "photos", 4)
    for name in ("vectors.f32", "rows.jsonl", "offsets.i64", "index.json"):
        to = tmp_path / name
        write_index(to, entries_of(source), load_encoder(str(model)), "open_clip")
        (to / name).write_bytes((to / name).read_bytes()[:-9])
        with pytest.raises(UserError, match="is damaged"):
            VectorIndex(to)
    with pytest.raises(UserError, match=r"index\.json is missing"):
        VectorIndex(source)


MISTAKES = {
    "index {photos} model={model}": "to=FOLDER",
    "index {photos} model={model} to={photos}": "would replace what is indexed",
    "index {photos} model={model} to={tmp}": "would replace what is indexed",
    "index {tmp}/none model={model} to={tmp}/x": "does not exist",
    "index {empty} model={model} to={tmp}/x": "no image is left to index",
    "index {photos} model={model} to={tmp}/x batch_size=0": "batch_size=0 is not a whole number of at least 1",
    "index {photos} model={model} to={tmp}/x colour=red": "unknown key 'colour'",
    "index {photos} model={model} to={index}": "is not empty: give another folder, or overwrite=true",
    "search red": "index=FOLDER",
    "search index={index}": "search needs one text",
    "search red blue index={index}": "search needs one text",
    "search red index={index} k=0": "k=0",
    "search red index={index} faiss=true": "has no faiss.index",
    "search image={tmp}/none.png index={index}": "is not a file",
    "search image={photos}/notes.txt index={index}": "cannot be decoded",
}


def test_mistakes_end_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"model": trained_here(tmp_path / "model"), "photos": photos(tmp_path / "photos", 4)}
    names |= {"tmp": tmp_path, "index": tmp_path / "index", "empty": tmp_path / "empty"}
    names["empty"].mkdir()
    write_index(names["index"], entries_of(names["photos"]), load_encoder(str(names["model"])), "open_clip")
    for line, sentence in MISTAKES.items():
        assert main(line.format(**names).split(" ")) == 2, line
        assert sentence in capsys.readouterr().err, line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["flamingo", "open_clip"])
def test_rices_takes_its_demonstrations_from_an_index(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an index of the model's own encoder the demonstrations are those without an index; another one's differ."""
    shards = write_scenes(tmp_path / "shards", 24)
    model, processor = tiny.flamingo("llama")
    model.save_pretrained(tmp_path / "flamingo", built_modules=True)
    processor.save_pretrained(tmp_path / "flamingo")
    encoder = tmp_path / "flamingo" if kind == "flamingo" else trained_here(tmp_path / "encoder")
    assert main(["index", str(shards), f"model={encoder}", f"to={tmp_path / 'index'}"]) == 0
    fields = "{question: question, answer: answer}"
    line = ["task=toy_vqa", f"task.toy_vqa.source.path={shards}", f"task.toy_vqa.source.fields={fields}"]
    line += ["task.toy_vqa.queries=6", f"model={tmp_path / 'flamingo'}", "shots=[2]", "cache=null", "device=cpu"]
    line += ["progress=false", "gallery=0"]
    shown = {}
    for name, more in {"own": [], "with": [f"index={tmp_path / 'index'}"]}.items():
        assert main([*line, "demos=rices_image", f"out={tmp_path / name}", *more]) == 0
        rows = [json.loads(row) for row in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        shown[name] = [row["demo_ids"] for row in rows]
    used = json.loads((tmp_path / "with" / "results.json").read_text())["index"]
    assert (used["rows"], used["taken"], used["encoded"]) == (24, 24, 0)
    assert (shown["own"] == shown["with"]) == (kind == "flamingo")
    capsys.readouterr()
    assert main([*line, "demos=random", f"out={tmp_path / 'no'}", f"index={tmp_path / 'index'}"]) == 2
    assert "has no effect: no task chooses its demonstrations by image" in capsys.readouterr().err
