"""Nothing of ours in a step asks the device: each question would wait until it has done all that it was given.

Without a GPU this runs on tensors that say they are on one and hold nothing (torch's FakeTensorMode), so whoever asks
for a value fails; copies that the host would wait for are looked for too. What is on the host is real, as in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StaticCache

from flamingo.conformance.tiny_models import FAMILIES, document, subject, tiny_lm
from flamingo.inference import scoring
from flamingo.inference.generation import FiniteLogits, StopNotFinite
from flamingo.labels import IGNORED
from flamingo.training.objectives.flamingo import FlamingoObjective
from flamingo.training.objectives.protocol import add_terms, on_device
from flamingo.training.optim import adamw

CUDA = torch.device("cuda", 0)
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)


class HostIsReal(TorchDispatchMode):
    """Inside FakeTensorMode: compute what is on the host, and refuse copies that the host would wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        device = kwargs.get("device")
        to_host = device is None or torch.device(device).type == "cpu"
        on_device = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not on_device and to_host:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.overloadpacket in COPIES:
            kinds = {tensor.device.type for tensor in tensors} | ({torch.device(device).type} if device else set())
            flags = [kwargs.get("non_blocking"), *args[2:3]]
            if kinds == {"cpu", "cuda"} and ((to_host and func.overloadpacket is COPIES[0]) or True not in flags):
                raise RuntimeError(f"a copy between {' and '.join(sorted(kinds))} that is waited for")
        return func(*args, **kwargs)


@contextmanager
def pretended() -> Iterator[None]:
    """Pretend a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True), HostIsReal():
        yield


def inputs_of(model: Any, **options: Any) -> dict[str, Tensor]:
    """Return a batch as a loader gives it, ragged, with its pixels on the device."""
    batch = document(model, **options)
    return {name: x.to(CUDA, non_blocking=True) if name == "pixel_values" else x for name, x in batch.items()}


def train_step(model: Any) -> None:
    objective = FlamingoObjective()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw([{"params": trained, "lr": 1e-3}], betas=(0.9, 0.95), eps=1e-8)
    batch = document(model, side="right")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    add_terms(objective.sums(model, on_device(objective, batch, CUDA)).values()).backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def prefill_and_decode(model: Any, cache: Callable[[Any], Any] = lambda config: DynamicCache(config=config)) -> None:
    """The steps of `generate`: the prompt, then tokens that only the device knows, with what looks at the logits."""
    batch = inputs_of(model)
    ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
    out = model(input_ids=ids, attention_mask=mask, past_key_values=cache(model.language_model.config), **batch)
    phi = (ids == model.config.image_token_id).sum(1, keepdim=True)
    finite = FiniteLogits()
    there = ids.to(CUDA, non_blocking=True)
    for _ in range(2):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1).to(CUDA, non_blocking=True)
        scores = finite(there, out.logits[:, -1])
        StopNotFinite(finite)(there, scores)
        step = {"input_ids": scores.argmax(-1)[:, None], "attention_mask": mask, "phi": phi}
        out = model(**step, past_key_values=out.past_key_values)


def static_decode(model: Any) -> None:
    prefill_and_decode(model, lambda config: StaticCache(config=config, max_cache_len=32))


@torch.no_grad()
def score(model: Any) -> None:
    """Everything up to the scores, which are read at the end."""
    prompt = scoring._prompt(model, inputs_of(model))
    options = [[[5], [6, 7], [6, 8, 9]]] * 3
    assert len(list(scoring._run(model, prompt, options, 2))) == 2


STEPS = {"train": train_step, "decode": prefill_and_decode, "static": static_decode, "score": score}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_asks_the_device(family: str, step: str) -> None:
    with torch.cuda.device(CUDA) if torch.cuda.is_available() else nullcontext():
        model = subject(lambda: tiny_lm(family)).to("meta")  # type: ignore[arg-type]
        with pretended():
            STEPS[step](model.to_empty(device=CUDA))
