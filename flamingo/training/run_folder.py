"""The run folder: claimed at the start, filled with the model and the loss plot at the end."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from safetensors import SafetensorError
from torch import Tensor

from flamingo.configs.validate import flatten
from flamingo.errors import UserError
from flamingo.files import write_atomically, write_folder
from flamingo.folder_lock import holds, lock_folder
from flamingo.model_card import add_training
from flamingo.training.checkpoints import store
from flamingo.training.checkpoints.ema import Ema
from flamingo.training.checkpoints.trained_weights import trained_fingerprint
from flamingo.training.config import PLACES, TrainConfig, differences
from flamingo.training.distributed.agreement import code_facts, require_same
from flamingo.training.distributed.fsdp import Processes
from flamingo.training.distributed.launch import restarted
from flamingo.training.metrics.loss_plot import draw_losses
from flamingo.training.metrics.sinks import last_step, plain
from flamingo.training.objectives.protocol import Setup
from flamingo.training.optim import scheduled_scale

TITLES = {
    "vision": "vision encoder",
    "language": "language model",
    "config": "model config",
    "features": "image encoding",
}
OWN = (
    *("config.yaml", "checkpoints", "checkpoints.json", "model", "model-ema", "tokenizer", "tensorboard"),
    *("metrics.jsonl", "loss.png", "bad_samples*.jsonl", "nonfinite-*.json", "wandb-id.txt"),
)
"""Names and patterns of what a run writes: what `run.resume=never` moves aside."""
RESULTS = ("checkpoints", "model", "model-ema", "metrics.jsonl", "stages.json")
SHARED_SECONDS = 20.0
"""How long a file of another machine may take to be seen."""
FRESH = ".fresh"
"""What a run that begins anew writes before the old one is moved aside; it exists until that is done."""
MEANT_AS_ONE = (
    "wait for its end, stop it, or choose another run.dir; processes that were meant as one run are started by "
    "torchrun or srun (docs/launch.md)"
)


@dataclass(frozen=True)
class Claim:
    """A run folder in the hands of this run."""

    checkpoint: Path | None
    """To go on from."""
    is_fresh: bool
    """An older run is moved aside by `begin_anew`, once everything is known to be right."""
    folder: Path
    """Where the objective may write before that."""
    is_seen: bool = True
    """This process sees the files of the first one."""


def claim_folder(config: TrainConfig, processes: Processes, cleanup: ExitStack) -> Claim:
    """Lock the run folder until `cleanup` closes and find the checkpoint to resume, if any. By every process.

    A folder that holds another run is refused rather than continued or overwritten, and so is one whose run cannot go
    on. Where there is a checkpoint, `config.yaml` stays as it is until the checkpoint fits (`describe_run`): places in
    it may have changed. Nothing that was there is removed.

    Raises:
        UserError: the folder is in use, belongs to a run whose updates differ, is not a run's, holds checkpoints of
            which none can be used, or cannot be written.
    """
    run_dir = Path(config.run.dir)
    token = ""
    try:
        if processes.is_main:
            token = cleanup.enter_context(lock_folder(run_dir, "a training run", MEANT_AS_ONE))
    except OSError as error:
        raise UserError(f"run.dir={run_dir} cannot be written ({error}): choose another folder") from error
    if processes.size > 1:
        shared = _is_shared(run_dir, token, processes)
        if not all(shared):  # `require_agreement` refuses, and says what else differs
            return Claim(None, False, run_dir, is_seen=shared[processes.rank])
    # What the launcher starts again goes on, unless it was interrupted before it began anew.
    is_fresh = config.run.resume == "never" and (not restarted() or (run_dir / FRESH).exists())
    _check_owner(config, is_fresh)
    processes.wait()  # nobody writes before all have looked
    if is_fresh:
        if processes.is_main:
            shutil.rmtree(run_dir / FRESH, ignore_errors=True)
            make_folder(run_dir / FRESH)
        processes.wait()
        return Claim(None, True, run_dir / FRESH)
    choice = store.choose(run_dir / "checkpoints", processes)
    if choice.path is None:
        _refuse_restart(config, choice.passed_over)
    if processes.is_main:
        shutil.rmtree(run_dir / FRESH, ignore_errors=True)
        for path, problem in choice.passed_over.items():
            _set_aside(path, problem, choice.path)
        if choice.path is None:
            if steps := last_step(run_dir / "metrics.jsonl"):
                told = f"{run_dir} was stopped after {steps} updates, before its first checkpoint: it begins again"
                print(told, flush=True)
            describe_run(config, processes)
    processes.wait()
    return Claim(choice.path, False, run_dir)


def _is_shared(run_dir: Path, token: str, processes: Processes) -> list[bool]:
    """Return whether each process sees the first one's run folder. Called by every process."""
    found = [token]
    dist.broadcast_object_list(found, src=0)
    until = time.monotonic() + SHARED_SECONDS
    while not (seen := holds(run_dir, found[0])) and time.monotonic() < until:
        with suppress(OSError):
            os.listdir(run_dir)  # noqa: PTH208 - which makes a shared file system ask again
        time.sleep(0.2)
    everyone = [False] * processes.size
    dist.all_gather_object(everyone, seen)
    return everyone


