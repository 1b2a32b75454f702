"""A target and a draft on a device, decoding prompts both ways with a stopwatch.

Every timed call ends in Python integers, so a GPU has finished when the clock is read.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.selection import HeldoutPrompt
from torchspec_lib.evaluation.drafting import ChainDrafter, Drafter, DraftTree
from torchspec_lib.evaluation.speculative import (
    Decoded,
    SpeculativeDecoder,
    decode_plain,
)
from torchspec_lib.evaluation.tree_drafting import TreeDrafter, TreeShape
from torchspec_lib.evaluation.verification import CachedTarget, TargetChoice, check_tree_target
from torchspec_lib.models.export import LoadedDraft
from torchspec_lib.target import TargetSpec

NUM_TIMINGS = 20

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of single forwards behind a prompt, as medians."""

    draft_step_s: float
    target_rows_s: dict[int, float]
    """Of a target forward of so many rows."""


class Bench:
    """Decodes as ``run.evaluation`` says; for trees, with chains of as many steps too."""

    def __init__(
        self, run: RunConfig, target: TargetSpec, model: nn.Module, loaded: LoadedDraft
    ) -> None:
        """``loaded``'s draft is moved to the run's device, where ``model`` is.

        Raises:
            ConfigError: Trees are asked for, and the target can't verify them.
        """
        self._settings, self._model = run.evaluation, model
        self._eos_ids = frozenset(target.eos_token_ids)
        self._device = torch.device(run.cluster.device)
        self._choose = TargetChoice(
            self._settings.temperature, self._settings.max_new_tokens, run.seed
        )
        self._config, self._vocab = loaded.config, loaded.draft_vocab
        self._draft = loaded.draft.to(self._device)
        self._embed = model.get_submodule("model.embed_tokens")
        chains = ChainDrafter(self._draft, self._embed, self._vocab, self._settings.draft_steps)
        self._drafter: Drafter = chains if self._settings.draft_topk == 1 else self._trees()
        self._decoder = self._decoder_with(self._drafter)
        self._chain_decoder = self._decoder_with(chains)

    def warm_up(self, prompt: HeldoutPrompt) -> None:
        """Decode a prompt unmeasured: the first kernels and allocations are dear."""
        self._plain(prompt)
        self._speculative(prompt)

    def compare(
        self, prompt: HeldoutPrompt, plain_first: bool
    ) -> tuple[list[int], Decoded, tuple[float, float]]:
        """Both answers, and the seconds that the plain and the speculative one took."""
        if plain_first:
            plain, plain_s = _timed(lambda: self._plain(prompt))
        decoded, speculative_s = _timed(lambda: self._speculative(prompt))
        if not plain_first:
            plain, plain_s = _timed(lambda: self._plain(prompt))
        return plain, decoded, (plain_s, speculative_s)

    def chain(self, prompt: HeldoutPrompt) -> tuple[Decoded, float]:
        """The answer with chains, and the seconds that it took."""
        ids = prompt.prompt_token_ids.tolist()
        return _timed(lambda: self._chain_decoder.decode(ids, self._eos_ids))

    @torch.inference_mode()
    def step_costs(self, prompt: HeldoutPrompt) -> StepCosts:
        """The cost of a proposal, by step, and of target forwards of one row and of more.

        For chains of K tokens those of 1 to K + 1 rows, so that the gain of shorter chains is
        known too; for trees those of one row and of a whole tree.
        """
        target = CachedTarget(self._model, self._choose)
        token_ids = prompt.prompt_token_ids.tolist()
        states_TA = torch.zeros(len(token_ids), self._config.aux_width, device=self._device)
        target.start(token_ids)
        self._drafter.start()
        tree = self._drafter.propose(token_ids, states_TA)
        shorter = range(len(tree.token_ids)) if tree.is_chain else range(1)
        trees = [*(DraftTree.chain(tree.token_ids[:count]) for count in shorter), tree]
        proposals: list[float] = []
        forwards: list[list[float]] = [[] for _ in trees]
        for _ in range(NUM_TIMINGS):
            propose = _timed(lambda: self._drafter.propose(token_ids[:1], states_TA[:1]))
            proposals.append(propose[1])
            for one, seconds in zip(trees, forwards, strict=True):
                seconds.append(_timed(partial(target.verify, token_ids[0], one))[1])
                target.keep([0], len(one.token_ids) + 1)
        rows_s = {
            len(one.token_ids) + 1: statistics.median(seconds)
            for one, seconds in zip(trees, forwards, strict=True)
        }
        return StepCosts(statistics.median(proposals) / self._settings.draft_steps, rows_s)

    def _trees(self) -> TreeDrafter:
        check_tree_target(self._model.config)
        settings = self._settings
        shape = TreeShape(settings.draft_steps, settings.draft_topk, settings.num_rows)
        return TreeDrafter(self._draft, self._embed, self._vocab, shape)

    def _decoder_with(self, drafter: Drafter) -> SpeculativeDecoder:
        return SpeculativeDecoder(self._model, self._choose, self._config.aux_layer_ids, drafter)

    def _plain(self, prompt: HeldoutPrompt) -> list[int]:
        ids = prompt.prompt_token_ids.tolist()
        return decode_plain(self._model, ids, self._choose, self._eos_ids)

    def _speculative(self, prompt: HeldoutPrompt) -> Decoded:
        return self._decoder.decode(prompt.prompt_token_ids.tolist(), self._eos_ids)


def _timed(call: Callable[[], _Result]) -> tuple[_Result, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start
