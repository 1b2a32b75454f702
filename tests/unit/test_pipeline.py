import json
import os
import shutil
import subprocess
import sys

import pytest

from torchspec_lib import run_folder
from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.settings import PROJECT_ROOT
from torchspec_lib.errors import ConfigError, PlacementError
from torchspec_lib.pipeline import preflight, provision
from torchspec_lib.results import DatasetManifest
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.types import Recovery, StepMetrics

TINY = PROJECT_ROOT / "examples" / "tiny_target"
MANIFEST = DatasetManifest(
    dataset_id="d",
    num_prompts=100,
    num_heldout=10,
    num_tokens=5000,
    num_loss_tokens=3000,
    longest=90,
    turns={"supervised": 100},
    rejected={},
    draft_vocab_size=1024,
    vocab_coverage=1.0,
)


GPUS = {"GPU": 1.0, "CPU": 8.0}


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def run_config(**changes) -> RunConfig:
    values = {
        "model": {"target": str(TINY), "dtype": "float32"},
        "data": {
            "train": [str(TINY / "train.jsonl")],
            "heldout": [str(TINY / "heldout.jsonl")],
            "max_length": 512,
        },
        "cluster": {"device": "cpu"},
    }
    return RunConfig.model_validate(values | changes)


def test_a_plan_has_the_sizes_of_the_data_not_of_the_limit():
    plan = provision(run_config(), MANIFEST)
    assert plan.sample_bytes < 100 * plan.bytes_per_token + 4096
    assert plan.num_steps == 7


def test_a_longer_limit_than_the_target_has_positions_is_refused():
    data = run_config().data.model_copy(update={"max_length": 4096})
    with pytest.raises(ConfigError, match=r"data\.max_length: 4096 .* 2048 positions"):
        preflight(run_config(data=data))


def test_sglang_needs_a_position_for_the_token_that_it_draws():
    data = run_config().data.model_copy(update={"max_length": 2048})
    preflight(run_config(data=data))
    with pytest.raises(ConfigError, match=r"data\.max_length: 2048 .* draws.*Use at most 2047"):
        preflight(run_config(data=data, inference={"engine": "sglang"}))


def test_an_engine_over_two_nodes_passes_with_a_bundle_for_each_part():
    sglang = {"tp_size": 2, "nnodes": 2}
    inference = {"engine": "sglang", "inference_num_gpus": 4, "sglang": sglang}
    plan = provision(run_config(inference=inference), MANIFEST)
    assert (plan.num_engines, len(plan.inference_bundles)) == (2, 4)


def test_an_evaluation_by_sglang_is_refused_without_a_gpu():
    evaluation = {"engine": "sglang"}
    with pytest.raises(ConfigError, match=r"evaluation\.engine: 'sglang' can't draft on a CPU"):
        preflight(run_config(evaluation=evaluation))
    preflight(run_config(evaluation=evaluation, cluster={"device": "cuda"}), nodes=[GPUS] * 2)


def test_a_larger_draft_vocabulary_than_the_targets_is_refused():
    with pytest.raises(ConfigError, match=r"draft\.vocab_size"):
        preflight(run_config(draft={"vocab_size": 1025}))


def test_trees_that_the_evaluation_could_not_decode_are_refused_before_the_training(tmp_path):
    trees = {"draft_topk": 4, "num_draft_tokens": 8}
    wide = {"draft_topk": 65, "num_draft_tokens": 80}
    preflight(run_config(evaluation=trees))
    with pytest.raises(ConfigError, match=r"draft_topk: 65 exceeds the draft's 64 tokens"):
        preflight(run_config(evaluation=wide, draft={"vocab_size": 64}))
    shutil.copytree(TINY, tmp_path / "target")
    file = tmp_path / "target" / "config.json"
    sliding = {"model_type": "gemma2", "sliding_window": 64}
    file.write_text(json.dumps(json.loads(file.read_text()) | sliding))
    model = {"target": str(tmp_path / "target"), "dtype": "float32"}
    preflight(run_config(model=model))
    with pytest.raises(ConfigError, match="layers of sliding_attention"):
        preflight(run_config(model=model, evaluation=trees))


