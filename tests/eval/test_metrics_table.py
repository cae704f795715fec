"""Metrics of whole sets against scikit-learn, nltk, and values worked out by hand; intervals against their promise."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from eval.metrics.interval import statistic_interval
from eval.metrics.medical import closed, open_scores, published_closed, published_open, token_f1
from eval.metrics.ranking import average_precision, mwap, roc_auc, winoground
from eval.metrics.table import measure
from eval.metrics.text import SCORE_NAMES, folded_match, ivqa_accuracy, scorer
from eval.metrics.vqa import normalise, vqa_accuracy, vqa_accuracy_by_value
from eval.metrics.wordnet import WordNet, wordnet
from eval.metrics.wups import lemmatised, wups
from eval.samples import Cell, Sample
from flamingo.errors import UserError


def answered(
    query_id: str,
    answer: str = "",
    golds: tuple[str, ...] = (),
    kind: str = "",
    cluster: str = "",
    candidates: tuple[str, ...] = (),
    log_probs: tuple[float, ...] = (),
) -> Sample:
    """What a metric reads of a sample; the rest is of no account."""
    return Sample(
        cell=Cell("task", 0, 0, "real"),
        query_id=query_id,
        demo_ids=(),
        turns=(),
        raw=answer,
        answer=answer,
        golds=golds,
        score=0.0,
        kind=kind,
        cluster=cluster,
        candidates=candidates,
        log_probs=log_probs,
    )


def test_contractions_are_the_published_table_gaps_included() -> None:
    said = {"dont": "don't", "couldntve": "couldntve", "couldn'tve": "couldn't've", "couldnt've": "couldn't've"}
    gaps = {"im": "im", "ive": "ive", "lets": "lets", "thatd": "thatd", "Im": "im", "somebody'd": "somebodyd"}
    for word, expected in {**said, **gaps, "yall'd've": "y'all'd've", "ow's'at": "'ow's'at"}.items():
        assert normalise(word) == expected


def test_the_historic_scorer_loses_all_who_agree() -> None:
    golds = ["unanswerable"] * 6 + ["dog"] * 4
    assert vqa_accuracy("unanswerable", golds) == 1.0
    assert vqa_accuracy_by_value("unanswerable", golds) == pytest.approx(0.4)


@pytest.mark.parametrize("seed", range(4))
def test_auc_and_average_precision_equal_those_of_sklearn_ties_and_weights_included(seed: int) -> None:
    rng = np.random.Generator(np.random.Philox(key=seed))
    scores = rng.integers(0, 12, size=200) / 4  # many ties
    positive = rng.random(200) < 0.3
    weights = rng.random((3, 200))
    assert roc_auc(scores, positive)[0] == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    for row, ours in zip(weights, roc_auc(scores, positive, weights), strict=True):
        assert ours == pytest.approx(roc_auc_score(positive, scores, sample_weight=row), abs=1e-12)
    for row, ours in zip(weights, average_precision(scores, positive, weights), strict=True):
        assert ours == pytest.approx(average_precision_score(positive, scores, sample_weight=row), abs=1e-12)


def test_mwap_equals_the_published_computation() -> None:
    rng = np.random.Generator(np.random.Philox(key=5))
    pairs = [("cut", "phone"), ("cut", "apple"), ("wash", "phone"), ("fry", "shoe")]
    kinds = ["negative", "positive", "verb", "noun", "both apart"]
    own = [int(i) for i in rng.integers(0, 4, size=300)]
    annotated = [kinds[int(i)] for i in rng.integers(0, 5, size=300)]
    videos = [f"v{i}" for i in rng.integers(0, 40, size=300)]
    matrix = rng.normal(size=(300, 4))
    precisions = []
    for column, (verb, noun) in enumerate(pairs):
        groups: dict[str, list[int]] = {"positive": [], "hard": [], "easy": []}
        for i in range(300):
            if own[i] == column:
                place = {"positive": "positive", "negative": "easy"}.get(annotated[i], "hard")
                groups[place].append(i)
            elif annotated[i] == "positive":
                other = pairs[own[i]]
                groups["hard" if (other[0] == verb) != (other[1] == noun) else "easy"].append(i)
        rows = groups["positive"] + groups["easy"] + groups["hard"]
        share = [1 / [videos[j] for j in group].count(videos[i]) for group in groups.values() for i in group]
        by_row = dict(zip([i for group in groups.values() for i in group], share, strict=True))
        truth = [i in groups["positive"] for i in rows]
        weight = [by_row[i] for i in rows]
        precisions.append(average_precision_score(truth, matrix[rows, column], sample_weight=weight))
    names = [" ".join(pairs[i]) for i in own]
    assert mwap(matrix, names, annotated, videos, pairs)[0] == pytest.approx(np.mean(precisions), abs=1e-12)
    answers = [
        answered(f"{i}", "", (names[i],), annotated[i], videos[i], tuple(map(" ".join, pairs)), tuple(matrix[i]))
        for i in range(300)
    ]
    value = measure(["mwap"], answers)["mwap"]
    assert value["score"] == pytest.approx(np.mean(precisions), abs=1e-12)
    assert value["low"] < value["score"] < value["high"]


def test_winoground_is_strict_and_not_mixed_up() -> None:
    right, text_only, constant = [[2.0, 1], [1, 2]], [[3.0, 2], [2.5, 2.6]], [[0.0, 0], [0, 0]]
    blind = [[1.0, 1.0], [0.5, 0.5]]  # the same for both images: only captions differ
    text, image, group = winoground(np.array([right, text_only, constant, blind]))
    assert text.tolist() == [True, True, False, False]
    assert image.tolist() == [True, True, False, False]
    # s[caption, image]: caption 0 fits image 0 best of both captions, but both captions like image 0 more.
    text, image, group = winoground(np.array([[[5.0, 3.0], [4.5, 3.5]]]))
    assert (text[0], image[0], group[0]) == (True, False, False)
    answers = [
        answered("7.0", cluster="7", log_probs=(5.0, 4.5)),
        answered("7.1", cluster="7", log_probs=(3.0, 3.5)),
        answered("7.none", cluster="7", log_probs=(1.0, 0.0)),
        answered("8.0", cluster="8", log_probs=(1.0, 0.0)),
        answered("8.1", cluster="8", log_probs=(0.0, 1.0)),
        answered("8.none", cluster="8", log_probs=(0.0, 0.0)),
    ]
    found = measure(["winoground"], answers)
    assert (found["winoground_text"]["score"], found["winoground_image"]["score"]) == (1.0, 0.5)
    # Less the captions' own probability: item 7 has 4.0, 4.5 for image 0 and 2.0, 3.5 for image 1.
    assert (found["winoground_pmi_text"]["score"], found["winoground_pmi_group"]["n"]) == (0.5, 2)
    assert measure(["winoground"], answers[:1]) == {}


def test_medical_scores_as_published_and_mended() -> None:
    # Repeats inflate the published recall: 3 hits of "lung", "left" missed.
    assert published_open("lung lung lung", "left lung") == pytest.approx((3 / 4, 1.0, 6 / 7))
    assert open_scores("lung lung lung", "left lung") == pytest.approx((1 / 2, 1 / 3, 0.4))
    assert published_closed("yes no", "no") == published_closed("yes no", "yes") == 1.0
    assert closed("yes no", "no") == closed("yes no", "yes") == 0.0
    assert (published_closed("normal", "no"), closed("normal", "no")) == (1.0, 0.0)
    assert (published_closed("left", "left"), closed("on the left", "left")) == (0.0, 1.0)
    assert (closed("No, it is not.", "no"), closed("it cannot", "no")) == (1.0, 0.0)
    assert token_f1("x", []) == published_open("", "a")[0] == 0.0
    answers = [
        answered("1", "yes", ("no",), "CLOSED "),
        answered("2", "no", ("no",), "closed", cluster="p"),
        answered("3", "the left lung", ("left lung",), "OPEN", cluster="p"),
    ]
    found = measure(["medical"], answers)
    assert (found["closed"]["score"], found["closed_if_always_no"]["score"], found["closed"]["n"]) == (0.5, 1.0, 2)
    assert (found["open_exact"]["score"], found["open_f1"]["n"]) == (1.0, 1)


def test_auc_of_ranked_answers_has_the_positive_class_last() -> None:
    rng = np.random.Generator(np.random.Philox(key=9))
    margins = rng.normal(size=60)
    truth = ["yes" if m + rng.normal() > 0 else "no" for m in margins]
    rows = enumerate(zip(margins, truth, strict=True))
    answers = [answered(f"{i}", "", (t,), "", f"{i}", ("no", "yes"), (0.0, float(m))) for i, (m, t) in rows]
    value = measure(["roc_auc"], answers)["roc_auc"]
    assert value["score"] == pytest.approx(roc_auc_score([t == "yes" for t in truth], margins), abs=1e-12)
    assert value["low"] < value["score"] < value["high"]
    assert measure(["roc_auc"], answers[::-1])["roc_auc"] == value
    with pytest.raises(UserError, match="two ranked candidates"):
        measure(["roc_auc"], [answered("1")])


def test_the_interval_of_an_auc_covers_the_truth() -> None:
    rng = np.random.Generator(np.random.Philox(key=11))
    hits = 0
    for _ in range(60):
        positive = rng.random(150) < 0.5
        scores = rng.normal(size=150) + positive * 0.9538725524  # an AUC of 0.75
        interval = statistic_interval(partial(roc_auc, scores, positive), [str(i) for i in range(150)], 300)
        hits += interval.low <= 0.75 <= interval.high
    assert 52 <= hits <= 60


def test_captions_and_vqa_are_measured_with_their_parts() -> None:
    golds = ("a man on a horse", "someone rides a brown horse")
    answers = [answered(f"{i}", "a man on a brown horse", golds, "", f"{i}") for i in range(3)]
    answers.append(answered("4", "a red bus", ("a bus in the street",), "", "4"))
    found = measure(["captions"], answers)
    assert {"cider", "bleu_1", "bleu_4", "rouge_l"} <= found.keys()
    assert found["bleu_1"]["low"] <= found["bleu_1"]["score"] <= found["bleu_1"]["high"]
    vqa = [answered("1", "2", ("two",) * 5 + ("2",) * 5, "number"), answered("2", "red", ("blue",) * 10, "other")]
    found = measure(["vqa"], vqa)
    assert (found["vqa_accuracy"]["score"], found["vqa_accuracy number"]["score"]) == (0.5, 1.0)


def test_single_answers() -> None:
    assert folded_match("A Dog.", ["a dog"]) == 1.0
    assert folded_match("", [""]) == 0.0
    assert [ivqa_accuracy(a, ["spoon", "spoon", "fork", "ladle"]) for a in ("Spoon", "fork", "cup")] == [1.0, 0.5, 0.0]
    assert [scorer("answered", [[]])(answer, []) for answer in ("yes", " ")] == [1.0, 0.0]
    assert scorer("cider", [["a man"], ["a dog runs"]])("a dog runs", ["a dog runs"]) > 0
    for name in set(SCORE_NAMES) - {"wups", "says_yes", "answered"}:  # all but yes is a no; any answer is one
        assert scorer(name, [["x"], ["y"]])("never said", ["x"] * 10) == 0.0


SMALL_NET = {  # lemma: (its synset's parents)
    "entity": [],
    "animal": ["entity"],
    "dog": ["animal", "pet"],
    "cat": ["animal"],
    "pet": ["animal"],
    "artifact": ["entity"],
    "car": ["artifact"],
}


def small_wordnet(folder: Path) -> Path:
    """WordNet's files for a handful of nouns and two verbs."""
    folder.mkdir()
    for pos in ("noun", "verb", "adj", "adv"):
        for kind in ("index", "data"):
            (folder / f"{kind}.{pos}").write_text("  1 a line of the licence\n" if pos != "noun" else "")
        (folder / f"{pos}.exc").write_text("mice mouse\n" if pos == "noun" else "ran run\n" if pos == "verb" else "")

    def write(pos: str, letter: str, net: dict[str, list[str]]) -> None:
        offsets, data = dict.fromkeys(net, 0), ""
        for _ in range(2):  # offsets have a fixed width, so a second pass has them right
            data, index = "  1 a line of the licence\n", "  1 a line of the licence\n"
            for lemma, parents in net.items():
                offsets[lemma] = len(data)
                pointers = "".join(f" @ {offsets[parent]:08d} {letter} 0000" for parent in parents)
                frames = " 01 + 02 00" if letter == "v" else ""
                head = f"{offsets[lemma]:08d} 03 {letter} 01 {lemma} 0"
                data += f"{head} {len(parents):03d}{pointers}{frames} | a gloss  \n"
                index += f"{lemma} {letter} 1 {'1 @ ' if parents else '0 '}1 0 {offsets[lemma]:08d}  \n"
            (folder / f"data.{pos}").write_text(data)
            (folder / f"index.{pos}").write_text(index)

    write("noun", "n", SMALL_NET)
    write("verb", "v", {"move": [], "run": ["move"], "see": []})
    return folder


