"""The only file that knows where a causal LM keeps its layers and its embeddings.

The blocks stand beside the LM, not in it. Forward pre-hooks on the decoder layers call them, so the LM keeps
its class, its state dict and everything transformers can do with it. The rows of new tokens (`<image>`,
`<|endofchunk|>`) are a small table of their own, inserted by hooks on the input embedding and on the head, so the
frozen table needs no gradient and no optimizer state and is never resized.

What the hooks need of the current call is in a `CallState`, one per thread: two threads may generate with one model.

Letters: B batch, T text tokens, D width, V rows of the LM's table, n new tokens, N labelled positions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

import flamingo.mosaic_gpt.modeling  # noqa: F401  (makes its model type known to transformers)
from flamingo.config import num_decoder_layers
from flamingo.errors import UserError
from flamingo.language.loss import chunk_of, nll_in_chunks
from flamingo.layers.cross_attention import KeysValues
from flamingo.layers.media_mask import Segments


@dataclass
class Call:
    """What the hooks need to know about the forward pass that is running in this thread."""

    media: Float[Tensor, "I L E"]
    """Latents of all images that the rows may see, those of earlier calls included."""
    segments: Segments
    cache: dict[str, KeysValues] | None
    is_new: Bool[Tensor, "B T n"] | None = None
    """Which token is which new token; None where no new token occurs."""
    keep: Int[Tensor, "N"] | None = None
    """Positions in the flattened (B*T) text whose logits are wanted; None: as the LM would give them."""
    targets: Int[Tensor, "N"] | None = None
    """The target tokens at those positions; the head then gives their losses (1, N, 1) and never all the logits."""
    kept: Float[Tensor, "N D"] | None = None
    """Hidden states at those positions, on their way from the head's input to the losses."""
    nll: Float[Tensor, "N"] | None = None
    """The losses as they left the head."""


class CallState(threading.local):
    """The running call of each thread. A copy (deepcopy, pickle) starts without one."""

    call: Call | None = None

    def __reduce__(self) -> tuple[type[CallState], tuple[()]]:
        return (CallState, ())

    @contextmanager
    def running(self, call: Call | None) -> Iterator[None]:
        """Make `call` the one that this thread's hooks see."""
        before, self.call = self.call, call
        try:
            yield
        finally:
            self.call = before


def find_decoder_layers(lm: PreTrainedModel, path: str | None = None) -> nn.ModuleList:
    """Return the list of decoder layers: the shallowest `nn.ModuleList` with as many entries as the LM has layers.

    Of several such lists, one of layers that transformers can recompute (every decoder's are) comes first.

    Raises:
        UserError: there is none; `path` (config: `decoder_layers_path`) names it instead.
    """
    wanted = num_decoder_layers(lm.config)
    if path is not None:
        try:
            layers = lm.get_submodule(path)
        except AttributeError as error:
            raise UserError(f"decoder_layers_path={path!r} is not a module of {type(lm).__name__}") from error
        if not isinstance(layers, nn.ModuleList):
            raise UserError(f"decoder_layers_path={path!r} is a {type(layers).__name__}, not an nn.ModuleList")
        if len(layers) != wanted:
            raise UserError(f"decoder_layers_path={path!r} has {len(layers)} modules, but the LM has {wanted} layers")
        return layers
    candidates = [
        (not all(isinstance(layer, GradientCheckpointingLayer) for layer in module), name.count("."), module)
        for name, module in lm.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted and "vision" not in name
    ]
    if not candidates:
        lists = [
            f"{name!r} ({len(module)})" for name, module in lm.named_modules() if isinstance(module, nn.ModuleList)
        ]
        raise UserError(
            f"the decoder layers of {type(lm).__name__} were not found: it has no nn.ModuleList of {wanted} modules, "
            f"its config's number of layers; its lists are {', '.join(lists) or 'none'}; name the right one with "
            "decoder_layers_path='...'"
        )
    return min(candidates, key=lambda item: item[:2])[-1]


