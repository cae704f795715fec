"""The plan against a measured step, and its refusals. The plan allocates nothing; the step is real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from data.dataset import DatasetSpec
from flamingo.errors import UserError
from flamingo.training.config import TrainConfig
from flamingo.training.distributed.fsdp import Processes, prepare_backward, sharding_strategy, spawn
from flamingo.training.memory_plan.ledger import Ledger
from flamingo.training.memory_plan.plan import largest_batch_of, memory_of, meta_model, plan, remedies
from flamingo.training.objectives.contrastive import ContrastiveObjective
from flamingo.training.objectives.flamingo import FlamingoObjective
from flamingo.training.objectives.language import LanguageObjective
from flamingo.training.objectives.protocol import BatchShape, Objective, add_terms, parallelize
from flamingo.training.optim import adamw
from tests.training.commands import begin, given, torchrun
from tests.training.world import config as world_config
from tests.training.world import write_world

WIDTH, LAYERS = 192, 4
VOCABULARY = 2000
LMS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 256},
    "opt": {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "ffn_dim": 4 * WIDTH},
    "llama": {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 512},
    "gpt_neox": {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 768},
    "mpt": {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 256},
}
CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 96, "layers": 3, "head_width": 32, "mlp_ratio": 4.0},
}
DATASETS = [BatchShape(8, 128, 3), BatchShape(8, 64, 1)]
OBJECTIVES: dict[str, Callable[[Processes], Objective]] = {
    "flamingo": lambda processes: FlamingoObjective(),
    "language": lambda processes: LanguageObjective(),
    "contrastive": lambda processes: ContrastiveObjective(processes.rank, processes.size),
}


def run_of(family: str, **run: Any) -> TrainConfig:
    config = world_config(Path("unused"), Path("unused"), "flamingo", **run)
    config.model.language.config = {"model_type": family, "vocab_size": VOCABULARY, **LMS[family]}
    config.model.vision.config = CLIP
    config.model.resampler.depth, config.model.resampler.latents = 2, 16
    config.model.cross_attn_every_n_layers = 2
    return config


def other_run(world: Path, objective: str, **run: Any) -> TrainConfig:
    """Objectives contrastive and language at shapes whose tensors outweigh their buffers."""
    config = world_config(world, Path("unused"), objective, **run)
    config.model.language.config = {"model_type": "llama", "vocab_size": VOCABULARY, **LMS["llama"]}
    text = {"context_length": 16, "width": 96, "heads": 3, "layers": 2}
    config.model.vision.config = {**CLIP, "text_cfg": text}
    return config


def micro_batches_of(
    config: TrainConfig, model: torch.nn.Module, objective: Objective, processes: int, datasets: list[BatchShape]
) -> list[dict[str, torch.Tensor]]:
    """The micro-batches of an update, images real."""
    micro_batches = []
    for shape in datasets:
        batch = objective.largest_batch(model, shape.rows // processes // config.run.micro_batches, shape)
        real = {
            name: torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value
            for name, value in batch.items()
        }
        micro_batches += [real] * config.run.micro_batches
    return micro_batches


def measured(config: TrainConfig, processes: Processes, datasets: list[BatchShape] = DATASETS) -> int:
    """The most bytes that torch's allocator had given out until the end of the second of two real updates."""
    torch.manual_seed(0)
    strategy = sharding_strategy(config.run, processes.size)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model, _ = meta_model(config, processes.size)
        objective = OBJECTIVES[config.objective](processes)
        model = model.to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        for buffer in model.buffers():
            buffer.fill_(1)
        parallelize(model, objective, config.run, processes, strategy)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = adamw([{"params": trained, "lr": 1e-3}], betas=(0.9, 0.95), eps=1e-8)
        model.train()
        for _ in range(2):
            batches = micro_batches_of(config, model, objective, processes.size, datasets)
            for number, batch in enumerate(batches):
                if strategy is not None:
                    prepare_backward(model, strategy, last=number + 1 == len(batches))
                add_terms(objective.sums(model, batch).values()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return highest(seen)


def highest(seen: Any) -> int:
    """The highest sum of allocations less releases."""
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _measure(processes: Processes, configs: list[TrainConfig], file: str) -> None:
    # When a collective lets go of its buffers is a matter of timing between processes, so the highest of several.
    found = [max(measured(config, processes) for _ in range(3)) for config in configs]
    if processes.is_main:
        Path(file).write_text("\n".join(map(str, found)))


def planned(config: TrainConfig, processes: int) -> int:
    return memory_of(config, DATASETS, processes).device


@pytest.mark.slow
@pytest.mark.parametrize("family", list(LMS))
@pytest.mark.parametrize("recompute", [False, True])
def test_plan_of_one_process_is_what_is_measured(family: str, recompute: bool) -> None:
    config = run_of(family, activation_checkpointing=recompute)
    found = measured(config, Processes(0, 1, torch.device("cpu")))
    assert planned(config, 1) == pytest.approx(found, rel=0.15)


@pytest.mark.slow
def test_plan_of_another_connector_is_what_is_measured() -> None:
    config = run_of("llama")
    config.model.connector, config.model.connector_options = "mlp", {"width": 128}
    found = measured(config, Processes(0, 1, torch.device("cpu")))
    assert planned(config, 1) == pytest.approx(found, rel=0.15)
    assert planned(config, 1) != planned(run_of("llama"), 1)
    assert planned(config, 2) < planned(config, 1)


@pytest.mark.slow
def test_plan_of_packed_rows_is_what_is_measured() -> None:
    datasets = [BatchShape(8, 128, 3), BatchShape(24, 48, 1, together=5)]
    found = measured(run_of("llama"), Processes(0, 1, torch.device("cpu")), datasets)
    assert memory_of(run_of("llama"), datasets, 1).device == pytest.approx(found, rel=0.15)


def test_packed_rows_are_planned_as_the_loader_lays_them_out() -> None:
    spec = DatasetSpec(name="d", shards=["unused"], batch_size=10, max_tokens=16, max_images=2, pack=70)
    shape = largest_batch_of(spec)
    assert shape == BatchShape(10, 16, 2, together=4)
    model, objective = meta_model(run_of("llama"))
    batch = objective.largest_batch(model, 10, shape)
    assert batch["sequence_ids"][:, ::16].tolist() == [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 0, 0]]
    assert batch["input_ids"].shape == batch["phi"].shape == batch["labels"].shape == (3, 64)
    assert batch["attention_mask"].sum(1).tolist() == [64, 64, 32]
    assert batch["image_counts"].tolist() == [8, 8, 4]
    assert batch["phi"][:, -1].tolist() == [8, 8, 0]
    assert len(batch["pixel_values"]) == 20
    alone = objective.largest_batch(model, 10, replace(shape, together=1))
    assert "sequence_ids" not in alone
    assert alone["input_ids"].shape == (10, 16)
    assert memory_of(run_of("llama"), [shape], 1).device > 0


