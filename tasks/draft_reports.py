"""Reports on a draft: how it learned, and what it is worth."""

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np

from tasks.report_page import (
    GOOD,
    MUTED,
    amount,
    axes,
    clipped,
    decision,
    facts,
    highlighted,
    note,
    page,
    plot,
    sample_title,
    section,
    size,
    table,
    tiles,
)
from tasks.training_plots import learning_plot, throughput_plot
from torchspec_lib.registry.gate import conditions
from torchspec_lib.registry.model_card import duration
from torchspec_lib.results import EvalReport, PromptResult, TrainSummary
from torchspec_lib.types import StepMetrics

NUM_SAMPLES = 6
BALANCED = 0.1
"""Waiting less than this share of the time is no bottleneck."""
IN_TURNS = 0.6
"""Where one side waits more than this share of what the other does, neither is the slower one."""
MAX_LABELLED = 8
"""Bars for more positions than these have no room for labels."""
MAX_PROMPT = 240
"""Characters of a prompt above its answer."""


def training_report(summary: TrainSummary, steps: Sequence[StepMetrics]) -> str:
    """How the draft learned, how fast, and who waited."""
    resumed = summary.resumed_from_step
    speed = sum(s.num_tokens for s in steps) / sum(s.step_s + s.wait_s for s in steps)
    epochs = "1 epoch" if summary.num_epochs == 1 else f"{summary.num_epochs} epochs"
    return page(
        "Training",
        f"run {summary.run_id}" + (f", resumed from step {resumed:,} (dotted)" if resumed else ""),
        tiles(
            {
                "accept length, simulated": f"{summary.accept_length:.2f}",
                "loss of the last step": f"{summary.loss:.3f}",
                "steps": f"{summary.num_steps:,}",
                "samples trained": amount(summary.num_trained),
                "rejected": amount(summary.num_rejected),
                "tokens per second": amount(speed),
            }
        ),
        section("Learning", learning_plot(steps, resumed)),
        section("Throughput", decision(*who_waited(summary)), throughput_plot(steps, resumed)),
        section(
            "Accounts",
            facts(
                {
                    "trained + rejected": f"{summary.num_trained:,} + {summary.num_rejected:,} = "
                    f"{summary.num_prompts:,} prompts x {epochs}",
                    "tokens": f"{summary.num_tokens:,}",
                    "hidden states streamed": size(summary.bytes_streamed),
                    "wall time": duration(summary.wall_s),
                }
            ),
        ),
        *_losses(summary),
    )


def _losses(summary: TrainSummary) -> list[str]:
    """Samples that weren't trained, and parts that were lost and replaced, if there are any."""
    sections = []
    if summary.rejected:
        rows = [(reason, f"{count:,}") for reason, count in summary.rejected.items()]
        sections.append(section("Rejected", table(("reason", "samples"), rows)))
    if summary.recoveries:
        lost = [(r.part, clipped(r.cause), f"{r.seconds:.1f} s") for r in summary.recoveries]
        header = ("part", "cause", "back after")
        sections.append(section("Lost and replaced", table(header, lost, num_words=2)))
    return sections


def who_waited(summary: TrainSummary) -> tuple[bool, str]:
    """Whether engines and trainers are in balance, and what to do about it."""
    trainers, engines = (
        min(waited / summary.wall_s, 1.0)
        for waited in (summary.trainer_wait_s, summary.capture_wait_s)
    )
    if max(trainers, engines) < BALANCED:
        return (
            True,
            f"Well balanced: trainers waited {trainers:.0%} of the time, engines {engines:.0%}",
        )
    if min(trainers, engines) > max(BALANCED, IN_TURNS * max(trainers, engines)):
        return False, (
            f"Both sides wait in turns: trainers waited {trainers:.0%} of the time, engines "
            f"{engines:.0%}. Let more samples be in flight (transfer.max_in_flight_bytes)"
        )
    if trainers > engines:
        return False, (
            f"Engines are the bottleneck: trainers waited {trainers:.0%} of the time for samples, "
            f"engines {engines:.0%} for room. Add an engine (inference.inference_num_gpus)"
        )
    return False, (
        f"Trainers are the bottleneck: engines waited {engines:.0%} of the time for room in the "
        f"store, trainers {trainers:.0%} for samples. "
        "Add a trainer rank (training.training_num_gpus_per_node)"
    )


