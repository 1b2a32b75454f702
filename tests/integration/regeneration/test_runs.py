"""Answers by the tiny target itself: resumed, reproducible, and prepared like any others."""

import json
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import psutil
import pytest

from tests.integration.regeneration.cases import run_of, target
from tests.run_process import wait_for
from torchspec_lib.config.inference import SglangConfig
from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.settings import PROJECT_ROOT
from torchspec_lib.data.conversations import Conversation
from torchspec_lib.data.dataset import load_heldout, load_prompts, prepare_dataset
from torchspec_lib.data.regenerated import RegeneratedFolder
from torchspec_lib.data.sources import Sources
from torchspec_lib.errors import ConfigError, DataError, WorkerLostError
from torchspec_lib.regeneration.hf_generator import HFGenerator
from torchspec_lib.regeneration.regenerate import regenerate
from torchspec_lib.regeneration.shard import Shard, answer_shard

DRAWN = {"temperature": 1.0, "shard_size": 4, "batch_size": 4}


def folder_of(run: RunConfig) -> RegeneratedFolder:
    folder = Sources.open(run.data).answers(run, target())
    assert folder is not None
    return folder


def start(run: RunConfig, tmp_path: Path) -> subprocess.Popen:
    file = tmp_path / "run.json"
    file.write_text(run.model_dump_json())
    command = [sys.executable, "-m", "tests.regenerate", str(file)]
    return subprocess.Popen(
        command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def shards(folder: RegeneratedFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder.path / "shards").glob("*.jsonl")}


def questions(run: RunConfig) -> list[Conversation]:
    (source,) = Sources.open(run.data).train
    return list(islice(source.conversations(answered=False), run.regeneration.max_conversations))


