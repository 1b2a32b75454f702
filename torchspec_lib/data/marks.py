"""Finds the assistant's own words in a rendered conversation: by signs put around them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from torchspec_lib.data.messages import REASONING_END, Message
from torchspec_lib.data.template import ChatTemplate, Span, Tools

Mark = Callable[[Message, str, str], Message]
"""Puts two signs into a message."""


@dataclass(frozen=True, slots=True)
class Words:
    """Where a turn surely is: its answer, or the name or id of its last tool call."""

    span: Span
    mark: Mark
    """What found them."""


def find_words(
    template: ChatTemplate, messages: Sequence[Message], tools: Tools, text: str, where: str
) -> dict[int, Words] | None:
    """The words of every assistant turn in ``text``, by its place among the messages.

    The conversation is rendered again with two signs in every turn: characters that it doesn't
    have. Without them the second text must be ``text``, which no way of marking may achieve:
    then the template changes an answer, or leaves one out.
    """
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    signs = absent_characters(text, 2 * len(turns))
    pairs = dict(zip(turns, zip(signs[::2], signs[1::2], strict=True), strict=True))
    for mark in MARKS:
        marked = [mark(m, *pairs[i]) if i in pairs else m for i, m in enumerate(messages)]
        rendered = template.text(marked, tools, where)
        places = _places(rendered, signs)
        if len(places) == len(signs) and without(rendered, signs) == text:
            return {
                turn: Words((places[left], places[right]), mark)
                for turn, (left, right) in pairs.items()
            }
    return None


def absent_characters(text: str, count: int) -> list[str]:
    """Characters of a private-use plane that ``text`` doesn't hold."""
    present = set(text)
    plane = (chr(code) for code in range(0xF0000, 0xFFFFE))
    return list(islice((character for character in plane if character not in present), count))


def without(text: str, signs: Sequence[str]) -> str:
    """``text`` with all signs taken out."""
    return text.translate(dict.fromkeys(map(ord, signs)))


def _places(rendered: str, signs: Sequence[str]) -> dict[str, int]:
    """Where each sign stands first, counted without any sign."""
    places: dict[str, int] = {}
    found = re.finditer(f"[{''.join(signs)}]", rendered) if signs else ()
    for num_before, match in enumerate(found):
        places.setdefault(match[0], match.start() - num_before)
    return places


def _mark(message: Message, left: str, right: str, strip: bool, by_id: bool) -> Message:
    if message.tool_calls:
        *others, last = message.tool_calls
        if by_id and last.call_id is not None:
            last = replace(last, call_id=f"{last.call_id}{left}{right}")
        else:
            last = replace(last, name=f"{last.name}{left}{right}")
        return replace(message, tool_calls=(*others, last))
    reasoning, cut, answer = message.content.rpartition(REASONING_END)
    words = answer.strip() if strip else answer
    begin = answer.index(words)
    before, after = answer[:begin], answer[begin + len(words) :]
    content = f"{reasoning}{cut}{before}{left}{words}{right}{after}"
    return replace(message, content=content)


MARKS: tuple[Mark, ...] = tuple(
    partial(_mark, strip=strip, by_id=by_id) for by_id in (False, True) for strip in (False, True)
)
"""A template that strips answers would stop doing so at a sign before a blank; some templates
show a call's id and not its name."""
