"""The records that the parts hand each other. Metadata only: no tensor, no torch.

A *prompt* goes into an engine, a *sample* (the captured hidden states) comes out.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A tokenized conversation, and which of its tokens the draft is trained on.

    Example:
        ``Prompt("3f9a0c…", token_ids=[1, 52, 7, 2, 9, 3], loss_mask=[0, 0, 0, 1, 1, 1])``
    """

    prompt_id: str
    token_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a stored tensor: ``TensorSpec((57, 384), "bfloat16")``."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class SampleKey:
    """Names one attempt at capturing a prompt in an epoch. Never used twice.

    Example:
        ``str(SampleKey("run7.1", 0, "3f9a", 1, "c0ffee00")) == "run7.1/0-3f9a/1-c0ffee00"``
    """

    run_id: str
    """The run's, and which start of its trainers asked for the sample: see ``start_id``."""
    epoch: int
    prompt_id: str
    attempt: int
    nonce: str

    @classmethod
    def first(cls, run_id: str, epoch: int, prompt_id: str) -> Self:
        return cls(run_id, epoch, prompt_id, attempt=1, nonce=secrets.token_hex(4))

    def next_attempt(self) -> Self:
        return replace(self, attempt=self.attempt + 1, nonce=secrets.token_hex(4))

    def __str__(self) -> str:
        return f"{self.run_id}/{self.epoch}-{self.prompt_id}/{self.attempt}-{self.nonce}"


def start_id(run_id: str, number: int) -> str:
    """What the samples of a run's ``number``-th start are known by. Starts share the store."""
    return f"{run_id}.{number}"


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where a captured sample lies, and what it holds.

    ``tensors`` has, for ``T`` tokens: ``input_ids`` int32 [T], ``loss_mask`` bool [T],
    ``aux_hidden_states`` [T, n*Ht] (layers ascending) and ``last_hidden_states`` [T, Ht]
    (after the target's final norm).
    """

    key: SampleKey
    num_bytes: int
    num_tokens: int
    tensors: Mapping[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """A prompt for an engine, and the key its sample shall have."""

    key: SampleKey
    prompt: Prompt


Fault = Literal["prompt", "engine", "store"]
"""Who is to blame for a failed capture. The prompt: no engine can capture it. The engine: another
attempt may succeed. The store: it was full or away, and the prompt is tried until it is back."""


@dataclass(frozen=True, slots=True)
class CaptureFailure:
    """Why an attempt gave no sample."""

    key: SampleKey
    reason: str
    fault: Fault


CaptureResult = SampleRef | CaptureFailure

MicroBatch = tuple[SampleRef, ...]
"""Samples that a rank packs into one forward and backward; may be empty."""


@dataclass(frozen=True, slots=True)
class StepManifest:
    """What each rank trains in one step: equally many micro-batches for every rank.

    ``per_rank[r][m]`` is micro-batch ``m`` of rank ``r``. Steps count from 1.
    """

    step: int
    per_rank: tuple[tuple[MicroBatch, ...], ...]


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """A finished step, summed over all ranks.

    ``chains[k]`` counts supervised chains right up to depth k-1, ``matches[k]`` those of them
    that are right at depth k too. Loss in nats; ``wait_s`` is how long rank 0 waited for samples.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    chains: tuple[int, ...]
    matches: tuple[int, ...]
    num_samples: int
    num_tokens: int
    num_loss_tokens: int
    step_s: float
    wait_s: float

    @property
    def accept_rates(self) -> tuple[float, ...]:
        """``[k]``: share of chains right up to depth k-1 that are right at depth k too."""
        pairs = zip(self.matches, self.chains, strict=True)
        return tuple(right / chains if chains else 0.0 for right, chains in pairs)

    @property
    def accept_length(self) -> float:
        return accept_length(self.accept_rates)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one rank says when a step is done: which samples it trained, which it couldn't."""

    step: int
    rank: int
    trained: tuple[SampleKey, ...]
    rejected: tuple[CaptureFailure, ...]
    metrics: StepMetrics | None
    """From rank 0 only; the figures are the same on every rank."""


@dataclass(frozen=True, slots=True)
class Accounts:
    """What the controller says of the run after a step, for that step's checkpoint."""

    ledger: Mapping[str, Any]
    """JSON-able: what was trained and what was rejected."""
    accept_length: float
    """Simulated, over the steps since the accounts were last asked for."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """A sign of life."""

    progress: int
    """Differs from the last one's if anything has moved since."""
    doing: tuple[str, ...]
    """What each part does or waits for, for people."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """A part of a run that was lost, and worked again ``seconds`` after that was noticed."""

    part: str
    """Such as ``engine 0``, ``trainers``, ``mooncake_client on 10.0.0.7``."""
    cause: str
    seconds: float


def accept_length(accept_rates: tuple[float, ...] | list[float]) -> float:
    """Expected tokens per verification step, the target's own token included.

    Position ``i`` is accepted only where every earlier one was, so the expectation is
    ``1 + r0 + r0*r1 + ...``: what SGLang reports as ``accept_length``.

    Args:
        accept_rates: ``accept_rates[i]`` is the share of draft tokens at position ``i`` that
            the target accepts, given that it accepted those before. Each in [0, 1].

    Returns:
        A number in ``[1, 1 + len(accept_rates)]``.

    Raises:
        ValueError: A rate lies outside [0, 1].

    Example:
        >>> accept_length([0.5, 0.5])
        1.75
    """
    total = chain = 1.0
    for rate in accept_rates:
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"accept rate {rate} lies outside [0, 1]")
        chain *= rate
        total += chain
    return total


def pooled_accept_length(steps: Sequence[StepMetrics]) -> float:
    """Accept length over several steps, from their counts taken together."""
    chains = [sum(depth) for depth in zip(*(step.chains for step in steps), strict=True)]
    matches = [sum(depth) for depth in zip(*(step.matches for step in steps), strict=True)]
    return accept_length([m / c if c else 0.0 for m, c in zip(matches, chains, strict=True)])
