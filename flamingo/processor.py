"""Prompts of text and images to tensors, and tokens back to text: a transformers processor.

Notable: text is tokenised piece by piece and the ids of `<image>` and `<|endofchunk|>` are spliced in between, so the
tokens of a sentence do not depend on what stands beside it, and training documents and prompts agree. A prompt given
as one string is trusted: special tokens in it are special. What stands in chat-style lists and in `encode_text` is a
user's: it cannot forge a tag or a turn (`processing/rows.py`). The result is tensors unless `return_tensors="np"`.

Letters: B rows, T tokens, I images of all rows, F frames, C channels, S side in pixels.
"""

# No `from __future__ import annotations`: transformers reads the types of the options while it runs.
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AddedToken,
    AutoImageProcessor,
    AutoProcessor,
    AutoVideoProcessor,
    BatchFeature,
    PreTrainedTokenizerBase,
)
from transformers.processing_utils import ProcessingKwargs, TextKwargs

from flamingo.config import FlamingoConfig
from flamingo.errors import UserError
from flamingo.hub import loaded, push_folder
from flamingo.processing.begin import start_ids
from flamingo.processing.conversation import is_chat, is_message, media_of, parts_of, source_of
from flamingo.processing.image_processor import FlamingoImageProcessor, FlamingoImagesKwargs, as_asked
from flamingo.processing.media import by_row, looks_like_text, row_media
from flamingo.processing.rows import PromptTokenizer, Row, Tag, Text
from flamingo.processing.templated import TemplatedProcessor
from flamingo.processing.video_processor import FlamingoVideoProcessor, FlamingoVideosKwargs, stacked
from flamingo.vision.transform import ImageInput, ImageTransform

IMAGE_TOKEN, EOC_TOKEN, PAD_TOKEN = "<image>", "<|endofchunk|>", "<pad>"
PROCESSOR_FILE = "processor_config.json"
FINDER_FILE = "flamingo_for_auto_processor.py"
"""Beside a saved processor. Without it AutoProcessor gives who forgot `import flamingo` the bare tokenizer, silently;
with it, it asks for `trust_remote_code`, and the file brings our class or says what to install."""
FINDER = '''"""AutoProcessor finds the processor of this folder after `import flamingo` (pip install flamingo-vlm)."""

try:
    from flamingo import FlamingoProcessor
except ImportError as error:
    raise ImportError("this folder is a Flamingo: pip install flamingo-vlm, then import flamingo") from error
'''
HONOURED = {
    "add_special_tokens", "padding", "padding_side", "truncation", "max_length", "pad_to_multiple_of",
    "split_special_tokens", "return_attention_mask", "return_tensors", "sanitize_control_tokens",
    "verbose", "return_mm_token_type_ids", "return_offsets_mapping", "soft_prompt",
}  # fmt: skip
"""Options of text that are followed; others of transformers' are refused where they ask for something."""


class FlamingoTextKwargs(TextKwargs, total=False):
    """Options of text in a call. `split_special_tokens`: the text is a user's, and nothing in it is a special token.

    `soft_prompt`: name of the soft prompt of all rows, or one for each row, "" for none; "default" if there is one.
    """

    split_special_tokens: bool
    soft_prompt: str | list[str]


class FlamingoProcessorKwargs(ProcessingKwargs, total=False):
    """Options of a call."""

    text_kwargs: FlamingoTextKwargs  # type: ignore[misc]
    images_kwargs: FlamingoImagesKwargs  # type: ignore[misc]
    videos_kwargs: FlamingoVideosKwargs  # type: ignore[misc]


