"""The tiny target's corpus: short chats, endless, and the same for the same seed.

Standard library only. What is asked and answered stands in ``families.py``.
"""

import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from random import Random

from examples.tiny_target.families import FAMILIES

Conversation = dict[str, list[dict[str, str]]]
"""One chat in OpenAI form: ``{"messages": [{"role": "user", "content": "..."}, ...]}``."""

HELDOUT_SEED, TRAIN_SEED = 20_000, 10_000
NUM_HELDOUT, NUM_TRAIN = 100, 2_200
TWO_TURN_SHARE = 0.15


def conversations(seed: int, exclude: Collection[str] = ()) -> Iterator[Conversation]:
    """The endless corpus that ``seed`` names, without any question in ``exclude``."""
    rng = Random(seed)
    while True:
        exchanges = _distinct_exchanges(rng, 2 if rng.random() < TWO_TURN_SHARE else 1)
        if not any(question in exclude for question in exchanges):
            yield _conversation(exchanges)


def heldout_conversations() -> list[Conversation]:
    """Single-turn conversations whose questions no training corpus contains."""
    exchanges = _distinct_exchanges(Random(HELDOUT_SEED), NUM_HELDOUT)
    return [_conversation({question: answer}) for question, answer in exchanges.items()]


def questions(chats: Collection[Conversation]) -> frozenset[str]:
    """Every user text in ``chats``."""
    return frozenset(
        message["content"]
        for chat in chats
        for message in chat["messages"]
        if message["role"] == "user"
    )


def unanswered(chat: Conversation) -> Conversation:
    """A conversation's questions alone."""
    return {"messages": [message for message in chat["messages"] if message["role"] == "user"]}


def write_jsonl(path: Path, chats: Iterable[Conversation]) -> None:
    """One conversation a line."""
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))


def _distinct_exchanges(rng: Random, num_exchanges: int) -> dict[str, str]:
    """Answers by question."""
    exchanges: dict[str, str] = {}
    while len(exchanges) < num_exchanges:
        (family,) = rng.choices(list(FAMILIES), weights=list(FAMILIES.values()))
        question, answer = family(rng)
        exchanges[question] = answer
    return exchanges


def _conversation(exchanges: dict[str, str]) -> Conversation:
    turns = (zip(("user", "assistant"), exchange, strict=True) for exchange in exchanges.items())
    return {"messages": [{"role": role, "content": text} for turn in turns for role, text in turn]}
