"""Reports on a draft: how it learned, and what it is worth."""

import math
from collections.abc import Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.report_page import (
    ACCENT,
    GOOD,
    MUTED,
    WARM,
    axes,
    decision,
    facts,
    highlighted,
    note,
    page,
    plot,
    section,
    table,
    tiles,
)
from torchspec_lib.plan import MIB
from torchspec_lib.registry.gate import conditions
from torchspec_lib.results import EvalReport, PromptResult, TrainSummary
from torchspec_lib.types import StepMetrics

NUM_SAMPLES = 6
BALANCED = 0.1
"""Waiting less than this share of the time is no bottleneck."""
MIN_CHAINS = 10
"""A rate of fewer chains than these says nothing."""
NUM_WINDOWS = 25
"""Points of a smoothed curve: windows of steps whose counts are taken together."""


def training_report(summary: TrainSummary, steps: Sequence[StepMetrics]) -> str:
    """How the draft learned, how fast, and who waited."""
    rejected = {f"rejected: {reason}": f"{n:,}" for reason, n in summary.rejected.items()}
    resumed = summary.resumed_from_step
    return page(
        "Training",
        f"run {summary.run_id}" + (f", resumed from step {resumed}" if resumed else ""),
        tiles(
            {
                "accept length, simulated": f"{summary.accept_length:.2f}",
                "loss of the last step": f"{summary.loss:.3f}",
                "steps": f"{summary.num_steps:,}",
                "samples trained": f"{summary.num_trained:,}",
                "rejected": f"{summary.num_rejected:,}",
                "tokens": f"{summary.num_tokens:,}",
            }
        ),
        section("Learning", _learning_plot(steps)),
        section("Throughput", decision(*who_waited(summary)), _throughput_plot(steps)),
        section(
            "Accounts",
            facts(
                {
                    "trained + rejected": f"{summary.num_trained:,} + {summary.num_rejected:,} = "
                    f"{summary.num_prompts:,} prompts x {summary.num_epochs} epoch(s)",
                    "hidden states streamed": f"{summary.bytes_streamed / MIB:,.0f} MiB",
                    "wall time": f"{summary.wall_s:.1f} s",
                    **rejected,
                }
            ),
        ),
        *_recoveries(summary),
    )


def _recoveries(summary: TrainSummary) -> list[str]:
    """What was lost and replaced, if anything was."""
    rows = [(lost.part, f"{lost.seconds:.1f} s", lost.cause) for lost in summary.recoveries]
    if not rows:
        return []
    return [section("Lost and replaced", table(("part", "back after", "cause"), rows))]


def who_waited(summary: TrainSummary) -> tuple[bool, str]:
    """Whether engines and trainers are in balance, and what to do about it."""
    trainers, engines = (
        waited / summary.wall_s for waited in (summary.trainer_wait_s, summary.capture_wait_s)
    )
    if max(trainers, engines) < BALANCED:
        return (
            True,
            f"Well balanced: trainers waited {trainers:.0%} of the time, engines {engines:.0%}",
        )
    if trainers > engines:
        return False, (
            f"Engines are the bottleneck: trainers waited {trainers:.0%} of the time for samples. "
            "Add an engine (inference.inference_num_gpus)"
        )
    return False, (
        f"Trainers are the bottleneck: capturing stood still {engines:.0%} of the time. "
        "Add a trainer rank (training.training_num_gpus_per_node)"
    )


def _windows(steps: Sequence[StepMetrics]) -> list[Sequence[StepMetrics]]:
    size = math.ceil(len(steps) / NUM_WINDOWS)
    return [steps[i : i + size] for i in range(0, len(steps), size)]


def _learning_plot(steps: Sequence[StepMetrics]) -> str:
    windows = _windows(steps)
    ends = [window[-1].step for window in windows]
    rates_WK = np.array([_accept_rates(window) for window in windows])
    figure, (loss, rates) = axes(["loss in nats", "accept rate by depth"], 3.0)
    loss.plot([s.step for s in steps], [s.loss for s in steps], color=ACCENT, alpha=0.3, lw=0.8)
    loss.plot(ends, [np.mean([s.loss for s in window]) for window in windows], color=ACCENT)
    loss.set(xlabel="step", ylim=(0, None))
    for depth, rates_W in enumerate(rates_WK.T):
        alpha = 1.0 - 0.75 * depth / rates_WK.shape[1]
        rates.plot(ends, rates_W, color=GOOD, alpha=alpha, label=f"{depth}")
    rates.legend(title="depth", frameon=False, fontsize=8, loc="upper left")
    rates.set(xlabel="step", ylim=(0, 1))
    return plot(
        figure,
        "Loss of every step and its mean; share of the draft's tokens that are the target's own "
        "choice, at each depth given that all before were right",
    )


def _accept_rates(steps: Sequence[StepMetrics]) -> npt.NDArray[np.float64]:
    """By depth, from the counts of several steps together; NaN where hardly any got so far."""
    chains_K = np.sum([step.chains for step in steps], axis=0)
    matches_K = np.sum([step.matches for step in steps], axis=0)
    return np.where(chains_K >= MIN_CHAINS, matches_K / np.maximum(chains_K, 1), np.nan)


