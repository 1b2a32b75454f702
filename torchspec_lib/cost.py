"""What a draft costs: an estimate before the start, the bill afterwards. Pure but for old runs."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from torchspec_lib.config.run import RunConfig
from torchspec_lib.plan import ClusterPlan
from torchspec_lib.results import Cost, DatasetManifest, Estimate, TrainSummary
from torchspec_lib.run_folder import RunFolder

FLOPS_PER_WORKER = {"cuda": 3e14, "cpu": 5e9}
"""What a GPU or a core really reaches in matrix products; a third of an H200's figure."""
BRING_UP_S = {"cuda": 300.0, "cpu": 30.0}
"""Ray, the store, and the target's weights in every engine."""
TRAINING_FLOPS = 6
"""Per parameter and token: two forward, four backward."""
BRING_UPS = "bring_ups.txt"
"""In a run's folder: seconds until engines and trainers were up, a line for every process."""
DRAFT_SHARE = 0.05
"""A draft's parameters that a token touches, of the target's: one layer and a smaller head."""


def estimate(run: RunConfig, plan: ClusterPlan, manifest: DatasetManifest) -> Estimate:
    """How long a training takes and how many GPU-hours: from an earlier run, or from its sizes.

    An earlier run counts if it had the same target, device and number of workers.
    """
    num_tokens = manifest.num_tokens * run.training.num_epochs
    for folder, summary in _finished_runs(run.data_path / "runs"):
        if summary.wall_s > 0 and _is_alike(run, folder):
            rate = summary.num_tokens / training_s(RunFolder(folder), summary)
            basis = f"run {summary.run_id} took {rate:,.0f} tokens a second"
            return _estimate(plan, num_tokens / rate, basis)
    parameters = plan.weight_bytes / (4 if run.model.dtype == "float32" else 2)
    capture = 2 * parameters / plan.num_engines
    draft = DRAFT_SHARE * parameters * TRAINING_FLOPS * run.draft.ttt_steps
    # Engines and trainers work at the same time: the slower side counts.
    slower = max(capture, draft / run.training.world_size)
    seconds = num_tokens * slower / FLOPS_PER_WORKER[plan.device] + BRING_UP_S[plan.device]
    return _estimate(plan, seconds, "rough, from parameters and tokens: no run like it is finished")


def training_s(folder: RunFolder, summary: TrainSummary) -> float:
    """Seconds that a finished run was trained, by all the processes that worked on it.

    Of those that were killed or preempted the steps count that were kept.
    """
    steps = folder.read_metrics() if summary.resumed_from_step else []
    earlier = (step for step in steps if step.step <= summary.resumed_from_step)
    return summary.wall_s + sum(step.step_s + step.wait_s for step in earlier)


def note_bring_up(folder: RunFolder, seconds: float, is_first: bool) -> None:
    """Add what a process took until its engines and trainers were up."""
    with (folder.path / BRING_UPS).open("w" if is_first else "a") as file:
        file.write(f"{seconds:.1f}\n")


def held_s(folder: RunFolder, summary: TrainSummary) -> float:
    """Seconds that a finished run has held its workers: brought up, and trained.

    The same whenever it is asked for, so that a rerun bills what the run did.
    """
    file = folder.path / BRING_UPS
    bring_ups = file.read_text().split() if file.is_file() else []
    return training_s(folder, summary) + sum(float(seconds) for seconds in bring_ups)


def bill(plan: ClusterPlan, training: TrainSummary, stage_s: Mapping[str, float]) -> Cost:
    """What a draft has cost: its training holds all GPUs, its evaluation one.

    Args:
        plan: The training's.
        training: How it went.
        stage_s: Seconds of the pipeline's stages; ``train`` and ``evaluate`` are there.
    """
    held = plan.num_gpus * stage_s["train"] + (plan.device == "cuda") * stage_s["evaluate"]
    return Cost(
        gpu_hours=held / 3600,
        num_gpus=plan.num_gpus,
        num_workers=len(plan.training_bundles) + plan.num_engines,
        num_tokens=training.num_tokens,
        wall_s=sum(stage_s.values()),
    )


def _estimate(plan: ClusterPlan, seconds: float, basis: str) -> Estimate:
    return Estimate(train_s=seconds, gpu_hours=plan.num_gpus * seconds / 3600, basis=basis)


def _finished_runs(runs: Path) -> Iterator[tuple[Path, TrainSummary]]:
    """The newest first."""
    summaries = sorted(runs.glob("*/summary.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in summaries:
        yield path.parent, TrainSummary.model_validate_json(path.read_text())


def _is_alike(run: RunConfig, folder: Path) -> bool:
    """The noted settings may be an older version's, so they are looked at as plain JSON."""
    other = json.loads((folder / "config.json").read_text())
    mine = run.model_dump(mode="json")
    return all(
        mine[section][key] == other.get(section, {}).get(key)
        for section, key in (
            ("model", "target"),
            ("cluster", "device"),
            ("inference", "engine"),
            ("inference", "inference_num_gpus"),
            ("training", "training_num_nodes"),
            ("training", "training_num_gpus_per_node"),
        )
    )
