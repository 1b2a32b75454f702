"""Decoding with a Hugging Face target: plainly, and with a draft's help (batch 1).

A target forward of the last emitted token and the tokens that a draft proposes behind it gives
the target's choice after each of them. Draft tokens are accepted as long as they are the choices,
and the first other choice is emitted in their place: so the output is plain decoding's, as far as
the target gives the same logits for one row at a time and for all rows at once.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchspec_lib.evaluation.acceptance import ChainCounts
from torchspec_lib.evaluation.drafting import Drafter
from torchspec_lib.evaluation.verification import CachedTarget, TargetChoice
from torchspec_lib.models.target_model import captured_outputs, decoder_parts


@dataclass(frozen=True, slots=True)
class Decoded:
    """What speculative decoding emitted, and how each proposal fared."""

    token_ids: list[int]
    accepted: tuple[int, ...]
    """Emitted draft tokens of each verification; see ``ChainCounts``."""

    @property
    def num_target_forwards(self) -> int:
        """The prompt's own included."""
        return 1 + len(self.accepted)

    @property
    def counts(self) -> ChainCounts:
        return ChainCounts(self.accepted, len(self.token_ids))


@torch.inference_mode()
def decode_plain(
    model: nn.Module, prompt_ids: Sequence[int], choose: TargetChoice, eos_ids: Collection[int]
) -> list[int]:
    """Decode one token a forward; an end-of-sequence token is the last one emitted."""
    target = CachedTarget(model, choose)
    emitted = [target.start(prompt_ids)]
    while len(emitted) < choose.max_new_tokens and emitted[-1] not in eos_ids:
        emitted.append(target.extend(emitted[-1]))
    return emitted


class SpeculativeDecoder:
    """Decodes with a drafter's help."""

    def __init__(
        self,
        model: nn.Module,
        choose: TargetChoice,
        aux_layer_ids: Sequence[int],
        drafter: Drafter,
    ) -> None:
        """``model``: a causal LM with ``model.layers``; layer ids count these from 0."""
        self._target, self._drafter = CachedTarget(model, choose), drafter
        self._max_new_tokens = choose.max_new_tokens
        _, layers, _ = decoder_parts(model)
        self._layers = [layers[i] for i in aux_layer_ids]

    @torch.inference_mode()
    def decode(self, prompt_ids: Sequence[int], eos_ids: Collection[int]) -> Decoded:
        """Emit what ``decode_plain`` emits."""
        with captured_outputs(self._layers) as states:
            emitted = [self._target.start(prompt_ids)]
            self._drafter.start()
            newest, aux_TA = [*prompt_ids[1:], *emitted], _concat(states)
            accepted = []
            while len(emitted) < self._max_new_tokens and emitted[-1] not in eos_ids:
                tree = self._drafter.propose(newest, aux_TA)
                choices = self._target.verify(emitted[-1], tree)
                rows = tree.accepted_rows(choices)
                newest, aux_TA = [choices[row] for row in rows], _concat(states)[rows]
                self._target.keep(rows, len(choices))
                kept = _until_end(newest, self._max_new_tokens - len(emitted), eos_ids)
                emitted += kept
                accepted.append(min(len(rows) - 1, len(kept)))
        return Decoded(emitted, tuple(accepted))


def length_of_agreement(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens of two sequences are the same from their start."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _concat(states: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(states), dim=-1)


def _until_end(token_ids: Sequence[int], room: int, eos_ids: Collection[int]) -> list[int]:
    """At most ``room`` tokens, and none after an end-of-sequence token."""
    kept = list(token_ids[:room])
    ends = [i for i, token in enumerate(kept) if token in eos_ids]
    return kept[: ends[0] + 1] if ends else kept
