"""Turns conversations into token ids and a loss mask, by the target's own chat template.

The whole conversation is rendered and tokenized once. What is supervised is found as spans of
the rendered *text* and mapped to tokens by the tokenizer's offsets; a prefix is never
tokenized by itself, because merges across the cut would give other tokens.
"""

import copy
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from torchspec_lib.data.conversations import Message
from torchspec_lib.errors import ConfigError, DataError

Span = tuple[int, int]
"""Characters ``[begin, end)`` of the rendered text."""

TEMPLATE_DATE = datetime(2025, 1, 1)
"""What ``strftime_now`` tells a template: the same data must give the same tokens tomorrow."""
REASONING_END = "</think>"
"""Templates that know reasoning cut an answer here, and drop what is before it in old turns."""
GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class EncodedChat(NamedTuple):
    """A tokenized conversation of ``T`` tokens."""

    token_ids: npt.NDArray[np.int32]
    """[T]"""
    loss_mask: npt.NDArray[np.bool_]
    """[T], true for the assistant's text and the special token that ends its turn."""


class ChatTokenizer:
    """A fast tokenizer with its chat template.

    A token is supervised when its first character lies in an assistant's answer, or when it is
    the end-of-turn token behind one.

    Raises:
        ConfigError: The tokenizer has no offsets (isn't *fast*), or no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        name = tokenizer.name_or_path or "the target"
        if not tokenizer.is_fast:
            raise ConfigError(
                "model.target",
                f"the tokenizer of {name} is not a fast one: it can't say which characters "
                "a token stands for",
                "Use a target with a tokenizer.json",
            )
        try:
            self._template: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise ConfigError(
                "model.target",
                f"the tokenizer of {name} has no default chat template",
                "Use the target's instruction-tuned version, or put a chat_template.jinja beside "
                "its tokenizer",
            ) from error
        self.tokenizer = tokenizer
        self._has_markers = GENERATION_MARKER.search(self._template) is not None
        self._encoder = _untrimmed_encoder(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        self._special = tuple(sorted(special | set(tokenizer.all_special_tokens)))
        self.special_ids: frozenset[int] = frozenset(
            tokenizer.convert_tokens_to_ids(list(self._special))
        )
        self._end_of_turn = _end_of_turn_pattern(self._special, tokenizer.eos_token)

    @classmethod
    def load(cls, folder: str, trust_remote_code: bool = False) -> Self:
        """The tokenizer of a model's folder."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))

    def encode(self, messages: Sequence[Message], where: str) -> EncodedChat:
        """Tokenize a conversation. ``where`` names it in errors.

        Raises:
            DataError: The template refuses it, or changes an answer beyond recognition.
        """
        text, marked_spans = self._render(messages, where)
        spans = marked_spans if self._has_markers else self._answer_spans(messages, text, where)
        encoding = self._encoder.encode(text, add_special_tokens=False)
        begins = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
        loss_mask = np.zeros(len(begins), dtype=np.bool_)
        for begin, end in spans:
            loss_mask |= (begins >= begin) & (begins < self._turn_end(text, begin, end))
        return EncodedChat(np.array(encoding.ids, dtype=np.int32), loss_mask)

    def prompt_ids(self, messages: Sequence[Message], where: str) -> npt.NDArray[np.int32]:
        """Token ids that ask the target for its answer to ``messages``.

        Raises:
            DataError: The template refuses them.
        """
        text, _ = self._render(messages, where, add_generation_prompt=True)
        return np.array(self._encoder.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def _render(
        self, messages: Sequence[Message], where: str, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text, and what the template itself marks as generated."""
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[[{"role": m.role, "content": m.content} for m in messages]],
                chat_template=self._template,
                return_assistant_tokens_mask=self._has_markers,
                add_generation_prompt=add_generation_prompt,
                strftime_now=TEMPLATE_DATE.strftime,
                **self.tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise DataError(
                where,
                f"the target's chat template refuses it: {error}",
                "Change its roles or their order, or remove it",
            ) from error
        texts, spans = rendered
        return texts[0], spans[0] if spans else []

    def _answer_spans(self, messages: Sequence[Message], text: str, where: str) -> list[Span]:
        """Where the answers lie in ``text``: rendered again with a mark at both of their ends.

        Without its marks the second text must equal the first. A template that strips answers
        would stop doing so at a mark, hence the second try with the marks inside the blanks.
        """
        left, right = _absent_characters(text)
        num_answers = sum(message.role == "assistant" for message in messages)
        for outside_blanks in (True, False):
            marked, _ = self._render(
                [_mark(message, left, right, outside_blanks) for message in messages], where
            )
            found = list(re.finditer(f"{left}([^{right}]*){right}", marked))
            is_same = marked.replace(left, "").replace(right, "") == text
            if is_same and len(found) == num_answers:
                break
        else:
            raise DataError(
                where,
                "the target's chat template changes the text of an answer, or leaves one out, so "
                "that what to train on can't be told",
                "Put {% generation %} around the answer in the template, or remove it",
            )
        answers = [
            (match.start() - 2 * i, match.start() - 2 * i + len(match[1]))
            for i, match in enumerate(found)
        ]
        turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
        return [
            self._with_reasoning(messages[: turn + 1], text, span, where)
            for turn, span in zip(turns, answers, strict=True)
        ]

    def _with_reasoning(
        self, messages: Sequence[Message], text: str, answer: Span, where: str
    ) -> Span:
        """Widen the last message's span by its reasoning, if the template has kept that."""
        content = messages[-1].content
        if REASONING_END not in content:
            return answer
        prompt, _ = self._render(messages[:-1], where, add_generation_prompt=True)
        generated = text[len(prompt) : answer[1]]
        is_own_text = "".join(content.split()).endswith("".join(generated.split()))
        return (len(prompt), answer[1]) if text.startswith(prompt) and is_own_text else answer

    def _turn_end(self, text: str, begin: int, end: int) -> int:
        """Where the turn of an answer at ``[begin, end)`` ends, its end-of-turn token included.

        A template may mark that token as generated or not, and the newline behind it too: both
        are put right, so that every draft learns to stop and none to go on after it.
        """
        answer = text[begin:end].rstrip()
        if answer.endswith(self._special):
            return begin + len(answer)
        behind = self._end_of_turn.match(text, end)
        return behind.end() if behind else end


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


def _absent_characters(text: str) -> tuple[str, str]:
    """Two characters of the private-use area that ``text`` doesn't hold."""
    present = set(text)
    absent = (c for c in map(chr, range(0xE000, 0xF900)) if c not in present)
    return next(absent), next(absent)


def _mark(message: Message, left: str, right: str, outside_blanks: bool) -> Message:
    """Put ``left`` and ``right`` around an assistant's answer, behind its reasoning."""
    if message.role != "assistant":
        return message
    reasoning, cut, answer = message.content.rpartition(REASONING_END)
    if outside_blanks:
        return Message("assistant", f"{reasoning}{cut}{left}{answer}{right}")
    body = answer.strip()
    start = answer.index(body)
    tail = answer[start + len(body) :]
    return Message("assistant", f"{reasoning}{cut}{answer[:start]}{left}{body}{right}{tail}")
