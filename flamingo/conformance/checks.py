"""Checks of whether a causal LM works inside a Flamingo: `python -m flamingo conformance gpt2 path/to/lm ...`.

Every check is an equality between two ways of computing the same thing, so none needs a reference file, and
none passes on a model whose images do nothing (`images_matter`). A check takes a function that returns the LM,
the same weights every time, because most checks need it twice: once inside a model and once alone. It returns a note
(the largest difference it saw) and raises `ConformanceError` where the two ways disagree.

    from flamingo.conformance.checks import CHECKS
    CHECKS["cached"](lambda: AutoModelForCausalLM.from_pretrained("my/lm"))
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flamingo.conformance.tiny_models import MakeLM, document, subject
from flamingo.errors import first_line
from flamingo.labels import IGNORED
from flamingo.language.hooks import embedding_scale, embedding_table, find_decoder_layers, output_head, table_shape
from flamingo.modeling import FlamingoForConditionalGeneration

Check = Callable[[MakeLM], str]

TOLERANCE = 3e-5
"""Largest difference between two fp32 ways, as a share of the largest value."""
GRADIENT = 0.1
"""Gradients are held to that share of this value where all of theirs are smaller; logits to that of 1."""

NEW_TOKENS = 5


class ConformanceError(AssertionError):
    """Two ways of computing the same thing disagree."""


@torch.no_grad()
def closed_gates(make: MakeLM) -> str:
    """With its gates closed the model is the LM, bit for bit, from ids and from what the new tokens embed to."""
    model, plain = subject(make, gates=0.0), make()
    inputs = document(model)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    table, rows = embedding_table(plain), table_shape(output_head(plain))[0]
    is_new = model.new_tokens.match(ids)
    embedded = table(ids.masked_fill(is_new.any(-1), 0))
    embedded = model.new_tokens(embedded, is_new, scale=embedding_scale(table))
    options: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(plain.forward).parameters:
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    ours = model(**inputs, use_cache=False).logits[..., :rows]
    _same(ours, plain(inputs_embeds=embedded, **options).logits, "closed gates and the LM alone")
    text = document(model, [2])
    ours = model(**text, use_cache=False).logits[..., :rows]
    _same(ours, plain(input_ids=text["input_ids"], use_cache=False).logits, "a text-only row and the LM alone")
    return "exact"


@torch.no_grad()
def images_matter(make: MakeLM) -> str:
    """Another second image changes the tokens from its tag on and none before it."""
    model = subject(make)
    inputs = document(model, [0])
    before = model(**inputs, use_cache=False).logits[0]
    inputs["pixel_values"][1] = 255 - inputs["pixel_values"][1]
    after = model(**inputs, use_cache=False).logits[0]
    position = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[1, 0])
    _same(before[:position], after[:position], "logits before an image that is exchanged")
    changed = (before != after).any(-1)[position:]
    if not bool(changed.all()):
        raise ConformanceError(f"exchanging an image changes {int(changed.sum())} of {len(changed)} tokens that see it")
    return "seen"


@torch.no_grad()
def cached(make: MakeLM) -> str:
    """Token by token with a cache gives the logits of the whole text at once."""
    model = subject(make)
    inputs = document(model)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    whole = model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).logits
    start = ids.shape[1] - 4
    out = model(input_ids=ids[:, :start], attention_mask=mask[:, :start], use_cache=True, **inputs)
    parts = [out.logits[:, -1]]
    for t in range(start, ids.shape[1]):
        past = out.past_key_values
        out = model(input_ids=ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=past)
        parts.append(out.logits[:, -1])
    return close(torch.stack(parts, 1), whole[:, start - 1 :], "cached and uncached logits")


def generation(make: MakeLM) -> str:
    """Greedy and beam search give the same tokens with a cache as without, a beam of 1 those of greedy."""
    model = subject(make)
    inputs: Any = document(model)
    for beams in (1, 3):
        ours = model.generate(**inputs, max_new_tokens=NEW_TOKENS, num_beams=beams)
        theirs = model.generate(**inputs, max_new_tokens=NEW_TOKENS, num_beams=beams, use_cache=False)
        _same(ours, theirs, f"tokens of {beams} beams with and without a cache")
    return "equal"


@torch.no_grad()
def batched(make: MakeLM) -> str:
    """Rows of a left-padded batch are the rows alone: logits, greedy, beam."""
    model = subject(make)
    together: Any = document(model)
    logits = model(**together, use_cache=False).logits
    notes = []
    for row in range(3):
        alone: Any = document(model, [row])
        mine = logits[row][together["attention_mask"][row].bool()]
        notes.append(close(mine, model(**alone, use_cache=False).logits[0], f"row {row} in a batch and alone"))
    for beams in (1, 3):
        options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "num_beams": beams}
        ours = model.generate(**together, **options)
        for row in range(3):
            alone = document(model, [row])
            theirs = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
            ended = [int(token) in model.generation_config.eos_token_id for token in theirs]
            length = ended.index(True) + 1 if True in ended else len(theirs)
            new = ours[row, together["input_ids"].shape[1] :]
            _same(new[:length], theirs[:length], f"row {row}, {beams} beams, in a batch and alone")
    return max(notes, key=float)


def recomputed(make: MakeLM) -> str:
    """Gradient checkpointing reaches the LM's layers and changes neither loss nor gradients."""
    (loss, plain), (again, recomputed) = (gradients(subject(make), (0, 1, 2), recompute=way) for way in (False, True))
    close(again, loss, "loss with and without recomputation")
    if list(recomputed) != list(plain):
        raise ConformanceError("recomputation changes which parameters get a gradient")
    notes = [close(recomputed[name], plain[name], f"gradient of {name}", least=GRADIENT) for name in plain]
    return max(notes, key=float)


