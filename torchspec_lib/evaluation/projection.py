"""What other chain lengths would gain, by the figures of one evaluation. No torch."""

from torchspec_lib.results import EvalReport


def projected_chains(report: EvalReport) -> dict[int, float]:
    """Projected speed-up with chains of 1, 2, ... K tokens, K being the evaluation's.

    A chain of k tokens has accept length ``L_k = 1 + c_0 + c_0 c_1 + ...`` (k terms behind the
    1; ``accept_rates`` has the c), and costs k draft forwards and a target forward of k + 1 rows:
    ``L_k t(1) / (k d + t(k + 1))``, as ``EvalReport.projected_speedup``. That one has the accept
    length that was measured, which lies a little below ``L_K``; see ``acceptance.accept_length``.

    Returns:
        Nothing for trees, whose shorter chains weren't decoded, nor for records without costs.
    """
    draft_step_s, target_step_s = report.draft_step_s, report.target_step_s
    if draft_step_s is None or target_step_s is None or not report.target_rows_s:
        return {}
    if report.draft_topk > 1:
        return {}
    speedups, length, reached = {}, 1.0, 1.0
    for k, rate in enumerate(report.accept_rates, start=1):
        reached *= rate
        length += reached
        cycle_s = k * draft_step_s + report.target_rows_s[k + 1]
        speedups[k] = length * target_step_s / cycle_s
    return speedups
