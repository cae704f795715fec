"""OpenFlamingo's and Otter's checkpoints to a model of this library.

Traps:
- The releases of OpenFlamingo hold what was trained: resampler, gated blocks, and all of the LM's embedding rows,
  cut or extended to the tokenizer's length. These rows become the LM's, so that the logits have the source's columns;
  the rows of the tags are then replaced by those of the new tokens. The frozen backbones come from their own releases.
  Otter's releases hold everything.
- OpenFlamingo trains only the embedding rows of the new tokens, and never the head. So the other rows identify the LM
  that the checkpoint was trained with, even a base model and its instruction-tuned sibling.
- The encoder's tokens are those before its final norm, and OpenAI's ViT-L/14 has QuickGELU: open_clip's defaults up to
  2.22, but not since.
- OpenFlamingo adds `<|endofchunk|>` first, then `<image>`, then `<PAD>`; their ids follow from that order.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flamingo.backbones import load_language, load_vision, open_clip_config
from flamingo.config import FlamingoConfig, VisionConfig, every_n_layers, num_decoder_layers
from flamingo.convert.build import assemble, dtype_of, empty_weights, load_clean
from flamingo.convert.keys import OPENFLAMINGO, block_layers, translate
from flamingo.errors import UserError
from flamingo.hub import from_hub
from flamingo.language.hooks import embedding_table, output_head
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processor import EOC_TOKEN, IMAGE_TOKEN, FlamingoProcessor
from flamingo.vision.encoder import build_open_clip, token_width
from flamingo.vision.transform import ImageTransform

PAD_TOKEN = "<PAD>"
GPT_NEOX_HEAD = "language_model.embed_out.weight"
"""Its name when the 4B releases were saved; today's transformers has `lm_head`."""
SAME_ROWS = 0.005
"""How far, relative to their norm, the rows of old tokens may be from the LM's: rounding to 16 bits stays below."""

Converted = tuple[FlamingoForConditionalGeneration, FlamingoProcessor]


def from_openflamingo(
    state_dict: Mapping[str, Tensor],
    *,
    vision: str | Path | nn.Module,
    language: str | Path | PreTrainedModel | PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    cross_attn_every_n_layers: int | None = None,
    image_size: int | None = None,
    vision_pretrained: str | None = None,
    vision_options: Mapping[str, Any] | None = None,
    extra_tokens: Sequence[str] = (),
    final_norm: bool = False,
    allow_changed_embeddings: bool = False,
    dtype: str | torch.dtype | None = None,
) -> Converted:
    """Return (model, processor) with the source's logits.

    Args:
        state_dict: the checkpoint's tensors, as `flamingo.convert.files.read_checkpoint` gives them.
        vision: open_clip name, folder, transformers name, or built module (then `image_size`, in pixels).
        language: name or folder of the base LM, a built one (it is copied, not changed), or, where the checkpoint
            holds the LM's weights, its config.
        tokenizer: the base LM's; by default the one beside it. A copy gets the source's new tokens.
        cross_attn_every_n_layers: checked against the blocks that the checkpoint has; None: they decide.
        vision_pretrained: open_clip's tag or a file; not used where the checkpoint holds the encoder.
        vision_options: for a built module: `mean`, `std`, `resize_mode` of `VisionConfig`.
        extra_tokens: further new tokens, in the order in which the source's tokenizer got them.
        final_norm: the model was trained on the tokens after the encoder's final norm (open_clip 2.23 and later).
        allow_changed_embeddings: take rows of old tokens that are not the LM's (they were trained too).
        dtype: of the whole model; None: a built LM's, else the checkpoint's.

    Raises:
        UserError: a key or shape that is not accounted for, another LM, a tokenizer that does not fit; named.
    """
    clean = translate(state_dict, OPENFLAMINGO)
    if dtype is None and isinstance(language, PreTrainedModel):
        dtype = embedding_table(language).weight.dtype
    to = dtype_of(clean, dtype)
    encoder, described = _vision(clean, vision, vision_pretrained, image_size, vision_options or {}, to)
    described = replace(described, final_norm=final_norm)
    lm, lm_tokenizer, has_lm = _language(clean, language, tokenizer, to)
    layers = _layers(clean, lm, cross_attn_every_n_layers)
    size, heads = _resampler_shape(clean), {"heads": 8, "head_dim": 64}
    processor = _processor(lm_tokenizer, described, extra_tokens, size.get("max_frames"))
    _take_table(clean, lm, processor, has_lm=has_lm, any_rows=allow_changed_embeddings)
    parts = {"resampler_config": {**size, **heads}, "cross_attention_config": heads, "cross_attn_layers": layers}
    config = _config(described, lm, processor, parts)
    model = assemble(config, encoder, lm, processor, to)
    _add_new_rows(clean, model)
    has_vision = any(name.startswith("vision_encoder.") for name in clean)
    held = {"vision_encoder.": has_vision, "language_model.": has_lm}
    load_clean(model, clean, loaded=tuple(part for part, is_held in held.items() if not is_held))
    return model, processor


