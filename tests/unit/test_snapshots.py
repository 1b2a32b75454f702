"""Which draft of a training is exported, with a decoder that finds what a test says."""

from collections import deque

import numpy as np
import pytest
from pydantic import ValidationError

from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.training import SnapshotConfig
from torchspec_lib.data.set_aside import TrainedPrompts, question, set_aside
from torchspec_lib.errors import CheckpointError, ConfigError, HungError, WorkerLostError
from torchspec_lib.pipeline import provision
from torchspec_lib.plan import make_plan
from torchspec_lib.plan_preview import describe, preview
from torchspec_lib.results import DatasetManifest, SnapshotResult
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.snapshots.selection import SnapshotSelection, best, num_without_gain
from torchspec_lib.target import read_target
from torchspec_lib.types import Prompt


def found(step: int, accept_length: float) -> SnapshotResult:
    return SnapshotResult(
        step=step,
        accept_length=accept_length,
        accept_rates=(0.5,),
        num_prompts=2,
        num_new_tokens=10,
        seconds=0.1,
    )


class FakeDecoder:
    """Finds ``lengths`` by step; fails with what stands there instead."""

    def __init__(self, lengths: dict[int, float | Exception], hangs: bool = False) -> None:
        self.lengths, self.hangs = lengths, hangs
        self.started: deque[int] = deque()

    def start(self, step):
        self.started.append(step)
        return f"call {step}"

    def wait(self, call):
        if self.hangs:
            raise HungError("the decoder of snapshots", "nothing has moved")

    def result(self, call):
        step = int(call.split()[1])
        length = self.lengths[step]
        if isinstance(length, Exception):
            raise length
        return found(step, length)


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def leave(folder: RunFolder, *steps: int) -> None:
    for step in steps:
        folder.snapshot(step).mkdir(parents=True, exist_ok=True)
        (folder.snapshot(step) / "model.safetensors").write_text(f"draft of {step}")


def selection(folder, decoder, patience=None) -> SnapshotSelection:
    return SnapshotSelection(folder, SnapshotConfig(interval_steps=10, patience=patience), decoder)


def on_disk(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.snapshots.iterdir())


def decode(chosen: SnapshotSelection, folder: RunFolder, *steps: int) -> None:
    for step in steps:
        leave(folder, step)
        chosen.advance()
        chosen.take()


def test_the_longest_accept_length_is_the_best_and_of_equals_the_latest():
    assert best([found(10, 2.0), found(20, 3.0), found(30, 3.0), found(40, 2.5)]).step == 30
    assert best([]) is None


def test_patience_counts_from_the_first_time_that_the_best_was_reached():
    assert num_without_gain([]) == 0
    assert num_without_gain([found(10, 2.0), found(20, 3.0)]) == 0
    assert num_without_gain([found(10, 3.0), found(20, 3.0), found(30, 2.0)]) == 2


def test_the_best_snapshot_is_exported_and_not_the_last(folder):
    chosen = selection(folder, FakeDecoder({10: 2.0, 20: 3.0, 30: 2.5}))
    decode(chosen, folder, 10, 20, 30)
    folder.draft.mkdir()
    (folder.draft / "older").touch()
    assert chosen.export(30) == 20
    assert [path.name for path in folder.draft.iterdir()] == ["model.safetensors"]
    assert (folder.draft / "model.safetensors").read_text() == "draft of 20"


def test_only_the_best_and_what_is_to_be_decoded_stay_on_the_disk(folder):
    chosen = selection(folder, FakeDecoder({10: 2.0, 20: 3.0, 30: 2.5}))
    decode(chosen, folder, 10, 20, 30)
    leave(folder, 40)
    chosen.advance()
    assert on_disk(folder) == ["step_000020", "step_000040"]


def test_while_the_decoder_is_busy_only_the_newest_snapshot_waits(folder):
    decoder = FakeDecoder({10: 2.0, 40: 2.5})
    chosen = selection(folder, decoder)
    for step in (10, 20, 30, 40):
        leave(folder, step)
        chosen.advance()
    assert list(decoder.started) == [10]
    assert on_disk(folder) == ["step_000010", "step_000040"]
    chosen.take()
    assert list(decoder.started) == [10, 40]
    chosen.finish()
    assert [result.step for result in chosen.results] == [10, 40]


def test_a_run_that_goes_on_remembers_its_best_and_decodes_no_step_twice(folder):
    decode(selection(folder, FakeDecoder({10: 2.0, 20: 3.0})), folder, 10, 20)
    leave(folder, 30)
    (folder.snapshots / ".step_000040-x").mkdir()
    decoder = FakeDecoder({30: 2.5})
    resumed = selection(folder, decoder)
    resumed.restart(15)
    assert on_disk(folder) == ["step_000020"], "step 30 is trained, and left, again"
    leave(folder, 20, 30)
    resumed.advance()
    assert list(decoder.started) == [30]
    resumed.take()
    assert resumed.export(30) == 20


def test_a_best_snapshot_that_has_vanished_is_not_passed_over(folder):
    decode(selection(folder, FakeDecoder({10: 2.0})), folder, 10)
    folder.snapshot(10).rename(folder.path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"step_000010.* best snapshot isn't there"):
        selection(folder, FakeDecoder({}))


def test_the_training_ends_after_so_many_snapshots_without_gain(folder):
    chosen = selection(folder, FakeDecoder({10: 3.0, 20: 2.0, 30: 2.9}), patience=2)
    assert not chosen.is_over(5)
    decode(chosen, folder, 10, 20)
    assert not chosen.is_over(20)
    decode(chosen, folder, 30)
    assert chosen.is_over(30)
    assert not chosen.is_over(25), "what is exported has to be trained again first"


