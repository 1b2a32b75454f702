"""What people read: the last lines of a run, and the README of a registered draft."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

from torchspec_lib.config.run import RunConfig
from torchspec_lib.registry.candidate import Candidate, config_hash
from torchspec_lib.registry.gate import conditions
from torchspec_lib.results import Cost, Estimate, EvalReport, RegisteredDraft, SetResult

LABEL_WIDTH = 15
RESULTS = ("prompts", "number", "accept length", "by position", "lossless", "speed-up")
NORMS = """
It is an EAGLE-3.1 draft: its configuration has `fc_norm`, `norm_output` or both. Engines from
before June 2026 don't know them. SGLang then leaves them out without a word, and accepts little.
"""
TAGS = ("eagle3", "speculative-decoding", "draft-model", "sglang", "vllm")


def run_summary(candidate: Candidate, outcome: RegisteredDraft) -> str:
    """All figures of a run in a few lines, the most important first."""
    report, training, manifest = candidate.report, candidate.training, candidate.manifest
    epochs = "1 epoch" if training.num_epochs == 1 else f"{training.num_epochs} epochs"
    rows = {
        "registered" if outcome.registered else "not registered": _outcome(outcome),
        "accept length": (
            f"{report.accept_length:.2f} tokens per target forward (plain decoding: 1.00), "
            f"by position {_percentages(report.accept_rates)}"
        ),
        "measured with": conditions(report),
        "lossless": report.lossless_text,
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
        "draft": training.draft_dir,
    }
    if outcome.hub:
        rows["hub"] = outcome.hub
    if outcome.registered:
        rows["look at it"] = _viewer(outcome.tracking_uri)
    return "\n".join(f"{label:<{LABEL_WIDTH}}{text}" for label, text in rows.items())


def model_card(run: RunConfig, candidate: Candidate, code: str, day: date) -> str:
    """The README of a registered draft: how to serve it, what it reached, what it is made of.

    Its head is what the Hugging Face Hub reads of a model card.

    Args:
        run: What trained it.
        candidate: The draft.
        code: ``code_version``.
        day: When it was registered with these figures.
    """
    report, target = candidate.report, candidate.target
    named, hub_id = run.model.target, _hub_id(run, candidate)
    draft = run.registry.push_to_hub or "THIS_FOLDER"
    return f"""---
{_front_matter(hub_id)}
---

# {run.registry.model_name}

An EAGLE-3 draft for the target `{named}` (fingerprint `{target.fingerprint}`), and for no other.

## Serve it

SGLang:

    python -m sglang.launch_server --model-path {named} --dtype {run.model.dtype} \\
      --speculative-algorithm EAGLE3 --speculative-draft-model-path {draft} \\
      --speculative-num-steps {report.draft_steps} --speculative-eagle-topk {report.draft_topk} \\
      --speculative-num-draft-tokens {report.num_rows}

vLLM, which drafts chains:

    vllm serve {named} --dtype {run.model.dtype} --speculative-config \\
      '{{"method": "eagle3", "model": "{draft}", "num_speculative_tokens": {report.draft_steps}}}'
{NORMS if run.draft.fc_norm or run.draft.norm_output else ""}
## What it reached

New tokens per target forward, the target's own included; plain decoding has 1.00. By position:
how often the draft's token there is accepted, where those before it were.

{_table(RESULTS, _reached(report))}

{_table(("measured with", ""), _conditions(run, candidate, day))}

{_about_speedup(report)}

## What it is made of

{_table(("made of", ""), _lineage(run, candidate, code, hub_id))}
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


def _hub_id(run: RunConfig, candidate: Candidate) -> str | None:
    """The target's, if it came from the hub: then it lies in a snapshot, by its revision."""
    from_hub = Path(candidate.target.path).parent.name == "snapshots"
    return run.model.target if from_hub else None


