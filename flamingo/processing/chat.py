"""Chat messages to a prompt, by the LM's own chat template or one of ours (`templates/`).

Text LMs' templates know no images: where a template does not write `<image>` for an image's part, the parts of a
message are joined to one text with the tags in it, and the template gets that. Nothing may get lost on the way: every
image has its tag in the prompt, and what system and user say is in it, or the template is refused. What users wrote is
marked (`rows.py`), so that it cannot forge a tag or a turn; a part with `"special_tokens": True` is trusted as a prompt
is.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from flamingo.errors import UserError
from flamingo.processing.conversation import media_of, parts_of
from flamingo.processing.rows import PLAIN_BEGIN, VIDEO_TAG, marked

CHAT_TEMPLATES = {
    file.stem: file.read_text("utf-8").rstrip("\n")
    for file in sorted((Path(__file__).parent / "templates").glob("*.jinja"))
}
"""By name, for `processor.chat_template`: "plain" names the roles; the others are those of released models."""

NO_TEMPLATE = (
    "the messages have roles, but neither the processor nor the LM's tokenizer has a chat template; set "
    f"processor.chat_template to a template or one of {', '.join(CHAT_TEMPLATES)}, or give a list of parts without "
    "roles"
)
_AS_CODE = re.compile(r"""['"]type['"]: ?['"](?:text|image|video)['"]""")


def template_of(given: Any) -> Any:
    """Return the template of one of our names or in a file, anything else as it is.

    Raises:
        UserError: one word that is neither a name nor a file, so that it can be no template; a file that is no text.
    """
    if not isinstance(given, str) or "{" in given:
        return given
    if given in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[given]
    try:
        if Path(given).is_file():
            return Path(given).read_text("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"chat_template={given!r} is not a text in UTF-8; give a Jinja template") from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
    if " " in given:
        return given
    raise UserError(
        f"chat_template={given!r} is neither a Jinja template, nor a file with one, nor one of "
        f"{', '.join(CHAT_TEMPLATES)}"
    )


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
            UserError: the template refuses the messages, or leaves an image or what system and user say out.
        """
        plain = [self._marked(message, where) for message in messages]
        wanted = media_of(messages, where)[1]
        texts, given = (
            [part["text"].strip() for message in plain if message.get("role") != "assistant" or not kept
             for part in parts_of(message.get("content"), where) if part["type"] == "text"]
            for kept in (False, True)
        )  # fmt: skip
        best: tuple[str, list[tuple[int, int]]] | None = None
        problem, dropped = "it leaves an image out", ""
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
            if lost := next((text for text in given if text not in prompt), None):
                dropped = f"it leaves out {lost[:40]!r}"
                continue
            found = prompt, spans[0] if spans else []
            if all(text in prompt for text in texts):
                return found
            best = best or found  # some templates leave out old thoughts
        if best is None:
            raise UserError(
                f"{where}: the chat template cannot write these messages ({dropped or problem}); set another "
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
