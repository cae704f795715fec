"""Ids and labels that stand for no token. This module is without torch: the readers of `data/` import it too."""

from __future__ import annotations

IGNORED = -100
"""The label of a token that is not in the loss."""
SOFT_ID = 1 << 30
"""Ids from here on stand for the vectors of soft prompts: beyond every vocabulary, however often it is resized."""
