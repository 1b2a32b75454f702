"""What answers: a target that continues token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt to continue."""

    token_ids: list[int]
    max_new_tokens: int
    seed: int
    """Of this answer's random numbers, whatever it is computed together with; below 2**63."""


@dataclass(frozen=True, slots=True)
class Generated:
    """What followed."""

    token_ids: list[int]
    """The token that ended it included."""
    is_finished: bool
    """Ended by the target itself, not by ``max_new_tokens``."""


class Generator(Protocol):
    """The target in an engine, with the run's sampling settings."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generated]:
        """Continue every prompt: one result each, in order.

        Raises:
            EngineError: The engine can't be used.
        """
        ...

    def close(self) -> None:
        """End what it has started. Safe to call twice."""
        ...