def _config(
    vision: VisionConfig, lm: PreTrainedModel, processor: FlamingoProcessor, parts: dict[str, Any]
) -> FlamingoConfig:
    return FlamingoConfig(
        vision_config=asdict(vision),
        text_config=lm.config,
        image_token_id=processor.image_token_id,
        eoc_token_id=processor.eoc_token_id,
        new_token_ids=processor.new_token_ids,
        language_kind="transformers" if type(lm.config) in AutoModelForCausalLM._model_mapping else "module",
        **parts,
    )


def _vision(
    clean: dict[str, Tensor],
    vision: str | Path | nn.Module,
    pretrained: str | None,
    image_size: int | None,
    options: Mapping[str, Any],
    dtype: torch.dtype,
) -> tuple[nn.Module, VisionConfig]:
    """Return the encoder, without weights where the checkpoint has them, and bring its keys to this version's."""
    held = [name for name in clean if name.startswith("vision_encoder.tower.")]
    if held and isinstance(vision, str) and _is_open_clip(vision):
        config = open_clip_config(vision, pretrained, image_size)
        encoder = build_open_clip(config.arch or {})
        config = replace(config, width=token_width(encoder, config.image_size))
    else:
        encoder, config = load_vision(vision, pretrained=pretrained, image_size=image_size, **options)
        if encoder is vision and (held or next(encoder.parameters()).dtype != dtype):
            encoder = copy.deepcopy(encoder)  # the caller's
    if held and any(key.startswith("vision_model.") for key in encoder.state_dict()):
        for name in held:  # transformers before 5.23 keeps CLIP's encoder under this name
            clean[name.replace("tower.", "tower.vision_model.", 1)] = clean.pop(name)
    return encoder.to(dtype), config


def _is_open_clip(name: str) -> bool:
    import open_clip

    return name in open_clip.list_models()


def _language(
    clean: Mapping[str, Tensor], language: Any, tokenizer: Any, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """Return a language model to change, its tokenizer, and whether the checkpoint holds its weights."""
    # OpenFlamingo's filter alone leaves of an LM: tables whose name has "embed", and a tied head.
    has_lm = any(".layers." in n or ".blocks." in n or ".h." in n for n in clean if n.startswith("language_model."))
    if isinstance(language, PreTrainedModel):
        lm, lm_tokenizer = load_language(language, tokenizer)
        lm = copy.deepcopy(lm)
        same = embedding_table(lm).weight.dtype == dtype  # then it may be one that cannot be cast, a quantised one
        return lm if same else lm.to(dtype), lm_tokenizer, has_lm  # type: ignore[arg-type]
    config = language
    if not isinstance(language, PreTrainedConfig):
        if not has_lm:
            lm, lm_tokenizer = load_language(language, tokenizer)
            return lm.to(dtype), lm_tokenizer, has_lm  # type: ignore[arg-type]
        config = from_hub(AutoConfig, str(language), "language model's config")
    elif not has_lm:
        raise UserError("the checkpoint holds no language model; language= must be a built one, a name or a folder")
    with empty_weights(dtype):
        lm = AutoModelForCausalLM.from_config(config)
    if isinstance(language, PreTrainedConfig) and tokenizer is None:
        raise UserError("a language model's config needs tokenizer=...")
    return lm, load_tokenizer(tokenizer if tokenizer is not None else language), has_lm


def load_tokenizer(tokenizer: PreTrainedTokenizerBase | str | Path) -> PreTrainedTokenizerBase:
    """Return a tokenizer by its name or folder; a built one as it is."""
    from transformers import AutoTokenizer

    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    return from_hub(AutoTokenizer, str(tokenizer), "tokenizer")


def _layers(clean: Mapping[str, Tensor], lm: PreTrainedModel, every: int | None) -> list[int]:
    """Return the layers that have a block in the checkpoint; they must be those of the given interval."""
    block_positions, layers = block_layers(clean), num_decoder_layers(lm.config)
    if not block_positions:
        raise UserError("the checkpoint has no gated blocks (gated_cross_attn_layer); is it a Flamingo?")
    if block_positions[-1] >= layers:
        raise UserError(
            f"the checkpoint has a block before layer {block_positions[-1]}, but the LM has {layers}; give its own LM"
        )
    if every is not None and block_positions != (expected := every_n_layers(layers, every)):
        raise UserError(
            f"the checkpoint has blocks before layers {block_positions}, but "
            f"cross_attn_every_n_layers={every} over the LM's {layers} layers means {expected}"
        )
    return block_positions


def _resampler_shape(clean: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the resampler's sizes as the tensors have them; OpenFlamingo's and Otter's heads are always 8 of 64."""
    if "resampler.latents" not in clean:
        raise UserError("the checkpoint has no resampler (perceiver.latents)")
    shape: dict[str, Any] = {"latents": len(clean["resampler.latents"])}
    shape["depth"] = len({name.split(".")[2] for name in clean if name.startswith("resampler.layers.")})
    if (frames := clean.get("resampler.frame_embeddings")) is not None:
        shape["max_frames"] = len(frames)
    return shape


def _processor(
    tokenizer: PreTrainedTokenizerBase, vision: VisionConfig, extra: Sequence[str], max_frames: int | None
) -> FlamingoProcessor:
    """Return the processor with the source's new tokens under the source's ids."""
    tokenizer = copy.deepcopy(tokenizer)
    tokens = [EOC_TOKEN, IMAGE_TOKEN, *extra]
    new = [IMAGE_TOKEN, EOC_TOKEN, *extra]
    if tokenizer.pad_token is None or tokenizer.pad_token == PAD_TOKEN:
        tokens, new = [*tokens, PAD_TOKEN], [*new, PAD_TOKEN]
    # AddedToken as the source's add_special_tokens makes them.
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in tokens], special_tokens=True)
    if PAD_TOKEN in new:
        tokenizer.pad_token = PAD_TOKEN
    transform = ImageTransform(vision.image_size, vision.mean, vision.std, mode=vision.resize_mode)
    return FlamingoProcessor(tokenizer, transform, max_frames=max_frames, new_tokens=new)


