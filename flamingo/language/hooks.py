"""The only file that knows where a causal LM keeps its layers and its embeddings.

The blocks stand beside the LM, not in it. Forward pre-hooks on the decoder layers call them, so the LM keeps
its class, its state dict and everything transformers can do with it. The rows of new tokens (`<image>`,
`<|endofchunk|>`) are a small table of their own, inserted by hooks on the input embedding and on the head, so the
frozen table needs no gradient and no optimizer state and is never resized for them.

The hooks are plain functions and hold nothing. What they do is decided by the call that runs in their thread: it
carries the modules that hung in the module tree when it began (`Wiring`). So a replaced or wrapped layer, block, table
or whole LM is what runs, a copy calls its own parts, two models may share one LM, and two threads may generate.

Letters: B batch, T text tokens, D width, V rows of the LM's table, n new tokens, N labelled positions.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from flamingo.labels import SOFT_ID
from flamingo.language.loss import chunk_of, logits_in_chunks, long_chunk_of, nll_in_chunks
from flamingo.layers.cross_attention import KeysValues
from flamingo.layers.media_mask import Segments


@dataclass(eq=False)
class Wiring:
    """The modules that a call runs, as they hung in the module tree when it began."""

    layers: dict[int, str]
    """`id` of a decoder layer (torch.compile traces no look-up by module) -> key of the gated block before it."""
    blocks: nn.ModuleDict
    new_tokens: Any
    """A `NewTokens`, or what somebody wrapped around it."""
    embedding: nn.Module
    head: nn.Module
    mapped: bool
    """Whether the LM is spread over several devices."""


@dataclass
class Call:
    """What the hooks need to know about the forward pass that is running in this thread."""

    wiring: Wiring
    media: Float[Tensor, "I L E"]
    """Latents of all images that the rows may see, those of earlier calls included."""
    segments: Segments
    cache: dict[str, KeysValues] | None
    is_new: Bool[Tensor, "B T k"]
    """Which token is which new token, or which vector of the soft prompts."""
    keep: Int[Tensor, "N"] | None = None
    """Positions in the flattened (B*T) text whose logits are wanted; None: as the LM would give them."""
    targets: Int[Tensor, "N"] | None = None
    """The target tokens at those positions; the head then gives their losses (1, N, 1) and never all the logits."""
    kept: Float[Tensor, "N D"] | None = None
    """Hidden states at those positions, on their way from the head's input to the losses."""
    nll: Float[Tensor, "N"] | None = None
    """The losses."""
    left_head: Tensor | None = None
    """What left the head with them."""
    run: Any = None
    """The language model as it was compiled, if it was."""
    ran: set[str] = field(default_factory=set)
    """Keys of the blocks that ran, "embedding" and "head"."""


class _Thread(threading.local):
    """What runs in each thread."""

    call: Call | None = None
    outside: tuple[nn.Module, Any, Tensor] | None = None
    """Table, new tokens and which token is which, of a table that is being called outside of any call."""


_thread = _Thread()


@contextmanager
def running(call: Call | None) -> Iterator[None]:
    """Make `call` the one that this thread's hooks see."""
    before, _thread.call = _thread.call, call
    try:
        yield
    finally:
        _thread.call = before


def recompute_in_call(recompute: Callable[..., Any], layer: Callable[..., Any], *args: Any) -> Any:
    """Run a layer whose hooks know of this call again when they run again, as before transformers 5.23 they do."""
    call = _thread.call

    def again(*args: Any) -> Any:
        with running(call):
            return layer(*args)

    return recompute(again, *args)


def check_ran(call: Call, lm: nn.Module, *, embedded: bool) -> None:
    """Raise UserError where the LM ran past a block, its table or its head: images or new tokens had no effect.

    `embedded`: the LM was given ids. In training an LM may skip layers by design (layer dropout).
    """
    wiring = call.wiring
    missed = [] if lm.training else [key for key in wiring.blocks if key not in call.ran]
    if missed or "head" not in call.ran or (embedded and "embedding" not in call.ran):
        what = f"the decoder layers {', '.join(missed)}" if missed else "its input embedding or its output head"
        raise UserError(
            f"{type(lm).__name__} ran, but not {what} that hang in its module tree, so images or new tokens had no "
            "effect; put replaced modules where the language model calls them"
        )


