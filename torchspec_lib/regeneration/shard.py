"""Has a shard of conversations answered, turn by turn."""

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.data.conversations import Conversation
from torchspec_lib.data.regenerated import RejectedAnswer, ShardReport
from torchspec_lib.errors import DataError
from torchspec_lib.regeneration.answer import Question
from torchspec_lib.regeneration.dialogue import Dialogue
from torchspec_lib.regeneration.generator import Generated, GenerationRequest, Generator

MAX_EXAMPLES = 3
"""Of rejected conversations, by shard and reason."""
EXAMPLE_LENGTH = 300


@dataclass(frozen=True, slots=True)
class Shard:
    """Conversations that one engine answers and writes together."""

    index: int
    conversations: tuple[Conversation, ...]


def answer_shard(
    shard: Shard, run: RunConfig, chat: ChatTokenizer, generator: Generator
) -> tuple[ShardReport, list[dict[str, Any]]]:
    """Answer every conversation, the n-th turns of all of them together.

    A conversation that can't be asked, or with an answer that is of no use, is left out as a whole.

    Returns:
        The report, and the answered conversations in their order as rows of a data set.

    Raises:
        EngineError: The engine can't be used any more.
    """
    started = time.perf_counter()
    answering = _Answering(run, chat)
    begun = (answering.begin(conversation) for conversation in shard.conversations)
    dialogues = [dialogue for dialogue in begun if dialogue is not None]
    open_dialogues = dialogues
    while open_dialogues:
        asked = [turn for dialogue in open_dialogues if (turn := answering.ask(dialogue))]
        answers = generator.generate([request for _, _, request in asked]) if asked else []
        for (dialogue, question, _), generated in zip(asked, answers, strict=True):
            answering.take(dialogue, question, generated)
        open_dialogues = [d for d, _, _ in asked if d in answering.lengths and not d.is_over]
    answered = [dialogue for dialogue in dialogues if dialogue in answering.lengths]
    report = ShardReport(
        index=shard.index,
        num_conversations=len(shard.conversations),
        num_answered=len(answered),
        answer_lengths=tuple(n for dialogue in answered for n in answering.lengths[dialogue]),
        num_generated=answering.num_generated,
        rejected=dict(sorted(answering.rejected.items())),
        examples=tuple(answering.examples),
        seconds=time.perf_counter() - started,
    )
    return report, [_row(dialogue) for dialogue in answered]


class _Answering:
    """Asks the turns of dialogues and takes their answers, or rejects the dialogue."""

    def __init__(self, run: RunConfig, chat: ChatTokenizer) -> None:
        self._settings, self._max_length, self._chat = run.regeneration, run.data.max_length, chat
        self.lengths: dict[Dialogue, list[int]] = {}
        """Of the answers so far, in tokens, of every dialogue that isn't rejected."""
        self.num_generated = 0
        self.rejected: Counter[str] = Counter()
        self.examples: list[RejectedAnswer] = []

    def begin(self, conversation: Conversation) -> Dialogue | None:
        """The dialogue, if it asks anything."""
        try:
            return Dialogue(conversation, self._settings.turns)
        except DataError as error:
            self._reject(conversation, "asks_nothing", error.problem)
            return None

    def ask(self, dialogue: Dialogue) -> tuple[Dialogue, Question, GenerationRequest] | None:
        """The next question, unless the conversation allows none or has no room for an answer."""
        conversation = dialogue.conversation
        if any(message.is_empty for message in dialogue.history):
            self._drop(dialogue, "empty_message", "")
            return None
        try:
            question = Question(
                self._chat, dialogue.history, conversation.tools, conversation.where
            )
        except DataError as error:
            self._drop(dialogue, "unfit_for_template", error.problem)
            return None
        room = self._max_length - len(question.token_ids)
        if room < 1:
            self._drop(dialogue, "prompt_too_long", "")
            return None
        seed = _seed(self._settings.seed, question.token_ids)
        limit = min(self._settings.max_new_tokens, room)
        return dialogue, question, GenerationRequest(question.token_ids, limit, seed)

    def take(self, dialogue: Dialogue, question: Question, generated: Generated) -> None:
        """Add an answer to its dialogue, or say why not."""
        ids = generated.token_ids
        self.num_generated += len(ids)
        message = question.message_of(ids) if generated.is_finished else None
        if not generated.is_finished:
            self._drop(dialogue, "answer_too_long", question.text_of(ids))
        elif message is None:
            self._drop(dialogue, "changed_by_template", question.text_of(ids))
        elif message.is_empty:
            self._drop(dialogue, "empty_answer", question.text_of(ids))
        else:
            dialogue.add(message)
            self.lengths.setdefault(dialogue, []).append(len(ids))

    def _drop(self, dialogue: Dialogue, reason: str, text: str) -> None:
        self.lengths.pop(dialogue, None)
        self._reject(dialogue.conversation, reason, text)

    def _reject(self, conversation: Conversation, reason: str, text: str) -> None:
        self.rejected[reason] += 1
        if self.rejected[reason] <= MAX_EXAMPLES:
            where = conversation.where
            example = RejectedAnswer(where=where, reason=reason, text=text[:EXAMPLE_LENGTH])
            self.examples.append(example)


def _seed(seed: int, token_ids: Sequence[int]) -> int:
    """Of an answer: it follows from what was asked, not from when, where or beside what."""
    digest = hashlib.sha256(f"{seed} {token_ids}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def _row(dialogue: Dialogue) -> dict[str, Any]:
    conversation = dialogue.conversation
    row: dict[str, Any] = {
        "id": conversation.source_id or conversation.where,
        "messages": [message.as_row() for message in dialogue.history],
    }
    if conversation.tools:
        row["tools"] = [dict(tool) for tool in conversation.tools]
    if conversation.category is not None:
        row["category"] = conversation.category
    return row