def _names(lm: PreTrainedModel) -> tuple[str, str]:
    """Return the names of the LM's embedding and head; one name where they are tied."""
    by_id = {id(p): f"language_model.{name}" for name, p in lm.named_parameters()}
    return by_id[id(embedding_table(lm).weight)], by_id[id(output_head(lm).weight)]


def _take_table(
    clean: dict[str, Tensor], lm: PreTrainedModel, processor: FlamingoProcessor, *, has_lm: bool, any_rows: bool
) -> None:
    """Give the LM as many rows as the checkpoint's table has, after checking that it is this LM's table.

    Only the new tokens' rows may differ from the LM's, unless the checkpoint has the whole LM or `any_rows` may.
    """
    tokens, new_ids = len(processor.tokenizer), processor.new_token_ids
    table, head = _names(lm)
    if GPT_NEOX_HEAD in clean and head == "language_model.lm_head.weight":
        clean[head] = clean.pop(GPT_NEOX_HEAD)
    if head not in clean and table in clean and len(clean[table]) <= len(output_head(lm).weight) and not has_lm:
        clean[head] = output_head(lm).weight.detach()[: len(clean[table])]  # frozen and not grown, so not saved
    for name in (table, head):
        if name not in clean:
            raise UserError(
                f"the checkpoint lacks lang_encoder.{name.removeprefix('language_model.')}, which holds the rows of "
                f"{IMAGE_TOKEN} and {EOC_TOKEN}; it is for another language model, or it was saved without them"
            )
    rows, width = clean[table].shape
    own = embedding_table(lm).weight
    if width != own.shape[1]:
        raise UserError(
            f"the checkpoint's embeddings are {width} wide, but {type(lm).__name__}'s {own.shape[1]}; give its own LM"
        )
    if rows < tokens:
        raise UserError(
            f"the checkpoint's embedding has {rows} rows, but the tokenizer has {tokens} tokens with the new ones; is "
            "it the right tokenizer?"
        )
    if not (has_lm or any_rows):
        _check_rows(clean[head], output_head(lm).weight, new_ids)
        _check_rows(clean[table], own, new_ids)
    if rows != len(own):
        lm.resize_token_embeddings(rows, mean_resizing=False)


def _check_rows(theirs: Tensor, ours: Tensor, new_ids: list[int]) -> None:
    old = torch.ones(min(len(theirs), len(ours)), dtype=torch.bool)
    old[[i for i in new_ids if i < len(old)]] = False
    a, b = theirs[: len(old)][old].float(), ours[: len(old)][old].detach().float()
    if (off := float((a - b).norm() / b.norm())) > SAME_ROWS:
        raise UserError(
            f"the checkpoint was trained with another language model: the rows of old tokens are {off:.1%} from this "
            f"one's (limit {SAME_ROWS:.1%}); give the right one, or allow_changed_embeddings if they were trained too"
        )


def _add_new_rows(clean: dict[str, Tensor], model: FlamingoForConditionalGeneration) -> None:
    """Put the new tokens' rows of the LM's table and head where the model looks for them."""
    table, head = _names(model.language_model)
    ids = torch.tensor(model.config.new_token_ids)
    clean["new_tokens.input_rows"] = clean[table][ids]
    if model.new_tokens.output_rows is not None:
        clean["new_tokens.output_rows"] = clean[head][ids]
