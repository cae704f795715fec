"""From the command line of train.py to a checked `TrainConfig`, here and now or in the jobs that hydra starts."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from transformers.utils.logging import disable_progress_bar

from flamingo.configs.compose import CONFIGS, from_yaml, parse, quoted, read, settle
from flamingo.configs.validate import examine, refuse
from flamingo.errors import UserError
from flamingo.training import stages
from flamingo.training.config import TrainConfig
from flamingo.training.distributed import fsdp, interruptions
from flamingo.training.distributed.launch import join_launcher

GROUPS = ("model", "data", "optim", "run", "launch", "experiment")
"""Folders of `hydra/` that arguments choose files from."""
# What no file mentions has its default, also in references such as ${launch.processes}.
ConfigStore.instance().store(name="train_defaults", node=TrainConfig().as_dict())


def compose(arguments: Sequence[str], check: Callable[[TrainConfig], Iterable[str]] = stages.problems) -> TrainConfig:
    """Turn `key=value` arguments into a typed config.

    Args:
        arguments: as typed; `experiment=NAME` and other groups choose files, all else sets values on top of them.
        check: what else can be wrong; it is asked here only if something is wrong already, so that all mistakes are
            reported together. Otherwise the caller asks.

    Raises:
        UserError: an unknown key or file, a value of the wrong type, or one that is not allowed; and what `check` adds.
    """
    line = read(arguments, GROUPS)
    config, clauses = examine(TrainConfig, settle(from_yaml("train", line), line))
    assert config is not None  # every field has a default
    if (clauses := [*line.problems, *clauses]) or stages.stages_of(config)[1]:
        clauses += check(config)
    refuse(clauses)
    return config


def main(train: Callable[[TrainConfig], object], check: Callable[[TrainConfig], Iterable[str]]) -> None:
    """Run the command line and exit; a user's mistake is one line and status 2."""
    disable_progress_bar()  # transformers', one for every file it reads or writes
    fsdp.exit_process(interruptions.exit_status(lambda: run_command_line(train, check)))


def run_command_line(train: Callable[[TrainConfig], object], check: Callable[[TrainConfig], Iterable[str]]) -> None:
    """Call `train` with the config of this process's arguments; options (`-m`, `--help`, `--cfg job`) go to hydra.

    Raises:
        UserError: see `compose`.
    """
    arguments = sys.argv[1:]
    if not any(argument.startswith(("-", "launch=")) for argument in arguments):
        join_launcher()
        train(compose(arguments, check))
        return
    if {"-m", "--multirun"} & set(arguments) and {"-c", "--cfg", "-i", "--info"} & set(arguments):
        raise UserError("-m and --cfg (or --info) do not go together: leave out -m to see the config of one run")
    parsed = {argument: override for argument in arguments if (override := parse(argument))}
    # Mistakes are named here, not by a job that has waited in a queue. A sweep's values are checked by its jobs.
    sweeps = {text for text, override in parsed.items() if override.is_sweep_override()}
    common = compose([text for text in arguments if _is_ours(text) and text not in sweeps])
    # hydra refuses keys that no file mentions, unless they begin with ++; our own classes check keys.
    values = {text for text, override in parsed.items() if _is_ours(text) and _is_value(override.key_or_group)}
    lines = {text: str(override.input_line) for text, override in parsed.items()}
    sys.argv[1:] = [f"++{lines[text].lstrip('+')}" if text in values else text for text in arguments]
    places = [parsed[text] for text in sweeps if _key(text) == "run.dir"]
    folders = [str(choice) for override in places for choice in override.sweep_iterator()]
    folder = os.path.commonpath(folders) if folders else common.run.dir
    if not any(override.key_or_group == "hydra.sweep.dir" for override in parsed.values()):
        # What hydra writes of its own goes below the run folders; beside the other overrides, for options may follow.
        first = next((place for place, text in enumerate(arguments, 1) if text in parsed), len(sys.argv))
        sys.argv.insert(first, f"hydra.sweep.dir={quoted(folder or '.')}")
    if "launch=" in " ".join(arguments):  # a submitted job begins in the folder of this command, with its environment
        os.environ["PYTHONPATH"] = os.pathsep.join([str(CONFIGS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed = {override.key_or_group for text, override in parsed.items() if text not in sweeps}
    mistakes: list[UserError] = []

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
    def job(_: Any) -> None:
        join_launcher()
        given = HydraConfig.get().overrides
        search = [text for text in given.hydra if text.startswith("hydra.searchpath=")]
        own = [*filter(_is_ours, given.task)]
        try:
            config = compose([*search, *own], check)
            config.run.dir = job_folder(config.run.dir, [text for text in own if _key(text) not in fixed])
            interruptions.run_submitted(lambda: train(config))
        except UserError as error:
            if "SUBMITIT_EXECUTOR" in os.environ:  # in a process of its own, whose status must tell
                raise
            mistakes.append(error)

    job()
    refuse(str(error) for error in mistakes)
    if "launch=" in " ".join(arguments):  # the jobs have said so in logs of their own
        files = [file for file in sorted(Path(folder or ".").rglob("model/*.json")) if "previous-" not in str(file)]
        for model in dict.fromkeys(file.parent for file in files):
            print(f"model in {model}", flush=True)


def job_folder(run_dir: str, swept: Sequence[str]) -> str:
    """Return the run folder of one job of a sweep: a folder of its own below `run.dir`, named by what the sweep set.

    A sweep over `run.dir` itself names the folders, and a job that no sweep set anything for has `run.dir`.

    >>> job_folder("runs/x", ["++run.seed=1", "optim.lr=1e-4"]), job_folder("runs/b", ["run.dir=runs/b"])
    ('runs/x/run.seed=1,optim.lr=1e-4', 'runs/b')
    """
    keys = [_key(text) for text in swept]
    if not swept or "run.dir" in keys:
        return run_dir
    name = ",".join(text.lstrip("+") for text in swept)
    readable = re.sub(r"[^\w.,=+-]+", "_", name)
    if readable != name or len(readable) > 120:  # two different values must not share a folder
        readable = f"{readable[:120]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return str(Path(run_dir) / readable)


def _key(argument: str) -> str:
    override = parse(argument)
    return argument if override is None else override.key_or_group


def _is_value(key: str) -> bool:
    return key not in GROUPS and not key.startswith("hydra.")


def _is_ours(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")
