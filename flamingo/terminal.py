"""Text from data as it may be printed: nothing in it moves the cursor, changes the terminal or reorders other text."""

from __future__ import annotations

import re

# Control characters but tab and line feed, the line separators, what sets the direction of text, half surrogate pairs
# (which no terminal's encoding has).
_UNPRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return a text with control characters, those of direction included, as escapes: ESC is shown as `\x1b`."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
