"""The page on a prepared data set: what a draft will learn from it."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tasks.report_page import (
    ACCENT,
    MUTED,
    amount,
    axes,
    highlighted,
    note,
    page,
    plot,
    sample_title,
    section,
    table,
    tiles,
    whole_numbers,
)
from torchspec_lib.data.dataset import load_prompts
from torchspec_lib.data.summary import decoded_spans, summarize
from torchspec_lib.results import DatasetManifest

NUM_SAMPLES = 6
QUANTILES = {"mean": "mean", "min": "least", "5%": "5%", "50%": "median", "95%": "95%"}
QUANTILES |= {"max": "most"}

TURNS = {
    "supervised": "supervised",
    "with_reasoning": "of them with their reasoning",
    "with_tool_calls": "of them with tool calls",
    "without_end_of_turn": "of them without an end-of-turn token",
    "left_out": "left out by data.last_turn_only",
    "reasoning_left_out": "whose reasoning isn't supervised",
}
"""``DatasetManifest.turns`` in plain words."""


def data_report(manifest: DatasetManifest, folder: Path, tokenizer: Any) -> str:
    """What the draft is trained on: sizes, lengths, and samples that show what is supervised."""
    prompts = load_prompts(folder)
    supervised = manifest.num_loss_tokens / manifest.num_tokens
    rejected = [(reason, f"{count:,}") for reason, count in manifest.rejected.items()]
    return page(
        "Prepared data",
        f"data set {manifest.dataset_id}",
        tiles(
            {
                "prompts": amount(manifest.num_prompts),
                "held-out prompts": amount(manifest.num_heldout),
                "tokens": amount(manifest.num_tokens),
                "of them supervised": f"{supervised:.0%}",
                "draft vocabulary": f"{manifest.draft_vocab_size:,}",
                "of supervised tokens in it": f"{manifest.vocab_coverage:.2%}",
            }
        ),
        section("What is supervised", _turns(manifest.turns)),
        section("Lengths", _length_plot(prompts.lengths, manifest), _quantiles(folder)),
        section(
            "Samples",
            note("Marked text is supervised: the draft learns to predict it, end of turn included"),
            *(
                sample_title(
                    f"{prompt.prompt_id}: {prompt.num_tokens:,} tokens, "
                    f"{int(prompt.loss_mask.sum()):,} supervised"
                )
                + highlighted(decoded_spans(tokenizer, prompt))
                for prompt in islice(prompts, NUM_SAMPLES)
            ),
        ),
        section(
            "Filtered out",
            table(("reason", "conversations"), rejected) if rejected else note("Nothing"),
        ),
    )


def _turns(turns: Mapping[str, int]) -> str:
    """How many turns are supervised, and how; what there is none of has no row."""
    rows = [(text, f"{turns[kind]:,}") for kind, text in TURNS.items() if kind in turns]
    return table(("turns of the assistant", ""), rows)


def _quantiles(folder: Path) -> str:
    """How lengths are spread over the prompts."""
    spread = summarize(folder)
    labels = {
        "num_tokens": ("tokens of a prompt", "{:,.0f}"),
        "num_loss_tokens": ("of them supervised", "{:,.0f}"),
        "vocab_coverage": ("of these in the draft's vocabulary", "{:.1%}"),
    }
    rows = [
        (label, *(form.format(spread[column][key]) for key in QUANTILES))
        for column, (label, form) in labels.items()
        if column in spread
    ]
    return table(("", *QUANTILES.values()), rows)


def _length_plot(lengths: Any, manifest: DatasetManifest) -> str:
    figure, (ax,) = axes([""], 2.4)
    median = int(np.median(lengths))
    ax.hist(lengths, bins=60, range=(0, manifest.longest), color=ACCENT)
    ax.axvline(median, color=MUTED, ls=":", lw=1)
    ax.set(xlabel="tokens", ylabel="prompts", xlim=(0, None))
    whole_numbers(ax.xaxis)
    whole_numbers(ax.yaxis)
    return plot(
        figure,
        f"Tokens of a prompt: median {median:,} (dotted), the longest has {manifest.longest:,}",
    )
