"""Everything that decides the shape of a Flamingo, as data.

The decoder layers that get a gated block are an explicit list (`cross_attn_layers`), because the families
disagree about the first one: OpenFlamingo's interval n means layers n-1, 2n-1, ..., IDEFICS' means 0, n, 2n, ... The
interval is only a way to write the list. Modules never see these classes; they take plain arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

import flamingo.mosaic_gpt.configuration  # noqa: F401  (makes its model type known to transformers)
from flamingo.constants import OPENAI_MEAN as OPENAI_MEAN
from flamingo.constants import OPENAI_STD as OPENAI_STD
from flamingo.errors import UserError
from flamingo.layers.attention import ACTIVATIONS, NORMS
from flamingo.layers.connector import connector_class
from flamingo.options import choice, from_dict, positive

VISION_KINDS = ("open_clip", "transformers", "module")
_IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")


@dataclass(kw_only=True, slots=True)
class VisionConfig:
    """The frozen encoder, resolved so far that it can be rebuilt without the network."""

    kind: str = "open_clip"
    """Who builds it: "open_clip" and "transformers" from `arch`; "module" was built by the caller and cannot be."""
    name: str = ""
    """Where it came from, for people and manifests."""
    arch: dict[str, Any] | None = None
    """open_clip: `embed_dim`, `vision_cfg`, `quick_gelu`; transformers: the config's dictionary."""
    width: int = 0
    """Width of a patch token; may be left out where `arch` says it."""
    image_size: int = 224
    """Side of the square image it takes, in pixels."""
    mean: Sequence[float] = OPENAI_MEAN
    """Mean per channel that is subtracted, on the scale 0 to 1."""
    std: Sequence[float] = OPENAI_STD
    """Standard deviation per channel, on the scale 0 to 1."""
    resize_mode: str = "crop"
    """How an image becomes square: "squash", "crop" (the centre), "pad" or "pad_mean"."""
    class_token: bool = False
    """True: the encoder's class (and register) tokens stand in front of the patch tokens, as in IDEFICS."""
    final_norm: bool = False
    """True: tokens after the encoder's final norm, which is also what `last_hidden_state` of transformers' SigLIP, ViT
    and DINOv2 is (its CLIP's is not). No release has it; a model that was trained with open_flamingo on open_clip 2.23
    or later does."""

    def __post_init__(self) -> None:
        self.mean, self.std = tuple(self.mean), tuple(self.std)
        if not self.width and self.arch:
            plain = self.arch.get("vision_cfg", {}).get("width") or self.arch.get("hidden_size")
            self.width = int(plain or 0)  # timm encoders do not say; `backbones.load_vision` runs them once
        choice("vision_config.kind", self.kind, VISION_KINDS)
        choice("vision_config.resize_mode", self.resize_mode, ("squash", "crop", "pad", "pad_mean"))


@dataclass(kw_only=True, slots=True)
class CrossAttentionConfig:
    """The gated cross-attention block (paper, section 3.1.2); the defaults are OpenFlamingo's."""

    heads: int = 8
    """Attention heads."""
    head_dim: int = 64
    """Width of one head."""
    ff_mult: float = 4.0
    """Width of the feed-forward as a multiple of the LM's width."""
    activation: str = "gelu"
    """Of the feed-forward."""
    gate_init: float = 0.0
    """Where both gates start. 0 (the paper): the model is the frozen LM at first; open gates learn sooner."""
    gate: str = "scalar"
    """One number a gate ("scalar"), or one for each unit of the LM's width ("vector", an option of IDEFICS)."""
    norm: str = "layernorm"
    """In front of the attention and of the feed-forward: "layernorm", "rmsnorm" (IDEFICS)."""
    norm_eps: float = 1e-5
    """Added to the variance in every norm of the block."""
    qk_norm: str | None = None
    """Norm of each head's queries and keys: "rmsnorm" (IDEFICS), "layernorm"; None: none."""
    gated_ff: bool = False
    """True: the feed-forward is `down(act(gate(x)) * up(x))` (SwiGLU with "silu", IDEFICS)."""
    ff_width: int | None = None
    """Width of the feed-forward in units, instead of `ff_mult`."""
    mask_ffn_without_media: bool = False
    """True: a token that sees no image skips the feed-forward too, so a text-only row is the frozen LM's."""

    def __post_init__(self) -> None:
        choice("cross_attention_config.activation", self.activation, ACTIVATIONS)
        choice("cross_attention_config.gate", self.gate, ("scalar", "vector"))
        choice("cross_attention_config.norm", self.norm, NORMS)
        choice("cross_attention_config.qk_norm", self.qk_norm, (*NORMS, None))
        for name in ("heads", "head_dim", "ff_width"):
            positive(f"cross_attention_config.{name}", getattr(self, name))


