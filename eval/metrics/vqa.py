"""VQA accuracy: the share of other annotators who gave the same answer, three being enough.

The rule and its normalisation are those of Antol et al. 2015 as published with the data set, historic quirks included,
because published figures have them: a comma between digits decides how *every* punctuation mark is treated, and the
expression meant to keep the dot of a decimal has its look-behind misspelt, so that any dot not followed by a
digit goes. Each is marked below. Answers are normalised only where the annotators disagree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"(\d)(,)(\d)")
_DOT = re.compile(r"(?!<=\d)(\.)(?!\d)")  # misspelt in the published scorer, see above
_DOT_LIMIT = 32  # the scorer passes re.UNICODE (= 32) where the number of replacements goes
_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBER_WORDS)}
_CONTRACTED = (
    "'twas ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll "
    "how's isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're "
    "there's they'd they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd where's "
    "where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"
)
_TWICE_CONTRACTED = (
    "'ow's'at couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've "
    "something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'd've y'all'll you'd've"
)


def _without_one_apostrophe(word: str) -> list[str]:
    """Return `word` without one of its apostrophes, each in turn."""
    return [word[:index] + word[index + 1 :] for index, letter in enumerate(word) if letter == "'"]


# The published table, whose gaps count: "im", "ive" and "lets" are not in it (its keys for the first two are written
# with a capital, which a lower-cased word never equals), and "somebody'd" is in it the wrong way round.
_CONTRACTIONS = {short: word for word in _CONTRACTED.split() for short in _without_one_apostrophe(word)}
_CONTRACTIONS |= {short: word for word in _TWICE_CONTRACTED.split() for short in _without_one_apostrophe(word)}
_CONTRACTIONS["somebody'd"] = "somebodyd"


def normalise(answer: str) -> str:
    """Return `answer` without punctuation, articles and capitals, small numbers as digits, as published."""
    text = answer
    digit_comma = _DIGIT_COMMA.search(answer) is not None
    for mark in _PUNCTUATION:
        if f"{mark} " in answer or f" {mark}" in answer or digit_comma:
            text = text.replace(mark, "")
        else:
            text = text.replace(mark, " ")
    text = _DOT.sub("", text, count=_DOT_LIMIT)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, golds: Sequence[str]) -> float:
    """Return mean over annotators i of min(1, matches among the others / 3); a single gold answer is an exact match.

    `golds` are the annotators' answers, ten in the published sets. "The others" is by position, never by value.
    """
    prediction, annotators = _flat(answer), [_flat(gold) for gold in golds]
    if len(set(annotators)) > 1:
        prediction, annotators = normalise(prediction), [normalise(gold) for gold in annotators]
    if len(annotators) == 1:
        return float(prediction == annotators[0])
    matches = [float(gold == prediction) for gold in annotators]
    return sum(min(1.0, (sum(matches) - own) / 3) for own in matches) / len(matches)


def vqa_accuracy_by_value(answer: str, golds: Sequence[str]) -> float:
    """Return the score with a historic fault, to compare old figures: "the others" are those who answered otherwise.

    On annotations without ids a published harness compared annotators by value, so all who agree vanish at once; with
    it VizWiz scores are up to 27 points too low.
    """
    prediction, annotators = normalise(_flat(answer)), [normalise(_flat(gold)) for gold in golds]
    others = [[other for other in annotators if other != gold] for gold in annotators]
    return sum(min(1.0, rest.count(prediction) / 3) for rest in others) / len(annotators)


def _flat(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
