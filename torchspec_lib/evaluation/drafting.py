"""What a draft proposes: a tree of tokens, or the simplest one, a chain.

Shapes: ``T`` new rows, ``V`` target vocabulary, ``A`` width of the concatenated auxiliary states,
``H`` hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from torchspec_lib.models.eagle3 import Eagle3Draft, KeyValueCache


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Tokens that may follow the newest one of a document.

    Row 0 of a verification is that newest token, and row i + 1 is ``token_ids[i]``.

    Example:
        ``DraftTree((7, 8, 9), (0, 0, 1))``: 7 or 8 comes next, and 9 behind the 7.
    """

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]
    """``[i]``: the row that token i follows, an earlier one."""

    @classmethod
    def chain(cls, token_ids: Sequence[int]) -> Self:
        """Each token follows the one before."""
        return cls(tuple(token_ids), tuple(range(len(token_ids))))

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(len(self.parents)))

    def depths(self) -> list[int]:
        """Of every row: how many rows above it, row 0 included."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return depths

    def accepted_rows(self, choices: Sequence[int]) -> list[int]:
        """Row 0, and the path behind it that the target agrees with.

        Args:
            choices: The token that the target puts behind each row. The last accepted row's is
                the target's own: no row has it.
        """
        behind = {
            (parent, token): row
            for row, (parent, token) in enumerate(
                zip(self.parents, self.token_ids, strict=True), start=1
            )
        }
        rows = [0]
        while (row := behind.get((rows[-1], choices[rows[-1]]))) is not None:
            rows.append(row)
        return rows


class Drafter(Protocol):
    """Proposes what a target will emit next."""

    def start(self) -> None:
        """Begin a new document."""
        ...

    def propose(self, token_ids: Sequence[int], aux_TA: Tensor) -> DraftTree:
        """Propose tokens to follow ``token_ids``, the T newest tokens of the document.

        Row t of ``aux_TA`` holds the target's auxiliary states at the position *before* token
        t. The first call of a document has all its tokens but the first.
        """
        ...


class DraftRunner:
    """A draft beside its target's embedding, and what it has seen of a document.

    Its cache keeps only rows that were made from the target's own states. Those of a proposal,
    made from the draft's, don't outlive it.
    """

    def __init__(
        self, draft: Eagle3Draft, embed: nn.Module, draft_vocab: npt.NDArray[np.int64] | None
    ) -> None:
        """``embed`` is the target's input embedding, ``draft_vocab`` [Vd] ascending target ids."""
        self.draft, self._embed = draft, embed
        self._target_ids = None if draft_vocab is None else draft_vocab.tolist()
        self.device = next(draft.parameters()).device
        self.cache = KeyValueCache()

    def start(self) -> None:
        """Begin a new document."""
        self.cache = KeyValueCache()

    def read(self, token_ids: Sequence[int], aux_TA: Tensor) -> Tensor:
        """Take in the document's newest tokens; see ``Drafter``. Gives the last row [1, H]."""
        return self.extend(token_ids, self.draft.project(aux_TA))[-1:]

    def extend(self, token_ids: Sequence[int], states_TH: Tensor) -> Tensor:
        """Run rows behind all that is cached; they are cached too."""
        first = self.cache.length
        positions_T = torch.arange(first, first + len(token_ids), device=self.device)
        return self.draft.decode(self.embed(token_ids), states_TH, positions_T, self.cache)

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        embeds_TH: Tensor = self._embed(torch.tensor(list(token_ids), device=self.device))
        return embeds_TH

    def target_id(self, draft_id: int) -> int:
        return draft_id if self._target_ids is None else int(self._target_ids[draft_id])


class ChainDrafter:
    """A draft that proposes a greedy chain."""

    def __init__(
        self,
        draft: Eagle3Draft,
        embed: nn.Module,
        draft_vocab: npt.NDArray[np.int64] | None,
        draft_steps: int,
    ) -> None:
        """As ``DraftRunner``; ``draft_steps`` is the chain's length K."""
        self._runner, self._draft_steps = DraftRunner(draft, embed, draft_vocab), draft_steps

    def start(self) -> None:
        self._runner.start()

    def propose(self, token_ids: Sequence[int], aux_TA: Tensor) -> DraftTree:
        """See ``Drafter``; K forwards of the draft."""
        out_1H = self._runner.read(token_ids, aux_TA)
        num_real_rows = self._runner.cache.length
        chain = [self._choose(out_1H)]
        while len(chain) < self._draft_steps:
            out_1H = self._runner.extend(chain[-1:], out_1H)
            chain.append(self._choose(out_1H))
        self._runner.cache.truncate(num_real_rows)
        return DraftTree.chain(chain)

    def _choose(self, out_1H: Tensor) -> int:
        """The target id of the row's likeliest token."""
        return self._runner.target_id(int(self._runner.draft.logits(out_1H)[0].argmax()))