class FlamingoVisionConfig(PreTrainedConfig):
    """A `VisionConfig` as other libraries know one: a config inside the model's config, with its own attributes.

    An encoder of transformers has its own config inside this one, the very object that the encoder holds, so that
    what is set for the whole tree (`attn_implementation`, ...) reaches it.

    Args:
        encoder_config: the encoder's transformers config, or its dictionary, or one of a dual encoder (CLIP, SigLIP).
            It is what `arch` says for the kind "transformers", which it implies.
        options: the fields of a `VisionConfig`, and those of any transformers config.

    Raises:
        UserError: an unknown key, a bad value.
    """

    model_type = "flamingo_vision"
    base_config_key = "vision_config"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig}
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "width"}

    def __init__(self, *, encoder_config: Mapping[str, Any] | PreTrainedConfig | None = None, **options: Any) -> None:
        # People and libraries hang attributes on a config, and those are saved with it: only what is written by hand, a
        # dictionary without `model_type`, may hold nothing unknown.
        saved = options.pop("model_type", None) is not None
        own = {field.name: options.pop(field.name) for field in fields(VisionConfig) if field.name in options}
        own["width"] = options.pop("hidden_size", None) or own.get("width", 0)
        if not saved and (unknown := options.keys() - _COMMON_KEYS):
            known = ", ".join(field.name for field in fields(VisionConfig))
            raise UserError(f"vision_config.{min(unknown)} is not an option; known are {known}")
        if encoder_config is None and own.get("kind") == "transformers":
            encoder_config = own.get("arch")
        if encoder_config is not None:
            encoder_config = _vision_half(encoder_config)
            own |= {"kind": "transformers", "arch": None, "name": own.get("name") or encoder_config.model_type}
            own["width"] = own["width"] or getattr(encoder_config, "hidden_size", 0)
            size = getattr(encoder_config, "image_size", None)
            own |= {"image_size": size} if isinstance(size, int) and "image_size" not in own else {}
        for name, value in asdict(VisionConfig(**own)).items():
            setattr(self, name, value)
        self.encoder_config = encoder_config
        with _implementations_kept(encoder_config):
            super().__init__(**options)

    @property
    def typed(self) -> VisionConfig:
        """The fields alone, with the encoder's config as a plain dictionary in `arch`."""
        values = {field.name: getattr(self, field.name) for field in fields(VisionConfig)}
        if self.encoder_config is not None:
            values["arch"] = self.encoder_config.to_dict()
            values["arch"].pop("transformers_version", None)
        return VisionConfig(**values)


_COMMON_KEYS = {
    *(field.name for field in fields(PreTrainedConfig)),
    *("attn_implementation", "experts_implementation", "output_attentions", "torch_dtype", "num_labels"),
    *("_attn_implementation", "_attn_implementation_internal", "_experts_implementation_internal"),
    *("name_or_path", "_name_or_path", "_output_attentions", "quantization_config"),
}
"""What a config of any model takes."""


def _vision_half(config: Mapping[str, Any] | PreTrainedConfig) -> PreTrainedConfig:
    """Return an encoder's config as an object; of a dual encoder's the image half."""
    if not isinstance(config, PreTrainedConfig):
        own = dict(config)
        if "model_type" not in own:
            raise UserError("vision_config.arch has no model_type, the name of the encoder's family in transformers")
        config = AutoConfig.for_model(own.pop("model_type"), **own)
    return getattr(config, "vision_config", config)


