"""Chat messages to a prompt, by the LM's own chat template or one of ours.

Text LMs' templates know no images: where a template does not write `<image>` for an image's part, the parts of a
message are joined to one text with the tags in it, and the template gets that. Nothing may get lost on the way: every
image has its tag in the prompt, or the template is refused. What users wrote is marked (`rows.py`), so that it cannot
forge a tag or a turn; a part with `"special_tokens": True` is trusted as a prompt is.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from flamingo.errors import UserError
from flamingo.processing.rows import PLAIN_BEGIN, VIDEO_TAG, marked

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|endofchunk|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
OTTER_TEMPLATE = (
    "{% for message in messages %}"
    "{% set content = message['content'] %}"
    "{% set parts = [{'type': 'text', 'text': content}] if content is string else content %}"
    "{% set texts = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') | trim %}"
    "{% if message['role'] == 'assistant' %} {{ texts }}<|endofchunk|>"
    "{% elif message['role'] == 'user' %}"
    "{% for part in parts if part['type'] != 'text' %}{{ '<' + part['type'] + '>' }}{% endfor %}"
    "User: {{ texts }} GPT:<answer>"
    "{% else %}{{ raise_exception('Otter knows the roles user and assistant only') }}{% endif %}{% endfor %}"
)
CHAT_TEMPLATES = {"plain": PLAIN_TEMPLATE, "otter": OTTER_TEMPLATE}
"""For `processor.chat_template`, where the LM's tokenizer has none: "plain" names the roles; "otter" is Otter's."""

NO_TEMPLATE = (
    "the messages have roles, but neither the processor nor the LM's tokenizer has a chat template; set "
    "processor.chat_template, for example to flamingo.processing.chat.CHAT_TEMPLATES['plain'], or give a list of parts "
    "without roles"
)
_SOURCES = {"image": ("image", "path", "url", "base64"), "video": ("video", "path", "url", "base64")}
_AS_CODE = re.compile(r"""['"]type['"]: ?['"](?:text|image|video)['"]""")

Part = Mapping[str, Any]


def is_message(node: Any) -> bool:
    """Say whether a mapping is a message, which has a role."""
    return isinstance(node, Mapping) and "role" in node


def is_chat(item: Any) -> bool:
    """Say whether something is a list of messages or of parts."""
    return isinstance(item, list | tuple) and len(item) > 0 and isinstance(item[0], Mapping)


def parts_of(nodes: Any, where: str) -> list[Part]:
    """Return the parts of a list of parts or of contents, with OpenAI's `image_url` as an image.

    Raises:
        UserError: a part of an unknown type.
    """
    if isinstance(nodes, str):
        return [{"type": "text", "text": nodes}]
    parts: list[Part] = []
    for node in nodes or []:
        if not isinstance(node, Mapping):
            raise UserError(f"{where} has a part that is a {type(node).__name__}; a part is a dict with a 'type'")
        if "type" not in node and "content" in node:
            parts += parts_of(node["content"], where)
            continue
        kind = node.get("type")
        if kind == "image_url":
            given = node.get("image_url")
            node, kind = {"type": "image", "url": given.get("url") if isinstance(given, Mapping) else given}, "image"
        if kind not in ("text", "image", "video"):
            raise UserError(f"{where} has a part of type {kind!r}; known are text, image and video")
        if kind == "text" and not isinstance(node.get("text"), str):
            raise UserError(f"{where} has a text part without a 'text'")
        parts.append(node)
    return parts


def source_of(part: Part) -> Any:
    """Return what an image's or a video's part holds (a path, URL, PIL image, bytes, frames), None for nothing."""
    for key in _SOURCES[part["type"]]:
        if (value := part.get(key)) is not None:
            return base64.b64decode(value.partition(",")[2] or value) if key == "base64" else value
    return None


def media_of(messages: Sequence[Mapping[str, Any]], where: str) -> tuple[list[tuple[str, Any]], int]:
    """Return (kind, what it holds) of the images and clips that messages carry, and how many parts there are."""
    parts = [part for message in messages for part in parts_of(message.get("content"), where)]
    seen = [(part["type"], source_of(part)) for part in parts if part["type"] != "text"]
    return [(kind, source) for kind, source in seen if source is not None], len(seen)


class ChatRenderer:
    """Renders one conversation. `pattern`: what a user's text must not forge; `image_tag`: the tag of an image."""

    def __init__(self, template: str, pattern: re.Pattern[str], image_tag: str, options: Mapping[str, Any]) -> None:
        self.template, self.pattern, self.image_tag = template, pattern, image_tag
        self.options = {key: marked(value, pattern) if key == "documents" else value for key, value in options.items()}

    def render(
        self, messages: Sequence[Mapping[str, Any]], where: str, **flags: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the prompt, and the characters that the template marks as the assistant's.

        Raises:
            UserError: the template refuses the messages, or leaves an image out.
        """
        plain = [self._marked(message, where) for message in messages]
        wanted = media_of(messages, where)[1]
        texts = [part["text"].strip() for message in plain for part in parts_of(message.get("content"), where)
                 if part["type"] == "text"]  # fmt: skip
        best: tuple[str, list[tuple[int, int]]] | None = None
        problem = "it leaves an image out"
        for form in (_as_parts, self._as_text, self._as_text_part):
            try:
                rendered: Any = render_jinja_template(  # typed as a text there
                    conversations=[[form(message) for message in plain]],
                    chat_template=self.template,
                    **{**self.options, **flags},
                )
            except Exception as error:  # templates raise anything
                problem = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                continue
            prompts, spans = rendered
            prompt = prompts[0]
            tags = sum(prompt.count(tag) - prompt.count(f"{PLAIN_BEGIN}{tag}") for tag in (self.image_tag, VIDEO_TAG))
            if tags != wanted or (_AS_CODE.search(prompt) and not any(_AS_CODE.search(text) for text in texts)):
                continue
            found = prompt, spans[0] if spans else []
            if all(text in prompt for text in texts):
                return found
            best = best or found  # some templates leave out old thoughts
        if best is None:
            raise UserError(
                f"{where}: the chat template cannot write these messages ({problem}); set another "
                "processor.chat_template or give a prompt as text"
            )
        return best

    def _marked(self, message: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return a message whose text cannot forge anything, without the images themselves."""
        out = {k: v if k == "role" else marked(v, self.pattern) for k, v in message.items() if k != "content"}
        if isinstance(content := message.get("content"), str):
            return {**out, "content": marked(content, self.pattern)}
        if content is None:
            return out
        parts: list[dict[str, Any]] = []
        for part in parts_of(content, where):
            if part["type"] == "text":
                text = part["text"] if part.get("special_tokens") else marked(part["text"], self.pattern)
                parts.append({"type": "text", "text": text})
            else:
                parts.append({"type": part["type"]})
        return {**out, "content": parts}

    def _as_text(self, message: dict[str, Any]) -> dict[str, Any]:
        if isinstance(message.get("content"), str) or "content" not in message:
            return message
        tags = {"image": self.image_tag, "video": VIDEO_TAG}
        return {**message, "content": "".join(tags.get(p["type"], p.get("text", "")) for p in message["content"])}

    def _as_text_part(self, message: dict[str, Any]) -> dict[str, Any]:
        text = self._as_text(message)
        return text if "content" not in text else {**text, "content": [{"type": "text", "text": text["content"]}]}


def _as_parts(message: dict[str, Any]) -> dict[str, Any]:
    return message
