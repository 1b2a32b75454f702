"""Measures a draft by real speculative decoding of the held-out prompts and of named sets."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from torchspec_lib.config.outcome import HELDOUT
from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.data.selection import HeldoutPrompt
from torchspec_lib.evaluation.acceptance import (
    ChainCounts,
    ServedCounts,
    accept_length,
    accept_rates,
)
from torchspec_lib.evaluation.bench import Bench, StepCosts
from torchspec_lib.evaluation.prompt_sets import PromptSet, digest_name, heldout_set, named_sets
from torchspec_lib.evaluation.served import Served, serve
from torchspec_lib.evaluation.ties import part_at_a_tie
from torchspec_lib.models.export import load_draft
from torchspec_lib.models.target_model import load_target
from torchspec_lib.models.validate import validate_draft
from torchspec_lib.results import EvalReport, PromptResult, SetResult
from torchspec_lib.target import TargetSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Compared:
    """A prompt, decoded plainly and speculatively."""

    prompt: HeldoutPrompt
    category: str | None
    plain: list[int]
    """The plain answer."""
    speculative: list[int]
    """The speculative one."""
    counts: ChainCounts | ServedCounts
    plain_s: float
    speculative_s: float
    is_tie: bool = False
    """Whether the answers differ, and first where rounding chose; see ``part_at_a_tie``."""

    @property
    def lossless(self) -> bool:
        return self.plain == self.speculative


@dataclass(frozen=True, slots=True)
class Measured:
    """What an engine made of sets of prompts."""

    compared: list[list[Compared]]
    """The prompts of each set."""
    costs: StepCosts | None = None
    chains: SetResult | None = None
    """The first set with chains of as many steps, where it was decoded with trees."""


def evaluate_draft(
    run: RunConfig, target: TargetSpec, draft_dir: Path, dataset_dir: Path
) -> EvalReport:
    """Decode every prompt plainly and speculatively, and compare.

    An answer that differs from plain decoding's is reported, not raised: the gate decides.

    Args:
        run: ``evaluation``, ``model``, ``data`` for how to ask, ``cluster.device`` and ``seed``;
            ``inference.sglang`` where SGLang decodes.
        target: The target that the draft was trained for.
        draft_dir: An exported draft.
        dataset_dir: A prepared data set, for its held-out prompts.

    Raises:
        DraftFormatError: The draft can't be served with this target.
        ConfigError: A set's source doesn't exist, trees don't go with draft or target, or SGLang
            refuses its arguments or a prompt.
        DataError: A set has a row that asks nothing.
        DependencyError: SGLang isn't installed.
        EngineError: SGLang didn't start, or gave up.
        WorkerLostError: SGLang's process died.
    """
    validate_draft(draft_dir, target)
    settings, remote = run.evaluation, run.model.trust_remote_code
    chat = ChatTokenizer.load(target.path, remote, run.data.chat_template_kwargs)
    sets = [heldout_set(run, dataset_dir), *named_sets(run, chat)]
    measure = _serve_sets if settings.engine == "sglang" else _decode_sets
    measured = measure(run, target, draft_dir, sets)
    compared, costs = measured.compared[0], measured.costs
    overall = set_result(HELDOUT, None, compared, settings.draft_steps)
    results = [overall]
    for one, others in zip(sets[1:], measured.compared[1:], strict=True):
        results += _by_category(one.name, others, settings.draft_steps)
    report = EvalReport(
        engine=settings.engine,
        draft_steps=settings.draft_steps,
        draft_topk=settings.draft_topk,
        num_draft_tokens=settings.num_draft_tokens,
        temperature=settings.temperature,
        prompt_set=overall.prompt_set,
        max_new_tokens=settings.max_new_tokens,
        num_prompts=overall.num_prompts,
        num_lossless=overall.num_lossless,
        num_ties=sum(one.is_tie for one in compared),
        accept_length=overall.accept_length,
        accept_rates=overall.accept_rates,
        num_new_tokens=overall.num_new_tokens,
        num_target_forwards=sum(1 + len(one.counts.accepted) for one in compared),
        plain_s=overall.plain_s,
        speculative_s=overall.speculative_s,
        draft_step_s=costs.draft_step_s if costs else None,
        target_step_s=costs.target_rows_s[1] if costs else None,
        target_rows_s=costs.target_rows_s if costs else {},
        sets=tuple(results),
        chain=measured.chains,
        prompts=tuple(_prompt_result(one, chat.tokenizer) for one in compared),
    )
    _log(report)
    return report


def set_result(
    name: str, category: str | None, compared: Sequence[Compared], draft_steps: int
) -> SetResult:
    """The figures of some prompts."""
    counts = [one.counts for one in compared]
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


def _by_category(name: str, compared: Sequence[Compared], draft_steps: int) -> list[SetResult]:
    """A set's figures, and those of its categories in the order of their appearance."""
    categories = [c for c in dict.fromkeys(one.category for one in compared) if c is not None]
    parts = [(c, [one for one in compared if one.category == c]) for c in categories]
    whole = set_result(name, None, compared, draft_steps)
    return [whole, *(set_result(name, category, part, draft_steps) for category, part in parts)]


