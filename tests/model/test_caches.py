"""A cache whose rows are moved, cut or copied keeps each row's images; a class of caches that cannot is refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from flamingo import UserError
from tests.model import tiny

families = pytest.mark.parametrize("family", tiny.FAMILIES)


class OwnCache(DynamicCache):
    """A user's own class, which overrides what it was made for."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for layer in self.layers:
            layer.reorder_cache(beam_idx)  # type: ignore[arg-type]


def static(model: Any) -> Cache:
    return StaticCache(config=model.config.text_config, max_cache_len=64)


CACHES: dict[str, Callable[[Any], Cache | None]] = {
    "made by the model": lambda model: None,
    "dynamic": lambda model: DynamicCache(),
    "of a config": lambda model: DynamicCache(config=model.config.text_config),
    "a user's own": lambda model: OwnCache(),
    "static": static,
}
caches = pytest.mark.parametrize("make", CACHES.values(), ids=CACHES.keys())


def three_rows(processor: Any) -> Any:
    """The same text thrice, so that only the images tell the rows apart; padded on the left by a longer fourth."""
    texts = ["<image>ab", "<image>ab", "<image>c<image>ab", "hm no image"]
    images = [[tiny.picture(0)], [tiny.picture(1)], [tiny.picture(2), tiny.picture(3)], []]
    return processor(images=images, text=texts)


def run(model: Any, inputs: Any, cache: Cache | None = None) -> Any:
    with torch.no_grad():
        return model(**inputs, past_key_values=cache, use_cache=True).past_key_values


def step(model: Any, cache: Any, mask: Tensor, **more: Any) -> Tensor:
    """The logits of one more token, the same in every row."""
    ids = torch.full((len(mask), 1), 40)
    mask = torch.cat([mask, torch.ones_like(ids)], 1)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, past_key_values=cache, **more).logits[:, -1]


MOVES: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1, 3])), [2, 0, 1, 3]),
    "reordered twice": (
        lambda cache: [cache.reorder_cache(torch.tensor([2, 0, 3, 1])) for _ in range(2)],
        [3, 2, 1, 0],
    ),
    "a row twice": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 3])), [1, 1, 3]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
    "selected": (lambda cache: cache.batch_select_indices(torch.tensor([3, 1])), [3, 1]),
    "masked": (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True, False])), [1, 2]),
}


@caches
@pytest.mark.parametrize(("move", "order"), MOVES.values(), ids=MOVES.keys())
def test_images_move_with_their_rows(make: Any, move: Any, order: list[int]) -> None:
    model, processor = tiny.flamingo("llama")
    inputs = three_rows(processor)
    mask = inputs["attention_mask"]
    wanted = step(model, run(model, inputs, make(model)), mask)[order]
    cache = run(model, inputs, make(model))
    if (
        isinstance(cache, StaticCache)
        and not hasattr(cache.layers[0], "batch_repeat_interleave")
        and order != [2, 0, 1, 3]
    ):
        return  # transformers' own cannot
    move(cache)
    torch.testing.assert_close(step(model, cache, mask[order]), wanted, rtol=0, atol=1e-4)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": lambda cache: shallow(cache),
    "file": lambda cache: through_a_file(cache),
}


def shallow(cache: Any) -> Any:
    out = copy.copy(cache)
    out.layers = [copy.copy(layer) for layer in cache.layers]
    return out


def through_a_file(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [CACHES["dynamic"], CACHES["a user's own"]], ids=["dynamic", "own"])
@pytest.mark.parametrize("clone", COPIES.values(), ids=COPIES.keys())
def test_copies_part_ways(make: Any, clone: Any) -> None:
    """What one of them sees later, the other does not: rows, new images, tags."""
    model, processor = tiny.flamingo("gpt2")
    inputs = three_rows(processor)
    mask = inputs["attention_mask"]
    plain = step(model, run(model, inputs), mask)
    cache = run(model, inputs, make(model))
    kind = type(cache)
    other = clone(cache)
    assert type(other) is kind
    assert isinstance(other, type(make(model)))
    other.reorder_cache(torch.tensor([1, 0, 2, 3]))
    again = clone(other)
    more = {
        "pixel_values": torch.stack([tiny.picture(9)] * 4)[:, None],
        "image_counts": torch.ones(4, dtype=torch.long),
    }
    tag = torch.full((4, 1), model.config.image_token_id)
    longer = torch.cat([mask, torch.ones_like(tag)], 1)
    with torch.no_grad():
        model(input_ids=tag, attention_mask=longer, past_key_values=again, **more)
    torch.testing.assert_close(step(model, other, mask), plain[[1, 0, 2, 3]], rtol=0, atol=1e-4)
    torch.testing.assert_close(step(model, cache, mask), plain, rtol=0, atol=1e-4)
    assert step(model, again, longer).shape == plain.shape


def test_two_branches_with_different_new_images() -> None:
    """They share the first images' keys and values, and each has its own of the second."""
    model, processor = tiny.flamingo("llama")
    first = processor(images=[tiny.picture(0)], text="<image>ab")
    cache = run(model, first)
    for seed in (5, 6):
        second = processor(images=[tiny.picture(seed)], text="<image>cd")
        ids = second["input_ids"][:, 1:]
        with torch.no_grad():
            found = model(input_ids=ids, pixel_values=second["pixel_values"], past_key_values=shallow(cache)).logits
            whole = processor(images=[tiny.picture(0), tiny.picture(seed)], text="<image>ab<image>cd")
            wanted = model(**whole, use_cache=False).logits[:, -ids.shape[1] :]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@families
