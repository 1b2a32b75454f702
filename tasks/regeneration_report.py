"""The page on what the target has answered itself."""

from collections.abc import Iterable
from itertools import islice

import numpy as np

from tasks.report_page import (
    ACCENT,
    MUTED,
    amount,
    axes,
    clipped,
    facts,
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
from torchspec_lib.data.conversations import Conversation
from torchspec_lib.data.regenerated import RegeneratedAnswers, RegeneratedFolder, RejectedAnswer

NUM_SAMPLES = 5
NUM_REJECTED = 10


def regeneration_report(answers: RegeneratedAnswers, folder: RegeneratedFolder) -> str:
    """How much was answered and how fast, how long answers are, some of them, what was rejected."""
    lengths = [n for report in folder.reports() for n in report.answer_lengths]
    rejected = [(reason, f"{count:,}") for reason, count in answers.rejected.items()]
    num_sources = len(answers.settings["train"])
    settings = {**answers.settings, "train": f"{num_sources} source(s), known by their content"}
    return page(
        "Answers by the target",
        f"answers {answers.regeneration_id}",
        tiles(
            {
                "conversations": amount(answers.num_conversations),
                "of them answered": amount(answers.num_answered),
                "answers": amount(answers.num_answers),
                "tokens": amount(answers.num_tokens),
                "tokens/s of an engine": f"{answers.tokens_per_s:,.0f}",
            }
        ),
        section("Lengths", _length_plot(lengths) if lengths else note("No answer is usable")),
        section("Samples", *_samples(folder)),
        section(
            "Rejected",
            table(("reason", "conversations"), rejected) if rejected else note("Nothing"),
            *_rejected_examples(folder),
        ),
        section("Made with", facts({name: str(value) for name, value in settings.items()})),
    )


def _length_plot(lengths: list[int]) -> str:
    figure, (ax,) = axes([""], 2.4)
    median, longest = int(np.median(lengths)), max(lengths)
    ax.hist(lengths, bins=60, range=(0, longest), color=ACCENT)
    ax.axvline(median, color=MUTED, ls=":", lw=1)
    ax.set(xlabel="tokens", ylabel="answers", xlim=(0, None))
    whole_numbers(ax.xaxis)
    whole_numbers(ax.yaxis)
    return plot(
        figure, f"Tokens of an answer: median {median:,} (dotted), the longest has {longest:,}"
    )


def _samples(folder: RegeneratedFolder) -> Iterable[str]:
    """The first conversations, what the target said marked."""
    written = (one for report in folder.reports() for one in folder.conversations(report))
    for conversation in islice(written, NUM_SAMPLES):
        yield sample_title(conversation.source_id or "") + highlighted(_spans(conversation))


def _spans(conversation: Conversation) -> Iterable[tuple[str, bool]]:
    for message in conversation.messages:
        yield f"{message.role}: ", False
        text = "\n\n".join(filter(None, (message.reasoning, message.content)))
        yield f"{text}\n", message.role == "assistant"


def _rejected_examples(folder: RegeneratedFolder) -> Iterable[str]:
    examples = (one for report in folder.reports() for one in report.examples)
    for example in islice(examples, NUM_REJECTED):
        yield _rejected(example)


def _rejected(example: RejectedAnswer) -> str:
    title = sample_title(f"{example.where}: {example.reason}")
    return title + highlighted([(clipped(example.text) or "(nothing)", False)])
