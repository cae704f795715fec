"""A dual encoder of any library behind two calls: images to vectors, texts to vectors.

open_clip's and transformers' own preprocessing and tokenizers are used as they are, so that figures equal theirs. An
encoder that was trained here (objective `contrastive`) is an open_clip folder whose texts end with the tokenizer's own
end-of-text token, which open_clip's tokenizers would not add.

Letters: N images or texts, E width of a vector, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from eval.inference.model import FlamingoResponder, load_responder
from eval.task import EncodedImage, content_hash
from flamingo.backbones import OPEN_CLIP_CONFIG
from flamingo.errors import UserError, first_line
from flamingo.hub import from_hub, hub_reachable
from flamingo.vision.image_store import weights_hash
from flamingo.vision.transform import to_rgb

DIGITS = 6
"""Decimals of a cosine that count: batches of other shapes change only what is below. Ties go to the earlier one."""
PROBES = ("two red squares", "A photo of a naïve cat, 12 o'clock; 日本")
"""Texts whose ids stand for a tokenizer in an encoder's key."""
NO_TEXTS = (
    "is a Flamingo, which has no text encoder: give the folder of its vision run, or any encoder with images and texts "
    "in one space"
)
Tokenize = Callable[[list[str], int], Tensor]
"""Texts and a length T to (N, T) ids, cut to it."""


