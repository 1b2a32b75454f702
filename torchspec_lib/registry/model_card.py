"""What people read: the last lines of a run, and the README of a registered draft."""

from collections.abc import Mapping

from torchspec_lib.registry.candidate import Candidate
from torchspec_lib.registry.gate import conditions
from torchspec_lib.results import Cost, Estimate, EvalReport, RegisteredDraft

LABEL_WIDTH = 15


def run_summary(candidate: Candidate, outcome: RegisteredDraft) -> str:
    """All figures of a run in a few lines, the most important first."""
    report, training, manifest = candidate.report, candidate.training, candidate.manifest
    epochs = "1 epoch" if training.num_epochs == 1 else f"{training.num_epochs} epochs"
    rows = {
        "registered" if outcome.registered else "not registered": _outcome(outcome),
        "accept length": (
            f"{report.accept_length:.2f} tokens per target forward (plain decoding: 1.00), "
            f"by position {_percentages(report)}"
        ),
        "measured with": conditions(report),
        "lossless": f"{report.num_lossless} of {report.num_prompts} prompts",
        "speed-up": _speedup(report),
        "samples": (
            f"{training.num_trained:,} trained, {training.num_rejected:,} rejected"
            f"{_reasons(training.rejected)}, of {training.num_prompts:,} prompts x {epochs}"
        ),
        "conversations": (
            f"{sum(manifest.rejected.values()):,} filtered out{_reasons(manifest.rejected)}"
        ),
        "time": _times(candidate.stage_s),
        "cost": cost_text(candidate.cost),
        "draft": str(candidate.draft_dir),
    }
    if outcome.registered:
        rows["look at it"] = _viewer(outcome.tracking_uri)
    return "\n".join(f"{label:<{LABEL_WIDTH}}{text}" for label, text in rows.items())


def model_card(candidate: Candidate, model_name: str, code: str, config: str) -> str:
    """The README of a registered draft: how to serve it, what it reached, what it is made of.

    Args:
        candidate: The draft.
        model_name: What it is registered as.
        code: ``code_version``.
        config: ``config_hash``.
    """
    report, target, manifest = candidate.report, candidate.target, candidate.manifest
    steps = report.draft_steps
    return f"""# {model_name}

An EAGLE-3 draft for the target `{target.path}` (fingerprint `{target.fingerprint}`), and for no
other.

## Serve it

SGLang:

    python -m sglang.launch_server --model-path {target.path} \\
      --speculative-algorithm EAGLE3 --speculative-draft-model-path THIS_FOLDER \\
      --speculative-num-steps {steps} --speculative-eagle-topk 1 \\
      --speculative-num-draft-tokens {steps + 1}

vLLM:

    vllm serve {target.path} --speculative-config \\
      '{{"method": "eagle3", "model": "THIS_FOLDER", "num_speculative_tokens": {steps}}}'

## What it reached

Accept length {report.accept_length:.2f}: new tokens per target forward, the target's own included;
plain decoding has 1.00. By position: {_percentages(report)}. Lossless on {report.num_lossless} of
{report.num_prompts} prompts.
Measured with: {conditions(report)}.

## What it is made of

| | |
|---|---|
| samples trained | {candidate.training.num_trained:,} in {candidate.training.num_steps:,} steps |
| data set | `{manifest.dataset_id}`, {manifest.num_tokens:,} tokens |
| training run | `{candidate.training.run_id}` |
| code | `{code}` |
| settings | `{config}`, in `config.json` beside the draft's folder |

## What it cost

{cost_text(candidate.cost)}.
"""


def cost_text(cost: Cost) -> str:
    """A bill in a line.

    Example:
        ``"1.25 GPU-hours on 8 GPUs, 0.2 hours in all, 1,200,000 tokens trained"``
    """
    held = f"{cost.gpu_hours:,.2f} GPU-hours on {cost.num_gpus} GPU{'s' * (cost.num_gpus != 1)}"
    if not cost.num_gpus:
        held = f"no GPU, {cost.num_workers} cores"
    return f"{held}, {duration(cost.wall_s)} in all, {cost.num_tokens:,} tokens trained"


def estimate_text(estimate: Estimate) -> str:
    """An estimate in a few words: ``3.5 h, 28 GPU-hours``."""
    gpu_hours = f", {estimate.gpu_hours:,.1f} GPU-hours" if estimate.gpu_hours else ""
    return f"{duration(estimate.train_s)}{gpu_hours}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``82 s``, ``14 min``, ``3.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _outcome(outcome: RegisteredDraft) -> str:
    if not outcome.registered:
        return outcome.decision
    alias = ", alias champion" if outcome.is_champion else ""
    again = "" if outcome.is_new else ", already registered with this very content"
    return f"{outcome.model_name} version {outcome.version}{alias}{again}: {outcome.decision}"


def _percentages(report: EvalReport) -> str:
    return " ".join(f"{rate:.0%}" for rate in report.accept_rates)


def _speedup(report: EvalReport) -> str:
    cost = report.draft_step_s / report.target_step_s
    return (
        f"{report.measured_speedup:.2f}x measured with the Python loop of this evaluation "
        f"({report.plain_s:.1f} s plain, {report.speculative_s:.1f} s with the draft); "
        f"{report.projected_speedup:.2f}x projected from the cost of a draft step, "
        f"{cost:.2f} of a target step"
    )


def _reasons(rejected: Mapping[str, int]) -> str:
    parts = [f"{reason} {count:,}" for reason, count in rejected.items()]
    return f" ({', '.join(parts)})" if parts else ""


def _times(stage_s: Mapping[str, float]) -> str:
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in stage_s.items())
    return f"{stages}; {sum(stage_s.values()):.0f} s in all"


def _viewer(tracking_uri: str) -> str:
    if tracking_uri.startswith(("http://", "https://", "databricks")):
        return tracking_uri
    return f"mlflow ui --backend-store-uri {tracking_uri}"
