"""What a run's model is, as typed data: the table `model` of a config.

`flamingo.training.config` puts it together with the rest and checks it against that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from flamingo.config import CrossAttentionConfig, connector_options
from flamingo.configs.validate import AboveZero, AtLeast0, AtLeast1
from flamingo.convert.presets import preset
from flamingo.errors import UserError
from flamingo.layers.resampler import ResamplerConfig

Freeze = Literal["frozen", "train"]


@dataclass(kw_only=True, slots=True)
class VisionSource:
    """Where the image encoder comes from. `name` (weights) wins over `config` (shape only, random weights)."""

    name: str | None = None
    """An open_clip architecture such as `ViT-L-14`, or a folder that objective `contrastive` has written."""
    pretrained: str | None = None
    """open_clip's tag of the weights, such as `openai`; none for a folder."""
    config: dict[str, Any] | None = None
    """open_clip's own model description: `embed_dim`, `vision_cfg`, `text_cfg`."""
    resize_mode: str | None = None
    """How an image becomes square: `squash`, `crop`, `pad`, `pad_mean` (the paper); none: as the encoder's own."""
    image_size: AtLeast1 | None = None
    """Side of the images in pixels, learned positions interpolated; none: the encoder's own."""
    class_token: bool | None = None
    """Whether the encoder's class token stands before its patch tokens; none: as the encoder is known to be used."""
    final_norm: bool | None = None
    """Whether tokens are taken after the encoder's final norm; none: likewise."""
    cache: Literal["memory", "disk"] | None = None
    """Where the tokens of a frozen encoder are kept, so that it encodes each image once: `memory` of each process, or
    `disk`, a folder that processes and runs share; none: every image is encoded every time."""
    cache_dir: str = "runs/features"
    """Folder of `cache=disk`."""
    cache_gb: AboveZero = 10.0
    """Gigabytes that the cache may take; what does not fit is encoded every time."""

    def __post_init__(self) -> None:
        if self.image_size is not None and self.config is not None and "vision_cfg" in self.config:
            sized = {**self.config["vision_cfg"], "image_size": self.image_size}
            self.config = {**self.config, "vision_cfg": sized}


@dataclass(kw_only=True, slots=True)
class LanguageSource:
    """Where the causal LM comes from. `name` (weights) wins over `config` (shape only, random weights)."""

    name: str | None = None
    """A transformers name or folder, or a GGUF file."""
    config: dict[str, Any] | None = None
    """Arguments of the transformers config, with `model_type`."""
    tokenizer: str | None = None
    """A tokenizer's name or folder; none: beside `name`, or trained on the document text (objective `language`)."""
    add_bos_token: bool | None = None
    """Whether each row begins with the tokenizer's BOS; none: as the tokenizer does by itself."""
    vocab_size: Annotated[int, Field(ge=260)] = 512
    """Tokens of a tokenizer trained here."""


@dataclass(kw_only=True, slots=True)
class FreezePolicy:
    """`frozen` or `train` for each part, for the LM and the gated blocks also `lora`; the defaults are the paper's.

    Of the gated blocks objective align trains the first one's attention alone, and no new tokens.
    Objectives contrastive and language train their whole model; of this table they heed only `language: lora`.
    """

    vision: Freeze = "frozen"
    language: Literal["frozen", "train", "lora"] = "frozen"
    resampler: Freeze = "train"
    cross_attention: Literal["frozen", "train", "lora"] = "train"
    new_tokens: Freeze = "train"


@dataclass(kw_only=True, slots=True)
class LoraOptions:
    """Low-rank adapters (Hu et al. 2021) in the LM, with `model.freeze.language=lora`, and in the gated blocks, with
    `model.freeze.cross_attention=lora`."""

    rank: AtLeast1 = 16
    alpha: AboveZero = 32.0
    """The update is scaled by alpha / rank."""
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Last names of the LM's linear layers that get one, such as `q_proj`; none: all in the decoder layers."""