@pytest.fixture(scope="module")
def answered(model, chat, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Answers, all of them given in this process."""
    run = run_of(tmp_path_factory.mktemp("answered"), **DRAWN)
    folder, asked = folder_of(run), questions(run)
    generator = HFGenerator(model, run.regeneration, target().eos_token_ids)
    with folder.claim():
        for index in range(6):
            shard = Shard(index, tuple(asked[4 * index : 4 * index + 4]))
            folder.write_shard(*answer_shard(shard, run, chat, generator))
        folder.finish()
    return run


def spawned() -> list[psutil.Process]:
    """This process's engines."""
    children = psutil.Process().children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def test_a_run_that_lost_its_engine_goes_on_behind_its_last_shard_to_the_same_bytes(
    answered, tmp_path
):
    expected = shards(folder_of(answered))
    run = run_of(tmp_path, **DRAWN)
    folder = folder_of(run)

    def kill_the_engine() -> None:
        wait_for(lambda: folder.has_shard(1), "shard")
        (engine,) = spawned()
        engine.kill()

    killer = threading.Thread(target=kill_the_engine)
    killer.start()
    with pytest.raises(WorkerLostError, match=r"regeneration engine 0.*exit code -9"):
        regenerate(run, target())
    killer.join()
    before = {path: path.stat().st_mtime_ns for path in (folder.path / "shards").glob("0*.jsonl")}
    assert 2 <= len(before) < len(expected) == 6
    assert folder.answers() is None
    two = run.inference.model_copy(update={"inference_num_gpus": 2})
    answers, _ = regenerate(run.model_copy(update={"inference": two}), target())
    assert (answers.num_conversations, answers.num_answered) == (24, 24)
    assert shards(folder) == expected
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {path.name for path in (folder.path / "shards").iterdir()} == {
        f"{index:06d}.{kind}" for index in range(6) for kind in ("json", "jsonl")
    }


def test_engines_do_not_outlive_a_run_that_is_killed(tmp_path):
    process = start(run_of(tmp_path, num=400, shard_size=400, batch_size=1), tmp_path)
    parent = psutil.Process(process.pid)
    wait_for(lambda: parent.children(recursive=True), "engine")
    time.sleep(0.5)  # it is sent its shard, half a minute's work
    engines = parent.children(recursive=True)
    process.kill()
    _, alive = psutil.wait_procs(engines, timeout=15)
    for engine in alive:
        engine.kill()
    process.communicate()  # not before: the engines have its pipes
    assert not alive


def test_an_engine_that_cannot_start_tells_why_however_much_it_was_to_answer(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text((json.dumps({"prompt": "How many? " * 100}) + "\n") * 1000)
    run = run_of(tmp_path, num=1000, shard_size=1000)
    changes = {"train": (str(path),), "chat_template_kwargs": {"enable_thinking": False}}
    run = run.model_copy(update={"data": run.data.model_copy(update=changes)})
    with pytest.raises(ConfigError, match=r"template doesn't read enable_thinking"):
        regenerate(run, target())


def test_a_broken_held_out_line_is_told_before_anything_is_answered(tmp_path):
    path = tmp_path / "heldout.jsonl"
    path.write_text("{}\n")
    run = run_of(tmp_path)
    data = run.data.model_copy(update={"heldout": (str(path),)})
    with pytest.raises(DataError, match=r"heldout.jsonl:1: has neither"):
        regenerate(run.model_copy(update={"data": data}), target())


def test_the_answers_are_prepared_like_any_conversations(answered, chat):
    manifest, folder = prepare_dataset(answered, target())
    assert (manifest.num_prompts, manifest.num_heldout) == (24, 100)
    conversations = [
        conversation
        for report in folder_of(answered).reports()
        for conversation in folder_of(answered).conversations(report)
    ]
    for prompt, conversation in zip(load_prompts(folder), conversations, strict=True):
        token_ids, mask, _ = chat.encode(conversation.messages, "here")
        assert prompt.token_ids.tolist() == token_ids.tolist()
        assert prompt.loss_mask.tolist() == mask.tolist()
    lengths = [n for report in folder_of(answered).reports() for n in report.answer_lengths]
    assert manifest.num_loss_tokens == sum(lengths)


def test_a_second_call_finds_the_answers(answered):
    started = time.monotonic()
    first = folder_of(answered).answers()
    again, _ = regenerate(answered, target())
    assert again == first
    assert time.monotonic() - started < 1.0


def test_conversations_without_answers_need_the_targets_own(answered):
    off = answered.regeneration.model_copy(update={"enabled": False})
    with pytest.raises(DataError, match=r"questions.jsonl:1: .*regeneration.enabled"):
        prepare_dataset(answered.model_copy(update={"regeneration": off}), target())
    other = answered.regeneration.model_copy(update={"seed": 1})
    with pytest.raises(DataError, match=r"data.train: the target hasn't answered it yet"):
        prepare_dataset(answered.model_copy(update={"regeneration": other}), target())


def test_held_out_prompts_need_no_answers(answered, tmp_path):
    path = tmp_path / "heldout.jsonl"
    path.write_text(json.dumps({"prompt": "How many minutes are in 31 hours?"}) + "\n")
    data = answered.data.model_copy(update={"heldout": (str(path),)})
    _, folder = prepare_dataset(answered.model_copy(update={"data": data}), target())
    (prompt,) = load_heldout(folder)
    assert (prompt.text, prompt.reference) == ("How many minutes are in 31 hours?", "")


def test_what_answers_depend_on_names_them_and_nothing_else(answered):
    def names(run: RunConfig) -> tuple[str, str]:
        dataset_id = Sources.open(run.data).dataset_id(run, target())
        return folder_of(run).regeneration_id, dataset_id

    def changed(section: str, **changes) -> RunConfig:
        values = getattr(answered, section).model_copy(update=changes)
        return answered.model_copy(update={section: values})

    first = names(answered)
    for same in (
        changed("regeneration", batch_size=3),
        changed("inference", inference_num_gpus=2),
        changed("training", learning_rate=1.0),
    ):
        assert names(same) == first
    for other in (
        changed("regeneration", temperature=0.5),
        changed("regeneration", max_conversations=5),
        changed("regeneration", turns="last"),
        changed("inference", engine="sglang"),
        changed("inference", engine="sglang", sglang=SglangConfig(extra_args={"torchao": "x"})),
        changed("data", chat_template_kwargs={"enable_thinking": False}),
    ):
        assert all(a != b for a, b in zip(names(other), first, strict=True))
    off = changed("regeneration", enabled=False)
    also_off = changed("regeneration", enabled=False, temperature=0.5)
    ids = [Sources.open(run.data).dataset_id(run, target()) for run in (off, also_off)]
    assert ids[0] == ids[1] != first[1]


@pytest.mark.sglang
@pytest.mark.skipif(find_spec("sglang") is None, reason="make sglang installs it")
def test_sglang_answers_as_transformers_does(model, chat, tmp_path):
    run = run_of(tmp_path, engine="sglang", shard_size=12)
    regenerate(run, target())
    generator = HFGenerator(model, run.regeneration, target().eos_token_ids)
    _, rows = answer_shard(Shard(0, tuple(questions(run))), run, chat, generator)
    lines = [
        line for _, text in sorted(shards(folder_of(run)).items()) for line in text.splitlines()
    ]
    assert [json.loads(line) for line in lines] == rows
    assert len(rows) == 24
