"""Real checkpoints of FSDP2 over Gloo: on one rank in this process, on two in others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.training_cases import (
    ONE_BATCH,
    make_trainer,
    moments_of,
    on_two_ranks,
    one_rank,
    train,
    weights_of,
)
from torchspec_lib.errors import CheckpointError
from torchspec_lib.training import checkpoint

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


def test_a_checkpoint_says_its_step_and_its_accounts(folder):
    path = checkpoint.latest(folder / "ckpt")
    assert path == folder / "ckpt" / "step_000003"
    assert checkpoint.position(path) == (3, {"cursor": 18, "rejected": {}})
    assert checkpoint.position(None) == (0, None)


def test_no_checkpoint_is_found_where_none_was_finished(tmp_path):
    (tmp_path / "step_000007.tmp").mkdir()
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None


def _truncate(path):
    [shard, *_] = path.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-100])


def _flip_a_bit(path):
    [shard, *_] = path.glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, r"__0_0\.distcp has [\d,]+ bytes instead of"),
        (_flip_a_bit, r"__0_0\.distcp has other content"),
        (lambda path: (path / ".metadata").unlink(), r"\.metadata is missing"),
        (lambda path: (path / "meta.json").unlink(), r"meta\.json can't be read"),
        (lambda path: (path / "meta.json").write_text('{"format'), r"meta\.json can't be read"),
        (lambda path: (path / "meta.json").write_text('{"format": 0}'), "its format is 0"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_not_skipped(folder, damage, words):
    path = folder / "ckpt" / "step_000003"
    damage(path)
    assert checkpoint.latest(folder / "ckpt") == path
    with pytest.raises(CheckpointError, match=rf"step_000003: {words}"):
        make_trainer(folder).resume(path)


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


def test_a_save_that_fails_leaves_the_older_checkpoint_and_the_next_one_works(folder):
    trainer = make_trainer(folder)
    trainer.resume(folder / "ckpt" / "step_000003")
    with pytest.raises(TypeError):
        trainer._checkpoints.save(trainer._state, 4, {"not": object()})
    assert checkpoint.latest(folder / "ckpt").name == "step_000003"
    trainer._checkpoints.save(trainer._state, 5, {"cursor": 30})
    assert sorted(p.name for p in (folder / "ckpt").iterdir()) == ["step_000003", "step_000005"]


def test_the_newest_checkpoints_stay_and_the_last_step_is_always_saved(tmp_path):
    train(make_trainer(tmp_path, interval=2, keep=2), 5, [[0, 1]])
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == ["step_000004", "step_000005"]


def test_a_step_that_is_saved_again_replaces_the_older_one(folder):
    path = folder / "ckpt" / "step_000003"
    trainer = make_trainer(folder)
    trainer.resume(path)
    trainer._checkpoints.save(trainer._state, 3, {"cursor": 17})
    assert json.loads((path / "meta.json").read_text())["ledger"] == {"cursor": 17}
    assert [p.name for p in (folder / "ckpt").iterdir()] == ["step_000003"]
