"""A training run as the driver sees it: it starts the control plane, waits, shows what comes."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from torchspec_lib.config import RunConfig
from torchspec_lib.controller.actors import AsyncInferenceManager, AsyncTrainingController
from torchspec_lib.controller.inference_manager import CapturePolicy, CaptureStats
from torchspec_lib.controller.training_controller import RunTotals, Schedule
from torchspec_lib.errors import StoreUnavailableError
from torchspec_lib.models.export import validate_draft
from torchspec_lib.plan import ClusterPlan
from torchspec_lib.ray.failures import unwrap
from torchspec_lib.ray.train_group import RayTrainGroup
from torchspec_lib.results import DatasetManifest, TrainSummary
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.target import TargetSpec, read_target
from torchspec_lib.training import checkpoint
from torchspec_lib.transfer.mooncake.processes import evicted_keys
from torchspec_lib.transfer.store import StoreAddress
from torchspec_lib.types import StepMetrics, accept_length


@dataclass(frozen=True, slots=True)
class RunInputs:
    """What a training run is made of."""

    run: RunConfig
    target: TargetSpec
    plan: ClusterPlan
    dataset_dir: Path
    manifest: DatasetManifest
    folder: RunFolder

    @classmethod
    def of(
        cls, run: RunConfig, plan: ClusterPlan, dataset_dir: Path, manifest: DatasetManifest
    ) -> "RunInputs":
        target = read_target(run.model)
        folder = RunFolder.of(run, manifest, target)
        return cls(run, target, plan, dataset_dir, manifest, folder)


class TrainingRun:
    """The training loop as the driver sees it: it waits, and shows what comes."""

    def __init__(
        self,
        stack: ExitStack,
        inputs: RunInputs,
        engines: Sequence[Any],
        trainers: RayTrainGroup,
        address: StoreAddress,
        resume_from: Path | None,
    ) -> None:
        run = inputs.run
        self._inputs, self._trainers, self._address = inputs, trainers, address
        self._resume_step, ledger = checkpoint.position(resume_from)
        inputs.folder.keep_metrics_until(self._resume_step)
        self._controller = driver_actor(AsyncTrainingController).remote(
            str(inputs.dataset_dir), inputs.folder, _schedule(inputs), self._resume_step, ledger
        )
        stack.callback(ray.kill, self._controller)
        policy = CapturePolicy(
            inputs.plan.max_in_flight_bytes, run.inference.request_size, run.inference.max_attempts
        )
        self._manager = driver_actor(AsyncInferenceManager).remote(
            self._controller, list(engines), policy, inputs.plan
        )
        stack.callback(ray.kill, self._manager)

    def train(self) -> TrainSummary:
        """Train to the end, settle the accounts, export the draft.

        Raises:
            LedgerError: A prompt is neither trained nor rejected.
            StoreUnavailableError: The store evicted samples that nobody had read.
            WorkerLostError: A part of the run died.
        """
        start = time.monotonic()
        folder = self._inputs.folder
        self._follow(self._trainers.run(self._controller, self._manager))
        totals: RunTotals = get(self._controller.finish.remote())
        stats: CaptureStats = get(self._manager.stats.remote())
        if evicted := evicted_keys(self._address.metrics):
            raise StoreUnavailableError("keep", f"it evicted {evicted} samples unread")
        self._trainers.export(str(folder.draft))
        validate_draft(folder.draft, self._inputs.target)
        wall_s = time.monotonic() - start
        summary = self._summary(folder.read_metrics(), totals, stats, wall_s)
        folder.finish(summary)
        return summary

    def _follow(self, trainer_refs: list[Any]) -> None:
        """Show finished steps until every rank is done; raise what ends the run early."""
        running = list(trainer_refs)
        capturing = self._manager.run.remote()
        num_seen, num_left = 0, self._inputs.plan.num_steps - self._resume_step
        with tqdm(total=num_left, desc="training", unit="step", dynamic_ncols=True) as bar:
            news = self._controller.progress.remote(0)
            while running or num_seen < self._num_steps_taken():
                done, _ = ray.wait([news, capturing, *running], num_returns=1)
                if done[0] == capturing:
                    get(capturing)
                elif done[0] == news:
                    num_seen += _show(get(news), bar)
                    news = self._controller.progress.remote(num_seen)
                else:
                    self._trainers.wait(done)
                    running.remove(done[0])

    def _num_steps_taken(self) -> int:
        """Of this run since it was resumed, once all ranks are through."""
        totals: RunTotals = get(self._controller.finish.remote())
        return totals.num_steps - self._resume_step

    def _summary(
        self,
        metrics: Sequence[StepMetrics],
        totals: RunTotals,
        stats: CaptureStats,
        wall_s: float,
    ) -> TrainSummary:
        tail = metrics[-max(1, len(metrics) // 10) :]
        return TrainSummary(
            run_id=self._inputs.folder.run_id,
            draft_dir=str(self._inputs.folder.draft),
            num_steps=totals.num_steps,
            num_prompts=self._inputs.manifest.num_prompts,
            num_epochs=self._inputs.run.training.num_epochs,
            num_trained=totals.num_trained,
            num_rejected=totals.num_rejected,
            rejected=totals.rejected,
            num_tokens=sum(step.num_tokens for step in metrics),
            loss=metrics[-1].loss,
            accept_length=pooled_accept_length(tail),
            bytes_streamed=stats.num_bytes,
            resumed_from_step=self._resume_step,
            wall_s=wall_s,
            trainer_wait_s=sum(step.wait_s for step in metrics),
            capture_wait_s=stats.waited_for_bytes_s,
        )


def _show(steps: Sequence[StepMetrics], bar: Any) -> int:
    last = steps[-1]
    bar.set_postfix(loss=f"{last.loss:.3f}", accept_length=f"{last.accept_length:.2f}")
    bar.update(len(steps))
    return len(steps)


def _schedule(inputs: RunInputs) -> Schedule:
    run = inputs.run
    return Schedule(
        run_id=inputs.folder.run_id,
        seed=run.seed,
        num_epochs=run.training.num_epochs,
        global_batch_size=run.training.global_batch_size,
        world_size=run.training.world_size,
        micro_batch_tokens=run.training.micro_batch_tokens,
        max_failed_fraction=run.inference.max_failed_fraction,
    )


def pooled_accept_length(steps: Sequence[StepMetrics]) -> float:
    """Accept length over several steps, from their counts taken together."""
    chains = [sum(depth) for depth in zip(*(step.chains for step in steps), strict=True)]
    matches = [sum(depth) for depth in zip(*(step.matches for step in steps), strict=True)]
    return accept_length([m / c if c else 0.0 for m, c in zip(matches, chains, strict=True)])


def driver_actor(actor_class: type, node_id: str | None = None) -> Any:
    """An actor class without a bundle; on ``node_id``, or else beside the driver."""
    node = node_id or ray.get_runtime_context().get_node_id()
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(actor_class).options(num_cpus=0, scheduling_strategy=strategy)


def get(refs: Any) -> Any:
    """``ray.get``, with the remote side's own errors."""
    try:
        return ray.get(refs)
    except RayError as error:
        raise unwrap(error) from error
