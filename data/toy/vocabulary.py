"""The toy's tokenizer: a byte-level BPE whose merges are laid down instead of counted.

Every word of the toy is one token and every name is two, its syllables. Merges counted on a corpus would make whole
tokens of the names that occur often, and a held-out name would then differ from a training name in kind. Text outside
the toy falls back to bytes. Needs `tokenizers` only.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data.toy.clips import MOTIONS
from data.toy.names import FIRST, SECOND
from data.toy.scenes import COLOURS, COUNTS, PLACES, PLURALS, SHAPES

PAD, EOS = "<pad>", "</s>"

_SPACE = "Ġ"  # how byte-level BPE writes the space before a word
_DIGITS = ("five", "six", "seven", "eight", "nine")
_QUESTIONS = (
    "what where how many colour shape is it are they the there big small or a of left above yes no in at moving"
)


def words() -> list[str]:
    """Return every word of the toy except the names, in a fixed order."""
    parts = [*SHAPES, *PLURALS.values(), *COLOURS, *COUNTS, *_DIGITS, *" ".join(PLACES).split(), *_QUESTIONS.split()]
    return list(dict.fromkeys([*parts, *" ".join(MOTIONS).split(), "digit", "glyph"]))


def _merges() -> list[tuple[str, str]]:
    """Merges in order of priority: syllables, syllables after a space, then each word from left to right."""
    parts = sorted({*FIRST, *SECOND})
    merges = [(part[0], part[1]) for part in parts]
    merges += [(_SPACE, part) for part in parts]
    for word in words():
        for spelling in (_SPACE + word, word):
            pieces = _apply(list(spelling), merges)
            while len(pieces) > 1:
                merges.append((pieces[0], pieces[1]))
                pieces = _apply(pieces, merges[-1:])
    return merges


def _apply(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Merge neighbouring pieces, the earliest merge first, as BPE does."""
    for pair in merges:
        i = 0
        while i < len(pieces) - 1:
            if (pieces[i], pieces[i + 1]) == pair:
                pieces[i : i + 2] = ["".join(pair)]
            i += 1
    return pieces


def build_tokenizer() -> Tokenizer:
    """Return the tokenizer: padding 0, end of sequence 1, then the 256 bytes, then the merged pieces."""
    merges = _merges()
    entries = [PAD, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, EOS])
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """Write the folder that `transformers.AutoTokenizer.from_pretrained` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
