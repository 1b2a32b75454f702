"""What a training will take, and what a draft has cost."""

import os
from pathlib import Path

import pytest

from tests.candidates import make_candidate
from torchspec_lib.config.run import RunConfig
from torchspec_lib.cost import bill, estimate, held_s, note_bring_up
from torchspec_lib.plan import ClusterPlan, make_plan
from torchspec_lib.results import TrainSummary
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.target import read_target
from torchspec_lib.types import StepMetrics


def make_run(root: Path, device: str = "cuda", **training: int) -> RunConfig:
    values = {
        "model": {"target": "examples/tiny_target"},
        "data": {"train": ["a.jsonl"], "heldout": ["b.jsonl"], "max_length": 512},
        "training": {"training_num_gpus_per_node": 4} | training,
        "inference": {"inference_num_gpus": 4},
        "cluster": {"device": device},
        "data_root": str(root),
    }
    return RunConfig.model_validate(values)


def plan_of(run: RunConfig) -> ClusterPlan:
    return make_plan(run, read_target(run.model), num_prompts=1500, longest=300)


def finish(run: RunConfig, run_id: str, training: TrainSummary, **figures: float) -> Path:
    folder = RunFolder(run.data_path / "runs" / run_id)
    folder.open(run)
    folder.draft.mkdir(exist_ok=True)
    folder.finish(training.model_copy(update={"run_id": run_id} | figures))
    return folder.summary


@pytest.fixture
def candidate(tmp_path):
    return make_candidate(tmp_path)


def test_an_estimate_takes_the_rate_of_the_newest_run_like_it(tmp_path, candidate):
    run = make_run(tmp_path)
    old = finish(run, "old", candidate.training, num_tokens=1000, wall_s=1000.0)
    os.utime(old, (1, 1))
    finish(run, "new", candidate.training, num_tokens=1000, wall_s=100.0)
    finish(make_run(tmp_path, "cpu"), "cpu", candidate.training, num_tokens=1, wall_s=1e6)
    found = estimate(run, plan_of(run), candidate.manifest)
    assert found.train_s == pytest.approx(120_000 / 10)
    assert found.gpu_hours == pytest.approx(8 * 12_000 / 3600)
    assert "run new took 10 tokens a second" in found.basis


def test_a_resumed_training_took_what_its_earlier_processes_took_too(tmp_path, candidate):
    run = make_run(tmp_path)
    figures = {"num_tokens": 1000, "wall_s": 90.0, "resumed_from_step": 2}
    folder = RunFolder(finish(run, "resumed", candidate.training, **figures).parent)
    folder.append_metrics([step_of(number, step_s=4.0, wait_s=1.0) for number in (1, 2, 3)])
    summary = folder.finished() or pytest.fail("it is finished")
    assert held_s(folder, summary) == 100.0
    for is_first in (True, False):
        note_bring_up(folder, 7.5, is_first)
    assert held_s(folder, summary) == 115.0
    note_bring_up(folder, 7.5, is_first=True)  # started over
    assert held_s(folder, summary) == 107.5
    found = estimate(run, plan_of(run), candidate.manifest)
    assert "run resumed took 10 tokens a second" in found.basis


def step_of(number, step_s, wait_s):
    return StepMetrics(
        step=number,
        loss=1.0,
        learning_rate=1e-3,
        grad_norm=1.0,
        chains=(4,),
        matches=(2,),
        num_samples=1,
        num_tokens=9,
        num_loss_tokens=8,
        step_s=step_s,
        wait_s=wait_s,
    )


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_without_a_run_like_it_an_estimate_says_that_it_is_rough(tmp_path, candidate, device):
    run = make_run(tmp_path, device)
    found = estimate(run, plan_of(run), candidate.manifest)
    assert found.train_s > 0
    assert (found.gpu_hours > 0) == (device == "cuda")
    assert "rough" in found.basis


def test_more_epochs_take_longer(tmp_path, candidate):
    once, twice = make_run(tmp_path), make_run(tmp_path, num_epochs=2)
    finish(once, "like", candidate.training, num_tokens=1000, wall_s=100.0)
    first = estimate(once, plan_of(once), candidate.manifest)
    second = estimate(twice, plan_of(twice), candidate.manifest)
    assert second.train_s == 2 * first.train_s


def test_a_bill_counts_the_gpus_held_and_every_stage_s_time(tmp_path, candidate):
    run, stage_s = make_run(tmp_path), {"prepare": 100.0, "train": 3600.0, "evaluate": 360.0}
    cost = bill(plan_of(run), candidate.training, stage_s)
    assert cost.gpu_hours == pytest.approx(8 + 0.1)
    assert cost.num_workers == 8
    assert cost.wall_s == 4060.0
    without = make_run(tmp_path, "cpu")
    assert bill(plan_of(without), candidate.training, stage_s).gpu_hours == 0
