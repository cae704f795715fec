"""What every test needs: no network, and one thread in each process."""

from __future__ import annotations

import multiprocessing
import os
import signal

from hypothesis import settings

# Set before transformers is imported anywhere: a test that would download fails at once instead.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Servers of the tests are on this machine, whatever proxy it has for the others.
os.environ["no_proxy"] = "127.0.0.1,localhost"
# One thread: `make test-fast` runs a process on each core, and the models are too small to gain from a second thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Commands that must print one line are judged by it: torch's own complaint about an installed torchao is none of ours.
os.environ.setdefault("TORCH_LOGS", "-torch.utils._pytree")

# `fsdp.spawn` and `commands.train_on` fork their processes from a server, which starts when it is first asked and
# imports once what each of them would import for 5 s. Started in another folder than this checkout's, it finds no
# `train`, and they import it themselves.
multiprocessing.set_forkserver_preload(["train"])
# A shell's `make test &` has the tests and their processes ignore Ctrl+C, which some of them are about.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples everywhere, so that a change is judged by what it changed. To look for new ones:
# HYPOTHESIS_PROFILE=explore pytest -n 2 (and pin what it finds with @example).
settings.register_profile("default", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
