"""Numbers that light modules need without the configuration's imports."""

from __future__ import annotations

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
