"""Acceptance figures of real speculative decoding, from counts. No torch.

After the prompt's own forward, which gives the first new token with or without a draft, each
target forward verifies a chain of K draft tokens: it accepts the first ``a`` of them and adds
a token of its own, so it emits ``a + 1`` tokens.

Only a prompt's last verification can be cut short, where end of sequence or the token limit
falls on an accepted draft token. It then emits its ``a`` accepted tokens alone, and what lies
behind them was never put to the test: it counts neither as accepted nor as refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class ChainCounts:
    """How one prompt's chains fared.

    Example:
        ``ChainCounts(accepted=(5, 0, 2), num_new_tokens=10)``: 1 token of the prompt's forward,
        6, 1, and 2 of a last verification that was cut short (uncut it would have emitted 3).
    """

    accepted: tuple[int, ...]
    """Emitted draft tokens of each verification."""
    num_new_tokens: int
    """All emitted tokens, the prompt's forward's included."""

    def __post_init__(self) -> None:
        most = 1 if any(self.accepted[-1:]) else 0  # a cut verification emits draft tokens only
        if not 0 <= self._surplus <= most:
            raise ValueError(
                f"{self.num_new_tokens} new tokens can't come from accepting {self.accepted}"
            )

    @property
    def last_is_cut(self) -> bool:
        return self._surplus == 1

    @property
    def _surplus(self) -> int:
        return 1 + sum(a + 1 for a in self.accepted) - self.num_new_tokens


@dataclass(frozen=True, slots=True)
class ServedCounts:
    """The same as an engine tells it: how often so many tokens were accepted, and not when.

    A last verification that was cut short counts whole here: what lies behind the end was put to
    the test.

    Example:
        ``ServedCounts(accepted=(0, 2, 5), num_new_tokens=8)``: 1 token of the prompt's forward,
        and 10 of three verifications, 3 of them behind the end.
    """

    accepted: tuple[int, ...]
    """Accepted draft tokens of each verification, in no order."""
    num_new_tokens: int
    """All emitted tokens, the prompt's forward's included."""
    last_is_cut: ClassVar[bool] = False

    def __post_init__(self) -> None:
        surplus = 1 + sum(a + 1 for a in self.accepted) - self.num_new_tokens
        if not 0 <= surplus <= max(self.accepted, default=0):  # the last one emitted something
            raise ValueError(
                f"{self.num_new_tokens} new tokens can't come from accepting {self.accepted}"
            )


def accept_length(counts: Sequence[ChainCounts | ServedCounts]) -> float:
    """New tokens per target forward after the prompt's, the target's own token included.

    Plain decoding has 1.0. The tokens that a cut last verification had no room for aren't
    counted, its forward is: so short answers lie below ``1 + c_0 + c_0 c_1 + ...`` of their
    ``accept_rates``, which is what an endless answer would reach.

    Returns:
        A number in ``[1, 1 + K]``; 1.0 where every answer ended with its first token.

    Example:
        >>> accept_length([ChainCounts((5, 0, 2), 10)])
        3.0
    """
    num_forwards = sum(len(c.accepted) for c in counts)
    num_new_tokens = sum(c.num_new_tokens - 1 for c in counts)
    return num_new_tokens / num_forwards if num_forwards else 1.0


def accept_rates(
    counts: Sequence[ChainCounts | ServedCounts], draft_steps: int
) -> tuple[float, ...]:
    """``[k]``: share of chains accepted up to position k-1 whose token k is accepted too.

    0.0 where no chain got as far as k. K is ``draft_steps``.

    Example:
        >>> accept_rates([ChainCounts((2, 0, 1), 7), ChainCounts((1,), 2)], 2)
        (0.75, 0.5)
    """
    tried, right = [0] * draft_steps, [0] * draft_steps
    for chain in counts:
        last = len(chain.accepted) - 1
        for verification, accepted in enumerate(chain.accepted):
            refuses_next = not (chain.last_is_cut and verification == last)
            for position in range(min(accepted + refuses_next, draft_steps)):
                tried[position] += 1
                right[position] += position < accepted
    return tuple(r / t if t else 0.0 for r, t in zip(right, tried, strict=True))
