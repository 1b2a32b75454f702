"""Drafts whose head stays the target's."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.training_cases import (
    DRAFT_VOCAB,
    HEAD,
    ONE_BATCH,
    OTHER_VOCAB,
    make_target,
    make_trainer,
    moments_of,
    on_two_ranks,
    one_rank,
    train,
    weights_of,
)
from torchspec_lib.models.export import load_draft
from torchspec_lib.models.validate import validate_draft


@pytest.fixture(scope="module", autouse=True)
def group():
    with one_rank():
        yield


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_frozen_head_stays_the_targets_and_everything_else_learns(tmp_path, optimizer):
    changes = {"draft": {"freeze_head": True}, "optimizer": optimizer}
    trainer = make_trainer(tmp_path, changes, interval=2)
    before = weights_of(trainer)
    metrics = train(trainer, 3, ONE_BATCH)
    after = weights_of(trainer)
    lm_head = load_file(tmp_path / "target-0/model.safetensors")["lm_head.weight"]
    assert torch.equal(after[HEAD], lm_head[torch.from_numpy(DRAFT_VOCAB)])
    assert [name for name in after if torch.equal(after[name], before[name])] == [HEAD]
    assert moments_of(trainer).keys() == after.keys() - {HEAD}
    trainer.export(tmp_path / "draft")
    validate_draft(tmp_path / "draft", make_target(tmp_path / "target-0"))
    assert torch.equal(load_draft(tmp_path / "draft").draft.lm_head.weight, after[HEAD])
    # The checkpoint of step 2, resumed, takes the very step 3.
    again = make_trainer(tmp_path, changes, interval=2)
    again.resume(tmp_path / "ckpt" / "step_000002")
    [third] = train(again, 3, ONE_BATCH)
    assert third.loss == metrics[2].loss
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights_of(again).items())


def test_the_gradients_beside_a_frozen_head_are_those_beside_a_trained_one(tmp_path):
    """One step of plain descent in effect: AdamW's first has the gradient's sign alone."""
    frozen = make_trainer(tmp_path / "a", {"draft": {"freeze_head": True}, "max_grad_norm": 1e9})
    trained = make_trainer(tmp_path / "b", {"max_grad_norm": 1e9})
    train(frozen, 1, ONE_BATCH)
    train(trained, 1, ONE_BATCH)
    of_frozen, of_trained = moments_of(frozen), moments_of(trained)
    assert of_trained.keys() - of_frozen.keys() == {HEAD}
    for name, moments in of_frozen.items():
        assert torch.equal(moments["exp_avg"], of_trained[name]["exp_avg"])


@pytest.mark.parametrize("source", ["draft", "ckpt/step_000002"])
def test_a_frozen_head_is_the_targets_whatever_the_draft_starts_from(tmp_path, source):
    first = make_trainer(tmp_path / "first", {"learning_rate": 0.1}, interval=2)
    train(first, 2, ONE_BATCH)
    first.export(tmp_path / "first/draft")
    second = make_trainer(tmp_path / "second", {"draft": {"freeze_head": True}})
    head = weights_of(second)[HEAD]
    second.start_from(tmp_path / "first" / source)
    weights, old = weights_of(second), weights_of(first)
    assert torch.equal(weights[HEAD], head)
    assert not torch.equal(head, old[HEAD])
    assert torch.equal(weights["draft.fc.weight"], old["draft.fc.weight"])


def _two_frozen_ranks(folder: Path) -> None:
    changes = {
        "continual_from": "anywhere",
        "continual_vocab": "remap",
        "draft": {"freeze_head": True, "vocab_size": 30},
    }
    trainer = make_trainer(folder, changes, draft_vocab=OTHER_VOCAB)
    before = weights_of(trainer)
    trainer.start_from(folder / "draft")
    started = weights_of(trainer)
    train(trainer, 1, [[0, 4], [5]])
    trained = weights_of(trainer)
    if dist.get_rank() == 0:  # which has them whole
        assert torch.equal(started[HEAD], before[HEAD])
        assert torch.equal(trained[HEAD], before[HEAD])
        fc = "draft.fc.weight"
        assert not torch.equal(started[fc], before[fc])
        assert not torch.equal(trained[fc], started[fc])


def test_ranks_that_share_a_frozen_head_start_from_another_vocabulary(tmp_path):
    first = make_trainer(tmp_path / "first")
    train(first, 2, ONE_BATCH)
    first.export(tmp_path / "draft")
    on_two_ranks(_two_frozen_ranks, tmp_path)
