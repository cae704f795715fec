"""Who this process is, from whichever launcher started it.

torchrun sets the variables that torch reads. srun and submitit set variables of their own, from which
those are made here. A single process has none of them.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import MutableMapping

PORTS = (20000, 60000)
"""Port at which the processes meet: drawn by the job's id, so that all tasks draw the same."""


def join_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for a task of srun or submitit.

    Variables that are set already (torchrun's, the user's) stay. `SLURM_STEP_NUM_TASKS` is set by srun alone: the shell
    of an allocation, which has the other variables, stays a single process.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return
    if environment.get("SUBMITIT_EXECUTOR") == "local":
        size, nodes = int(environment["SUBMITIT_LOCAL_NTASKS"]), int(environment.get("SUBMITIT_LOCAL_NNODES", "1"))
        rank, local = environment["SUBMITIT_LOCAL_GLOBALID"], environment["SUBMITIT_LOCAL_LOCALID"]
        host, job = "127.0.0.1", environment["SUBMITIT_LOCAL_JOB_ID"]
    elif "SLURM_STEP_NUM_TASKS" in environment:
        size, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment.get("SLURM_STEP_NUM_NODES", "1"))
        rank, local = environment["SLURM_PROCID"], environment["SLURM_LOCALID"]
        host, job = first_host(environment["SLURM_STEP_NODELIST"]), environment["SLURM_JOB_ID"]
    else:
        return
    if size > 1:
        variables = {
            "RANK": rank,
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": local,
            "LOCAL_WORLD_SIZE": str(size // nodes),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(random.Random(job).randint(*PORTS)),
        }
        for key, value in variables.items():
            environment.setdefault(key, value)


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's list.

    >>> first_host("gpu[007-009,012]"), first_host("a1,a2"), first_host("rack[1-2]n[03-04]"), first_host("one")
    ('gpu007', 'a1', 'rack1n03', 'one')
    """
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert match, nodes
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


def restarted(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Return whether torchrun or SLURM started this run again after it was interrupted."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(environment.get(name, "0") or 0) > 0 for name in counts)
