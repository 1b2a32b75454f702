"""A draft that starts from another's weights: real checkpoints and exports of two ranks."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.training_cases import (
    DRAFT_VOCAB,
    ONE_BATCH,
    VOCAB,
    make_trainer,
    on_two_ranks,
    one_rank,
    train,
    weights_of,
)
from torchspec_lib.errors import ConfigError
from torchspec_lib.run_folder import continual_fingerprint

TWO_RANKS = ([[0, 4], [5]], [[2, 1], [3]])
SOURCES = ("ckpt/step_000003", "draft")
OTHER_VOCAB = np.setdiff1d(np.arange(VOCAB), DRAFT_VOCAB[:11])


def _work(folder: Path) -> None:
    trainer = make_trainer(folder, interval=3)
    train(trainer, 3, TWO_RANKS[dist.get_rank()])
    trainer.export(folder / "draft")
    weights = weights_of(trainer)
    dist.barrier()
    for source in SOURCES:
        other = make_trainer(folder / "other", {"learning_rate": 0.5})
        other.start_from(folder / source)
        own = weights_of(other)
        assert own.keys() == weights.keys()
        assert all(torch.equal(own[name], weights[name]) for name in weights)
    if dist.get_rank() == 0:
        torch.save(weights, folder / "weights.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A run of two ranks: a checkpoint after step 3, and the draft as exported then."""
    folder = tmp_path_factory.mktemp("two-ranks")
    on_two_ranks(_work, folder)
    return folder


@pytest.fixture
def source(two_ranks, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(two_ranks, tmp_path / "source"))


@pytest.fixture(scope="module", autouse=True)
def group():
    with one_rank():
        yield


@pytest.mark.parametrize("name", SOURCES)
def test_weights_alone_are_taken_over_and_all_else_starts_anew(two_ranks, tmp_path, name):
    fresh, continued = make_trainer(tmp_path / "fresh"), make_trainer(tmp_path / "continued")
    continued.start_from(two_ranks / name)
    weights, saved = weights_of(continued), torch.load(two_ranks / "weights.pt")
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[key], saved[key]) for key in saved)
    assert continued.step == 0
    assert not continued._state.optimizer.state
    [first, *_] = train(continued, 6, ONE_BATCH)
    [of_fresh, *_] = train(fresh, 1, ONE_BATCH)
    assert (first.step, first.learning_rate) == (1, of_fresh.learning_rate)
    assert first.loss < of_fresh.loss
    assert (tmp_path / "continued" / "ckpt" / "step_000006").is_dir()


@pytest.mark.parametrize("name", SOURCES)
def test_another_vocabulary_is_refused(two_ranks, tmp_path, name):
    trainer = make_trainer(tmp_path, draft_vocab=OTHER_VOCAB)
    with pytest.raises(ConfigError, match=rf"continual_from: .*{name}.*vocabulary is '") as caught:
        trainer.start_from(two_ranks / name)
    assert "tensor" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (SOURCES[0], r"tensor draft\.\S*gate_proj\.weight is \[24, 16\] there and \[40, 16\] here"),
        (SOURCES[1], r"intermediate_size is 24 there and 40 here"),
    ],
)
def test_another_shape_is_refused_by_name(two_ranks, tmp_path, name, words):
    trainer = make_trainer(tmp_path, {"draft": {"intermediate_size": 40}})
    with pytest.raises(ConfigError, match=words):
        trainer.start_from(two_ranks / name)


@pytest.mark.parametrize("name", SOURCES)
def test_other_auxiliary_layers_are_refused(two_ranks, tmp_path, name):
    trainer = make_trainer(tmp_path, {"draft": {"aux_layer_ids": [0, 1, 3]}})
    with pytest.raises(ConfigError, match=r"aux_layer_ids is [\[(]0, 1, 2[\])] there and"):
        trainer.start_from(two_ranks / name)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("ckpt/step_000003/__1_0.distcp", "__1_0.distcp has other content"),
        ("ckpt/step_000003/meta.json", "meta.json"),
        ("draft/config.json", "config.json"),
    ],
)
def test_damaged_weights_are_refused(source, tmp_path, file, words):
    content = bytearray((source / file).read_bytes())
    content[len(content) // 2] = ord("}")
    (source / file).write_bytes(content)
    with pytest.raises(ConfigError, match=f"training.continual_from: .*{words}"):
        make_trainer(tmp_path).start_from((source / file).parent)


@pytest.mark.parametrize("name", SOURCES)
def test_the_fingerprint_tells_weights_apart(source, two_ranks, name):
    first = continual_fingerprint(two_ranks / name)
    assert len(first) == 16
    assert continual_fingerprint(source / name) == first
    for path in (source / name).iterdir():
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        if path.name in ("meta.json", "config.json", "model.safetensors"):
            path.write_bytes(content)
            assert continual_fingerprint(source / name) != first
    assert len({continual_fingerprint(two_ranks / other) for other in SOURCES}) == 2


def test_a_folder_that_is_neither_checkpoint_nor_draft_is_refused(two_ranks):
    for path in (two_ranks, two_ranks / "absent"):
        with pytest.raises(ConfigError, match=r"continual_from: .* is no checkpoint .* no export"):
            continual_fingerprint(path)
