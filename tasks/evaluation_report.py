"""The report on an evaluation: what a draft is worth."""

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np

from tasks.report_page import (
    GOOD,
    MUTED,
    axes,
    clipped,
    decision,
    highlighted,
    note,
    page,
    plot,
    sample_title,
    section,
    table,
    tiles,
)
from torchspec_lib.evaluation.projection import projected_chains
from torchspec_lib.registry.gate import conditions
from torchspec_lib.results import EvalReport, PromptResult

NUM_SAMPLES = 6
MAX_LABELLED = 8
"""Bars for more positions than these have no room for labels."""
MAX_PROMPT = 240
"""Characters of a prompt above its answer."""


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
        tiles(_headline(report, champion)),
        note(_what_it_means(report)),
        section("Acceptance", _acceptance_plot(report, champion)),
        *_sets(report),
        section("Figures", _figures(report, champion)),
        *_drafting(report),
        section(
            "Answers",
            note(_what_is_marked(report)),
            *(
                sample_title(_heading(p)) + highlighted(_accepted_spans(p, tokenizer))
                for p in _examples(report.prompts)
            ),
        ),
    )


def _headline(report: EvalReport, champion: EvalReport | None) -> dict[str, str]:
    beside = ("the champion's", champion.accept_length) if champion else ("plain decoding", 1.0)
    figures = {
        "accept length": f"{report.accept_length:.2f}",
        beside[0]: f"{beside[1]:.2f}",
        "lossless": f"{report.num_lossless} of {report.num_prompts}",
        "speed-up, measured": f"{report.measured_speedup:.2f}x",
    }
    if report.projected_speedup is not None:
        figures["speed-up, projected"] = f"{report.projected_speedup:.2f}x"
    return figures


def _what_it_means(report: EvalReport) -> str:
    length = "Accept length: new tokens per target forward, the target's own included. Measured: "
    if report.projected_speedup is None:
        return f"{length}wall-clock of SGLang, one prompt at a time"
    return (
        f"{length}wall-clock of this evaluation's Python loop, one prompt at a time; with a tiny "
        "target on a CPU that loop and the calls of small operators are most of the time. "
        "Projected: accept length x one target step / (the draft's steps + the verification), "
        "from their measured costs, without the loop around them. A serving engine has costs of "
        "its own"
    )


def _what_is_marked(report: EvalReport) -> str:
    marked = (
        "Marked tokens were proposed by the draft and accepted; the others are the target's own"
        if all(prompt.in_order for prompt in report.prompts)
        else "SGLang doesn't tell which of the tokens were the draft's"
    )
    order = "From the answer that the draft helped least to the one it helped most"
    if not report.lossless:
        order += ", after some that differ from plain decoding's"
    if report.num_ties:
        order += (
            f". {report.num_ties} differ first where two tokens are as good as equal to the "
            "target: rounding chose there, not the draft"
        )
    return f"{marked}. {order}"


def _comparison(report: EvalReport, champion: EvalReport | None) -> tuple[bool, str]:
    """What to think of the figures."""
    length = report.accept_length
    if report.num_changed:
        return False, (
            f"{report.num_changed} of {report.num_prompts} answers differ from plain decoding's: "
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
        "speed-up, projected": lambda r: _figure(r.projected_speedup, "x"),
        "plain decoding took": lambda r: f"{r.plain_s:.2f} s",
        "speculative decoding took": lambda r: f"{r.speculative_s:.2f} s",
        "a draft step": lambda r: _figure(r.draft_step_s, " ms", 1e3),
        "a target step": lambda r: _figure(r.target_step_s, " ms", 1e3),
        "a verification": lambda r: _figure(r.target_rows_s.get(r.num_rows), " ms", 1e3),
    }
    cells = [(name, *(text(one) for one in shown.values())) for name, text in rows.items()]
    return table(("", *shown), cells)


def _figure(value: float | None, unit: str, factor: float = 1.0) -> str:
    """Nothing where it isn't known."""
    return "" if value is None else f"{value * factor:.2f}{unit}"


def _sets(report: EvalReport) -> list[str]:
    """The named sets and their categories, if there are any beside the held-out prompts."""
    if len(report.sets) < 2:
        return []
    header = ("set", "category", "prompts", "lossless", "accept length", "by position", "tokens")
    rows = [
        (
            one.name,
            one.category or "all",
            f"{one.num_prompts:,}",
            f"{one.num_lossless:,}",
            f"{one.accept_length:.2f}",
            _shown(one.accept_rates),
            f"{one.num_new_tokens:,}",
        )
        for one in report.sets
    ]
    return [section("Prompt sets", table(header, rows, num_words=2))]


def _drafting(report: EvalReport) -> list[str]:
    """Trees beside chains, or what shorter chains would gain."""
    if report.chain is not None:
        trees = (report.drafting, report.accept_length, report.accept_rates, report.speculative_s)
        chains = report.chain
        name = f"chains of {report.draft_steps}"
        both = (trees, (name, chains.accept_length, chains.accept_rates, chains.speculative_s))
        rows = [
            (name, f"{length:.2f}", _shown(rates), f"{report.plain_s / seconds:.2f}x")
            for name, length, rates, seconds in both
        ]
        columns = ("", "accept length", "by depth", "speed-up, measured")
        return [section("Trees and chains", table(columns, rows))]
    projected = projected_chains(report)
    if not projected:
        return []
    best = max(projected, key=lambda length: projected[length])
    shorter = (
        f"Chains of {best} would gain most here, by the measured costs of these forwards"
        if best < report.draft_steps
        else "None shorter would gain more, by the measured costs of these forwards"
    )
    lengths = [(f"{length}", f"{speedup:.2f}x") for length, speedup in projected.items()]
    header = ("tokens of a chain", "speed-up, projected")
    return [section("Chain length", note(shorter), table(header, lengths))]


def _shown(rates: Sequence[float]) -> str:
    return " ".join(f"{rate:.0%}" for rate in rates)


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
    lengths.set(xlabel="tokens", xticks=_counted(report), ylim=(0, 1.1 * lengths.dataLim.y1 or 1.0))
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
    """An answer cut into tokens: (text, was the draft's). Unmarked where that isn't certain.

    The answer's text is tokenized again; unless that gives as many tokens as were decoded, but
    for an end-of-turn token that isn't shown, the marks would be off.
    """
    text = prompt.output_text
    if not (prompt.in_order and tokenizer.is_fast):  # a slow one knows no offsets
        return [(text, False)]
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    cuts = [begin for begin, _ in offsets["offset_mapping"]]
    if prompt.num_new_tokens - len(cuts) not in (0, 1):
        return [(text, False)]
    chains = ([*repeat(True, n), False] for n in prompt.accepted)
    is_drafts = chain([False], chain.from_iterable(chains))  # the prompt's forward gives the first
    pieces = zip(cuts, [*cuts[1:], len(text)], is_drafts, strict=False)
    return [(text[begin:end], is_draft) for begin, end, is_draft in pieces]
