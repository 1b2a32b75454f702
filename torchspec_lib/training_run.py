"""A training run as the driver sees it: attempts, until one comes to the end."""

import time
from itertools import chain

from tqdm import tqdm

from torchspec_lib.attempt import Attempt, RunInputs, Standing
from torchspec_lib.controller.inference_manager import CaptureStats
from torchspec_lib.controller.training_controller import RunTotals
from torchspec_lib.errors import GivenUpError, StoreUnavailableError, WorkerLostError
from torchspec_lib.models.validate import validate_draft
from torchspec_lib.ray.failures import get
from torchspec_lib.results import TrainSummary
from torchspec_lib.snapshots.decoder import DecoderClient
from torchspec_lib.snapshots.selection import SnapshotSelection
from torchspec_lib.training import checkpoint_files
from torchspec_lib.transfer.mooncake.processes import evicted_keys
from torchspec_lib.types import Recovery, pooled_accept_length

CURABLE = (WorkerLostError, StoreUnavailableError)
"""What trainers and control plane are started again for, from the last checkpoint."""


class TrainingRun:
    """Trains to the end, however often trainers or control plane have to be started again."""

    def __init__(self, inputs: RunInputs, standing: Standing) -> None:
        self._inputs, self._standing = inputs, standing
        self._store_watches = [actor.watch.remote() for actor in standing.store_actors]
        self._snapshots = _selection(inputs, standing)
        self._attempt: Attempt | None = None
        self._num_attempts = self._num_restarts = 0
        self._lost: tuple[float, Exception] | None = None
        """When and by what the last attempt ended, until the next one has taken a step."""

    def start(self) -> None:
        """Start the first attempt; what keeps it from starting is raised as it is."""
        self._resumed_from = self._start_attempt().resume_step

    def _start_attempt(self) -> Attempt:
        self._num_attempts += 1
        self._attempt = Attempt.start(self._inputs, self._standing, self._num_attempts)
        self._snapshots.restart(self._attempt.resume_step)
        return self._attempt

    def train(self) -> TrainSummary:
        """Train to the end, settle the accounts, export the draft.

        An interrupt (SIGTERM, Ctrl-C) saves a checkpoint within ``recovery.grace_s``.

        Raises:
            LedgerError: A prompt is neither trained nor rejected.
            GivenUpError: A part of the run died again and again.
            WorkerLostError: A node has left the cluster.
            CheckpointError: The last checkpoint can't be loaded.
        """
        start = time.monotonic()
        try:
            while True:
                try:
                    return self._take_attempt(start)
                except CURABLE as error:
                    self._drop(error)
        except (KeyboardInterrupt, SystemExit):
            self._save_and_stop()
            raise

    def close(self) -> None:
        if self._attempt is not None:
            self._attempt.close()

    def _take_attempt(self, start: float) -> TrainSummary:
        attempt = self._attempt or self._start_attempt()
        attempt.follow(self._look_after, self._store_watches, self._snapshots)
        self._look_after()
        totals, stats = attempt.totals(), attempt.stats()
        if evicted := evicted_keys(self._standing.address.metrics):
            raise StoreUnavailableError("keep", f"it evicted {evicted} samples unread")
        folder = self._inputs.folder
        exported_step = self._export(attempt, totals.num_steps)
        validate_draft(folder.draft, self._inputs.target)
        attempt.shutdown()
        for recovery in self._store_recoveries():
            folder.append_recovery(recovery)
        wall_s = time.monotonic() - start
        summary = self._summary(exported_step, totals, stats, wall_s)
        folder.finish(summary)
        return summary

    def _export(self, attempt: Attempt, last_step: int) -> int | None:
        """Write the run's draft; gives the step it is of if snapshots were to choose it."""
        folder, snapshots = self._inputs.folder, self._snapshots
        if self._inputs.run.snapshots.interval_steps is None:
            attempt.export(folder.draft)
            return None
        if last_step not in {result.step for result in snapshots.results}:
            attempt.export(folder.snapshot(last_step))
        snapshots.finish()
        return snapshots.export(last_step)

    def _look_after(self) -> None:
        self._note_recovery()
        self._snapshots.advance()

    def _drop(self, error: Exception) -> None:
        """Close the attempt that ended by ``error``.

        Raises:
            WorkerLostError: A node has left the cluster: another run has to find a new place.
            GivenUpError: It is one too many in a row.
        """
        self._lost = self._lost or (time.monotonic(), error)
        attempt, self._attempt = self._attempt, None
        step = checkpoint_files.last_step(self._inputs.folder.checkpoints)
        if attempt is not None:
            attempt.close()
            if step > attempt.resume_step:
                self._num_restarts = 0
        if lost := self._standing.lost_nodes():
            raise WorkerLostError(f"node {', '.join(lost)}", str(error)) from error
        if self._num_restarts >= self._inputs.run.recovery.max_restarts:
            raise GivenUpError("the trainers' group", str(error)) from error
        self._num_restarts += 1
        tqdm.write(f"  {error}. Going on from step {step}")

    def _note_recovery(self) -> None:
        if self._lost is not None:
            at, error = self._lost
            part = error.role if isinstance(error, WorkerLostError) else "the store"
            seconds = time.monotonic() - at
            self._inputs.folder.append_recovery(Recovery(part, str(error), seconds))
            self._lost = None

    def _store_recoveries(self) -> list[Recovery]:
        calls = [actor.recoveries.remote() for actor in self._standing.store_actors]
        found = get(calls, self._inputs.run.recovery.hang_timeout_s, "the store's actors")
        return list(chain.from_iterable(found))

    def _save_and_stop(self) -> None:
        grace_s = self._inputs.run.recovery.grace_s
        tqdm.write(f"  interrupted: saving a checkpoint, {grace_s:.0f} s at most")
        if self._attempt is not None:
            self._attempt.save_and_stop(grace_s)
        step = checkpoint_files.last_step(self._inputs.folder.checkpoints)
        tqdm.write(f"  the same command goes on from step {step}")

    def _summary(
        self,
        exported_step: int | None,
        totals: RunTotals,
        stats: CaptureStats,
        wall_s: float,
    ) -> TrainSummary:
        metrics = self._inputs.folder.read_metrics()
        num_aside = self._inputs.run.snapshots.num_set_aside
        tail = metrics[-max(1, len(metrics) // 10) :]
        return TrainSummary(
            run_id=self._inputs.folder.run_id,
            draft_dir=str(self._inputs.folder.draft),
            num_steps=totals.num_steps,
            num_prompts=self._inputs.manifest.num_prompts - num_aside,
            num_epochs=self._inputs.run.training.num_epochs,
            num_trained=totals.num_trained,
            num_rejected=totals.num_rejected,
            rejected=totals.rejected,
            num_not_trained=totals.num_not_trained,
            num_set_aside=num_aside,
            snapshots=self._snapshots.results,
            snapshot_problem=self._snapshots.problem,
            exported_step=exported_step,
            num_tokens=sum(step.num_tokens for step in metrics),
            loss=metrics[-1].loss,
            accept_length=pooled_accept_length(tail),
            bytes_streamed=stats.num_bytes,
            resumed_from_step=self._resumed_from,
            recoveries=tuple(self._inputs.folder.read_recoveries()),
            wall_s=wall_s,
            trainer_wait_s=sum(step.wait_s for step in metrics if step.step > self._resumed_from),
            capture_wait_s=stats.waited_for_bytes_s,
        )


def _selection(inputs: RunInputs, standing: Standing) -> SnapshotSelection:
    decoder = None
    if standing.decoder is not None:
        decoder = DecoderClient(standing.decoder, inputs.run.recovery.hang_timeout_s)
    return SnapshotSelection(inputs.folder, inputs.run.snapshots, decoder)
