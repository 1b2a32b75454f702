"""A Hugging Face target that chooses tokens, one at a time or for a whole tree of a draft's.

Shapes: ``T`` new rows, ``S`` cached rows, ``V`` target vocabulary.

A draft's proposal is certain, so a token x of it is accepted with the probability p(x) that the
target would have drawn it, and in its place comes a draw from p without x: the exact rule of
speculative sampling (Leviathan et al. 2023, arXiv 2211.17192, section 2.3). Several tokens behind
the same one make no difference: the target draws from p, and goes on behind the one that has been
drawn, if it is there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from torchspec_lib.errors import ConfigError
from torchspec_lib.evaluation.drafting import DraftTree


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

    def __call__(self, logits_TV: Tensor, places: Sequence[int]) -> list[int]:
        """A token for every row; row t is to give new token ``places[t]``, from 0."""
        if self._temperature == 0.0:
            greedy: list[int] = logits_TV.argmax(-1).tolist()
            return greedy
        # What is proposed beyond the limit is cut off later, so any number will do there.
        places_T = torch.tensor(places).clamp(max=self.max_new_tokens - 1)
        numbers_T = self._numbers_N[places_T].to(logits_TV.device)
        shares_TV = (logits_TV.float() / self._temperature).softmax(-1).cumsum(-1)
        shares_TV = shares_TV / shares_TV[:, -1:]
        drawn_T1 = torch.searchsorted(shares_TV, numbers_T[:, None], right=True)
        drawn: list[int] = drawn_T1[:, 0].tolist()
        return drawn


class CachedTarget:
    """A causal LM, and the keys and values and number of new tokens of one document so far."""

    def __init__(self, model: nn.Module, choose: TargetChoice) -> None:
        self._model: Any = model
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._cache: Any = DynamicCache()
        self._choose, self._num_new = choose, 0

    def start(self, prompt_ids: Sequence[int]) -> int:
        """Begin a document; gives the first token after the prompt."""
        self._cache, self._num_new = DynamicCache(), 1
        self._choose.start(prompt_ids)
        return self._choose(self._logits(prompt_ids, logits_to_keep=1), [0])[0]

    def extend(self, token_id: int) -> int:
        """Run the newest token; gives the target's choice after it."""
        choices = self._choose(self._logits([token_id]), [self._num_new])
        self._num_new += 1
        return choices[0]

    def verify(self, token_id: int, tree: DraftTree) -> list[int]:
        """Run the newest token and a tree behind it; gives the choice after each of the rows.

        ``keep`` must follow.
        """
        depths = tree.depths()
        placing = None if tree.is_chain else self._placing(tree, depths)
        logits_TV = self._logits([token_id, *tree.token_ids], placing=placing)
        return self._choose(logits_TV, [self._num_new + depth for depth in depths])

    def keep(self, rows: Sequence[int], num_rows: int) -> None:
        """Of the ``num_rows`` rows that were verified, forget all but these, which are a path."""
        start, count = self._cache.get_seq_length() - num_rows, len(rows)
        if rows[-1] != count - 1:  # else they stand where they belong
            from_S = start + torch.tensor(rows, device=self._device)
            for layer in self._cache.layers:
                for states in (layer.keys, layer.values):
                    states[..., start : start + count, :] = states[..., from_S, :]
        if count < num_rows:
            self._cache.crop(start + count)
        self._num_new += count

    def _placing(self, tree: DraftTree, depths: Sequence[int]) -> dict[str, Tensor]:
        """Every row stands behind its parent, and sees the cache and its own path alone."""
        cached, count = self._cache.get_seq_length(), len(depths)
        sees_TT = torch.eye(count, dtype=torch.bool)
        for row, parent in enumerate(tree.parents, start=1):
            sees_TT[row] |= sees_TT[parent]
        sees = torch.cat([torch.ones(count, cached, dtype=torch.bool), sees_TT], dim=1)
        mask = torch.zeros(sees.shape, dtype=self._dtype)
        mask.masked_fill_(~sees, torch.finfo(self._dtype).min)
        positions_T = cached + torch.tensor(depths)
        return {
            "attention_mask": mask[None, None].to(self._device),
            "position_ids": positions_T[None].to(self._device),
        }

    def _logits(
        self,
        token_ids: Sequence[int],
        logits_to_keep: int = 0,
        placing: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """[T, V] of the last rows; of all where ``logits_to_keep`` is 0."""
        out = self._model(
            input_ids=torch.tensor([list(token_ids)], device=self._device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **(placing or {}),
        )
        logits_TV: Tensor = out.logits[0]
        return logits_TV


def check_tree_target(config: Any) -> None:
    """Refuse trees for a target whose layers don't all see everything before.

    Args:
        config: Transformers' configuration of it.

    Raises:
        ConfigError: It has layers of a sliding window, or without keys and values.
    """
    layer_types = getattr(config.get_text_config(), "layer_types", None)
    kinds = set(layer_types or ()) - {"full_attention"}
    if kinds:
        raise ConfigError(
            "evaluation.draft_topk",
            f"trees are verified with full attention only, and the target has layers of "
            f"{', '.join(sorted(kinds))}",
            "Set it to 1, for chains",
        )
