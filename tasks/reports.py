"""What people look at: one report a stage, as a Flyte deck and as a file beside the run."""

from pathlib import Path

from flytekit import Deck

from tasks.data_report import data_report
from tasks.plan_drawing import cores, drawing
from tasks.report_page import (
    bars,
    decision,
    document,
    facts,
    lines,
    navigation,
    note,
    page,
    section,
    size,
    table,
    tiles,
)
from tasks.stage import is_local
from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.plan import ClusterPlan
from torchspec_lib.ray.capacity import describe
from torchspec_lib.registry.candidate import Candidate, code_version, config_hash
from torchspec_lib.registry.gate import conditions
from torchspec_lib.registry.model_card import duration
from torchspec_lib.results import DatasetManifest, Estimate, RegisteredDraft
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.target import TargetSpec

NAMES = ("data", "plan", "training", "evaluation", "registration")


def publish(name: str, html: str, folder: RunFolder) -> None:
    """Show a report as the task's deck, and in a local run write it to a file too."""
    Deck(name, html)
    if is_local():
        folder.reports.mkdir(parents=True, exist_ok=True)
        (folder.reports / f"{name}.html").write_text(document(name, html))
        _link(folder.reports)


def is_missing(name: str, folder: RunFolder) -> bool:
    """Whether a local run lacks a report's file: its stage was found in Flyte's cache."""
    return is_local() and not (folder.reports / f"{name}.html").is_file()


def publish_data(run: RunConfig, target: TargetSpec, manifest: DatasetManifest, data: Path) -> None:
    """The report on a data set, beside the run that trains on it."""
    tokenizer = ChatTokenizer.load(target.path, run.model.trust_remote_code).tokenizer
    page = data_report(manifest, data, tokenizer)
    publish("data", page, RunFolder.of(run, manifest, target))


def _link(reports: Path) -> None:
    """Link the files with each other; a stage that isn't done has none."""
    present = [name for name in NAMES if (reports / f"{name}.html").is_file()]
    for name in present:
        path = reports / f"{name}.html"
        before, _, rest = path.read_text().partition("<nav>")
        path.write_text(before + navigation(present, name) + rest.partition("</nav>")[2])


def plan_report(plan: ClusterPlan, estimate: Estimate) -> str:
    """Who sits where, what the store holds, and what it will cost."""
    workers = {"GPUs": plan.num_gpus} if plan.num_gpus else {"CPU cores": cores(plan.bundles)}
    gpus = sum(bundle.num_gpus for bundle in plan.inference_bundles) // plan.num_engines
    share = f", {size(plan.weight_bytes / gpus)} on each of its {gpus} GPUs" if gpus > 1 else ""
    return page(
        "Cluster plan",
        f"placement {plan.placement} on {plan.device}",
        tiles(
            {
                **{name: f"{count:,}" for name, count in workers.items()},
                "trainer ranks": f"{len(plan.training_bundles):,}",
                "engines": f"{plan.num_engines:,}",
                "steps": f"{plan.num_steps:,}",
                "expected to take": duration(estimate.train_s),
                **({"GPU-hours": f"{estimate.gpu_hours:,.1f}"} if plan.num_gpus else {}),
            }
        ),
        note(f"Expected: {estimate.basis}"),
        section("Who sits where", drawing(plan)),
        section(
            "Sizes",
            facts(
                {
                    "a token's hidden states": f"{plan.bytes_per_token:,} bytes",
                    "the longest sample": size(plan.sample_bytes),
                    "in flight at most": f"{size(plan.max_in_flight_bytes)}, captured or "
                    "being captured and not yet fetched",
                    "the store's memory": size(plan.segment_bytes),
                    "the target's weights": f"{size(plan.weight_bytes)} an engine{share}",
                }
            ),
        ),
    )


def registration_report(outcome: RegisteredDraft, candidate: Candidate, run: RunConfig) -> str:
    """How the pipeline ended, why, where the time went, and where the draft comes from."""
    manifest, cost, champion = candidate.manifest, candidate.cost, candidate.champion_report
    state = "champion" if outcome.is_champion else "registered"
    before = {"the champion's": f"{champion.accept_length:.2f}"} if champion else {}
    return page(
        "Registration",
        outcome.model_name,
        decision(outcome.registered, _ending(outcome)),
        tiles(
            {
                "state": state if outcome.registered else "not registered",
                "version": outcome.version or "none",
                "accept length": f"{candidate.report.accept_length:.2f}",
                **before,
            }
        ),
        section(
            "The gate",
            table(("", "wanted", "reached", ""), _gate(candidate, run), num_words=4),
            note(f"Measured with {conditions(candidate.report)}"),
        ),
        section(
            "Time of each stage",
            bars({name: (s, _seconds(s)) for name, s in candidate.stage_s.items()}),
        ),
        section(
            "Cost",
            facts(
                {
                    "GPU-hours": f"{cost.gpu_hours:,.2f} on {describe(cost.num_gpus, 0)}"
                    if cost.num_gpus
                    else "none: everything ran on CPUs",
                    "workers": f"{cost.num_workers} trainer ranks and engines",
                    "tokens trained": f"{cost.num_tokens:,}",
                    "wall time": duration(cost.wall_s),
                }
            ),
        ),
        section(
            "Lineage",
            facts(
                {
                    "target": f"{candidate.target.path} ({candidate.target.fingerprint})",
                    "data set": f"{manifest.dataset_id}: {manifest.num_prompts:,} prompts",
                    "training run": candidate.training.run_id,
                    "started from": run.training.continual_from or "scratch",
                    "code": code_version(),
                    "settings": config_hash(run),
                    "registry": outcome.tracking_uri,
                }
            ),
        ),
        section("Summary", lines(outcome.summary)),
    )


def _ending(outcome: RegisteredDraft) -> str:
    """What became of the draft, and why, in a sentence."""
    if not outcome.registered:
        return f"Not registered: {outcome.decision}"
    if not outcome.is_new:
        how = f"Already registered as version {outcome.version}, with this very content"
    elif outcome.is_champion:
        how = f"Registered as version {outcome.version}, the new champion"
    else:
        how = f"Registered as version {outcome.version}; the champion stays"
    return f"{how}: {outcome.decision}"


def _gate(candidate: Candidate, run: RunConfig) -> list[tuple[str, str, str, str]]:
    """Each condition: its name, what is wanted, what was reached, and whether that will do."""
    report, champion = candidate.report, candidate.champion_report
    least = run.registry.min_accept_length
    length = f"{report.accept_length:.3f}"
    rows = [
        (
            "answers as in plain decoding",
            f"all {report.num_prompts}",
            f"{report.num_lossless}" + (f", and {report.num_ties} ties" if report.num_ties else ""),
            _mark(not report.num_changed),
        ),
        ("accept length", f"at least {least:g}", length, _mark(report.accept_length >= least)),
    ]
    if champion is not None:
        purpose = "accept length" if run.registry.only_better else "the same, to be champion"
        is_better = report.accept_length > champion.accept_length
        wanted = f"above the champion's {champion.accept_length:.3f}"
        rows.append((purpose, wanted, length, _mark(is_better)))
    return rows


def _mark(is_met: bool) -> str:
    return "✓ met" if is_met else "✗ not met"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
