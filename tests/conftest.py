"""What every test needs: no network, and few threads so that several processes share two cores."""

from __future__ import annotations

import os

# Set before transformers is imported anywhere: a test that would download fails at once instead.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")
