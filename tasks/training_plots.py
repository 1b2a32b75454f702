"""Curves over the steps of a training."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tasks.report_page import ACCENT, GOOD, MUTED, WARM, axes, plot, whole_numbers
from torchspec_lib.results import SnapshotResult
from torchspec_lib.types import StepMetrics, pooled_accept_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_CHAINS = 10
"""A rate of fewer chains than these says nothing."""
NUM_WINDOWS = 25
"""Points of a smoothed curve: windows of steps whose counts are taken together."""
NUM_POINTS = 500
"""Steps whose own loss is drawn, at most."""


def _windows(steps: Sequence[StepMetrics]) -> list[Sequence[StepMetrics]]:
    length = math.ceil(len(steps) / NUM_WINDOWS)
    return [steps[i : i + length] for i in range(0, len(steps), length)]


def _middles(windows: Sequence[Sequence[StepMetrics]]) -> list[float]:
    return [(window[0].step + window[-1].step) / 2 for window in windows]


def _over_steps(ax: "Axes", resumed: int, top: float | None = None) -> None:
    """Finish axes over steps: from 0 to ``top``, or to just above the curve."""
    ax.set(xlabel="step", xlim=(0, None), ylim=(0, top or 1.08 * ax.dataLim.y1 or 1.0))
    whole_numbers(ax.xaxis)
    if resumed:
        ax.axvline(resumed, color=MUTED, ls=":", lw=1)


def learning_plot(steps: Sequence[StepMetrics], resumed: int) -> str:
    """Loss, and acceptance by position."""
    windows = _windows(steps)
    middles = _middles(windows)
    rates_WK = np.array([_accept_rates(window) for window in windows])
    figure, (loss, rates) = axes(["loss in nats", "accept rate by position"], 3.0)
    some = steps[:: math.ceil(len(steps) / NUM_POINTS)]
    loss.plot([s.step for s in some], [s.loss for s in some], color=ACCENT, alpha=0.35, lw=0.8)
    means = [sum(step.loss for step in window) / len(window) for window in windows]
    loss.plot(middles, means, color=ACCENT, marker=".")
    _over_steps(loss, resumed)
    for depth, rates_W in enumerate(rates_WK.T):
        alpha = 1.0 - 0.75 * depth / rates_WK.shape[1]
        rates.plot(middles, rates_W, color=GOOD, alpha=alpha, marker=".", label=f"{depth + 1}")
    rates.legend(title="position", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _over_steps(rates, resumed, top=1.0)
    rates.yaxis.set_major_formatter("{x:.0%}")
    return plot(
        figure,
        "Loss of single steps, and the mean of several; share of the draft's tokens that are the "
        "target's own choice, at each position in the chain given that all before were right",
    )


def _accept_rates(steps: Sequence[StepMetrics]) -> npt.NDArray[np.float64]:
    """By position, from the counts of several steps together; NaN where hardly any got so far."""
    chains_K = np.sum([step.chains for step in steps], axis=0)
    matches_K = np.sum([step.matches for step in steps], axis=0)
    return np.where(chains_K >= MIN_CHAINS, matches_K / np.maximum(chains_K, 1), np.nan)


def _time(window: Sequence[StepMetrics]) -> float:
    return sum(step.step_s + step.wait_s for step in window)


def throughput_plot(steps: Sequence[StepMetrics], resumed: int) -> str:
    """Tokens a second, and what share of the time was spent waiting."""
    windows = _windows(steps)
    middles = _middles(windows)
    figure, (speed, wait) = axes(["tokens per second", "share of time trainers waited"], 2.4)
    speeds = [sum(s.num_tokens for s in window) / _time(window) for window in windows]
    speed.plot(middles, speeds, color=ACCENT, marker=".")
    _over_steps(speed, resumed)
    whole_numbers(speed.yaxis)
    waits = [sum(s.wait_s for s in window) / _time(window) for window in windows]
    wait.plot(middles, waits, color=WARM, marker=".")
    wait.fill_between(middles, waits, color=WARM, alpha=0.3, lw=0)
    _over_steps(wait, resumed, top=1.0)
    wait.yaxis.set_major_formatter("{x:.0%}")
    return plot(
        figure, "Tokens of all ranks per second; how long trainer rank 0 waited for samples"
    )


def acceptance_plot(
    steps: Sequence[StepMetrics], snapshots: Sequence[SnapshotResult], exported: int, resumed: int
) -> str:
    """Accept length as the training simulates it, and as snapshots have it when they decode."""
    windows = _windows(steps)
    figure, (lengths,) = axes(["accept length"], 2.6)
    simulated = [pooled_accept_length(window) for window in windows]
    lengths.plot(_middles(windows), simulated, color=ACCENT, marker=".", label="simulated")
    found = {snapshot.step: snapshot.accept_length for snapshot in snapshots}
    lengths.plot(list(found), list(found.values()), color=GOOD, marker="o", label="real")
    if exported in found:
        lengths.plot(
            [exported], [found[exported]], color=WARM, ls="", marker="*", ms=14, label="exported"
        )
    lengths.legend(frameon=False, loc="lower right")
    _over_steps(lengths, resumed)
    return plot(
        figure,
        "Simulated: on the training data's own text, by the training-time test. Real: decoding "
        "prompts set aside with the draft as it was after a step",
    )
