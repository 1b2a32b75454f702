"""Whether a draft is registered, and whether it becomes the champion. Pure."""

from dataclasses import dataclass

from torchspec_lib.results import EvalReport


@dataclass(frozen=True, slots=True)
class GateDecision:
    """A decision, and the figures behind it in a sentence."""

    passed: bool
    reason: str


def conditions(report: EvalReport) -> str:
    """What an accept length depends on beside the draft; equal texts make figures comparable.

    Example:
        ``"hf, chains of 5, temperature 0, heldout-3f9a0c12 (100 prompts), at most 128 tokens"``
    """
    return (
        f"{report.engine}, {report.drafting}, temperature {report.temperature:g}, "
        f"{report.prompt_set}, at most {report.max_new_tokens} tokens"
    )


def check_draft(report: EvalReport, min_accept_length: float) -> GateDecision:
    """Pass a draft that leaves every answer as it is, ties apart, and is long enough.

    Args:
        report: The draft's evaluation.
        min_accept_length: ``registry.min_accept_length``; reaching it is enough.
    """
    length, problems = report.accept_length, []
    if report.num_changed:
        changed = f"{report.num_changed} of {report.num_prompts} answers"
        problems.append(f"{changed} differ from plain decoding's")
    if length < min_accept_length:
        problems.append(
            f"accept length {length:.3f} is {min_accept_length - length:.3f} below "
            f"registry.min_accept_length ({min_accept_length:g})"
        )
    return GateDecision(not problems, "; ".join(problems) or f"accept length {length:.3f}")


def check_champion(report: EvalReport, champion_accept_length: float | None) -> GateDecision:
    """Pass a draft that is strictly better than the champion.

    Args:
        report: The draft's evaluation.
        champion_accept_length: The champion's, under the same conditions; None without one.
    """
    length = report.accept_length
    if champion_accept_length is None:
        return GateDecision(True, f"the first champion, with accept length {length:.3f}")
    lead = length - champion_accept_length
    if lead > 0:
        return GateDecision(
            True,
            f"accept length {length:.3f} beats the champion's {champion_accept_length:.3f} "
            f"by {lead:.3f}",
        )
    return GateDecision(
        False,
        f"accept length {length:.3f} doesn't beat the champion's {champion_accept_length:.3f} "
        f"({-lead:.3f} less)",
    )
