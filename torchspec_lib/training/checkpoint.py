"""Checkpoints from which a run goes on exactly as if it had never stopped.

They hold the tensors that a step changes, and in their description step, schedule, accounts
and what the run was made of. Between two steps the state is only copied; a thread of each rank
writes the copy, under another name that becomes the checkpoint's at the very end: it is whole
or it isn't there.

Who waits for whom: a save that is due waits for the one before it, and the end of a run for
the last. The threads of all ranks wait for each other, and rank 0's for the accounts.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from torchspec_lib.errors import CheckpointError
from torchspec_lib.training import checkpoint_files as files
from torchspec_lib.training import tensor_files
from torchspec_lib.training.fsdp import COLLECTIVE_TIMEOUT, together
from torchspec_lib.training.state import TrainingState, identity_differences
from torchspec_lib.types import Accounts

logger = logging.getLogger(__name__)

AskAccounts = Callable[[int], Accounts]
"""Gives the accounts after a step; blocks until every rank has reported it."""


class CheckpointFolder:
    """A run's checkpoints: the newest few, and the best. All ranks call it together."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], interval: int, keep: int) -> None:
        """Use ``folder``, which every rank must see. A collective.

        Args:
            folder: Made if need be.
            identity: What a state depends on, ``run_identity(...)``. A checkpoint of another
                run is told by it.
            interval: Steps between checkpoints.
            keep: Newest checkpoints that stay, besides the best by accept length.
        """
        self._folder, self._interval, self._keep = folder, interval, keep
        self._identity = identity
        self._rank = dist.get_rank()
        # Its own: the training's collectives go on meanwhile, in another thread.
        self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        self._host_copy = tensor_files.HostCopy()
        self._begun_step = self._saved_step = 0
        self._saving: Future[None] | None = None
        self._no_room: OSError | None = None
        self.doing = ""
        """What the saving thread is at, for who looks on; empty while there is none."""

    def is_due(self, step: int) -> bool:
        return step % self._interval == 0

    def save(self, state: TrainingState, step: int, accounts: AskAccounts) -> None:
        """Copy the state after ``step``; the rest happens while the training goes on.

        Waits for a save that is still going on. One that fails for want of disk is logged,
        and leaves the checkpoints before it.

        Args:
            state: Free to change again when this returns.
            step: Not saved before.
            accounts: Asked once, by a thread of rank 0.

        Raises:
            CheckpointError: The ranks don't see each other's files in ``folder``.
            Exception: Whatever else kept the save before this one from being made.
        """
        self._wait_for_the_one_before(step)
        start = time.monotonic()
        write = partial(self._write, self._copy(state), state.schedule(), step, accounts)
        self._begun_step, self._saving = step, Future()
        threading.Thread(
            target=self._save, args=(self._saving, step, write), name="checkpoint", daemon=True
        ).start()
        logger.info("event=copied step=%d seconds=%.3f", step, time.monotonic() - start)

    def finish(self, state: TrainingState, step: int, accounts: AskAccounts) -> None:
        """Save the last step, unless it is, and wait until it is on the disk.

        Raises:
            CheckpointError: There is no room for it, or as ``save``.
        """
        if self._begun_step < step:
            self.save(state, step, accounts)
        self.wait()
        if self._saved_step < step:
            raise CheckpointError(
                str(files.checkpoint_path(self._folder, step)),
                f"there is no room for it ({self._no_room})",
                "Make room there, or lower training.keep_checkpoints, and start the run again: "
                f"it goes on from {self._last_good()}",
            )

    def wait(self) -> None:
        """Wait for the save that is going on, if one is; raises as ``save``."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        try:
            saving.result()
        except OSError as error:
            if not tensor_files.is_want_of_room(error):
                raise
            self._no_room = error
        else:
            self._saved_step = self._begun_step

    def load(self, path: Path, state: TrainingState) -> int:
        """Put ``state`` back as it was, on this or another number of ranks.

        Returns:
            The step after which it was saved.

        Raises:
            CheckpointError: It is damaged, or another run's; the message says what differs.
        """
        meta = together(partial(self._read_own, path))[self._rank]
        tensor_files.verify(path, meta["files"])
        tensors = state.tensors()
        kinds = tensors["random"][str(self._rank)]
        if (
            not {f"random.{self._rank}.{kind}" for kind in kinds}
            <= tensor_files.shapes(path).keys()
        ):
            del tensors["random"]  # a rank that didn't exist then, or was on another device
        tensor_files.read(path, tensors)
        state.set_tensors(tensors)
        state.scheduler.load_state_dict(meta["scheduler"])
        self._begun_step = self._saved_step = int(meta["step"])
        return self._saved_step

    def _read_own(self, path: Path) -> dict[str, Any]:
        meta = files.read_meta(path)
        if found := identity_differences(meta["identity"], self._identity):
            raise CheckpointError(
                str(path),
                f"it belongs to another run: {'; '.join(found)}",
                "Use another data_root, or set fresh: true to start over",
            )
        return meta

    def _wait_for_the_one_before(self, step: int) -> None:
        is_slow = self._saving is not None and not self._saving.done()
        start = time.monotonic()
        self.wait()
        if is_slow and self._rank == 0:
            logger.warning(
                "event=waited_for_checkpoint step=%d of_step=%d seconds=%.1f remedy=%r",
                step,
                self._begun_step,
                time.monotonic() - start,
                "raise training.checkpoint_interval",
            )

    def _copy(self, state: TrainingState) -> dict[str, Any]:
        """The state in host memory."""
        return self._host_copy.of(state.tensors())

    # In the saving thread of every rank; what one of them raises, all raise.

    def _save(self, saving: "Future[None]", step: int, write: Callable[[], None]) -> None:
        start = time.monotonic()
        path = files.checkpoint_path(self._folder, step)
        try:
            write()
        except BaseException as error:  # noqa: BLE001 - raised where the save is waited for
            if self._rank == 0:
                shutil.rmtree(path.with_suffix(files.UNFINISHED), ignore_errors=True)
                logger.warning(
                    "event=not_saved checkpoint=%s cause=%r last_good=%s",
                    path,
                    f"{type(error).__name__}: {error}",
                    self._last_good(),
                )
            saving.set_exception(error)
        else:
            logger.info("event=saved checkpoint=%s seconds=%.2f", path, time.monotonic() - start)
            saving.set_result(None)
        finally:
            self.doing = ""

    def _last_good(self) -> str:
        path = files.latest(self._folder)
        return "the start, there is no checkpoint yet" if path is None else path.name

    def _write(
        self, copy: dict[str, Any], schedule: Mapping[str, Any], step: int, accounts: AskAccounts
    ) -> None:
        final = files.checkpoint_path(self._folder, step)
        unfinished = final.with_suffix(files.UNFINISHED)
        self.doing = f"writing the tensors of step {step}"
        self._on_first_rank(partial(self._prepare, unfinished))
        written = self._write_tensors(copy, unfinished)
        self.doing = f"waiting for the accounts after step {step}"
        meta = {
            "format": files.FORMAT,
            "step": step,
            "world_size": dist.get_world_size(),
            "identity": self._identity,
            "scheduler": schedule,
            "files": written,
        }
        self._on_first_rank(lambda: self._describe(unfinished, meta, accounts(step)))
        self.doing = f"publishing the checkpoint of step {step}"
        self._on_first_rank(partial(self._publish, unfinished, final))

    def _on_first_rank(self, work: Callable[[], None]) -> None:
        together(work if self._rank == 0 else _nothing, self._group)

    def _prepare(self, unfinished: Path) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        files.remove_unfinished(self._folder)
        unfinished.mkdir()

    def _write_tensors(self, copy: dict[str, Any], unfinished: Path) -> dict[str, Any]:
        return tensor_files.write(copy, unfinished, self._group)

    def _describe(self, unfinished: Path, meta: Mapping[str, Any], accounts: Accounts) -> None:
        """Write the description last, and look whether all that it names is here."""
        counted = {"ledger": accounts.ledger, "accept_length": accounts.accept_length}
        files.write_meta(unfinished, {**meta, **counted})
        if problem := files.differences(unfinished, meta["files"], sizes_only=True):
            raise CheckpointError(
                str(unfinished),
                problem,
                "Put data_root on a file system that all trainer nodes share",
            )

    def _publish(self, unfinished: Path, final: Path) -> None:
        files.publish(unfinished, final)
        files.rotate(self._folder, self._keep)


def _nothing() -> None:
    """What the other ranks do while the first one works."""
