"""What an engine is to the rest: prompts in, samples in the store, one result for each prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torchspec_lib.types import CaptureRequest, CaptureResult


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """How well an engine's captured states rebuild the target's own logits."""

    num_tokens: int
    max_relative_error: float
    """Largest logit difference over the largest logit."""
    argmax_agreement: float


class InferenceEngine(Protocol):
    """Runs the frozen target over prompts and leaves its hidden states in the store."""

    def capture(self, requests: Sequence[CaptureRequest]) -> list[CaptureResult]:
        """Capture ``requests``: one result each, in order.

        A prompt that can't be captured comes back as a ``CaptureFailure``; an exception means
        that the engine itself is unusable.
        """
        ...

    def self_check(self) -> SelfCheck:
        """Capture a prompt, and rebuild the target's logits from what a trainer would read.

        Raises:
            EngineError: They differ: a layer off by one, a missing norm, a wrong dtype or order.
        """
        ...

    def close(self) -> None:
        """Free the device; the store is its owner's to close. The last call."""
        ...
