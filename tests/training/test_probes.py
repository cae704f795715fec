"""Few-shot probes and validation of a sharded run: the answers of one process, and no trace in what trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eval.in_training import Probe
from eval.samples import Sample
from flamingo.errors import UserError
from flamingo.training.config import ProbeOptions, TrainConfig
from flamingo.training.distributed.fsdp import Processes, Strategy, before_backward, shard, spawn
from flamingo.training.distributed.units import fsdp_units
from flamingo.training.objectives.losses import FlamingoObjective
from flamingo.training.optim import adamw
from flamingo.training.validation import evaluating
from tests.eval.worlds import write_pool, write_scenes
from tests.model import tiny
from tests.training.commands import begin, given, lines, torchrun
from tests.training.world import config, write_world

ALONE = Processes(0, 1, torch.device("cpu"))
STRATEGIES = (
    Strategy(),
    Strategy(frozen="replicate"),
    Strategy(keep_gathered=True),
    Strategy(offload=True),
)


def write_tasks(data: Path) -> Path:
    """What `toy_vqa` (its answers are generated) and `digits_naming` (ranked) ask about."""
    write_scenes(data / "toy" / "heldout" / "scene_pairs", 208)
    write_pool(data / "digits" / "heldout", 52)
    return data


def options(data: Path) -> ProbeOptions:
    return ProbeOptions(
        every=2, tasks=["toy_vqa", "digits_naming"], shots=[0, 2], queries=7, batch_size=4, data=str(data)
    )


def asked(data: Path, processes: Processes = ALONE, strategy: Strategy | None = None, *, probes: bool = True) -> Any:
    """Losses of three updates, between which the model is probed, and all answers."""
    model, processor = tiny.flamingo("llama")
    if strategy is not None:
        shard(model, fsdp_units(model), processes, strategy)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = adamw([{"params": trained, "lr": 1e-3, "weight_decay": 0.1}], betas=(0.9, 0.95), eps=1e-3)
    probe = Probe(options(data))
    probe.agree(processes)
    batch: Any = dict(tiny.batch(processor, [0, 1], padding_side="right"))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses: list[float] = []
    samples: list[Sample] = []
    model.train()
    for _ in range(3):
        if strategy is not None:
            before_backward(model, strategy, last=True)
        loss = FlamingoObjective().loss_sum(model, batch)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        if probes:
            with evaluating(model):
                samples += probe.samples(model, processor, processes)
    return losses, samples


def _work(processes: Processes, data: str, file: str) -> None:
    found = []
    for strategy in STRATEGIES:
        losses, samples = asked(Path(data), processes, strategy)
        plain, _ = asked(Path(data), processes, strategy, probes=False)
        assert losses == plain
        found.append([(s.query_id, s.raw, s.score, list(s.log_probs)) for s in samples])
    torch.save(found, f"{file}-{processes.rank}")


@pytest.mark.slow
def test_two_processes_answer_as_one(tmp_path: Path) -> None:
    data = write_tasks(tmp_path / "data")
    spawn(_work, 2, str(data), str(tmp_path / "found"))
    losses, one = asked(data)
    assert losses == asked(data, probes=False)[0]
    assert len(one) == 3 * 2 * 2 * 7
    assert len({sample.raw for sample in one if not sample.log_probs}) > 1
    for rank in range(2):
        for strategy, answers in zip(STRATEGIES, torch.load(tmp_path / f"found-{rank}"), strict=True):
            for (query, raw, score, log_probs), sample in zip(answers, one, strict=True):
                assert (query, raw, score) == (sample.query_id, sample.raw, sample.score), strategy
                assert log_probs == pytest.approx(list(sample.log_probs), abs=3e-4)


@pytest.mark.slow
def test_half_precision_is_probed_sharded(tmp_path: Path) -> None:
    """FSDP2 alone on one process, as a run in bf16 has it."""
    data = write_tasks(tmp_path / "data")
    spawn(_half, 1, str(data))


def _half(processes: Processes, data: str) -> None:
    strategy = Strategy(precision="bf16", frozen_dtype=torch.bfloat16)
    losses, samples = asked(Path(data), processes, strategy)
    assert losses == asked(Path(data), processes, strategy, probes=False)[0]
    assert all(sample.log_probs or sample.kind for sample in samples)


def _other_data(processes: Processes, data: str) -> None:
    """The second process reads another folder."""
    probe = Probe(options(Path(data, str(processes.rank))))
    with pytest.raises(UserError, match=r"the data of run\.probe\.tasks differs between the 2 processes"):
        probe.agree(processes)


@pytest.mark.slow
def test_processes_that_read_other_questions_stop(tmp_path: Path) -> None:
    for rank in range(2):
        write_tasks(tmp_path / str(rank))
    write_scenes(tmp_path / "1" / "toy" / "heldout" / "scene_pairs", 209)
    spawn(_other_data, 2, str(tmp_path))


def evaluated(world: Path, run_dir: Path, data: Path) -> TrainConfig:
    """A run that validates and probes."""
    settings = config(world, run_dir, "flamingo", steps=4)
    settings.run.validation.every, settings.run.validation.batches = 2, 2
    held_out = {"shards": [str(world / "pages")], "batch_size": 4, "max_tokens": 32}
    settings.run.validation.datasets = {"held": held_out}
    settings.run.probe = options(data)
    return settings


@pytest.mark.slow
def test_a_run_on_two_processes_logs_the_figures_of_one(tmp_path: Path) -> None:
    world, data = write_world(tmp_path / "world"), write_tasks(tmp_path / "data")
    found = {}
    for size in (1, 2):
        settings = evaluated(world, tmp_path / f"run-{size}", data)
        command = [*torchrun("--standalone", f"--nproc-per-node={size}"), *given(settings, tmp_path)]
        assert begin(command, tmp_path / f"log-{size}").wait(250) == 0, (tmp_path / f"log-{size}").read_text()[-3000:]
        found[size] = lines(tmp_path / f"run-{size}")
    for one, two in zip(found[1], found[2], strict=True):
        names = [name for name in one if name.startswith(("probe/", "validation/"))]
        assert len(names) == (5 if one["step"] in (2, 4) else 0)
        for name in names:
            assert two[name] == pytest.approx(one[name], abs=1e-5), name
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
