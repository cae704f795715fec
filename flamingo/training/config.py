"""What a training run is, as typed data.

`flamingo.training.compose` turns YAML and arguments into these classes; `TrainConfig.problems()` names every impossible
value and combination before anything is loaded. Choices and bounds are in the types. Inside the library nothing reads a
config object: builders and functions take plain arguments.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from transformers import AutoConfig

from flamingo.configs.validate import AboveZero, AtLeast0, AtLeast1, Folder, NotNegative, examine, flatten, one_of
from flamingo.gguf_files import from_gguf, gguf_file
from flamingo.training.model_config import ModelConfig
from flamingo.training.objective_table import OBJECTIVES, OF_FLAMINGO

DEFAULT_MAX_TOKENS = 256
"""Most tokens of a row where a dataset does not say: the default of `data.dataset.DatasetSpec`."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The mixture: every step takes one batch of each dataset and makes one update (paper, section 2.2)."""

    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> fields of `data.dataset.DatasetSpec`."""
    num_workers: AtLeast0 = 0
    """Loader processes of each rank; 0 loads in the training process."""
    storage_minutes: NotNegative = 5.0
    """How long storage that is away, or a server that gives nothing, is waited for: before the run begins, and before
    it ends."""
    seed: int = 0
    """Order of the samples; on the command line `run.seed` unless it is set."""
    allow_pipe: bool = False
    """Whether shards may be shell commands, `pipe:COMMAND`, which run as the user who trains."""


@dataclass(kw_only=True, slots=True)
class PartFactors:
    """Factor on `optim.weight_decay` for each part."""

    vision: float = 1.0
    language: float = 1.0
    resampler: float = 1.0
    cross_attention: float = 1.0
    new_tokens: float = 1.0


@dataclass(kw_only=True, slots=True)
class LrFactors(PartFactors):
    """Factor on `optim.lr` for each part."""

    gates: float = 1.0
    """The gates of the blocks, instead of `cross_attention`."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW, warm-up, then constant or cosine."""

    lr: AboveZero = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    state: Literal["fp32", "bf16", "8bit"] = "fp32"
    """How the two moments of matrices are kept between updates: 4, 2 or 1 bytes a weight each."""
    weight_decay: float = 0.1
    """On matrices only: never on norms, biases, gates, latents and new-token rows."""
    clip_norm: AboveZero = 1.0
    """Global norm over all trained parameters, after accumulation."""
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: AtLeast0 = 0
    final_lr_ratio: float = 0.0
    """Where the cosine ends, as a share of `lr`."""
    lr_factors: LrFactors = field(default_factory=LrFactors)
    weight_decay_factors: PartFactors = field(default_factory=PartFactors)


@dataclass(kw_only=True, slots=True)
class Sharding:
    """How FSDP2 distributes weights; changes speed and memory, and results only through `frozen_precision`."""

    size: AtLeast0 = 0
    """For `run.parallel=hybrid`: processes that share one copy, next to each other by rank; 0: those of a machine."""
    frozen: Literal["shard", "replicate"] = "shard"
    """`replicate`: every process holds all frozen weights, if they fit, and none are communicated."""
    frozen_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """How frozen weights are stored; `auto`: as `run.precision`."""
    cpu_offload: bool = False
    """Keep sharded weights and optimizer state in CPU memory: slow, for models that do not fit otherwise."""
    keep_gathered: bool = False
    """Weights stay gathered until the update: fewest collectives, most memory."""
    sync_every_micro_batch: bool = False
    """Reduce gradients after every micro-batch instead of once per update: less memory, more traffic."""

    def frozen_dtype(self, precision: str) -> torch.dtype:
        """Return how frozen weights are stored in a run that computes in `precision`."""
        chosen = precision if self.frozen_precision == "auto" else self.frozen_precision
        return torch.bfloat16 if chosen == "bf16" else torch.float32


