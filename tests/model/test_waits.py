"""Nothing of ours in a step asks the device: each question would wait until it has done all that it was given.

Without a GPU this runs on tensors that say they are on one and hold nothing (torch's FakeTensorMode), so whoever asks
for a value fails; copies that the host would wait for are looked for too. What is on the host is real, as in a run.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StaticCache

from flamingo.conformance.tiny_models import FAMILIES, SIZE, document, subject, tiny_lm
from flamingo.inference import scoring
from flamingo.inference.generation import FiniteLogits, StopNotFinite
from flamingo.labels import IGNORED
from flamingo.layers import attention
from flamingo.training.model_config import AlignOptions
from flamingo.training.objective_table import OBJECTIVES
from flamingo.training.objectives import lora
from flamingo.training.objectives.align import Aligned, AlignObjective
from flamingo.training.objectives.contrastive import ContrastiveObjective
from flamingo.training.objectives.flamingo import FlamingoObjective
from flamingo.training.objectives.language import LanguageObjective
from flamingo.training.objectives.preference import PreferenceObjective
from flamingo.training.objectives.protocol import Objective, add_terms, on_device
from flamingo.training.optim import adamw
from tests.training.world import CLIP

CUDA = torch.device("cuda", 0)
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)


def ours() -> bool:
    """Say whether the innermost of the two that runs is this library, and not transformers."""
    frame = sys._getframe(2)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").split(".")[0]
        if package in ("flamingo", "transformers"):
            return package == "flamingo"
        frame = frame.f_back  # type: ignore[assignment]
    return True


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
            waits = (to_host and func.overloadpacket is COPIES[0]) or True not in flags
            if kinds == {"cpu", "cuda"} and waits and ours():
                raise RuntimeError(f"a copy between {' and '.join(sorted(kinds))} that is waited for")
        return func(*args, **kwargs)


def update(model: Any, objective: Objective, batch: dict[str, Tensor], where: torch.device) -> None:
    """An update. The engine of autograd takes a device that is not there for none, so there gradients are given."""
    backward = where.type == "cpu" or torch.cuda.is_available()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw([{"params": trained, "lr": 1e-3}], betas=(0.9, 0.95), eps=1e-8)
    with torch.set_grad_enabled(backward):
        loss = add_terms(objective.sums(model, on_device(objective, batch, where)).values())
    if backward:
        loss.backward()
    else:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train_step(model: Any, batch: dict[str, Tensor]) -> None:
    update(model, FlamingoObjective(), labelled(batch), model.device)


def labelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}


@torch.no_grad()
def prefill_and_decode(
    model: Any, batch: dict[str, Tensor], cache: Callable[[Any], Any] = lambda config: DynamicCache(config=config)
) -> None:
    """The steps of `generate`: the prompt, then tokens that only the device knows, with what looks at the logits."""
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


def static_decode(model: Any, batch: dict[str, Tensor]) -> None:
    prefill_and_decode(model, batch, lambda config: StaticCache(config=config, max_cache_len=32))


@torch.no_grad()
def score(model: Any, batch: dict[str, Tensor]) -> None:
    """Everything up to the scores, which are read at the end."""
    prompt = scoring._prompt(model, batch)
    options = [[[5], [6, 7], [6, 8, 9]]] * 3
    assert len(list(scoring._run(model, prompt, options, 2))) == 2


STEPS = {
    "train": (train_step, CUDA),
    "backward": (train_step, torch.device("cpu")),  # a tensor that holds nothing does not answer there either
    "decode": (prefill_and_decode, CUDA),
    "static": (static_decode, CUDA),
    "score": (score, CUDA),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_asks_the_device(family: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if step == "static" and family in ("bloom", "mpt"):
        pytest.skip("with a static cache it takes no mask of these tokens only")
    monkeypatch.setattr(attention, "xformers_error", lambda: "it takes no tensors that hold nothing")
    with torch.cuda.device(CUDA) if torch.cuda.is_available() else nullcontext():
        model = subject(lambda: tiny_lm(family))
        run, device = STEPS[step]
        batch = document(model, side="right" if run is train_step else "left")  # ragged, as a loader gives it
        model.to("meta")  # type: ignore[arg-type]
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device=device)
            with HostIsReal():
                run(model, batch)


def of_flamingo() -> tuple[Any, Objective, dict[str, Tensor]]:
    model = subject(lambda: tiny_lm("llama"))
    return model, FlamingoObjective(), labelled(document(model, side="right"))


def of_language() -> tuple[Any, Objective, dict[str, Tensor]]:
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    return tiny_lm("llama"), LanguageObjective(), labelled({"input_ids": ids, "attention_mask": ids.sign()})


def of_contrastive() -> tuple[Any, Objective, dict[str, Tensor]]:
    shape: dict[str, Any] = copy.deepcopy(CLIP)
    shape["text_cfg"]["vocab_size"] = 50
    batch = {"image": torch.zeros(3, 3, 16, 16, dtype=torch.uint8), "text": torch.zeros(3, 8, dtype=torch.long)}
    return open_clip.CLIP(**shape), ContrastiveObjective(), batch


def of_preference() -> tuple[Any, Objective, dict[str, Tensor]]:
    model = subject(lambda: tiny_lm("llama"))
    model.freeze({"resampler": "frozen", "cross_attention": "frozen", "new_tokens": "frozen"})
    lora.add_adapters(model.language_model, rank=2, alpha=4.0)
    batch = labelled(document(model, side="right"))
    pixels = batch.pop("pixel_values")
    pairs = {name: torch.cat([value, value]) for name, value in batch.items()}
    return model, PreferenceObjective(0.1), {**pairs, "pixel_values": pixels}


def of_align() -> tuple[Any, Objective, dict[str, Tensor]]:
    model = Aligned(subject(lambda: tiny_lm("llama")), AlignOptions())
    batch = {"image": torch.zeros(3, 3, SIZE, SIZE, dtype=torch.uint8), "text": torch.full((3, 2), 5)}
    return model, AlignObjective(0.07), {**batch, "share": torch.full((3, 2), 0.5), "name": torch.arange(3)}


SUBJECTS = {
    "flamingo": of_flamingo,
    "language": of_language,
    "contrastive": of_contrastive,
    "preference": of_preference,
    "align": of_align,
}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which the fake mode itself looks at
@pytest.mark.parametrize("device", [CUDA, torch.device("cpu")], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_asks_the_device(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "xformers_error", lambda: "it takes no tensors that hold nothing")
    with torch.cuda.device(CUDA) if torch.cuda.is_available() else nullcontext():
        model, objective, batch = SUBJECTS[name]()
        model.to("meta")
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device=device)
            with HostIsReal():
                update(model, objective, batch, device)
