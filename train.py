"""Train one of the objectives from one typed config, on one process or under torchrun.

    python train.py experiment=demo
    torchrun --nproc-per-node 2 train.py experiment=demo run.dir=runs/two

Read from top to bottom: config, data, model, parallel plan, optimizer, restore, loop, save. Every step takes one batch
of each dataset, sums their weighted losses, each divided by its labels on all processes, and makes one update
(paper, section 2.2: accumulating over datasets before an update beats taking turns, 68.4 against 59.7).
The run folder is the run's identity: starting again with the same folder resumes its newest complete checkpoint.
A config with `stages` trains one after the other (flamingo/training/stages.py).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.batches import collate as collates
from data.dataset import DatasetSpec, dataset_specs, document_texts, too_small
from data.loading.loader import MixLoader, StorageError
from eval.in_training import Evaluations, FewShotEvaluation
from flamingo.configs.validate import refuse
from flamingo.training import compose, optim, run_folder, stages
from flamingo.training.checkpoints import ema, store
from flamingo.training.config import TrainConfig, unavailable
from flamingo.training.distributed import fsdp, interruptions
from flamingo.training.memory_plan import plan
from flamingo.training.metrics import sinks, throughput
from flamingo.training.objectives import protocol

Mixtures = tuple[list[DatasetSpec], list[DatasetSpec]]  # to train on, and held out for validation


def train(config: TrainConfig) -> Path:
    """Run the config to its last step; return the folder of the finished model.

    Raises:
        UserError: a mistake in the config, the data or on the disk.
        Stopped: a signal asked for it; the run is saved.
        Failed: one of several processes failed and has printed why.
    """
    parts, problems = checked(config)
    refuse(problems)
    if config.plan:
        if int(os.environ.get("RANK", "0")) == 0:  # every process would print the same
            batches = [[plan.largest_batch_of(spec) for spec in specs] for _, (specs, _) in parts]
            stages.print_plans([stage for stage, _ in parts], batches, plan.process_count(config))
        return Path(config.run.dir)
    with ExitStack() as cleanup:
        cleanup.callback(fsdp.stop_processes)
        need_group = any(fsdp.sharding_strategy(stage.config.run, 1) is not None for stage, _ in parts)
        storage = max(stage.config.data.storage_minutes for stage, _ in parts)
        processes = fsdp.start_processes(config.run.device, need_group=need_group, storage_minutes=storage)
        work = partial(stages.run_all, config, parts, processes, cleanup, run)
        return interruptions.report_failure(processes, work)


def run(config: TrainConfig, mixtures: Mixtures, processes: fsdp.Processes, cleanup: ExitStack) -> Path:
    """Train, on each process; what must be closed, also after an error, is given to `cleanup`."""
    options, run_dir, seconds = config.run, Path(config.run.dir), 60 * config.data.storage_minutes
    specs, held_out = mixtures
    fsdp.set_threads(options.threads, processes.size)
    few_shot = FewShotEvaluation(options.evaluation) if options.evaluation.every else None
    claim = run_folder.claim_folder(config, processes, cleanup)

    # Model and data. The same seed everywhere: each process then shards the same initial weights.
    torch.manual_seed(options.seed)
    objective_module = protocol.objective_module(config.objective)
    setup = objective_module.build(config.model, claim.folder, processes, lambda: document_texts(specs, seconds))
    model, objective, part_of = setup.model, setup.objective, setup.part_of
    collate = setup.collate(collates)
    share: dict[str, Any] = {"rank": processes.rank, "world_size": processes.size, "storage_seconds": seconds}
    share |= {"num_workers": config.data.num_workers, "pin_memory": processes.device.type == "cuda"}
    loader = MixLoader(
        specs,
        collate,
        **share,
        seed=config.data.seed,
        give_up=processes.limit_seconds if processes.size > 1 else None,  # before the others do
        micro_batches=options.micro_batches,
        bad_samples=run_dir / "bad_samples.jsonl",
    )
    validation = MixLoader(held_out, collate, **share) if held_out else None
    states = [each.state_dict() for each in (loader, validation) if each is not None]
    run_folder.require_agreement(config, claim, setup, states, processes)

    # Parallel plan.
    strategy = fsdp.sharding_strategy(options, processes.size)
    protocol.parallelize(model, objective, options, processes, strategy)

    # Optimizer, after sharding: it holds the sharded parameters.
    optimizer = optim.build_optimizer(model, config.optim, part_of)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    averages = ema.Ema(model, options.ema) if options.ema else None
    nonfinite = optim.NonfiniteUpdates(run_dir, processes, options.watch.max_nonfinite)

    # Restore.
    step = 0
    if claim.checkpoint is not None:
        extra = store.load(claim.checkpoint, model, optimizer, averages.means if averages else None)
        step = run_folder.check_saved(extra, setup.frozen, claim.checkpoint)
        loader.load_state_dict(extra["loader"])
        loader.bad.load_state_dicts(extra.get("own", []))
        nonfinite.load_state_dict(extra.get("skipped", {}))
        run_folder.go_on(config, processes, step)
    model.train()
    if processes.is_main:
        print(throughput.describe_model(model, part_of, processes, claim.checkpoint), flush=True)
    if claim.is_fresh:
        run_folder.begin_anew(config, processes)
    reports = sinks.MetricSinks(run_dir, config, start=step, is_main=processes.is_main)
    evaluations = Evaluations(options, model, setup, processes, held_out=validation, few_shot=few_shot)
    checkpoints = store.Checkpoints(run_dir / "checkpoints", model, optimizer, processes, options, averages)
    stall = interruptions.StallReporter(options.watch.stall_minutes)
    for closing in (reports, checkpoints, stall):
        cleanup.callback(closing.close)

    def save(step: int, *, wait: bool) -> Path:
        extra = {"step": step, "loader": loader.state_dict(), "frozen": setup.frozen, "skipped": nonfinite.state_dict()}
        return checkpoints.save(step, extra, loader.bad.state_dict(), wait=wait)

    # Loop.
    rates = throughput.Throughput(processes, throughput.Flops(model))
    weights = {spec.name: spec.weight for spec in specs}
    batches = iter(loader)
    counts: dict[protocol.Term, float] = {}
    while step < options.steps:
        stall.restart_clock()
        waiting_since = time.perf_counter()
        loaded, away = loader.take(batches)
        if away is not None and not counts:  # nothing to save
            raise away
        micro_batches = {spec.name: [batch.tensors for batch in loaded[spec.name]] for spec in specs}
        rates.add(micro_batches, time.perf_counter() - waiting_since)
        lr = optim.set_learning_rate(optimizer, step, options.steps, config.optim)

        # One sum over processes for the divisors, and for what processes must agree on before they go on.
        counts = protocol.count_terms(objective, micro_batches) if away is None else dict.fromkeys(counts, 0.0)
        summed = processes.sum([*counts.values(), float(away is not None), *checkpoints.votes()])
        totals, votes = summed[: len(counts)], summed[len(counts) + 1 :]
        if summed[len(counts)]:  # there is no update without the samples of every process
            loader.step = step  # the others have theirs already
            saved = save(step, wait=True)
            raise StorageError(f"{away or 'the storage of another process is away'}; saved in {saved}")
        divisor_of = {spec.name: spec.divisor for spec in specs}
        divisors = {key: divisor_of[key[0]](total) for key, total in zip(counts, totals, strict=True)}
        sums = accumulate_gradients(model, objective, micro_batches, weights, divisors, processes, strategy)

        logged = (step + 1) % options.log_every == 0 or step in (0, options.steps - 1)
        norms = throughput.part_norms(model, part_of) if logged else {}
        norm = float(fsdp.full_tensor(nn.utils.clip_grad_norm_(trained, config.optim.clip_norm)))
        is_finite = math.isfinite(norm + sum(sums.values()))
        *totals, nonfinite_processes = processes.sum([*sums.values(), float(not is_finite)])
        if nonfinite_processes:  # a single one is enough: no process makes this update
            keys = {name: [batch.keys for batch in batches] for name, batches in loaded.items()}
            nonfinite.skip(step, norm, {"/".join(key): value for key, value in sums.items()}, keys)
        else:
            nonfinite.end_streak()
            optimizer.step()
            if averages is not None:
                averages.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        last = step == options.steps
        values: dict[str, float] = {}
        if logged:
            values = throughput.mean_losses(weights, dict(zip(sums, totals, strict=True)), divisors)
            values |= norms | rates.read() | {"lr": lr, "grad_norm": norm} | throughput.model_values(model)
            values |= {"bad_samples": float(loader.bad.total), "skipped_updates": float(nonfinite.total)}
        if evaluated := evaluations.due(step, last=last):
            values |= evaluated
            rates.restart()  # that time was not spent on training
        if values:
            reports.log(step, values)
        if checkpoints.due(step, votes) or last:
            saved = save(step, wait=last or votes[0] > 0)
            if votes[0] and not last:
                raise checkpoints.signals.stopped(f"saved in {saved}")

    # Save.
    reports.close()
    stall.close()
    return run_folder.write_results(config, setup, averages, processes, replaced=loader.bad.by_reason())


def accumulate_gradients(
    model: nn.Module,
    objective: protocol.Objective,
    micro_batches: protocol.MicroBatches,
    weights: Mapping[str, float],
    divisors: Mapping[protocol.Term, float],
    processes: fsdp.Processes,
    strategy: fsdp.ShardingStrategy | None,
) -> dict[protocol.Term, float]:
    """Add the gradients of all micro-batches; return the sum of each loss term on this process, undivided."""
    losses: dict[protocol.Term, list[Tensor]] = {}
    remaining = sum(len(batches) for batches in micro_batches.values())
    for name, batches in micro_batches.items():
        for batch in batches:
            remaining -= 1
            if strategy is not None:  # gradients are reduced once, with the last micro-batch
                fsdp.prepare_backward(model, strategy, last=remaining == 0)
            terms = protocol.sums_of(objective, model, batch, processes.device, strategy)
            # FSDP2 averages gradients over processes, hence the factor: divisors are already those of all.
            scale = weights[name] * processes.size
            protocol.add_terms(value * (scale / divisors[name, term]) for term, value in terms.items()).backward()
            for term, value in terms.items():
                losses.setdefault((name, term), []).append(value.detach())
    # Read only now: whoever reads a value waits for the device to have computed it.
    return {key: sum(map(float, losses.get(key, [])), 0.0) for key in divisors}


def checked(config: TrainConfig) -> tuple[list[tuple[stages.Stage, Mixtures]], list[str]]:
    """Return the stages, each with the datasets to train on and those held out, and all that is known to be wrong."""
    found, problems = stages.stages_of(config)
    checks = [checked_stage(stage.planned) for stage in found]
    mixtures, clauses = [each for each, _ in checks], [each for _, each in checks]
    return list(zip(found, mixtures, strict=True)), [*problems, *stages.named(found, clauses)]


def checked_stage(config: TrainConfig) -> tuple[Mixtures, list[str]]:
    """Return the datasets of one stage, and everything that can be known to be wrong by now."""
    world_size, validation = plan.process_count(config), config.run.validation
    problems = config.problems(world_size)
    pipes = {"allow_pipe": config.data.allow_pipe}
    specs = dataset_specs("data", config.data.datasets, problems, **pipes)
    held_out = dataset_specs("run.validation", validation.datasets, problems, **pipes) if validation.every else []
    if not config.plan:
        micro_batches = world_size * config.run.micro_batches
        problems += [*unavailable(config), *too_small(specs, micro_batches, 60 * config.data.storage_minutes)]
    return (specs, held_out), problems


if __name__ == "__main__":
    compose.main(train, check=lambda config: checked(config)[1])
