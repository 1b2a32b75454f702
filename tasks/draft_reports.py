"""The report on a training: how the draft learned, how fast, and who waited."""

from collections.abc import Sequence

from tasks.report_page import (
    amount,
    clipped,
    decision,
    facts,
    page,
    section,
    size,
    table,
    tiles,
)
from tasks.snapshot_report import snapshot_section
from tasks.training_plots import learning_plot, throughput_plot
from torchspec_lib.registry.model_card import duration
from torchspec_lib.results import TrainSummary
from torchspec_lib.types import StepMetrics

BALANCED = 0.1
"""Waiting less than this share of the time is no bottleneck."""
IN_TURNS = 0.6
"""Where one side waits more than this share of what the other does, neither is the slower one."""


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
        *snapshot_section(summary, steps),
        section("Throughput", decision(*who_waited(summary)), throughput_plot(steps, resumed)),
        section(
            "Accounts",
            facts(
                {
                    **_accounts(summary, epochs),
                    "tokens": f"{summary.num_tokens:,}",
                    "hidden states streamed": size(summary.bytes_streamed),
                    "wall time": duration(summary.wall_s),
                }
            ),
        ),
        *_losses(summary),
    )


def _accounts(summary: TrainSummary, epochs: str) -> dict[str, str]:
    """What became of all prompts."""
    parts = {"trained": summary.num_trained, "rejected": summary.num_rejected}
    if summary.num_not_trained:
        parts["not trained, stopped early"] = summary.num_not_trained
    figures = " + ".join(f"{number:,}" for number in parts.values())
    rows = {" + ".join(parts): f"{figures} = {summary.num_prompts:,} prompts x {epochs}"}
    if summary.num_set_aside:
        rows["set aside, for snapshots"] = f"{summary.num_set_aside:,} prompts"
    return rows


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