@dataclass(kw_only=True, slots=True)
class CheckpointOptions:
    """When resumable checkpoints are written beside every `run.checkpoint_every` updates, and which of them stay."""

    minutes: NotNegative = 0.0
    """Also when this many minutes have passed since the last one, by the first process's clock; 0: never."""
    keep_every: AtLeast0 = 0
    """Checkpoints of updates divisible by this stay for good, beside the newest `run.keep_last`; 0: none."""
    background: bool = True
    """Write while training goes on; only the copy to the CPU's memory holds it up."""
    grace_seconds: AboveZero = 120.0
    """After SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C: the current update and its checkpoint must be done within this many
    seconds, or the process ends with what was saved before."""


@dataclass(kw_only=True, slots=True)
class ValidationOptions:
    """The loss of each dataset on documents that are not trained on."""

    every: AtLeast0 = 0
    """Updates between two validations, the last update included; 0: never."""
    batches: AtLeast1 = 8
    """Batches of each dataset, always the same ones."""
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> fields of `data.dataset.DatasetSpec`, as in `data.datasets`."""


@dataclass(kw_only=True, slots=True)
class EvaluationOptions:
    """Few-shot scores during training, by the evaluation's own tasks and loop; each process asks all of them."""

    every: AtLeast0 = 0
    """Updates between two evaluations, the last update included; 0: never."""
    tasks: list[str] = field(default_factory=list)
    """Names of tasks (the files of hydra/task)."""
    shots: list[AtLeast0] = field(default_factory=lambda: [0, 4])
    queries: AtLeast1 = 64
    """Queries of each task."""
    batch_size: AtLeast1 = 16
    data: str = "runs/demo/data"
    """Root of the prepared data, which tasks refer to."""


@dataclass(kw_only=True, slots=True)
class WatchOptions:
    """What is done about updates that are not finite and about a run that makes no progress."""

    max_nonfinite: AtLeast0 = 0
    """Updates in a row that are left out because a loss or the gradient is not finite; one more stops the run."""
    stall_minutes: NotNegative = 10.0
    """If no update ends for this long, every process prints where its threads are; 0: never."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Where, how long and on what."""

    dir: Folder = "runs/default"
    """Identity of the run: a second start with the same folder resumes it."""
    steps: AtLeast1 = 1000
    """Optimizer updates."""
    seed: int = 0
    """Initial weights and dropout."""
    micro_batches: AtLeast1 = 1
    """Each rank's share of a batch is split into this many micro-batches, whose gradients are summed."""
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    parallel: Literal["auto", "fsdp", "hybrid", "none"] = "auto"
    """`fsdp`: FSDP2 even on one process; `auto`: when there are several processes or bf16; `hybrid`: copies, each
    sharded over `run.sharding.size` processes."""
    sharding: Sharding = field(default_factory=Sharding)
    compile: bool = False
    """torch.compile, layer by layer: decoder layers, and feed-forwards of the gated blocks and the resampler."""
    activation_checkpointing: bool = False
    threads: AtLeast0 = 0
    """CPU threads of a process; 0: OMP_NUM_THREADS, else the cores that this command may use, shared by its processes.
    torchrun itself sets OMP_NUM_THREADS=1, which is then not heeded."""
    log_every: AtLeast1 = 10
    checkpoint_every: AtLeast1 = 500
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Resumable checkpoints kept; at least 2, so that one is whole while another is written."""
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    watch: WatchOptions = field(default_factory=WatchOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    resume: Literal["auto", "never"] = "auto"
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of a running mean of the trained weights, written to `model-ema` beside `model`; 0: none."""
    tensorboard: bool = True
    wandb: str | None = None
    """Project of Weights & Biases; none: it is not imported."""


@dataclass(kw_only=True, slots=True)
class PlanTarget:
    """What `plan=true` plans for."""

    processes: AtLeast0 = 0
    """0: those of this start."""
    gib: NotNegative = 0.0
    """Memory of a device in GiB; 0: what this machine's GPU has, and on a CPU no limit."""


