"""A disk that is full while a checkpoint is saved: a real small one, and a limit on files."""

import logging
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.training_cases import ONE_BATCH, make_trainer, on_two_ranks, one_rank, train
from torchspec_lib.errors import CheckpointError
from torchspec_lib.training import tensor_files
from torchspec_lib.training.checkpoint import CheckpointFolder
from torchspec_lib.training.checkpoint_files import damage, finished, resume_point

TWO_RANKS = ([[0, 4], [5]], [[2, 1], [3]])
LIMITS = {"tensors": (1, 1000), "first tensors": (0, 10), "description": (0, 100)}
"""By what doesn't fit: on which rank, and the most bytes that a file may have there."""


@contextmanager
def _small_files(num_bytes: int) -> Iterator[None]:
    """Writing more fails with EFBIG, as a full disk does with ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TightFolder(CheckpointFolder):
    """One of its ranks may write only small files while a certain save goes on."""

    def __init__(self, what: str, fatal_save: int, *args: Any) -> None:
        super().__init__(*args)
        rank, self._limit = LIMITS[what]
        self._what = what if rank == dist.get_rank() else ""
        self._fatal_save, self._num_saves = fatal_save, 0

    def _is_tight(self, what: str) -> bool:
        return (
            self._num_saves == self._fatal_save and self._what.endswith(what) and self._what != ""
        )

    def _write_tensors(self, copy, unfinished):
        self._num_saves += 1
        if self._is_tight("tensors"):
            with _small_files(self._limit):
                return super()._write_tensors(copy, unfinished)
        return super()._write_tensors(copy, unfinished)

    def _describe(self, unfinished, meta, accounts):
        if self._is_tight("description"):
            with _small_files(self._limit):
                return super()._describe(unfinished, meta, accounts)
        return super()._describe(unfinished, meta, accounts)


def _work(what: str, fatal_save: int, folder: Path) -> None:
    rank = dist.get_rank()
    logging.basicConfig(filename=folder / f"log-{rank}")
    checkpoints = partial(TightFolder, what, fatal_save)
    trainer = make_trainer(folder, None, interval=2, checkpoints=checkpoints)
    try:
        train(trainer, 6, TWO_RANKS[rank])
    except CheckpointError as error:
        (folder / f"error-{rank}").write_text(str(error))


@pytest.mark.parametrize("what", LIMITS)
def test_training_goes_on_past_a_save_without_room_and_the_next_one_works(tmp_path, what):
    on_two_ranks(partial(_work, what, 2), tmp_path)
    ckpt = tmp_path / "ckpt"
    assert sorted(p.name for p in ckpt.iterdir()) == ["step_000002", "step_000006"]
    assert not any(damage(path) for path in finished(ckpt))
    [line] = [x for x in (tmp_path / "log-0").read_text().splitlines() if "not_saved" in x]
    assert line.startswith("WARNING")
    assert f"checkpoint={ckpt / 'step_000004'}" in line
    assert "File too large" in line
    assert "last_good=step_000002" in line
    assert not (tmp_path / "error-0").exists()


@pytest.mark.parametrize("what", ["tensors", "description"])
def test_a_last_save_without_room_is_an_error_on_every_rank(tmp_path, what):
    on_two_ranks(partial(_work, what, 3), tmp_path)
    errors = [(tmp_path / f"error-{rank}").read_text() for rank in range(2)]
    assert errors[0] == errors[1]
    assert "step_000006: there is no room for it ([Errno 27] File too large)" in errors[0]
    assert "goes on from step_000004" in errors[0]
    assert resume_point(tmp_path / "ckpt", "fail") == tmp_path / "ckpt" / "step_000004"
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == ["step_000002", "step_000004"]


@pytest.mark.parametrize("num_bytes", [0, 100, 1000, 30_000])
def test_a_full_disk_is_told_apart_where_torch_hides_it_too(tmp_path, num_bytes):
    with one_rank(), _small_files(num_bytes), pytest.raises(OSError, match="File too large") as e:
        tensor_files.write({"large": torch.ones(10_000)}, tmp_path / "new", dist.group.WORLD)
    assert tensor_files.is_want_of_room(e.value)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    mount = shutil.which("mount") and subprocess.run(command, capture_output=True, check=False)
    if not mount or mount.returncode:
        pytest.skip("this process may not mount a file system")
    yield disk
    # Lazily: the target's weights are mapped for as long as a trainer lives.
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(small_disk, caplog):
    with one_rank():
        trainer = make_trainer(small_disk)
        train(trainer, 1, ONE_BATCH)
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 20_000))
        with pytest.raises(CheckpointError, match=r"No space left on device.*from step_000001"):
            train(trainer, 2, ONE_BATCH)
        assert "event=not_saved" in caplog.text
        assert [p.name for p in (small_disk / "ckpt").iterdir()] == ["step_000001"]
        ballast.unlink()
        train(trainer, 3, ONE_BATCH)
    assert resume_point(small_disk / "ckpt", "use_older").name == "step_000003"
