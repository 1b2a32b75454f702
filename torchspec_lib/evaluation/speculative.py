"""Greedy decoding with a Hugging Face target: plainly, and with chains of a draft (batch 1).

Shapes: ``T`` new rows, ``A`` width of the concatenated auxiliary states, ``H`` hidden size.

A target forward of the last emitted token and K draft tokens gives K + 1 greedy choices. Draft
tokens are accepted as long as they equal the choices, and the first other choice is emitted in
their place: so the output is plain greedy decoding's (Leviathan et al. 2023, arXiv 2211.17192),
as far as the target gives the same choice for one row at a time and for K + 1 rows at once.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from torchspec_lib.evaluation.acceptance import ChainCounts
from torchspec_lib.models.eagle3 import Eagle3Draft, KeyValueCache
from torchspec_lib.models.target_model import captured_outputs, decoder_parts


class Drafter(Protocol):
    """Proposes what a target will emit next."""

    def start(self) -> None:
        """Begin a new document."""
        ...

    def propose(self, token_ids: Sequence[int], aux_TA: Tensor) -> list[int]:
        """Propose K tokens to follow ``token_ids``, the T newest tokens of the document.

        Row t of ``aux_TA`` holds the target's auxiliary states at the position *before* token
        t. The first call of a document has all its tokens but the first.
        """
        ...


@dataclass(frozen=True, slots=True)
class Decoded:
    """What speculative decoding emitted, and how each chain fared."""

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


class CachedTarget:
    """A causal LM and the keys and values of one document's tokens so far."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._device = next(model.parameters()).device
        self._cache = DynamicCache()

    def start(self, prompt_ids: Sequence[int]) -> int:
        """Begin a document; gives the greedy first token after the prompt."""
        self._cache = DynamicCache()
        return self._greedy(prompt_ids, logits_to_keep=1)[0]

    def extend(self, token_ids: Sequence[int]) -> list[int]:
        """Run tokens; gives the greedy choice after each of them."""
        return self._greedy(token_ids, logits_to_keep=len(token_ids))

    def forget(self, num_tokens: int) -> None:
        """Take back the newest tokens."""
        if num_tokens:
            self._cache.crop(-num_tokens)

    def _greedy(self, token_ids: Sequence[int], logits_to_keep: int) -> list[int]:
        out = self._model(
            input_ids=torch.tensor([list(token_ids)], device=self._device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        )
        greedy: list[int] = out.logits[0].argmax(-1).tolist()
        return greedy


@torch.inference_mode()
def decode_plain(
    model: nn.Module, prompt_ids: Sequence[int], max_new_tokens: int, eos_ids: Collection[int]
) -> list[int]:
    """Decode greedily, one token a forward; an end-of-sequence token is the last one emitted."""
    target = CachedTarget(model)
    emitted = [target.start(prompt_ids)]
    while len(emitted) < max_new_tokens and emitted[-1] not in eos_ids:
        emitted += target.extend(emitted[-1:])
    return emitted


class SpeculativeDecoder:
    """Decodes greedily with a drafter's help."""

    def __init__(self, model: nn.Module, aux_layer_ids: Sequence[int], drafter: Drafter) -> None:
        """``model``: a causal LM with ``model.layers``; layer ids count these from 0."""
        self._target, self._drafter = CachedTarget(model), drafter
        _, layers, _ = decoder_parts(model)
        self._layers = [layers[i] for i in aux_layer_ids]

    @torch.inference_mode()
    def decode(
        self, prompt_ids: Sequence[int], max_new_tokens: int, eos_ids: Collection[int]
    ) -> Decoded:
        """Emit what ``decode_plain`` emits."""
        with captured_outputs(self._layers) as states:
            emitted = [self._target.start(prompt_ids)]
            self._drafter.start()
            newest, aux_TA = [*prompt_ids[1:], *emitted], _concat(states)
            accepted = []
            while len(emitted) < max_new_tokens and emitted[-1] not in eos_ids:
                chain = self._drafter.propose(newest, aux_TA)
                choices = self._target.extend([emitted[-1], *chain])
                num_right = length_of_agreement(chain, choices)
                newest, aux_TA = choices[: num_right + 1], _concat(states)[: num_right + 1]
                self._target.forget(len(chain) - num_right)
                kept = _until_end(newest, max_new_tokens - len(emitted), eos_ids)
                emitted += kept
                accepted.append(min(num_right, len(kept)))
        return Decoded(emitted, tuple(accepted))


class ChainDrafter:
    """A draft that proposes a greedy chain.

    Its cache keeps only rows that were made from the target's own states; those of a chain,
    made from the draft's, are dropped when the chain is complete.
    """

    def __init__(
        self,
        draft: Eagle3Draft,
        embed: nn.Module,
        draft_vocab: npt.NDArray[np.int64] | None,
        draft_steps: int,
    ) -> None:
        """``embed`` is the target's input embedding, ``draft_vocab`` [Vd] ascending target ids."""
        self._draft, self._embed, self._draft_steps = draft, embed, draft_steps
        self._target_ids = None if draft_vocab is None else draft_vocab.tolist()
        self._device = next(draft.parameters()).device
        self._cache = KeyValueCache()

    def start(self) -> None:
        self._cache = KeyValueCache()

    def propose(self, token_ids: Sequence[int], aux_TA: Tensor) -> list[int]:
        """See ``Drafter``; K forwards of the draft."""
        out_TH = self._decode(token_ids, self._draft.project(aux_TA))
        num_real_rows = self._cache.length
        chain = [self._choose(out_TH)]
        while len(chain) < self._draft_steps:
            out_TH = self._decode(chain[-1:], out_TH[-1:])
            chain.append(self._choose(out_TH))
        self._cache.truncate(num_real_rows)
        return chain

    def _decode(self, token_ids: Sequence[int], states_TH: Tensor) -> Tensor:
        first = self._cache.length
        positions_T = torch.arange(first, first + len(token_ids), device=self._device)
        embeds_TH = self._embed(torch.tensor(list(token_ids), device=self._device))
        return self._draft.decode(embeds_TH, states_TH, positions_T, self._cache)

    def _choose(self, out_TH: Tensor) -> int:
        """The target id of the last row's likeliest token."""
        draft_id = int(self._draft.logits(out_TH[-1:])[0].argmax())
        return draft_id if self._target_ids is None else int(self._target_ids[draft_id])


def _concat(states: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(states), dim=-1)


def length_of_agreement(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens of two sequences are the same from their start."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _until_end(token_ids: Sequence[int], room: int, eos_ids: Collection[int]) -> list[int]:
    """At most ``room`` tokens, and none after an end-of-sequence token."""
    kept = list(token_ids[:room])
    ends = [i for i, token in enumerate(kept) if token in eos_ids]
    return kept[: ends[0] + 1] if ends else kept
