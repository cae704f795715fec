"""Which fields of a row name images, videos or sounds: what has them and they are not read is never learnt as text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from data.prepare.units import Dropped

_WORD = re.compile(
    r"(?:^|[^a-z])(?:imgs?|images?|pictures?|pics?|photos?|videos?|clips?|frames?|audios?|sounds?|speech|media)(?:$|[^a-z])"
)
_ABOUT = re.compile(r"(?:^|[^a-z])(?:id|ids|width|height|size|count|num|number|caption|source|split|license|type)$")


def names_media(key: str) -> bool:
    """Return whether a field is called as media are, and not as a fact about them (`image_id`, `video_width`)."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    return bool(_WORD.search(words)) and not _ABOUT.search(words)


def refuse_other_media(row: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise Dropped for a row that has media in a field that is not one of those known."""
    known = set(known)
    for key, value in row.items():
        if key not in known and value not in (None, "", [], {}) and names_media(str(key)):
            raise Dropped(f"media under {str(key)[:40]!r} are not read")
