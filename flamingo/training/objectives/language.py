"""Objective `language`: a causal LM on the text of documents, all of it or adapters in a frozen one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from flamingo.backbones import load_language
from flamingo.errors import UserError
from flamingo.files import write_folder
from flamingo.labels import IGNORED
from flamingo.language.hooks import embedding_table, find_decoder_layers, table_shape
from flamingo.language.loss import next_labels
from flamingo.storage import refuse_nonfinite
from flamingo.training.checkpoints.trained_weights import config_fingerprint, fingerprint, tokenizer_fingerprint
from flamingo.training.distributed.fsdp import FsdpUnit, Processes
from flamingo.training.distributed.units import layer_units
from flamingo.training.model_config import ModelConfig
from flamingo.training.objectives import build as builders
from flamingo.training.objectives import lora
from flamingo.training.objectives.protocol import BatchShape, Setup
from flamingo.transfer import on_host, sent


def token_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of next-token cross-entropies in fp32: `(B, T, V)` and `(B, T)` to a scalar.

    Labelled positions are selected by integers alone, on the host, which a memory plan computes for real: their number
    is a shape.
    """
    targets = next_labels(on_host(labels))
    positions = (targets != IGNORED).nonzero()[:, 0]
    targets, positions = (sent(x, logits.device) for x in (targets[positions], positions))
    return F.cross_entropy(logits.flatten(0, 1).index_select(0, positions).float(), targets, reduction="sum")


class LanguageObjective:
    """Next-token prediction on text."""

    host_inputs: ClassVar[frozenset[str]] = frozenset({"labels"})

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the number of labelled tokens."""
        return {"text": int((batch["labels"][:, 1:] != IGNORED).sum())}

    def sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum of cross-entropies over the labelled tokens."""
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        return {"text": token_loss_sum(out.logits, batch["labels"])}

    def fsdp_units(self, model: nn.Module) -> Iterator[FsdpUnit]:
        """Return a unit for each decoder layer."""
        return layer_units(self.compiled_layers(model))

    def compiled_layers(self, model: Any) -> Iterable[nn.Module]:
        """Return the decoder layers."""
        layers: Iterable[nn.Module] = find_decoder_layers(model)
        return layers

    def largest_batch(self, model: nn.Module, rows: int, shape: BatchShape) -> dict[str, Tensor]:
        """Return `rows` rows of text with a label on every token."""
        ids = torch.zeros(rows, shape.tokens, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros_like(ids)}


def build(model: ModelConfig, run_dir: Path, processes: Processes, texts: Callable[[], Iterable[str]]) -> Setup:
    """Load or build the LM, with a tokenizer trained on `texts` where none is named.

    Raises:
        UserError: a backbone cannot be loaded, or the tokenizer has more tokens than the LM has embeddings.
    """
    language = model.language
    if language.name:
        lm, tokenizer = load_language(language.name, language.tokenizer)
        refuse_nonfinite(lm, f"the language model {language.name}")
        builders.refuse_quantized(lm)
        rows, _ = table_shape(embedding_table(lm))
        if len(tokenizer) > rows:
            raise UserError(
                f"the tokenizer of {language.tokenizer or language.name} has {len(tokenizer)} tokens, more than the "
                f"{rows} embeddings of {language.name}: set model.language.tokenizer to the one it was trained with"
            )
    elif language.tokenizer:
        tokenizer = builders.load_tokenizer(language.tokenizer)
    else:
        folder = run_dir / "tokenizer"
        if processes.is_main and not _is_tokenizer(folder):
            trained = builders.train_tokenizer(texts(), language.vocab_size)
            write_folder(folder, lambda whole: trained.save_pretrained(str(whole)), overwrite=True)
        processes.wait_long()  # the others, until it is written
        tokenizer = builders.load_tokenizer(str(folder))
    if not language.name:
        lm = builders.build_language(language.config or {}, tokenizer)
    adapters: Any = None
    frozen = {"tokenizer": tokenizer_fingerprint(tokenizer), "config": config_fingerprint(lm.config)}
    if model.freeze.language == "lora":
        frozen["language"] = fingerprint(lm)  # before the adapters, which change its keys
        adapters = lora.add_adapters(lm.requires_grad_(False), **asdict(model.lora))

    def export(weights: dict[str, Tensor], folder: Path) -> None:
        lm.save_pretrained(str(folder), state_dict=weights if adapters is None else lora.merge(weights, {"": adapters}))
        tokenizer.save_pretrained(str(folder))
        if adapters is not None:
            lora.save_adapters(weights, adapters, "", folder / lora.ADAPTER)

    return Setup(
        lm,
        LanguageObjective(),
        part_of=lambda name: "language",
        collate=lambda classes: classes.LanguageCollate(tokenizer),
        export=export,
        frozen=frozen,
    )


def _is_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a whole tokenizer. A kill of an older version could leave half of one.

    One made again is the same, if the data are: a checkpoint has its fingerprint.
    """
    try:
        builders.load_tokenizer(str(folder)) if folder.is_dir() else None
    except Exception:  # of half a JSON, transformers and tokenizers say everything
        return False
    return folder.is_dir()


def build_on_meta(model: ModelConfig, processes: int) -> tuple[nn.Module, LanguageObjective]:
    """Build the LM without memory from `model.language.config`."""
    fields = dict(model.language.config or {})
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
        if model.freeze.language == "lora":
            lora.add_adapters(lm.requires_grad_(False), **asdict(model.lora))
    return lm, LanguageObjective()
