"""What a training run is, as typed data.

`train.py` composes YAML, merges it onto these classes (so an unknown key or a wrong type stops at once with the key's
name) and then calls `TrainConfig.problems()`, which collects every impossible value before anything is loaded. Inside
the library nothing reads a config object: builders and functions take plain arguments.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from flamingo.config import CrossAttentionConfig, connector_options
from flamingo.convert.presets import preset
from flamingo.errors import UserError
from flamingo.layers.resampler import ResamplerConfig
from flamingo.training.objective_table import OBJECTIVES

SCHEDULES = ("constant", "cosine")
PRECISIONS = ("fp32", "bf16")
PARALLEL = ("auto", "fsdp", "hybrid", "none")
RESUME = ("auto", "never")
DEVICES = ("auto", "cpu", "cuda")
FREEZE = ("frozen", "train")
FREEZE_LANGUAGE = (*FREEZE, "lora")
FROZEN_WEIGHTS = ("shard", "replicate")
FROZEN_PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(kw_only=True, slots=True)
class VisionSource:
    """Where the image encoder comes from. `name` (weights) wins over `config` (shape only, random weights)."""

    name: str | None = None
    """An open_clip architecture such as `ViT-L-14`, or a folder that objective `contrastive` has written."""
    pretrained: str | None = None
    """open_clip's tag of the weights, such as `openai`; none for a folder."""
    config: dict[str, Any] | None = None
    """open_clip's own model description: `embed_dim`, `vision_cfg`, `text_cfg`."""
    resize_mode: str | None = None
    """How an image becomes square: `squash`, `crop`, `pad`, `pad_mean` (the paper); none: as the encoder's own."""


@dataclass(kw_only=True, slots=True)
class LanguageSource:
    """Where the causal LM comes from. `name` (weights) wins over `config` (shape only, random weights)."""

    name: str | None = None
    """A transformers name or folder."""
    config: dict[str, Any] | None = None
    """Arguments of the transformers config, with `model_type`."""
    tokenizer: str | None = None
    """A tokenizer's name or folder; none: beside `name`, or trained on the document text (objective `language`)."""
    vocab_size: int = 512
    """Tokens of a tokenizer trained here."""


@dataclass(kw_only=True, slots=True)
class FreezePolicy:
    """`frozen` or `train` for each part, for the language model also `lora`; the defaults are the paper's.

    Objectives contrastive and language train their whole model; of this table they heed only `language: lora`.
    """

    vision: str = "frozen"
    language: str = "frozen"
    resampler: str = "train"
    cross_attention: str = "train"
    new_tokens: str = "train"


