"""Whole training runs, each a process of its own: Ray, Mooncake, an engine, FSDP2 ranks."""

import signal
from pathlib import Path

import pytest

from tests.run_process import Driver, config, wait_for
from torchspec_lib.models.export import load_draft
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.training.checkpoint_files import last_step

pytestmark = [pytest.mark.ray, pytest.mark.mooncake]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One undisturbed run over two epochs with two ranks, and what it left."""
    tmp_path = tmp_path_factory.mktemp("run")
    run = config(tmp_path / "data")
    run = run.model_copy(update={"training": run.training.model_copy(update={"num_epochs": 2})})
    driver = Driver(run, tmp_path)
    return run, driver.summary(), driver.leftovers(), tmp_path


def test_every_prompt_of_every_epoch_is_accounted_for(finished):
    _, summary, _, _ = finished
    assert summary["num_trained"] == 48
    assert summary["num_trained"] + summary["num_rejected"] == summary["num_prompts"] * 2
    assert summary["num_steps"] == 10


def test_the_draft_is_exported_and_its_loss_fell(finished):
    run, summary, _, _ = finished
    steps = RunFolder(run.data_path / "runs" / summary["run_id"]).read_metrics()
    assert [step.step for step in steps] == list(range(1, 11))
    assert steps[-1].loss < 0.8 * steps[0].loss
    assert load_draft(Path(summary["draft_dir"])).config.draft_vocab_size == 256


def test_hidden_states_do_not_pass_through_rays_object_store(finished):
    _, summary, _, _ = finished
    assert summary["bytes_streamed"] > 5_000_000
    assert summary["object_store_bytes"] < 0.02 * summary["bytes_streamed"]


def test_a_finished_run_leaves_nothing_behind(finished):
    assert finished[2] == []


def test_a_finished_run_is_not_trained_again(finished):
    run, summary, _, tmp_path = finished
    again = Driver(run, tmp_path).summary()
    assert not again["used_ray"]
    assert {key: again[key] for key in ("run_id", "num_steps", "loss")} == {
        key: summary[key] for key in ("run_id", "num_steps", "loss")
    }


def test_embedded_mode_and_one_rank_train_as_well(tmp_path):
    run = config(
        tmp_path / "data",
        num_prompts=10,
        transfer={"mode": "embedded"},
        training={"global_batch_size": 4, "compute_dtype": "float32"},
    )
    summary = Driver(run, tmp_path).summary()
    assert (summary["num_trained"], summary["num_steps"]) == (10, 3)


def test_colocated_engines_and_trainers_share_their_bundles(tmp_path):
    run = config(
        tmp_path / "data",
        num_prompts=10,
        cluster={"device": "cpu", "placement": "colocate"},
        inference={"inference_num_gpus": 2},
    )
    assert Driver(run, tmp_path).summary()["num_trained"] == 10


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_an_interrupted_run_saves_all_its_steps_and_leaves_nothing_behind(tmp_path, number):
    run = config(tmp_path / "data", num_prompts=600)
    driver = Driver(run, tmp_path)
    folders = tmp_path / "data" / "runs"
    wait_for(lambda: list(folders.glob("*/metrics.jsonl")), "first step")
    driver.process.send_signal(number)
    code, _, _ = driver.finish()
    assert code != 0
    driver.wait_until_gone(20)
    [folder] = [RunFolder(path) for path in folders.glob("*/")]
    assert last_step(folder.checkpoints) == len(folder.read_metrics()) < 120


def test_a_killed_run_goes_on_from_its_checkpoint_on_another_number_of_ranks(tmp_path):
    training = {
        "training_num_gpus_per_node": 2,
        "global_batch_size": 4,
        "compute_dtype": "float32",
        "checkpoint_interval": 5,
    }
    run = config(tmp_path / "data", num_prompts=120, training=training)
    driver = Driver(run, tmp_path)
    runs = tmp_path / "data" / "runs"
    wait_for(lambda: list(runs.glob("*/checkpoints/step_000005")), "checkpoint")
    driver.process.kill()
    driver.finish()
    wait_for(lambda: not driver.processes(), "end of the actors", 60)
    on_one_rank = training | {"training_num_gpus_per_node": 1}
    resumed = Driver(config(tmp_path / "data", num_prompts=120, training=on_one_rank), tmp_path)
    summary = resumed.summary()
    assert resumed.leftovers() == [], "not even of the killed run"
    assert summary["resumed_from_step"] >= 5
    assert (summary["num_trained"], summary["num_steps"]) == (120, 30)
    steps = RunFolder(run.data_path / "runs" / summary["run_id"]).read_metrics()
    assert [step.step for step in steps] == list(range(1, 31))
