"""Decoding with a Hugging Face target: plainly, and with chains of a draft (batch 1).

Shapes: ``T`` new rows, ``V`` target vocabulary, ``A`` width of the concatenated auxiliary
states, ``H`` hidden size.

A target forward of the last emitted token and K draft tokens gives K + 1 choices of the target's.
Draft tokens are accepted as long as they equal the choices, and the first other choice is emitted
in their place: so the output is plain decoding's, as far as the target gives the same logits for
one row at a time and for K + 1 rows at once. A draft's chain is greedy, so a token x of it is
accepted with the probability p(x) that the target would have drawn it, and in its place comes a
draw from p without x: the exact rule of speculative sampling (Leviathan et al. 2023,
arXiv 2211.17192, section 2.3, for a draft that is certain), as engines have it for EAGLE.
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


class TargetChoice:
    """Chooses new tokens from the target's logits.

    Above temperature 0 the n-th new token after a prompt is drawn, by inversion, with the n-th of
    random numbers that follow from seed and prompt: so that all ways to decode it, in whatever
    strides, give the same answer.
    """

    def __init__(self, temperature: float, max_new_tokens: int, seed: int = 0) -> None:
        """``temperature`` 0 is greedy. ``max_new_tokens``: how many an answer has at most."""
        self._temperature, self._seed = temperature, seed
        self.max_new_tokens = max_new_tokens
        self._numbers_N = torch.empty(0)

    def start(self, prompt_ids: Sequence[int]) -> None:
        """Begin an answer."""
        generator = np.random.default_rng([self._seed, *prompt_ids])
        self._numbers_N = torch.from_numpy(generator.random(self.max_new_tokens, dtype=np.float32))

    def __call__(self, logits_TV: Tensor, first: int) -> list[int]:
        """A token for every row; the rows belong to new tokens ``first``, ``first`` + 1, ..."""
        if self._temperature == 0.0:
            greedy: list[int] = logits_TV.argmax(-1).tolist()
            return greedy
        # What a chain proposes beyond the limit is cut off later, so any number will do there.
        places_T = torch.arange(first, first + len(logits_TV)).clamp(max=self.max_new_tokens - 1)
        numbers_T = self._numbers_N[places_T].to(logits_TV.device)
        shares_TV = (logits_TV.float() / self._temperature).softmax(-1).cumsum(-1)
        shares_TV = shares_TV / shares_TV[:, -1:]
        drawn: list[int] = torch.searchsorted(shares_TV, numbers_T[:, None], right=True)[
            :, 0
        ].tolist()
        return drawn


class CachedTarget:
    """A causal LM, and the keys and values and number of new tokens of one document so far."""

    def __init__(self, model: nn.Module, choose: TargetChoice) -> None:
        self._model: Any = model
        self._device = next(model.parameters()).device
        self._cache, self._choose, self._num_new = DynamicCache(), choose, 0

    def start(self, prompt_ids: Sequence[int]) -> int:
        """Begin a document; gives the first token after the prompt."""
        self._cache, self._num_new = DynamicCache(), 0
        self._choose.start(prompt_ids)
        return self._choices(prompt_ids, logits_to_keep=1)[0]

    def extend(self, token_ids: Sequence[int]) -> list[int]:
        """Run tokens; gives the target's choice after each of them."""
        return self._choices(token_ids, logits_to_keep=len(token_ids))

    def forget(self, num_tokens: int) -> None:
        """Take back the newest tokens."""
        if num_tokens:
            self._cache.crop(-num_tokens)
            self._num_new -= num_tokens

    def _choices(self, token_ids: Sequence[int], logits_to_keep: int) -> list[int]:
        out = self._model(
            input_ids=torch.tensor([list(token_ids)], device=self._device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        )
        choices = self._choose(out.logits[0], self._num_new)
        self._num_new += logits_to_keep
        return choices


@torch.inference_mode()
def decode_plain(
    model: nn.Module, prompt_ids: Sequence[int], choose: TargetChoice, eos_ids: Collection[int]
) -> list[int]:
    """Decode one token a forward; an end-of-sequence token is the last one emitted."""
    target = CachedTarget(model, choose)
    emitted = [target.start(prompt_ids)]
    while len(emitted) < choose.max_new_tokens and emitted[-1] not in eos_ids:
        emitted += target.extend(emitted[-1:])
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
                chain = self._drafter.propose(newest, aux_TA)
                choices = self._target.extend([emitted[-1], *chain])
                num_right = length_of_agreement(chain, choices)
                newest, aux_TA = choices[: num_right + 1], _concat(states)[: num_right + 1]
                self._target.forget(len(chain) - num_right)
                kept = _until_end(newest, self._max_new_tokens - len(emitted), eos_ids)
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
