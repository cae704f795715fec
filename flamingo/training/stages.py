"""A run over several stages: one command and one folder, each stage from the model of an earlier one.

`stages` of a config maps names, in order, to what each changes of `objective`, `model`, `data`, `optim` and `run`.
A stage starts from the model of the stage before it, or of the stage that its `after` names; with `after: null` from
what `model` says. One that is null is left out. A stage is a run of its own in `run.dir/NAME`, which resumes as every
run does. `run.dir/stages.json` keeps which stages are finished and which model each began from, so that none goes on
beside another model than that.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from flamingo.configs.validate import examine, flatten, refuse
from flamingo.errors import UserError
from flamingo.files import folder_hash, write_atomically
from flamingo.folder_lock import lock_folder
from flamingo.training import run_folder
from flamingo.training.config import TrainConfig, differences
from flamingo.training.distributed.fsdp import Processes
from flamingo.training.distributed.launch import restarted
from flamingo.training.memory_plan.plan import plan
from flamingo.training.model_config import LanguageSource, VisionSource
from flamingo.training.objective_table import OF_FLAMINGO
from flamingo.training.objectives.protocol import BatchShape

T = TypeVar("T")
TABLES = ("objective", "model", "data", "optim", "run")
"""What a stage may change; the rest belongs to the command."""
SOURCES = (
    *("preset", "init", "vision", "language", "connector", "connector_options", "resampler", "cross_attention"),
    *("cross_attn_every_n_layers", "cross_attn_layers"),
)
"""Tables of `model` that say what the model is, which is settled where a stage goes on from another."""
CACHE = ("cache", "cache_dir", "cache_gb")
"""Of `model.vision`, what any stage may set."""
RECORD = "stages.json"
ANEW = "run.resume=never starts all stages anew"


@dataclass(frozen=True)
class Stage:
    """One stage; a run without stages has a single one without a name."""

    name: str
    after: str | None
    """Whose model it starts from."""
    config: TrainConfig
    """To train with: `model.init` is that model's folder, which need not be there yet."""
    planned: TrainConfig
    """The same with the model described by its sources, to check and to plan before there is that folder."""


def stages_of(config: TrainConfig) -> tuple[list[Stage], list[str]]:
    """Return the stages of a config in their order, and a clause for each mistake in how they are written."""
    if not config.stages:
        return [Stage("", None, config, config)], []
    found: dict[str, Stage] = {}
    problems: list[str] = []
    for name, own in config.stages.items():
        if own is None:
            continue
        at = f"stages.{name}"
        after = own.get("after", next(reversed(found), None))
        problems += _misplaced(at, own, after, found)
        after = after if isinstance(after, str) else None
        before = found.get(after or "")
        changes = {key: value for key, value in own.items() if key in TABLES and isinstance(value, type(_default(key)))}
        table = _merged(config.as_dict() | {"stages": {}}, changes)
        table["run"] |= {"dir": str(Path(config.run.dir) / name), "resume": "auto"}
        if before is not None:
            table["model"] = _model_after(before.planned, table["model"])
        planned, clauses = examine(TrainConfig, table, at)
        assert planned is not None  # every field has a default
        problems += clauses
        if before is not None and not {planned.objective, before.planned.objective} <= set(OF_FLAMINGO):
            problems.append(
                f"{at} starts from the model of stage {after}, which only objectives flamingo and align can: set "
                f"{at}.after=null and name that model's folder, {before.config.run.dir}/model, in {at}.model"
            )
        found[name] = Stage(name, after, planned if before is None else _starting(planned, before), planned)
    return list(found.values()), problems if found else ["stages are all null: leave one"]


def _default(key: str) -> Any:
    return TrainConfig().as_dict()[key]


def _misplaced(at: str, own: Mapping[str, Any], after: Any, earlier: Mapping[str, Stage]) -> list[str]:
    """Return clauses about a stage's name, and about keys that are not a stage's to set."""
    clauses = []
    if not re.fullmatch(r"\w[\w-]*", at.removeprefix("stages.")):
        clauses.append(f"{at}: a stage's name is that of a folder: letters, digits, _ and - alone")
    if after is not None and not (isinstance(after, str) and after in earlier):
        known = ", ".join(earlier) or "none"
        clauses.append(f"{at}.after={after} is not a stage before it (there is {known}): name one, or null")
    for key, value in own.items():
        if key not in (*TABLES, "after"):
            clauses.append(f"unknown key {at}.{key}: a stage has {', '.join((*TABLES, 'after'))}")
        elif key != "after" and not isinstance(value, type(_default(key))):
            clauses.append(f"{at}.{key}={value} must be {'a name' if key == 'objective' else 'a table'}")
    for key in ("dir", "resume"):
        if isinstance(own.get("run"), dict) and key in own["run"]:
            clauses.append(f"{at}.run.{key} is that of the whole run: set run.{key}")
    model = own.get("model")
    if after is not None and isinstance(model, dict):
        vision = model.get("vision")
        given = {key: model[key] for key in SOURCES if key in model and key != "vision"}
        given |= {"vision": {k: v for k, v in vision.items() if k not in CACHE}} if isinstance(vision, dict) else {}
        for key in flatten({key: value for key, value in given.items() if value != {}}):
            clauses.append(
                f"{at}.model.{key} has no effect, since the stage starts from the model of stage {after}: remove it, "
                f"or set {at}.after=null"
            )
    return clauses


