"""What a processor writes messages by: its chat templates, and what each of them is good for.

`FlamingoProcessor` begins with this class: which template is asked for, a prompt of messages (`chat.py`), and what
makes training rows of whole conversations (`turns.py`), tried once for each template.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from transformers.processing_utils import ProcessorMixin

from flamingo.errors import UserError
from flamingo.processing import chat
from flamingo.processing.begin import start_ids
from flamingo.processing.conversation import ROLES, check_turns
from flamingo.processing.rows import PromptTokenizer, control_tokens
from flamingo.processing.turns import CUT, TurnTokenizer

_TRIED: WeakKeyDictionary[Any, dict[tuple[str, int], TurnTokenizer | str]] = WeakKeyDictionary()
"""Of each processor, what its templates are good for: not an attribute, since transformers saves and copies those."""


class TemplatedProcessor(ProcessorMixin):
    """A processor with a tokenizer that has the tokens of a Flamingo, and with chat templates."""

    new_tokens: list[str]
    new_token_ids: list[int]
    image_token: str
    eoc_token: str
    video_token: str
    image_token_id: int
    eoc_token_id: int
    around_image: str | None

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The template of messages, or several by name; what is set may be one of the names in `CHAT_TEMPLATES`."""
        return self._chat_template

    @chat_template.setter
    def chat_template(self, template: str | dict[str, str] | None) -> None:
        self._chat_template: str | dict[str, str] | None = chat.template_of(template)

    @property
    def _prompts(self) -> PromptTokenizer:
        ids = dict(zip(self.new_tokens[:2], self.new_token_ids, strict=False))
        around = None
        if self.around_image is not None:
            around = ids[self.around_image] = int(self.tokenizer.convert_tokens_to_ids(self.around_image))
        return PromptTokenizer(self.tokenizer, ids, self.image_token_id, self.eoc_token_id, around)

    def turns(self, chat_template: str | None = None) -> TurnTokenizer:
        """Return what makes rows of whole conversations by a template; it has been tried, once.

        Raises:
            UserError: there is no template, or one that training cannot use; says why.
        """
        return self._turns(self._resolve_template(chat_template, "the processor"))

    def _turns(self, template: str) -> TurnTokenizer:
        tried, key = _TRIED.setdefault(self, {}), (template, len(self.tokenizer))
        if key not in tried:
            try:
                tried[key] = TurnTokenizer(self._renderer(template), self._prompts, start_ids(self.tokenizer))
            except UserError as error:
                tried[key] = error.args[0]
        if isinstance(found := tried[key], str):
            raise UserError(found)
        return found

    def _renderer(self, template: str, options: Mapping[str, Any] | None = None) -> chat.ChatRenderer:
        tags = [*self.new_tokens, self.video_token, *([self.around_image] if self.around_image else [])]
        pattern = control_tokens(self.tokenizer, tags, template)
        ours = {"image_token": self.image_token, "eoc_token": self.eoc_token}
        options = {**self.tokenizer.special_tokens_map, **ours, **(options or {})}
        return chat.ChatRenderer(template, pattern, self.image_token, options)

    def _rendered(self, messages: Any, where: str, **flags: Any) -> tuple[str, list[tuple[int, int]]]:
        """Return the prompt, and the characters of the assistant; what training tokenises apart is cut apart here."""
        template = self._resolve_template(flags.pop("chat_template", None), where)
        if all(message["role"] in ROLES for message in messages):  # what tools say comes in any order
            check_turns(messages, where)
        renderer = self._renderer(template, flags.pop("template_options", {}))
        text, spans = renderer.render(messages, where, **flags)
        if all(message["role"] != "assistant" for message in messages):
            return text, spans
        try:
            turns = self._turns(template).by(renderer)
            found = turns.turns_in(text, messages, where, goes_on=bool(flags.get("continue_final_message")))
        except UserError:  # a template with which no training row can be made may still write prompts
            return text, spans
        cut, places = turns.cut(text, found)
        moved = [
            (a + len(CUT) * sum(p <= a for p in places), b + len(CUT) * sum(p < b for p in places))
            for a, b in spans or found
        ]
        return cut, moved

    def _resolve_template(self, given: str | None, where: str) -> str:
        """Return the template of a name, or the one that is given or kept."""
        if given is None and self.chat_template is None:
            raise UserError(f"{where}: {chat.NO_TEMPLATE}")
        known = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        if given is not None:
            return str(known.get(given) or chat.template_of(given))
        if known.get("default") is None:
            raise UserError(f"the processor has the chat templates {', '.join(known)}; name one: chat_template=...")
        return str(known["default"])
