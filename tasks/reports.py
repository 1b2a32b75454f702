"""What people look at: one report a stage, as a Flyte deck and as a file beside the run."""

import math
from collections.abc import Sequence
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
    decision,
    document,
    facts,
    flow,
    highlighted,
    lines,
    node_box,
    note,
    page,
    plot,
    section,
    table,
    tiles,
)
from tasks.stage import is_local
from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.dataset import decoded_spans, load_prompts, summarize
from torchspec_lib.plan import MIB, Bundle, ClusterPlan
from torchspec_lib.ray.capacity import describe
from torchspec_lib.registry.candidate import Candidate, code_version, config_hash
from torchspec_lib.registry.model_card import duration
from torchspec_lib.results import DatasetManifest, Estimate, RegisteredDraft
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


def plan_report(plan: ClusterPlan, estimate: Estimate) -> str:
    """Who sits where, what the store holds, and what it will cost."""
    store = f"{_bytes(plan.segment_bytes)}, {_bytes(plan.max_in_flight_bytes)} in flight"
    engines, trainers = _node_boxes(plan)
    return page(
        "Cluster plan",
        f"placement {plan.placement} on {plan.device}",
        tiles(
            {
                "GPUs": f"{plan.num_gpus:,}",
                "trainer ranks": f"{len(plan.training_bundles):,}",
                "engines": f"{plan.num_engines:,}",
                "steps": f"{plan.num_steps:,}",
                "expected": duration(estimate.train_s),
            }
            | ({"GPU-hours": f"{estimate.gpu_hours:,.1f}"} if plan.num_gpus else {})
        ),
        section("Who sits where", flow(engines, [box("store", "Mooncake store", store)], trainers)),
        note(f"Expected: {estimate.basis}"),
        section(
            "Sizes",
            facts(
                {
                    "a token's hidden states": f"{plan.bytes_per_token:,} bytes",
                    "the longest sample": _bytes(plan.sample_bytes),
                    "in flight at most": f"{_bytes(plan.max_in_flight_bytes)}, captured or "
                    "being captured and not yet fetched",
                    "the store's memory": _bytes(plan.segment_bytes),
                    "the target's weights": f"{_bytes(plan.weight_bytes)} an engine",
                }
            ),
        ),
    )


def _bytes(count: int) -> str:
    mib = count / MIB
    return f"{mib:,.1f} MiB" if mib < 1024 else f"{mib / 1024:,.1f} GiB"


def _node_boxes(plan: ClusterPlan) -> tuple[list[str], list[str]]:
    """Drawings of the nodes that capture, and of those that train."""
    trainers = [(f"trainer rank {i}", _size(b)) for i, b in enumerate(plan.training_bundles)]
    training = _spread("trainer", "training node", trainers, plan.training_num_nodes)
    if plan.placement == "colocate":
        engines = [(f"engine {i}", "beside a trainer rank") for i in range(plan.num_engines)]
        return _spread("engine", "training node", engines, plan.training_num_nodes), training
    parts = len(plan.inference_bundles) // plan.num_engines
    engines = [
        (f"engine {i // parts}" + (f", part {i % parts}" if parts > 1 else ""), _size(b))
        for i, b in enumerate(plan.inference_bundles)
    ]
    return _spread("engine", "inference node", engines, plan.inference_num_nodes), training


def _spread(kind: str, node: str, actors: Sequence[tuple[str, str]], num_nodes: int) -> list[str]:
    """Actors over as many nodes, each as full as the others but for the last."""
    per_node = math.ceil(len(actors) / max(num_nodes, 1))
    return [
        node_box(
            f"{node} {i + 1}" if num_nodes > 1 else node,
            [box(kind, *actor) for actor in actors[i * per_node : (i + 1) * per_node]],
        )
        for i in range(num_nodes)
    ]


def _size(bundle: Bundle) -> str:
    return describe(bundle.num_gpus, bundle.num_cpus)


def registration_report(outcome: RegisteredDraft, candidate: Candidate, run: RunConfig) -> str:
    """How the pipeline ended, why, where the time went, and where the draft comes from."""
    state = "champion" if outcome.is_champion else "registered"
    manifest, cost = candidate.manifest, candidate.cost
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
        section("Decision", decision(outcome.registered, outcome.decision)),
        note(
            f"The gate: lossless on every prompt, and an accept length of at least "
            f"{run.registry.min_accept_length:g}"
            + (", and better than the champion" if run.registry.only_better else "")
        ),
        section("Time of each stage", bars(candidate.stage_s, "s")),
        section(
            "Cost",
            facts(
                {
                    "GPU-hours": f"{cost.gpu_hours:,.2f} on {cost.num_gpus} GPU(s)"
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
