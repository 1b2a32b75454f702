"""Renders conversations by the target's own chat template."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from torchspec_lib.data.messages import CALL_FORMS, CallForm, Message
from torchspec_lib.errors import ConfigError, DataError

Span = tuple[int, int]
"""Characters ``[begin, end)`` of the rendered text."""
Tools = Sequence[Mapping[str, Any]]

TEMPLATE_DATE = datetime(2025, 1, 1)
"""What ``strftime_now`` tells a template: the same data must give the same tokens tomorrow."""
GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """A Jinja template with the target's special tokens, as it is served."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], settings: Mapping[str, Any]
    ) -> None:
        """``settings`` are ``data.chat_template_kwargs``.

        Raises:
            ConfigError: The template reads none of that name.
        """
        unread = [name for name in settings if not re.search(rf"\b{re.escape(name)}\b", source)]
        if unread:
            raise ConfigError(
                "data.chat_template_kwargs",
                f"the target's chat template doesn't read {', '.join(unread)}",
                "Correct the name, or remove it",
            )
        self._source, self._settings = source, {**special_tokens, **settings}
        self.has_markers = GENERATION_MARKER.search(source) is not None
        """Whether it says by itself what the assistant generates."""

    def text(self, messages: Sequence[Message], tools: Tools, where: str, ask: bool = False) -> str:
        """The messages as text; with ``ask`` up to where the target's answer begins.

        Raises:
            DataError: The template refuses them.
        """
        return self.text_and_marks(messages, tools, where, ask)[0]

    def text_and_marks(
        self, messages: Sequence[Message], tools: Tools, where: str, ask: bool = False
    ) -> tuple[str, list[Span]]:
        """The text, and what the template itself marks as generated.

        Tool calls are given in the first form that the template takes and that shows least of
        Python's own notation, such as ``None``: templates print what they don't expect.

        Raises:
            DataError: The template refuses them, or a character is broken.
        """
        from jinja2.exceptions import TemplateError

        has_calls = any(message.tool_calls for message in messages)
        best, fewest = None, 0
        refusal: Exception | None = None
        for form in CALL_FORMS if has_calls else CALL_FORMS[:1]:
            try:
                rendered = self._render(messages, tools, ask, form)
            except (TemplateError, TypeError) as error:
                refusal = refusal or error
                continue
            num_odd = _num_python(rendered[0], messages, tools) if has_calls else 0
            if best is None or num_odd < fewest:
                best, fewest = rendered, num_odd
            if fewest == 0:
                break
        if best is None:
            raise DataError(
                where,
                f"the target's chat template refuses it: {refusal}",
                "Change its roles or their order, or remove it",
            ) from refusal
        check_characters(best[0], where)
        return best

    def _render(
        self, messages: Sequence[Message], tools: Tools, ask: bool, form: CallForm
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[[message.for_template(form) for message in messages]],
            tools=[dict(tool) for tool in tools] or None,
            chat_template=self._source,
            return_assistant_tokens_mask=self.has_markers,
            add_generation_prompt=ask,
            strftime_now=TEMPLATE_DATE.strftime,
            **self._settings,
        )
        texts, spans = rendered
        return texts[0], _joined(spans[0]) if spans else []


def check_characters(text: str, where: str) -> None:
    """JSON can hold half of a character, a lone surrogate; no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = repr(text[error.start])
        raise DataError(
            where, f"holds {broken}, half of a character", "Correct or remove it"
        ) from error


def _num_python(text: str, messages: Sequence[Message], tools: Tools) -> int:
    """How often ``text`` shows an object as Python writes it, and the data don't."""
    data = json.dumps([*(message.as_row() for message in messages), *map(dict, tools)])
    shown = max(0, text.count("None") - data.count("None"))
    arguments = (dict(call.arguments) for m in messages for call in m.tool_calls if call.arguments)
    return shown + sum(text.count(str(one)) for one in arguments)


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Marks that follow on each other are one: a turn may be marked in parts."""
    joined: list[Span] = []
    for begin, end in spans:
        if joined and joined[-1][1] == begin:
            begin = joined.pop()[0]
        joined.append((begin, end))
    return joined