class FlamingoProcessor(TemplatedProcessor):
    """Tokenizer, image processor and video processor of one model.

    Adds `<image>`, `<|endofchunk|>` and, where there is none, a padding token to `tokenizer`, if they are not in it.
    `new_tokens` says which ones were added when a saved tokenizer has them already; the first two are the tag of an
    image and the end of a chunk, whatever the model calls that one. `around_image` is a token that the processor puts
    in front of and behind every image, once between two of them (IDEFICS). `image_processor` may be an
    `ImageTransform`; `video_processor` then does the same with the frames of clips, of which it keeps `max_frames`.
    `chat_template` is a template or one of the names in `CHAT_TEMPLATES`; the tokenizer's own where none is given.
    `soft_prompts` are the ids of each soft prompt of the model (`flamingo/soft_prompts.py`).
    `tokenizer.padding_side` becomes "left".
    """

    valid_processor_kwargs = FlamingoProcessorKwargs  # type: ignore[assignment]
    push_to_hub = push_folder

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: FlamingoImageProcessor | ImageTransform,
        video_processor: FlamingoVideoProcessor | None = None,
        chat_template: str | dict[str, str] | None = None,
        max_frames: int | None = None,
        new_tokens: Sequence[str] = (),
        around_image: str | None = None,
        soft_prompts: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        if isinstance(image_processor, ImageTransform):
            image_processor = FlamingoImageProcessor.of_transform(image_processor)
        if not isinstance(image_processor, FlamingoImageProcessor):
            raise TypeError(f"image_processor is a {type(image_processor).__name__}, not a FlamingoImageProcessor")
        if video_processor is None:
            video_processor = FlamingoVideoProcessor.of_transform(image_processor.transform)
        if max_frames is not None:
            video_processor.max_frames = max_frames
        if chat_template is None:
            chat_template = tokenizer.chat_template
        super().__init__(tokenizer, image_processor, video_processor, chat_template=chat_template)
        tokenizer.padding_side = "left"
        added = list(new_tokens) or [IMAGE_TOKEN, EOC_TOKEN]
        known = tokenizer.added_tokens_encoder
        if not new_tokens and tokenizer.pad_token == PAD_TOKEN and known.get(PAD_TOKEN, -1) > known.get(IMAGE_TOKEN, 0):
            added.append(PAD_TOKEN)  # a saved tokenizer, to which it was added behind the others
        if tokenizer.pad_token is None:
            tokenizer.pad_token = PAD_TOKEN
            added.append(PAD_TOKEN)
        self.new_tokens = added
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in added], special_tokens=True)
        self.new_token_ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in added]  # type: ignore[arg-type]
        self.image_token, self.eoc_token = added[:2]
        if not new_tokens:
            self._check_taken()
        self.video_token = "<video>"
        self.image_token_id, self.eoc_token_id = self.new_token_ids[:2]
        self.video_token_id = self.image_token_id
        self.pad_token_id: int = tokenizer.pad_token_id
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self.around_image = around_image
        self.soft_prompts = {name: list(ids) for name, ids in (soft_prompts or {}).items()}
        self.auto_map = {"AutoProcessor": f"{FINDER_FILE.removesuffix('.py')}.FlamingoProcessor"}

    def _check_taken(self) -> None:
        """Raise UserError where a token of ours is in the tokenizer already and means something there."""
        special = self.tokenizer.special_tokens_map
        for token, number in zip((self.image_token, self.eoc_token), self.new_token_ids, strict=False):
            if roles := [role for role in ("bos_token", "eos_token", "unk_token") if special.get(role) == token]:
                raise UserError(
                    f"the tokenizer's {roles[0]} is {token}, which is the model's own here and takes over its row; "
                    f"give the tokenizer another {roles[0]}"
                )
            if number in self.encode_text(token):
                raise UserError(
                    f"the tokenizer reads the text {token!r} as its own token {number}, so that text could not be told "
                    "from the model's tag; take that word out of its vocabulary"
                )

    @property
    def start_ids(self) -> list[int]:
        """What each row begins with: what the LM's own tokenizer puts in front of a text, then the soft prompt."""
        return [*start_ids(self.tokenizer), *self.soft_prompts.get("default", ())]

    @property
    def bos_token_id(self) -> int | None:
        """The token that each row begins with; None where the LM's tokenizer adds none, even if it has one."""
        return next(iter(start_ids(self.tokenizer)), None)

    @property
    def image_transform(self) -> ImageTransform:
        """What makes an image square, for training and evaluation as well."""
        transform: ImageTransform = self.image_processor.transform
        return transform

    @image_transform.setter
    def image_transform(self, transform: ImageTransform) -> None:
        self.image_processor = FlamingoImageProcessor.of_transform(transform)
        self.video_processor = FlamingoVideoProcessor.of_transform(transform, max_frames=self.max_frames)

    @property
    def max_frames(self) -> int | None:
        """The most frames that are kept of a clip."""
        frames: int | None = self.video_processor.max_frames
        return frames

    @max_frames.setter
    def max_frames(self, frames: int | None) -> None:
        self.video_processor.max_frames = frames

    @property
    def model_input_names(self) -> list[str]:
        """The names of what a call may return; `frame_counts` only where clips differ in length."""
        return ["input_ids", "attention_mask", "pixel_values", "image_counts", "frame_counts"]

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of plain text: nothing is added, and a tag inside it is not special."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """Return `input_ids`, `attention_mask` (B, T), `pixel_values` (I, F, C, S, S) uint8 and `image_counts` (B,).

        Where the images and clips have different numbers of frames, `pixel_values` is the stack of all their frames
        (N, C, S, S), and `frame_counts` (I,) says how many each has.

        Args:
            images: for each row its images (PIL, path, URL, bytes, array or uint8 (3, h, w) tensor); a list of frames
                is a clip. For a single row the list of its images, or one image, is enough; a flat list is dealt out
                to the rows' tags in order.
            text: for each row a string with `<image>` tags; or a list of parts `{"type": "image" | "video" | "text",
                ...}`, which may carry its images itself (`image`, `path`, `url`, `base64`); or messages with roles,
                which go through the chat template, so that the model answers next or goes on with its last message.
            videos: like `images`: clips as files, URLs, arrays (F, h, w, 3) or lists of frames. Where a row has both,
                `<video>` in its text stands for the next clip and `<image>` for the next image.
            kwargs: as for other processors. `padding_side`: "left" (the tokenizer's, to generate) or "right" (to
                train). `split_special_tokens=True`: the text is a user's, and nothing in it is a special token.
                `truncation=True`: of a row longer than `max_length` whole examples go from the left, with their
                images; then text is cut on the tokenizer's `truncation_side`, but never an image's tag.

        Raises:
            UserError: a row's tags and images differ in number, an image cannot be decoded (names the row), or an
                option that cannot be followed.
        """
        if looks_like_text(images, self.image_token) and not looks_like_text(text, self.image_token):
            images, text = text, images
        options = self._options(kwargs)
        texts = [text] if isinstance(text, str) or is_chat(text) else list([] if text is None else text)
        if not texts:
            raise UserError(
                "the processor needs text, one string or chat-style list a row; for pixels alone there are "
                "processor.image_processor and processor.video_processor"
            )
        text_options = options["text_kwargs"]
        rows, inline = self._rows(texts, text_options)
        tags = [len(row.tags) for row in rows]
        given_images, given_videos = by_row(images, tags, "images"), by_row(videos, tags, "videos")
        media = [
            row_media(f"row {i}", rows[i].tags, inline[i], given_images[i], given_videos[i]) for i in range(len(rows))
        ]
        self._truncate(rows, media, text_options)
        data = self._padded([row.ids for row in rows], text_options)
        data |= self._pixels(media, options)
        data["image_counts"] = torch.tensor([len(row) for row in media])
        if text_options.get("return_mm_token_type_ids"):
            data["mm_token_type_ids"] = (data["input_ids"] == self.image_token_id).long()
        if text_options.get("return_offsets_mapping"):
            out = as_asked(data, None)
            out["offset_mapping"] = self._spans(rows, data["attention_mask"])
            return out
        return as_asked(data, text_options.get("return_tensors"))

    def _options(self, given: Any) -> dict[str, Any]:
        """Return the options of a call by modality.

        Raises:
            UserError: an option that is unknown, or that asks for what cannot be had.
        """
        nested = ("text_kwargs", "images_kwargs", "videos_kwargs")
        known = set().union(*(self.valid_processor_kwargs.__annotations__[name].__annotations__ for name in nested))
        known |= {*nested, "common_kwargs", "return_mm_token_type_ids", "return_text_replacement_offsets"}
        for name, value in given.items():
            if name not in known and value is not None:
                raise UserError(f"the processor has no option {name!r}")
        given = {name: value for name, value in given.items() if name in known}
        options = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **given)
        for name, value in options["text_kwargs"].items():
            if name not in HONOURED and value:
                raise UserError(f"{name}={value!r} cannot be followed: the processor makes the rows of a Flamingo only")
        return options

    def _rows(self, texts: list[Any], options: dict[str, Any]) -> tuple[list[Row], list[list[tuple[str, Any]]]]:
        """Return each row's tokens, and the images and clips that it carries itself."""
        prompts, own = self._prompts, start_ids(self.tokenizer)
        start = [] if options.get("add_special_tokens") is False else own
        rows, inline = [], []
        for index, item in enumerate(texts):
            pieces, carried = self._parse(prompts, item, f"row {index}", bool(options.get("split_special_tokens")))
            row = prompts.row(pieces, start, spans=bool(options.get("return_offsets_mapping")))
            if not row.ids:
                if self.tokenizer.bos_token_id is None:
                    raise UserError(f"row {index} is empty, and the tokenizer has no token to begin with; give text")
                row.ids = [self.tokenizer.bos_token_id]  # as transformers' generate begins where there is no prompt
            row.put(len(start), own, self._soft_prompt(options, index, len(texts)))
            rows.append(row)
            inline.append(carried)
        return rows, inline

    def _soft_prompt(self, options: dict[str, Any], index: int, rows: int) -> list[int]:
        """Return the ids of a row's soft prompt.

        Raises:
            UserError: names for another number of rows, or a name that the model does not know.
        """
        asked = options.get("soft_prompt")
        if asked is None:
            return self.soft_prompts.get("default", [])
        names = [asked] * rows if isinstance(asked, str) else list(asked)
        if len(names) != rows:
            raise UserError(f"soft_prompt names {len(names)} soft prompts for {rows} rows; give one, or one for each")
        if names[index] and names[index] not in self.soft_prompts:
            known = ", ".join(self.soft_prompts) or "none"
            raise UserError(f"row {index}: the model has no soft prompt {names[index]!r}; it has {known}")
        return self.soft_prompts.get(names[index], [])

    def _parse(
        self, prompts: PromptTokenizer, item: Any, where: str, plain: bool
    ) -> tuple[list[Text | Tag], list[tuple[str, Any]]]:
        """Return a row's texts and tags, and the images and clips that a chat-style list carries."""
        if isinstance(item, str):
            return prompts.pieces(item, plain=plain), []
        if not isinstance(item, list | tuple):
            raise UserError(f"{where} of the text is a {type(item).__name__}; give a string or a chat-style list")
        if item and is_message(item[0]):
            messages = self._messages(item)
            goes_on = messages[-1]["role"] == "assistant"
            flags = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
            prompt, _ = self._rendered(messages, where, **flags)
            return prompts.pieces(prompt), media_of(messages, where)[0]
        pieces: list[Text | Tag] = []
        media: list[tuple[str, Any]] = []
        for part in parts_of(item, where):
            if part["type"] == "text":
                pieces += prompts.pieces(part["text"], plain=not part.get("special_tokens"))
                continue
            end = self.eoc_token if pieces else ""
            pieces += prompts.pieces(f"{end}{self.image_token if part['type'] == 'image' else self.video_token}")
            if (source := source_of(part)) is not None:
                media.append((part["type"], source))
        return pieces, media

    def _truncate(self, rows: list[Row], media: list[list[Any]], options: dict[str, Any]) -> None:
        """Cut the rows in place, and take the images of what is gone."""
        if options.get("truncation") in (None, False, "do_not_truncate"):
            return
        limit = options.get("max_length") or self.tokenizer.model_max_length
        for index, row in enumerate(rows):
            if len(row.ids) > limit:
                if options.get("return_offsets_mapping"):
                    raise UserError("a row is longer than max_length, and offsets of a truncated row are not kept")
                rows[index], lost = self._prompts.truncated(row, limit, f"row {index}")
                media[index] = media[index][lost:]

    def _padded(self, ids: list[list[int]], options: dict[str, Any]) -> dict[str, Tensor]:
        padding = getattr(options.get("padding"), "value", options.get("padding"))
        if padding in (False, "do_not_pad") and len({len(row) for row in ids}) > 1:
            raise UserError("the rows differ in length, and tensors of them need padding; leave padding=True")
        length = max(map(len, ids))
        if padding == "max_length":
            length = max(length, options.get("max_length") or length)
        multiple = options.get("pad_to_multiple_of") or 1
        data = self.pad(ids, options.get("padding_side"), length=-(-length // multiple) * multiple)
        if options.get("return_attention_mask") is False:
            del data["attention_mask"]
        return data

    def pad(
        self, ids: Sequence[Sequence[int]], padding_side: str | None = None, length: int | None = None
    ) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` (B, T) of rows of different lengths, T at least `length`.

        Raises:
            UserError: a `padding_side` that is neither "left" nor "right".
        """
        padding_side = padding_side or self.tokenizer.padding_side
        if padding_side not in ("left", "right"):
            raise UserError(f"padding_side={padding_side!r} must be 'left' or 'right'")
        length = max(length or 0, *(len(row) for row in ids))
        input_ids = torch.full((len(ids), length), self.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for out, seen, row in zip(input_ids, mask, ids, strict=True):
            span = slice(length - len(row), length) if padding_side == "left" else slice(0, len(row))
            out[span] = torch.tensor(row, dtype=torch.long)
            seen[span] = 1
        return {"input_ids": input_ids, "attention_mask": mask}

    def _pixels(self, media: list[list[tuple[str, Any]]], options: dict[str, Any]) -> dict[str, Tensor]:
        images = self.image_processor.with_options(options["images_kwargs"])
        videos = self.video_processor.with_options(options["videos_kwargs"])
        clips = []
        for index, row in enumerate(media):
            for place, (kind, item) in enumerate(row):
                where = f"image {place} of row {index}"
                one = kind == "image" and not isinstance(item, list | tuple) and getattr(item, "ndim", 0) != 4
                clips.append(images.frames([item], where) if one else videos.clip(item, where))
        if not clips:
            size = images.size["height"]
            return {"pixel_values": torch.zeros(0, 1, 3, size, size, dtype=torch.uint8)}
        return stacked(clips)

    def _spans(self, rows: list[Row], mask: Tensor) -> list[list[tuple[int, int]]]:
        """Return each token's characters, (0, 0) for padding."""
        spans: list[list[tuple[int, int]]] = [[(0, 0)] * mask.shape[1] for _ in rows]
        for out, row, seen in zip(spans, rows, mask, strict=True):
            for place, span in zip(seen.nonzero()[:, 0].tolist(), row.spans, strict=True):
                out[place] = span
        return spans

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: Any = "auto",
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the prompt of messages (of a list of conversations: prompts); with `tokenize` ids, or all inputs.

        As transformers' processors do it. What users wrote cannot forge a tag or a turn, in the returned text neither:
        control tokens in it stand between marks that the processor takes away. `{"type": "text", "text": ...,
        "special_tokens": True}` is trusted. A template that knows no images gets `<image>` inside the text.

        `processor_kwargs` are options of the processor's call, `images` for parts that carry none among them; `kwargs`
        are variables of the template, or such options as well. `return_assistant_tokens_mask` adds `assistant_masks`
        (B, T), for templates with `{% generation %}`.

        Raises:
            UserError: no template, or one that cannot write these messages.
        """
        if add_generation_prompt and continue_final_message:
            raise UserError("add_generation_prompt and continue_final_message exclude each other; give one of them")
        masked = return_assistant_tokens_mask
        if masked and (continue_final_message or not (tokenize and return_dict)):
            raise UserError("return_assistant_tokens_mask needs tokenize=True, return_dict=True and a closed message")
        for_call, variables = _sorted_options(kwargs)
        flags = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "return_assistant_tokens_mask": masked,
            "chat_template": chat_template,
            "template_options": {**variables, "tools": tools, "documents": documents},
        }
        one = not (
            isinstance(conversation, list | tuple) and conversation and isinstance(conversation[0], list | tuple)
        )
        chats = [self._messages(messages) for messages in ([conversation] if one else conversation)]
        rendered = [self._rendered(messages, f"row {i}", **flags) for i, messages in enumerate(chats)]
        prompts = [prompt for prompt, _ in rendered]
        if not tokenize:
            return prompts[0] if one else prompts
        options = {**(processor_kwargs or {}), **for_call, **({"return_offsets_mapping": True} if masked else {})}
        if return_tensors != "auto":
            options["return_tensors"] = return_tensors
        out = self._of_prompts(prompts, chats, options, one)
        if masked:
            out["assistant_masks"] = _overlaps(out.pop("offset_mapping"), [found for _, found in rendered])
        return out if return_dict else out["input_ids"]

    def _of_prompts(self, prompts: list[str], chats: list[Any], options: dict[str, Any], one: bool) -> BatchFeature:
        """Return the inputs of rendered chats, with the images that their messages carry or that the options give."""
        options = {k: v for k, v in options.items() if k != "return_text_replacement_offsets"}
        images, videos = options.pop("images", None), options.pop("videos", None)
        carried = [media_of(messages, f"row {i}")[0] for i, messages in enumerate(chats)]
        if images is None and any(kind == "image" for row in carried for kind, _ in row):
            images = [[item for kind, item in row if kind == "image"] for row in carried]
        elif images is not None and one:
            images = [images] if not isinstance(images, list | tuple) else images
        if videos is None and any(kind == "video" for row in carried for kind, _ in row):
            videos = [[item for kind, item in row if kind == "video"] for row in carried]
        return self(images=images, text=prompts, videos=videos, **options)

    @staticmethod
    def _messages(conversation: Any) -> list[dict[str, Any]]:
        messages = getattr(conversation, "messages", conversation)
        if not isinstance(messages, list | tuple) or not messages or not all(map(is_message, messages)):
            raise UserError("a conversation is a list of messages, each a dict with 'role' and 'content'")
        # As transformers does it: some programs write None for what is not there.
        return [{key: value for key, value in message.items() if value is not None} for message in messages]

    def prompt(
        self, demos: Sequence[tuple[ImageInput | None, str]], query: tuple[ImageInput | None, str]
    ) -> tuple[list[ImageInput], str]:
        """Return the images and the text of a few-shot prompt; an image of None makes a text-only example.

        Two demonstrations "A cat." and "A dog." and the query "A" give
        `<image>A cat.<|endofchunk|><image>A dog.<|endofchunk|><image>A`, as in the training documents.

        Raises:
            UserError: a text contains a tag.
        """
        chunks, tags = [*demos, query], self._prompts.pattern
        for _, text in chunks:
            if tags.search(text):
                raise UserError(f"the example text {text!r} contains a tag; the builder places the tags itself")
        images = [image for image, _ in chunks if image is not None]
        return images, self.eoc_token.join(("" if p is None else self.image_token) + text for p, text in chunks)

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        """Return the text of each row of ids, without special tokens unless `skip_special_tokens=False`."""
        return self.tokenizer.batch_decode(ids, **{"skip_special_tokens": True, **options})

    def decode(self, ids: Any, **options: Any) -> Any:
        """Return the text of one row of ids, without special tokens unless `skip_special_tokens=False`."""
        return self.tokenizer.decode(ids, **{"skip_special_tokens": True, **options})

    def batch_decode_new(self, out: Any, inputs: Any, **options: Any) -> list[str]:
        """Return the text that `generate` added to each row: `out` is what it gave for `inputs`.

        `out` may hold several sequences a prompt; options as of `batch_decode`.

        Raises:
            UserError: the rows of `out` do not begin with the prompts.
        """
        rows = getattr(out, "sequences", out)
        prompts = inputs if isinstance(inputs, Tensor) else inputs["input_ids"]
        mask = None if isinstance(inputs, Tensor) else inputs.get("attention_mask")
        mask = torch.ones_like(prompts) if mask is None else mask
        length, copies = prompts.shape[1], len(rows) // max(len(prompts), 1)
        begins = len(rows) == copies * len(prompts) and rows.shape[1] >= length
        if begins:  # generate returns the prompts as they were padded
            given, seen = (x.repeat_interleave(copies, 0).to(rows.device) for x in (prompts, mask))
            begins = bool(((rows[:, :length] == given) | (seen == 0)).all())
        if not begins:
            raise UserError("these rows do not begin with these prompts; give what generate returned for these inputs")
        return self.batch_decode(rows[:, length:], **options)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Return the text of each generated row, prompts included, as transformers' pipeline asks for it."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **options: Any) -> list[str]:
        """Write tokenizer, chat template and `processor_config.json`, as transformers' processors do."""
        if push_to_hub:
            raise UserError("save_pretrained does not push; call push_to_hub(repo_id)")
        files = [str(file) for file in super().save_pretrained(str(save_directory), **options)]
        (Path(save_directory) / FINDER_FILE).write_text(FINDER)
        return files

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoProcessor") -> None:
        """Do nothing: the class is registered, and a saved folder holds no copy of this package's code."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:  # type: ignore[override]
        """Read what `save_pretrained` wrote: a folder, or a name on the hub with `revision`, `subfolder`, `token`, ...

        Raises:
            UserError: there is no processor, or a name needs a network that is not there.
        """
        return loaded(super().from_pretrained, pretrained_model_name_or_path, "processor", PROCESSOR_FILE, options)

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return a saved processor; unlike a new one it keeps its tokenizer's `padding_side`."""
        options = {**processor_dict, **kwargs}
        settings = {
            n: options.pop(n)
            for n in ("chat_template", "max_frames", "new_tokens", "around_image", "soft_prompts")
            if n in options
        }
        parts = [kwargs.pop(name, part) for name, part in zip(cls.get_attributes(), args, strict=True)]
        side = parts[0].padding_side
        processor = cls(*parts, **settings)
        processor.tokenizer.padding_side = side
        if not kwargs.pop("return_unused_kwargs", False):
            return processor
        return processor, {name: value for name, value in kwargs.items() if name not in settings}


def _sorted_options(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return which options are of the processor's call, and which are variables of a chat template."""
    ours = (FlamingoTextKwargs, FlamingoImagesKwargs, FlamingoVideosKwargs)
    given = {k: v for k, v in given.items() if k not in ("load_audio_from_video", "sanitize_control_tokens")}
    for_call = {k: v for k, v in given.items() if any(k in kind.__annotations__ for kind in ours)}
    return for_call, {k: v for k, v in given.items() if k not in for_call}


def _overlaps(spans: list[list[tuple[int, int]]], wanted: list[list[tuple[int, int]]]) -> Tensor:
    """Return which tokens (B, T) have a character in one of their row's spans."""
    return torch.tensor(
        [
            [int(any(a < end and b > begin for begin, end in found)) for a, b in row]
            for row, found in zip(spans, wanted, strict=True)
        ]
    )


AutoImageProcessor.register(
    FlamingoConfig,
    image_processor_classes={"torchvision": FlamingoImageProcessor, "pil": FlamingoImageProcessor},
    exist_ok=True,
)
AutoVideoProcessor.register(FlamingoConfig, FlamingoVideoProcessor, exist_ok=True)
AutoProcessor.register(FlamingoConfig, FlamingoProcessor, exist_ok=True)
