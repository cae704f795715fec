"""A hash of values, by which tasks, models and answers are recognised."""

from __future__ import annotations

import hashlib


def content_hash(*parts: object) -> str:
    """Return the hex SHA-256 of the parts' `repr`s with their lengths, so that ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for part in parts:
        blob = repr(part).encode()
        digest.update(f"{len(blob)}:".encode() + blob)
    return digest.hexdigest()