def evaluation_report(report: EvalReport, champion: EvalReport | None, tokenizer: Any) -> str:
    """What the draft is worth: real speculative decoding, with its conditions.

    Args:
        report: The draft's.
        champion: The champion's under the same conditions, to be shown beside it.
        tokenizer: The target's.
    """
    return page(
        "Evaluation",
        conditions(report),
        decision(*_comparison(report, champion)),
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
        section("Figures", _figures(report, champion)),
        section(
            "Answers",
            note(
                "Marked tokens were proposed by the draft and accepted; the others are the "
                "target's own. From the answer that the draft helped least to the one it helped "
                "most" + ("" if report.lossless else ", after some that it changed")
            ),
            *(
                sample_title(_heading(p)) + highlighted(_accepted_spans(p, tokenizer))
                for p in _examples(report.prompts)
            ),
        ),
    )


def _comparison(report: EvalReport, champion: EvalReport | None) -> tuple[bool, str]:
    """What to think of the figures."""
    length, differing = report.accept_length, report.num_prompts - report.num_lossless
    if differing:
        return False, (
            f"{differing} of {report.num_prompts} answers differ from plain decoding's: "
            "speculative decoding must not change any"
        )
    if champion is None:
        return length > 1, (
            f"{length:.2f} tokens per target forward instead of 1, and no answer is changed"
        )
    is_better = length > champion.accept_length
    return is_better, (
        f"{'Better' if is_better else 'Not better'} than the champion: {length:.2f} against "
        f"{champion.accept_length:.2f} tokens per target forward "
        f"({length / champion.accept_length - 1:+.1%})"
    )


def _figures(report: EvalReport, champion: EvalReport | None) -> str:
    shown = {"this draft": report} | ({"the champion": champion} if champion else {})
    rows: dict[str, Callable[[EvalReport], str]] = {
        "new tokens": lambda r: f"{r.num_new_tokens:,}",
        "target forwards, the prompts' included": lambda r: f"{r.num_target_forwards:,}",
        "speed-up, measured": lambda r: f"{r.measured_speedup:.2f}x",
        "speed-up, projected": lambda r: f"{r.projected_speedup:.2f}x",
        "plain decoding took": lambda r: f"{r.plain_s:.2f} s",
        "speculative decoding took": lambda r: f"{r.speculative_s:.2f} s",
        "a draft step": lambda r: f"{r.draft_step_s * 1e3:.2f} ms",
        "a target step": lambda r: f"{r.target_step_s * 1e3:.2f} ms",
    }
    cells = [(name, *(text(one) for one in shown.values())) for name, text in rows.items()]
    return table(("", *shown), cells)


def _examples(prompts: Sequence[PromptResult]) -> list[PromptResult]:
    """Some that aren't lossless, if any, then some from the least helped to the most."""
    differing = [p for p in prompts if not p.lossless][: NUM_SAMPLES // 2]
    others = sorted((p for p in prompts if p.lossless), key=_length)
    count = min(NUM_SAMPLES - len(differing), len(others))
    places = np.linspace(0, len(others) - 1, count).round().astype(int)
    return differing + [others[place] for place in places]


def _length(prompt: PromptResult) -> float:
    """Accept length of one answer; 1 where it was over with the prompt's forward."""
    return 1 + sum(prompt.accepted) / max(len(prompt.accepted), 1)


def _heading(prompt: PromptResult) -> str:
    kind = "" if prompt.lossless else ", not what plain decoding gives"
    question = clipped(" ".join(prompt.text.split()), MAX_PROMPT)
    return f"{_length(prompt):.2f} tokens per forward{kind}: {question}"


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
            if report.draft_steps <= MAX_LABELLED:
                ax.bar_label(bars, fmt="{:.0%}", color=MUTED, fontsize=8 if len(shown) == 1 else 7)
    rates.set(xlabel="position in the chain", ylim=(0, 1.1), xticks=places)
    lengths.set(xlabel="tokens", xticks=_counted(report), ylim=(0, 1.1 * lengths.dataLim.y1))
    for ax in (rates, lengths):
        ax.yaxis.set_major_formatter("{x:.0%}")
    if champion is not None:
        handles, labels = rates.get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, ncols=2, loc="outside lower right")
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