def _merged(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with changes set in it, tables inside it merged."""
    merged = deepcopy(dict(table))
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else deepcopy(value)
    return merged


def _model_after(before: TrainConfig, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage's table `model` with the sources of the stage that it starts from."""
    theirs = before.as_dict()["model"]
    sources = {key: theirs[key] for key in SOURCES}
    sources["vision"] = {**theirs["vision"], **{key: model["vision"][key] for key in CACHE}}
    return {**model, **sources}


def _starting(planned: TrainConfig, before: Stage) -> TrainConfig:
    """Return the config of a stage that starts from the model of `before`."""
    vision = planned.model.vision
    model = replace(
        planned.model,
        preset=None,
        init=str(model_folder(before)),
        vision=VisionSource(cache=vision.cache, cache_dir=vision.cache_dir, cache_gb=vision.cache_gb),
        language=LanguageSource(),
        cross_attn_every_n_layers=None,
        cross_attn_layers=None,
    )
    return replace(planned, model=model)


def model_folder(stage: Stage) -> Path:
    """Return where a stage writes its model."""
    return Path(stage.config.run.dir) / "model"


def named(stages: Sequence[Stage], clauses: Sequence[Sequence[str]]) -> list[str]:
    """Return the clauses of all stages, each with its stage, once where all have it."""
    owners: dict[str, list[str]] = {}
    for stage, own in zip(stages, clauses, strict=True):
        for clause in own:
            owners.setdefault(clause, []).append(stage.name)
    every = len(stages)
    return [
        clause if len(names) == every else f"stage {', '.join(names)}: {clause}" for clause, names in owners.items()
    ]


def problems(config: TrainConfig, world_size: int = 1) -> list[str]:
    """Return `TrainConfig.problems` of every stage."""
    stages, clauses = stages_of(config)
    return [*clauses, *named(stages, [stage.planned.problems(world_size) for stage in stages])]


def print_plans(stages: Sequence[Stage], batches: Sequence[list[BatchShape]], processes: int) -> None:
    """Print what a process of each stage needs.

    Raises:
        UserError: naming the stages that do not fit.
    """
    clauses: list[list[str]] = []
    for stage, shapes in zip(stages, batches, strict=True):
        clauses.append([])
        try:
            text = plan(stage.planned, shapes, processes)
        except UserError as error:
            clauses[-1].append(str(error))
        else:
            print(f"stage {stage.name}: {text}" if stage.name else text, flush=True)
    refuse(named(stages, clauses))


def run_all(
    config: TrainConfig,
    stages: Sequence[tuple[Stage, T]],
    processes: Processes,
    cleanup: ExitStack,
    run: Callable[[TrainConfig, T, Processes, ExitStack], Path],
) -> Path:
    """Run every stage that is not finished; return the folder of the last one's model. Called by every process.

    Args:
        config: of the whole run.
        stages: each with what else `run` needs of it.
        processes: all of them.
        cleanup: gets what must be closed, also after an error.
        run: trains one stage and returns its model's folder.

    Raises:
        UserError: the folder is in use or not of these stages, or a stage's predecessor is missing or another one.
    """
    if not config.stages:
        ((stage, rest),) = stages
        return run(stage.config, rest, processes, cleanup)
    record = Record(config, [stage for stage, _ in stages]) if processes.is_main else None
    if record is not None:
        record.open(cleanup)
    for stage, rest in stages:
        due = [record is None or record.begin(stage)]
        if processes.size > 1:
            dist.broadcast_object_list(due, src=0)
        if due[0]:
            if processes.is_main:
                print(f"stage {stage.name}", flush=True)
            own = cleanup.enter_context(ExitStack())
            run(stage.config, rest, processes, own)
            own.close()
            gc.collect()  # the model of this stage, before the next one is built
            if record is not None:
                record.finish(stage)
    return model_folder(stages[-1][0])


class Record:
    """`stages.json`, and what is decided by it; of the first process."""

    def __init__(self, config: TrainConfig, stages: Sequence[Stage]) -> None:
        self._config, self._stages = config, {stage.name: stage for stage in stages}
        self._folder = Path(config.run.dir)
        self._file = self._folder / RECORD
        self._known: dict[str, dict[str, Any]] = {}

    def open(self, cleanup: ExitStack) -> None:
        """Lock the folder until `cleanup` closes and read the record, or move what it tells of aside.

        Raises:
            UserError: the folder is in use, holds another kind of run, or cannot be read or written.
        """
        try:
            cleanup.enter_context(lock_folder(self._folder, "a training run over stages", run_folder.MEANT_AS_ONE))
            if (self._folder / "config.yaml").exists():
                raise UserError(f"run.dir={self._folder} holds a run without stages: choose another run.dir")
            if self._config.run.resume == "never" and not restarted():
                self._move_aside()
            elif self._file.exists():
                self._known = self._read()
        except OSError as error:
            raise UserError(f"run.dir={self._folder} cannot be written ({error}): choose another folder") from error

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            known = json.loads(self._file.read_text())["stages"]
            return {
                name: {key: each[key] for key in ("after", "began", "steps", "model")} for name, each in known.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._file} is not the record of a run over stages ({error}): repair it, or {ANEW}"
            ) from None

    def _move_aside(self) -> None:
        """Move all stages to `previous-N`, the record last: a move that is interrupted is gone on with."""
        names = self._stages | (dict.fromkeys(self._read()) if self._file.exists() else {})
        old = [path for path in (self._folder / name for name in names) if path.exists()]
        for stage in self._stages.values():
            for key, place in run_folder.places(stage.planned):
                if any(Path(place).resolve().is_relative_to(path.resolve()) for path in old):
                    raise UserError(
                        f"{key}={place} lies in run.dir={self._folder}, which run.resume=never moves aside: choose "
                        "another run.dir"
                    )
        if not old and not self._file.exists():
            return
        aside = run_folder.free_folder(self._folder)
        for path in (*old, *([self._file] if self._file.exists() else [])):
            path.rename(aside / path.name)
        print(f"the stages that {self._folder} held are now in {aside}", flush=True)

    def begin(self, stage: Stage) -> bool:
        """Return whether a stage has to run, after noting which model it begins from.

        Raises:
            UserError: that model is missing or not the one that the stage began from; the stage has another config than
                when it was finished, or would train on although another stage has begun from its model.
        """
        own, folder, steps = self._known.get(stage.name), Path(stage.config.run.dir), stage.config.run.steps
        if own and (own["steps"], own["after"]) == (steps, stage.after) and model_folder(stage).is_dir():
            if changed := differences(run_folder.described(folder / "config.yaml"), stage.config.as_dict()):
                raise UserError(f"stage {stage.name} is finished with another config: {', '.join(changed[:3])}; {ANEW}")
            print(f"stage {stage.name} is finished: {model_folder(stage)}", flush=True)
            return False
        began = self._predecessor(stage)
        if own is None:
            if folder.exists() and any(folder.iterdir()):
                raise UserError(
                    f"{folder} is there and {self._file} does not know it: choose another run.dir, or {ANEW}"
                )
            self._write(stage.name, {"after": stage.after, "began": began, "steps": None, "model": None})
            return True
        if (own["after"], own["began"]) != (stage.after, began):
            raise UserError(
                f"stage {stage.name} began from the model of {_called(own['after'])} as it was then, and would go on "
                f"beside that of {_called(stage.after)} as it is now: set back what has changed, or {ANEW}"
            )
        later = [name for name, other in self._known.items() if other["after"] == stage.name]
        if own["steps"] not in (None, steps) and later:
            raise UserError(
                f"stages.{stage.name}.run.steps={steps}, but stage {later[0]} has begun from its model of "
                f"{own['steps']} updates: set it back to {own['steps']}, or {ANEW}"
            )
        return True

    def _predecessor(self, stage: Stage) -> str | None:
        """Return the hash of the model that a stage starts from.

        Raises:
            UserError: it is missing, or not the one that its stage has written.
        """
        if stage.after is None:
            return None
        model, known = model_folder(self._stages[stage.after]), self._known[stage.after]
        if not (model / "config.json").is_file():
            raise UserError(
                f"stage {stage.name} starts from the model of stage {stage.after}, and {model} is missing: restore it, "
                f"or {ANEW}"
            )
        if (found := folder_hash(model)) != known["model"]:
            raise UserError(f"{model} is not the model that stage {stage.after} has written: restore it, or {ANEW}")
        return found

    def finish(self, stage: Stage) -> None:
        """Note that a stage is finished, and with which model."""
        made = {"steps": stage.config.run.steps, "model": folder_hash(model_folder(stage))}
        self._write(stage.name, self._known[stage.name] | made)

    def _write(self, name: str, entry: dict[str, Any]) -> None:
        self._known[name] = entry
        write_atomically(self._file, json.dumps({"stages": self._known}, indent=1) + "\n")


def _called(after: str | None) -> str:
    return "the experiment" if after is None else f"stage {after}"