@pytest.mark.parametrize("how", ["crop", "slice"])
def test_a_cut_cache_has_seen_the_images_of_its_text(family: str, how: str) -> None:
    """Cut in front of the second `<image>`, it goes on with another second image."""
    model, processor = tiny.flamingo(family)
    images = [tiny.picture(0), tiny.picture(1), tiny.picture(2)]
    whole = processor(images=images[:2], text="<image>ab<image>cd")
    cache = run(model, whole)
    cut = int((whole["input_ids"][0] == model.config.image_token_id).nonzero()[1])
    removed = whole["input_ids"].shape[1] - cut
    if how == "crop":
        cache.crop(-removed)
    else:
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[..., :cut, :], layer.values[..., :cut, :]
    other = processor(images=[images[0], images[2]], text="<image>ab<image>ef")
    with torch.no_grad():
        found = model(
            input_ids=other["input_ids"][:, cut:],
            pixel_values=other["pixel_values"][1:],
            image_counts=torch.tensor([1]),
            past_key_values=cache,
        ).logits
        wanted = model(**other, use_cache=False).logits[:, cut:]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@caches
def test_a_reset_cache_has_seen_nothing(make: Any) -> None:
    model, processor = tiny.flamingo("llama")
    cache = run(model, processor(images=[tiny.picture(0)], text="<image>abc"), make(model))
    cache.reset()
    again = processor(images=[tiny.picture(1)], text="<image>de")
    with torch.no_grad():
        found = model(**again, past_key_values=cache, use_cache=True).logits
        wanted = model(**again, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_cache_that_generate_returns(beams: int) -> None:
    """One row for each sequence; with its rows in another order each still sees its own images."""
    model, processor = tiny.flamingo("llama")
    inputs = three_rows(processor)
    out = model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, num_beams=beams, do_sample=False, return_dict_in_generate=True
    )
    cache = out.past_key_values
    each = cache.layers[0].keys.shape[0] // 4
    mask = torch.cat([inputs["attention_mask"], torch.ones(4, 3, dtype=torch.long)], 1).repeat_interleave(each, 0)
    order = torch.arange(4 * each).flip(0)
    wanted = step(model, copy.deepcopy(cache), mask)[order]
    cache.reorder_cache(order)
    torch.testing.assert_close(step(model, cache, mask[order]), wanted, rtol=0, atol=1e-4)
    if beams == 1:
        images = {name: inputs[name] for name in ("pixel_values", "image_counts")}
        ids = torch.cat([out.sequences[:, :-1], torch.full((4, 1), 40)], 1)
        whole = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], 1)
        with torch.no_grad():
            slow = model(input_ids=ids, attention_mask=whole, **images, use_cache=False).logits[:, -1]
        torch.testing.assert_close(wanted, slow[order], rtol=0, atol=1e-4)


def test_a_step_without_a_mask_keeps_the_padding() -> None:
    """The cache remembers it, in the order of its rows; and a mask of the new tokens only stands behind it."""
    model, processor = tiny.flamingo("llama")
    inputs = three_rows(processor)
    mask = inputs["attention_mask"]
    wanted = step(model, run(model, inputs), mask)[[3, 1]]
    for given in (None, torch.ones(2, 1, dtype=torch.long)):
        cache = run(model, inputs)
        cache.batch_select_indices(torch.tensor([3, 1]))
        with torch.no_grad():
            found = model(input_ids=torch.full((2, 1), 40), attention_mask=given, past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="attention_mask is 3 wide, but there are 1 tokens and"):
        model(input_ids=torch.full((4, 1), 40), attention_mask=torch.ones(4, 3), past_key_values=run(model, inputs))


def test_caches_that_do_not_say_what_they_saw() -> None:
    model, processor = tiny.flamingo("llama")
    inputs = three_rows(processor)
    mask = inputs["attention_mask"]
    cache = run(model, inputs)
    rebuilt = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
    with pytest.raises(UserError, match="not which images they saw"):
        step(model, rebuilt, mask)
    with pytest.raises(UserError, match="past_key_values is a tuple"):
        model.generate(**inputs, past_key_values=tuple((layer.keys, layer.values) for layer in cache.layers))
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        layer.batch_select_indices(torch.tensor([0, 1]))
    with pytest.raises(UserError, match="2 rows, but remembers the images of 4"):
        step(model, cache, mask[:2])
    cache = run(model, inputs)
    with pytest.raises(UserError, match="4 rows"):
        step(model, cache, mask[:2])
    with torch.no_grad():
        model.language_model(input_ids=torch.full((4, 1), 40), past_key_values=cache)
    with pytest.raises(UserError, match="of which this model has run"):
        step(model, cache, torch.cat([mask, mask[:, -1:]], 1))


def test_a_text_only_cache_goes_on_with_images() -> None:
    """As peft's prefixes do: tokens that saw nothing, and the images of this call."""
    model, processor = tiny.flamingo("llama")
    whole = processor(images=[tiny.picture(0)], text="ab<image>cd")
    with torch.no_grad():
        cache = model.language_model(input_ids=whole["input_ids"][:, :3], use_cache=True).past_key_values
        rest = {**whole, "input_ids": whole["input_ids"][:, 3:]}
        open_gates = model(**rest, past_key_values=cache).logits
    assert open_gates.shape[1] == whole["input_ids"].shape[1] - 3
    assert cache.get_seq_length() == whole["input_ids"].shape[1]