def test_wordnet_similarities_by_hand(tmp_path: Path) -> None:
    net = WordNet(small_wordnet(tmp_path / "wn"))
    # dog has two ways up; depths count the longest: animal is at 2, so 2 * 2 / (1 + 1 + 2 * 2).
    assert net.similarity("dog", "cat") == pytest.approx(4 / 6)
    assert net.similarity("dogs", "cars") == pytest.approx(2 / (2 + 2 + 2))
    # Verbs have no common root; one is imagined over them at depth 1: see is one step below, run two, dog three.
    assert net.similarity("run", "see") == pytest.approx(2 / (2 + 1 + 2))
    assert net.similarity("run", "dog") == pytest.approx(2 / (2 + 3 + 2))
    assert net.similarity("nothing", "dog") == 0.0
    assert lemmatised("The dogs ran to cars!", net) == ["dog", "run", "car"]
    assert wups(["dog", "run"], ["cat", "run"], net.similarity) == pytest.approx(4 / 6)
    assert wups(["dog", "run"], ["cat", "run"], net.similarity, 0.9) == pytest.approx(4 / 60)
    assert wups([], ["cat"], net.similarity) == 0.0


def test_a_missing_wordnet_is_told_before_anything_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.metrics.wordnet.FOLDERS", ())
    monkeypatch.setenv("HOME", str(tmp_path))
    wordnet.cache_clear()
    with pytest.raises(UserError, match="needs WordNet's files"):
        scorer("wups", [["a dog"]])
    monkeypatch.setenv("WNHOME", str(small_wordnet(tmp_path / "wn")))
    assert scorer("wups", [["a dog"]])("the dogs", ["a dog"]) == 1.0
    wordnet.cache_clear()
