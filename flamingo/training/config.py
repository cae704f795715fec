"""What a training run is, as typed data.

`train.py` composes YAML, merges it onto these classes (so an unknown key or a wrong type stops at once with the key's
name) and then calls `TrainConfig.problems()`, which collects every impossible value before anything is loaded. Inside
the library nothing reads a config object: builders and functions take plain arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from flamingo.config import CrossAttentionConfig, ResamplerConfig
from flamingo.training import run_options
from flamingo.training.options import DecayFactors, FreezePolicy, LoraOptions, LrFactors, PlanTarget, Sharding

OBJECTIVES = ("contrastive", "language", "flamingo")
SCHEDULES = ("constant", "cosine")
PRECISIONS = ("fp32", "bf16")
PARALLEL = ("auto", "fsdp", "hybrid", "none")
RESUME = ("auto", "never")
DEVICES = ("auto", "cpu", "cuda")
FREEZE = ("frozen", "train")
FREEZE_LANGUAGE = (*FREEZE, "lora")


@dataclass(kw_only=True, slots=True)
class VisionSource:
    """Where the picture encoder comes from. `name` (weights) wins over `config` (shape only, random weights)."""

    name: str | None = None
    """An open_clip architecture such as `ViT-L-14`, or a folder that objective `contrastive` has written."""
    pretrained: str | None = None
    """open_clip's tag of the weights, such as `openai`; none for a folder."""
    config: dict[str, Any] | None = None
    """open_clip's own model description: `embed_dim`, `vision_cfg`, `text_cfg`."""
    resize_mode: str | None = None
    """How a picture becomes square: `squash`, `crop`, `pad`, `pad_mean` (the paper); none: as the encoder's own."""


@dataclass(kw_only=True, slots=True)
class LanguageSource:
    """Where the causal LM comes from. `name` (weights) wins over `config` (shape only, random weights)."""

    name: str | None = None
    """A transformers name or folder."""
    config: dict[str, Any] | None = None
    """Arguments of the transformers config, with `model_type`."""
    tokenizer: str | None = None
    """A tokenizer's name or folder; none: beside `name`, or trained on the page text (objective `language`)."""
    vocab_size: int = 512
    """Tokens of a tokenizer trained here."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Backbones, what joins them, and what trains."""

    init: str | None = None
    """A folder that `save_pretrained`, `python -m flamingo convert` or a run has written: start from its weights."""
    vision: VisionSource = field(default_factory=VisionSource)
    language: LanguageSource = field(default_factory=LanguageSource)
    cross_attn_every_n_layers: int = 1
    """A gated block before every n-th decoder layer, at OpenFlamingo's positions n-1, 2n-1, ..."""
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    cross_attention: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)
    freeze: FreezePolicy = field(default_factory=FreezePolicy)
    lora: LoraOptions = field(default_factory=LoraOptions)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The mixture: every step takes one batch of each dataset and makes one update (paper, section 2.2)."""

    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> fields of `data.loading.loader.DatasetSpec`."""
    num_workers: int = 0
    """Loader processes of each rank; 0 loads in the training process."""
    seed: int = 0


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
    checkpoint: run_options.CheckpointOptions = field(default_factory=run_options.CheckpointOptions)
    watch: run_options.WatchOptions = field(default_factory=run_options.WatchOptions)
    validation: run_options.ValidationOptions = field(default_factory=run_options.ValidationOptions)
    probe: run_options.ProbeOptions = field(default_factory=run_options.ProbeOptions)
    resume: str = "auto"
    ema: float = 0.0
    """Decay of a running mean of the trained weights, written to `model-ema` beside `model`; 0: none."""
    tensorboard: bool = True
    wandb: str | None = None
    """Project of Weights & Biases; none: it is not imported."""


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
    launch: run_options.LaunchOptions = field(default_factory=run_options.LaunchOptions)

    def problems(self, world_size: int = 1) -> list[str]:
        """Every impossible value, one clause each: the key, the value, the limit."""
        own = (self._choices(), self._numbers(), self._combinations(world_size), self._tables(world_size))
        return [*chain(*own), *self._parts(world_size)]

    def _parts(self, world_size: int) -> Iterator[str]:
        yield from (*self.run.checkpoint.problems(), *self.run.watch.problems())
        yield from (*self.run.validation.problems(world_size), *self.run.probe.problems(self.objective))
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
            ("model.cross_attn_every_n_layers", self.model.cross_attn_every_n_layers, 1),
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
        yield from self.plan_for.problems()
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
        *(f"run.sharding.{name}" for name in ("size", "frozen", "cpu_offload", "keep_gathered", "sync_every_piece")),
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
        if key not in FREE_TO_CHANGE and not key.startswith(run_options.FREE_TABLES) and old.get(key) != new.get(key)
    ]
