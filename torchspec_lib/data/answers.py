"""Finds what the assistant generated in a rendered conversation, where the template doesn't say.

A turn holds everything that the target writes when it is asked: its reasoning, a channel's
header, its answer, its tool calls::

    <|user|>Hi<|end|><|assistant|><think>A greeting.</think>Hello!<|end|>
    |-- what it is asked --------||-- its turn -------------------|
                                                            |-----| its words

Its words are found by signs put around them. The turn begins behind what the template writes to
ask for it, and ends with the words, or with the last tool call. All of that is told by rendering;
no part of a text is ever tokenized by itself.
"""

import re
from collections.abc import Sequence

from torchspec_lib.data.marks import Words, absent_characters, find_words
from torchspec_lib.data.messages import Message
from torchspec_lib.data.template import ChatTemplate, Span, Tools
from torchspec_lib.errors import DataError

NO_REASONING = re.compile(r"\s*(?:<think>)?\s*</think>\s*")
"""What templates write where the data have no reasoning. The target doesn't: it reasons, or is
asked behind that."""
_THINK_TAG = re.compile(r"</?think>")


def answer_spans(
    template: ChatTemplate, messages: Sequence[Message], tools: Tools, text: str, where: str
) -> list[Span]:
    """The assistant's turns in ``text``, ``messages`` as rendered by ``template``.

    Where a turn ends with an answer, its end-of-turn token stands behind the span; where it ends
    with a tool call, that token is inside.

    Raises:
        DataError: The template changes an answer, or leaves one out; or it writes a tool call so
            that its turn can't be told from what is around it.
    """
    finder = _Finder(template, messages, tools, text, where)
    spans: list[Span] = []
    for turn, words in finder.words().items():
        begin = finder.begin(turn, words, after=spans[-1][1] if spans else 0)
        spans.append((begin, finder.end(turn, words)))
    return spans


class _Finder:
    """A conversation and its text. A turn is named by its place among the messages."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Tools,
        text: str,
        where: str,
    ) -> None:
        self._template, self._messages, self._tools = template, messages, tools
        self._text, self._where = text, where

    def words(self) -> dict[int, Words]:
        found = find_words(self._template, self._messages, self._tools, self._text, self._where)
        if found is None:
            raise self._error("changes the text of an answer, or leaves one out")
        return found

    def begin(self, turn: int, words: Words, after: int) -> int:
        """Where the target began to write. The turn before ended at ``after``."""
        asked, before = self._messages[:turn], words.span[0]
        is_call = bool(self._messages[turn].tool_calls)
        begin = None
        if any(message.role == "user" for message in asked):
            begin = self._asked_until(asked, (after, before), is_call)
        if begin is None and is_call:  # its words are in the midst of it
            raise self._error("doesn't ask for a tool call in the way that it then writes it")
        if begin is None:
            return before
        empty = NO_REASONING.match(self._text, begin, before)
        return empty.end() if empty else begin

    def _asked_until(self, asked: Sequence[Message], within: Span, is_call: bool) -> int | None:
        """Where what asks for a turn ends in the text; None if that can't be seen."""
        after, before = within
        plain = self._template.text(asked, self._tools, self._where)
        prompt = self._template.text(asked, self._tools, self._where, ask=True)
        header = prompt[len(plain) :] if prompt.startswith(plain) else ""
        if self._text.startswith(prompt) and len(prompt) <= before:
            # Without a header the prompt may lack the role's name, which then isn't generated.
            between = self._text[len(prompt) : before].strip()
            is_near = not between or between.startswith("<think>")
            return len(prompt) if header or is_near or is_call else None
        # The text lacks a reasoning that the prompt has or opens: only the header is in both,
        # perhaps without the reasoning's tag.
        for start in (header, _THINK_TAG.split(header)[0]):
            found = self._text.find(start, after, before) if start.strip() else -1
            if found >= 0:
                return found + len(start)
        return None

    def end(self, turn: int, words: Words) -> int:
        """Where the turn ended: after tool calls where a conversation up to them would end."""
        message, end = self._messages[turn], words.span[1]
        if not message.tool_calls:
            return end
        (sign,) = absent_characters(self._text, 1)
        until = [*self._messages[:turn], words.mark(message, sign, sign)]
        rendered = self._template.text(until, self._tools, self._where)
        tail = rendered.partition(sign)[2].replace(sign, "").rstrip()
        if not self._text.startswith(tail, end):
            raise self._error("writes a tool call differently where it isn't the last one")
        return end + len(tail)

    def _error(self, problem: str) -> DataError:
        return DataError(
            self._where,
            f"the target's chat template {problem}, so that what to train on can't be told",
            "Put {% generation %} around the answer in the template, or remove the conversation",
        )
