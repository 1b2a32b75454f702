"""Turns conversations into token ids and a loss mask, by the target's own chat template.

The whole conversation is rendered and tokenized once. What is supervised is found as spans of
the rendered *text* and mapped to tokens by the tokenizer's offsets; a prefix is never
tokenized by itself, because merges across the cut would give other tokens.
"""

import copy
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from torchspec_lib.data.answers import answer_spans
from torchspec_lib.data.messages import Message
from torchspec_lib.data.template import ChatTemplate, Span, Tools
from torchspec_lib.errors import ConfigError, DataError


class EncodedChat(NamedTuple):
    """A tokenized conversation of ``T`` tokens."""

    token_ids: npt.NDArray[np.int32]
    """[T]"""
    loss_mask: npt.NDArray[np.bool_]
    """[T], true for the assistant's text and the special token that ends its turn."""
    turns: Counter[str]
    """What is supervised, in turns: ``supervised``; of them ``with_reasoning``,
    ``with_tool_calls`` and ``without_end_of_turn``. What isn't: turns that ``last_turn_only``
    leaves out, ``left_out``, and turns whose reasoning isn't in it, ``reasoning_left_out``."""


class ChatTokenizer:
    """A tokenizer with its chat template.

    A token is supervised when its first character lies in what the assistant generated: its
    reasoning, answer and tool calls, or when it is the end-of-turn token behind them.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_settings: Mapping[str, Any] | None = None,
        last_turn_only: bool = False,
    ) -> None:
        """See ``data.chat_template_kwargs`` and ``data.last_turn_only``.

        Raises:
            ConfigError: The tokenizer has no chat template, or it doesn't read a setting.
        """
        try:
            source: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise ConfigError(
                "model.target",
                f"the tokenizer of {tokenizer.name_or_path or 'the target'} has no default chat "
                "template",
                "Use the target's instruction-tuned version, or put a chat_template.jinja beside "
                "its tokenizer",
            ) from error
        self.tokenizer, self._last_turn_only = tokenizer, last_turn_only
        self._template = ChatTemplate(source, tokenizer.special_tokens_map, template_settings or {})
        self._encoder = _untrimmed_encoder(tokenizer) if tokenizer.is_fast else None
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        self._special = tuple(sorted(special | set(tokenizer.all_special_tokens)))
        self.special_ids: frozenset[int] = frozenset(
            tokenizer.convert_tokens_to_ids(list(self._special))
        )
        self._end_of_turn = _end_of_turn_pattern(self._special, tokenizer.eos_token)

    @classmethod
    def load(
        cls,
        folder: str,
        trust_remote_code: bool = False,
        template_settings: Mapping[str, Any] | None = None,
        last_turn_only: bool = False,
    ) -> Self:
        """The tokenizer of a model's folder."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return cls(tokenizer, template_settings, last_turn_only)

    def encode(self, messages: Sequence[Message], where: str, tools: Tools = ()) -> EncodedChat:
        """Tokenize a conversation. ``where`` names it in errors.

        Raises:
            DataError: The template refuses it, or changes an answer beyond recognition.
        """
        text, spans = self._template.text_and_marks(messages, tools, where)
        if not self._template.has_markers:
            spans = answer_spans(self._template, messages, tools, text, where)
        spans = [(begin, self._turn_end(text, begin, end)) for begin, end in spans]
        num_turns = len(spans)
        if self._last_turn_only:
            spans = self._last_turn(messages, tools, text, spans, where)
        ids, begins = self._tokens(text, spans, where)
        loss_mask = np.zeros(len(begins), dtype=np.bool_)
        for begin, end in spans:
            loss_mask |= (begins >= begin) & (begins < end)
        turns = self._count_turns(messages, [text[begin:end] for begin, end in spans])
        turns["left_out"] = num_turns - len(spans)
        return EncodedChat(np.array(ids, dtype=np.int32), loss_mask, +turns)

    def prompt_ids(
        self, messages: Sequence[Message], where: str, tools: Tools = ()
    ) -> npt.NDArray[np.int32]:
        """Token ids that ask the target for its answer to ``messages``.

        Raises:
            DataError: The template refuses them, or one is empty.
        """
        if any(message.is_empty for message in messages):
            raise DataError(where, "has an empty message", "Fill it in, or remove the conversation")
        text = self._template.text(messages, tools, where, ask=True)
        return np.array(self._ids(text), dtype=np.int32)

    def _turn_end(self, text: str, begin: int, end: int) -> int:
        """Where the turn of an answer at ``[begin, end)`` ends, its end-of-turn token included.

        A template may mark that token as generated or not, and the newline behind it too: both
        are put right, so that every draft learns to stop and none to go on after it.
        """
        answer = text[begin:end].rstrip()
        behind = self._end_of_turn.match(text, end)
        if not answer.endswith(self._special):
            return behind.end() if behind else end
        # A marked tool call may end with a special token of its own, before the turn's.
        if behind and not answer.endswith(behind[0]) and text.rstrip().endswith(behind[0]):
            return behind.end()
        return begin + len(answer)

    def _last_turn(
        self,
        messages: Sequence[Message],
        tools: Tools,
        text: str,
        spans: Sequence[Span],
        where: str,
    ) -> list[Span]:
        """The spans behind the last user message that was answered."""
        roles = [message.role for message in messages]
        answer = max(i for i, role in enumerate(roles) if role == "assistant")
        last = max((i for i, role in enumerate(roles[:answer]) if role == "user"), default=-1)
        if last < 0:
            return list(spans)
        if not self._template.has_markers:  # then there is a span for every turn
            return list(spans[roles[:last].count("assistant") :])
        asked = self._template.text(messages[: last + 1], tools, where)
        if not text.startswith(asked):
            raise DataError(
                where,
                "the target's chat template writes the last user message differently once it is "
                "answered, so that the last turn can't be told",
                "Set data.last_turn_only to false, or remove it",
            )
        return [span for span in spans if span[0] >= len(asked)]

    def _tokens(
        self, text: str, spans: Sequence[Span], where: str
    ) -> tuple[Sequence[int], npt.NDArray[np.int64]]:
        """Ids of ``text``, and the character that each token begins at."""
        if self._encoder is not None:
            encoding = self._encoder.encode(text, add_special_tokens=False)
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            return encoding.ids, offsets[:, 0]
        # A slow tokenizer has no offsets. Cut at the spans it must give the same tokens.
        cuts = sorted({0, *(end for span in spans for end in span), len(text)})
        pieces = [self._ids(text[begin:end]) for begin, end in pairwise(cuts)]
        ids = self._ids(text)
        if [token for piece in pieces for token in piece] != ids:
            raise DataError(
                where,
                "a token reaches across the beginning or the end of an answer, and the target's "
                "tokenizer, not being a fast one, can't say which",
                "Use a target with a tokenizer.json, or remove it",
            )
        begins = [np.full(len(p), begin) for p, begin in zip(pieces, cuts, strict=False)]
        return ids, np.concatenate(begins).astype(np.int64)

    def _ids(self, text: str) -> list[int]:
        if self._encoder is not None:
            ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        else:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _count_turns(self, messages: Sequence[Message], supervised: Sequence[str]) -> Counter[str]:
        everything = "".join(supervised)
        turns = Counter(supervised=len(supervised))
        for message in messages:
            if message.thought:
                is_in = message.thought in everything
                turns["with_reasoning" if is_in else "reasoning_left_out"] += 1
            if message.tool_calls and message.tool_calls[0].name in everything:
                turns["with_tool_calls"] += 1
        turns["without_end_of_turn"] = sum(not t.endswith(self._special) for t in supervised)
        return turns


def _untrimmed_encoder(tokenizer: Any) -> Any:
    """The tokenizer's backend with offsets that tile the text.

    A byte-level post-processor may cut a token's blanks from its offsets, and a token that
    begins before an answer would seem to begin in it. Chat templates write special tokens
    themselves, so that nothing else of a post-processor is needed.
    """
    encoder = copy.deepcopy(tokenizer.backend_tokenizer)
    encoder.post_processor = None
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _end_of_turn_pattern(special: Sequence[str], eos: str | None) -> re.Pattern[str]:
    """Matches any special token, or blanks and the end-of-sequence token behind them."""
    options = [re.escape(token) for token in sorted(special, key=len, reverse=True)]
    return re.compile("|".join([*options, rf"\s+{re.escape(eos)}"] if eos else options))
