"""Muon under real FSDP2 over Gloo: on one rank, and on two in processes of their own."""

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
from torchspec_lib.training.muon import Muon
from torchspec_lib.training.optimizer import MuonWithAdamW

MUON = {"optimizer": "muon", "weight_decay": 0.1}
PARALLELISM = ("shard", "replicate")
TWO_RANKS = ([[0, 4], [5]], [[2, 1], [3]])


def _work(folder: Path) -> None:
    for parallelism in PARALLELISM:
        trainer = make_trainer(folder, {**MUON, "parallelism": parallelism})
        train(trainer, 1, TWO_RANKS[dist.get_rank()])
        torch.save(weights_of(trainer), folder / f"{parallelism}-{dist.get_rank()}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-ranks")
    on_two_ranks(_work, folder)
    return {name: torch.load(folder / f"{name}-0.pt") for name in PARALLELISM}


@pytest.fixture(scope="module", autouse=True)
def group():
    with one_rank():
        yield


@pytest.mark.parametrize("shape", [(6, 6), (5, 12), (12, 5), (1, 7)])
def test_a_step_is_that_of_torchs_own(shape):
    random = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=random)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = (
        Muon([ours], **settings),
        torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings),
    )
    for _ in range(3):
        gradient = torch.randn(shape, generator=random)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
        assert torch.equal(ours, theirs)
    assert not torch.equal(ours, start)


@pytest.mark.parametrize("parallelism", PARALLELISM)
def test_two_ranks_take_the_step_of_one(two_ranks, tmp_path, parallelism):
    trainer = make_trainer(tmp_path, MUON)
    before = weights_of(trainer)
    train(trainer, 1, ONE_BATCH)
    for name, weight in weights_of(trainer).items():
        step, other = weight - before[name], two_ranks[parallelism][name] - before[name]
        assert step.norm() > 0
        assert (step - other).norm() < 1e-5 * step.norm(), name


def test_inner_matrices_step_orthogonally_and_the_others_as_with_adamw(tmp_path):
    steps = {}
    for optimizer in ("muon", "adamw"):
        trainer = make_trainer(tmp_path / optimizer, {"optimizer": optimizer})
        before = weights_of(trainer)
        train(trainer, 1, ONE_BATCH)
        steps[optimizer] = {n: w - before[n] for n, w in weights_of(trainer).items()}
    for name, step in steps["muon"].items():
        if step.ndim == 1 or "lm_head" in name:
            assert torch.equal(step, steps["adamw"][name]), name
        else:
            ours, theirs = (torch.linalg.svdvals(steps[o][name]) for o in ("muon", "adamw"))
            assert ours.max() / ours.median() < min(2.0, theirs.max() / theirs.median()), name


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(tmp_path):
    straight = make_trainer(tmp_path, MUON, interval=3)
    train(straight, 6, ONE_BATCH)
    resumed = make_trainer(tmp_path, MUON, interval=10**6)
    resumed.resume(tmp_path / "ckpt" / "step_000003")
    assert isinstance(resumed._state.optimizer, MuonWithAdamW)
    train(resumed, 6, ONE_BATCH)
    for name, weight in weights_of(straight).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name
    for name, moments in moments_of(straight).items():
        theirs = moments_of(resumed)[name]
        assert moments.keys() == theirs.keys()
        assert all(torch.equal(moments[key], theirs[key]) for key in moments)