@dataclass(kw_only=True, slots=True)
class LoraOptions:
    """Low-rank adapters in the frozen LM (Hu et al. 2021), with `model.freeze.language=lora`."""

    rank: int = 16
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    targets: list[str] | None = None
    """Last names of the linear layers that get one, such as `q_proj`; none: all in the decoder layers."""

    def problems(self, objective: str, weights: str | None) -> Iterator[str]:
        """What cannot be; `objective` is empty where there are no adapters, `weights` the LM's name."""
        if objective == "contrastive":
            yield "model.freeze.language=lora is for objectives flamingo and language: set it to frozen"
        if objective == "language" and not weights:
            yield "model.freeze.language=lora adapts a language model that exists: give model.language.name"
        if self.rank < 1:
            yield f"model.lora.rank={self.rank} is below its least value 1"
        if not self.alpha > 0:
            yield f"model.lora.alpha={self.alpha} must be above 0"
        if self.targets is not None and not self.targets:
            yield "model.lora.targets is empty: name linear layers, or null for all of the decoder layers"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Backbones, what joins them, and what trains."""

    preset: str | None = None
    """A released model of `flamingo.convert.presets`: its backbones and blocks, unless the keys below name others."""
    init: str | None = None
    """A folder that `save_pretrained`, `python -m flamingo convert` or a run has written: start from its weights."""
    vision: VisionSource = field(default_factory=VisionSource)
    language: LanguageSource = field(default_factory=LanguageSource)
    cross_attn_every_n_layers: int | None = None
    """A gated block before every n-th decoder layer, at OpenFlamingo's positions n-1, 2n-1, ...; none: the preset's,
    else 1."""
    connector: str = "perceiver"
    """What maps encoder tokens to latents: `perceiver`, `mlp`, or a name of `flamingo.layers.connector.CONNECTORS`."""
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    """Options of the connector `perceiver`."""
    connector_options: dict[str, Any] = field(default_factory=dict)
    """Options of any other connector."""
    cross_attention: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)
    freeze: FreezePolicy = field(default_factory=FreezePolicy)
    lora: LoraOptions = field(default_factory=LoraOptions)

    def __post_init__(self) -> None:
        if self.preset is not None:
            chosen = preset(self.preset, "openflamingo")
            if not (self.vision.name or self.vision.config):
                self.vision.name, self.vision.pretrained = chosen.vision, chosen.vision_pretrained
            if not (self.language.name or self.language.config):
                self.language.name = chosen.language
            if self.language.config is None and self.language.name == chosen.language:
                self.language.config = dict(chosen.text_config)  # the shape, for a plan without the network
            if self.cross_attn_every_n_layers is None:
                self.cross_attn_every_n_layers = chosen.cross_attn_every_n_layers

    def connector_config(self) -> dict[str, Any]:
        """Return the options of the connector that the run has."""
        return asdict(self.resampler) if self.connector == "perceiver" else dict(self.connector_options)

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the connector or its options."""
        try:
            connector_options(self.connector, self.connector_config())
        except UserError as error:
            yield f"model.{error}"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The mixture: every step takes one batch of each dataset and makes one update (paper, section 2.2)."""

    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> fields of `data.loading.loader.DatasetSpec`."""
    num_workers: int = 0
    """Loader processes of each rank; 0 loads in the training process."""
    seed: int = 0


@dataclass(kw_only=True, slots=True)
class LrFactors:
    """Factor on `optim.lr` for each part."""

    vision: float = 1.0
    language: float = 1.0
    resampler: float = 1.0
    cross_attention: float = 1.0
    new_tokens: float = 1.0
    gates: float = 1.0
    """The gates of the blocks, instead of `cross_attention`."""


@dataclass(kw_only=True, slots=True)
class DecayFactors:
    """Factor on `optim.weight_decay` for each part."""

    vision: float = 1.0
    language: float = 1.0
    resampler: float = 1.0
    cross_attention: float = 1.0
    new_tokens: float = 1.0


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW, warm-up, then constant or cosine."""

    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices only: never on norms, biases, gates, latents and new-token rows."""
    clip_norm: float = 1.0
    """Global norm over all trained parameters, after accumulation."""
    schedule: str = "constant"
    warmup_steps: int = 0
    final_lr_ratio: float = 0.0
    """Where the cosine ends, as a share of `lr`."""
    lr_factors: LrFactors = field(default_factory=LrFactors)
    weight_decay_factors: DecayFactors = field(default_factory=DecayFactors)


