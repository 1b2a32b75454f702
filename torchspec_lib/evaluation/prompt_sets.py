"""The prompts that a draft is measured with: the held-out ones, and named sets of benchmarks."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchspec_lib.config.outcome import HELDOUT
from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.data.conversations import Conversation, Message, Source, open_source
from torchspec_lib.data.dataset import load_heldout
from torchspec_lib.data.selection import HeldoutPrompt
from torchspec_lib.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts under a name, each with its category if it has one."""

    name: str
    prompts: tuple[HeldoutPrompt, ...]
    categories: tuple[str | None, ...]


def heldout_set(run: RunConfig, dataset_dir: Path) -> PromptSet:
    """The prompts of ``data.heldout``, from a prepared data set."""
    prompts = tuple(load_heldout(dataset_dir)[: run.evaluation.max_prompts])
    return PromptSet(HELDOUT, prompts, (None,) * len(prompts))


def named_sets(run: RunConfig, chat: ChatTokenizer) -> list[PromptSet]:
    """The prompts of ``evaluation.sets``, as the target is asked them.

    Raises:
        ConfigError: A source doesn't exist.
        DataError: A row is no conversation, or asks nothing; or none is short enough.
    """
    return [_read(name, source, run, chat) for name, source in _sources(run).items()]


def check_sets(run: RunConfig) -> None:
    """Read the files of ``evaluation.sets`` once, so that a broken line fails before a training.

    Raises:
        ConfigError: A source doesn't exist.
        DataError: A row is no conversation, or asks nothing; or a file holds none.
    """
    for source in _sources(run).values():
        if source.path is not None:
            for conversation in source.conversations(answered=False):
                _asked(conversation)


def set_digests(run: RunConfig) -> dict[str, str]:
    """What identifies the content of every set of ``evaluation.sets``.

    Raises:
        ConfigError: A source doesn't exist.
        DataError: One has an unknown format.
    """
    return {name: source.digest() for name, source in _sources(run).items()}


def digest_name(name: str, prompts: Sequence[HeldoutPrompt]) -> str:
    """Names prompts by their tokens, so that equal names mean equal prompts.

    Example:
        ``"heldout-3f9a0c12 (100 prompts)"``
    """
    digest = hashlib.sha256(b"".join(p.prompt_token_ids.tobytes() + b"\n" for p in prompts))
    return f"{name}-{digest.hexdigest()[:8]} ({len(prompts)} prompts)"


def _sources(run: RunConfig) -> dict[str, Source]:
    return {
        name: open_source(source, run.data.split, f"evaluation.sets.{name}")
        for name, source in run.evaluation.sets.items()
    }


def _read(name: str, source: Source, run: RunConfig, chat: ChatTokenizer) -> PromptSet:
    prompts: list[HeldoutPrompt] = []
    categories: list[str | None] = []
    num_too_long = 0
    for conversation in source.conversations(answered=False):
        if len(prompts) == run.evaluation.max_prompts:
            break
        prompt = _question(f"{name}/{len(prompts) + num_too_long}", conversation, chat)
        if len(prompt.prompt_token_ids) > run.data.max_length:
            num_too_long += 1
            continue
        prompts.append(prompt)
        categories.append(conversation.category)
    if num_too_long:
        logger.warning("event=prompts_too_long set=%s left_out=%d", name, num_too_long)
    if not prompts:
        raise DataError(
            f"evaluation.sets.{name}",
            f"all of its prompts are longer than data.max_length ({run.data.max_length})",
            "Raise it, or leave the set out",
        )
    return PromptSet(name, tuple(prompts), tuple(categories))


def _question(prompt_id: str, conversation: Conversation, chat: ChatTokenizer) -> HeldoutPrompt:
    messages, asked = conversation.messages, _asked(conversation)
    question = [message.content for message in asked if message.role == "user"][-1]
    token_ids = chat.prompt_ids(asked, conversation.where, conversation.tools)
    reference = messages[-1].content if len(asked) < len(messages) else ""
    return HeldoutPrompt(prompt_id, token_ids, question, reference)


def _asked(conversation: Conversation) -> tuple[Message, ...]:
    """All of a conversation but an answer at its end."""
    messages = conversation.messages
    asked = messages[: len(messages) - (messages[-1].role == "assistant")]
    if not any(message.role == "user" for message in asked):
        raise DataError(
            conversation.where, "asks nothing before its answer", "Add a user message, or remove it"
        )
    return asked