@torch.no_grad()
def untouched(make: MakeLM) -> str:
    """The LM keeps its class, its keys and its function, and transformers saves and loads it."""
    model, plain = subject(make), make()
    model(**document(model))
    lm: Any = model.language_model
    if type(lm) is not type(plain) or list(lm.state_dict()) != list(plain.state_dict()):
        raise ConformanceError("the LM's class or the keys of its state dict changed")
    text = document(model, [2])["input_ids"]
    wanted = plain(input_ids=text).logits
    _same(lm(input_ids=text).logits, wanted, "the LM inside the model, outside of a call, and alone")
    with tempfile.TemporaryDirectory() as folder:
        lm.save_pretrained(folder)
        loaded: Any = type(plain).from_pretrained(folder, output_loading_info=True)
    again, report = loaded
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ConformanceError(f"saving the LM lost or added keys: {report}")
    _same(again.eval()(input_ids=text).logits, wanted, "the LM after saving and loading, and before")
    return "exact"


@torch.no_grad()
def saved(make: MakeLM) -> str:
    """Saving and loading the whole model gives the same logits."""
    model = subject(make)
    inputs: Any = document(model)
    wanted = model(**inputs).logits
    built = model.config.language_kind == "module"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, built_modules=built)
        loaded = FlamingoForConditionalGeneration.from_pretrained(folder, language=make() if built else None)
    _same(loaded.eval()(**inputs).logits, wanted, "logits after saving and loading, and before")
    return "exact"


@torch.no_grad()
def compiled(make: MakeLM) -> str:
    """The LM with its blocks under `torch.compile` gives the same logits; the note says whether in one graph."""
    model = subject(make)
    inputs: Any = document(model)
    wanted = model(**inputs, use_cache=False).logits
    lm: Any = model.language_model
    # A graph break costs speed, not correctness: it goes into the note and does not fail the check.
    for whole in (True, False):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        lm.compile(backend="aot_eager", fullgraph=whole)
        try:
            ours = model(**inputs, use_cache=False).logits
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = first_line(error)
            if not whole:
                raise ConformanceError(f"torch.compile fails: {reason}") from error
            continue
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if not graphs:
            raise ConformanceError("torch.compile compiled nothing")
        close(ours, wanted, "compiled and eager logits")
        return "one graph" if whole else f"{graphs} graphs: {reason}"
    raise AssertionError("unreachable")


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (closed_gates, images_matter, cached, generation, batched, recomputed, untouched, saved, compiled)
}
"""Name -> check. The check `two_processes` needs the trainer: `flamingo.training.distributed.conformance`."""


def gradients(
    model: FlamingoForConditionalGeneration, rows: Iterable[int], *, recompute: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and gradients of a training step over some rows of the document, the loss divided by 10 labels."""
    if recompute:
        model.activation_checkpointing_enable()
    model.train()
    layers = find_decoder_layers(model.language_model)
    if recompute and not all(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in layers):
        raise ConformanceError("the LM's layers do not recompute their activations")
    inputs: Any = document(model, rows, side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    out = model(**inputs, labels=labels, num_items_in_batch=10)
    out.loss.backward()
    return out.loss.detach(), {name: p.grad for name, p in model.trainable_parameters() if p.grad is not None}


def _same(ours: Tensor, theirs: Tensor, what: str) -> None:
    if not torch.equal(ours, theirs):
        shapes = f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
        worst = f"by {float((ours - theirs).abs().max()):.1e}" if ours.shape == theirs.shape else f"in shape: {shapes}"
        raise ConformanceError(f"{what} differ {worst}")


def close(ours: Tensor, theirs: Tensor, what: str, *, least: float = 1.0) -> str:
    """Return the largest difference as text.

    Raises:
        ConformanceError: it is above `TOLERANCE` of the largest value, or of `least` where that is more, or no number.
    """
    worst = float((ours.float() - theirs.float()).abs().max())
    if not worst <= TOLERANCE * max(least, float(theirs.abs().max())):
        raise ConformanceError(f"{what} differ by {worst:.1e}")
    return f"{worst:.1e}"


@dataclass(frozen=True)
class CheckResult:
    """Whether an LM passed a check, and by how much."""

    check: str
    passed: bool
    note: str


def conform(make: MakeLM, checks: Iterable[str] = tuple(CHECKS)) -> Iterator[CheckResult]:
    """Yield the result of each check; an exception inside a check is a failure with its message."""
    for name in checks:
        try:
            yield CheckResult(name, True, CHECKS[name](make))
        except Exception as error:
            yield CheckResult(name, False, f"{type(error).__name__}: {first_line(error)}")


def print_table(checks: Sequence[str], results: Iterable[tuple[str, Iterable[CheckResult]]]) -> int:
    """Print a row of check results for each LM as they come, then the failures; return how many there are."""
    print("  ".join([f"{'language model':16}", *(f"{check:>9}" for check in checks)]))
    failures = []
    for language, row in results:
        row = list(row)
        cells = [f"{r.note if r.passed else 'FAILED':>{max(9, len(r.check))}}" for r in row]
        print("  ".join([f"{language:16}", *cells]), flush=True)
        failures += [f"{language}, {r.check}: {r.note}" for r in row if not r.passed]
    print("\n".join(failures) or f"all passed: equal, or different by at most {TOLERANCE:g} of the largest value")
    return len(failures)
