"""What people look at: one report a stage, as a Flyte deck and as a file beside the run."""

from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from flytekit import Deck

from tasks.report_page import (
    ACCENT,
    axes,
    bars,
    box,
    document,
    facts,
    flow,
    highlighted,
    lines,
    note,
    page,
    plot,
    section,
    table,
    tiles,
)
from tasks.stage import is_local
from torchspec_lib.data.dataset import decoded_spans, load_prompts, summarize
from torchspec_lib.plan import MIB, Bundle, ClusterPlan
from torchspec_lib.ray.capacity import describe
from torchspec_lib.registry.candidate import Candidate, code_version
from torchspec_lib.results import DatasetManifest, RegisteredDraft
from torchspec_lib.run_folder import RunFolder

NAMES = ("data", "plan", "training", "evaluation", "registration")
NUM_SAMPLES = 6


def publish(name: str, html: str, folder: RunFolder) -> None:
    """Show a report as the task's deck, and in a local run write it to a file too."""
    Deck(name, html)
    if is_local():
        folder.reports.mkdir(parents=True, exist_ok=True)
        (folder.reports / f"{name}.html").write_text(document(name, html, NAMES))


def data_report(manifest: DatasetManifest, folder: Path, tokenizer: Any) -> str:
    """What the draft is trained on: sizes, lengths, and samples that show what is supervised."""
    prompts = load_prompts(folder)
    samples = (highlighted(decoded_spans(tokenizer, p)) for p in islice(prompts, NUM_SAMPLES))
    supervised = manifest.num_loss_tokens / manifest.num_tokens
    rejected = [(reason, f"{count:,}") for reason, count in manifest.rejected.items()]
    return page(
        "Prepared data",
        f"data set {manifest.dataset_id}",
        tiles(
            {
                "prompts": f"{manifest.num_prompts:,}",
                "held-out prompts": f"{manifest.num_heldout:,}",
                "tokens": f"{manifest.num_tokens:,}",
                "of them supervised": f"{supervised:.0%}",
                "draft vocabulary": f"{manifest.draft_vocab_size:,}",
                "of supervised tokens in it": f"{manifest.vocab_coverage:.2%}",
            }
        ),
        section("Lengths", _length_plot(prompts.lengths, manifest)),
        section(
            "Per prompt",
            summarize(folder).to_html(border=0, float_format=_short),
        ),
        section(
            "Samples",
            note("Marked text is supervised: the draft learns to predict it, end of turn included"),
            *samples,
        ),
        section(
            "Filtered out",
            table(("reason", "conversations"), rejected) if rejected else note("Nothing"),
        ),
    )


def _short(number: float) -> str:
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.2f}"


def _length_plot(lengths: Any, manifest: DatasetManifest) -> str:
    figure, (ax,) = axes([""], 2.4)
    ax.hist(lengths, bins=40, color=ACCENT)
    ax.set(xlabel="tokens", ylabel="prompts")
    median = int(np.median(lengths))
    return plot(
        figure, f"Tokens of a prompt: median {median:,}, the longest has {manifest.longest:,}"
    )


def plan_report(plan: ClusterPlan) -> str:
    """Who sits where, and what the store holds."""
    store = f"{plan.segment_bytes / MIB:,.0f} MiB, {plan.max_in_flight_bytes / MIB:,.1f} in flight"
    trainers = [box("trainer", f"trainer rank {i}", _size(b)) for i, b in enumerate(plan.bundles)]
    del trainers[len(plan.training_bundles) :]
    if plan.placement == "colocate":
        engine_sizes = ["beside a trainer rank"] * plan.num_engines
    else:
        engine_sizes = [_size(bundle) for bundle in plan.inference_bundles]
    engines = [box("engine", f"engine {i}", size) for i, size in enumerate(engine_sizes)]
    return page(
        "Cluster plan",
        f"placement {plan.placement} on {plan.device}",
        flow(engines, [box("store", "Mooncake store", store)], trainers),
        section(
            "Sizes",
            facts(
                {
                    "steps": f"{plan.num_steps:,}",
                    "nodes": f"{plan.inference_num_nodes} for inference, "
                    f"{plan.training_num_nodes} for training",
                    "a token's hidden states": f"{plan.bytes_per_token:,} bytes",
                    "the longest sample": f"{plan.sample_bytes / MIB:,.2f} MiB",
                    "in flight at most": f"{plan.max_in_flight_bytes / MIB:,.1f} MiB, captured or "
                    "being captured and not yet fetched",
                    "the store's memory": f"{plan.segment_bytes / MIB:,.0f} MiB",
                    "the target's weights": f"{plan.weight_bytes / MIB:,.1f} MiB an engine",
                }
            ),
        ),
    )


def _size(bundle: Bundle) -> str:
    return describe(bundle.num_gpus, bundle.num_cpus)


def registration_report(outcome: RegisteredDraft, candidate: Candidate) -> str:
    """How the pipeline ended, why, and where the time went."""
    state = "champion" if outcome.is_champion else "registered"
    return page(
        "Registration",
        outcome.model_name,
        tiles(
            {
                "state": state if outcome.registered else "not registered",
                "version": outcome.version or "none",
                "accept length": f"{candidate.report.accept_length:.2f}",
            }
        ),
        section("Decision", f"<p>{escape(outcome.decision)}</p>"),
        section("Time of each stage", bars(candidate.stage_s, "s")),
        section(
            "Lineage",
            facts(
                {
                    "target": f"{candidate.target.path} ({candidate.target.fingerprint})",
                    "data set": candidate.manifest.dataset_id,
                    "training run": candidate.training.run_id,
                    "code": code_version(),
                    "registry": outcome.tracking_uri,
                }
            ),
        ),
        section("Summary", lines(outcome.summary)),
    )
