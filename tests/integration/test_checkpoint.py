"""Real checkpoints of FSDP2 over Gloo: on one rank in this process, on two in others."""

import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.training_cases import (
    ONE_BATCH,
    RecordingControl,
    make_trainer,
    moments_of,
    on_two_ranks,
    one_rank,
    prepare,
    train,
    weights_of,
)
from torchspec_lib.errors import CheckpointError
from torchspec_lib.training import state
from torchspec_lib.training.checkpoint import CheckpointFolder
from torchspec_lib.training.checkpoint_files import latest, position
from torchspec_lib.types import Accounts

TWO_RANKS = ([[0, 4], [5]], [[2, 1], [3]])


def _work(folder: Path) -> None:
    deal = TWO_RANKS[dist.get_rank()]
    torch.manual_seed(11 + dist.get_rank())
    straight = make_trainer(folder, interval=3)
    train(straight, 3, deal)
    random = torch.rand(3)
    train(straight, 6, deal)
    torch.manual_seed(99)
    resumed = make_trainer(folder, interval=3)
    resumed.resume(folder / "ckpt" / "step_000003")
    same_random = torch.equal(torch.rand(3), random)
    train(resumed, 6, deal)
    states = [(weights_of(t), moments_of(t)) for t in (straight, resumed)]
    torch.save((same_random, states), folder / f"{dist.get_rank()}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-ranks")
    on_two_ranks(_work, folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def group():
    with one_rank():
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with the checkpoint of one rank after step 3."""
    folder = tmp_path_factory.mktemp("one-rank")
    train(make_trainer(folder), 3, ONE_BATCH)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "run"))


def _assert_equal(first, second):
    (weights, moments), (other_weights, other_moments) = first, second
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    for name, moment in moments.items():
        assert moment.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(moment[key], other_moments[name][key]) for key in moment)


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit_on_two_ranks(two_ranks):
    for rank in range(2):
        same_random, (straight, resumed) = torch.load(two_ranks / f"{rank}.pt")
        assert same_random
        assert bool(straight[0]) == bool(straight[1]) == (rank == 0)
        _assert_equal(straight, resumed)


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit_on_one_rank(folder):
    straight, resumed = make_trainer(folder / "straight"), make_trainer(folder)
    metrics = train(straight, 6, ONE_BATCH)
    resumed.resume(folder / "ckpt" / "step_000003")
    assert resumed.step == 3
    resumed_metrics = train(resumed, 6, ONE_BATCH)
    assert [m.loss for m in resumed_metrics] == [m.loss for m in metrics[3:]]
    assert [m.learning_rate for m in resumed_metrics] == [m.learning_rate for m in metrics[3:]]
    _assert_equal(*[(weights_of(trainer), moments_of(trainer)) for trainer in (straight, resumed)])


def test_a_checkpoint_of_two_ranks_goes_on_with_one(two_ranks):
    trainer = make_trainer(two_ranks, {"training_num_gpus_per_node": 1, "prefetch_steps": 4})
    trainer.resume(two_ranks / "ckpt" / "step_000003")
    train(trainer, 6, ONE_BATCH)
    _, ((weights, moments), _) = torch.load(two_ranks / "0.pt")
    for name, weight in weights_of(trainer).items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-6)
    for name, moment in moments_of(trainer).items():
        assert torch.equal(moment["step"], moments[name]["step"])
        torch.testing.assert_close(moment["exp_avg"], moments[name]["exp_avg"])


def test_a_checkpoint_of_another_kind_of_device_goes_on(folder, monkeypatch):
    states = {"cpu": torch.get_rng_state(), "cuda": torch.zeros(16, dtype=torch.uint8)}
    monkeypatch.setattr(state, "_random_state", lambda: states)
    resumed = make_trainer(folder)
    resumed.resume(folder / "ckpt" / "step_000003")
    assert [step.step for step in train(resumed, 4, ONE_BATCH)] == [4]


def test_a_checkpoint_says_its_step_and_its_accounts(folder):
    path = latest(folder / "ckpt")
    assert path == folder / "ckpt" / "step_000003"
    assert position(path) == (3, {"cursor": 18, "rejected": {}})


def test_a_run_that_saves_at_every_step_is_the_same_as_one_that_does_not(tmp_path):
    busy, calm = make_trainer(tmp_path / "busy", interval=1), make_trainer(tmp_path / "calm")
    metrics = [train(trainer, 6, ONE_BATCH) for trainer in (busy, calm)]
    assert [m.loss for m in metrics[0]] == [m.loss for m in metrics[1]]
    _assert_equal(*[(weights_of(trainer), moments_of(trainer)) for trainer in (busy, calm)])


class GatedControl:
    """Gives no accounts until it may, so that a save can't end before that."""

    def __init__(self):
        self.gate = threading.Event()
        self.asked = []

    def accounts(self, step):
        self.asked.append((step, threading.current_thread() is threading.main_thread()))
        assert self.gate.wait(10)
        return Accounts({"cursor": step}, 1.0)


class GatedFolder(CheckpointFolder):
    """Writes no tensor of step 3 until it may."""

    gate = threading.Event()

    def _write_tensors(self, copy, unfinished):
        assert unfinished.stem != "step_000003" or self.gate.wait(10)
        return super()._write_tensors(copy, unfinished)


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_get_into_it(tmp_path):
    control = GatedControl()
    control.gate.set()
    trainer = make_trainer(tmp_path, checkpoints=GatedFolder)
    train(trainer, 2, ONE_BATCH)
    at_2 = weights_of(trainer), moments_of(trainer)
    trainer._checkpoints.save(trainer._state, 3, control.accounts)
    for step in (3, 4):
        trainer.train_step(prepare(trainer, step, ONE_BATCH))
    assert not torch.equal(weights_of(trainer)["draft.fc.weight"], at_2[0]["draft.fc.weight"])
    assert trainer.doing == "done; writing the tensors of step 3"
    assert latest(tmp_path / "ckpt").name == "step_000002"
    GatedFolder.gate.set()
    trainer._checkpoints.wait()
    assert trainer.doing == "done"
    resumed = make_trainer(tmp_path)
    resumed.resume(tmp_path / "ckpt" / "step_000003")
    assert control.asked == [(3, False)]
    _assert_equal(at_2, (weights_of(resumed), moments_of(resumed)))


def test_a_save_waits_for_the_one_before_it_and_says_so(tmp_path, caplog):
    control = GatedControl()
    trainer = make_trainer(tmp_path)
    train(trainer, 1, ONE_BATCH)
    trainer._checkpoints.save(trainer._state, 2, control.accounts)
    threading.Timer(0.2, control.gate.set).start()
    start = time.monotonic()
    trainer._checkpoints.save(trainer._state, 3, control.accounts)
    assert time.monotonic() - start > 0.15
    assert latest(tmp_path / "ckpt").name == "step_000002"
    trainer._checkpoints.wait()
    assert latest(tmp_path / "ckpt").name == "step_000003"
    assert "event=waited_for_checkpoint step=3 of_step=2" in caplog.text
    assert "checkpoint_interval" in caplog.text


def test_a_checkpoint_of_another_run_is_refused_and_the_differences_are_named(folder):
    trainer = make_trainer(folder, {"learning_rate": 0.5, "betas": [0.8, 0.95]})
    with pytest.raises(CheckpointError) as caught:
        trainer.resume(folder / "ckpt" / "step_000003")
    assert "training.learning_rate is 0.001 there and 0.5 here" in str(caught.value)
    assert "training.betas is [0.9, 0.95] there and [0.8, 0.95] here" in str(caught.value)
    assert "weight_decay" not in str(caught.value)


def test_tensors_that_do_not_fit_are_refused(folder):
    path = folder / "ckpt" / "step_000003"
    trainer = make_trainer(folder)
    trainer._state.model.register_parameter("new", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(CheckpointError, match=r"tensors don't fit: Missing .*model\.new\."):
        trainer.resume(path)


def _unwritable(step):
    return Accounts({"not": object()}, 1.0)


def test_a_save_that_fails_is_raised_by_the_next_one_and_leaves_the_older_checkpoint(folder):
    trainer = make_trainer(folder)
    trainer.resume(folder / "ckpt" / "step_000003")
    trainer._checkpoints.save(trainer._state, 4, _unwritable)
    with pytest.raises(TypeError, match="not JSON serializable"):
        trainer._checkpoints.save(trainer._state, 5, _unwritable)
    assert [p.name for p in (folder / "ckpt").iterdir()] == ["step_000003"]
    trainer._checkpoints.save(trainer._state, 5, RecordingControl().accounts)
    trainer._checkpoints.wait()
    assert sorted(p.name for p in (folder / "ckpt").iterdir()) == ["step_000003", "step_000005"]


def test_what_a_writer_that_died_has_left_is_removed_by_the_next_save(folder):
    (folder / "ckpt" / "step_000005.tmp").mkdir()
    (folder / "ckpt" / "step_000005.tmp" / "__0_0.distcp").write_bytes(b"half")
    trainer = make_trainer(folder)
    trainer.resume(folder / "ckpt" / "step_000003")
    train(trainer, 4, ONE_BATCH)
    assert sorted(p.name for p in (folder / "ckpt").iterdir()) == ["step_000003", "step_000004"]


def test_the_newest_checkpoints_stay_and_the_last_step_is_always_saved(tmp_path):
    train(make_trainer(tmp_path, interval=2, keep=2), 5, [[0, 1]])
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == ["step_000004", "step_000005"]


def test_the_best_checkpoint_by_accept_length_stays_too(tmp_path):
    lengths = {1: 1.2, 2: 1.9, 3: 1.4, 4: 1.3, 5: 1.1}
    train(make_trainer(tmp_path, interval=1, keep=2), 5, [[0, 1]], lengths)
    names = sorted(p.name for p in (tmp_path / "ckpt").iterdir())
    assert names == ["step_000002", "step_000004", "step_000005"]


def test_a_run_that_is_stopped_before_its_first_step_saves_nothing(tmp_path):
    trainer = make_trainer(tmp_path)
    assert trainer.run([], RecordingControl()) == 0
    assert latest(tmp_path / "ckpt") is None


def test_a_step_that_is_there_already_is_not_saved_again(folder):
    trainer = make_trainer(folder)
    trainer.resume(folder / "ckpt" / "step_000003")
    assert trainer.run([], GatedControl()) == 3