@contextmanager
def _implementations_kept(*configs: PreTrainedConfig | None) -> Iterator[None]:
    """Keep what these configs say of their attention where it would be set to None.

    The base class sets the whole tree, to None if there is nothing to set; but a backbone may be built already.
    """
    kept = [(c, name, value) for c in configs for name in _IMPLEMENTATIONS if (value := getattr(c, name, None))]
    yield
    for config, name, value in kept:
        if getattr(config, name) is None:
            setattr(config, name, value)


def _vision_config(given: Mapping[str, Any] | VisionConfig | PreTrainedConfig | None) -> FlamingoVisionConfig:
    """Return the sub-config that a typed config, its fields, or an encoder's own config stands for."""
    if isinstance(given, FlamingoVisionConfig):
        return given
    if isinstance(given, VisionConfig):
        return FlamingoVisionConfig(**asdict(given))
    if isinstance(given, PreTrainedConfig):
        return FlamingoVisionConfig(encoder_config=given)
    options = dict(given or {})
    if options.get("model_type", FlamingoVisionConfig.model_type) != FlamingoVisionConfig.model_type:
        return FlamingoVisionConfig(encoder_config=options)
    return FlamingoVisionConfig(**options)


class FlamingoConfig(PreTrainedConfig):
    """Configuration of `FlamingoForConditionalGeneration`.

    Args:
        vision_config: the fields of a `VisionConfig`, or the config of a vision model of transformers.
        text_config: the language model's own transformers config.
        connector: what maps encoder tokens to latents, a name of `flamingo.layers.connector.CONNECTORS`.
        resampler_config: the connector's options; for the perceiver the fields of a `ResamplerConfig`.
        cross_attention_config: the fields of a `CrossAttentionConfig`.
        cross_attn_layers: decoder layers with a gated block in front of them, counted from 0.
        cross_attn_every_n_layers: writes that list as OpenFlamingo does; not kept.
        image_token_id: id of `<image>`.
        eoc_token_id: id of `<|endofchunk|>`.
        new_token_ids: ids whose rows are in the small trainable table and not in the LM's, in that table's order.
        language_kind: "transformers" if the LM is rebuilt from `text_config`; "module" if the caller built it.
        decoder_layers_path: attribute path of the LM's list of layers, if its length does not identify it.
        media_reset_token_id: id of a token after which no image is seen until the next `<image>` (IDEFICS: the end
            of a sequence); None: an image is seen until the next one.
        attend_all_previous: a token sees the images before its own as well; no released model does.
        soft_prompts: number of vectors of each soft prompt by its name, in the order of their ids.
        freezing_policy: which parts train, as `model.freeze()` was told last; None: the paper's policy.
        kwargs: of any transformers config.

    Raises:
        UserError: an unknown key, a bad value, a layer that the LM does not have.
    """

    model_type = "flamingo"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "vision_config": FlamingoVisionConfig}

    def __init__(
        self,
        *,
        vision_config: Mapping[str, Any] | VisionConfig | PreTrainedConfig | None = None,
        text_config: Mapping[str, Any] | PreTrainedConfig | None = None,
        connector: str = "perceiver",
        resampler_config: Mapping[str, Any] | None = None,
        cross_attention_config: Mapping[str, Any] | CrossAttentionConfig | None = None,
        cross_attn_layers: list[int] | None = None,
        cross_attn_every_n_layers: int = 1,
        image_token_id: int = 0,
        eoc_token_id: int = 0,
        new_token_ids: list[int] | None = None,
        language_kind: str = "transformers",
        decoder_layers_path: str | None = None,
        media_reset_token_id: int | None = None,
        attend_all_previous: bool = False,
        freezing_policy: Mapping[str, str] | None = None,
        soft_prompts: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _vision_config(vision_config)
        self.connector = connector
        self.resampler_config = asdict(connector_options(connector, resampler_config))
        options = from_dict(CrossAttentionConfig, cross_attention_config, "cross_attention_config")
        self.cross_attention_config = asdict(options)
        if not isinstance(text_config, PreTrainedConfig):
            own = dict(text_config or {})
            text_config = AutoConfig.for_model(own.pop("model_type", "opt"), **own)
        self.text_config = text_config
        layers = num_decoder_layers(text_config)
        self.cross_attn_layers = (
            every_n_layers(layers, cross_attn_every_n_layers) if cross_attn_layers is None else list(cross_attn_layers)
        )
        if bad := [i for i in self.cross_attn_layers if not 0 <= i < layers]:
            raise UserError(f"cross_attn_layers names layer {bad[0]}, but the LM has layers 0 to {layers - 1}")
        if not self.cross_attn_layers and layers:
            raise UserError("cross_attn_layers is empty: without a gated block the LM would never see an image")
        if twice := sorted({i for i in self.cross_attn_layers if self.cross_attn_layers.count(i) > 1}):
            raise UserError(f"cross_attn_layers names layer {twice[0]} more than once; a layer has one block at most")
        self.image_token_id, self.eoc_token_id = image_token_id, eoc_token_id
        self.new_token_ids = sorted({image_token_id, eoc_token_id}) if new_token_ids is None else list(new_token_ids)
        if len(set(self.new_token_ids)) != len(self.new_token_ids):
            raise UserError(f"new_token_ids has an id twice: {self.new_token_ids}")
        choice("language_kind", language_kind, ("transformers", "module"))
        self.language_kind = language_kind
        self.decoder_layers_path = decoder_layers_path
        self.media_reset_token_id = media_reset_token_id
        self.attend_all_previous = attend_all_previous
        self.freezing_policy = None if freezing_policy is None else dict(freezing_policy)
        if soft_prompts:  # a config without is what it was before there were any: checkpoints know it by its content
            self.soft_prompts = dict(soft_prompts)
        # transformers looks for the LM's flag here.
        kwargs["tie_word_embeddings"] = bool(getattr(text_config, "tie_word_embeddings", False))
        with _implementations_kept(text_config, self.vision_config, self.vision_config.encoder_config):
            super().__init__(**kwargs)

    @property
    def vision(self) -> VisionConfig:
        """The encoder, typed."""
        return self.vision_config.typed

    @property
    def resampler(self) -> Any:
        """The connector's options, typed: a `ResamplerConfig` for the perceiver."""
        return connector_options(self.connector, self.resampler_config)

    @property
    def cross_attention(self) -> CrossAttentionConfig:
        """The gated blocks, typed."""
        return CrossAttentionConfig(**self.cross_attention_config)


def connector_options(connector: str, options: Mapping[str, Any] | None) -> Any:
    """Return a connector's options as its dataclass.

    Raises:
        UserError: an unknown connector or option, a bad value.
    """
    return from_dict(connector_class(connector).Options, options, "resampler_config")


def every_n_layers(num_layers: int, every: int) -> list[int]:
    """Return OpenFlamingo's positions for an interval: before layers every-1, 2*every-1, ...

    >>> every_n_layers(6, 2)
    [1, 3, 5]

    Raises:
        UserError: the interval is not between 1 and the number of layers.
    """
    if not 1 <= every <= num_layers:
        raise UserError(f"cross_attn_every_n_layers={every} must lie between 1 and the LM's {num_layers} layers")
    return [i for i in range(num_layers) if (i + 1) % every == 0]


def num_decoder_layers(text_config: PreTrainedConfig) -> int:
    """Return how many decoder layers an LM of this config has, whatever its family calls the number.

    Raises:
        UserError: the config does not say.
    """
    own = text_config.get_text_config(decoder=True)
    if not isinstance(number := getattr(own, "num_hidden_layers", None), int):
        raise UserError(f"{type(own).__name__} does not say how many layers the LM has; set num_hidden_layers in it")
    return number


# A tokenizer that lies beside a saved model is loaded by way of the folder's config.
AutoConfig.register(FlamingoConfig.model_type, FlamingoConfig, exist_ok=True)
