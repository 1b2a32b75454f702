"""A checkpoint's tensors: copied, written, verified and read by all ranks together, with DCP."""

import errno
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchspec_lib.errors import CheckpointError
from torchspec_lib.training import checkpoint_files as files
from torchspec_lib.training.fsdp import together

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class HostCopy:
    """Copies tensors to host memory that it keeps, so that only the first copy allocates any."""

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()
        # Not DefaultStager: that of torch 2.11 closes this after its first copy, and the second
        # one fails.
        self._stager = StateDictStager(pin_memory=self._on_gpu)

    def of(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """A copy that is good until the next one."""
        copy: dict[str, Any] = self._stager.stage(tensors, non_blocking=self._on_gpu)
        if self._on_gpu:
            torch.cuda.synchronize()
        return copy


def write(tensors: dict[str, Any], folder: Path, group: dist.ProcessGroup) -> dict[str, Any]:
    """Write this rank's share of ``tensors``.

    Returns:
        ``{name: [bytes, sha256]}`` of what all ranks wrote.

    Raises:
        OSError: A rank couldn't write; raised on all of them, as is any other error.
    """
    try:
        dcp.save(tensors, storage_writer=_Writer(folder), process_group=group)
    except CheckpointException as error:
        raise _cause(error) from error
    own = partial(files.hashes, folder, f"__{dist.get_rank(group)}_*.distcp")
    written = files.hashes(folder, ".metadata") if dist.get_rank(group) == 0 else {}
    for of_rank in together(own, group):
        written |= of_rank
    return written


def read(path: Path, tensors: dict[str, Any]) -> None:
    """Fill ``tensors`` in place.

    Raises:
        CheckpointError: They aren't those that were written.
    """
    try:
        dcp.load(tensors, checkpoint_id=path)
    except CheckpointException as error:
        causes = "; ".join(sorted({str(cause) for cause, _ in error.failures.values()}))
        problem = f"its tensors don't fit: {causes}"
        raise CheckpointError(str(path), problem, files.START_OVER) from error


def verify(path: Path, written: Mapping[str, Any]) -> None:
    """Check all files against ``written``: each rank reads some, and all learn of any damage.

    Raises:
        CheckpointError: It says what is damaged.
    """
    names = sorted(written)[dist.get_rank() :: dist.get_world_size()]
    own = {name: written[name] for name in names}
    found = [problem for problem in together(partial(files.differences, path, own)) if problem]
    if found:
        raise CheckpointError(str(path), "; ".join(found), files.MEND_DAMAGE)


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor's whole shape, by its name in the checkpoint."""
    metadata = dcp.FileSystemReader(path).read_metadata()
    return {
        name: tuple(stored.size)
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }


def is_want_of_room(error: BaseException) -> bool:
    """Whether a disk, or somebody's share of it, is full."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM


class _Writer(dcp.FileSystemWriter):
    """Raises what the system said: torch hides a full disk behind an error of its own."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _cause(error: CheckpointException) -> BaseException:
    """What a rank raised; a full disk only if there is nothing worse."""
    causes = [cause for cause, _ in error.failures.values()]
    return min(causes, key=is_want_of_room)
