"""Decides which web texts and images are kept, by the published rules of OBELICS and M3W.

    obelics   paragraphs and documents by length, repetition, special characters, function words, flagged words and
              punctuation; images by sides, aspect and words in their address (Laurencon et al. 2023, appendix A)
    m3w       images with a side below 64 pixels, an aspect above 3 or a single colour are left out (Alayrac et al.
              2022, appendix A.3.1); documents by the rules of MassiveText (Rae et al. 2021, table A1)
    none      only images that cannot be read are left out

OBELICS' rules that need a model are missing: language identification (the share of English function words replaces it),
perplexity, and NSFW; where a source has such scores, use `--where`. --flagged-words, --common-words and --spam-words
take lists. Documents are not compared with each other: `data.prepare.sources.deduplicate` does that afterwards.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flamingo.errors import UserError

# Their share tells running English text from lists, code and other languages.
_FUNCTION_WORDS = """
    a about above after again against all also am an and any are as at be because been before being below
    between both but by can could did do does doing down during each either few for from further had has have
    having he her here hers him himself his how however i if in into is it its itself just me might more most
    must my no nor not now of off on once one only or other our ours out over own rather same she should since
    so some such than that the their theirs them then there these they this those though through to too toward
    under until up upon us very was we were what when where whether which while who whom whose why will with
    within without would you your yours
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
SIGNS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])  # MassiveText: two of these
BANNED = ("logo", "button", "icon", "plugin", "widget", "porn", "xxx", "sex")
TOKEN = re.compile(rf"[\w']+|[{re.escape(string.punctuation)}]")


@dataclass(frozen=True, slots=True)
class TextRule:
    """Limits of a text. The defaults are no limits."""

    min_words: int = 0
    max_words: int = 1 << 40
    max_character_repetition: float = 1.0
    max_word_repetition: float = 1.0
    max_special: float = 1.0
    min_function: float = 0.0
    max_flagged: float = 1.0
    min_punctuation: float = 0.0
    min_common: float = 0.0
    max_spam: float = 1.0
    massive: bool = False

    def reason(
        self,
        text: str,
        flagged: frozenset[str] = frozenset(),
        common: frozenset[str] = frozenset(),
        spam: frozenset[str] = frozenset(),
    ) -> str:
        """Return the first reason to drop a text, "" when there is none."""
        words = words_of(text)
        if len(words) < self.min_words:
            return f"fewer than {self.min_words} words"
        if len(words) > self.max_words:
            return f"more than {self.max_words} words"
        if not words:
            return ""
        share = [
            (repetition(text, 10) > self.max_character_repetition, "characters repeat"),
            (repetition(words, 5) > self.max_word_repetition, "words repeat"),
            (sum(not c.isalpha() for c in text) / len(text) > self.max_special, "too many special characters"),
            (_share(words, FUNCTION_WORDS) < self.min_function, "too few function words"),
            (_share(words, flagged) > self.max_flagged, "too many flagged words"),
            (len(words) >= 12 and punctuation(text) < self.min_punctuation, "too little punctuation"),
            (bool(common) and _share(words, common) < self.min_common, "too few common words"),
            (bool(spam) and self.max_spam < 1 and _share(words, spam) >= self.max_spam, "too many spam words"),
        ]
        return next((why for bad, why in share if bad), "") or (massive(text, words) if self.massive else "")


@dataclass(frozen=True, slots=True)
class WebRule:
    """What is kept of a web page. Images with one of the `banned` words in their address are dropped."""

    paragraph: TextRule
    document: TextRule
    max_images: int = 1 << 30
    min_side: int = 1
    max_side: int = 1 << 30
    max_aspect: float = 1e9
    banned: tuple[str, ...] = ()
    plain: bool = True