def _decode_sets(
    run: RunConfig, target: TargetSpec, draft_dir: Path, sets: Sequence[PromptSet]
) -> Measured:
    """With transformers, in this process."""
    device = torch.device(run.cluster.device)
    model = load_target(target, run.model.dtype, device, run.model.trust_remote_code)
    bench = Bench(run, target, model, load_draft(draft_dir))
    first = sets[0].prompts[0]
    bench.warm_up(first)
    costs = bench.step_costs(first)
    compared = [_compare(bench, one) for one in sets]
    if run.evaluation.temperature == 0.0:
        compared = _with_ties(model, compared)
    if run.evaluation.draft_topk == 1:
        return Measured(compared, costs)
    return Measured(compared, costs, _with_chains(bench, compared[0], run))


def _compare(bench: Bench, prompts: PromptSet) -> list[Compared]:
    """Decode a set; every other prompt speculatively first, so that neither way gains by order."""
    compared: list[Compared] = []
    rows = zip(prompts.prompts, prompts.categories, strict=True)
    title, total = f"evaluating {prompts.name}", len(prompts.prompts)
    with tqdm(rows, title, total=total, unit=" prompts", mininterval=1.0) as bar:
        for index, (prompt, category) in enumerate(bar):
            plain, decoded, seconds = bench.compare(prompt, plain_first=index % 2 == 0)
            ids, counts = decoded.token_ids, decoded.counts
            compared.append(Compared(prompt, category, plain, ids, counts, *seconds))
            length = accept_length([one.counts for one in compared])
            bar.set_postfix(accept_length=f"{length:.2f}", refresh=False)
    return compared


def _with_chains(bench: Bench, compared: Sequence[Compared], run: RunConfig) -> SetResult:
    """The same prompts decoded with chains of as many steps."""
    chains = []
    for one in tqdm(compared, "evaluating chains", unit=" prompts", mininterval=1.0):
        decoded, seconds = bench.chain(one.prompt)
        chains.append(
            replace(
                one,
                speculative=decoded.token_ids,
                counts=decoded.counts,
                speculative_s=seconds,
            )
        )
    return set_result(HELDOUT, None, chains, run.evaluation.draft_steps)


def _serve_sets(
    run: RunConfig, target: TargetSpec, draft_dir: Path, sets: Sequence[PromptSet]
) -> Measured:
    """With SGLang: all of them without the draft, then all with it.

    It tells no logits: where answers differ, transformers looks them up, if one GPU holds the
    target.
    """
    prompts = [prompt.prompt_token_ids.tolist() for one in sets for prompt in one.prompts]
    plain, speculative = (list(serve(run, target, draft, prompts)) for draft in (None, draft_dir))
    compared = compare_served(sets, plain, speculative)
    num_differing = sum(not one.lossless for some in compared for one in some)
    if num_differing and (run.inference.sglang.tp_size or 1) > 1:
        logger.warning("event=not_lossless answers=%d tie=unknown", num_differing)
    elif num_differing:
        device = torch.device(run.cluster.device)
        model = load_target(target, run.model.dtype, device, run.model.trust_remote_code)
        compared = _with_ties(model, compared)
    return Measured(compared)


def _with_ties(model: nn.Module, compared: Sequence[Sequence[Compared]]) -> list[list[Compared]]:
    """Greedy answers, with what is to be thought of those that differ."""

    def look(one: Compared) -> Compared:
        if one.lossless:
            return one
        is_tie = part_at_a_tie(model, one.prompt, one.plain, one.speculative)
        return replace(one, is_tie=is_tie)

    return [[look(one) for one in some] for some in compared]


def compare_served(
    sets: Sequence[PromptSet], plain: Sequence[Served], speculative: Sequence[Served]
) -> list[list[Compared]]:
    """Give SGLang's answers to all prompts of all sets, one behind the other, back to each set."""
    answers = iter(zip(plain, speculative, strict=True))
    return [
        [
            _served(prompt, category, *next(answers))
            for prompt, category in zip(one.prompts, one.categories, strict=True)
        ]
        for one in sets
    ]


def _served(
    prompt: HeldoutPrompt, category: str | None, plain: Served, speculative: Served
) -> Compared:
    assert speculative.counts is not None
    answers = plain.token_ids, speculative.token_ids
    seconds = plain.seconds, speculative.seconds
    return Compared(prompt, category, *answers, speculative.counts, *seconds)


def _prompt_result(one: Compared, tokenizer: Any) -> PromptResult:
    return PromptResult(
        prompt_id=one.prompt.prompt_id,
        text=one.prompt.text,
        output_text=tokenizer.decode(one.speculative, skip_special_tokens=True),
        accepted=one.counts.accepted,
        in_order=isinstance(one.counts, ChainCounts),
        num_new_tokens=len(one.speculative),
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