class DualEncoder:
    """Images and texts to vectors of length 1 in one space. `scale` is the factor of the training's softmax.

    `texts_cut` counts the texts that were longer than the text encoder reads.
    """

    scale: float = 1.0

    def __init__(self, name: str, model: nn.Module, device: str, batch_size: int = 64) -> None:
        self.name, self.device, self.batch_size = name, torch.device(device), batch_size
        self.model: Any = model.eval().to(self.device)
        self.texts_cut = 0

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        """Return (N, C, S, S) as the encoder takes them."""
        raise NotImplementedError

    def _image_vectors(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def _text_vectors(self, texts: list[str]) -> Tensor:
        raise NotImplementedError

    def _ids(self, texts: list[str]) -> Tensor:
        """Return (N, T) ids of texts, for the key."""
        raise NotImplementedError

    @cached_property
    def key(self) -> str:
        """Hash of what a vector depends on: weights, preprocessing and tokenizer, the last two by what they make."""
        ramp = np.arange(48 * 64 * 3, dtype=np.uint32).reshape(48, 64, 3) * 7 % 251
        pixels = self._pixels([Image.fromarray(ramp.astype(np.uint8))])
        return content_hash(1, weights_hash(self.model), pixels.tolist(), self._ids(list(PROBES)).tolist())

    @torch.inference_mode()
    def encode_images(self, images: Sequence[EncodedImage]) -> np.ndarray:
        """Return (N, E) float32 vectors of length 1; of a clip, the direction of its frames' mean.

        Raises:
            UserError: an image cannot be decoded, or its vector has no direction.
        """
        rows: list[Tensor] = []
        for start in range(0, len(images), self.batch_size):
            rows.append(self._mean_vectors([decoded(image) for image in images[start : start + self.batch_size]]))
        return self._checked(rows, "images")

    @torch.inference_mode()
    def encode_decoded(self, images: Sequence[list[Image.Image]]) -> np.ndarray:
        """Return what `encode_images` does, of frames that are decoded already."""
        return self._checked([self._mean_vectors(images)] if images else [], "images")

    def _mean_vectors(self, images: Sequence[list[Image.Image]]) -> Tensor:
        pixels = self._pixels([frame for frames in images for frame in frames]).to(self.device)
        vectors = nn.functional.normalize(self._image_vectors(pixels).float(), dim=-1)
        parts = vectors.split([len(frames) for frames in images])
        return torch.stack([own.mean(0) if len(own) > 1 else own[0] for own in parts]).cpu()

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return (N, E) float32 vectors of length 1. Raises UserError for a vector without a direction."""
        rows: list[Tensor] = []
        for start in range(0, len(texts), self.batch_size):
            rows.append(self._text_vectors(list(texts[start : start + self.batch_size])).float().cpu())
        return self._checked(rows, "texts")

    def _checked(self, rows: list[Tensor], what: str) -> np.ndarray:
        if not rows:
            return np.zeros((0, 0), dtype=np.float32)
        vectors = torch.cat(rows)
        norms = vectors.norm(dim=-1)
        if bad := int((~norms.isfinite() | (norms == 0)).sum()):
            raise UserError(
                f"model={self.name}: {bad} of {len(vectors)} {what} got a vector that is zero or not finite; the "
                "weights are damaged, or were trained to nothing"
            )
        return nn.functional.normalize(vectors, dim=-1).numpy()


class OpenClipEncoder(DualEncoder):
    """A model of open_clip with its transform; `tokenize` cuts texts to a length."""

    def __init__(
        self,
        name: str,
        model: Any,
        transform: Callable[[Image.Image], Tensor],
        tokenize: Tokenize,
        device: str,
        **kw: Any,
    ) -> None:
        super().__init__(name, model, device, **kw)
        self._transform, self._tokenize = transform, tokenize
        self.scale = float(model.logit_scale.detach().exp())
        self._context = int(getattr(model, "context_length", 77))

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        return torch.stack([self._transform(image) for image in images])

    def _image_vectors(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels, normalize=True)

    def _ids(self, texts: list[str]) -> Tensor:
        return self._tokenize(texts, self._context)

    def _text_vectors(self, texts: list[str]) -> Tensor:
        ids = self._ids(texts)
        # A text that fits has the same ids, and padding behind them, where there is more room.
        longer = self._tokenize(texts, self._context + 1)[:, : self._context]
        self.texts_cut += int((ids != longer).any(1).sum())
        return self.model.encode_text(ids.to(self.device), normalize=True)


class TransformersEncoder(DualEncoder):
    """A model of transformers with `get_image_features` and `get_text_features`: CLIP, SigLIP and their kin."""

    def __init__(self, name: str, model: Any, images: Any, tokenizer: Any, device: str, **kw: Any) -> None:
        super().__init__(name, model, device, **kw)
        self._processor, self._tokenizer = images, tokenizer
        if (scale := getattr(model, "logit_scale", None)) is not None:
            self.scale = float(scale.detach().exp().reshape(()))
        text = getattr(model.config, "text_config", model.config)
        self._context = int(getattr(text, "max_position_embeddings", 77))
        # SigLIP was trained on padding that its text encoder sees, so it has to be there.
        self._padded = str(model.config.model_type).startswith("siglip")

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        return self._processor(images=images, return_tensors="pt")["pixel_values"]

    def _image_vectors(self, pixels: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=pixels))

    def _inputs(self, texts: list[str]) -> dict[str, Tensor]:
        options = {"padding": "max_length" if self._padded else True, "truncation": True, "max_length": self._context}
        inputs = dict(self._tokenizer(texts, return_tensors="pt", **options))
        return {"input_ids": inputs["input_ids"]} if self._padded else inputs

    def _ids(self, texts: list[str]) -> Tensor:
        return self._inputs(texts)["input_ids"]

    def _text_vectors(self, texts: list[str]) -> Tensor:
        lengths = [len(ids) for ids in self._tokenizer(texts, verbose=False)["input_ids"]]
        self.texts_cut += sum(length > self._context for length in lengths)
        inputs = {name: value.to(self.device) for name, value in self._inputs(texts).items()}
        return _pooled(self.model.get_text_features(**inputs))


class FlamingoEncoder(DualEncoder):
    """The vision encoder of a Flamingo, as RICES uses it: the mean of the patch tokens. It has no texts."""

    def __init__(self, name: str, responder: FlamingoResponder, batch_size: int = 64) -> None:
        super().__init__(name, responder.model.vision_encoder, str(responder.device), batch_size)
        self._responder = responder

    @cached_property
    def key(self) -> str:
        """Hash of weights and preprocessing."""
        config, processor = self._responder.model.config, self._responder.processor
        parts = (asdict(config.vision), asdict(processor.image_transform), processor.max_frames)
        return content_hash(1, "flamingo", weights_hash(self.model), *parts)

    def _mean_vectors(self, images: Sequence[list[Image.Image]]) -> Tensor:
        if len({len(frames) for frames in images}) > 1:  # a call of the encoder has one number of frames
            return torch.cat([self._mean_vectors([frames]) for frames in images])
        items = [frames[0] if len(frames) == 1 else frames for frames in images]
        each = [self._responder.processor(images=[[item]], text=["<image>"])["pixel_values"] for item in items]
        return self.model(torch.cat(each).to(self.device)).float().mean((1, 2)).cpu()

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Raise UserError."""
        raise UserError(f"model={self.name} {NO_TEXTS}")


def _pooled(out: Any) -> Tensor:
    """Return the vectors of `get_..._features`: a tensor up to transformers 4, an output that holds it since 5."""
    return out if isinstance(out, Tensor) else out.pooler_output


def decoded(image: EncodedImage) -> list[Image.Image]:
    """Return an image's frames. Raises UserError, naming its file, for one that cannot be decoded."""
    frames = [to_rgb(frame, image.label(at)) for at, frame in enumerate(image.frames)]
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]