RULES = {
    "obelics": WebRule(
        TextRule(4, 1000, 0.1, 0.1, 0.3, 0.3, 0.01, 0.001, 0.8, 0.12),
        TextRule(10, 2000, 0.1, 0.2, 0.275, 0.35, 0.01, 0.03, 0.9),
        max_images=30,
        min_side=150,
        max_side=20_000,
        max_aspect=2.0,
        banned=BANNED,
    ),
    "m3w": WebRule(TextRule(), TextRule(massive=True), min_side=64, max_aspect=3.0, plain=False),
    "none": WebRule(TextRule(), TextRule()),
}


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without the punctuation around them."""
    stripped = (word.strip(string.punctuation + "“”‘’…–—").lower() for word in text.split())
    return [word for word in stripped if word]


def repetition(items: str | list[str], n: int) -> float:
    """Return the share of the n-grams of a text (characters) or a list (words) that are repetitions.

    Words: all n-grams that occur more than once count. Characters: only the sqrt(number of distinct n-grams) commonest
    of those, because some letters always meet again. A text too short for two n-grams has 0.
    """
    grams = (
        Counter(items[at : at + n] for at in range(len(items) - n + 1))
        if isinstance(items, str)
        else Counter(tuple(items[at : at + n]) for at in range(len(items) - n + 1))
    )
    if not grams:
        return 0.0
    repeated = sorted((count for count in grams.values() if count > 1), reverse=True)
    if isinstance(items, str):
        repeated = repeated[: int(len(grams) ** 0.5)]
    return sum(repeated) / grams.total()


def punctuation(text: str) -> float:
    """Return the share of punctuation marks among all words and marks."""
    tokens = TOKEN.findall(text)
    return sum(token in string.punctuation for token in tokens) / max(len(tokens), 1)


def _share(words: list[str], known: frozenset[str]) -> float:
    return sum(word in known for word in words) / len(words)


def massive(text: str, words: list[str]) -> str:
    """Return the first reason of MassiveText (Rae et al. 2021, table A1) to drop a document, or ""."""
    return _quality(text, words) or repeats(text, words)


TOP_GRAMS = ((2, 0.20), (3, 0.18), (4, 0.16))  # most of the characters that the commonest n-gram may cover
DOUBLE_GRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))  # and all repeated n-grams together


def repeats(text: str, words: list[str]) -> str:
    """Return the first reason of MassiveText's rules on repetition to drop a document, or ""."""
    for what, parts in (("lines", text.split("\n")), ("paragraphs", text.split("\n\n"))):
        parts = [part.strip() for part in parts if part.strip()]
        known: set[str] = set()
        again = [part for part in parts if part in known or known.add(part)]  # type: ignore[func-returns-value]
        if len(again) > 0.3 * len(parts):
            return f"too many {what} return"
        if sum(map(len, again)) > 0.2 * len(text):
            return f"too much of it in {what} that return"
    size = sum(map(len, words))
    for n, most in TOP_GRAMS:
        grams = Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))
        covered = max((count * sum(map(len, gram)) for gram, count in grams.items() if count > 1), default=0)
        if covered > most * size:
            return f"one run of {n} words returns too often"
    for n, most in DOUBLE_GRAMS:
        if _doubled(words, n) > most * size:
            return f"too many runs of {n} words return"
    return ""


def _doubled(words: list[str], n: int) -> int:
    """Return how many characters are in runs of n words that occurred before, none counted twice."""
    known: set[tuple[str, ...]] = set()
    covered, free = 0, 0  # words before `free` have been counted
    for at in range(len(words) - n + 1):
        gram = tuple(words[at : at + n])
        if gram in known:
            covered += sum(map(len, words[max(at, free) : at + n]))
            free = at + n
        known.add(gram)
    return covered


def _quality(text: str, words: list[str]) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    checks = [
        (not 50 <= len(words) <= 100_000, "fewer than 50 or more than 100,000 words"),
        (not 3 <= sum(map(len, words)) / len(words) <= 10, "mean word length outside 3 to 10"),
        ((text.count("#") + text.count("...") + text.count("…")) > 0.1 * len(words), "too many hashes or ellipses"),
        (sum(line[0] in "•*-" for line in lines) > 0.9 * len(lines), "mostly bullet points"),
        (sum(line.endswith(("...", "…")) for line in lines) > 0.3 * len(lines), "too many lines end in an ellipsis"),
        (sum(any(c.isalpha() for c in word) for word in words) < 0.8 * len(words), "too few words with letters"),
        (len(SIGNS & set(words)) < 2, "fewer than two of the commonest English words"),
    ]
    return next((why for bad, why in checks if bad), "")


@lru_cache(maxsize=4)
def word_list(path: str | None) -> frozenset[str]:
    """Return the words of a file with one word a line. Raises UserError."""
    if path is None:
        return frozenset()
    try:
        return frozenset(word.strip().lower() for word in Path(path).read_text("utf-8").split("\n") if word.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"word list {path} cannot be read ({error}); give a UTF-8 file with one word a line") from None
