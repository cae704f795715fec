"""The label of a token that is not in the loss. This module is without torch: the readers of `data/` import it too."""

from __future__ import annotations

IGNORED = -100