@dataclass(kw_only=True, slots=True)
class SoftPromptOptions:
    """Trained vectors in front of every row (Lester et al. 2021, Med-PaLM), beside whatever else trains."""

    tokens: Annotated[int, Field(ge=0, le=100)] = 0
    """Number of vectors, which start as embeddings of random tokens; 0: none, or those of `text`."""
    text: str | None = None
    """Start from the embeddings of this text, one vector a token: the model first answers as if it were told that."""

    @property
    def given(self) -> bool:
        """Whether a soft prompt is asked for."""
        return bool(self.tokens or self.text)


@dataclass(kw_only=True, slots=True)
class PreferenceOptions:
    """Objective `preference` (DPO, Rafailov et al. 2023)."""

    beta: AboveZero = 0.1
    """How strongly the model is held to the reference, which is the model without its adapters."""


@dataclass(kw_only=True, slots=True)
class AlignOptions:
    """Of objective `align`."""

    temperature: AboveZero = 0.07
    """The cosines of images and texts are divided by it."""
    name_share: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Weight of a text's name, which ends at its first comma, beside that of the keywords after it."""
    gate: float = 1.0
    """The first block's attention gate that the model gets, before its tanh; it does not train meanwhile. With a small
    one the images were not found afterwards."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Backbones, what joins them, and what trains."""

    preset: str | None = None
    """A released model of `flamingo.convert.presets`: its backbones and blocks, unless the keys below name others."""
    init: str | None = None
    """A folder that `save_pretrained`, `python -m flamingo convert` or a run has written: start from its weights."""
    vision: VisionSource = field(default_factory=VisionSource)
    language: LanguageSource = field(default_factory=LanguageSource)
    cross_attn_every_n_layers: AtLeast1 | None = None
    """A gated block before every n-th decoder layer, at OpenFlamingo's positions n-1, 2n-1, ...; none: the preset's,
    else 1."""
    cross_attn_layers: Annotated[list[AtLeast0], Field(min_length=1)] | None = None
    """The decoder layers with a gated block before them, counted from 0, instead of every n-th."""
    connector: str = "perceiver"
    """What maps encoder tokens to latents: `perceiver`, `mlp`, or a name of `flamingo.layers.connector.CONNECTORS`."""
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    """Options of the connector `perceiver`."""
    connector_options: dict[str, Any] = field(default_factory=dict)
    """Options of any other connector."""
    cross_attention: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)
    chat_template: str | None = None
    """What writes conversations: a name of `flamingo.processing.chat.CHAT_TEMPLATES` or a Jinja file; none: that of the
    model or its tokenizer. Saved with the model."""
    freeze: FreezePolicy = field(default_factory=FreezePolicy)
    lora: LoraOptions = field(default_factory=LoraOptions)
    align: AlignOptions = field(default_factory=AlignOptions)
    soft_prompt: SoftPromptOptions = field(default_factory=SoftPromptOptions)
    preference: PreferenceOptions = field(default_factory=PreferenceOptions)

    def __post_init__(self) -> None:
        if self.preset is not None:
            chosen = preset(self.preset, "openflamingo")
            if not (self.vision.name or self.vision.config):
                self.vision.name, self.vision.pretrained = chosen.vision, chosen.vision_pretrained
            if not (self.language.name or self.language.config):
                self.language.name = chosen.language
            if self.language.config is None and self.language.name == chosen.language:
                self.language.config = dict(chosen.text_config)  # the shape, for a plan without the network
            if self.cross_attn_every_n_layers is None and self.cross_attn_layers is None:
                self.cross_attn_every_n_layers = chosen.cross_attn_every_n_layers

    def connector_config(self) -> dict[str, Any]:
        """Return the options of the connector that the run has."""
        return asdict(self.resampler) if self.connector == "perceiver" else dict(self.connector_options)

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the connector, its options or the places of the gated blocks."""
        if self.cross_attn_layers is not None and self.cross_attn_every_n_layers is not None:
            yield "model.cross_attn_layers and model.cross_attn_every_n_layers both place blocks: remove one of them"
        try:
            connector_options(self.connector, self.connector_config())
        except UserError as error:
            yield f"model.{error}"