@dataclass(kw_only=True, slots=True)
class Sharding:
    """How FSDP2 lays the weights on the processes; changes speed and memory, and only `frozen_precision` the values."""

    size: int = 0
    """For `run.parallel=hybrid`: processes that share one copy, next to each other by rank; 0: those of a machine."""
    frozen: str = "shard"
    """`replicate`: every process holds all frozen weights, where they fit: nothing of them travels."""
    frozen_precision: str = "auto"
    """How frozen weights are stored; `auto`: as `run.precision`."""
    cpu_offload: bool = False
    """Sharded weights and optimizer state live in the CPU's memory: slow, for what does not fit otherwise."""
    keep_gathered: bool = False
    """Gathered weights stay so until the update: fewest collectives, most memory."""
    sync_every_micro_batch: bool = False
    """Reduce gradients after every micro-batch instead of once an update: less memory, more traffic."""

    def problems(self, parallel: str, precision: str, world_size: int) -> Iterator[str]:
        """What cannot be with this `run.parallel`, `run.precision` and number of processes."""
        key = "run.sharding"
        for name, value, allowed in (
            ("frozen", self.frozen, FROZEN_WEIGHTS),
            ("frozen_precision", self.frozen_precision, FROZEN_PRECISIONS),
        ):
            if value not in allowed:
                yield f"{key}.{name}={value} is not one of {', '.join(allowed)}"
        if self.size < 0:
            yield f"{key}.size={self.size} is below its least value 0"
        elif self.size and parallel != "hybrid":
            yield f"{key}.size={self.size} is for run.parallel=hybrid, not {parallel}"
        elif self.size and world_size % self.size:
            yield f"{key}.size={self.size} does not divide the {world_size} processes: use a divisor of {world_size}"
        if self.frozen_precision == "bf16" and precision != "bf16":
            yield f"{key}.frozen_precision=bf16 needs run.precision=bf16: what computes in fp32 gathers fp32"
        if self.frozen == "replicate" and precision == "bf16" and self.frozen_precision == "fp32":
            yield f"{key}.frozen_precision=fp32 with {key}.frozen=replicate cannot compute in bf16: set it to auto"
        if parallel == "none":
            if world_size > 1:
                yield f"run.parallel=none with {world_size} processes would train {world_size} models: use auto"
            if precision == "bf16":
                yield "run.parallel=none cannot compute in bf16: use run.parallel=auto"
            for name, given in (("frozen=replicate", self.frozen == "replicate"), ("cpu_offload", self.cpu_offload)):
                if given:
                    yield f"{key}.{name} has no meaning with run.parallel=none: use run.parallel=fsdp"

    def frozen_dtype(self, precision: str) -> torch.dtype:
        """How frozen weights are stored in a run that computes in `precision`."""
        chosen = precision if self.frozen_precision == "auto" else self.frozen_precision
        return torch.bfloat16 if chosen == "bf16" else torch.float32


@dataclass(kw_only=True, slots=True)
class CheckpointOptions:
    """When resumable checkpoints are written beside every `run.checkpoint_every` updates, and which of them stay."""

    minutes: float = 0.0
    """Also when this many minutes have passed since the last one, by the first process's clock; 0: never."""
    keep_every: int = 0
    """Checkpoints of updates divisible by this stay for good, beside the newest `run.keep_last`; 0: none."""
    background: bool = True
    """Write while training goes on; only the copy to the CPU's memory holds it up."""
    grace_seconds: float = 120.0
    """After SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C: the update in work and its checkpoint must be done within this many
    seconds, or the process ends with what was saved before."""

    def problems(self) -> Iterator[str]:
        """Every impossible value."""
        for key, value in (("minutes", self.minutes), ("keep_every", self.keep_every)):
            if value < 0:
                yield f"run.checkpoint.{key}={value} is below its least value 0"
        if not self.grace_seconds > 0:
            yield f"run.checkpoint.grace_seconds={self.grace_seconds} must be above 0"


@dataclass(kw_only=True, slots=True)
class ValidationOptions:
    """The loss of each dataset on documents that are not trained on."""

    every: int = 0
    """Updates between two validations, the last update included; 0: never."""
    batches: int = 8
    """Batches of each dataset, always the same ones."""
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> fields of `data.loading.loader.DatasetSpec`, as in `data.datasets`."""

    def problems(self, world_size: int) -> Iterator[str]:
        """Every impossible value."""
        if self.every < 0:
            yield f"run.validation.every={self.every} is below its least value 0"
        if self.batches < 1:
            yield f"run.validation.batches={self.batches} is below its least value 1"
        if self.every and not self.datasets:
            yield "run.validation.every is set and run.validation.datasets is empty: name at least one dataset"
        for name, dataset in self.datasets.items():
            batch = dataset.get("batch_size")
            if isinstance(batch, int) and batch % world_size:
                yield f"run.validation.datasets.{name}.batch_size={batch} is not divisible by processes = {world_size}"


@dataclass(kw_only=True, slots=True)
class EvaluationOptions:
    """Few-shot scores during training, by the evaluation's own tasks and loop; each process asks all of them."""

    every: int = 0
    """Updates between two evaluations, the last update included; 0: never."""
    tasks: list[str] = field(default_factory=list)
    """Names of tasks (the files of hydra/task)."""
    shots: list[int] = field(default_factory=lambda: [0, 4])
    queries: int = 64
    """Queries of each task."""
    batch_size: int = 16
    data: str = "runs/demo/data"
    """Root of the prepared data, which tasks refer to."""

    def problems(self, objective: str) -> Iterator[str]:
        """Every impossible value."""
        for key, value, least in (
            ("every", self.every, 0),
            ("queries", self.queries, 1),
            ("batch_size", self.batch_size, 1),
        ):
            if value < least:
                yield f"run.evaluation.{key}={value} is below its least value {least}"
        if not self.every:
            return
        if objective != "flamingo":
            yield f"run.evaluation.every is for objective flamingo, not {objective}: set it to 0"
        if not self.tasks:
            yield "run.evaluation.every is set and run.evaluation.tasks is empty: name at least one task"
        if not self.shots or min(self.shots) < 0:
            yield f"run.evaluation.shots={self.shots} must be numbers of 0 or more"