@dataclass(kw_only=True, slots=True)
class LaunchOptions:
    """What `launch=slurm` and `launch=local` ask the scheduler for."""

    processes: AtLeast1 = 8
    """Processes of a node, one a GPU."""
    gpus: AtLeast0 = 8
    """GPUs of a node; 0 on nodes without."""
    cpus: AtLeast1 = 12
    """CPU cores of a process: its own and those of its loader workers."""
    minutes: AtLeast1 = 1440
    """Time limit; the run is saved before it and queued again."""
    partition: str | None = None
    account: str | None = None


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """One run of `train.py`."""

    plan: bool = False
    """Print the memory that a process needs, part by part, and stop; nothing is loaded or allocated."""
    plan_for: PlanTarget = field(default_factory=PlanTarget)
    objective: Annotated[str, one_of(OBJECTIVES)] = "flamingo"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    stages: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """Name -> what a stage changes of the tables above; null leaves it out. See `flamingo.training.stages`."""
    nodes: AtLeast1 = 1
    """Machines that `launch=slurm` asks for."""
    launch: LaunchOptions = field(default_factory=LaunchOptions)

    def problems(self, world_size: int = 1) -> list[str]:
        """Return every impossible value and combination, one clause each: the key, the value, the limit."""
        config, clauses = examine(TrainConfig, self.as_dict())
        assert config is not None  # every field has a default
        return [*clauses, *config._conflicts(world_size)]

    def _conflicts(self, world_size: int) -> Iterator[str]:
        if self.stages:  # each of which is a config of its own
            return
        yield from self._data_conflicts(world_size)
        yield from self._model_conflicts()
        yield from self._freeze_conflicts()
        yield from self._length_conflicts()
        yield from self._lora_conflicts()
        yield from self._preference_conflicts()
        yield from self._cache_conflicts()
        yield from self._sharding_conflicts(world_size)
        yield from self._evaluation_conflicts()

    def _data_conflicts(self, world_size: int) -> Iterator[str]:
        micro_batches, validation = self.run.micro_batches, self.run.validation
        if not self.data.datasets:
            yield "data.datasets is empty: name at least one dataset with its shards"
        for name, dataset in self.data.datasets.items():
            batch = dataset.get("batch_size")
            if isinstance(batch, int) and batch % (world_size * micro_batches):
                yield (
                    f"data.datasets.{name}.batch_size={batch} is not divisible by processes x "
                    f"run.micro_batches = {world_size} x {micro_batches}"
                )
        for name, dataset in validation.datasets.items():
            batch = dataset.get("batch_size")
            if isinstance(batch, int) and batch % world_size:
                yield f"run.validation.datasets.{name}.batch_size={batch} is not divisible by processes = {world_size}"

    def _model_conflicts(self) -> Iterator[str]:
        objective, vision, language = self.objective, self.model.vision, self.model.language
        yield from self.model.problems()
        if objective in ("align", "contrastive") and self.run.micro_batches > 1:
            yield f"run.micro_batches must be 1 for objective {objective}: its loss compares a whole batch"
        tokens = {"class_token": vision.class_token, "final_norm": vision.final_norm}
        if objective not in OF_FLAMINGO:
            for key in (key for key, value in tokens.items() if value is not None):
                yield f"model.vision.{key} is for objective flamingo, not {objective}: remove it"
        if objective in ("align", "contrastive") and self.run.activation_checkpointing:
            yield "run.activation_checkpointing is for objectives flamingo and language: set it to false"
        if self.model.chat_template is not None and objective != "flamingo":
            yield f"model.chat_template is for objective flamingo, not {objective}: remove it"
        if self.model.init is not None:
            if objective not in (*OF_FLAMINGO, "preference"):
                yield f"model.init is for objective flamingo, not {objective}: use model.language.name=FOLDER"
            for key, source in (("vision", vision), ("language", language)):
                if source.name or source.config:
                    yield f"model.init and model.{key} both say where weights come from: remove one of them"
            own = {"vision.image_size": vision.image_size, "cross_attn_layers": self.model.cross_attn_layers}
            own |= {f"vision.{key}": value for key, value in tokens.items()}
            own["language.add_bos_token"] = language.add_bos_token
            for key in (key for key, value in own.items() if value is not None):
                yield f"model.{key} has no effect with model.init, whose model has its own: remove it"
            return  # backbone and tokenizer come with that model
        if objective not in OF_FLAMINGO and language.add_bos_token is not None:
            yield f"model.language.add_bos_token has no effect with objective {objective}: remove it"
        if objective in OF_FLAMINGO and not (vision.name or vision.config):
            yield "model.vision needs a name (weights) or a config (shape)"
        if objective == "contrastive":
            if vision.name:
                if language.tokenizer:
                    yield "model.language.tokenizer has no effect with model.vision.name, which has its own: remove it"
                return
            if not vision.config:
                yield (
                    "model.vision.config is missing: objective contrastive trains a new encoder of that shape, or "
                    "goes on with model.vision.name"
                )
            if not language.tokenizer:
                yield "model.language.tokenizer is missing: objective contrastive does not train its own tokenizer"
            return
        if not (language.name or language.config):
            yield "model.language needs a name (weights) or a config (shape)"
        if objective in OF_FLAMINGO and not (language.name or language.tokenizer):
            yield f"model.language.tokenizer is missing: objective {objective} does not train its own tokenizer"

    def _freeze_conflicts(self) -> Iterator[str]:
        parts = asdict(self.model.freeze)
        soft = self.model.soft_prompt.given
        if self.objective == "flamingo" and set(parts.values()) == {"frozen"} and not soft:
            yield f"model.freeze leaves nothing to train: set one of {', '.join(parts)} to train"
        if self.objective == "align":
            for part in (part for part in ("resampler", "cross_attention") if parts[part] != "train"):
                yield f"model.freeze.{part}={parts[part]} leaves objective align nothing to learn with: set it to train"
            for part in (part for part in ("vision", "language") if parts[part] != "frozen"):
                yield f"model.freeze.{part}={parts[part]} is not for objective align: set it to frozen"
            for name in (name for name, dataset in self.data.datasets.items() if dataset.get("batch_size") == 1):
                yield f"data.datasets.{name}.batch_size=1 gives objective align nothing to compare: set at least 2"
        if soft and self.objective != "flamingo":
            yield f"model.soft_prompt is for objective flamingo, not {self.objective}: remove it"

    def _length_conflicts(self) -> Iterator[str]:
        """Yield the datasets whose rows may be longer than the LM's positions, where its config is at hand."""
        if self.objective in ("align", "contrastive") or (limit := _positions(self.model)) is None:
            return
        positions, are_learned = limit
        for group, datasets in (("data", self.data.datasets), ("run.validation", self.run.validation.datasets)):
            for name, dataset in datasets.items():
                # Rotary positions have no last one, and few rows are as long as the default allows.
                longest = dataset.get("max_tokens", DEFAULT_MAX_TOKENS if are_learned else 0)
                if isinstance(longest, int) and longest > positions:
                    yield (
                        f"{group}.datasets.{name}.max_tokens={longest} is above the language model's {positions} "
                        f"positions: set it to at most {positions}"
                    )

    def _lora_conflicts(self) -> Iterator[str]:
        if self.model.freeze.cross_attention == "lora" and self.objective in ("contrastive", "language"):
            yield (
                f"model.freeze.cross_attention=lora is not for objective {self.objective}, which has no gated blocks: "
                "set it to train"
            )
        if self.model.freeze.language != "lora":
            return
        if self.objective == "contrastive":
            yield "model.freeze.language=lora is for objectives flamingo and language: set it to frozen"
        if self.objective == "language" and not self.model.language.name:
            yield "model.freeze.language=lora adapts an existing language model: set model.language.name"

    def _preference_conflicts(self) -> Iterator[str]:
        if self.objective != "preference":
            return
        if self.model.init is None:
            yield "model.init is missing: objective preference tunes a model that answers already"
        parts = asdict(self.model.freeze)
        if set(parts.values()) != {"frozen", "lora"}:
            yield (
                "objective preference compares a model with itself without adapters, so only these train: set "
                "model.freeze.language=lora, the other parts to frozen (cross_attention may be lora)"
            )

    def _cache_conflicts(self) -> Iterator[str]:
        where = f"model.vision.cache={self.model.vision.cache}"
        if self.model.vision.cache is None:
            return
        if self.objective not in (*OF_FLAMINGO, "preference"):
            yield f"{where} is for objective flamingo, not {self.objective}: set it to null"
        if self.model.freeze.vision != "frozen":
            yield f"{where} keeps what a frozen encoder gives: set model.freeze.vision=frozen, or the cache to null"
        for name, dataset in self.data.datasets.items():
            for key in (key for key in ("flip", "colour") if dataset.get(key)):
                yield f"{where} and data.datasets.{name}.{key}, which changes images at random: set one of them to null"

    def _sharding_conflicts(self, world_size: int) -> Iterator[str]:
        sharding, parallel, precision = self.run.sharding, self.run.parallel, self.run.precision
        key = "run.sharding"
        if sharding.size and parallel != "hybrid":
            yield f"{key}.size={sharding.size} is for run.parallel=hybrid, not {parallel}"
        elif sharding.size and world_size % sharding.size:
            yield (
                f"{key}.size={sharding.size} does not divide the {world_size} processes: use a divisor of {world_size}"
            )
        if sharding.frozen_precision == "bf16" and precision != "bf16":
            yield f"{key}.frozen_precision=bf16 needs run.precision=bf16: fp32 computation gathers fp32 weights"
        if sharding.frozen == "replicate" and precision == "bf16" and sharding.frozen_precision == "fp32":
            yield f"{key}.frozen_precision=fp32 with {key}.frozen=replicate cannot compute in bf16: set it to auto"
        if parallel != "none":
            return
        if world_size > 1:
            yield f"run.parallel=none with {world_size} processes would train {world_size} models: use auto"
        if precision == "bf16":
            yield "run.parallel=none cannot compute in bf16: use run.parallel=auto"
        options = {"frozen=replicate": sharding.frozen == "replicate", "cpu_offload": sharding.cpu_offload}
        for name in (name for name, given in options.items() if given):
            yield f"{key}.{name} has no effect with run.parallel=none: use run.parallel=fsdp"

    def _evaluation_conflicts(self) -> Iterator[str]:
        validation, questions = self.run.validation, self.run.evaluation
        if validation.every and not validation.datasets:
            yield "run.validation.every is set and run.validation.datasets is empty: name at least one dataset"
        if not questions.every:
            return
        if self.objective != "flamingo":
            yield f"run.evaluation.every is for objective flamingo, not {self.objective}: set it to 0"
        for name, values in (("tasks", questions.tasks), ("shots", questions.shots)):
            if not values:
                yield f"run.evaluation.every is set and run.evaluation.{name} is empty: give at least one"

    def as_dict(self) -> dict[str, Any]:
        """Return plain nested dicts, as written to `config.yaml`."""
        return asdict(self)