def _check_owner(config: TrainConfig, is_fresh: bool) -> None:
    """Raise UserError where the folder is not this run's to go on with, or to move aside."""
    run_dir = Path(config.run.dir)
    file = run_dir / "config.yaml"
    if is_fresh:
        old = _existing(run_dir)
        if old and not (file.exists() and {"run", "objective"} <= described(file).keys()):
            raise UserError(
                f"run.dir={run_dir} holds {old[0].name} and is not the folder of a run (no config.yaml of one), so "
                "run.resume=never moves nothing: choose another run.dir"
            )
        inside = [f"{key}={place}" for key, place in places(config) if _is_inside(place, old)]
        if inside:
            raise UserError(
                f"{inside[0]} lies in run.dir={run_dir}, which run.resume=never moves aside: choose another run.dir"
            )
    elif file.exists():
        changed = differences(described(file), config.as_dict())
        if changed:
            raise UserError(
                f"{run_dir} holds a run with another config: {', '.join(changed[:3])}"
                f"{' and more' if len(changed) > 3 else ''}: choose another run.dir, or run.resume=never to start anew"
            )
    elif foreign := [name for name in RESULTS if (run_dir / name).exists()]:
        raise UserError(
            f"run.dir={run_dir} holds {foreign[0]} and no config.yaml of a run: restore that file, or choose another "
            "run.dir"
        )


def _existing(run_dir: Path) -> list[Path]:
    return [path for pattern in OWN for path in sorted(run_dir.glob(pattern))]