def find_decoder_layers(lm: Any, path: str | None = None) -> nn.ModuleList:
    """Return the list of decoder layers: the shallowest `nn.ModuleList` with as many entries as the LM has layers.

    Of several such lists, one of layers that transformers can recompute (every decoder's are) comes first.

    Raises:
        UserError: there is none; `path` (config: `decoder_layers_path`) names it instead.
    """
    lm = unwrapped(lm)
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
    # Looking through the whole tree takes milliseconds; where the list was found the last time takes none.
    known = _layers_paths.get(lm)
    if known is not None and isinstance(layers := _at(lm, known), nn.ModuleList) and len(layers) == wanted:
        return layers
    candidates = [
        (not all(isinstance(layer, GradientCheckpointingLayer) for layer in module), name.count("."), name, module)
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
    _layers_paths[lm] = min(candidates, key=lambda item: item[:2])[2]
    return min(candidates, key=lambda item: item[:2])[-1]


_layers_paths: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""LM -> where its decoder layers were found."""


def _at(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def unwrapped(module: Any) -> Any:
    """Return what peft, torch.compile or DistributedDataParallel wrapped; anything else as it is."""
    while not isinstance(module, PreTrainedModel):
        inner = next((module._modules[name] for name in ("_orig_mod", "module") if name in module._modules), None)
        if inner is None and hasattr(module, "get_base_model"):
            inner = module.get_base_model()
        if inner is None:
            break
        module = inner
    return module


def _arange(ids: range, device: torch.device) -> Tensor:
    return torch.arange(ids.start, ids.stop, device=device)


class SoftPrompts(nn.Module):
    """The vectors of all soft prompts of a model, (m, D), one after the other; their ids count from `SOFT_ID`.

    A vector stands in a row as a token does, by its id, so that whatever handles ids handles soft prompts: padding,
    packing, beams, caches, ranking. It has no row on the output side and is never generated.
    """

    def __init__(self, number: int, width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(number, width).normal_(std=0.02))

    def forward(self, is_soft: Float[Tensor, "B T m"]) -> Float[Tensor, "B T D"]:
        """Return each position's vector, zero where there is none."""
        return is_soft @ self.rows.to(is_soft)


class NewTokens(nn.Module):
    """The rows of the new tokens: n rows on the input side, n on the output side, one table for both if tied.

    Both sides go through `forward`, so that FSDP2 may shard the module. `soft` are the model's soft prompts, if any.
    """

    def __init__(
        self, ids: list[int], input_width: int, output_width: int, *, tied: bool, soft_prompts: int = 0
    ) -> None:
        super().__init__()
        self.ids = tuple(ids)
        self.input_rows = nn.Parameter(torch.empty(len(ids), input_width).normal_(std=0.02))
        self.output_rows = None if tied else nn.Parameter(torch.empty(len(ids), output_width).normal_(std=0.02))
        self.soft = SoftPrompts(soft_prompts, input_width) if soft_prompts else None

    def forward(
        self,
        x: Float[Tensor, "*batch D"],
        is_new: Bool[Tensor, "*batch k"] | None = None,
        scale: Float[Tensor, ""] | None = None,
    ) -> Float[Tensor, "*batch E"]:
        """Input side (`is_new` given): embeddings (B, T, D) with the new tokens' rows put in. Output side: logits.

        `scale` is what the LM's own embedding multiplies its rows with (`embedding_scale`).
        """
        if is_new is not None:
            rows = is_new[..., : len(self.ids)].to(x.dtype) @ self.input_rows.to(x)
            if self.soft is not None and is_new.shape[-1] > len(self.ids):
                rows = rows + self.soft(is_new[..., len(self.ids) :].to(x.dtype))
            rows = rows if scale is None else rows * scale.to(x)
            return torch.where(is_new.any(-1, keepdim=True), rows, x)
        rows = self.input_rows if self.output_rows is None else self.output_rows
        return x @ rows.to(x).T

    def match(self, input_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T k"]:
        """Return which token is which of the new ones, or behind them which vector of the soft prompts."""
        is_new = torch.stack([input_ids == token for token in self.ids], dim=-1)
        if self.soft is None:
            return is_new
        return torch.cat([is_new, input_ids[..., None] == _arange(self.soft_ids, input_ids.device)], -1)

    @property
    def soft_ids(self) -> range:
        """The ids of the soft prompts' vectors."""
        return range(SOFT_ID, SOFT_ID + (0 if self.soft is None else len(self.soft.rows)))

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


def new_tokens_for(lm: PreTrainedModel, ids: list[int], soft_prompts: int = 0) -> NewTokens:
    """Return a table for `ids` that fits the LM, tied where the LM is tied; ids with a gap are a UserError.

    `soft_prompts` is the number of vectors of all soft prompts.
    """
    table, head = table_shape(embedding_table(lm)), table_shape(output_head(lm))
    tied = bool(getattr(lm.config.get_text_config(decoder=True), "tie_word_embeddings", False))
    check_new_ids(ids, head[0], type(lm).__name__)
    return NewTokens(ids, table[1], head[1], tied=tied and table[1] == head[1], soft_prompts=soft_prompts)


def wire(
    owner: nn.Module,
    lm: Any,
    blocks: nn.ModuleDict,
    new_tokens: Any,
    *,
    decoder_layers_path: str | None = None,
) -> Wiring:
    """Return what hangs in the tree now, with hooks on it. Outside of a running call the LM alone stays just itself.

    The one exception: new tokens' ids given to the table itself (`model.get_input_embeddings()(ids)`, prompt tuning)
    are looked up in the `new_tokens` of `owner`, the model.

    Raises:
        UserError: the LM has no such layers, table or head, or one of the modules does not fit.
    """
    if not hasattr(lm, "get_input_embeddings") or not hasattr(lm, "config"):
        raise UserError(
            f"model.language_model is a {type(lm).__name__}; a causal LM of transformers is needed there, which may be "
            "wrapped by peft or torch.compile"
        )
    stack = find_decoder_layers(lm, decoder_layers_path)
    if out_of_range := [key for key in blocks if int(key) >= len(stack)]:
        raise UserError(
            f"{type(lm).__name__} has {len(stack)} decoder layers, but there is a gated block for layer "
            f"{out_of_range[0]}; give a language model with at least {int(out_of_range[0]) + 1}"
        )
    layers = {id(stack[int(key)]): key for key in blocks}
    if len(layers) < len(blocks):
        raise UserError(
            f"decoder layers of {type(lm).__name__} are one module several times, so its gated blocks cannot be told "
            "apart; choose cross_attn_layers that are modules of their own"
        )
    wiring = Wiring(
        layers,
        blocks,
        new_tokens,
        embedding_table(lm),
        output_head(lm),
        mapped=bool(getattr(lm, "hf_device_map", None)),
    )
    _check_fit(wiring, lm)
    for layer in (stack[int(key)] for key in blocks):
        if _before_layer not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_before_layer, with_kwargs=True)
    for module, before, after in (
        (wiring.embedding, _before_embedding, _after_embedding),
        (wiring.head, _before_head, _after_head),
    ):
        if before not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(before)
        if after not in module._forward_hooks.values():
            # In front of FSDP2's, which may be there already and which takes the gathered weights away again.
            module.register_forward_hook(after, prepend=True)
    known = _owners.get(wiring.embedding)
    if known is None or known() is not owner:
        _owners[wiring.embedding] = weakref.ref(owner)
    return wiring


_owners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
"""Input embedding -> the model that it belongs to."""


def _check_fit(wiring: Wiring, lm: Any) -> None:
    """Raise UserError where tables, blocks and new tokens have widths or ids that do not go together."""
    new_tokens, name = wiring.new_tokens, type(unwrapped(lm)).__name__
    table, head = table_shape(wiring.embedding), table_shape(wiring.head)
    rows = new_tokens.input_rows if new_tokens.output_rows is None else new_tokens.output_rows
    sides = (("input embedding", table[1], new_tokens.input_rows), ("output head", head[1], rows))
    for side, width, own in sides:
        if width != own.shape[1]:
            raise UserError(
                f"the {side} of {name} is {width} wide, but the rows of the new tokens are {own.shape[1]} wide; "
                "give a module of that width, or build a model around this one with from_backbones"
            )
    check_new_ids(list(new_tokens.ids), head[0], name)
    hidden = lm.config.get_text_config(decoder=True).hidden_size
    for key, block in wiring.blocks.items():
        width = getattr(getattr(getattr(block, "attn", None), "q_proj", None), "in_features", hidden)
        if width != hidden:
            raise UserError(
                f"{name} is {hidden} wide, but the gated block of layer {key} is {width} wide; give a module of that "
                "width, or build a model around this one with from_backbones"
            )


def check_new_ids(ids: list[int], rows: int, name: str) -> None:
    """Raise UserError unless the ids of new tokens lie inside a table of so many rows or follow it directly."""
    beyond = sorted(i for i in ids if i >= rows)
    if beyond != list(range(rows, rows + len(beyond))):
        raise UserError(
            f"new token ids {beyond} leave a gap behind the {rows} rows of {name}; they must lie inside its table or "
            "follow it directly: call resize_token_embeddings(len(tokenizer)), on the LM before a model is built "
            "around it or on the model"
        )


def place_beside(lm: PreTrainedModel, blocks: nn.ModuleDict, *, decoder_layers_path: str | None = None) -> None:
    """Put each block on the device of its decoder layer, for an LM that is spread over several devices."""
    layers = find_decoder_layers(lm, decoder_layers_path)
    for key, block in blocks.items():
        block.to(next(layers[int(key)].parameters()).device)


def _computes_in(block: Any) -> torch.dtype:
    """Return the precision that a block computes in: FSDP2's policy, where one casts what is stored in float32."""
    state = getattr(block, "_get_fsdp_state", None)
    policy = None if state is None else getattr(state(), "_mp_policy", None)
    return getattr(policy, "param_dtype", None) or _gate(block).dtype


def _gate(block: Any) -> Tensor:
    """Return the parameter that says where and in which precision a block is: its gate, if it has one."""
    gate = getattr(block, "attn_gate", None)
    return gate if isinstance(gate, Tensor) else next(p for p in block.parameters() if p.is_floating_point())


def _before_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the gated block in front of a decoder layer."""
    call = _thread.call
    key = None if call is None else call.wiring.layers.get(id(layer))
    if call is None or key is None:
        return None
    # Every causal decoder of transformers passes the hidden states first; some by name.
    x = args[0] if args else kwargs.get("hidden_states")
    block: Any = call.wiring.blocks[key]
    if not isinstance(x, Tensor) or x.shape[:2] != call.is_new.shape[:2]:
        found = f"{tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise UserError(
            f"decoder layer {key} ({type(layer).__name__}) was given {found} where hidden states of "
            f"{tuple(call.is_new.shape[:2])} rows and tokens are needed; what changes the text inside the language "
            "model (prompt tuning) goes around the whole model: get_peft_model(model, ...)"
        )
    call.ran.add(key)
    # A block may be in float32 between layers that are stored in bfloat16: it computes in its own. Under a device
    # map x still is where the layer before was. (Elsewhere a gate's device says nothing: FSDP2 may offload it.)
    mapped = call.wiring.mapped
    where = _gate(block).device if mapped else x.device
    media = call.media.to(where, _computes_in(block))
    segments = call.segments.on(where) if mapped else call.segments
    out = block(x.to(media), media, segments=segments, cache=call.cache, key=key).to(x.dtype)
    return ((out, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": out})


def _before_embedding(table: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Outside of a call: keep the ids of new tokens, which the LM's table may not have, from it."""
    if _thread.call is not None:
        return None
    _thread.outside, reference = None, _owners.get(table)
    owner: Any = None if reference is None else reference()
    if owner is None or not args or not isinstance(args[0], Tensor):
        return None
    is_new = owner.new_tokens.match(args[0])
    if not bool(is_new.any()):
        return None
    _thread.outside = (table, owner.new_tokens, is_new)
    return (args[0].masked_fill(is_new.any(-1), 0), *args[1:])


def _after_embedding(table: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Put the rows of the new tokens in."""
    call, outside = _thread.call, _thread.outside
    if call is not None and table is call.wiring.embedding:
        call.ran.add("embedding")
        new_tokens, is_new = call.wiring.new_tokens, call.is_new
    elif call is None and outside is not None and table is outside[0]:
        _thread.outside = None
        _, new_tokens, is_new = outside
    else:
        return None
    rows: Tensor = new_tokens(output, is_new, scale=embedding_scale(table))
    return rows


def _before_head(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Let only those positions into the head whose logits are wanted."""
    call = _thread.call
    if call is None or head is not call.wiring.head:
        return None
    if call.keep is None:
        if not _is_long(args[0], call.wiring):
            return None
        call.kept = args[0]
        return (args[0][:, :0], *args[1:])
    kept = args[0].flatten(0, 1).index_select(0, call.keep.to(args[0].device))
    if call.targets is not None:
        call.kept, kept = kept, kept[:0]
    return (kept[None], *args[1:])


def _after_head(head: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Add the logits of the new tokens, or make losses of the kept positions."""
    call = _thread.call
    if call is None or head is not call.wiring.head:
        return None
    call.ran.add("head")
    new_tokens = call.wiring.new_tokens
    if call.kept is None:
        return _with_new(new_tokens.ids, output, new_tokens(args[0]))
    if call.targets is None:
        kept, call.kept = call.kept, None
        rows = long_chunk_of(output.shape[-1], kept.device)
        return logits_in_chunks(partial(_logits, head, new_tokens.ids), kept, new_tokens(kept), chunk=rows)
    # All of this within the head's own call: FSDP2 has its weights gathered here, and here only.
    kept, call.kept = call.kept, None
    frozen = not any(parameter.requires_grad for parameter in head.parameters())
    call.nll = nll_in_chunks(
        partial(_logits, head, new_tokens.ids),
        kept,
        new_tokens(kept),
        call.targets.to(kept.device),
        chunk=chunk_of(output.shape[-1], kept.device),
        frozen_head=frozen,
    )
    call.left_head = call.nll[None, :, None].clone()  # FSDP2 warns of a module that returns a view
    return call.left_head


def _is_long(hidden: Tensor, wiring: Wiring) -> bool:
    """Return whether a second copy of these positions' logits, with the new tokens' behind them, is worth avoiding."""
    if torch.is_grad_enabled() or hidden.ndim != 3:
        return False
    size = table_shape(wiring.head)[0]
    chunk = long_chunk_of(size, hidden.device)
    return any(i >= size for i in wiring.new_tokens.ids) and hidden.shape[:-1].numel() > chunk


def _logits(head: nn.Module, ids: tuple[int, ...], hidden: Tensor, new_logits: Tensor) -> Tensor:
    return _with_new(ids, head.forward(hidden), new_logits)


def _with_new(ids: tuple[int, ...], output: Tensor, logits: Tensor) -> Tensor:
    """Put the new tokens' logits in their columns, and behind the LM's.

    By slices, one for ids in a row: a list of indices would have to travel to the device first.
    """
    size = output.shape[-1]
    logits = logits.to(output.dtype)
    order = sorted(range(len(ids)), key=ids.__getitem__)
    while order:
        start = ids[order[0]]
        run = [j for n, j in enumerate(order) if ids[j] == start + n and (ids[j] < size) == (start < size)]
        order = order[len(run) :]
        columns = torch.cat([logits[..., j : j + 1] for j in run], dim=-1)
        if start < size:
            output = output.slice_scatter(columns, -1, start, start + len(run))
        else:
            output = torch.cat([output, columns], dim=-1)
    return output


def embedding_table(lm: Any) -> Any:
    """Return the LM's input embedding."""
    return lm.get_input_embeddings()


def output_head(lm: Any) -> Any:
    """Return the LM's output layer (D to V); a model that has none is a UserError."""
    head = lm.get_output_embeddings()
    if head is None:
        raise UserError(f"{type(lm).__name__} has no output embedding; give a causal LM (AutoModelForCausalLM)")
    return head


def table_shape(module: Any) -> tuple[int, int]:
    """Return rows and width of an embedding or an output layer, also of a quantised one, whose weight is packed."""
    module = innermost(module)
    for rows, width in (("num_embeddings", "embedding_dim"), ("out_features", "in_features")):
        if hasattr(module, rows) and hasattr(module, width):
            return int(getattr(module, rows)), int(getattr(module, width))
    return int(module.weight.shape[0]), int(module.weight.shape[1])


def innermost(module: Any) -> Any:
    """Return the layer that an adapter of peft or torch.compile stands around; anything else as it is."""
    while isinstance(module, nn.Module):
        inner = next((module._modules[name] for name in _WRAPPED if module._modules.get(name) is not None), None)
        if inner is None:
            break
        module = inner
    return module


_WRAPPED = ("base_layer", "original_module", "_orig_mod", "module")


def table_values(module: Any) -> Float[Tensor, "V D"] | None:
    """Return the rows of an embedding or an output layer in float32; None where they are packed."""
    module = innermost(module)
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.is_quantized or not weight.is_floating_point():
        return None
    return weight.detach().float() if tuple(weight.shape) == table_shape(module) else None


def embedding_scale(table: Any) -> Tensor | None:
    """Return what an input embedding multiplies its rows with, as the Gemma family's does; None: nothing.

    The output side uses the same rows without it, so the rows of new tokens are stored unscaled as well.
    """
    scale = getattr(innermost(table), "embed_scale", None)
    return None if scale is None else torch.as_tensor(scale)
