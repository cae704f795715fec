"""Trains one of three objectives from one typed config, on one process or under torchrun.

    python train.py experiment=demo
    torchrun --nproc-per-node 2 train.py experiment=demo run.dir=runs/two

Read from top to bottom: config, model and data, parallel plan, optimizer, restore, loop, save. Every step takes one
batch of each dataset, sums their weighted losses, each normalised by its labels on all processes, and makes one update
(paper, section 2.2: accumulating over datasets before an update beats taking turns, 68.4 against 59.7).
The run folder is the run's identity: starting again with the same folder goes on from its newest whole checkpoint.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from transformers.utils.logging import disable_progress_bar

from data.collate import Collate, FlamingoCollate, LanguageCollate, PairCollate
from data.enough import too_small
from data.loader import MixLoader
from data.spec import DatasetSpec, page_texts
from flamingo.errors import UserError
from flamingo.training import planning, state
from flamingo.training.checks import unavailable
from flamingo.training.config import TrainConfig, flatten
from flamingo.training.curves import draw_losses
from flamingo.training.metrics import JsonLines, ProgressLine, TensorBoard
from flamingo.training.optim import lr_scale, optimizer_of, set_lr
from flamingo.training.parallel import before_backward, leave, set_threads, start_processes, stop_processes, whole
from flamingo.training.run import Throughput, claim_folder, describe, export, gate_values, same_backbones
from flamingo.training.setups import SETUPS, Setup, place, strategy_of

CONFIGS = Path(__file__).resolve().parent / "hydra"
T = TypeVar("T")
ConfigStore.instance().store(name="train_schema", node=TrainConfig)

# How each objective turns pages into tensors.
COLLATES: dict[str, Callable[[Setup], Collate]] = {
    "language": lambda setup: LanguageCollate(setup.tokenizer),
    "contrastive": lambda setup: PairCollate(required(setup.pairs), required(setup.transform)),
    "flamingo": lambda setup: FlamingoCollate(setup.processor),
}


def required(value: T | None) -> T:
    """What this objective's setup always has."""
    assert value is not None
    return value


def train(config: TrainConfig) -> Path:
    """Runs the config to its last step; returns the folder of the finished model."""
    world_size = (config.plan_for.processes if config.plan else 0) or int(os.environ.get("WORLD_SIZE", "1"))
    specs = checked(config, world_size)
    if config.plan:
        print(planning.plan(config, [planning.rows_of(spec) for spec in specs], world_size), flush=True)
        return Path(config.run.dir)
    with ExitStack() as cleanup:
        cleanup.callback(stop_processes)
        return run(config, specs, cleanup)