def _throughput_plot(steps: Sequence[StepMetrics]) -> str:
    windows = _windows(steps)
    ends = [window[-1].step for window in windows]
    seconds = [sum(s.step_s + s.wait_s for s in window) for window in windows]
    tokens = [sum(s.num_tokens for s in window) for window in windows]
    waits = [sum(s.wait_s for s in window) for window in windows]
    figure, (speed, wait) = axes(["tokens per second", "share of time spent waiting"], 2.4)
    speed.plot(ends, [t / s for t, s in zip(tokens, seconds, strict=True)], color=ACCENT)
    speed.set(xlabel="step", ylim=(0, None))
    wait.fill_between(ends, [w / s for w, s in zip(waits, seconds, strict=True)], color=WARM, lw=0)
    wait.set(xlabel="step", ylim=(0, 1))
    return plot(
        figure, "Tokens of all ranks per second; how long trainer rank 0 waited for samples"
    )


def evaluation_report(report: EvalReport, champion: EvalReport | None, tokenizer: Any) -> str:
    """What the draft is worth: real speculative decoding, with its conditions.

    Args:
        report: The draft's.
        champion: The champion's under the same conditions, to be shown beside it.
        tokenizer: The target's.
    """
    samples = (highlighted(_accepted_spans(p, tokenizer)) for p in report.prompts[:NUM_SAMPLES])
    return page(
        "Evaluation",
        conditions(report),
        tiles(
            {
                "accept length": f"{report.accept_length:.2f}",
                "the champion's" if champion else "plain decoding": (
                    f"{champion.accept_length:.2f}" if champion else "1.00"
                ),
                "lossless": f"{report.num_lossless} of {report.num_prompts}",
                "speed-up, measured": f"{report.measured_speedup:.2f}x",
                "speed-up, projected": f"{report.projected_speedup:.2f}x",
            }
        ),
        note(
            "Accept length: new tokens per target forward, the target's own included. Measured: "
            "wall-clock of this evaluation's Python loop. Projected: from the measured costs of "
            "one draft and one target step, without the loop around them"
        ),
        section("Acceptance", _acceptance_plot(report, champion)),
        section(
            "Figures",
            facts(
                {
                    "new tokens": f"{report.num_new_tokens:,}",
                    "target forwards": f"{report.num_target_forwards:,}, the prompts' included",
                    "plain decoding took": f"{report.plain_s:.2f} s",
                    "speculative decoding took": f"{report.speculative_s:.2f} s",
                    "a draft step": f"{report.draft_step_s * 1e3:.2f} ms",
                    "a target step": f"{report.target_step_s * 1e3:.2f} ms",
                }
            ),
        ),
        section(
            "Answers",
            note(
                "Marked tokens were proposed by the draft and accepted; the others are the "
                "target's own"
            ),
            *samples,
        ),
    )


def _acceptance_plot(report: EvalReport, champion: EvalReport | None) -> str:
    places = np.arange(1, report.draft_steps + 1)
    titles = ["accept rate by position", "draft tokens accepted per target forward"]
    figure, (rates, lengths) = axes(titles, 2.8)
    shown = [(report, "this draft", GOOD)]
    if champion is not None:
        shown.append((champion, "the champion", "#b8c4cf"))
    width = 0.76 / len(shown)
    for i, (one, label, color) in enumerate(shown):
        shift = width * (i - (len(shown) - 1) / 2)
        values_at = ((rates, places, one.accept_rates), (lengths, _counted(one), _shares(one)))
        for ax, xs, values in values_at:
            bars = ax.bar(np.asarray(xs) + shift, values, color=color, width=width, label=label)
            ax.bar_label(bars, fmt="{:.0%}", color=MUTED, fontsize=8 if len(shown) == 1 else 7)
    rates.set(xlabel="position in the chain", ylim=(0, 1.15), xticks=places)
    lengths.set(xlabel="tokens", xticks=_counted(report), ylim=(0, None))
    for ax in (rates, lengths):
        ax.yaxis.set_major_formatter("{x:.0%}")
    if champion is not None:
        lengths.legend(frameon=False, fontsize=8)
    return plot(
        figure,
        "Share of draft tokens accepted at each position given that all before were; how often "
        "so many were accepted at once",
    )


def _counted(report: EvalReport) -> list[int]:
    return list(range(report.draft_steps + 1))


def _shares(report: EvalReport) -> list[float]:
    """How often 0, 1, ... draft tokens were accepted, of all verifications."""
    accepted = list(chain.from_iterable(prompt.accepted for prompt in report.prompts))
    return [accepted.count(n) / max(len(accepted), 1) for n in _counted(report)]


def _accepted_spans(prompt: PromptResult, tokenizer: Any) -> list[tuple[str, bool]]:
    """An answer cut into tokens: (text, was the draft's). Unmarked where the cuts aren't certain.

    The answer's text is tokenized again; unless that gives as many tokens as were decoded, but
    for an end-of-turn token that isn't shown, the marks would be off.
    """
    text = prompt.output_text
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    cuts = [begin for begin, _ in offsets["offset_mapping"]]
    if prompt.num_new_tokens - len(cuts) not in (0, 1):
        return [(text, False)]
    chains = ([*repeat(True, n), False] for n in prompt.accepted)
    is_drafts = chain([False], chain.from_iterable(chains))  # the prompt's forward gives the first
    pieces = zip(cuts, [*cuts[1:], len(text)], is_drafts, strict=False)
    return [(text[begin:end], is_draft) for begin, end, is_draft in pieces]