def load_encoder(name: str, device: str = "cpu", batch_size: int = 64, *, texts: bool = True) -> DualEncoder:
    """Return the dual encoder that `model=` names.

    A folder (open_clip's layout, which `train.py` writes too, or transformers'), `ARCHITECTURE/TAG` of open_clip, its
    `hf-hub:NAME`, or a name of transformers; without `texts` also the folder of a Flamingo.

    Raises:
        UserError: it is none of them, cannot be loaded, or has no text encoder.
    """
    import open_clip

    folder = Path(name)
    if folder.is_dir() and (folder / OPEN_CLIP_CONFIG).is_file():
        return _from_open_clip(name, f"local-dir:{folder}", None, device, batch_size)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"model={name} holds no encoder: neither {OPEN_CLIP_CONFIG} nor config.json is there")
    architecture, _, tag = name.partition("/")
    if not folder.is_dir() and (name.startswith("hf-hub:") or architecture in open_clip.list_models()):
        if not name.startswith("hf-hub:") and not tag:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise UserError(f"model={name} has no weights: give {name}/TAG; the tags are {tags}")
        source = name if name.startswith("hf-hub:") else architecture
        return _from_open_clip(name, source, tag if source == architecture else None, device, batch_size)
    return _from_transformers(name, device, batch_size, texts)


def _from_open_clip(name: str, source: str, tag: str | None, device: str, batch_size: int) -> DualEncoder:
    import open_clip

    local = source.startswith("local-dir:")
    if not local and not hub_reachable():
        raise UserError(f"model={name} is on the network, which is not reachable; give a folder")
    try:
        model, transform = open_clip.create_model_from_pretrained(source, pretrained=tag, device="cpu")
        if local:
            _check_own_tokenizer(Path(name))
        tokenizer = open_clip.get_tokenizer(source)
    except UserError as error:
        raise UserError(f"model={name}: {error}") from None
    except Exception as error:  # damaged files raise exceptions of every kind
        raise UserError(f"model={name} cannot be loaded by open_clip: {first_line(error)}") from error

    def tokenize(texts: list[str], length: int) -> Tensor:
        ids: Tensor = tokenizer(texts, context_length=length)
        return ids

    return OpenClipEncoder(name, model, transform, tokenize, device, batch_size=batch_size)


def _check_own_tokenizer(folder: Path) -> None:
    """Raise UserError where the tokenizer that the config of a folder has ids of is not the one beside it."""
    text = json.loads((folder / OPEN_CLIP_CONFIG).read_text()).get("model_cfg", {}).get("text_cfg", {})
    if text.get("hf_tokenizer_name") != "local" or not {"eos_id", "pad_id"} <= text.keys():
        return
    from flamingo.training.objectives.build import load_tokenizer

    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"the tokenizer is missing: {OPEN_CLIP_CONFIG} names its ids, but no tokenizer_config.json")
    tokenizer = load_tokenizer(str(folder))
    ids = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    if wrong := [key for key, value in ids.items() if text[key] != value]:
        key = wrong[0]
        raise UserError(f"{key} is {text[key]} in {OPEN_CLIP_CONFIG} and {ids[key]} in the tokenizer beside it")


def _from_transformers(name: str, device: str, batch_size: int, texts: bool) -> DualEncoder:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    config = from_hub(AutoConfig, name, "encoder")
    if config.model_type == "flamingo":
        if texts:
            raise UserError(f"model={name} {NO_TEXTS}")
        return FlamingoEncoder(name, load_responder("model", name, device, "float32"), batch_size)
    model = from_hub(AutoModel, name, "encoder", dtype=torch.float32)
    if not hasattr(model, "get_text_features") or not hasattr(model, "get_image_features"):
        raise UserError(
            f"model={name} is a {config.model_type}, which does not have both an image and a text encoder in one "
            "space; give a CLIP, SigLIP or the like"
        )
    processor = from_hub(AutoImageProcessor, name, "image processor")
    tokenizer = from_hub(AutoTokenizer, name, "tokenizer")
    return TransformersEncoder(name, model, processor, tokenizer, device, batch_size=batch_size)