class NewTokens(nn.Module):
    """The rows of the new tokens: n rows on the input side, n on the output side, one table for both if tied.

    Both sides go through `forward`, so that FSDP2 may shard the module.
    """

    def __init__(self, ids: list[int], input_width: int, output_width: int, *, tied: bool) -> None:
        super().__init__()
        self.ids = tuple(ids)
        self.input_rows = nn.Parameter(torch.empty(len(ids), input_width).normal_(std=0.02))
        self.output_rows = None if tied else nn.Parameter(torch.empty(len(ids), output_width).normal_(std=0.02))

    def forward(
        self,
        x: Float[Tensor, "*batch D"],
        is_new: Bool[Tensor, "*batch n"] | None = None,
        scale: Float[Tensor, ""] | None = None,
    ) -> Float[Tensor, "*batch E"]:
        """Input side (`is_new` given): embeddings (B, T, D) with the new tokens' rows put in. Output side: logits.

        `scale` is what the LM's own embedding multiplies its rows with (`embedding_scale`).
        """
        if is_new is not None:
            rows = is_new.to(x.dtype) @ self.input_rows.to(x)
            rows = rows if scale is None else rows * scale.to(x)
            return torch.where(is_new.any(-1, keepdim=True), rows, x)
        rows = self.input_rows if self.output_rows is None else self.output_rows
        return x @ rows.to(x).T

    def match(self, input_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T n"]:
        """Return which token is which of the new ones."""
        return torch.stack([input_ids == token for token in self.ids], dim=-1)

    @torch.no_grad()
    def init_from(self, lm: PreTrainedModel, *, seed: int) -> None:
        """Start every row at the mean of the LM's rows plus noise of a tenth of their deviation.

        Where the LM's table is packed (8 or 4 bits) and cannot be read, the rows keep their random start.
        """
        generator = torch.Generator().manual_seed(seed)
        for rows, module in ((self.input_rows, embedding_table(lm)), (self.output_rows, output_head(lm))):
            if rows is not None:
                noise = torch.randn(rows.shape, generator=generator)
                if (values := table_values(module)) is not None:
                    rows.copy_(values.mean(0) + 0.1 * values.std() * noise.to(values.device))


def new_tokens_for(lm: PreTrainedModel, ids: list[int]) -> NewTokens:
    """Return a table for `ids` that fits the LM, tied where the LM is tied; ids with a gap are a UserError."""
    table, head = table_shape(embedding_table(lm)), table_shape(output_head(lm))
    tied = bool(getattr(lm.config.get_text_config(decoder=True), "tie_word_embeddings", False))
    beyond = sorted(i for i in ids if i >= head[0])
    if beyond != list(range(head[0], head[0] + len(beyond))):
        raise UserError(
            f"new token ids {beyond} leave a gap behind the LM's {head[0]} rows; they must lie inside its table or "
            "follow it directly"
        )
    return NewTokens(ids, table[1], head[1], tied=tied and table[1] == head[1])


def attach(
    lm: PreTrainedModel,
    blocks: nn.ModuleDict,
    new_tokens: NewTokens,
    state: CallState,
    *,
    decoder_layers_path: str | None = None,
) -> None:
    """Register the hooks. Outside of a running call they do nothing, so the LM alone is just itself."""
    layers = find_decoder_layers(lm, decoder_layers_path)
    for key in blocks:
        hook = _BlockHook(blocks, key, state, mapped=bool(getattr(lm, "hf_device_map", None)))
        layers[int(key)].register_forward_pre_hook(hook, with_kwargs=True)
    embedding_table(lm).register_forward_hook(_EmbeddingHook(new_tokens, state))
    head = output_head(lm)
    head.register_forward_pre_hook(_KeepHook(state))
    head.register_forward_hook(_HeadHook(new_tokens, state))


def place_beside(lm: PreTrainedModel, blocks: nn.ModuleDict, *, decoder_layers_path: str | None = None) -> None:
    """Put each block on the device of its decoder layer, for an LM that is spread over several devices."""
    layers = find_decoder_layers(lm, decoder_layers_path)
    for key, block in blocks.items():
        block.to(next(layers[int(key)].parameters()).device)


def _computes_in(block: Any) -> torch.dtype:
    """Return the precision that a block computes in: FSDP2's policy, where one casts what is stored in float32."""
    state = getattr(block, "_get_fsdp_state", None)
    policy = None if state is None else getattr(state(), "_mp_policy", None)
    return getattr(policy, "param_dtype", None) or block.attn_gate.dtype


def _segments_on(segments: Segments, device: torch.device) -> Segments:
    moved: dict[str, Any] = {
        name: value.to(device) for name, value in vars(segments).items() if isinstance(value, Tensor)
    }
    return replace(segments, **moved)


# The hooks are small objects and not closures, so that `copy.deepcopy(model)` copies what they point to as well: the
# copy's layers call the copy's blocks.
@dataclass(eq=False)
class _BlockHook:
    blocks: nn.ModuleDict
    key: str
    state: CallState
    mapped: bool

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.state.call
        if call is None:
            return None
        # Every causal decoder of transformers passes the hidden states first; some by name.
        x = args[0] if args else kwargs["hidden_states"]
        block: Any = self.blocks[self.key]
        # A block may be in float32 between layers that are stored in bfloat16: it computes in its own. Under a device
        # map x still is where the layer before was. (Elsewhere a gate's device says nothing: FSDP2 may offload it.)
        where = block.attn_gate.device if self.mapped else x.device
        media = call.media.to(where, _computes_in(block))
        segments = _segments_on(call.segments, where) if self.mapped else call.segments
        out = block(x.to(media), media, segments=segments, cache=call.cache, key=self.key).to(x.dtype)
        return ((out, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": out})


@dataclass(eq=False)
class _EmbeddingHook:
    new_tokens: NewTokens
    state: CallState

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        call = self.state.call
        if call is None or call.is_new is None:
            return None
        return self.new_tokens(output, call.is_new, scale=embedding_scale(module))


@dataclass(eq=False)
class _KeepHook:
    state: CallState

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        call = self.state.call
        if call is None or call.keep is None:
            return None
        kept = args[0].flatten(0, 1).index_select(0, call.keep.to(args[0].device))
        if call.targets is not None:
            call.kept, kept = kept, kept[:0]
        return (kept[None], *args[1:])


@dataclass(eq=False)
class _HeadHook:
    new_tokens: NewTokens
    state: CallState

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        call = self.state.call
        if call is None:
            return None
        if call.targets is None or call.kept is None:
            return self._with_new(output, self.new_tokens(args[0]))
        # All of this within the head's own call: FSDP2 has its weights gathered here, and here only.
        kept, call.kept = call.kept, None
        frozen = not any(parameter.requires_grad for parameter in module.parameters())
        call.nll = nll_in_chunks(
            partial(self._logits, module),
            kept,
            self.new_tokens(kept),
            call.targets.to(kept.device),
            chunk=chunk_of(output.shape[-1], kept.device),
            frozen_head=frozen,
        )
        return call.nll[None, :, None].clone()  # FSDP2 warns of a module that returns a view

    def _logits(self, head: nn.Module, hidden: Tensor, new_logits: Tensor) -> Tensor:
        return self._with_new(head.forward(hidden), new_logits)

    def _with_new(self, output: Tensor, logits: Tensor) -> Tensor:
        """Put the new tokens' logits in their columns, and behind the LM's."""
        size = output.shape[-1]
        order = sorted(range(len(self.new_tokens.ids)), key=self.new_tokens.ids.__getitem__)
        inside = [j for j in order if self.new_tokens.ids[j] < size]
        if inside:
            columns = torch.tensor([self.new_tokens.ids[j] for j in inside], device=output.device)
            output = output.index_copy(-1, columns, logits[..., inside].to(output.dtype))
        beyond = order[len(inside) :]
        if not beyond:
            return output
        return torch.cat([output, logits[..., beyond].to(output.dtype)], dim=-1)


def embedding_table(lm: PreTrainedModel) -> Any:
    """Return the LM's input embedding."""
    return lm.get_input_embeddings()


def output_head(lm: PreTrainedModel) -> Any:
    """Return the LM's output layer (D to V); a model that has none is a UserError."""
    head = lm.get_output_embeddings()
    if head is None:
        raise UserError(f"{type(lm).__name__} has no output embedding; give a causal LM (AutoModelForCausalLM)")
    return head


def table_shape(module: Any) -> tuple[int, int]:
    """Return rows and width of an embedding or an output layer, also of a quantised one, whose weight is packed."""
    for rows, width in (("num_embeddings", "embedding_dim"), ("out_features", "in_features")):
        if hasattr(module, rows) and hasattr(module, width):
            return int(getattr(module, rows)), int(getattr(module, width))
    return int(module.weight.shape[0]), int(module.weight.shape[1])


def table_values(module: Any) -> Float[Tensor, "V D"] | None:
    """Return the rows of an embedding or an output layer in float32; None where they are packed."""
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.is_quantized or not weight.is_floating_point():
        return None
    return weight.detach().float() if tuple(weight.shape) == table_shape(module) else None


def embedding_scale(table: Any) -> Tensor | None:
    """Return what an input embedding multiplies its rows with, as the Gemma family's does; None: nothing.

    The output side uses the same rows without it, so the rows of new tokens are stored unscaled as well.
    """
    scale = getattr(table, "embed_scale", None)
    return None if scale is None else torch.as_tensor(scale)