@dataclass(kw_only=True, slots=True)
class WatchOptions:
    """What is done about updates that are not finite and about a run that stands still."""

    max_nonfinite: int = 0
    """Updates in a row that are left out because a loss or the gradient is not finite; one more stops the run."""
    stall_minutes: float = 10.0
    """When no update ends for so long, every process prints where its threads are; 0: never."""

    def problems(self) -> Iterator[str]:
        """Every impossible value."""
        for key, value in (("max_nonfinite", self.max_nonfinite), ("stall_minutes", self.stall_minutes)):
            if value < 0:
                yield f"run.watch.{key}={value} is below its least value 0"


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Where, how long and on what."""

    dir: str = "runs/default"
    """Identity of the run: a second start with the same folder resumes it."""
    steps: int = 1000
    """Optimizer updates."""
    seed: int = 0
    """Initial weights and dropout."""
    micro_batches: int = 1
    """A rank's share of each batch is cut into this many pieces whose gradients are summed."""
    precision: str = "fp32"
    device: str = "auto"
    parallel: str = "auto"
    """`fsdp`: FSDP2 even on one process; `auto`: when there are several processes or bf16; `hybrid`: copies, each
    sharded over `run.sharding.size` processes."""
    sharding: Sharding = field(default_factory=Sharding)
    compile: bool = False
    """torch.compile, layer by layer: decoder layers, and feed-forwards of the gated blocks and the resampler."""
    activation_checkpointing: bool = False
    threads: int = 0
    """CPU threads of a process; 0: torch's own choice, shared by the processes of a machine."""
    log_every: int = 10
    checkpoint_every: int = 500
    keep_last: int = 2
    """Resumable checkpoints kept; at least 2, so that one is whole while another is written."""
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    watch: WatchOptions = field(default_factory=WatchOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    resume: str = "auto"
    ema: float = 0.0
    """Decay of a running mean of the trained weights, written to `model-ema` beside `model`; 0: none."""
    tensorboard: bool = True
    wandb: str | None = None
    """Project of Weights & Biases; none: it is not imported."""


@dataclass(kw_only=True, slots=True)
class PlanTarget:
    """What `plan=true` plans for."""

    processes: int = 0
    """0: those of this start."""
    gib: float = 0.0
    """Memory of a device in GiB; 0: what this machine's GPU has, and on a CPU no limit."""

    def problems(self) -> Iterator[str]:
        """What cannot be."""
        if self.processes < 0:
            yield f"plan_for.processes={self.processes} is below its least value 0"
        if self.gib < 0:
            yield f"plan_for.gib={self.gib} is below its least value 0"


@dataclass(kw_only=True, slots=True)
class LaunchOptions:
    """What `launch=slurm` and `launch=local` ask the scheduler for."""

    processes: int = 8
    """Processes of a node, one a GPU."""
    gpus: int = 8
    """GPUs of a node; 0 on nodes without."""
    cpus: int = 12
    """CPU cores of a process: its own and those of its loader workers."""
    minutes: int = 1440
    """Time limit; the run is saved before it and queued again."""
    partition: str | None = None
    account: str | None = None

    def problems(self, nodes: int) -> Iterator[str]:
        """Every impossible value."""
        for key, value, least in (
            ("nodes", nodes, 1),
            ("launch.processes", self.processes, 1),
            ("launch.gpus", self.gpus, 0),
            ("launch.cpus", self.cpus, 1),
            ("launch.minutes", self.minutes, 1),
        ):
            if value < least:
                yield f"{key}={value} is below its least value {least}"


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """One run of `train.py`."""

    plan: bool = False
    """Print the memory that a process needs, part by part, and stop; nothing is loaded or allocated."""
    plan_for: PlanTarget = field(default_factory=PlanTarget)
    objective: str = "flamingo"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    nodes: int = 1
    """Machines that `launch=slurm` asks for."""
    launch: LaunchOptions = field(default_factory=LaunchOptions)

    def problems(self, world_size: int = 1) -> list[str]:
        """Every impossible value, one clause each: the key, the value, the limit."""
        own = (self._choices(), self._numbers(), self._combinations(world_size), self._tables(world_size))
        return [*chain(*own), *self._parts(world_size)]

    def _parts(self, world_size: int) -> Iterator[str]:
        yield from (*self.run.checkpoint.problems(), *self.run.watch.problems())
        yield from (*self.run.validation.problems(world_size), *self.run.evaluation.problems(self.objective))
        yield from self.launch.problems(self.nodes)
        if not 0 <= self.run.ema < 1:
            yield f"run.ema={self.run.ema} must be at least 0 and below 1"

    def _choices(self) -> Iterator[str]:
        for key, value, allowed in (
            ("objective", self.objective, OBJECTIVES),
            ("optim.schedule", self.optim.schedule, SCHEDULES),
            ("run.precision", self.run.precision, PRECISIONS),
            ("run.parallel", self.run.parallel, PARALLEL),
            ("run.resume", self.run.resume, RESUME),
            ("run.device", self.run.device, DEVICES),
            *(
                (f"model.freeze.{part}", value, FREEZE_LANGUAGE if part == "language" else FREEZE)
                for part, value in asdict(self.model.freeze).items()
            ),
        ):
            if value not in allowed:
                yield f"{key}={value} is not one of {', '.join(allowed)}"

    def _numbers(self) -> Iterator[str]:
        for key, value, least in (
            ("run.steps", self.run.steps, 1),
            ("run.micro_batches", self.run.micro_batches, 1),
            ("run.log_every", self.run.log_every, 1),
            ("run.checkpoint_every", self.run.checkpoint_every, 1),
            ("run.keep_last", self.run.keep_last, 2),
            ("run.threads", self.run.threads, 0),
            ("data.num_workers", self.data.num_workers, 0),
            ("optim.warmup_steps", self.optim.warmup_steps, 0),
            ("model.language.vocab_size", self.model.language.vocab_size, 260),
            (
                "model.cross_attn_every_n_layers",
                1 if (every := self.model.cross_attn_every_n_layers) is None else every,
                1,
            ),
        ):
            if value < least:
                yield f"{key}={value} is below its least value {least}"
        for key, number in (("optim.lr", self.optim.lr), ("optim.clip_norm", self.optim.clip_norm)):
            if not number > 0:
                yield f"{key}={number} must be above 0"

    def _combinations(self, world_size: int) -> Iterator[str]:
        if not self.data.datasets:
            yield "data.datasets is empty: name at least one dataset with its shards"
        pieces = world_size * self.run.micro_batches
        for name, dataset in self.data.datasets.items():
            batch = dataset.get("batch_size")
            if isinstance(batch, int) and batch % pieces:
                yield (
                    f"data.datasets.{name}.batch_size={batch} is not divisible by processes x "
                    f"run.micro_batches = {world_size} x {self.run.micro_batches}"
                )
        if self.objective == "contrastive" and self.run.micro_batches > 1:
            yield "run.micro_batches must be 1 for objective contrastive: its loss compares a whole batch"
        vision, language = self.model.vision, self.model.language
        if self.model.init is not None:
            if self.objective != "flamingo":
                yield f"model.init is for objective flamingo, not {self.objective}: use model.language.name=FOLDER"
            for key, given in (
                ("vision", vision.name or vision.config),
                ("language", language.name or language.config),
            ):
                if given:
                    yield f"model.init and model.{key} both say where weights come from: leave one of them out"
            return
        if self.objective == "flamingo" and not (vision.name or vision.config):
            yield "model.vision needs a name (weights) or a config (shape)"
        if self.objective == "contrastive":
            if not vision.config:
                yield "model.vision.config is missing: objective contrastive trains an encoder of that shape anew"
            if not language.tokenizer:
                yield "model.language.tokenizer is missing: a contrastive run does not make its own tokenizer"
        if self.objective in ("language", "flamingo") and not (language.name or language.config):
            yield "model.language needs a name (weights) or a config (shape)"
        if self.objective == "flamingo" and not (language.name or language.tokenizer):
            yield "model.language.tokenizer is missing: a flamingo run does not make its own tokenizer"

    def _tables(self, world_size: int) -> Iterator[str]:
        yield from self.run.sharding.problems(self.run.parallel, self.run.precision, world_size)
        adapts = self.model.freeze.language == "lora"
        yield from self.model.lora.problems(self.objective if adapts else "", self.model.language.name)
        yield from (*self.model.problems(), *self.plan_for.problems())
        if self.run.activation_checkpointing and self.objective == "contrastive":
            yield "run.activation_checkpointing is for objectives flamingo and language: set it to false"

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dicts, as written to `config.yaml`."""
        return asdict(self)


# What may differ between a run and its continuation without changing what an update computes.
FREE_TO_CHANGE = frozenset(
    {
        "run.dir",
        "run.steps",
        "run.log_every",
        "run.checkpoint_every",
        "run.keep_last",
        "run.threads",
        "run.resume",
        "run.tensorboard",
        "run.parallel",
        *(
            f"run.sharding.{name}"
            for name in ("size", "frozen", "cpu_offload", "keep_gathered", "sync_every_micro_batch")
        ),
        "run.compile",
        "run.device",
        "plan",
        "plan_for.processes",
        "plan_for.gib",
        "data.num_workers",
    }
)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys whose change would make a resumed run another run, as `key (before -> now)`."""
    old, new = flatten(before), flatten(now)
    for key, value in flatten(TrainConfig().as_dict()).items():
        if key in new:
            old.setdefault(key, value)  # a run that began before a key existed has that key's default
    return [
        f"{key} ({old.get(key)} -> {new.get(key)})"
        for key in sorted(old.keys() | new.keys())
        if key not in FREE_TO_CHANGE and not key.startswith(FREE_TABLES) and old.get(key) != new.get(key)
    ]


FREE_TABLES = ("run.checkpoint.", "run.watch.", "run.validation.", "run.evaluation.", "run.wandb", "nodes", "launch.")
"""Beginnings of keys that may differ between a run and its continuation."""


def unavailable(config: TrainConfig) -> Iterator[str]:
    """One clause for each thing that is missing: the key, what is missing, the remedy."""
    run = config.run
    uses_gpu = run.device != "cpu" and torch.cuda.is_available()
    if run.device == "cuda" and not torch.cuda.is_available():
        yield "run.device=cuda, but torch sees no GPU here: set run.device=cpu or install a CUDA build"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if uses_gpu and local > torch.cuda.device_count():
        yield f"{local} processes on this machine share {torch.cuda.device_count()} GPUs: start one process for each"
    if uses_gpu and run.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield "run.precision=bf16, but this GPU does not compute in bf16: set run.precision=fp32"
    if run.compile and not uses_gpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        yield "run.compile=true needs a C++ compiler on a CPU: install g++, or set run.compile=false"
    if config.model.freeze.language == "lora" and importlib.util.find_spec("peft") is None:
        yield "model.freeze.language=lora needs peft: pip install 'flamingo-vlm[run]'"
    if run.wandb and importlib.util.find_spec("wandb") is None:
        yield f"run.wandb={run.wandb} needs wandb: pip install 'flamingo-vlm[wandb]', or run.wandb=null"
    if run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        yield "run.tensorboard=true needs tensorboard: pip install 'flamingo-vlm[run]', or run.tensorboard=false"
    if (init := config.model.init) is not None and not (Path(init) / "config.json").is_file():
        yield f"model.init={init} holds no model (config.json is missing): give a folder that a run has written"