def test_a_language_model_that_cannot_be_packed_is_refused_by_the_plan() -> None:
    with pytest.raises(UserError, match=r"rows cannot be packed for .*; use pack=0"):
        memory_of(run_of("mpt"), [BatchShape(8, 16, 1, together=2)], 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_plan_of_two_processes_is_what_is_measured(tmp_path: Path) -> None:
    configs = []
    for family in ("gpt2", "llama", "mpt"):
        configs += [run_of(family), run_of(family, micro_batches=2, activation_checkpointing=True)]
        configs[-1].run.sharding.frozen = "replicate"
    configs += [run_of("llama", precision="bf16"), run_of("llama")]
    configs[-1].run.sharding.keep_gathered = True
    spawn(_measure, 2, configs, str(tmp_path / "found"))
    for config, found in zip(configs, (tmp_path / "found").read_text().split(), strict=True):
        assert planned(config, 2) == pytest.approx(int(found), rel=0.15), config


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("objective", ["contrastive", "language"])
@pytest.mark.filterwarnings(
    "ignore:torch.distributed.nn.functional.all_gather is deprecated:FutureWarning"
)  # open_clip
def test_plan_of_the_other_objectives_is_what_is_measured(objective: str, tmp_path: Path) -> None:
    config = other_run(write_world(tmp_path / "world"), objective)
    found = measured(config, Processes(0, 1, torch.device("cpu")))
    assert planned(config, 1) == pytest.approx(found, rel=0.15)
    configs = [other_run(tmp_path / "world", objective, precision=precision) for precision in ("fp32", "bf16")]
    spawn(_measure, 2, configs, str(tmp_path / "found"))
    # torch 2.14's gathering with gradients, which open_clip's loss uses, keeps more than 2.15's.
    tolerance = 0.15 if objective != "contrastive" or torch.__version__ >= "2.15" else 0.2
    for config, found in zip(configs, map(int, (tmp_path / "found").read_text().split()), strict=True):
        assert planned(config, 2) == pytest.approx(found, rel=tolerance), config.run.precision


def test_adapters_of_objective_language_are_planned(tmp_path: Path) -> None:
    """Only they have optimizer state."""
    whole = other_run(tmp_path, "language")
    part = other_run(tmp_path, "language")
    part.model.freeze.language = "lora"
    a, b = (memory_of(config, [BatchShape(8, 64, 0)], 1) for config in (whole, part))
    assert b.parts["optimizer"] < a.parts["optimizer"] / 5
    assert a.parts["weights"] < b.parts["weights"] < 1.2 * a.parts["weights"]


@pytest.mark.slow
def test_under_torchrun_a_plan_is_said_once_and_a_mistake_at_least_once(tmp_path: Path) -> None:
    settings = world_config(write_world(tmp_path / "world"), tmp_path / "run", "contrastive")
    settings.plan = True
    command = [*torchrun("--standalone", "--nproc-per-node=2"), *given(settings, tmp_path)]
    assert begin(command, tmp_path / "log").wait(250) == 0, (tmp_path / "log").read_text()[-3000:]
    assert (tmp_path / "log").read_text().count("memory of each of 2 process(es)") == 1
    assert not (tmp_path / "run").exists()
    assert begin([*command, "run.steps=0"], tmp_path / "wrong").wait(250) == 1
    # By whichever process came first: torchrun ends the others.
    assert "error: run.steps=0 must be at least 1" in (tmp_path / "wrong").read_text()


def test_ledger_counts_storages_once_and_forgets_what_is_freed() -> None:
    with Ledger() as ledger:
        one = torch.zeros(1000)
        assert ledger.live["activations"] == 4000
        view = one.view(10, 100) + 0
        assert ledger.live["activations"] == 8000
        one.untyped_storage().resize_(0)
        assert ledger.live["activations"] == 4000
        del view
        assert ledger.live["activations"] == 0
    assert ledger.peak == 8000


def test_more_processes_need_less_each() -> None:
    one, eight = (memory_of(run_of("llama"), [BatchShape(8, 64, 1)], size) for size in (1, 8))
    assert eight.parts["weights"] < one.parts["weights"] / 6
    assert eight.parts["optimizer"] < one.parts["optimizer"] / 6
    assert eight.traffic.calls["all-gather"] > 0
    assert not one.traffic.calls


def test_what_cannot_fit_is_refused_with_what_to_change() -> None:
    config = run_of("llama")
    config.plan_for.gib = 1.52
    with pytest.raises(UserError, match=r"does not fit: .* GiB.*: try .*run\.") as caught:
        plan(config, DATASETS, 1)
    assert "\n" not in str(caught.value)
    config.plan_for.gib = 8.0
    text = plan(config, DATASETS, 1)
    assert "fits a device of 8 GiB" in text
    assert "weights" in text


def test_remedies_name_the_largest_part_first() -> None:
    config = run_of("llama")
    memory = memory_of(config, [BatchShape(64, 128, 3)], 1)
    assert max(memory.parts, key=lambda part: memory.parts[part]) == "activations"
    assert remedies(config, memory)[0] == "run.activation_checkpointing=true"
    config.run.activation_checkpointing = True
    less = memory_of(config, [BatchShape(64, 128, 3)], 1)
    assert less.parts["activations"] < memory.parts["activations"] / 2
    assert remedies(config, less)[0].startswith("run.micro_batches=2")


def test_hybrid_sharding_keeps_a_copy_for_each_group() -> None:
    config = run_of("llama", parallel="hybrid")
    with pytest.raises(UserError, match=r"needs run\.sharding\.size"):
        memory_of(config, [BatchShape(8, 64, 1)], 8)
    config.run.sharding.size = 2
    hybrid = memory_of(config, [BatchShape(8, 64, 1)], 8)
    config.run.parallel, config.run.sharding.size = "fsdp", 0
    full = memory_of(config, [BatchShape(8, 64, 1)], 8)
    assert hybrid.parts["optimizer"] > 3.5 * full.parts["optimizer"]
    assert hybrid.traffic.calls["all-reduce"] == hybrid.traffic.calls["reduce-scatter"]
    assert full.traffic.calls["all-reduce"] == 0
