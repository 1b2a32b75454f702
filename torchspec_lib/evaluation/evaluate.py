"""Measures a draft by real speculative decoding of the held-out prompts."""

import hashlib
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from tqdm import tqdm

from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.data.dataset import load_heldout
from torchspec_lib.data.selection import HeldoutPrompt
from torchspec_lib.evaluation.acceptance import accept_length, accept_rates
from torchspec_lib.evaluation.speculative import (
    CachedTarget,
    ChainDrafter,
    Decoded,
    SpeculativeDecoder,
    TargetChoice,
    decode_plain,
    length_of_agreement,
)
from torchspec_lib.models.export import LoadedDraft, load_draft, validate_draft
from torchspec_lib.models.target_model import load_target
from torchspec_lib.results import EvalReport, PromptResult
from torchspec_lib.target import TargetSpec

ENGINE = "hf"
NUM_TIMINGS = 20

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


def evaluate_draft(
    run: RunConfig, target: TargetSpec, draft_dir: Path, dataset_dir: Path
) -> EvalReport:
    """Decode every held-out prompt plainly and speculatively, and compare.

    An answer that differs from plain decoding's is reported, not raised: the gate decides.

    Args:
        run: ``evaluation``, ``model.dtype`` and ``cluster.device`` are what counts.
        target: The target that the draft was trained for.
        draft_dir: An exported draft.
        dataset_dir: A prepared data set, for its held-out prompts.

    Raises:
        DraftFormatError: The draft can't be served with this target.
    """
    validate_draft(draft_dir, target)
    prompts = load_heldout(dataset_dir)[: run.evaluation.max_prompts]
    remote = run.model.trust_remote_code
    model = load_target(target, run.model.dtype, torch.device(run.cluster.device), remote)
    tokenizer = ChatTokenizer.load(target.path, remote).tokenizer
    loaded = load_draft(draft_dir)
    bench = _Bench(run, target, model, loaded)
    bench.warm_up(prompts[0])
    draft_step_s, target_step_s = bench.step_costs(prompts[0])
    results, counts, plain_s, speculative_s = [], [], 0.0, 0.0
    with tqdm(prompts, "evaluating", unit=" prompts", mininterval=1.0) as bar:
        for index, prompt in enumerate(bar):
            plain, decoded, seconds = bench.compare(prompt, plain_first=index % 2 == 0)
            plain_s, speculative_s = plain_s + seconds[0], speculative_s + seconds[1]
            text = tokenizer.decode(decoded.token_ids, skip_special_tokens=True)
            results.append(_result(prompt, plain, decoded, text))
            counts.append(decoded.counts)
            bar.set_postfix(accept_length=f"{accept_length(counts):.2f}", refresh=False)
    return EvalReport(
        engine=ENGINE,
        draft_steps=run.evaluation.draft_steps,
        temperature=run.evaluation.temperature,
        prompt_set=prompt_set(prompts),
        max_new_tokens=run.evaluation.max_new_tokens,
        num_prompts=len(results),
        num_lossless=sum(result.lossless for result in results),
        accept_length=accept_length(counts),
        accept_rates=accept_rates(counts, run.evaluation.draft_steps),
        num_new_tokens=sum(result.num_new_tokens for result in results),
        num_target_forwards=sum(1 + len(result.accepted) for result in results),
        plain_s=plain_s,
        speculative_s=speculative_s,
        draft_step_s=draft_step_s,
        target_step_s=target_step_s,
        prompts=tuple(results),
    )


def prompt_set(prompts: Sequence[HeldoutPrompt]) -> str:
    """Names prompts by their tokens, so that equal names mean equal prompts.

    Example:
        ``"heldout-3f9a0c12 (100 prompts)"``
    """
    digest = hashlib.sha256(b"".join(p.prompt_token_ids.tobytes() + b"\n" for p in prompts))
    return f"heldout-{digest.hexdigest()[:8]} ({len(prompts)} prompts)"


class _Bench:
    """A target and a draft on a device, decoding prompts both ways with a stopwatch.

    Every timed call ends in Python integers, so a GPU has finished when the clock is read.
    """

    def __init__(
        self, run: RunConfig, target: TargetSpec, model: nn.Module, loaded: LoadedDraft
    ) -> None:
        self._model, self._eos_ids = model, frozenset(target.eos_token_ids)
        settings = run.evaluation
        self._choose = TargetChoice(settings.temperature, settings.max_new_tokens, run.seed)
        self._draft_steps = settings.draft_steps
        self._device = torch.device(run.cluster.device)
        self._config = loaded.config
        draft, embed = loaded.draft.to(self._device), model.get_submodule("model.embed_tokens")
        self._drafter = ChainDrafter(draft, embed, loaded.draft_vocab, self._draft_steps)
        aux_layer_ids = loaded.config.aux_layer_ids
        self._decoder = SpeculativeDecoder(model, self._choose, aux_layer_ids, self._drafter)

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
        if plain != decoded.token_ids:
            self._report_difference(prompt, plain, decoded.token_ids)
        return plain, decoded, (plain_s, speculative_s)

    @torch.inference_mode()
    def _report_difference(
        self, prompt: HeldoutPrompt, plain: Sequence[int], speculative: Sequence[int]
    ) -> None:
        """Say how close the target's choice was: a gap within rounding isn't the draft's doing."""
        same = length_of_agreement(plain, speculative)
        ids = [*prompt.prompt_token_ids.tolist(), *plain[:same]]
        logits_V = self._model(torch.tensor([ids], device=self._device)).logits[0, -1].float()
        logger.warning(
            "event=not_lossless prompt=%s new_token=%d plain=%d speculative=%d logits=%.4f,%.4f",
            prompt.prompt_id,
            same,
            plain[same],
            speculative[same],
            logits_V[plain[same]],
            logits_V[speculative[same]],
        )

    @torch.inference_mode()
    def step_costs(self, prompt: HeldoutPrompt) -> tuple[float, float]:
        """Seconds of one draft forward and of one target forward of a token, after a prompt."""
        target, token_ids = (
            CachedTarget(self._model, self._choose),
            prompt.prompt_token_ids.tolist(),
        )
        states_TA = torch.zeros(len(token_ids), self._config.aux_width, device=self._device)
        target.start(token_ids)
        self._drafter.start()
        self._drafter.propose(token_ids, states_TA)
        chains, forwards = [], []
        for _ in range(NUM_TIMINGS):
            chains.append(_timed(lambda: self._drafter.propose(token_ids[:1], states_TA[:1]))[1])
            forwards.append(_timed(lambda: target.extend(token_ids[:1]))[1])
        return statistics.median(chains) / self._draft_steps, statistics.median(forwards)

    def _plain(self, prompt: HeldoutPrompt) -> list[int]:
        ids = prompt.prompt_token_ids.tolist()
        return decode_plain(self._model, ids, self._choose, self._eos_ids)

    def _speculative(self, prompt: HeldoutPrompt) -> Decoded:
        ids = prompt.prompt_token_ids.tolist()
        return self._decoder.decode(ids, self._eos_ids)


def _timed(call: Callable[[], _Result]) -> tuple[_Result, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def _result(
    prompt: HeldoutPrompt, plain: list[int], decoded: Decoded, output_text: str
) -> PromptResult:
    return PromptResult(
        prompt_id=prompt.prompt_id,
        text=prompt.text,
        output_text=output_text,
        accepted=decoded.accepted,
        num_new_tokens=len(decoded.token_ids),
        lossless=decoded.token_ids == plain,
    )
