"""Sheets for raters: blinded, complete, filled in by a browser; what comes back is checked and counted."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eval.__main__ import main
from eval.rating.agreement import alpha
from eval.rating.axes import Axis, read_axes
from eval.rating.plan import Plan, read_key
from eval.spec import SourceSpec, TaskSpec
from eval.tasks.sources import read_examples
from flamingo.errors import UserError
from tests.eval.finished import sample, write_answers, write_run
from tests.fixtures import encoded, png

OWN = """
helpful:
  question: Does it help?
  options: [Yes it does, A little, Not at all]
tone:
  question: Which tone?
  options: [warm, cold]
  ordered: false
"""


@pytest.fixture
def two_runs(tmp_path: Path) -> tuple[Path, Path]:
    names = [f"case{number:02d}" for number in range(40)]
    first = write_answers(tmp_path / "SYSTEMONE", {name: f"plain words on {name}" for name in names})
    return first, write_answers(tmp_path / "SYSTEMTWO", {name: f"=other words\non {name}" for name in names})


def make(runs: tuple[Path, ...], out: Path, *settings: str) -> Plan:
    (out.parent / "own.yaml").write_text(OWN)
    assert main(["rate", *map(str, runs), f"out={out}", f"axes={out.parent / 'own.yaml'}", *settings]) == 0
    return read_key(out / "key.json")


def export(plan: Plan, rater: str, choose: Callable[[str, str, int | None, Axis], int | None]) -> dict[str, Any]:
    """What the page exports if the rater chooses so: by (question, axis, system or None, axis's definition)."""
    ratings = []
    for item, order in plan.sheets[rater]:
        for key, axis in plan.axes.items():
            shown = [("both", None)] if axis.compares else [("AB"[side], system) for side, system in enumerate(order)]
            for side, system in shown:
                value = choose(item, key, system, axis)
                if value is not None and axis.compares and order[0] == 1:
                    value = 2 - value  # the rater sees sides, not systems
                if value is not None:
                    ratings.append({"item": item, "side": side, "axis": key, "value": axis.choices[value]})
    return {"format": 1, "sheet": plan.sheet, "rater": rater, "ratings": ratings}


def fill(plan: Plan, out: Path, choose: Callable[[str, str, int | None, Axis], int | None]) -> None:
    for rater in plan.sheets:
        (out / f"{rater}.json").write_text(json.dumps(export(plan, rater, choose)))


def read(*arguments: str) -> dict[str, Any]:
    assert main(["rate", "--read", *arguments]) == 0
    return json.loads((Path(arguments[0]) / "report" / "ratings.json").read_text())


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["rate", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_sheets_are_blind_and_plans_are_fair(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    plan = make(two_runs, tmp_path / "sheets", "raters=3", "overlap=0.25", "seed=7")
    pages = {rater: (tmp_path / "sheets" / f"{rater}.html").read_text() for rater in plan.sheets}
    for page in [*pages.values(), (tmp_path / "sheets" / "R1.csv").read_text()]:
        assert "SYSTEM" not in page
    assert not any(re.search(r"(src|href)=|https?://", page) for page in pages.values())
    given_to = {name: sum(name in dict(own) for own in plan.sheets.values()) for name in plan.questions}
    assert sorted(given_to.values()) == [1] * 30 + [3] * 10
    assert [len(own) for own in plan.sheets.values()] == [20, 20, 20]
    for own in plan.sheets.values():
        assert sum(order == (1, 0) for _, order in own) == 10  # each system half of the time on the left
    assert [name for name, _ in plan.sheets["R1"]] != sorted(dict(plan.sheets["R1"]))
    again = make(two_runs, tmp_path / "again", "raters=3", "overlap=0.25", "seed=7")
    other = make(two_runs, tmp_path / "other", "raters=3", "overlap=0.25", "seed=8")
    assert again == plan
    assert other.sheet != plan.sheet


def test_med_palms_axes() -> None:
    assert len(read_axes("clinician")) == 12
    assert list(read_axes("clinician,lay"))[-2:] == ["intent", "helpful"]
    assert all(axis.question and 2 <= len(axis.options) <= 3 for axis in read_axes("clinician,lay").values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {question: x}", "a.options has 0 entries: give 2 to 9"),
        ("a: {question: x, options: [p, P ]}", "must be different texts"),
        ("a: {question: x, options: [p, q], optoins: [p]}", "optoins"),
        ("a b: {question: x, options: [p, q]}", "'a b' is not a name"),
        ("a: {question: x, options: [p, q], compares: true}", "options cannot be chosen"),
        ("[p]", "is not a table of names and values"),
        ("a: [", "is not YAML"),
    ],
)
def test_wrong_axes_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read_axes(str(tmp_path / "a.yaml"))


def test_planted_raters_are_recovered(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Three raters who err at random around known shares, and who prefer the second system in four of five cases."""
    plan = make(two_runs, tmp_path / "sheets", "raters=3")
    rng = np.random.Generator(np.random.Philox(key=5))
    truth = {(name, system): rng.choice(3, p=p) for name in plan.questions for system, p in enumerate(PLANTED)}

    def choose(item: str, key: str, system: int | None, axis: Axis) -> int:
        if system is None:
            return int(rng.choice(3, p=[0.1, 0.1, 0.8]))
        return int(truth[item, system]) if key == "helpful" else int(rng.choice(2))

    fill(plan, tmp_path / "sheets", choose)
    summary = read(str(tmp_path / "sheets"))
    assert summary["notes"] == []
    for system, name in enumerate(summary["systems"]):
        for option, row in enumerate(r for r in summary["shares"] if (r["axis"], r["system"]) == ("helpful", name)):
            drawn = np.mean([truth[question, system] == option for question in plan.questions])
            assert row["share"] == pytest.approx(drawn)
            assert row["interval"][0] <= PLANTED[system][option] <= row["interval"][1]
    by_axis = {row["axis"]: row for row in summary["agreement"]}
    assert by_axis["helpful"]["alpha"] == 1  # they copied the truth
    assert abs(by_axis["tone"]["alpha"]) < 0.15  # they tossed coins
    preference = next(row for row in summary["wins"] if row["axis"] == "preference")
    assert preference["second_wins"]["interval"][0] <= 0.8 <= preference["second_wins"]["interval"][1]
    assert preference["p"] < 0.001
    assert {row["axis"] for row in summary["wins"]} == {"helpful", "preference"}  # tone has no better
    page = (tmp_path / "sheets" / "report" / "rating.html").read_text()
    assert "SYSTEMTWO is better" in page
    assert Image.open(io.BytesIO((tmp_path / "sheets" / "report" / "rating.png").read_bytes())).width > 600
    lines = (tmp_path / "sheets" / "report" / "ratings.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 40 * 5
    assert json.loads(lines[0])["query_id"].startswith("case")


PLANTED = ([0.2, 0.3, 0.5], [0.7, 0.2, 0.1])


def test_a_table_says_the_same_as_a_page(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    """As a spreadsheet leaves it: semicolons, numbers for options, letters of another case."""
    plan = make(two_runs, tmp_path / "sheets", "raters=2", "questions=6")
    fill(plan, tmp_path / "sheets", lambda item, key, system, axis: 0 if system is None else system)
    (tmp_path / "pages").mkdir()
    for rater in plan.sheets:
        (tmp_path / "sheets" / f"{rater}.json").rename(tmp_path / "pages" / f"{rater}.json")
    shutil.copy(tmp_path / "sheets" / "key.json", tmp_path / "pages")
    expected = read(str(tmp_path / "pages"))
    for path in (tmp_path / "sheets").glob("*.csv"):
        head, *rows = csv.reader(io.StringIO(path.read_text("utf-8-sig")))
        assert all(row[head.index("answer")][:1] in ("p", "'", "") for row in rows)  # no formula runs
        orders = dict(plan.sheets[rows[0][1]])
        for row in rows:
            order = orders[row[2]]
            for column, axis in enumerate(plan.axes.values(), 6):
                if row[column] == "":
                    value = order[0] * 2 if axis.compares else order["AB".index(row[3])]
                    row[column] = str(value + 1) if axis.compares else f" {axis.choices[value].upper()}"
        text = io.StringIO()
        csv.writer(text, delimiter=";").writerows([head, *rows])
        path.write_text("\ufeff" + text.getvalue())
    assert read(str(tmp_path / "sheets")) == expected


def test_what_is_missing_is_said(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    plan = make(two_runs, tmp_path / "sheets", "raters=2", "overlap=0")
    half = {name for name, _ in plan.sheets["R1"][:5]}
    body = export(plan, "R1", lambda item, key, *_: 0 if item in half and key != "tone" else None)
    for name in ("R1.json", "R1 again.json"):
        (tmp_path / "sheets" / name).write_text(json.dumps(body))
    summary = read(str(tmp_path / "sheets"))
    assert summary["notes"] == [
        "R1 has rated 15 of 100",
        "R2 has rated 0 of 100",
        "nobody has rated tone",
        "15 ratings were handed in more than once, each time the same; they count once",
    ]
    assert {row["note"] for row in summary["agreement"]} == {
        "no alpha: nothing is rated by two raters: choose a larger overlap"
    }


def _other_value(body: dict[str, Any]) -> None:
    body["ratings"][0]["value"] = "Not at all" if body["ratings"][0]["value"] != "Not at all" else "A little"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(sheet="s0"), "R1.json: rating 1 is of sheet s0, and the key is of s"),
        (lambda b: b.update(rater="R9"), "is by rater 'R9'; the raters of the key are R1, R2"),
        (lambda b: b["ratings"][0].update(item="q0"), "is about item 'q0', which is not on the sheet of R1"),
        (lambda b: b["ratings"][0].update(axis="taste"), "is about axis 'taste'; the axes are helpful, tone"),
        (lambda b: b["ratings"][0].update(side="C"), "has side 'C' for helpful; it must be A or B"),
        (lambda b: b["ratings"][0].update(value="maybe"), "has 'maybe' for helpful; it must be Yes it does, A little"),
        (lambda b: b["ratings"][0].update(value=3), "rating 1 is not made of texts"),
        (lambda b: b["ratings"].append("x"), "is not made of texts"),
        (lambda b: b.pop("ratings"), "R1.json is not a filled sheet"),
        (lambda b: b.update(format=2), "R1.json is not a filled sheet"),
        (lambda b: b["ratings"].clear(), "no axis is filled in 1 files"),
    ],
)
def test_sheets_that_do_not_belong_are_refused(
    change: Callable[[dict[str, Any]], object],
    message: str,
    two_runs: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = make(two_runs, tmp_path / "sheets", "questions=4")
    body = export(plan, "R1", lambda *_: 0)
    change(body)
    (tmp_path / "sheets" / "R1.json").write_text(json.dumps(body))
    capsys.readouterr()
    assert message in refused(["--read", str(tmp_path / "sheets" / "R1.json")], capsys)
    assert not (tmp_path / "sheets" / "report").exists()


@pytest.mark.parametrize("entry", [["q"], ["q", [0, 1]], ["NAME", [0]], ["NAME", [0, 2]], ["NAME", ["A", "B"]]])
def test_a_key_that_was_changed_is_refused(
    entry: list[Any], two_runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make(two_runs, tmp_path / "sheets", "questions=4")
    (tmp_path / "sheets" / "R1.json").write_text(json.dumps(export(plan, "R1", lambda *_: 0)))
    key = tmp_path / "sheets" / "key.json"
    body = json.loads(key.read_text())
    body["sheets"]["R1"][0] = [part if part != "NAME" else plan.sheets["R1"][0][0] for part in entry]
    key.write_text(json.dumps(body))
    capsys.readouterr()
    assert "is not the key of rating sheets" in refused(["--read", str(tmp_path / "sheets" / "R1.json")], capsys)


def test_one_thing_in_two_ways_is_refused(
    two_runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make(two_runs, tmp_path / "sheets", "questions=4")
    body = export(plan, "R1", lambda *_: 0)
    (tmp_path / "sheets" / "R1.json").write_text(json.dumps(body))
    _other_value(body)
    (tmp_path / "sheets" / "R1b.json").write_text(json.dumps(body))
    capsys.readouterr()
    line = refused(["--read", str(tmp_path / "sheets")], capsys)
    assert "1 things are rated in two ways, the first is helpful of item" in line
    assert "R1.json and" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "rate needs one or two folders"),
        (["RUN"], "out is missing: add out=VALUE"),
        (["RUN", "out=x", "raters=0"], "raters=0 must be at least 1"),
        (["RUN", "out=x", "raters=two"], "raters=two must be a whole number"),
        (["RUN", "out=x", "overlap=1.5"], "overlap=1.5 must be at most 1"),
        (["RUN", "out=x", "overlap=nan"], "overlap=nan must be at most 1"),
        (["RUN", "out=x", "overlap=0", "raters=50"], "40 questions are too few for raters=50 with overlap=0: R41"),
        (["RUN", "out=x", "axes=none"], "axes=none: there is no such file; give clinician, lay, preference"),
        (["RUN", "out=x", "axes=preference"], "axis preference compares two answers, and there is one run"),
        (["RUN", "out=x", "task=other"], "has no answers with these settings"),
        (["RUN", "out=x", "rater=2"], "unknown key 'rater'"),
        (["RUN", "RUN", "out=x"], "is given twice"),
        (["--read"], "there is no filled sheet"),
        (["--read", "nowhere"], "nowhere does not exist"),
        (["--read", "RUN/results.json"], "key.json does not exist"),
        (["--read", "RUN/results.json", "key=RUN/results.json"], "is not the key of rating sheets"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str],
    message: str,
    two_runs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused([word.replace("RUN", "SYSTEMONE") for word in arguments], capsys)
    assert not (tmp_path / "x" / "key.json").exists()


def test_runs_that_were_asked_otherwise_are_refused(
    two_runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = write_answers(tmp_path / "fewer", {"case00": "a"})
    assert "39 questions are in only one" in refused([str(two_runs[0]), str(fewer), f"out={tmp_path / 'x'}"], capsys)
    seeds = write_run(tmp_path / "seeds", [sample("a", "x"), sample("a", "y", cell=_cell(1))])
    assert "has several answers; choose one with" in refused([str(seeds), f"out={tmp_path / 'x'}"], capsys)
    assert main(["rate", str(seeds), f"out={tmp_path / 'x'}", "demo_seed=1"]) == 0
    assert "earlier sheets" in refused([str(seeds), f"out={tmp_path / 'x'}", "demo_seed=0"], capsys)


def test_conversations_that_went_on_differently_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Raters, and a judge, see one question above both answers."""
    for name in ("one", "two"):
        turns = [((None, "Question: First?"),), ((None, f"Answer: {name}\nQuestion: Next?"),)]
        write_run(tmp_path / name, [sample(f"t.{at}", "x", turns=shown) for at, shown in enumerate(turns, 1)])
    words = [str(tmp_path / "one"), str(tmp_path / "two"), f"out={tmp_path / 'x'}"]
    for name in ("one", "two"):
        results = json.loads((tmp_path / name / "results.json").read_text())
        results["tasks"] = {"talk": {"definition": {"history": "own"}}}
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    assert "each conversation of talk went on from its model's answers (question t.2)" in refused(words, capsys)
    assert main(["rate", *words[:1], words[2]]) == 0  # one alone is rated


def _cell(seed: int) -> Any:
    return sample("a", "x").cell.__class__("talk", 0, seed, "real")


def run_with_images(folder: Path) -> Path:
    """A run about two images in a table, and the table."""
    files = {"a.png": png((200, 30, 30), 1), "b.png": encoded(Image.new("RGB", (2000, 1000), "blue"), "PNG")}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "t.csv").write_text("id,image,question,answer\n1,a.png,Which <b>?,red\n2,b.png,And this?,blue\n")
    spec = TaskSpec(source=SourceSpec(format="csv", path=str(folder / "t.csv")))
    samples = []
    for example in read_examples("csv", spec, spec.source):
        image = example.turn.image
        assert image is not None
        turns = ((image.sha256, example.turn.question),)
        samples.append(sample(example.id, f"answer {example.id}", turns=turns, images_sha256=(image.sha256,)))
    command = ["task=csv", f"task.csv.source.path={folder / 't.csv'}", "model=m", "out=o"]
    return write_run(folder / "run", samples, command)


def test_raters_see_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with_images(tmp_path)
    make((run,), tmp_path / "sheets", "raters=1")
    page = (tmp_path / "sheets" / "R1.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert page.count("data:image/jpeg;base64,") == 1  # the large one, smaller
    assert "Which <b>?" not in page  # it is data, never markup
    (tmp_path / "a.png").write_bytes(png((1, 2, 3), 9))
    capsys.readouterr()
    line = refused([str(run), f"out={tmp_path / 'x'}"], capsys)
    assert "have changed: 1 of 2 images are lost" in line
    (tmp_path / "t.csv").unlink()
    assert "images=false" in refused([str(run), f"out={tmp_path / 'x'}"], capsys)
    assert main(["rate", str(run), f"out={tmp_path / 'x'}", "images=false"]) == 0


FOUR = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
THREE = """
. . . . . 3 4 1 2 1 1 3 3 . 3
1 . 2 1 3 3 4 3 . . . . . . .
. . 2 1 3 4 4 . 2 1 1 3 3 . 4
"""


def counts_of(table: str) -> np.ndarray:
    rows = [[0 if cell == "." else int(cell) for cell in line.split()] for line in table.split("\n") if line]
    return np.array([np.bincount(unit, minlength=6)[1:] for unit in np.array(rows).T])


def test_alpha_is_that_of_krippendorffs_examples() -> None:
    """Krippendorff 2011, section C to E (four observers, twelve units), and the example of Wikipedia."""
    assert alpha(counts_of(FOUR), ordered=False)[0] == pytest.approx(0.743, abs=5e-4)
    assert alpha(counts_of(FOUR), ordered=True)[0] == pytest.approx(0.815, abs=5e-4)
    assert alpha(counts_of(THREE), ordered=False)[0] == pytest.approx(0.691, abs=5e-4)


@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=12))
def test_alpha_is_that_of_the_package(counts: list[list[int]]) -> None:
    krippendorff = pytest.importorskip("krippendorff")
    table = np.array(counts)
    if (table.sum(1) > 1).sum() == 0 or (table[table.sum(1) > 1].sum(0) > 0).sum() < 2:
        assert np.isnan(alpha(table, ordered=True)[0])
        return
    for level, ordered in (("nominal", False), ("ordinal", True)):
        expected = krippendorff.alpha(value_counts=table, value_domain=[0, 1, 2, 3], level_of_measurement=level)
        assert alpha(table, ordered)[0] == pytest.approx(expected, abs=1e-9)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TYPED = """
<script>
const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
KEYS.forEach(press);
const result = document.createElement("pre");
result.id = "result";
result.textContent = JSON.stringify(exported());
document.body.append(result);
</script>
"""


def browse(page: Path, profile: Path, keys: list[str]) -> dict[str, Any]:
    """Open the page in a browser, press the keys, and return what it would export."""
    assert BROWSER is not None
    typed = page.read_text().replace("</html>", TYPED.replace("KEYS", json.dumps(keys)) + "</html>")
    page.write_text(typed)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--virtual-time-budget=5000"]
    flags += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [BROWSER, *flags, "--dump-dom", page.as_uri()]
    for last in (False, True):  # Chromium itself hangs once in a while on a busy machine; the page is the same again
        try:
            dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
            break
        except subprocess.TimeoutExpired:
            if last:
                raise
    found = re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, dom[-2000:]
    return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_fills_the_form(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    """By the keys alone; a second visit goes on where the first has stopped; what it exports is read."""
    plan = make(two_runs, tmp_path / "sheets", "raters=1", "questions=2")
    page, original = tmp_path / "sheets" / "R1.html", (tmp_path / "sheets" / "R1.html").read_text()
    # A: helpful, tone; B: helpful, tone; preference. The 9 is no option; the 0 takes back, the arrows move.
    first = browse(page, tmp_path / "profile", ["2", "1", "9", "3", "2", "3", "ArrowUp", "0", "ArrowRight", "1"])
    page.write_text(original)
    second = browse(page, tmp_path / "profile", ["2", "ArrowLeft", "1", "e"])
    (one, _), (two, _) = plan.sheets["R1"]
    typed = {
        (one, "A", "helpful"): "A little",
        (one, "A", "tone"): "warm",
        (one, "B", "helpful"): "Not at all",
        (one, "both", "preference"): "B is better",
        (two, "A", "helpful"): "Yes it does",
    }
    assert {(r["item"], r["side"], r["axis"]): r["value"] for r in first["ratings"]} == typed
    typed |= {(two, "A", "tone"): "cold", (one, "B", "tone"): "warm"}
    assert {(r["item"], r["side"], r["axis"]): r["value"] for r in second["ratings"]} == typed
    (tmp_path / "sheets" / "R1.json").write_text(json.dumps(second))
    assert read(str(tmp_path / "sheets"))["raters"] == {"R1": {"rated": 7, "asked": 10}}