def test_a_data_set_with_a_dot_in_its_name_is_no_missing_file():
    train = {"train": ("teknium/OpenHermes-2.5",)}
    preflight(run_config().model_copy(update={"data": run_config().data.model_copy(update=train)}))


def test_a_missing_file_is_told_before_a_target_is_downloaded(monkeypatch):
    monkeypatch.setattr("torchspec_lib.pipeline.read_target", lambda _: pytest.fail("downloads"))
    data = run_config().data.model_copy(update={"heldout": ("nowhere.jsonl",)})
    with pytest.raises(ConfigError, match=r"data.heldout\[0\]"):
        preflight(run_config().model_copy(update={"data": data}))


def test_a_data_root_in_which_nothing_can_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"data_root: .*/file is a file"):
            preflight(run_config(data_root=str(root)))
    preflight(run_config(data_root=str(tmp_path / "new" / "folders")))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may do everything
    with pytest.raises(ConfigError, match=r"data_root: nothing can be written in"):
        preflight(run_config(data_root=str(tmp_path / "new")))


@pytest.mark.parametrize("mode", ["debug_train_only", "debug_inference_only"])
def test_a_mode_that_trains_no_draft_is_refused(mode):
    with pytest.raises(ConfigError, match=r"cluster\.placement.*trains no draft"):
        preflight(run_config(cluster={"device": "cpu", "placement": mode}))


def test_more_memory_than_is_free_is_refused():
    run = run_config(transfer={"segment_bytes": 1 << 50})
    with pytest.raises(ConfigError, match=r"GiB of memory"):
        preflight(run)


def test_gpus_are_checked_against_the_nodes_that_are_to_come():
    run = run_config(cluster={"device": "cuda"})
    preflight(run, nodes=[GPUS, GPUS])
    with pytest.raises(PlacementError, match="missing 1 GPU"):
        preflight(run, nodes=[GPUS])


def metrics(step: int) -> StepMetrics:
    return StepMetrics(step, 1.5, 1e-3, 0.5, (10, 6), (6, 3), 4, 100, 50, 0.1, 0.0)


def test_metrics_come_back_as_they_were_noted(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics([metrics(1), metrics(2)])
    assert folder.read_metrics() == [metrics(1), metrics(2)]
    assert json.loads(folder.metrics.read_text().splitlines()[0])["accept_length"] == pytest.approx(
        1.9
    )


def test_what_is_trained_again_is_noted_once(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics([metrics(step) for step in range(1, 6)])
    folder.keep_metrics_until(3)
    folder.append_metrics([metrics(4)])
    assert [step.step for step in folder.read_metrics()] == [1, 2, 3, 4]


def test_a_fresh_run_forgets_results_and_keeps_reports(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(run_config())
    for path in (folder.checkpoints / "step_000001", folder.draft, folder.reports):
        path.mkdir(parents=True)
    folder.append_metrics([metrics(1)])
    folder.append_recovery(Recovery("engine 0", "killed", 1.0))
    folder.summary.touch()
    folder.open(run_config(fresh=True))
    assert {path.name for path in folder.path.iterdir()} == {
        "checkpoints",
        "config.json",
        "reports",
    }
    assert not list(folder.checkpoints.iterdir())


def test_a_run_whose_actors_still_live_keeps_another_one_out(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "CLAIM_TIMEOUT_S", 0.0)
    code = (
        "import sys; from pathlib import Path; from torchspec_lib.run_folder import RunFolder\n"
        f"lock = RunFolder(Path({str(tmp_path / 'run')!r})).use(); print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    actor = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert actor.stdout.readline() == "held\n"
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError, match="being trained by another process"), folder.claim():
        pass
    actor.communicate("")
    with folder.claim():
        folder.use().close()  # this run's own actors come in
