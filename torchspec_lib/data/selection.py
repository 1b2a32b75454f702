"""Which conversations become prompts, and why the others don't."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchspec_lib.config.models import DataConfig
from torchspec_lib.data.chat import ChatTokenizer, EncodedChat
from torchspec_lib.data.conversations import Conversation
from torchspec_lib.data.template import check_characters
from torchspec_lib.errors import ConfigError, DataError
from torchspec_lib.types import Prompt

MAX_TOLD = 3
"""Conversations that don't fit the template, and are told of one by one."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class HeldoutPrompt:
    """A question that the draft isn't trained on.

    Example:
        ``HeldoutPrompt("91c2…", [1, 52, 7, 2], text="What is 2 + 2?", reference="4")``
    """

    prompt_id: str
    prompt_token_ids: npt.NDArray[np.int32]
    """Ends where the target's answer begins."""
    text: str
    """The last user message."""
    reference: str
    """The data's own answer; empty where it has none."""


class Selection:
    """Takes conversations in, hands usable prompts out, and counts what it sees.

    Every conversation that went in is either a prompt or counted in ``rejected``.
    """

    def __init__(self, chat: ChatTokenizer, settings: DataConfig, vocab_size: int) -> None:
        self._chat, self._settings = chat, settings
        self._heldout_texts: set[str] = set()
        self._seen: set[bytes] = set()
        self.rejected: Counter[str] = Counter()
        self.first_unfit = ""
        """What is wrong with the first conversation that doesn't fit the template."""
        self.token_counts = np.zeros(vocab_size, dtype=np.int64)
        """[V], how often each target token is supervised."""
        self.num_tokens = 0
        self.longest = 0
        self.turns: Counter[str] = Counter()
        """What is supervised, as ``EncodedChat.turns``."""

    def heldout(self, conversations: Iterable[Conversation]) -> Iterator[HeldoutPrompt]:
        """What was asked before each conversation's last answer, if there is one.

        Comes before ``prompts``.

        Raises:
            DataError: A conversation has no user message before its last answer.
        """
        for position, conversation in enumerate(conversations):
            messages, where = conversation.messages, conversation.where
            answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
            answer = answers[-1] if answers else len(messages)
            asked = [m.content for m in messages[:answer] if m.role == "user"]
            if not asked:
                raise DataError(
                    where, "asks nothing before its last answer", "Add a user message, or remove it"
                )
            self._heldout_texts.add(asked[0].strip())
            token_ids = self._chat.prompt_ids(messages[:answer], where, conversation.tools)
            if len(token_ids) > self._settings.max_length:
                self.rejected["heldout_too_long"] += 1
                continue
            prompt_id = _prompt_id(position, token_ids.tobytes())
            reference = messages[answer].content if answers else ""
            check_characters(reference, where)
            yield HeldoutPrompt(prompt_id, token_ids, asked[-1], reference)

    def prompts(self, conversations: Iterable[Conversation]) -> Iterator[tuple[Prompt, str]]:
        """The usable prompts, each with the id of the row it came from, or its place.

        Raises:
            ConfigError: The tokenizer has more tokens than the target's vocabulary.
            DataError: The template supervises all or none of a conversation.
        """
        for position, conversation in enumerate(conversations):
            where = conversation.where
            encoded = self._encode(conversation)
            if encoded is None:
                continue
            _check_mask(encoded.loss_mask, where)
            reason = self._why_unusable(conversation, encoded)
            if reason is not None:
                self.rejected[reason] += 1
                continue
            self._count(encoded)
            content = encoded.token_ids.tobytes() + encoded.loss_mask.tobytes()
            prompt = Prompt(_prompt_id(position, content), encoded.token_ids, encoded.loss_mask)
            yield prompt, conversation.source_id or where

    def end_of_turn_ids(self) -> Set[int]:
        """Special tokens that are supervised, so stand at the end of an answer."""
        return self._chat.special_ids & set(np.flatnonzero(self.token_counts).tolist())

    def _encode(self, conversation: Conversation) -> EncodedChat | None:
        """Tokens and mask; None, and counted, where the mask can't be told."""
        messages, where = conversation.messages, conversation.where
        if any(message.is_empty for message in messages):
            self.rejected["empty_message"] += 1
            return None
        try:
            return self._chat.encode(messages, where, conversation.tools)
        except DataError as error:
            self.rejected["unfit_for_template"] += 1
            self.first_unfit = self.first_unfit or str(error)
            if self.rejected["unfit_for_template"] <= MAX_TOLD:
                logger.warning("event=left_out %s", error)
            return None

    def _why_unusable(self, conversation: Conversation, encoded: EncodedChat) -> str | None:
        asked = next((m.content.strip() for m in conversation.messages if m.role == "user"), None)
        if asked in self._heldout_texts:
            return "also_in_heldout"
        if len(encoded.token_ids) > self._settings.max_length:
            return "too_long"
        if int(encoded.loss_mask.sum()) < self._settings.min_loss_tokens:
            return "too_few_supervised_tokens"
        digest = hashlib.sha256(encoded.token_ids.tobytes()).digest()[:16]
        if digest in self._seen:
            return "duplicate"
        self._seen.add(digest)
        return None

    def _count(self, encoded: EncodedChat) -> None:
        vocab_size = len(self.token_counts)
        if encoded.token_ids.max() >= vocab_size:
            raise ConfigError(
                "model.target",
                f"its tokenizer gives the id {encoded.token_ids.max()}, but its vocabulary has "
                f"{vocab_size} tokens",
                "Use the tokenizer that the target was trained with",
            )
        supervised = encoded.token_ids[encoded.loss_mask]
        self.token_counts += np.bincount(supervised, minlength=vocab_size)
        self.num_tokens += len(encoded.token_ids)
        self.longest = max(self.longest, len(encoded.token_ids))
        self.turns += encoded.turns


def _prompt_id(position: int, content: bytes) -> str:
    """16 hex digits; ``position`` keeps equal contents apart."""
    return hashlib.sha256(content + str(position).encode()).hexdigest()[:16]


def _check_mask(loss_mask: npt.NDArray[np.bool_], where: str) -> None:
    if loss_mask.any() and not loss_mask.all():
        return
    extent = "every token" if loss_mask.any() else "no token"
    raise DataError(
        where,
        f"the target's chat template makes {extent} of it one to train on, so the loss mask is "
        "wrong",
        "Check the template's {% generation %} markers, or remove the conversation",
    )
