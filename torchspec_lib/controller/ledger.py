"""What became of every prompt of every epoch: the accounts of a run.

A *position* is a place in the order in which the whole run trains: epoch by epoch, each
epoch shuffled by the seed. Steps take positions in order, however late a sample arrives,
so that a run's steps depend on its inputs alone.
"""

from collections import Counter
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from torchspec_lib.errors import LedgerError


class State(IntEnum):
    """A position's way; it only ever moves down this list. The last three are final."""

    PENDING = 0
    CAPTURING = 1
    READY = 2
    DISPATCHED = 3
    TRAINED = 4
    REJECTED = 5
    NOT_TRAINED = 6
    """Left when the training was stopped early."""


_ALLOWED = {
    State.PENDING: {State.CAPTURING},
    State.CAPTURING: {State.READY, State.REJECTED},
    State.READY: {State.DISPATCHED},
    State.DISPATCHED: {State.TRAINED, State.REJECTED},
    State.TRAINED: set[State](),
    State.REJECTED: set[State](),
    State.NOT_TRAINED: set[State](),
}
_STATES = tuple(State)


class Ledger:
    """Every position ends in exactly one of {trained, rejected with a reason, not trained}."""

    def __init__(self, num_positions: int) -> None:
        self._states = bytearray(num_positions)
        self._counts = [num_positions] + [0] * (len(State) - 1)
        self._reasons: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._states)

    def state(self, position: int) -> State:
        return _STATES[self._states[position]]

    def count(self, state: State) -> int:
        return self._counts[state]

    def move(self, position: int, to: State, reason: str = "") -> None:
        """Put a position into its next state.

        Raises:
            LedgerError: It isn't in a state that leads there: something was done twice or skipped.
        """
        now = self.state(position)
        if to not in _ALLOWED[now]:
            raise LedgerError(f"position {position} can't go from {now.name} to {to.name}")
        self._put(position, now, to)
        if to is State.REJECTED:
            self._reasons[position] = reason

    def _put(self, position: int, now: State, to: State) -> None:
        self._states[position] = to
        self._counts[now] -= 1
        self._counts[to] += 1

    def rejections(self) -> dict[str, int]:
        """Rejected positions by reason."""
        return dict(Counter(self._reasons.values()).most_common())

    def leave_rest(self) -> None:
        """The training was stopped early: nothing more happens to what isn't settled."""
        for position, state in enumerate(self._states):
            if state < State.TRAINED:
                self._put(position, _STATES[state], State.NOT_TRAINED)

    def settle(self) -> None:
        """Check that the run is accounted for.

        Raises:
            LedgerError: A position is neither trained nor rejected, nor left.
        """
        open_states = {s.name: self.count(s) for s in State if s < State.TRAINED and self.count(s)}
        if open_states:
            raise LedgerError(
                f"of {len(self)} prompts {self.count(State.TRAINED)} were trained and "
                f"{self.count(State.REJECTED)} rejected, which leaves {open_states}"
            )

    def snapshot(self, cursor: int) -> dict[str, Any]:
        """The accounts after the step that ended before position ``cursor``, for a checkpoint."""
        rejected = {str(p): reason for p, reason in self._reasons.items() if p < cursor}
        return {"cursor": cursor, "rejected": rejected}

    def restore(self, snapshot: Mapping[str, Any]) -> int:
        """Take over a checkpoint's accounts; returns its cursor. For a fresh ledger only."""
        cursor, rejected = int(snapshot["cursor"]), snapshot["rejected"]
        if cursor > len(self):
            raise LedgerError(f"the checkpoint is at prompt {cursor} of {len(self)}")
        for position in range(cursor):
            reason = rejected.get(str(position))
            final = State.TRAINED if reason is None else State.REJECTED
            self._put(position, State.PENDING, final)
            if reason is not None:
                self._reasons[position] = reason
        return cursor


class EpochOrder:
    """Which prompt stands at a position: a seeded shuffle of each epoch."""

    def __init__(self, num_prompts: int, seed: int) -> None:
        self._num_prompts, self._seed = num_prompts, seed
        self._epoch = -1
        self._permutation: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """``(epoch, index of the prompt in the data set)``."""
        epoch, place = divmod(position, self._num_prompts)
        if epoch != self._epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._permutation = generator.permutation(self._num_prompts)
            self._epoch = epoch
        return epoch, int(self._permutation[place])