def _positions(model: ModelConfig) -> tuple[int, bool] | None:
    """Return how many positions the LM has and whether they are learned, from a config that is on this machine."""
    described: Any = dict(model.language.config or {})
    try:
        if model.init or model.language.name:
            source = str(model.init or model.language.name)
            if (packed := gguf_file(source)) is not None:
                described = from_gguf(AutoConfig, packed, "language model")
            else:
                described = AutoConfig.from_pretrained(source, local_files_only=True)
        else:
            described = AutoConfig.for_model(described.pop("model_type"), **described)
        described = described.get_text_config(decoder=True)
    except Exception:  # not here, or not readable: building the model says which, in a sentence
        return None
    positions = getattr(described, "max_position_embeddings", None)
    are_learned = getattr(described, "rope_parameters", None) is None
    return (positions, are_learned) if isinstance(positions, int) else None


_FREE_TO_CHANGE = (
    "run.dir run.steps run.log_every run.checkpoint_every run.keep_last run.threads run.resume run.tensorboard "
    "run.parallel run.sharding.size run.sharding.frozen run.sharding.cpu_offload run.sharding.keep_gathered "
    "run.sharding.sync_every_micro_batch run.compile run.activation_checkpointing run.micro_batches "
    "run.device plan plan_for.processes plan_for.gib "
    "data.num_workers data.storage_minutes data.allow_pipe"
)
FREE_TO_CHANGE = frozenset(_FREE_TO_CHANGE.split())
"""Keys that may differ between a run and its continuation without changing what an update computes."""


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the keys whose change would make a resumed run a different run, as `key (before -> now)`."""
    old, new = flatten(before), flatten(now)
    for key, value in flatten(TrainConfig().as_dict()).items():
        if key in new:
            old.setdefault(key, value)  # a run that began before a key existed has that key's default
    return [
        f"{key} ({old.get(key)} -> {new.get(key)})"
        for key in sorted(old.keys() | new.keys())
        if key not in FREE_TO_CHANGE
        and not key.startswith(FREE_TABLES)
        and not PLACES.fullmatch(key)
        and old.get(key) != new.get(key)
    ]


PLACES = re.compile(
    r"model\.init|model\.vision\.(name|pretrained|cache_dir|cache_gb)|model\.language\.(name|tokenizer)"
    r"|data\.datasets\..+\.(shards|cache|cache_gb|allow_pipe|redirect_hosts)"
)
"""Keys that say where something lies. It may have moved: its content is compared with the checkpoint's."""
FREE_TABLES = ("run.checkpoint.", "run.watch.", "run.validation.", "run.evaluation.", "run.wandb", "nodes", "launch.")
"""Beginnings of keys that may differ between a run and its continuation."""


