"""Which messages of a conversation the target answers, and after what."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Literal

from torchspec_lib.data.conversations import Conversation
from torchspec_lib.data.messages import Message
from torchspec_lib.errors import DataError

ASKING = ("user", "tool")
"""Roles that the assistant answers."""


class Dialogue:
    """A conversation that is being answered.

    Example:
        ``user, assistant, user, assistant``, both to be answered: first ``history`` is ``user``;
        after ``add`` it is ``user``, the new answer, ``user``; after another ``add`` all is said.
    """

    def __init__(self, conversation: Conversation, turns: Literal["all", "last"]) -> None:
        """See ``RegenerationConfig.turns``.

        Raises:
            DataError: It asks nothing.
        """
        self.conversation = conversation
        cut = _whole_turns if turns == "all" else _last_turn
        self._turns = cut(conversation.messages)
        if not self._turns:
            raise DataError(conversation.where, "asks nothing", "Add a user message, or remove it")
        self.history: tuple[Message, ...] = self._turns.pop(0)
        """What was said so far."""
        self.is_over = False
        """Whether the history ends with the last answer."""

    def add(self, answer: Message) -> None:
        """Say the answer, and what follows it up to the next one."""
        self.history += (answer,)
        if self._turns:
            self.history += self._turns.pop(0)
        else:
            self.is_over = True


def _whole_turns(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """The messages up to each answer, without the recorded ones.

    A recorded answer says where one belongs; without it, that is where a user goes on, or the end.
    A tool call that has no result is an answer, too.
    """
    turns: list[tuple[Message, ...]] = []
    turn: list[Message] = []
    for i, message in enumerate(messages):
        following = messages[i + 1] if i + 1 < len(messages) else None
        is_answer = message.role == "assistant" and not _has_result(messages, i)
        if not is_answer:
            turn.append(message)
        is_open = message.role in ASKING and (following is None or following.role == "user")
        if (is_answer or is_open) and any(said.role in ASKING for said in turn):
            turns.append(tuple(turn))
            turn = []
    return turns


def _has_result(messages: Sequence[Message], i: int) -> bool:
    """Whether a message calls tools, and what they gave follows, perhaps behind further calls."""
    calls = takewhile(lambda message: message.tool_calls, messages[i:])
    following = messages[i + len(list(calls)) :]
    return bool(messages[i].tool_calls and following and following[0].role == "tool")


def _last_turn(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    asking = [i for i, message in enumerate(messages) if message.role in ASKING]
    return [tuple(messages[: asking[-1] + 1])] if asking else []
