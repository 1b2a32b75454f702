"""Every file of a real checkpoint of two ranks, damaged in turn."""

import json
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.training_cases import (
    make_run,
    make_target,
    make_trainer,
    on_two_ranks,
    one_rank,
    train,
)
from torchspec_lib.errors import CheckpointError
from torchspec_lib.run_folder import RunFolder, checkpoint_mark
from torchspec_lib.training.checkpoint_files import latest, position, publish, resume_point

TWO_RANKS = ([[0, 4], [5]], [[2, 1], [3]])
FILES = (".metadata", "__0_0.distcp", "__1_0.distcp", "meta.json")


def _work(folder: Path) -> None:
    train(make_trainer(folder, interval=2), 4, TWO_RANKS[dist.get_rank()])


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run of two ranks with checkpoints after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("two-ranks")
    on_two_ranks(_work, folder)
    return folder


@pytest.fixture
def run(original, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture(scope="module", autouse=True)
def group():
    with one_rank():
        yield


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def _flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "truncated": (_truncate, "has .* bytes instead of|can't be read"),
    "flipped": (_flip_a_bit, "has other content than was written|can't be read"),
    "deleted": (Path.unlink, "is missing|can't be read"),
}


def test_all_files_of_a_checkpoint_are_damaged_here(original):
    assert sorted(p.name for p in (original / "ckpt" / "step_000004").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_to_any_file_is_refused_by_name_and_an_older_one_is_used_only_if_told(
    run, kind, name
):
    damage, words = DAMAGES[kind]
    ckpt = run / "ckpt"
    newest = ckpt / "step_000004"
    damage(newest / name)
    assert resume_point(ckpt, "fail") == newest
    with pytest.raises(CheckpointError, match=rf"step_000004: {name} ({words})") as caught:
        make_trainer(run).resume(newest)
    assert "recovery.on_damaged_checkpoint: use_older" in str(caught.value)
    assert "fresh: true" in str(caught.value)
    usable = resume_point(ckpt, "use_older")
    assert usable == ckpt / "step_000002"
    assert sorted(p.name for p in ckpt.iterdir()) == ["step_000002", "step_000004.damaged"]
    assert position(usable)[0] == 2
    make_trainer(run).resume(usable)


def test_every_single_bit_of_the_description_counts(run):
    meta = run / "ckpt" / "step_000004" / "meta.json"
    content = meta.read_bytes()
    for place in range(0, len(content), 7):
        for bit in (1, 4, 32):
            flipped = bytearray(content)
            flipped[place] ^= bit
            meta.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=r"step_000004: (meta\.json|its format)"):
                position(meta.parent)


def test_what_is_damaged_is_said_when_it_is_set_aside(run, caplog):
    newest = run / "ckpt" / "step_000004"
    _flip_a_bit(newest / "__1_0.distcp")
    resume_point(run / "ckpt", "use_older")
    assert "step_000004" in caplog.text
    assert "__1_0.distcp has other content than was written" in caplog.text
    assert "resuming_from=step_000002" in caplog.text


def test_a_step_that_is_damaged_again_is_set_aside_beside_the_first(run):
    ckpt = run / "ckpt"
    shutil.copytree(ckpt / "step_000004", ckpt / "step_000004.damaged")
    (ckpt / "step_000004" / "meta.json").unlink()
    resume_point(ckpt, "use_older")
    names = sorted(p.name for p in ckpt.iterdir())
    assert names == ["step_000002", "step_000004.damaged", "step_000004.damaged2"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_scratch(run):
    ckpt = run / "ckpt"
    for path in list(ckpt.iterdir()):
        (path / "__0_0.distcp").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"step_000004: __0_0\.distcp is missing") as e:
            resume_point(ckpt, "use_older")
        assert "step_000002: __0_0.distcp is missing" in str(e.value)
        assert "fresh: true" in str(e.value)
    assert sorted(p.name for p in ckpt.iterdir()) == ["step_000002", "step_000004"]


@pytest.mark.parametrize("policy", ["fail", "use_older"])
def test_whole_checkpoints_are_resumed_from_the_newest(run, policy):
    assert resume_point(run / "ckpt", policy) == run / "ckpt" / "step_000004"


@pytest.mark.parametrize("policy", ["fail", "use_older"])
@pytest.mark.parametrize("is_gone", [True, False])
def test_checkpoints_that_have_vanished_are_missed(run, policy, is_gone):
    shutil.rmtree(run / "ckpt")
    if not is_gone:
        (run / "ckpt").mkdir()
    with pytest.raises(CheckpointError, match=r"there is none, but ckpt\.json .*fresh: true"):
        resume_point(run / "ckpt", policy)


@pytest.mark.parametrize("policy", ["fail", "use_older"])
def test_a_run_that_never_saved_starts_from_scratch(tmp_path, policy):
    (tmp_path / "ckpt" / "step_000007.tmp").mkdir(parents=True)
    assert resume_point(tmp_path / "ckpt", policy) is None
    assert resume_point(tmp_path / "absent", policy) is None
    assert latest(tmp_path / "absent") is None
    assert position(None) == (0, None)
    assert not checkpoint_mark(tmp_path / "ckpt").exists()


def test_a_checkpoint_of_another_version_is_refused_and_never_set_aside(run):
    newest = run / "ckpt" / "step_000004"
    (newest / "meta.json").write_text(json.dumps({"format": 1, "step": 4}))
    with pytest.raises(CheckpointError, match="its format is 1, this version reads 2"):
        resume_point(run / "ckpt", "use_older")
    with pytest.raises(CheckpointError, match="its format is 1, this version reads 2"):
        position(newest)
    assert newest.is_dir()


def test_a_checkpoint_of_another_run_is_not_skipped_for_an_older_one(run):
    path = resume_point(run / "ckpt", "use_older")
    assert path.name == "step_000004"
    with pytest.raises(CheckpointError, match=r"step_000004: it belongs to another run: "):
        make_trainer(run, {"learning_rate": 0.5}).resume(path)


def test_a_run_whose_checkpoints_have_vanished_starts_over_if_it_is_told_to(run, tmp_path):
    folder = RunFolder(tmp_path / "other")
    folder.path.mkdir()
    (run / "ckpt").rename(folder.checkpoints)
    checkpoint_mark(run / "ckpt").rename(checkpoint_mark(folder.checkpoints))
    config = make_run(make_target(tmp_path / "target"))
    folder.open(config)
    assert resume_point(folder.checkpoints, "fail").name == "step_000004"
    folder.open(config.model_copy(update={"fresh": True}))
    assert resume_point(folder.checkpoints, "fail") is None
    folder.open(config)
    assert resume_point(folder.checkpoints, "fail") is None


def test_a_checkpoint_of_a_writer_that_was_given_up_for_dead_is_replaced(run):
    """It finished after the next one had resumed from step 2."""
    ckpt = run / "ckpt"
    shutil.copytree(ckpt / "step_000004", ckpt / "step_000004.tmp")
    (ckpt / "step_000004" / "of the dead").touch()
    publish(ckpt / "step_000004.tmp", ckpt / "step_000004")
    assert sorted(p.name for p in ckpt.iterdir()) == ["step_000002", "step_000004"]
    assert not (ckpt / "step_000004" / "of the dead").exists()
    assert resume_point(ckpt, "use_older").name == "step_000004"
