"""What a trainer leaves for the decoder; real FSDP2 on one rank."""

import logging

import pytest
import torch

from tests.training_cases import ONE_BATCH, RecordingControl, make_trainer, one_rank, prepare
from torchspec_lib.models.export import load_draft
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.training.snapshots import SnapshotWriter


@pytest.fixture(scope="module", autouse=True)
def group():
    with one_rank():
        yield


def train(folder, last_step, decoded=()):
    trainer = make_trainer(folder)
    steps = (prepare(trainer, step, ONE_BATCH) for step in range(1, last_step + 1))
    trainer.run(steps, RecordingControl(), SnapshotWriter(RunFolder(folder), 2, decoded))
    return trainer


def test_a_snapshot_is_the_draft_as_it_was_after_its_step(tmp_path):
    train(tmp_path / "long", 5)
    train(tmp_path / "short", 2).export(tmp_path / "exported")
    left = RunFolder(tmp_path / "long")
    assert sorted(path.name for path in left.snapshots.iterdir()) == ["step_000002", "step_000004"]
    weights, exported = (
        load_draft(path).draft.state_dict() for path in (left.snapshot(2), tmp_path / "exported")
    )
    assert all(torch.equal(weight, exported[name]) for name, weight in weights.items())
    later = load_draft(left.snapshot(4)).draft.state_dict()
    assert not all(torch.equal(weight, later[name]) for name, weight in weights.items())


def test_a_copy_is_not_changed_by_the_steps_after_it(tmp_path):
    trainer = train(tmp_path, 2)
    trainer.export(tmp_path / "before")
    save = trainer.copy_draft()
    trainer.train_step(prepare(trainer, 3, ONE_BATCH))()
    save(tmp_path / "copy")
    before, copy = (load_draft(tmp_path / name).draft.state_dict() for name in ("before", "copy"))
    assert all(torch.equal(weight, copy[name]) for name, weight in before.items())


def test_what_was_decoded_before_is_not_left_again(tmp_path):
    train(tmp_path, 5, decoded=[2])
    assert [path.name for path in RunFolder(tmp_path).snapshots.iterdir()] == ["step_000004"]


def test_a_snapshot_that_cannot_be_written_does_not_stop_the_training(tmp_path, caplog):
    RunFolder(tmp_path).snapshots.touch()  # where a folder should be
    with caplog.at_level(logging.WARNING):
        assert train(tmp_path, 3).step == 3
    assert "event=no_snapshot" in caplog.text
