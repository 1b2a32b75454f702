"""Trees as in EAGLE-2 (arXiv 2406.16858, section 4), with SGLang's three settings.

Shapes: ``K`` branches that are followed at a depth, ``H`` hidden size, ``Vd`` draft vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from torchspec_lib.errors import ConfigError
from torchspec_lib.evaluation.drafting import DraftRunner, DraftTree
from torchspec_lib.models.eagle3 import Branches, Eagle3Draft


@dataclass(frozen=True, slots=True)
class TreeShape:
    """How a tree grows."""

    steps: int
    """Depths, each a forward of the draft. SGLang's ``speculative_num_steps``."""
    topk: int
    """Branches that are followed at every depth, and tokens tried behind each of them. SGLang's
    ``speculative_eagle_topk``."""
    num_draft_tokens: int
    """Rows that the target verifies at once, the newest token's included. SGLang's
    ``speculative_num_draft_tokens``."""


@dataclass(slots=True)
class _Nodes:
    """All tokens that were tried, parents before their children; a node's row is its place + 1."""

    token_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    """Log-probability of the whole path, by the draft."""

    def best(self, count: int) -> DraftTree:
        """The likeliest nodes. No child is likelier than its parent, so that they are a tree."""
        ranked = sorted(range(len(self.scores)), key=lambda node: -self.scores[node])  # stable
        nodes = sorted(ranked[:count])
        rows = {0: 0} | {node + 1: row for row, node in enumerate(nodes, start=1)}
        return DraftTree(
            tuple(self.token_ids[node] for node in nodes),
            tuple(rows[self.parents[node]] for node in nodes),
        )


class TreeDrafter:
    """A draft that proposes the likeliest tokens of a tree, by the probability of their paths.

    At each depth the ``topk`` likeliest of the tokens tried last are followed, and ``topk``
    tokens tried behind each. Of all that were tried, the ``num_draft_tokens - 1`` likeliest are
    proposed. With ``topk`` 1 that is the greedy chain.
    """

    def __init__(
        self,
        draft: Eagle3Draft,
        embed: nn.Module,
        draft_vocab: npt.NDArray[np.int64] | None,
        shape: TreeShape,
    ) -> None:
        """As ``DraftRunner``.

        Raises:
            ConfigError: The draft has fewer tokens than the tree has branches.
        """
        vocab_size = draft.config.draft_vocab_size
        if shape.topk > vocab_size:
            raise ConfigError(
                "evaluation.draft_topk",
                f"{shape.topk} exceeds the draft's {vocab_size} tokens",
                "Lower it",
            )
        self._runner, self._shape = DraftRunner(draft, embed, draft_vocab), shape

    def start(self) -> None:
        self._runner.start()

    def propose(self, token_ids: Sequence[int], aux_TA: Tensor) -> DraftTree:
        """See ``Drafter``; ``steps`` forwards of the draft."""
        states_KH, nodes = self._runner.read(token_ids, aux_TA), _Nodes()
        branches = Branches(self._runner.cache)
        # The root is the one branch at first: certain, and in row 0.
        rows, scores_K = [0], torch.zeros(1, device=self._runner.device)
        for depth in range(self._shape.steps):
            scores_KN, ids_KN = self._likeliest(states_KH, scores_K)
            first_row = len(nodes.token_ids) + 1
            nodes.token_ids += [self._runner.target_id(i) for i in ids_KN.flatten().tolist()]
            nodes.parents += [row for row in rows for _ in range(self._shape.topk)]
            nodes.scores += scores_KN.flatten().tolist()
            if depth + 1 == self._shape.steps:
                break
            scores_K, chosen_K = scores_KN.flatten().topk(self._shape.topk)
            rows = [first_row + place for place in chosen_K.tolist()]
            branch_K = chosen_K // self._shape.topk
            branches.follow(branch_K)
            tokens = [nodes.token_ids[row - 1] for row in rows]
            states_KH = self._runner.draft.decode_branches(
                self._runner.embed(tokens), states_KH[branch_K], branches
            )
        return nodes.best(self._shape.num_draft_tokens - 1)

    def _likeliest(self, states_KH: Tensor, scores_K: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [K, topk] of the likeliest tokens behind each branch, and their draft ids."""
        log_probs_KVd = self._runner.draft.logits(states_KH).float().log_softmax(-1)
        log_probs_KN, ids_KN = log_probs_KVd.topk(self._shape.topk)
        return scores_K[:, None] + log_probs_KN, ids_KN
