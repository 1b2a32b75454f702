"""Snapshots of whole training runs: decoded while they train, the best exported, kept on resume."""

import os
import signal

import pytest
import torch

from tests.run_process import Driver, config, wait_for
from torchspec_lib.config.run import RunConfig
from torchspec_lib.evaluation.acceptance import accept_length
from torchspec_lib.models.export import load_draft
from torchspec_lib.models.target_model import load_target
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.snapshots.decoder import questions, snapshot_decoder
from torchspec_lib.target import read_target
from torchspec_lib.training.checkpoint_files import last_step

pytestmark = [pytest.mark.ray, pytest.mark.mooncake]

NUM_PROMPTS, NUM_ASIDE, NUM_EPOCHS = 84, 4, 40


def make_run(data_root, **changes):
    """Its learning rate rises for as long as it goes on: at first the draft learns, then it
    unlearns everything."""
    values = {
        "training": {
            "training_num_gpus_per_node": 2,
            "num_epochs": NUM_EPOCHS,
            "global_batch_size": 5,
            "learning_rate": 1.0,
            "warmup_ratio": 1.0,
            "compute_dtype": "float32",
            "checkpoint_interval": 10,
        },
        "snapshots": {"interval_steps": 10, "num_prompts": NUM_ASIDE, "patience": 4},
        "evaluation": {"draft_steps": 3, "max_new_tokens": 16},
    }
    return config(data_root, NUM_PROMPTS, **(values | changes))


def the_folder(run):
    return RunFolder(wait_for(lambda: next(run.data_path.glob("runs/*/"), None), "run folder"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run whose decoder is killed, then its driver, and which is then taken to its end."""
    tmp_path = tmp_path_factory.mktemp("run")
    run = make_run(tmp_path / "data")
    driver = Driver(run, tmp_path)
    folder = the_folder(run)
    wait_for(folder.read_metrics, "step")
    [decoder] = [p for p in driver.processes() if "SnapshotDecoder" in p.info["cmdline"][0]]
    os.kill(decoder.pid, signal.SIGKILL)
    first = wait_for(folder.read_snapshots, "result")[0]
    num_steps_then = len(folder.read_metrics())
    wait_for(lambda: last_step(folder.checkpoints) > first.step, "checkpoint")
    driver.process.kill()
    driver.finish()
    wait_for(lambda: not driver.processes(), "end of the actors", 60)
    before = folder.read_snapshots()
    resumed = Driver(run, tmp_path)
    summary = resumed.summary()
    return folder, first, num_steps_then, before, summary, resumed


def test_the_training_goes_on_while_a_snapshot_is_decoded(stopped):
    _, first, num_steps_then, _, summary, _ = stopped
    assert first.step % 10 == 0
    assert first.step < num_steps_then < summary["num_steps"]


def test_a_decoder_that_is_killed_comes_back_and_does_its_work_again(stopped):
    folder, _, _, before, summary, _ = stopped
    assert summary["snapshot_problem"] is None
    assert "the decoder of snapshots" in [r.part for r in folder.read_recoveries()]
    assert before


def test_a_run_that_goes_on_keeps_what_was_found_and_decodes_no_step_twice(stopped):
    _, _, _, before, summary, _ = stopped
    assert summary["resumed_from_step"] >= 10
    steps = [result["step"] for result in summary["snapshots"]]
    assert len(steps) == len(set(steps)) > len(before)
    assert [r.model_dump(mode="json") for r in before] == summary["snapshots"][: len(before)]


def test_the_best_draft_is_exported_and_not_the_last(stopped):
    folder, _, _, _, summary, _ = stopped
    *_, last = snapshots = summary["snapshots"]
    best = max(snapshots, key=lambda result: (result["accept_length"], result["step"]))
    assert summary["exported_step"] == best["step"] < last["step"] == summary["num_steps"]
    assert best["accept_length"] > last["accept_length"]
    kept = folder.snapshot(best["step"])
    assert list(folder.snapshots.iterdir()) == [kept]
    for name in ("config.json", "model.safetensors"):
        assert (folder.draft / name).read_bytes() == (kept / name).read_bytes()


def test_the_figure_is_that_of_the_exported_draft_on_the_prompts_set_aside(stopped):
    folder, _, _, _, summary, _ = stopped
    run = RunConfig.model_validate_json((folder.path / "config.json").read_text())
    target, cpu = read_target(run.model), torch.device("cpu")
    model = load_target(target, run.model.dtype, cpu, trust_remote_code=False)
    decoder = snapshot_decoder(run, model, load_draft(folder.draft), cpu)
    [dataset] = (run.data_path / "datasets").glob("[!.]*/")
    asked = questions(run, dataset)
    counts = [decoder.decode(ids, target.eos_token_ids).counts for ids in asked]
    [result] = [r for r in summary["snapshots"] if r["step"] == summary["exported_step"]]
    assert len(asked) == NUM_ASIDE
    assert accept_length(counts) == result["accept_length"]


def test_the_training_stops_early_and_accounts_for_what_is_left(stopped):
    _, _, _, _, summary, _ = stopped
    num_positions = (NUM_PROMPTS - NUM_ASIDE) * NUM_EPOCHS
    assert summary["num_trained"] == 5 * summary["num_steps"] < num_positions
    assert summary["num_set_aside"] == NUM_ASIDE
    assert summary["num_prompts"] == NUM_PROMPTS - NUM_ASIDE
    accounted = [summary[f"num_{name}"] for name in ("trained", "rejected", "not_trained")]
    assert sum(accounted) == num_positions


def test_nothing_is_left_behind(stopped):
    assert stopped[-1].leftovers() == []