def _front_matter(base_model: str | None) -> str:
    lines = [f"base_model: {base_model}"] if base_model else []
    lines += ["library_name: sglang", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {tag}" for tag in TAGS]
    return "\n".join([*lines, "# license: yours to choose, in accord with the target's"])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _reached(report: EvalReport) -> list[tuple[str, ...]]:
    """A row for each set of prompts and category; records without sets have the held-out one."""
    sets: Sequence[EvalReport | SetResult] = report.sets or (report,)
    return [
        (
            _prompts(one),
            f"{one.num_prompts:,}",
            f"{one.accept_length:.2f}",
            _percentages(one.accept_rates),
            f"{one.num_lossless:,} of {one.num_prompts:,}",
            f"{one.measured_speedup:.2f}x",
        )
        for one in sets
    ]


def _prompts(one: EvalReport | SetResult) -> str:
    if isinstance(one, EvalReport) or one.category is None:
        return one.prompt_set
    return f"{one.name}: {one.category}"


def _conditions(run: RunConfig, candidate: Candidate, day: date) -> list[tuple[str, str]]:
    report = candidate.report
    return [
        ("engine", f"{report.engine}, on {run.cluster.device}"),
        ("target", f"`{run.model.target}` in {run.model.dtype}"),
        ("drafting", report.drafting),
        ("K (draft tokens, one behind the other)", str(report.draft_steps)),
        ("temperature", f"{report.temperature:g}"),
        ("tokens of an answer", f"at most {report.max_new_tokens}"),
        ("date", day.isoformat()),
    ]


def _lineage(
    run: RunConfig, candidate: Candidate, code: str, hub_id: str | None
) -> list[tuple[str, str]]:
    manifest, training, target = candidate.manifest, candidate.training, candidate.target
    revision = f", revision `{Path(target.path).name}`" if hub_id else ""
    start = run.training.continual_from
    return [
        ("target", f"`{run.model.target}`, fingerprint `{target.fingerprint}`{revision}"),
        (
            "data",
            f"`{manifest.dataset_id}`: {manifest.num_prompts:,} prompts, "
            f"{manifest.num_tokens:,} tokens",
        ),
        ("draft vocabulary", f"{manifest.draft_vocab_size:,} tokens"),
        ("started from", f"`{'/'.join(Path(start).parts[-2:])}`" if start else "scratch"),
        ("trained", f"{training.num_trained:,} samples in {training.num_steps:,} steps"),
        ("training run", f"`{training.run_id}`"),
        ("code", f"`{code}`"),
        ("settings", f"`{config_hash(run)}`, in `config.json` beside the draft's folder"),
        ("GPU-hours", f"{candidate.cost.gpu_hours:,.2f}"),
        ("tokens trained", f"{candidate.cost.num_tokens:,}"),
        ("wall time", duration(candidate.cost.wall_s)),
    ]


def _outcome(outcome: RegisteredDraft) -> str:
    if not outcome.registered:
        return outcome.decision
    alias = ", alias champion" if outcome.is_champion else ""
    again = "" if outcome.is_new else ", already registered with this very content"
    return f"{outcome.model_name} version {outcome.version}{alias}{again}: {outcome.decision}"


def _percentages(accept_rates: Iterable[float]) -> str:
    return " ".join(f"{rate:.0%}" for rate in accept_rates)


def _about_speedup(report: EvalReport) -> str:
    projected = report.projected_speedup
    if projected is None:
        return "The speed-up is SGLang's own, answering one prompt at a time."
    return (
        "The speed-up is this evaluation's own, in a plain loop without an engine; by the costs of "
        f"the\nmodels' forwards alone it would be {projected:.2f}x on the first row's prompts."
    )


def _speedup(report: EvalReport) -> str:
    times = f"({report.plain_s:.1f} s plain, {report.speculative_s:.1f} s with the draft)"
    projected = report.projected_speedup
    if projected is None or report.draft_step_s is None or report.target_step_s is None:
        return f"{report.measured_speedup:.2f}x in SGLang, one prompt at a time {times}"
    return (
        f"{report.measured_speedup:.2f}x measured with the Python loop of this evaluation {times}; "
        f"{projected:.2f}x projected from the cost of a draft step, "
        f"{report.draft_step_s / report.target_step_s:.2f} of a target step"
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
