"""The Ray actor around a trainer rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.dataset import load_draft_vocab
from torchspec_lib.plan import ClusterPlan
from torchspec_lib.ray.failures import get
from torchspec_lib.ray.ray_actor import RayActor
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.target import TargetSpec
from torchspec_lib.training.checkpoint import CheckpointFolder
from torchspec_lib.training.eagle3_trainer import Eagle3Trainer
from torchspec_lib.training.fsdp import Rendezvous, init_process_group
from torchspec_lib.training.heartbeat import Heartbeat
from torchspec_lib.training.prefetch import Prefetcher
from torchspec_lib.training.snapshots import SnapshotWriter
from torchspec_lib.training.state import run_identity
from torchspec_lib.transfer.mooncake.connect import connect
from torchspec_lib.transfer.store import StoreAddress, TensorStore
from torchspec_lib.types import (
    Accounts,
    CaptureResult,
    MicroBatch,
    SampleKey,
    SampleRef,
    StepReport,
)

_BEAT_S = 5.0
_BEATS_PER_TIMEOUT = 4


@dataclass(frozen=True, slots=True)
class TrainerSpec:
    """What a trainer rank is built from."""

    run: RunConfig
    target: TargetSpec
    plan: ClusterPlan
    dataset_id: str
    dataset_dir: str
    rank: int
    world_size: int
    store_address: StoreAddress
    folder: RunFolder
    resume_from: str | None
    """A checkpoint of this run."""
    continual_from: str | None
    """Where the weights come from if there is no ``resume_from``; a path on every node."""
    decoded_steps: tuple[int, ...]
    """Whose snapshots have been decoded, if there are any."""


class TrainerActor(RayActor):
    """One trainer rank. ``join`` makes it a member of its group; the rest needs all ranks."""

    def __init__(self, spec: TrainerSpec) -> None:
        super().__init__("trainer", spec.rank, spec.run.cluster.device)
        self._spec = spec
        self._rendezvous: Rendezvous | None = None
        self._store: TensorStore | None = None

    def create_rendezvous(self) -> tuple[str, int]:
        """Rank 0's: listen, and say where."""
        self._rendezvous = Rendezvous.listen(self.node_ip)
        return self._rendezvous.host, self._rendezvous.port

    def join(self, host: str, port: int) -> None:
        """Meet the other ranks, build the draft, go on from the checkpoint if there is one.

        Raises:
            ConfigError: The target's folder lacks what the trainer needs of it, or the weights
                to start from don't fit.
            CheckpointError: The checkpoint can't be loaded.
            StoreUnavailableError: The store doesn't answer.
        """
        spec = self._spec
        self._in_use = spec.folder.use()
        rendezvous = self._rendezvous or Rendezvous.connect(host, port)
        init_process_group(rendezvous, spec.rank, spec.world_size, self.device)
        self._store = connect(spec.store_address, self.node_ip, owns_memory=False)
        training = spec.run.training
        draft_vocab = load_draft_vocab(Path(spec.dataset_dir))
        self._trainer = Eagle3Trainer(
            spec.run,
            spec.target,
            draft_vocab,
            spec.plan.num_steps,
            CheckpointFolder(
                spec.folder.checkpoints,
                run_identity(spec.run, spec.target, spec.dataset_id, draft_vocab),
                interval=training.checkpoint_interval,
                keep=training.keep_checkpoints,
            ),
            self.device,
        )
        if spec.resume_from is not None:
            self._trainer.resume(Path(spec.resume_from))
        elif spec.continual_from is not None:
            self._trainer.start_from(Path(spec.continual_from))

    def run(self, controller: Any, manager: Any) -> int:
        """Train until the controller says that the run is over; gives the last step taken."""
        assert self._store is not None, "join() comes first"
        run, rank, trainer = self._spec.run, self._spec.rank, self._trainer
        control = _RayControl(controller, manager)
        prefetcher = Prefetcher(
            control,
            self._store,
            rank,
            first_step=trainer.step + 1,
            prefetch_steps=run.training.prefetch_steps,
            empty=trainer.empty_batch,
            pin_memory=self.device.type == "cuda",
        )
        interval_s = min(_BEAT_S, run.recovery.hang_timeout_s / _BEATS_PER_TIMEOUT)
        with (
            Heartbeat(control, rank, interval_s, lambda: f"{trainer.doing}; {prefetcher.doing}"),
            prefetcher as steps,
        ):
            return trainer.run(steps, control, self._snapshots())

    def _snapshots(self) -> SnapshotWriter | None:
        spec, interval = self._spec, self._spec.run.snapshots.interval_steps
        if interval is None:
            return None
        return SnapshotWriter(spec.folder, interval, spec.decoded_steps)

    def export(self, folder: str) -> None:
        """Write the draft as engines serve it. All ranks take part, rank 0 writes."""
        self._trainer.export(Path(folder))

    def close(self) -> None:
        """Leave the store and the group. Safe to call twice."""
        if self._store is not None:
            self._store.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def exit(self) -> None:
        """Close, and end this actor's process."""
        self.close()
        super().exit()


class _RayControl:
    """The controller's and the manager's handles as what a trainer asks for."""

    def __init__(self, controller: Any, manager: Any) -> None:
        self._controller, self._manager = controller, manager

    def next_step(self, rank: int, step: int) -> tuple[MicroBatch, ...] | None:
        micro_batches: tuple[MicroBatch, ...] | None = get(
            self._controller.next_step.remote(rank, step)
        )
        return micro_batches

    def fetched(self, keys: Sequence[SampleKey]) -> None:
        get(self._manager.release.remote(keys))

    def recapture(self, ref: SampleRef) -> CaptureResult:
        result: CaptureResult = get(self._manager.recapture.remote(ref))
        return result

    def report(self, report: StepReport) -> None:
        get(self._controller.report.remote(report))

    def accounts(self, step: int) -> Accounts:
        accounts: Accounts = get(self._controller.accounts.remote(step))
        return accounts

    def beat(self, rank: int, doing: str) -> None:
        get(self._controller.beat.remote(rank, doing))
