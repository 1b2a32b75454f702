"""The part of a training's report that says what its snapshots were worth."""

from collections.abc import Sequence

from tasks.report_page import decision, section, table
from tasks.training_plots import acceptance_plot
from torchspec_lib.results import TrainSummary
from torchspec_lib.types import StepMetrics, pooled_accept_length


def snapshot_section(summary: TrainSummary, steps: Sequence[StepMetrics]) -> list[str]:
    """Real beside simulated accept length, and which snapshot was exported; if there were any."""
    exported = summary.exported_step
    if exported is None:
        return []
    parts = []
    if summary.snapshot_problem is not None:
        problem = f"Not all snapshots were decoded: {summary.snapshot_problem}"
        parts.append(decision(False, problem))
    parts.append(acceptance_plot(steps, summary.snapshots, exported, summary.resumed_from_step))
    rows, before = [], 0
    for snapshot in summary.snapshots:
        since = [step for step in steps if before < step.step <= snapshot.step]
        before = snapshot.step
        name = f"{snapshot.step:,}" + (", exported" if snapshot.step == exported else "")
        simulated = pooled_accept_length(since)
        rows.append((name, f"{snapshot.accept_length:.3f}", f"{simulated:.3f}"))
    header = ("step", "real", "simulated, since the one before")
    return [section("Snapshots", *parts, table(header, rows))]