def test_without_patience_the_training_goes_on(folder):
    chosen = selection(folder, FakeDecoder({10: 3.0, 20: 2.0, 30: 1.0}))
    decode(chosen, folder, 10, 20, 30)
    assert not chosen.is_over(30)


def test_a_decoder_that_is_lost_for_good_is_reported_and_the_best_so_far_exported(folder):
    lost = WorkerLostError("the decoder of snapshots", "its node is gone")
    chosen = selection(folder, FakeDecoder({10: 3.0, 20: lost}))
    decode(chosen, folder, 10, 20)
    assert chosen.problem == str(lost)
    leave(folder, 30)
    chosen.finish()
    assert chosen.calls == []
    assert chosen.export(30) == 10


def test_a_decoder_that_hangs_from_the_start_leaves_the_last_draft(folder):
    chosen = selection(folder, FakeDecoder({}, hangs=True))
    leave(folder, 10)
    chosen.finish()
    assert "nothing has moved" in chosen.problem
    assert chosen.export(10) == 10
    assert (folder.draft / "model.safetensors").read_text() == "draft of 10"


def test_settings_without_an_interval_are_refused():
    for useless in ({"patience": 2}, {"num_prompts": 3}):
        with pytest.raises(ValidationError, match="do nothing without interval_steps"):
            SnapshotConfig(**useless)
    assert SnapshotConfig().num_set_aside == 0


def prompts(num: int) -> list[Prompt]:
    ids, mask = np.arange(4, dtype=np.int32), np.array([0, 0, 1, 1], np.bool_)
    return [Prompt(f"p{i}", ids, mask) for i in range(num)]


def test_what_is_set_aside_is_fixed_by_the_seed_and_never_trained_on():
    aside = set_aside(20, 5, seed=3)
    assert aside.tolist() == set_aside(20, 5, seed=3).tolist() != set_aside(20, 5, 4).tolist()
    stored = prompts(20)
    trained = TrainedPrompts(stored, aside)
    ids = [trained[i].prompt_id for i in range(len(trained))]
    assert ids == [p.prompt_id for i, p in enumerate(stored) if i not in aside]
    assert len(ids) == 15
    assert len(TrainedPrompts(stored, set_aside(20, 0, seed=3))) == 20


def test_a_question_ends_where_the_last_answer_begins():
    mask = np.array([0, 1, 1, 0, 0, 1, 1, 0], np.bool_)
    assert question(Prompt("p", np.arange(8, dtype=np.int32), mask)) == [0, 1, 2, 3, 4]


def run_config(**changes) -> RunConfig:
    values = {
        "model": {"target": "examples/tiny_target", "dtype": "float32"},
        "data": {"train": ["t.jsonl"], "heldout": ["h.jsonl"]},
    }
    return RunConfig.model_validate(values | changes)


SNAPSHOTS = {"interval_steps": 10, "num_prompts": 8}
GPUS = {"training_num_gpus_per_node": 2}


def test_a_decoder_has_a_gpu_of_its_own_and_is_shown_where_it_sits():
    run = run_config(snapshots=SNAPSHOTS, training=GPUS)
    plan = make_plan(run, read_target(run.model), num_prompts=100, longest=64)
    assert plan.num_gpus == 2 + 1 + 1
    assert describe(run, preview(run, 4)).endswith("GPU 3       decoder of snapshots")
    without = make_plan(run_config(training=GPUS), read_target(run.model), 100, 64)
    assert without.num_gpus == 2 + 1


def test_colocated_the_decoder_shares_the_first_gpu():
    changes = {"training": GPUS, "inference": {"inference_num_gpus": 2}}
    run = run_config(snapshots=SNAPSHOTS, cluster={"placement": "colocate"}, **changes)
    plan = make_plan(run, read_target(run.model), num_prompts=100, longest=64)
    assert plan.num_gpus == 2
    assert ["decoding" in bundle.roles for bundle in plan.bundles] == [True, False]
    assert "trainer rank 0 with engine 0 and decoder of snapshots\n" in describe(run, preview(run))


def test_a_run_id_depends_on_how_snapshots_choose_and_on_nothing_without_them():
    decoding = {"draft_steps": 2, "max_new_tokens": 7}
    runs = [
        run_config(),
        run_config(snapshots=SNAPSHOTS),
        run_config(snapshots=SNAPSHOTS | {"interval_steps": 20}),
        run_config(snapshots=SNAPSHOTS | {"patience": 2}),
        run_config(snapshots=SNAPSHOTS, evaluation=decoding),
    ]
    assert len({run.training_hash("d") for run in runs}) == len(runs)
    assert run_config(evaluation=decoding).training_hash("d") == runs[0].training_hash("d")


def manifest(num_prompts: int) -> DatasetManifest:
    return DatasetManifest(
        dataset_id="d",
        num_prompts=num_prompts,
        num_heldout=10,
        num_tokens=5000,
        num_loss_tokens=3000,
        longest=90,
        turns={"supervised": 100},
        rejected={},
        draft_vocab_size=1024,
        vocab_coverage=1.0,
    )


def test_steps_are_planned_without_what_is_set_aside_and_too_little_is_refused(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    data = {name: [f"examples/tiny_target/{name}.jsonl"] for name in ("train", "heldout")}
    run = run_config(
        snapshots=SNAPSHOTS, data=data | {"max_length": 512}, cluster={"device": "cpu"}
    )
    assert provision(run, manifest(24)).num_steps == 1
    with pytest.raises(ConfigError, match=r"snapshots\.num_prompts: 8 .* half of all 15"):
        provision(run, manifest(15))
