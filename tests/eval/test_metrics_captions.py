"""Caption scores against the COCO caption scorers themselves, on captions that are meant to trip a port."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from eval.metrics.captions import Cider, bleu, bleu_counts, longest_common, rouge_l
from eval.metrics.ptb import REMOVED, caption_words, ptb_tokenize

PEER = importlib.util.find_spec("pycocoevalcap")
needs_peer = pytest.mark.skipif(PEER is None, reason="pycocoevalcap is not installed (requirements-peers.txt)")
needs_java = pytest.mark.skipif(
    PEER is None or shutil.which("java") is None,
    reason="Stanford's tokenizer needs java and pycocoevalcap (requirements-peers.txt)",
)

# What CoreNLP 3.4.1 makes of these, punctuation removed.
GOLDEN = {
    "A man riding a horse.": "a man riding a horse",
    'a cat & a "bird" (small) on a fence': "a cat & a bird -lrb- small -rrb- on a fence",
    "mr. smith's dog can't run": "mr. smith 's dog ca n't run",
    "you cannot, we're gonna": "you can not we 're gon na",
    "wait... what?? wow!! really?!": "wait what ?? wow !! really ?!",
    "a well-known half/half t-shirt -- 3-year-old": "a well-known half/half t-shirt 3-year-old",
    "at 5:30 p.m. in the U.S.A. etc.": "at 5:30 p.m. in the u.s.a. etc.",
    "$5.00, 50% off, 3,000 #1": "$ 5.00 50 % off 3,000 # 1",
    "the 1950's '90s o'clock y'all": "the 1950 's '90s o'clock y' all",
    "train no. 7, no. it is in st. louis": "train no. 7 no it is in st. louis",
    "AT&T or at&t": "at&t or at & t",
    "half ½ café “quoted” — it’s": "half 1/2 café quoted it 's",
    "a [sign] {x} foo_bar :)": "a -lsb- sign -rsb- -lcb- x -rcb- foo_bar :-rrb-",
    # Symbols are words of their own, letters of scripts with vowel signs belong together, an emoji is nothing.
    "I \u2665 you \u2192 ok\u263a \u24b6 \u2780": "i \u2665 you \u2192 ok \u263a \u24d0 \u2780",
    "a dog \U0001f415 and \U0001f600": "a dog and",
    "हिन्दी में லாரி กินข้าวที่": "हिन्दी में லாரி กินข้าวที่",
    "co\u00adoperate \u00ad 5\u00ad6": "cooperate 56",
    "\u0663\u066b\u0665 १२ \uff15cm": "\u0663\u066b\u0665 १२ \uff15cm",
    "\u201alow\u201f \u201c\u201cy <<z>> a==b «w»": "\u201a low \u201f ```` y << z >> a = = b w",
    "\u2102 is \u2103 \u2168 ½ \u2150 ²": "\u2102 is \u2103 1/2 ²",
    "\uab70 \u08a0 \u20aa5": "\u08a0 5",
}
_WORDS = (
    "a a a the man dog's dogs' can't cannot it's i'm t-shirt red-and-white half/half 1/2 5:30 p.m. U.S. mr. st. 10 "
    "3,000 $5 50% & AT&T 1950s 50's '90s 'em o'clock gonna café ½ #1 @home 3-year-old x-ray w/ ... -- - ' \" ( ) [ ] / "
    "* + = ? ! ?? , ; : . ’ “ ” – … it’s Man The I etc. vs. ft. 6'2\" 4x4 4.5 .5 O'Brien e-mail riding on horse cat"
)
WORDS = _WORDS.split()


def captions(seed: int, count: int, longest: int = 12) -> list[str]:
    rng = np.random.Generator(np.random.Philox(key=seed))
    made = []
    for _ in range(count):
        words = [WORDS[int(i)] for i in rng.integers(0, len(WORDS), size=rng.integers(1, longest))]
        gaps = [" " if gap > 0.08 else "" for gap in rng.random(len(words))]
        made.append("".join(word + gap for word, gap in zip(words, gaps, strict=True)).strip())
    return made


@pytest.mark.parametrize(("caption", "words"), GOLDEN.items())
def test_words_are_those_of_the_ptb_tokenizer(caption: str, words: str) -> None:
    assert caption_words(caption) == words


def test_every_character_of_a_caption_is_passed_once() -> None:
    for caption in captions(1, 300):
        joined = "".join(ptb_tokenize(caption))
        assert len(joined) >= len(caption.replace(" ", "")) - caption.count("’") - 2 * caption.count("½")
    assert ptb_tokenize("") == ptb_tokenize("\x07 \t") == []


def java_words(lines: list[str], folder: Path) -> list[list[str]]:
    """What the Java program and the list of marks leave of each line."""
    assert PEER is not None
    assert PEER.origin or PEER.submodule_search_locations
    jar = Path(next(iter(PEER.submodule_search_locations or []))) / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    (folder / "lines.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    done = subprocess.run([*command, str(folder / "lines.txt")], capture_output=True, check=True)
    theirs = done.stdout.decode().split("\n")[: len(lines)]
    return [[word for word in line.rstrip().split(" ") if word and word not in REMOVED] for line in theirs]


@needs_java
@pytest.mark.slow
def test_every_character_alone_and_in_a_word_equals_the_java_program(tmp_path: Path) -> None:
    """All of the BMP that is assigned, and emoji; but not what ends a line, of which the program makes two lines."""
    ends = {*range(0x0A, 0x0E), *range(0x1C, 0x1F), 0x85, 0x2028, 0x2029}
    codes = [*range(0x20, 0x10000), *range(0x1F000, 0x1FB00), *range(0x10000, 0x110000, 997)]
    known = [chr(c) for c in codes if c not in ends and unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs")]
    lines = [form.format(c) for form in ("{}", "a{}b", "{0}{0}", "5{}6", "{}ab", "x{}. b") for c in known]
    theirs = java_words(lines, tmp_path)
    assert len(theirs) == len(lines) > 300_000
    wrong = [line for line, words in zip(lines, theirs, strict=True) if caption_words(line).split() != words]
    assert not wrong, wrong[:20]


@needs_java
@pytest.mark.slow
def test_words_equal_those_of_the_java_program(tmp_path: Path) -> None:
    lines = [*GOLDEN, *captions(2, 4000)]
    kept = java_words(lines, tmp_path)
    wrong = [
        line for line, words in zip(lines, kept, strict=False) if caption_words(line).split(" ") != (words or [""])
    ]
    assert not set(wrong) & set(GOLDEN)
    assert len(wrong) <= 0.003 * len(lines), wrong[:10]


def sets(seed: int) -> tuple[list[str], list[list[str]]]:
    """Captions and references of 40 images; some captions are a reference, some are empty, some references repeat."""
    said = captions(seed, 40)
    references = [captions(seed + 1000 + i, 1 + i % 5) for i in range(40)]
    said[3], said[4], said[5] = references[3][0], "", "..."
    references[6] = references[6] * 2
    return said, references


@needs_peer
@pytest.mark.parametrize("seed", [10, 20, 30])
def test_scores_equal_the_reference_scorers(seed: int) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider as TheirCider
    from pycocoevalcap.rouge.rouge import Rouge

    said, references = sets(seed)
    result = {i: [caption_words(caption)] for i, caption in enumerate(said)}
    truth = {i: [caption_words(r) for r in captions] for i, captions in enumerate(references)}
    mean, each = TheirCider().compute_score(truth, result)
    cider = Cider(references)
    ours = [cider.score(caption, refs) for caption, refs in zip(said, references, strict=True)]
    assert np.abs(np.array(ours) - each).max() < 1e-6
    assert abs(np.mean(ours) - mean) < 1e-6
    mean, each = Rouge().compute_score(truth, result)
    ours = [rouge_l(caption, refs) for caption, refs in zip(said, references, strict=True)]
    assert np.abs(np.array(ours) - each).max() < 1e-6
    corpus, _ = Bleu(4).compute_score(truth, result, verbose=0)
    counts = np.stack([bleu_counts(caption, refs) for caption, refs in zip(said, references, strict=True)])
    assert np.abs(bleu(counts.sum(0)) - corpus).max() < 1e-6


def test_cider_depends_on_the_set_and_a_part_of_it_does_not() -> None:
    said, references = sets(40)
    whole, half = Cider(references), Cider(references[:20])
    ours = [whole.score(c, r) for c, r in zip(said[:20], references[:20], strict=True)]
    theirs = [half.score(c, r) for c, r in zip(said[:20], references[:20], strict=True)]
    assert abs(np.mean(ours) - np.mean(theirs)) > 1e-3
    assert whole.score("a man riding a horse", ["a man riding a horse"]) == pytest.approx(10.0)
    assert whole.score("", ["a man"]) == 0.0


def test_small_values_by_hand() -> None:
    assert longest_common("abcd", "bxd") == 2
    assert rouge_l("a man", ["a man"]) == pytest.approx(1.0)
    # 2 of 3 words said, 2 of 4 of the reference: p = 2/3, r = 1/2, (1 + 1.44) p r / (r + 1.44 p)
    assert rouge_l("a red man", ["a man on horse"]) == pytest.approx(2.44 / 3 / (0.5 + 0.96))
    counts = bleu_counts("the the the the", ["the cat is on", "there is the cat"])
    assert counts.tolist() == [1, 0, 0, 0, 4, 3, 2, 1, 4, 4]
    assert bleu(counts)[0] == pytest.approx(0.25)
