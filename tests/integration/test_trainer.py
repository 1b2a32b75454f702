"""Real FSDP2 over Gloo: on one rank in this process, on two in processes of their own."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.training_cases import (
    CPU,
    DRAFT_VOCAB,
    ONE_BATCH,
    SAMPLE_TOKENS,
    RecordingControl,
    make_trainer,
    moments_of,
    on_two_ranks,
    one_rank,
    prepare,
    train,
    weights_of,
)
from torchspec_lib.errors import ConfigError, UserError
from torchspec_lib.models.export import load_draft
from torchspec_lib.training import eagle3_trainer
from torchspec_lib.training.checkpoint import CheckpointFolder
from torchspec_lib.training.checkpoint_files import checkpoint_path
from torchspec_lib.training.fsdp import clip_gradients, parallelize

TWO_RANKS = ([[0, 4], [5], [3]], [[2, 1], [], []])
REDUCTIONS = ("token", "sample")
FILES = (*REDUCTIONS, "replicate")


def _work(folder: Path) -> None:
    rank = dist.get_rank()
    for reduction in REDUCTIONS:
        trainer = make_trainer(folder, {"loss_reduction": reduction})
        metrics = train(trainer, 3, TWO_RANKS[rank])
        weights = weights_of(trainer)
        if rank == 0:
            torch.save((metrics, weights), folder / f"{reduction}.pt")
        else:
            assert metrics == [None] * 3
    trainer.export(folder / "draft")
    trainer = make_trainer(folder / "replicate", {"parallelism": "replicate"})
    metrics = train(trainer, 3, TWO_RANKS[rank])
    weights = weights_of(trainer)
    if rank == 0:
        torch.save((metrics, weights), folder / "replicate.pt")
    for parameter in trainer._model.parameters():
        assert parameter.to_local().shape == parameter.shape
    _clip_with_an_empty_shard(folder)


def _clip_with_an_empty_shard(folder: Path) -> None:
    """A parameter of one row has nothing on rank 1."""
    model = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    parallelize(model, CPU, torch.float32)
    model(torch.full((2, 4), 3.0)).sum().backward()
    norm = clip_gradients(model, 1.0)
    (folder / f"norm-{dist.get_rank()}").write_text(str(norm.item()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def two_ranks(folder):
    on_two_ranks(_work, folder)
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in FILES}


@pytest.fixture(scope="module", autouse=True)
def group():
    with one_rank():
        yield


def _same_run(metrics, weights, other_metrics, other_weights):
    for step, other in zip(metrics, other_metrics, strict=True):
        assert step.loss == pytest.approx(other.loss, rel=1e-6)
        assert step.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
        timeless = replace(
            other, loss=step.loss, grad_norm=step.grad_norm, step_s=step.step_s, wait_s=step.wait_s
        )
        assert step == timeless
    for name, weight in weights.items():
        torch.testing.assert_close(weight, other_weights[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_ranks_take_the_steps_of_one(folder, two_ranks, reduction):
    trainer = make_trainer(folder, {"loss_reduction": reduction})
    before = weights_of(trainer)
    metrics = train(trainer, 3, ONE_BATCH)
    weights = weights_of(trainer)
    assert any((weights[name] - before[name]).abs().max() > 5e-4 for name in before)
    _same_run(metrics, weights, *two_ranks[reduction])


def test_ranks_that_hold_all_parameters_take_the_steps_of_ranks_that_share_them(folder, two_ranks):
    _same_run(*two_ranks["token"], *two_ranks["replicate"])


def test_a_checkpoint_of_whole_parameters_goes_on_sharded(folder, two_ranks):
    trainer = make_trainer(folder)
    trainer.resume(checkpoint_path(folder / "replicate" / "ckpt", 3))
    weights = weights_of(trainer)
    assert all(torch.equal(w, weights[name]) for name, w in two_ranks["replicate"][1].items())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_many_micro_batches_take_the_steps_of_one(folder, reduction):
    runs = []
    for deal in (ONE_BATCH, [[3], [0, 5], [4, 1], [2]]):
        trainer = make_trainer(folder, {"loss_reduction": reduction})
        metrics = train(trainer, 3, deal)
        runs += [metrics, weights_of(trainer)]
    _same_run(*runs)


def test_samples_that_weigh_alike_give_another_step_than_tokens_that_do(two_ranks):
    token, sample = (two_ranks[name][0][0].loss for name in REDUCTIONS)
    assert abs(token - sample) > 1e-3


def test_a_step_reports_the_whole_batch_once(two_ranks):
    metrics = two_ranks["token"][0][0]
    assert (metrics.num_samples, metrics.num_tokens) == (6, sum(SAMPLE_TOKENS))
    assert metrics.num_loss_tokens == sum(n - n // 2 for n in SAMPLE_TOKENS)
    # Chains of depth 0: one for each assistant token but those that no chain can predict.
    assert metrics.chains[0] == sum(n - max(n // 2, 2) for n in SAMPLE_TOKENS)
    assert all(m <= c for m, c in zip(metrics.matches, metrics.chains, strict=True))


def test_the_loss_of_the_same_samples_falls(folder):
    trainer = make_trainer(folder)
    steps = [replace(prepare(trainer, 1, ONE_BATCH), step=step) for step in range(1, 6)]
    losses = [trainer.train_step(step)().loss for step in steps]
    assert losses == sorted(losses, reverse=True)


def test_a_step_without_any_supervised_token_changes_no_weight(folder):
    trainer = make_trainer(folder)
    before = weights_of(trainer)
    metrics = trainer.train_step(
        replace(prepare(trainer, 1, []), batches=(trainer.empty_batch,) * 2)
    )()
    after = weights_of(trainer)
    assert (metrics.loss, metrics.grad_norm, metrics.accept_length) == (0.0, 0.0, 1.0)
    assert (metrics.num_samples, metrics.num_tokens, metrics.num_loss_tokens) == (0, 0, 0)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bf16_computing_keeps_fp32_weights_and_denominators(folder):
    exact, rounded = make_trainer(folder), make_trainer(folder, {"compute_dtype": "bfloat16"})
    losses = [train(t, 1, [[0, 1], [2, 3, 4, 5]])[0].loss for t in (exact, rounded)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert {weight.dtype for weight in weights_of(rounded).values()} == {torch.float32}
    assert {m["exp_avg"].dtype for m in moments_of(rounded).values()} == {torch.float32}


def test_gradients_that_are_not_finite_end_the_run_and_name_the_step(folder):
    trainer = make_trainer(folder)
    prepared = prepare(trainer, 5, ONE_BATCH)
    prepared.batches[0].aux_states_TA[30, 0] = float("inf")
    with pytest.raises(UserError, match=r"step 5: .*nan.*training\.learning_rate"):
        trainer.train_step(prepared)()


def test_a_step_that_does_not_fit_into_memory_names_the_setting(folder, monkeypatch):
    trainer = make_trainer(folder)

    def fail(*_):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(eagle3_trainer, "supervise", fail)
    with pytest.raises(ConfigError, match=r"micro_batch_tokens: step 5, .* 64 tokens .* 2\.00 GiB"):
        trainer.train_step(prepare(trainer, 5, ONE_BATCH))


def test_a_parameter_smaller_than_the_group_is_clipped_by_the_global_norm(folder, two_ranks):
    # Each rank's gradient is [6, 6, 6, 6]; summed 12 each: norm 24.
    assert [(folder / f"norm-{rank}").read_text() for rank in range(2)] == ["24.0", "24.0"]


def test_the_export_of_two_ranks_holds_their_weights(folder, two_ranks):
    loaded = load_draft(folder / "draft")
    weights = two_ranks["sample"][1]
    exported = loaded.draft.state_dict()
    assert exported.keys() == {name.removeprefix("draft.") for name in weights}
    assert all(torch.equal(exported[n.removeprefix("draft.")], weights[n]) for n in weights)
    assert (loaded.draft_vocab == DRAFT_VOCAB).all()


def test_a_step_is_trained_while_the_one_before_is_reported(tmp_path):
    trainer = make_trainer(tmp_path, interval=3)
    second_is_asked_for, said = threading.Event(), []

    class SlowControl(RecordingControl):
        def report(self, report):
            assert second_is_asked_for.wait(30)
            super().report(report)

    control = SlowControl()

    def steps():
        for step in (1, 2, 3):
            said.append((trainer.doing, len(control.reports)))
            if step == 2:
                second_is_asked_for.set()
            yield prepare(trainer, step, [[0]])

    assert trainer.run(steps(), control) == 3
    assert [doing for doing, _ in said] == [f"waiting for step {n}" for n in (1, 2, 3)]
    assert said[1][1] == 0
    assert said[2][1] >= 1  # never two steps ahead of what is reported
    assert [report.step for report in control.reports] == [1, 2, 3]
    assert trainer.doing == "done"


def test_a_step_is_saved_once_it_is_reported(tmp_path):
    control = RecordingControl()

    class Folder(CheckpointFolder):
        def save(self, state, step, accounts):
            assert control.reports[-1].step == step
            super().save(state, step, accounts)

    trainer = make_trainer(tmp_path, interval=1, checkpoints=Folder)
    trainer.run((prepare(trainer, step, [[0]]) for step in (1, 2, 3)), control)


def test_what_goes_wrong_in_a_report_ends_the_run_and_the_step_is_not_saved(tmp_path):
    trainer = make_trainer(tmp_path, interval=2)

    class LostControl(RecordingControl):
        def report(self, report):
            if report.step == 2:
                raise UserError("the controller is gone")

    with pytest.raises(UserError, match="gone"):
        trainer.run((prepare(trainer, step, [[0]]) for step in (1, 2, 3)), LostControl())
    assert not list((tmp_path / "ckpt").glob("*"))