def places(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Yield each key of the config that names a place, and the place."""
    for key, value in flatten(config.as_dict()).items():
        if PLACES.fullmatch(key):
            for place in value if isinstance(value, list) else [value]:
                if isinstance(place, str):
                    yield key, place


def _is_inside(place: str, folders: Sequence[Path]) -> bool:
    path = Path(place).resolve()
    return any(path.is_relative_to(folder.resolve()) for folder in folders)


def _refuse_restart(config: TrainConfig, passed_over: Mapping[Path, str]) -> None:
    """Raise UserError where a run would begin anew although it had checkpoints."""
    run_dir = Path(config.run.dir)
    remedy = (
        "copy the folder again with its hidden files, or repair it; run.resume=never moves all of it aside and starts "
        "anew"
    )
    if passed_over:
        told = [f"{path.name}: {problem}" for path, problem in passed_over.items()]
        more = f"; and {len(told) - 4} more" if len(told) > 4 else ""
        raise UserError(f"{run_dir} holds checkpoints and none can be used ({'; '.join(told[:4])}{more}): {remedy}")
    if (run_dir / "model").exists():
        raise UserError(f"{run_dir} holds a finished model and no checkpoint to go on from: {remedy}")
    steps, file = last_step(run_dir / "metrics.jsonl"), run_dir / "config.yaml"
    before = flatten(described(file)) if file.exists() else {}
    # One checkpoint is in flight at most, so the first one was complete when the second one began.
    if steps > 2 * max(config.run.checkpoint_every, int(before.get("run.checkpoint_every", 1))):
        raise UserError(f"{run_dir} holds figures of {steps} updates and no checkpoint to go on from: {remedy}")


def _set_aside(path: Path, problem: str, chosen: Path | None) -> None:
    """Say that a damaged checkpoint is not used, and rename it, so that it is neither counted nor removed."""
    kept = ""
    if path.is_dir():
        names = (path.with_name(f"damaged-{path.name}.{number}") for number in itertools.count())
        aside = next(name for name in names if not name.exists())
        with suppress(OSError):
            path.rename(aside)
            kept = f", and kept as {aside.name}"
    goes_on = chosen.name if chosen else "nothing"
    print(f"checkpoint {path} is passed over ({problem}){kept}: the run goes on from {goes_on}", flush=True)


def begin_anew(config: TrainConfig, processes: Processes) -> None:
    """Move the older run of this folder aside, and what the new one has made so far in. By every process.

    Raises:
        UserError: the run folder cannot be written.
    """
    run_dir = Path(config.run.dir)
    if processes.is_main:
        try:
            if old := _existing(run_dir):
                aside = free_folder(run_dir)
                # The description goes last: a move that is interrupted is gone on with by the same command.
                for path in sorted(old, key=lambda path: path.name == "config.yaml"):
                    path.rename(aside / path.name)
                print(f"the run that {run_dir} held is now in {aside}", flush=True)
            describe_run(config, processes)
            for path in (run_dir / FRESH).iterdir():
                path.rename(run_dir / path.name)
            (run_dir / FRESH).rmdir()
        except OSError as error:
            raise UserError(f"run.dir={run_dir} cannot be written ({error}): choose another folder") from error
    processes.wait()


def free_folder(run_dir: Path) -> Path:
    """Make the next folder for what is moved aside, and return it."""
    aside = next(name for n in itertools.count(1) if not (name := run_dir / f"previous-{n}").exists())
    aside.mkdir()
    return aside


def make_folder(folder: Path) -> None:
    """Make a folder.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir={folder.parent} cannot be written ({error}): choose another folder") from error


def require_agreement(
    config: TrainConfig, claim: Claim, setup: Setup, loaders: Sequence[Mapping[str, Any]], processes: Processes
) -> None:
    """Refuse to train where processes have other data, weights, code or arguments. By every process, before sharding.

    Args:
        config: of this process.
        claim: of the run folder.
        setup: its model, whole.
        loaders: the states of its loaders.
        processes: all of them.

    Raises:
        UserError: naming the process that differs.
    """
    if processes.size == 1:
        return
    facts: dict[str, Any] = {f"run.dir={config.run.dir} (which all machines must share)": claim.is_seen}
    facts |= {TITLES.get(part, part): value for part, value in setup.frozen.items()}
    facts["weights that train"] = trained_fingerprint(setup.model)
    for loader in loaders:
        facts |= {f"dataset {name!r}": plan for name, plan in loader["plan"].items()}
    local = ("run.threads", "run.device", "data.num_workers")  # machines may differ in these
    settings = {key: value for key, value in flatten(config.as_dict()).items() if not PLACES.fullmatch(key)}
    facts |= {key: value for key, value in settings.items() if key not in local}
    require_same(processes, facts | code_facts())


def describe_run(config: TrainConfig, processes: Processes) -> None:
    """Write `config.yaml`, on the first process.

    Raises:
        UserError: the run folder cannot be written.
    """
    if not processes.is_main:
        return
    try:
        write_atomically(Path(config.run.dir) / "config.yaml", as_yaml(config))
    except OSError as error:
        raise UserError(f"run.dir={config.run.dir} cannot be written ({error}): choose another folder") from error


def as_yaml(config: TrainConfig) -> str:
    """Return the config with floats and tuples as YAML understands them, so that a later start compares equal."""
    return yaml.safe_dump(plain(config.as_dict()), sort_keys=False)


def go_on(config: TrainConfig, processes: Processes, step: int) -> None:
    """Say what changes with this start of a run that has `step` updates behind it, and write `config.yaml` anew."""
    if processes.is_main:
        for sentence in _changes(config, step):
            print(sentence, flush=True)
    describe_run(config, processes)


def _changes(config: TrainConfig, step: int) -> Iterator[str]:
    """Yield a sentence for each change since the run's last start that shows in its figures.

    Args:
        config: of this start; that of the last one is still in `config.yaml`.
        step: updates that the checkpoint has behind it.
    """
    file = Path(config.run.dir) / "config.yaml"
    before = flatten(described(file)) if file.exists() else {}
    steps, micro_batches = (before.get(f"run.{key}", getattr(config.run, key)) for key in ("steps", "micro_batches"))
    old, new = (scheduled_scale(step, number, config.optim) * config.optim.lr for number in (steps, config.run.steps))
    if old != new:
        yield (
            f"run.steps {steps} -> {config.run.steps} changes the {config.optim.schedule} schedule: the learning rate "
            f"of update {step + 1} is {new:.3g} where it was {old:.3g}"
        )
    if micro_batches != config.run.micro_batches:
        yield (
            f"run.micro_batches {micro_batches} -> {config.run.micro_batches}: the same batches, their gradients "
            "summed in another order, so figures agree to rounding; dropout and packed rows fall out differently"
        )


def described(file: Path) -> dict[str, Any]:
    """Return the config that a run has written.

    Raises:
        UserError: it cannot be read, or does not describe a run.
    """
    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{file} cannot be read ({why}): repair it, or choose another run.dir") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} does not describe a run: choose another run.dir")
    return found


