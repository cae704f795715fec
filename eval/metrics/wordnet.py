"""Reading WordNet's own files: lemmas, hypernyms and Wu and Palmer's similarity.

nltk's reader (3.10) is not used: it opens only folders below nltk_data, needs a `lexnames` that Debian's wordnet-base
lacks and a second WordNet from its downloader, and no longer lemmatises repeatedly, which changes scores. It takes 3.3
s to load against 0.3 s, and seven times as long for a similarity.

The format is wndb(5WN): `index.POS` lists the synsets of a lemma by their byte offsets in `data.POS`, most frequent
sense first; `POS.exc` the irregular forms. The similarity is the one that nltk 3.9 computes (and the published WUPS
script with it), including its corner cases: depths count the longest way to the root, the lowest common hypernym is
chosen by the shortest, ties by name; verbs and adjectives have no common root, so one is imagined over all.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flamingo.errors import UserError

POS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
_ENDINGS = {
    "n": "s: ses:s ves:f xes:x zes:z ches:ch shes:sh men:man ies:y",
    "v": "s: ies:y es:e es: ed:e ed: ing:e ing:",
    "a": "er: est: er:e est:e",
    "r": "",
}
ENDINGS = {pos: [tuple(pair.split(":")) for pair in text.split()] for pos, text in _ENDINGS.items()}
ROOT = ("*", 0)
Key = tuple[str, int]  # part of speech, byte offset
FOLDERS = ("/usr/share/wordnet", "/usr/local/share/wordnet")


@dataclass(frozen=True)
class _Synset:
    name: str
    hypernyms: tuple[Key, ...]


class WordNet:
    """One folder of WordNet files."""

    def __init__(self, folder: Path) -> None:
        self._index = {pos: self._read_index(folder / f"index.{name}") for pos, name in POS.items()}
        self._data = {pos: (folder / f"data.{name}").read_bytes() for pos, name in POS.items()}
        self._irregular = {pos: self._read_irregular(folder / f"{name}.exc") for pos, name in POS.items()}
        self._known: dict[Key, _Synset] = {ROOT: _Synset("*ROOT*", ())}
        self.similarity = lru_cache(maxsize=200_000)(self._similarity)

    @staticmethod
    def _read_index(path: Path) -> dict[str, list[int]]:
        offsets = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):  # the licence is on lines that begin with blanks
                parts = line.split()
                offsets[parts[0]] = [int(offset) for offset in parts[len(parts) - int(parts[2]) :]]
        return offsets

    @staticmethod
    def _read_irregular(path: Path) -> dict[str, list[str]]:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        return {row[0]: row[1:] for row in rows if row}

    def lemmas(self, word: str, pos: str) -> list[str]:
        """Return the base forms of `word` that are in WordNet: the word itself, irregular forms, endings taken off."""
        if word in self._irregular[pos]:
            return self._in_index([word, *self._irregular[pos][word]], pos)
        forms = self._without_endings([word], pos)
        lemmas = self._in_index([word, *forms], pos)
        while forms and not lemmas:
            forms = self._without_endings(forms, pos)
            lemmas = self._in_index(forms, pos)
        return lemmas

    def _without_endings(self, forms: list[str], pos: str) -> list[str]:
        return [f[: len(f) - len(end)] + new for f in forms for end, new in ENDINGS[pos] if f.endswith(end)]

    def _in_index(self, forms: list[str], pos: str) -> list[str]:
        return list(dict.fromkeys(form for form in forms if form in self._index[pos]))

    def first_synset(self, word: str) -> Key | None:
        """Return the first sense, as a noun if it can be one, else as a verb, adjective, adverb."""
        for pos in POS:
            for lemma in self.lemmas(word.lower().replace(" ", "_"), pos):
                return pos, self._index[pos][lemma][0]
        return None

    def _synset(self, key: Key) -> _Synset:
        if key not in self._known:
            pos, offset = key
            blob = self._data[pos]
            parts = blob[offset : blob.index(b"\n", offset)].decode("utf-8").split("|")[0].split()
            words = int(parts[3], 16)
            first = parts[4].split("(")[0].lower()
            start = 4 + 2 * words
            pointers = [parts[start + 1 + 4 * i : start + 5 + 4 * i] for i in range(int(parts[start]))]
            above = tuple((p[2].replace("s", "a"), int(p[1])) for p in pointers if p[0] == "@")
            above += tuple((p[2].replace("s", "a"), int(p[1])) for p in pointers if p[0] == "@i")
            sense = self._index[pos].get(first, [offset]).index(offset) + 1
            self._known[key] = _Synset(f"{first}.{parts[2]}.{sense:02d}", above)
        return self._known[key]

    def _depth(self, key: Key, longest: bool) -> int:
        above = [1 + self._depth(parent, longest) for parent in self._synset(key).hypernyms]
        return (max if longest else min)(above, default=0)

    def _distances(self, key: Key, imagined: bool) -> dict[Key, int]:
        """Return the steps to every hypernym, itself included; the imagined root lies beyond the farthest."""
        distances: dict[Key, int] = {}
        queue = deque([(key, 0)])
        while queue:
            at, steps = queue.popleft()
            if at not in distances:
                distances[at] = steps
                queue.extend((parent, steps + 1) for parent in self._synset(at).hypernyms)
        if imagined and key != ROOT:
            distances[ROOT] = max(distances.values()) + 1
        return distances

    def _steps(self, first: Key, second: Key, imagined: bool) -> int:
        ours, theirs = self._distances(first, imagined), self._distances(second, imagined)
        return min(ours[key] + theirs[key] for key in ours.keys() & theirs.keys())

    def _similarity(self, word: str, other_word: str) -> float:
        """Return Wu and Palmer's similarity of the first senses; 0.0 if a word has none."""
        first, second = self.first_synset(word), self.first_synset(other_word)
        if first is None or second is None:
            return 0.0
        imagined = not first[0] == second[0] == "n"
        common = self._distances(first, False).keys() & self._distances(second, False).keys() | (
            {ROOT} if imagined else set()
        )
        if not common:
            return 0.0
        deepest = max(self._depth(key, longest=False) for key in common)
        lowest = [key for key in common if self._depth(key, longest=False) == deepest]
        chosen = first if first in lowest else min(lowest, key=lambda key: self._synset(key).name)
        depth = self._depth(chosen, longest=True) + 1
        return 2 * depth / (self._steps(first, chosen, imagined) + self._steps(second, chosen, imagined) + 2 * depth)


@lru_cache(maxsize=1)
def wordnet() -> WordNet:
    """Return the WordNet of this machine: in $WNHOME (or its `dict`), where packages put it, or in nltk's data.

    Raises:
        UserError: it is nowhere.
    """
    home = os.environ.get("WNHOME")
    nltk = [Path(folder) / "corpora" / "wordnet" for folder in (Path.home() / "nltk_data", "/usr/share/nltk_data")]
    folders = ([Path(home), Path(home) / "dict"] if home else []) + [Path(folder) for folder in FOLDERS] + nltk
    for folder in folders:
        if (folder / "data.noun").is_file():
            return WordNet(folder)
    raise UserError(
        "the metric wups needs WordNet's files (data.noun and the others): install the package wordnet-base, or set "
        "WNHOME to their folder; wordnet.princeton.edu publishes them"
    )


def wordnet_if_there() -> WordNet | None:
    """Return the WordNet of this machine, or None."""
    try:
        return wordnet()
    except UserError:
        return None
