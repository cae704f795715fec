"""The loss in chunks against the loss over whole logits, and what a training step keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from flamingo import FlamingoForConditionalGeneration
from flamingo.language import loss as loss_module
from flamingo.language.loss import chunk_of, mean_nll, next_labels, nll_in_chunks
from tests.model import tiny


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("number", [0, 1, 5, 6, 13])
def test_chunks_are_the_whole(number: int, frozen: bool) -> None:
    """Values, gradients of the hidden states, of the head and of the new tokens' rows; the last chunk may be short."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, rows = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((number, 7), (11, 7), (2, 7))
    )
    targets = torch.randint(0, 13, (number,), generator=generator)

    def head(x: Tensor, new: Tensor) -> Tensor:
        return torch.cat([x @ weight.T, new], dim=-1)

    whole = F.cross_entropy(head(hidden, hidden @ rows.T).float(), targets, reduction="none")
    if frozen:
        weight.requires_grad_(False)
    pieces = nll_in_chunks(head, hidden, hidden @ rows.T, targets, chunk=5, frozen_head=frozen)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-6)
    factors = torch.arange(1.0, number + 1)
    learning = (hidden, rows) if frozen else (hidden, weight, rows)
    ours, theirs = (torch.autograd.grad((out * factors).sum(), learning) for out in (pieces, whole))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_never_more_logits_than_a_chunk() -> None:
    """Counted as the head is called; and the mean is over labels, or over the number that is given."""
    sizes: list[int] = []
    hidden = torch.randn(23, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def head(x: Tensor, new: Tensor) -> Tensor:
        sizes.append(len(x))
        return torch.cat([x.repeat(1, 3), new], dim=-1)

    nll = nll_in_chunks(head, hidden, hidden[:, :0], torch.zeros(23, dtype=torch.long), chunk=10)
    assert sizes == [10, 10, 3]
    nll.sum().backward()
    assert sizes == [10, 10, 3, 10, 10]  # all but the last again
    sizes.clear()
    nll_in_chunks(head, hidden, hidden[:, :0], torch.zeros(23, dtype=torch.long), chunk=10, frozen_head=True).sum()
    assert sizes == [10, 10, 3]
    assert chunk_of(50274, torch.device("cpu")) * 50274 * 4 <= 24 * 2**20
    torch.testing.assert_close(mean_nll(nll, None), nll.mean())
    torch.testing.assert_close(mean_nll(nll, 2), nll.sum() / 2)
    assert next_labels(torch.tensor([[1, 2, -100], [3, -100, 4]])).tolist() == [2, -100, -100, -100, 4, -100]


@pytest.mark.parametrize("language", ["frozen", "train"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_training_step_in_chunks_has_the_gradients_of_whole_logits(
    family: str, language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the head frozen and training (its gradient is compared too); no logits of all labels are made."""
    results = []
    largest: list[int] = []
    for lean in (True, False):
        model, processor = tiny.flamingo(family, tied=False)
        model.freeze({"language": language})
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for layer in model.language_model.modules():
            if hasattr(layer, "dropout") and isinstance(layer.dropout, float):
                setattr(layer, "dropout", 0.0)  # noqa: B010  (nn.Module's setter wants tensors)
        model.train()
        inputs = dict(tiny.batch(processor, padding_side="right"))
        labels = tiny.labels_of(inputs, model.config.image_token_id)
        if lean:
            with monkeypatch.context() as patch:
                patch.setattr(loss_module, "CHUNK_BYTES", {"cpu": 4 * 4 * tiny.TOKENS})
                head: Any = model.language_model.get_output_embeddings()
                head.register_forward_pre_hook(lambda _, args: largest.append(len(args[0][0])))
                loss = model(**inputs, labels=labels).loss
        else:
            loss = model(**inputs, labels=labels, skip_logits=False).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.trainable_parameters() if p.grad is not None}))
    assert largest == [0]  # positions of the one call that would have given all logits
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_logits_of_a_long_text_exist_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new tokens' logits go behind the LM's, which doubled them for a moment."""
    model, processor = tiny.flamingo(family, tied=False)
    inputs = dict(tiny.batch(processor, padding_side="right"))
    with torch.no_grad():
        whole = model(**inputs).logits
        monkeypatch.setattr(loss_module, "CHUNK_BYTES", {"cpu": 4 * tiny.TOKENS})  # a position, so four here
        found = model(**inputs).logits
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    assert found.shape[:-1].numel() > 8
    calls: list[int] = []
    head: Any = model.language_model.get_output_embeddings()
    forward = head.forward

    def counted(x: Tensor) -> Tensor:
        calls.append(x.shape[:-1].numel())
        out: Tensor = forward(x)
        return out

    monkeypatch.setattr(head, "forward", counted)
    with torch.no_grad():
        model(**inputs)
    assert max(calls) == 4
    calls.clear()
    model(**inputs)  # with gradients, which chunks would keep anyway
    assert calls == [found.shape[:-1].numel()]


def capped(cap: float | None) -> tuple[FlamingoForConditionalGeneration, Any]:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 259}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma2", intermediate_size=64, num_key_value_heads=1, head_dim=16, final_logit_softcapping=cap, **sizes
    )
    return FlamingoForConditionalGeneration.from_backbones(
        tiny.vision(),
        AutoModelForCausalLM.from_config(config).eval(),
        image_size=tiny.SIZE,
        tokenizer=tiny.tokenizer(),
        cross_attention={"gate_init": 0.7, "heads": 2, "head_dim": 8},
        resampler={"depth": 1, "heads": 2, "head_dim": 8, "latents": 4},
    )


@pytest.mark.parametrize("known", [True, False])
def test_an_lm_that_changes_its_logits_keeps_its_loss(known: bool) -> None:
    """Gemma 2 caps what its head gives: said by its config, or found at the first loss."""
    model, processor = capped(0.5)
    assert model._head_is_last is False
    inputs = dict(tiny.batch(processor, padding_side="right"))
    labels = tiny.labels_of(inputs, model.config.image_token_id)
    whole = model(**inputs, labels=labels)
    if not known:
        model._head_is_last = None
    torch.testing.assert_close(model(**inputs, labels=labels, skip_logits=True).loss, whole.loss)
    assert model._head_is_last is False
    plain, processor = capped(None)
    loss = plain(**inputs, labels=labels, skip_logits=True).loss
    assert plain._head_is_last is True
    torch.testing.assert_close(loss, plain(**inputs, labels=labels).loss)
    assert not torch.equal(loss, whole.loss)


def test_nothing_is_kept_below_the_first_trainable_block() -> None:
    """With the new tokens frozen too; and the encoder keeps nothing in any case."""
    for policy, expected in (({"new_tokens": "frozen"}, 0), ({}, 1)):
        model, processor = tiny.flamingo("llama", cross_attn_layers=[2])
        model.freeze(policy)
        model.train()
        kept: list[str] = []
        where = ["outside"]

        def pack(tensor: Tensor, kept: list[str] = kept, where: list[str] = where) -> Tensor:
            kept.append(where[-1])
            return tensor

        parts: dict[str, Any] = {"encoder": model.vision_encoder}
        parts |= {f"layer {i}": layer for i, layer in enumerate(model.language_model.model.layers)}
        for name, part in parts.items():
            part.register_forward_pre_hook(lambda *_, name=name, where=where: where.append(name))
            part.register_forward_hook(lambda *_, where=where: where.append("outside"))
        inputs = dict(tiny.batch(processor, padding_side="right"))
        labels = tiny.labels_of(inputs, model.config.image_token_id)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**inputs, labels=labels)
        assert "encoder" not in kept
        assert (kept.count("layer 0") > 0) == bool(expected)
        assert (kept.count("layer 1") > 0) == bool(expected)
        assert kept.count("layer 2") > 0
        assert kept.count("layer 3") > 0
