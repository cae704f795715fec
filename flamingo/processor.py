"""Prompts of text and images to tensors, and tokens back to text.

Text is tokenised part by part and the ids of `<image>` and `<|endofchunk|>` are spliced in between, so the
tokens of a sentence do not depend on what stands beside it, and training documents and prompts agree. In chat-style
lists and in `encode_text` such a tag inside a user's text is plain text; in a prompt given as one string it is the tag.

Letters: B rows, T tokens, I images of all rows, F frames, C channels, S side in pixels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AddedToken, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase

import flamingo.config  # noqa: F401  (makes the model type of a saved folder known to transformers)
from flamingo.errors import UserError
from flamingo.vision.transform import ImageInput, ImageTransform, to_rgb

IMAGE_TOKEN, EOC_TOKEN, PAD_TOKEN = "<image>", "<|endofchunk|>", "<pad>"
PROCESSOR_FILE = "processor_config.json"

PromptParts = list[str | int]
"""A row before tokenisation: texts, and ids of special tokens."""


class FlamingoProcessor:
    """Tokenizer and image transform of one model.

    Adds `<image>`, `<|endofchunk|>` and, where there is none, a padding token to `tokenizer`, if they are not in it.
    `new_tokens` says which ones were added when a saved tokenizer has them already; the first two are the tag of a
    image and the end of a chunk, whatever the model calls that one. `around_image` is a token that the processor puts
    in front of and behind every image, once between two of them (IDEFICS).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_transform: ImageTransform,
        *,
        max_frames: int | None = None,
        new_tokens: Sequence[str] = (),
        around_image: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_transform = image_transform
        self.max_frames = max_frames
        added = list(new_tokens) or [IMAGE_TOKEN, EOC_TOKEN]
        if tokenizer.pad_token is None:
            tokenizer.pad_token = PAD_TOKEN
            added.append(PAD_TOKEN)
        self.new_tokens = added
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in added], special_tokens=True)
        self.new_token_ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in added]  # type: ignore[arg-type]
        self.image_token_id, self.eoc_token_id = self.new_token_ids[:2]
        self.pad_token_id: int = tokenizer.pad_token_id
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self.eoc_token = added[1]
        self.around_image = around_image
        self._tag_ids = {added[0]: self.image_token_id, self.eoc_token: self.eoc_token_id}
        if around_image is not None:
            self._tag_ids[around_image] = int(tokenizer.convert_tokens_to_ids(around_image))  # type: ignore[arg-type]
        self._tags = re.compile(f"({'|'.join(map(re.escape, self._tag_ids))})")

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of plain text: nothing is added, and a tag inside it is not special."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def __call__(
        self,
        images: Sequence[Any] | None = None,
        text: str | Sequence[Any] | None = None,
        *,
        padding_side: str = "left",
    ) -> BatchFeature:
        """Return `input_ids`, `attention_mask` (B, T), `pixel_values` (I, F, C, S, S) uint8 and `image_counts` (B,).

        Where the images and clips have different numbers of frames, `pixel_values` is the stack of all their frames
        (N, C, S, S), and `frame_counts` (I,) says how many each has.

        Args:
            images: for each row its images (PIL, path, bytes, array or uint8 (3, h, w) tensor); a list of frames is
                a clip. For a single row the list of its images is enough.
            text: for each row a string with `<image>` tags, or a chat-style list of `{"type": "image" | "video" |
                "text", ...}` (or of messages with such a `content`), which may carry its images itself.
            padding_side: "left" to generate, "right" to train.

        Raises:
            UserError: a row's tags and images differ in number, or an image cannot be decoded; names the row.
        """
        single = isinstance(text, str) or (
            isinstance(text, Sequence) and len(text) > 0 and isinstance(text[0], Mapping)
        )
        texts: list[Any] = [text] if single else list(text or [])
        if not texts:
            raise UserError("the processor needs text, one string or chat-style list a row")
        given = _images_by_row(images, len(texts))
        rows, images_by_row = [], []
        for index, (item, own) in enumerate(zip(texts, given, strict=True)):
            row, inline = self._parse(item, index)
            if inline and own:
                raise UserError(f"row {index} has images both in its chat-style list and in images=")
            rows.append(row)
            images_by_row.append(inline or own)
            tags = sum(part == self.image_token_id for part in row)
            if tags != len(images_by_row[-1]):
                raise UserError(f"row {index} has {tags} {IMAGE_TOKEN} tags but {len(images_by_row[-1])} images")
        data = self.pad([self._ids(row) for row in rows], padding_side)
        data |= self._pixels(images_by_row)
        data["image_counts"] = torch.tensor([len(row) for row in images_by_row])
        return BatchFeature(data)

    def pad(self, ids: Sequence[Sequence[int]], padding_side: str = "left") -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` (B, T) of rows of different lengths.

        Raises:
            UserError: a `padding_side` that is neither "left" nor "right".
        """
        if padding_side not in ("left", "right"):
            raise UserError(f"padding_side={padding_side!r} must be 'left' or 'right'")
        length = max(len(row) for row in ids)
        input_ids = torch.full((len(ids), length), self.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for out, seen, row in zip(input_ids, mask, ids, strict=True):
            span = slice(length - len(row), length) if padding_side == "left" else slice(0, len(row))
            out[span] = torch.tensor(row, dtype=torch.long)
            seen[span] = 1
        return {"input_ids": input_ids, "attention_mask": mask}

    def prompt(
        self, demos: Sequence[tuple[ImageInput | None, str]], query: tuple[ImageInput | None, str]
    ) -> tuple[list[ImageInput], str]:
        """Return the images and the text of a few-shot prompt; an image of None makes a text-only example.

        Two demonstrations "A cat." and "A dog." and the query "A" give
        `<image>A cat.<|endofchunk|><image>A dog.<|endofchunk|><image>A`, as in the training documents.

        Raises:
            UserError: a text contains a tag.
        """
        chunks = [*demos, query]
        for _, text in chunks:
            if self._tags.search(text):
                raise UserError(f"the example text {text!r} contains a tag; the builder places the tags itself")
        images = [image for image, _ in chunks if image is not None]
        return images, self.eoc_token.join(("" if p is None else IMAGE_TOKEN) + text for p, text in chunks)

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        """Return the text of each row of ids, without special tokens unless `skip_special_tokens=False`."""
        return self.tokenizer.batch_decode(ids, **{"skip_special_tokens": True, **options})

    def decode(self, ids: Any, **options: Any) -> Any:
        """Return the text of one row of ids, without special tokens unless `skip_special_tokens=False`."""
        return self.tokenizer.decode(ids, **{"skip_special_tokens": True, **options})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer and `processor_config.json`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(str(folder))
        document = {
            "max_frames": self.max_frames,
            "new_tokens": self.new_tokens,
            "around_image": self.around_image,
            "image_transform": asdict(self.image_transform),
        }
        (Path(folder) / PROCESSOR_FILE).write_text(json.dumps(document, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> FlamingoProcessor:
        """Read what `save_pretrained` wrote.

        Raises:
            UserError: the folder holds no processor.
        """
        file = Path(folder) / PROCESSOR_FILE
        if not file.is_file():
            raise UserError(f"{folder} holds no Flamingo processor: {PROCESSOR_FILE} is missing")
        document = json.loads(file.read_text())
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        transform = ImageTransform(**document.pop("image_transform"))
        return cls(tokenizer, transform, **document)

    def _parse(self, item: Any, index: int) -> tuple[PromptParts, list[Any]]:
        """Return a row's parts, and the images that a chat-style list carries."""
        if isinstance(item, str):
            return [self._tag_ids.get(part, part) for part in self._tags.split(item) if part], []
        row: PromptParts = []
        images = []
        for node in _nodes(item):
            kind = node.get("type")
            if kind == "text":
                row.append(str(node["text"]))
            elif kind in ("image", "video"):
                row += [self.eoc_token_id, self.image_token_id] if row else [self.image_token_id]
                if (image := node.get(kind)) is not None:
                    images.append(list(image) if kind == "video" else image)
            else:
                raise UserError(f"row {index} has a part of type {kind!r}; known are text, image and video")
        return row, images

    def _ids(self, row: PromptParts) -> list[int]:
        ids = [] if self.bos_token_id is None else [self.bos_token_id]
        for part in row if self.around_image is None else self._surrounded(row, self._tag_ids[self.around_image]):
            ids += [part] if isinstance(part, int) else self.encode_text(part)
        return ids

    def _surrounded(self, row: PromptParts, around: int) -> PromptParts:
        """Return the row with the id `around` on both sides of each image, where it is not there already."""
        out: PromptParts = []
        for part in row:
            if part == self.image_token_id and out[-1:] != [around]:
                out.append(around)
            if part == around and out[-1:] == [around]:
                continue
            out += [part, around] if part == self.image_token_id else [part]
        return out

    def _pixels(self, images: list[list[Any]]) -> dict[str, Tensor]:
        clips = [
            self._clip(item, f"image {j} of row {r}") for r, row in enumerate(images) for j, item in enumerate(row)
        ]
        if not clips:
            size = self.image_transform.size
            return {"pixel_values": torch.zeros(0, 1, 3, size, size, dtype=torch.uint8)}
        if len({len(clip) for clip in clips}) == 1:
            return {"pixel_values": torch.stack(clips)}
        return {"pixel_values": torch.cat(clips), "frame_counts": torch.tensor([len(clip) for clip in clips])}

    def _clip(self, item: Any, where: str) -> Tensor:
        """Return (F, C, S, S); of a clip longer than `max_frames`, frames at equal distances."""
        frames = list(item) if isinstance(item, list | tuple) else [item]
        if not frames:
            raise UserError(f"{where} is a clip without frames")
        if self.max_frames is not None and len(frames) > self.max_frames:
            sampled = torch.linspace(0, len(frames) - 1, self.max_frames).round().long().tolist()
            frames = [frames[i] for i in sampled]
        return torch.stack([self.image_transform(to_rgb(frame, where)) for frame in frames])


def _nodes(item: Any) -> list[Mapping[str, Any]]:
    """Return the parts of a chat-style row; messages (`role`, `content`) are put one after the other."""
    nodes: list[Mapping[str, Any]] = []
    for node in item:
        content: Any = node.get("content", [node])
        nodes += [{"type": "text", "text": content}] if isinstance(content, str) else content
    return nodes


def _images_by_row(images: Sequence[Any] | None, rows: int) -> list[list[Any]]:
    if images is None:
        return [[] for _ in range(rows)]
    listed = list(images)
    if rows == 1 and not (len(listed) == 1 and isinstance(listed[0], list | tuple)):
        return [listed]
    if len(listed) != rows:
        raise UserError(f"images has {len(listed)} lists for {rows} rows of text; give one list a row")
    return [[] if row is None else list(row) if isinstance(row, list | tuple) else [row] for row in listed]