def unavailable(config: TrainConfig) -> Iterator[str]:
    """Yield one clause for each thing that this machine lacks: the key, what is missing, the remedy."""
    run = config.run
    uses_gpu = run.device != "cpu" and torch.cuda.is_available()
    if run.device == "cuda" and not torch.cuda.is_available():
        yield "run.device=cuda, but torch sees no GPU here: set run.device=cpu or install a CUDA build"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if uses_gpu and local > torch.cuda.device_count():
        yield f"{local} processes on this machine share {torch.cuda.device_count()} GPUs: start one process per GPU"
    if uses_gpu and run.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield "run.precision=bf16, but this GPU does not compute in bf16: set run.precision=fp32"
    if run.compile and not uses_gpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        yield "run.compile=true needs a C++ compiler on a CPU: install g++, or set run.compile=false"
    adapted = next((part for part, policy in asdict(config.model.freeze).items() if policy == "lora"), None)
    if adapted and importlib.util.find_spec("peft") is None:
        yield f"model.freeze.{adapted}=lora needs peft: pip install 'flamingo-vlm[run]'"
    if config.optim.state == "8bit" and importlib.util.find_spec("bitsandbytes") is None:
        yield "optim.state=8bit needs bitsandbytes: pip install 'flamingo-vlm[quantization]', or optim.state=bf16"
    if run.wandb and importlib.util.find_spec("wandb") is None:
        yield f"run.wandb={run.wandb} needs wandb: pip install 'flamingo-vlm[wandb]', or run.wandb=null"
    if run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        yield "run.tensorboard=true needs tensorboard: pip install 'flamingo-vlm[run]', or run.tensorboard=false"
    if (init := config.model.init) is not None and not (Path(init) / "config.json").is_file():
        yield f"model.init={init} is not a model folder (config.json is missing): give one that a training run wrote"