def run(config: TrainConfig, specs: list[DatasetSpec], cleanup: ExitStack) -> Path:
    """The whole run; what must be closed, also after an error, is given to `cleanup`."""
    processes = start_processes(config.run.device, need_group=strategy_of(config.run, 1) is not None)
    strategy = strategy_of(config.run, processes.size)
    set_threads(config.run.threads, processes.size)
    run_dir, optim = Path(config.run.dir), config.optim
    checkpoint = claim_folder(config, processes)

    # Model and data. The same seed everywhere: each process then shards the same initial weights.
    torch.manual_seed(config.run.seed)
    setup = SETUPS[config.objective](config.model, run_dir, processes, lambda: page_texts(specs))
    loader = MixLoader(
        specs,
        COLLATES[config.objective](setup),
        rank=processes.rank,
        world_size=processes.size,
        num_workers=config.data.num_workers,
        seed=config.data.seed,
        micro_batches=config.run.micro_batches,
    )
    model = place(setup.model, config.run, processes, strategy)

    # Optimizer, after sharding: it holds the sharded parameters.
    optimizer = optimizer_of(model, optim, setup.part_of)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    # Restore.
    step = 0
    if checkpoint is not None:
        extra = state.load(checkpoint, model, optimizer)
        same_backbones(extra["frozen"], setup.frozen, checkpoint)
        loader.load_state_dict(extra["loader"])
        step = int(extra["step"])
    model.train()
    sinks: list[JsonLines | TensorBoard] = []
    progress = None
    if processes.is_main:
        print(describe(model, setup.part_of, processes), flush=True)
        if checkpoint is not None:
            print(f"resumed {checkpoint} at update {step}", flush=True)
        sinks.append(JsonLines(run_dir / "metrics.jsonl", resume_step=step))
        if config.run.tensorboard:
            sinks.append(TensorBoard(run_dir / "tensorboard", resume_step=step))
        progress = ProgressLine(config.objective, config.run.steps, step)
        for closing in (*sinks, progress):
            cleanup.callback(closing.close)

    # Loop.
    rates = Throughput(processes)
    batches = iter(loader)
    while step < config.run.steps:
        asked = time.perf_counter()
        parts = next(batches).batches
        rates.add((batch.tensors for pieces in parts.values() for batch in pieces), time.perf_counter() - asked)
        shape = lr_scale(
            step,
            steps=config.run.steps,
            warmup_steps=optim.warmup_steps,
            schedule=optim.schedule,
            final_ratio=optim.final_lr_ratio,
        )
        lr = set_lr(optimizer, shape)
        own = [float(sum(setup.objective.count(piece.tensors) for piece in parts[spec.name])) for spec in specs]
        counts = [max(1.0, count) for count in processes.sum(own)]
        sums = [0.0] * len(specs)
        left = sum(len(pieces) for pieces in parts.values())
        for index, spec in enumerate(specs):
            for piece in parts[spec.name]:
                left -= 1
                if strategy is not None:  # gradients travel once, with the last piece
                    before_backward(model, strategy, last=left == 0)
                tensors = {key: value.to(processes.device, non_blocking=True) for key, value in piece.tensors.items()}
                loss = setup.objective.loss_sum(model, tensors)
                # FSDP2 averages gradients over processes, hence the factor: counts are already those of all.
                (loss * (spec.weight * processes.size / counts[index])).backward()
                sums[index] += float(loss.detach())
        norm = float(whole(nn.utils.clip_grad_norm_(trained, optim.clip_norm)))
        if not norm < float("inf"):  # the norm is over all processes, so all of them stop here
            where = run_dir / f"nonfinite-step-{step:08d}-rank-{processes.rank}.json"
            where.write_text(json.dumps({name: [p.keys for p in pieces] for name, pieces in parts.items()}))
            raise UserError(
                f"update {step}: the gradient is not finite, and no weight was changed; the keys of the batch are in "
                f"{where}: lower optim.lr, or look at these pages with python -m data inspect"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        last = step == config.run.steps
        if step % config.run.log_every == 0 or step == 1 or last:
            means = [total / count for total, count in zip(processes.sum(sums), counts, strict=True)]
            values = {"loss": sum(spec.weight * mean for spec, mean in zip(specs, means, strict=True))}
            values |= {f"loss/{spec.name}": mean for spec, mean in zip(specs, means, strict=True)}
            values |= {"lr": lr, "grad_norm": norm, **rates.read(), **gate_values(model)}
            values["bad_samples"] = float(loader.bad.total)
            for sink in sinks:
                sink.log(step, values)
            if progress is not None:
                progress.update(step, f"loss {values['loss']:.3f}")
        if step % config.run.checkpoint_every == 0 or last:
            extra = {"step": step, "loader": loader.state_dict(), "frozen": setup.frozen}
            state.save(run_dir / "checkpoints", step, model, optimizer, extra, keep_last=config.run.keep_last)

    # Save.
    if progress is not None:
        progress.close()
    weights = state.whole_weights(model)
    finished = run_dir / "model"
    if processes.is_main:
        for (name, reason), number in loader.bad.by_reason().items():
            print(f"{number} samples of dataset {name} were replaced: {reason}", flush=True)
        export(setup.export, weights, finished)
        draw_losses(run_dir / "metrics.jsonl", run_dir / "loss.png", title=f"{config.objective} ({run_dir})")
        print(f"model in {finished}, losses in {run_dir / 'loss.png'}", flush=True)
    processes.wait()  # nobody leaves while the model is being written
    return finished


def checked(config: TrainConfig, world_size: int) -> list[DatasetSpec]:
    """The datasets; what is impossible or missing raises a UserError, all at once, before any weight loads."""
    wrong = config.problems(world_size)
    specs = dataset_specs(config, wrong)
    if not config.plan:
        wrong += [*unavailable(config), *too_small(specs, world_size * config.run.micro_batches)]
    if wrong:
        raise UserError("; ".join(wrong))
    return specs


def dataset_specs(config: TrainConfig, wrong: list[str]) -> list[DatasetSpec]:
    """The typed descriptions of the mixture; what is no field or no value of one is added to `wrong` by name."""
    known = [field.name for field in fields(DatasetSpec)]
    specs = []
    for name, values in config.data.datasets.items():
        where = f"data.datasets.{name}"
        wrong += [f"{where}.{key} is no field of a dataset{nearest(key, known)}" for key in values if key not in known]
        given: dict[str, Any] = {"name": name, **{key: value for key, value in values.items() if key in known}}
        try:
            merged = OmegaConf.merge(OmegaConf.structured(DatasetSpec), OmegaConf.create(given))
            specs.append(OmegaConf.to_object(merged))
        except (OmegaConfBaseException, UserError) as error:
            wrong.append(f"{where}: {str(error).strip().splitlines()[0]}")
    return specs  # type: ignore[return-value]


def compose(arguments: list[str]) -> TrainConfig:
    """`key=value` arguments to a typed config.

    hydra composes the groups (`experiment=...`); values are then set on the typed result, whose tables may grow.

    Raises:
        UserError: an unknown key or group, a value of the wrong type.
    """
    try:
        overrides = OverridesParser.create().parse_overrides(arguments)
        groups = [o for o in overrides if o.key_or_group.startswith("hydra.") or (CONFIGS / o.key_or_group).is_dir()]
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = hydra.compose("train", overrides=[str(override.input_line) for override in groups])
        OmegaConf.set_struct(composed, False)  # the schema stays: only its own tables take new keys
        for override in overrides:
            if override not in groups:
                key = override.key_or_group
                merge = OmegaConf.select(composed, key) is not None  # omegaconf cannot merge onto nothing
                OmegaConf.update(composed, key, override.value(), merge=merge)
        return typed(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error


def typed(composed: DictConfig) -> TrainConfig:
    """The composed YAML as `TrainConfig`."""
    if extra := [str(key) for key in composed if key not in {field.name for field in fields(TrainConfig)}]:
        raise UserError(f"{extra[0]} is no key of the config")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, TrainConfig)
    return config


def explain(error: Exception) -> str:
    """hydra's or omegaconf's message in one line that names the key."""
    text = " ".join(f"{error} {error.__cause__ or ''}".split())
    wrong_type = re.search(r"Value '([^']*)' of type '[^']*' could not be converted to (\w+) full_key: (\S+)", text)
    if wrong_type:
        return f"{wrong_type[3]}={wrong_type[1]} is not of type {wrong_type[2]}"
    if unknown := re.search(r"Key '[^']+' not in '\w+' full_key: (\S+)", text):
        known = list(flatten(OmegaConf.to_container(OmegaConf.structured(TrainConfig))))  # type: ignore[arg-type]
        return f"{unknown[1]} is no key of the config{nearest(unknown[1], known)}"
    return re.split(r" full_key:| Config search path:| See https:", " ".join(str(error).split()))[0]


def nearest(key: str, known: list[str]) -> str:
    """`: did you mean ...` when something alike exists."""
    close = difflib.get_close_matches(key, known, n=1)
    return f": did you mean {close[0]}?" if close else ""


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def sweep(composed: DictConfig) -> None:
    """hydra's own entry, for `-m` (sweeps, launchers) and its `--help`, `--cfg job`."""
    train(typed(composed))


def main() -> None:
    """The command line; a user's mistake is one line and exit status 2."""
    disable_progress_bar()  # transformers' own, one for every file it reads or writes
    status = 0
    try:
        if any(argument.startswith("-") for argument in sys.argv[1:]):
            sweep()
        else:
            train(compose(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    leave(status)


if __name__ == "__main__":
    main()
