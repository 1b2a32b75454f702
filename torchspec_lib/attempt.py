"""Trainers and control plane, from one checkpoint to the end of the run or the loss of a part.

Engines, store and placement stand meanwhile: a new attempt takes them over.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ray
from tqdm import tqdm

from torchspec_lib.config.run import RunConfig
from torchspec_lib.controller.actors import AsyncInferenceManager, AsyncTrainingController
from torchspec_lib.controller.inference_manager import CaptureStats
from torchspec_lib.controller.limits import CapturePolicy
from torchspec_lib.controller.training_controller import RunTotals, Schedule
from torchspec_lib.errors import GivenUpError, TorchSpecError
from torchspec_lib.plan import ClusterPlan
from torchspec_lib.ray.cluster import lost_nodes
from torchspec_lib.ray.failures import get
from torchspec_lib.ray.placement_group import Slot, driver_actor
from torchspec_lib.ray.train_group import RayTrainGroup
from torchspec_lib.ray.watchdog import Watchdog
from torchspec_lib.results import DatasetManifest
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.snapshots.selection import SnapshotSelection
from torchspec_lib.target import TargetSpec, read_target
from torchspec_lib.training import checkpoint_files
from torchspec_lib.training.trainer_actor import TrainerActor, TrainerSpec
from torchspec_lib.transfer.store import StoreAddress
from torchspec_lib.types import StepMetrics, start_id


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


@dataclass(frozen=True, slots=True)
class Standing:
    """What stays up while attempts come and go."""

    engines: Sequence[Any]
    training_slots: Sequence[Slot]
    address: StoreAddress
    store_actors: Sequence[Any]
    decoder: Any | None
    """Of snapshots, if there are any."""

    def lost_nodes(self) -> list[str]:
        """Addresses of nodes that are gone, and that every attempt needs; the driver's is one."""
        needed = {slot.node_id for slot in self.training_slots}
        return lost_nodes(needed | {ray.get_runtime_context().get_node_id()})


class Attempt:
    """``start`` gives one whose trainers are up. ``close`` ends all that it started."""

    def __init__(
        self,
        stack: ExitStack,
        inputs: RunInputs,
        trainers: RayTrainGroup,
        controller: Any,
        manager: Any,
        resume_step: int,
    ) -> None:
        """Take over what is up; ``stack`` ends it."""
        self._stack, self._inputs = stack, inputs
        self._trainers, self._controller, self._manager = trainers, controller, manager
        self.resume_step = resume_step
        self._timeout_s = inputs.run.recovery.hang_timeout_s
        self._running: list[Any] = []
        self._stopped_early = False

    @classmethod
    def start(cls, inputs: RunInputs, standing: Standing, number: int) -> Self:
        """Start trainers from the run's last checkpoint, and a control plane.

        Args:
            inputs: The run's.
            standing: Taken over from the attempt before, which has been closed.
            number: Counts attempts from 1.

        Raises:
            CheckpointError: The last checkpoint can't be loaded.
            WorkerLostError: A rank died.
        """
        with ExitStack() as stack:
            folder, policy = inputs.folder.checkpoints, inputs.run.recovery.on_damaged_checkpoint
            resume_from = checkpoint_files.resume_point(folder, policy)
            specs = _trainer_specs(inputs, standing, resume_from)
            trainers = RayTrainGroup.start(TrainerActor, specs, standing.training_slots)
            stack.callback(trainers.kill)
            step, ledger = checkpoint_files.position(resume_from)
            inputs.folder.keep_metrics_until(step)
            controller = driver_actor(AsyncTrainingController).remote(
                str(inputs.dataset_dir),
                inputs.folder,
                _schedule(inputs, number),
                inputs.run.snapshots.num_set_aside,
                step,
                ledger,
            )
            stack.callback(ray.kill, controller)
            manager = driver_actor(AsyncInferenceManager).remote(
                controller, standing.engines, number, _policy(inputs), inputs.plan, inputs.folder
            )
            stack.callback(ray.kill, manager)
            return cls(stack.pop_all(), inputs, trainers, controller, manager, step)

    def follow(
        self,
        on_steps: Callable[[], None],
        store_watches: Sequence[Any],
        snapshots: SnapshotSelection,
    ) -> None:
        """Show finished steps until every rank is done; raise what ends the attempt early.

        Args:
            on_steps: Called when steps are finished.
            store_watches: Calls that end only with a part of the store.
            snapshots: Kept at work; they may stop the training early.

        Raises:
            WorkerLostError: A part died or hangs.
            GivenUpError: An engine or the store died too often.
        """
        self._running = self._trainers.run(self._controller, self._manager)
        capturing = self._manager.run.remote()
        parts = {"the controller": self._controller, "the manager": self._manager}
        watchdog = Watchdog(parts, self._timeout_s)
        num_seen, news = 0, self._controller.progress.remote(0)
        with _progress_bar(self._inputs.plan.num_steps, self.resume_step) as bar:
            while self._running or num_seen < self._num_steps_taken():
                self._stop_if(snapshots.is_over(self.resume_step + num_seen))
                refs = [news, capturing, *store_watches, *self._running, *snapshots.calls]
                done, _ = ray.wait(refs, num_returns=1, timeout=watchdog.interval_s)
                if not done:
                    watchdog.check()
                elif done[0] == news:
                    num_seen += _show(get(news), bar)
                    news = self._controller.progress.remote(num_seen)
                    on_steps()
                elif done[0] in snapshots.calls:
                    snapshots.take()
                elif done[0] in self._running:
                    self._trainers.wait(done)
                    self._running.remove(done[0])
                else:
                    _raise_end(done[0], store_watches)

    def _stop_if(self, is_over: bool) -> None:
        """Have the ranks end after the step that they have been given last."""
        if is_over and not self._stopped_early:
            tqdm.write("  stopping early: the snapshots have not become better")
            self._controller.stop.remote()
            self._stopped_early = True

    def _num_steps_taken(self) -> int:
        """Of this attempt, once all ranks are through."""
        return self.totals().num_steps - self.resume_step

    def totals(self) -> RunTotals:
        """The settled accounts.

        Raises:
            LedgerError: A prompt is neither trained nor rejected.
        """
        call = self._controller.finish.remote(self._stopped_early)
        totals: RunTotals = get(call, self._timeout_s, "the controller")
        return totals

    def stats(self) -> CaptureStats:
        stats: CaptureStats = get(self._manager.stats.remote(), self._timeout_s, "the manager")
        return stats

    def export(self, folder: Path) -> None:
        self._trainers.export(str(folder), self._timeout_s)

    def save_and_stop(self, grace_s: float) -> None:
        """Let the ranks save what they have trained, if they can in ``grace_s``."""
        self._controller.stop.remote()
        if self._running:
            ray.wait(self._running, num_returns=len(self._running), timeout=grace_s)

    def close(self) -> None:
        """End ranks and control plane at once; what they had in flight is captured again."""
        self._stack.close()

    def shutdown(self) -> None:
        """End the ranks gracefully, then the rest."""
        self._trainers.shutdown()
        self.close()


