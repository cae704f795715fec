"""Trains one of three objectives from one typed config, on one process or under torchrun.

    python train.py experiment=demo
    torchrun --nproc-per-node 2 train.py experiment=demo run.dir=runs/two

Read from top to bottom: config, model and data, parallel plan, optimizer, restore, loop, save. Every step takes one
batch of each dataset, sums their weighted losses, each normalised by its labels on all processes, and makes one update
(paper, section 2.2: accumulating over datasets before an update beats taking turns, 68.4 against 59.7).
The run folder is the run's identity: starting again with the same folder goes on from its newest whole checkpoint.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from data.batches.collate import Collate, FlamingoCollate, LanguageCollate, PairCollate
from data.dataset import DatasetSpec, dataset_specs, document_texts, too_small
from data.loading.loader import MixLoader
from eval.in_training import Evaluations, Probe
from flamingo.configs.validate import refuse
from flamingo.training import compose
from flamingo.training.checkpoints import store
from flamingo.training.checkpoints.ema import Averages
from flamingo.training.checkpoints.schedule import Checkpoints
from flamingo.training.config import TrainConfig, unavailable
from flamingo.training.distributed import fsdp
from flamingo.training.distributed.failures import Stall, exit_status, watched
from flamingo.training.memory_plan import plan
from flamingo.training.metrics.flops import Flops
from flamingo.training.metrics.sinks import Reports
from flamingo.training.metrics.throughput import Throughput, describe, mean_losses, model_values, part_norms
from flamingo.training.nonfinite import Skipped
from flamingo.training.objectives.setup import SETUPS, Setup, place, strategy_of
from flamingo.training.optim import optimizer_of, scheduled, set_lr
from flamingo.training.run_folder import claim_folder, finish
from flamingo.training.run_folder import same_backbones as check_backbones

T = TypeVar("T")
Mixtures = tuple[list[DatasetSpec], list[DatasetSpec]]  # to train on, and held out for validation

# How each objective turns documents into tensors.
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
    """Runs the config to its last step; returns the folder of the finished model.

    Raises:
        UserError: something in the config, the data or on the disk is in the way.
        Stopped: a signal asked for it; the run is saved.
        Failed: one of several processes failed and has said why.
    """
    world_size = processes_of(config)
    mixtures, problems = checked(config)
    refuse(problems)
    if config.plan:
        if int(os.environ.get("RANK", "0")) == 0:  # every process would say the same
            print(plan.plan(config, [plan.rows_of(spec) for spec in mixtures[0]], world_size), flush=True)
        return Path(config.run.dir)
    with ExitStack() as cleanup:
        cleanup.callback(fsdp.stop_processes)
        processes = fsdp.start_processes(config.run.device, need_group=strategy_of(config.run, 1) is not None)
        return watched(processes, lambda: run(config, mixtures, processes, cleanup))


def run(config: TrainConfig, mixtures: Mixtures, processes: fsdp.Processes, cleanup: ExitStack) -> Path:
    """The whole run; what must be closed, also after an error, is given to `cleanup`."""
    specs, held_out = mixtures
    strategy = strategy_of(config.run, processes.size)
    fsdp.set_threads(config.run.threads, processes.size)
    run_dir, optim = Path(config.run.dir), config.optim
    probe = Probe(config.run.probe) if config.run.probe.every else None
    checkpoint = claim_folder(config, processes)

    # Model and data. The same seed everywhere: each process then shards the same initial weights.
    torch.manual_seed(config.run.seed)
    setup = SETUPS[config.objective](config.model, run_dir, processes, lambda: document_texts(specs))
    collate = COLLATES[config.objective](setup)
    share: dict[str, Any] = {"rank": processes.rank, "world_size": processes.size}
    share["num_workers"] = config.data.num_workers
    loader = MixLoader(
        specs,
        collate,
        **share,
        seed=config.data.seed,
        micro_batches=config.run.micro_batches,
        bad_samples=run_dir / "bad_samples.jsonl",
    )
    validation = MixLoader(held_out, collate, **share) if held_out else None
    model = place(setup.model, config.run, processes, strategy)

    # Optimizer, after sharding: it holds the sharded parameters.
    optimizer = optimizer_of(model, optim, setup.part_of)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    averages = Averages(model, config.run.ema) if config.run.ema else None
    skipped = Skipped(run_dir, processes, config.run.watch.max_nonfinite)

    # Restore.
    step = 0
    if checkpoint is not None:
        extra = store.load(checkpoint, model, optimizer, averages.means if averages else None)
        check_backbones(extra["frozen"], setup.frozen, checkpoint)
        loader.load_state_dict(extra["loader"])
        skipped.load_state_dict(extra.get("skipped", {}))
        step = int(extra["step"])
    model.train()
    if processes.is_main:
        print(describe(model, setup.part_of, processes, checkpoint), flush=True)
    reports = Reports(run_dir, config.run, title=config.objective, start=step, is_main=processes.is_main)
    evaluations = Evaluations(config.run, model, setup, processes, held_out=validation, probe=probe)
    checkpoints = Checkpoints(run_dir / "checkpoints", model, optimizer, processes, config.run, averages)
    stall = Stall(config.run.watch.stall_minutes)
    for closing in (reports, checkpoints, stall):
        cleanup.callback(closing.close)

    # Loop.
    rates = Throughput(processes, Flops(model))
    batches = iter(loader)
    while step < config.run.steps:
        stall.moved()
        asked = time.perf_counter()
        parts = next(batches).batches
        rates.add((batch.tensors for pieces in parts.values() for batch in pieces), time.perf_counter() - asked)
        lr = set_lr(optimizer, scheduled(step, config.run.steps, optim))
        own = [float(sum(setup.objective.count(piece.tensors) for piece in parts[spec.name])) for spec in specs]
        summed = processes.sum([*own, *checkpoints.votes()])
        counts = [spec.divisor(count) for spec, count in zip(specs, summed, strict=False)]
        votes = summed[len(specs) :]
        sums = [0.0] * len(specs)
        left = sum(len(pieces) for pieces in parts.values())
        for index, spec in enumerate(specs):
            for piece in parts[spec.name]:
                left -= 1
                if strategy is not None:  # gradients travel once, with the last piece
                    fsdp.before_backward(model, strategy, last=left == 0)
                tensors = {key: value.to(processes.device, non_blocking=True) for key, value in piece.tensors.items()}
                loss = setup.objective.loss_sum(model, tensors)
                # FSDP2 averages gradients over processes, hence the factor: counts are already those of all.
                (loss * (spec.weight * processes.size / counts[index])).backward()
                sums[index] += float(loss.detach())
        logged = (step + 1) % config.run.log_every == 0 or step in (0, config.run.steps - 1)
        norms = part_norms(model, setup.part_of) if logged else {}
        norm = float(fsdp.whole(nn.utils.clip_grad_norm_(trained, optim.clip_norm)))
        *totals, wrong = processes.sum([*sums, float(not math.isfinite(norm + sum(sums)))])
        if wrong:  # somewhere: no process makes this update
            skipped.add(step, norm, sums, {name: [piece.keys for piece in pieces] for name, pieces in parts.items()})
        else:
            skipped.fine()
            optimizer.step()
            if averages is not None:
                averages.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        last = step == config.run.steps
        values: dict[str, float] = {}
        if logged:
            values = mean_losses({s.name: s.weight for s in specs}, totals, counts) | norms | rates.read()
            values |= {"lr": lr, "grad_norm": norm, **model_values(model)}
            values |= {"bad_samples": float(loader.bad.total), "skipped_updates": float(skipped.total)}
        if evaluated := evaluations.values(step, last=last):
            values |= evaluated
            rates.restart()  # that time was not training's
        if values:
            reports.log(step, values)
        if checkpoints.due(step, votes) or last:
            extra = {"step": step, "loader": loader.state_dict(), "frozen": setup.frozen}
            saved = checkpoints.save(step, {**extra, "skipped": skipped.state_dict()}, wait=last or votes[0] > 0)
            if votes[0] and not last:
                raise checkpoints.signals.stopped(f"saved in {saved}")

    # Save.
    reports.close()
    stall.close()
    replaced = loader.bad.by_reason()
    return finish(setup.export, model, averages, processes, run_dir=run_dir, title=config.objective, replaced=replaced)


def processes_of(config: TrainConfig) -> int:
    """How many processes train, or would by the plan."""
    return (config.plan_for.processes if config.plan else 0) or int(os.environ.get("WORLD_SIZE", "1"))


def checked(config: TrainConfig) -> tuple[Mixtures, list[str]]:
    """The datasets to train on and those held out for validation, and what is impossible or missing: all that can be
    known before any weight loads."""
    world_size, validation = processes_of(config), config.run.validation
    problems = config.problems(world_size)
    specs = dataset_specs("data", config.data.datasets, problems)
    held_out = dataset_specs("run.validation", validation.datasets, problems) if validation.every else []
    if not config.plan:
        problems += [*unavailable(config), *too_small(specs, world_size * config.run.micro_batches)]
    return (specs, held_out), problems


def command() -> None:
    """Train with the config that the arguments describe."""
    compose.main(train, check=lambda config: checked(config)[1])


def main() -> None:
    """The command line; a user's mistake is one line and exit status 2."""
    disable_progress_bar()  # transformers' own, one for every file it reads or writes
    fsdp.leave(exit_status(command))


if __name__ == "__main__":
    main()
