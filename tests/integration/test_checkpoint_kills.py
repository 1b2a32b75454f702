"""Trainer ranks that are killed (SIGKILL) in each phase of saving a checkpoint."""

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

from tests.training_cases import (
    make_trainer,
    moments_of,
    on_two_ranks,
    train,
    two_ranks_at,
    weights_of,
)
from torchspec_lib.training import checkpoint_files
from torchspec_lib.training.checkpoint import CheckpointFolder

TWO_RANKS = ([[0, 4], [5]], [[2, 1], [3]])
INTERVAL, KEEP, FATAL_SAVE = 2, 1, 2


def _die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it outlived SIGKILL")


def _die_half_way(folder: Path) -> None:
    next(folder.iterdir()).unlink()
    _die()


class DyingFolder(CheckpointFolder):
    """Ends its process in a phase of the second save. What it replaces is Python's, not ours."""

    def __init__(self, phase: str, *args: Any) -> None:
        super().__init__(*args)
        self._phase, self._num_saves = phase, 0

    def _now(self, phase: str) -> bool:
        return self._num_saves == FATAL_SAVE and self._phase == phase

    def _copy(self, state):
        self._num_saves += 1
        copy = super()._copy(state)
        if self._now("copying"):
            _die()
        return copy

    def _prepare(self, unfinished):
        super()._prepare(unfinished)
        if self._now("preparing"):
            _die()

    def _write_tensors(self, copy, unfinished):
        if self._now("writing tensors") or self._now("writing DCP's index"):
            sync, num_left = os.fsync, [int(self._now("writing DCP's index"))]

            def die_at_the_last(handle: int) -> None:
                if not num_left[0]:
                    _die()
                num_left[0] -= 1
                sync(handle)

            os.fsync = die_at_the_last
        return super()._write_tensors(copy, unfinished)

    def _describe(self, unfinished, meta, accounts):
        if self._now("before the description"):
            _die()
        if self._now("writing the description"):
            os.fsync = _die
        super()._describe(unfinished, meta, accounts)
        if self._now("after the description"):
            _die()

    def _publish(self, unfinished, final):
        if self._now("after the rename"):
            Path.replace = _die
        if self._now("before rotating"):
            checkpoint_files.publish(unfinished, final)
            _die()
        if self._now("while rotating"):
            shutil.rmtree = _die_half_way
        super()._publish(unfinished, final)


PHASES = {
    "copying": (1, 2),
    "preparing": (0, 2),
    "writing tensors": (1, 2),
    "writing DCP's index": (0, 2),
    "before the description": (0, 2),
    "writing the description": (0, 2),
    "after the description": (0, 2),
    "after the rename": (0, 4),
    "before rotating": (0, 4),
    "while rotating": (0, 4),
}
"""By phase: the rank that is killed in the save of step 4, and the newest checkpoint then."""


def _train_and_die(phase: str, folder: Path) -> None:
    rank = dist.get_rank()
    dies = rank == PHASES[phase][0]
    checkpoints: Callable[..., CheckpointFolder] = partial(DyingFolder, phase if dies else "")
    trainer = make_trainer(folder, None, INTERVAL, KEEP, checkpoints)
    train(trainer, 6, TWO_RANKS[rank])


def _resume_all(folder: Path) -> None:
    """Train the undisturbed run, and every killed one to its end."""
    for name in ["undisturbed", *PHASES]:
        run = folder / name
        trainer = make_trainer(run, None, INTERVAL, KEEP)
        resume_from = checkpoint_files.resume_point(run / "ckpt", "fail")
        assert (resume_from is None) == (name == "undisturbed")
        if resume_from is not None:
            trainer.resume(resume_from)
        first = trainer.step + 1
        metrics = train(trainer, 6, TWO_RANKS[dist.get_rank()])
        steps = [(m.loss, m.grad_norm, m.learning_rate) for m in metrics if m is not None]
        result = (first, steps, weights_of(trainer), moments_of(trainer))
        if dist.get_rank() == 0:
            torch.save(result, run / "result.pt")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with a run for each phase, as it was left; and the files' names in each."""
    folder = tmp_path_factory.mktemp("killed")
    left = {}
    for phase, (rank, _) in PHASES.items():
        with two_ranks_at(partial(_train_and_die, phase), folder / phase) as processes:
            processes[rank].join(60)
            assert processes[rank].exitcode == -signal.SIGKILL
        ckpt = folder / phase / "ckpt"
        whole = [p for p in checkpoint_files.finished(ckpt) if not checkpoint_files.damage(p)]
        left[phase] = (checkpoint_files.finished(ckpt), whole)
    on_two_ranks(_resume_all, folder)
    return folder, left


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_leaves_the_old_or_the_new_checkpoint_whole_and_never_half_of_one(killed, phase):
    found, whole = killed[1][phase]
    assert found == whole
    assert whole[-1].name == f"step_{PHASES[phase][1]:06d}"


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_run_goes_on_with_the_steps_of_an_undisturbed_one_bit_for_bit(killed, phase):
    folder, _ = killed
    _, steps, weights, moments = torch.load(folder / "undisturbed" / "result.pt")
    first, own_steps, own_weights, own_moments = torch.load(folder / phase / "result.pt")
    assert first == PHASES[phase][1] + 1
    assert own_steps == steps[first - 1 :]
    assert all(torch.equal(own_weights[name], weights[name]) for name in weights)
    for name, moment in moments.items():
        assert all(torch.equal(own_moments[name][key], moment[key]) for key in moment)


@pytest.mark.parametrize("phase", PHASES)
def test_nothing_half_is_left_once_a_killed_run_has_come_to_its_end(killed, phase):
    folder, _ = killed
    assert [path.name for path in (folder / phase / "ckpt").iterdir()] == ["step_000006"]