def _raise_end(ref: Any, store_watches: Sequence[Any]) -> None:
    """What never ends has ended: raise why."""
    try:
        get(ref)
    except TorchSpecError as error:
        if ref in store_watches:
            raise GivenUpError("the store", str(error)) from error
        raise


def _progress_bar(num_steps: int, resume_step: int) -> "tqdm[Any]":
    return tqdm(
        total=num_steps, initial=resume_step, desc="training", unit="step", dynamic_ncols=True
    )


def _show(steps: Sequence[StepMetrics], bar: "tqdm[Any]") -> int:
    last = steps[-1]
    bar.set_postfix(loss=f"{last.loss:.3f}", accept_length=f"{last.accept_length:.2f}")
    bar.update(len(steps))
    return len(steps)


def _schedule(inputs: RunInputs, number: int) -> Schedule:
    run = inputs.run
    return Schedule(
        # Samples of an earlier attempt can't be taken for this one's, and are told by it.
        run_id=start_id(inputs.folder.run_id, number),
        seed=run.seed,
        num_epochs=run.training.num_epochs,
        global_batch_size=run.training.global_batch_size,
        world_size=run.training.world_size,
        micro_batch_tokens=run.training.micro_batch_tokens,
        max_failed_fraction=run.inference.max_failed_fraction,
    )


def _policy(inputs: RunInputs) -> CapturePolicy:
    return CapturePolicy.of(inputs.run, inputs.plan.max_in_flight_bytes)


def _trainer_specs(
    inputs: RunInputs, standing: Standing, resume_from: Path | None
) -> list[TrainerSpec]:
    training = inputs.run.training
    continual_from = None if training.continual_from is None else str(training.continual_path)
    return [
        TrainerSpec(
            run=inputs.run,
            target=inputs.target,
            plan=inputs.plan,
            dataset_id=inputs.manifest.dataset_id,
            dataset_dir=str(inputs.dataset_dir),
            rank=rank,
            world_size=training.world_size,
            store_address=standing.address,
            folder=inputs.folder,
            resume_from=None if resume_from is None else str(resume_from),
            continual_from=continual_from,
            decoded_steps=tuple(result.step for result in inputs.folder.read_snapshots()),
        )
        for rank in range(training.world_size)
    ]
