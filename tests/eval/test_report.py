"""What a run writes can be read again, by programs and by people."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from eval.config import EvalConfig
from eval.inference.provenance import provenance
from eval.outputs import write_outputs
from eval.reports.gallery import choose, data_uri, gallery_html, strip_png
from eval.reports.plots import curve_png
from eval.reports.results import notes_of, results_of, sample_line, table, write_report
from eval.runner import Grid, run
from eval.samples import Sample
from eval.spec import SourceSpec, TaskSpec
from eval.task import EncodedImage, Task
from eval.tasks.build import build_task
from flamingo.files import folder_hash
from tests.eval.worlds import Looker, write_pool, write_scenes
from tests.fixtures import png

SHOTS = [0, 1, 4]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[Sample], dict[str, EncodedImage]]:
    folder = tmp_path_factory.mktemp("data")
    fields = {"question": "question", "answer": "answer", "kind": "kind"}
    scenes = SourceSpec(path=str(write_scenes(folder / "scenes")), fields=fields)
    pool = SourceSpec(path=str(write_pool(folder / "pool")))
    specs = {
        "vqa<b>": TaskSpec(source=scenes, lead=" ", queries=10),
        "binding": TaskSpec(
            kind="binding",
            source=pool,
            names_source=pool,
            question="a",
            lead=" ",
            output="rank",
            queries=12,
            min_images=5,
        ),
    }
    tasks: dict[str, Task] = {name: build_task(name, spec) for name, spec in specs.items()}
    grid = Grid(SHOTS, [0, 1], ["real", "blank"], batch_size=8)
    samples, cache = run(tasks, grid, Looker())
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    facts = provenance(str(folder / "model"), ["task=vqa"], "cpu", 1.5)
    return results_of(samples, tasks, grid.description(), facts | {"images": cache.counts()}), samples, cache.images


def test_results_say_what_is_needed_to_trust_them(finished: tuple, tmp_path: Path) -> None:
    results, samples, _ = finished
    write_report(tmp_path / "out", results, samples)
    read = json.loads((tmp_path / "out" / "results.json").read_text())
    assert read == json.loads(json.dumps(results))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "samples.jsonl"]
    assert len(read["rows"]) == 2 * 2 * 3
    for row in read["rows"]:
        assert row["interval"][0] <= row["score"] <= row["interval"][1]
        assert row["n"] == (20 if row["task"] == "vqa<b>" else 24)
        assert row["n_images"] * 2 == row["n"]  # two seeds ask the same queries: clustered
        alike = row["score"] in (0, 1)  # of which a bootstrap would know nothing
        assert row["interval_method"] == ("wilson" if alike else "two-level bootstrap")  # ... and drawn too
        assert row["interval_these_seeds_method"] == ("wilson" if alike else "bootstrap")
        assert any("score the same" in note for note in row["notes"]) == alike
        assert set(row["score_by_seed"]) == {"0", "1"}
    for key in ("model", "command", "code", "versions", "device", "date", "wall_s", "decoding", "images", "seeds"):
        assert read[key] not in (None, "", {}), key
    assert read["tasks"]["vqa<b>"]["example_prompt"].count("<image>") == 5
    assert len(read["tasks"]["binding"]["hash"]) == 64
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert lines == [json.loads(json.dumps(sample_line(sample))) for sample in samples]
    assert {"query_id", "demo_ids", "prompt", "raw", "answer", "golds", "score", "seed", "shots", "task"} <= set(
        lines[0]
    )
    assert all(line["prompt"].count("<image>") == len(line["images_sha256"]) for line in lines)


def test_table_has_a_line_a_row(finished: tuple) -> None:
    text = table(finished[0]).splitlines()
    assert len(text) == 13 + len(notes_of(finished[0]))
    assert "100.0%" in table(finished[0])


def test_long_names_of_tasks_stay_apart(finished: tuple) -> None:
    results = copy.deepcopy(finished[0])
    results["rows"][0]["task"] = "vl_icl_operator_interleaved"
    lines = table(results).splitlines()[:13]
    assert lines[1].startswith("vl_icl_operator_interleaved  ")
    assert len(set(map(len, lines))) == 1


def test_curve_is_a_image(finished: tuple) -> None:
    image = Image.open(io.BytesIO(curve_png({"": finished[0]})))
    assert image.format == "PNG"
    assert min(image.size) > 300


def test_gallery_needs_nothing_but_itself(finished: tuple) -> None:
    results, samples, images = finished
    page = gallery_html(results, samples, images, count=4)
    assert "vqa&lt;b&gt;" in page
    assert "vqa<b>" not in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert page.count('class="sample') == 2 * 3 * 4
    shown = re.findall(r"data:image/png;base64,([^\"]+)", page)
    files = {frame for image in images.values() for frame in image.frames}
    assert shown
    assert all(base64.b64decode(data) in files for data in shown)
    four_shots = page[page.index("vqa&lt;b&gt;, 4 shots") :]
    assert four_shots[: four_shots.index("<h2>")].count("<img") == 4 * 5


def test_strip_shows_each_chosen_prompt(finished: tuple) -> None:
    _, samples, images = finished
    image = Image.open(io.BytesIO(strip_png(samples[:3], images, side=50)))
    assert image.height > 3 * 50


def test_without_real_images_there_is_no_strip(finished: tuple, tmp_path: Path) -> None:
    results, samples, images = finished
    shuffled = [replace(sample, cell=replace(sample.cell, images="shuffled")) for sample in samples]
    write_outputs(EvalConfig(model="m", task={}, data="", out=str(tmp_path)), results, shuffled, images)
    assert (tmp_path / "gallery.html").exists()
    assert not (tmp_path / "gallery.png").exists()


def test_chosen_samples_are_half_wrong_where_possible(finished: tuple) -> None:
    samples = [sample for sample in finished[1] if sample.cell.shots == 1 and sample.cell.task == "vqa<b>"]
    right, wrong = (sum(test(s) for s in samples) for test in (lambda s: s.score == 1, lambda s: s.score == 0))
    assert right >= 2
    assert wrong >= 2
    chosen = choose(samples, 4)
    assert [sample.score for sample in chosen].count(0.0) == 2
    assert choose(samples, 1000) == samples


def test_large_images_are_shown_as_thumbnails() -> None:
    uri = data_uri(png((200, 0, 0), 1, side=600))
    assert uri.startswith("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size == (256, 256)
    small = png((200, 0, 0), 1)
    assert base64.b64decode(data_uri(small).split(",")[1]) == small
    assert Image.open(io.BytesIO(EncodedImage((small,)).blank().frames[0])).size == (8, 8)


def test_model_hash_tells_weights_apart_and_not_folders(tmp_path: Path) -> None:
    hashes = []
    for name, weight in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weight)
        (tmp_path / name / "README.md").write_text(name)
        hashes.append(folder_hash(tmp_path / name))
    assert hashes[0] == hashes[1] != hashes[2]
