"""Measures a draft by real speculative decoding of the held-out prompts and of named sets."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from torchspec_lib.config.outcome import HELDOUT
from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.data.selection import HeldoutPrompt
from torchspec_lib.evaluation.acceptance import accept_length, accept_rates
from torchspec_lib.evaluation.bench import Bench
from torchspec_lib.evaluation.prompt_sets import PromptSet, digest_name, heldout_set, named_sets
from torchspec_lib.evaluation.speculative import Decoded
from torchspec_lib.models.export import load_draft
from torchspec_lib.models.target_model import load_target
from torchspec_lib.models.validate import validate_draft
from torchspec_lib.results import EvalReport, PromptResult, SetResult
from torchspec_lib.target import TargetSpec

ENGINE = "hf"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Compared:
    """A prompt, decoded plainly and speculatively."""

    prompt: HeldoutPrompt
    category: str | None
    plain: list[int]
    decoded: Decoded
    plain_s: float
    speculative_s: float

    @property
    def lossless(self) -> bool:
        return self.plain == self.decoded.token_ids


def evaluate_draft(
    run: RunConfig, target: TargetSpec, draft_dir: Path, dataset_dir: Path
) -> EvalReport:
    """Decode every prompt plainly and speculatively, and compare.

    An answer that differs from plain decoding's is reported, not raised: the gate decides.

    Args:
        run: ``evaluation``, ``model``, ``data`` for how to ask, ``cluster.device`` and ``seed``.
        target: The target that the draft was trained for.
        draft_dir: An exported draft.
        dataset_dir: A prepared data set, for its held-out prompts.

    Raises:
        DraftFormatError: The draft can't be served with this target.
        ConfigError: A set's source doesn't exist, or trees don't go with draft or target.
        DataError: A set has a row that asks nothing.
    """
    validate_draft(draft_dir, target)
    settings, remote = run.evaluation, run.model.trust_remote_code
    chat = ChatTokenizer.load(target.path, remote, run.data.chat_template_kwargs)
    heldout, others = heldout_set(run, dataset_dir), named_sets(run, chat)
    model = load_target(target, run.model.dtype, torch.device(run.cluster.device), remote)
    bench = Bench(run, target, model, load_draft(draft_dir))
    bench.warm_up(heldout.prompts[0])
    costs = bench.step_costs(heldout.prompts[0])
    compared = _compare(bench, heldout)
    overall = set_result(heldout.name, None, compared, settings.draft_steps)
    sets = [overall]
    for one in others:
        sets += _by_category(one.name, _compare(bench, one), settings.draft_steps)
    report = EvalReport(
        engine=ENGINE,
        draft_steps=settings.draft_steps,
        draft_topk=settings.draft_topk,
        num_draft_tokens=settings.num_draft_tokens,
        temperature=settings.temperature,
        prompt_set=overall.prompt_set,
        max_new_tokens=settings.max_new_tokens,
        num_prompts=overall.num_prompts,
        num_lossless=overall.num_lossless,
        accept_length=overall.accept_length,
        accept_rates=overall.accept_rates,
        num_new_tokens=overall.num_new_tokens,
        num_target_forwards=sum(one.decoded.num_target_forwards for one in compared),
        plain_s=overall.plain_s,
        speculative_s=overall.speculative_s,
        draft_step_s=costs.draft_step_s,
        target_step_s=costs.target_rows_s[1],
        target_rows_s=costs.target_rows_s,
        sets=tuple(sets),
        chain=_with_chains(bench, compared, run) if settings.draft_topk > 1 else None,
        prompts=tuple(_prompt_result(one, chat.tokenizer) for one in compared),
    )
    _log(report)
    return report


def set_result(
    name: str, category: str | None, compared: Sequence[Compared], draft_steps: int
) -> SetResult:
    """The figures of some prompts."""
    counts = [one.decoded.counts for one in compared]
    return SetResult(
        name=name,
        category=category,
        prompt_set=digest_name(name, [one.prompt for one in compared]),
        num_prompts=len(compared),
        num_lossless=sum(one.lossless for one in compared),
        accept_length=accept_length(counts),
        accept_rates=accept_rates(counts, draft_steps),
        num_new_tokens=sum(count.num_new_tokens for count in counts),
        plain_s=sum(one.plain_s for one in compared),
        speculative_s=sum(one.speculative_s for one in compared),
    )


def _compare(bench: Bench, prompts: PromptSet) -> list[Compared]:
    """Decode a set; every other prompt speculatively first, so that neither way gains by order."""
    compared: list[Compared] = []
    rows = zip(prompts.prompts, prompts.categories, strict=True)
    title, total = f"evaluating {prompts.name}", len(prompts.prompts)
    with tqdm(rows, title, total=total, unit=" prompts", mininterval=1.0) as bar:
        for index, (prompt, category) in enumerate(bar):
            plain, decoded, seconds = bench.compare(prompt, plain_first=index % 2 == 0)
            compared.append(Compared(prompt, category, plain, decoded, *seconds))
            length = accept_length([one.decoded.counts for one in compared])
            bar.set_postfix(accept_length=f"{length:.2f}", refresh=False)
    return compared


def _by_category(name: str, compared: Sequence[Compared], draft_steps: int) -> list[SetResult]:
    """A set's figures, and those of its categories in the order of their appearance."""
    categories = [c for c in dict.fromkeys(one.category for one in compared) if c is not None]
    parts = [(c, [one for one in compared if one.category == c]) for c in categories]
    whole = set_result(name, None, compared, draft_steps)
    return [whole, *(set_result(name, category, part, draft_steps) for category, part in parts)]


def _with_chains(bench: Bench, compared: Sequence[Compared], run: RunConfig) -> SetResult:
    """The same prompts decoded with chains of as many steps."""
    chains = []
    for one in tqdm(compared, "evaluating chains", unit=" prompts", mininterval=1.0):
        decoded, seconds = bench.chain(one.prompt)
        chains.append(Compared(one.prompt, one.category, one.plain, decoded, one.plain_s, seconds))
    return set_result(HELDOUT, None, chains, run.evaluation.draft_steps)


def _prompt_result(one: Compared, tokenizer: Any) -> PromptResult:
    return PromptResult(
        prompt_id=one.prompt.prompt_id,
        text=one.prompt.text,
        output_text=tokenizer.decode(one.decoded.token_ids, skip_special_tokens=True),
        accepted=one.decoded.accepted,
        num_new_tokens=len(one.decoded.token_ids),
        lossless=one.lossless,
    )


def _log(report: EvalReport) -> None:
    for one in report.sets:
        logger.info(
            "event=evaluated set=%s category=%s drafting=%r prompts=%d lossless=%d "
            "accept_length=%.3f tokens=%d",
            one.name,
            one.category or "all",
            report.drafting,
            one.num_prompts,
            one.num_lossless,
            one.accept_length,
            one.num_new_tokens,
        )