def check_saved(extra: Mapping[str, Any], frozen: Mapping[str, str], checkpoint: Path) -> int:
    """Return the update of a checkpoint, given what was saved in it as `extra`.

    Refuse other frozen weights than those of now: what it trained would be meaningless beside these.

    Raises:
        UserError: naming the part that differs; or the folder has another update's name.
    """
    saved = extra["frozen"]
    for part in sorted(saved.keys() | frozen.keys()):
        if saved.get(part) != frozen.get(part):
            raise UserError(
                f"checkpoint {checkpoint} belongs to another {TITLES.get(part, part)} (fingerprint {saved.get(part)}, "
                f"this one has {frozen.get(part)}): give the one it was trained with, or choose another run.dir"
            )
    step = int(extra["step"])
    if checkpoint.name != f"step-{step:08d}":
        raise UserError(f"checkpoint {checkpoint} is of update {step}: give its folder the name step-{step:08d} again")
    return step


def export(write: Callable[[dict[str, Tensor], Path], Any], weights: dict[str, Tensor], folder: Path) -> None:
    """Let `write` fill a new folder that then replaces `folder`: no half-written model looks complete.

    Raises:
        UserError: the disk is full or the folder cannot be written; what there was of a model before stays.
    """
    try:
        write_folder(folder, lambda temporary: write(weights, temporary), overwrite=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the model cannot be written to {folder} ({error}): free space and give the same command again, which "
            "writes it from the last checkpoint"
        ) from error


def _write_model(setup: Setup, config: TrainConfig, weights: dict[str, Tensor], folder: Path) -> None:
    setup.export(weights, folder)
    add_training(folder, trained_on(config))


def trained_on(config: TrainConfig) -> str:
    """Return what a run trains on and how, as the model's card says it."""
    model, run = config.model, config.run
    start = f"`{model.init}`" if model.init else "the backbones above"
    how = f"Objective `{config.objective}`, {run.steps:,} updates in {run.precision}, seed {run.seed}, from {start}."
    names = [f"- `{name}`, {data['batch_size']} samples an update" for name, data in config.data.datasets.items()]
    return "\n".join([how, "", *names])


def write_results(
    config: TrainConfig,
    setup: Setup,
    averages: Ema | None,
    processes: Processes,
    *,
    replaced: Mapping[tuple[str, str], int],
) -> Path:
    """Write `model`, `model-ema` where means of the weights are kept, and the loss plot; print where.

    Args:
        config: of the run.
        setup: the trained model and its export.
        averages: of its weights.
        processes: all of them call this.
        replaced: (dataset, reason) to the number of its samples that were bad.
    """
    run_dir = Path(config.run.dir)
    kinds = {"model": nullcontext()} | ({"model-ema": averages.applied()} if averages else {})
    for name, weights_in_place in kinds.items():
        with weights_in_place:  # on the CPU the whole weights are the model's own memory
            weights = store.full_weights(setup.model)
            if processes.is_main:
                export(lambda *given: _write_model(setup, config, *given), weights, run_dir / name)
            processes.wait_long()  # a large model takes longer to write than a collective may wait
    if processes.is_main:
        for (name, reason), number in replaced.items():
            print(f"{number} samples of dataset {name} were replaced: {reason}", flush=True)
        print(f"model in {run_dir / 'model'}", flush=True)
        try:
            draw_losses(run_dir / "metrics.jsonl", run_dir / "loss.png", title=f"{config.objective} ({run_dir})")
            print(f"losses in {run_dir / 'loss.png'}", flush=True)
        except OSError as error:  # a missing plot must not make a finished run fail
            print(f"{run_dir / 'loss.png'} cannot be written: {error}", file=sys.stderr, flush=True)
    processes.wait_long()  # nobody leaves before the plot is drawn
    return run_dir / "model"
