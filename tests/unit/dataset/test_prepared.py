"""What a prepared data set holds."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from tests.unit.dataset.cases import VOCAB_SIZE, chat, folders, make_run, prepare, write
from torchspec_lib.config.models import DataConfig, DraftConfig, ModelConfig
from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.training import TrainingConfig
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.data.dataset import (
    load_draft_vocab,
    load_heldout,
    load_prompts,
)
from torchspec_lib.data.summary import decoded_spans, summarize

EXAMPLE = Path(__file__).parents[3] / "examples" / "tiny_target"


def test_every_prompt_is_its_conversation_and_supervises_the_answer(root, target):
    manifest, folder = prepare(make_run(root, target))
    tokenizer = ChatTokenizer.load(str(target)).tokenizer
    prompts = load_prompts(folder)
    assert len(prompts) == manifest.num_prompts == 10
    for number, prompt in enumerate(prompts):
        question, answer = (turn["content"] for turn in chat(number))
        assert decoded_spans(tokenizer, prompt) == [
            (f"<|user|>\n{question}<|end|>\n<|assistant|>\n", False),
            (f"{answer}<|end|>", True),
            ("\n", False),
        ]
        assert (prompt.token_ids.dtype, prompt.loss_mask.dtype) == (np.int32, np.bool_)


def test_the_manifest_tells_what_is_in_the_files(root, target):
    manifest, folder = prepare(make_run(root, target))
    prompts = list(load_prompts(folder))
    assert manifest.dataset_id == folder.name
    assert folder.parent == root / "data" / "datasets"
    assert manifest.num_tokens == sum(p.num_tokens for p in prompts)
    assert manifest.num_loss_tokens == sum(int(p.loss_mask.sum()) for p in prompts)
    assert manifest.longest == max(p.num_tokens for p in prompts)
    assert (manifest.draft_vocab_size, manifest.vocab_coverage) == (VOCAB_SIZE, 1.0)
    assert load_draft_vocab(folder) is None


def test_an_unchanged_rerun_touches_nothing_and_loads_no_tokenizer(root, target):
    run = make_run(root, target)
    manifest, folder = prepare(run)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    code = (
        "import sys\n"
        "from torchspec_lib.config.run import RunConfig\n"
        "from torchspec_lib.data.dataset import prepare_dataset\n"
        "from torchspec_lib.target import read_target\n"
        "run = RunConfig.model_validate_json(sys.argv[1])\n"
        "print(prepare_dataset(run, read_target(run.model))[0].dataset_id)\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, run.model_dump_json()], capture_output=True, text=True
    )
    assert (out.stdout.strip(), out.stderr) == (manifest.dataset_id, "")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert folders(root) == [manifest.dataset_id]


def change_data(root, target):
    write(root / "train.jsonl", [chat(i) for i in range(11)])


def change_heldout(root, target):
    write(root / "heldout.jsonl", [chat(200)])


def change_template(root, target):
    path = target / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


@pytest.mark.parametrize("change", [change_data, change_heldout, change_template])
def test_changed_content_is_another_data_set(root, target, change):
    _, before = prepare(make_run(root, target))
    change(root, target)
    _, after = prepare(make_run(root, target))
    assert before != after
    assert before.is_dir()


@pytest.mark.parametrize(
    "changes",
    [
        {"data__max_length": 255},
        {"data__min_loss_tokens": 5},
        {"draft__vocab_size": 300},
        {"data__last_turn_only": True},
        {"data__chat_template_kwargs": {"mode": "brief"}},
    ],
    ids=str,
)
def test_a_setting_that_the_content_depends_on_makes_another_data_set(root, target, changes):
    _, before = prepare(make_run(root, target))
    _, after = prepare(make_run(root, target, **changes))
    assert before != after


def test_a_setting_of_the_training_makes_no_other_data_set(root, target):
    _, before = prepare(make_run(root, target))
    _, after = prepare(make_run(root, target, training__learning_rate=0.5, draft__ttt_steps=2))
    assert before == after


def test_the_same_input_gives_the_same_bytes(root, target):
    _, one = prepare(make_run(root, target, draft__vocab_size=300))
    run = make_run(root, target, draft__vocab_size=300)
    _, other = prepare(run.model_copy(update={"data_root": str(root / "elsewhere")}))
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {
        p.name: p.read_bytes() for p in other.iterdir()
    }


def test_held_out_prompts_ask_for_the_last_answer(root, target):
    turns = [*chat(7), {"role": "user", "content": "And then?"}, *chat(8)[1:]]
    write(root / "heldout.jsonl", [turns, chat(9, answer="w " * 300), chat(5)])
    manifest, folder = prepare(make_run(root, target))
    tokenizer = ChatTokenizer.load(str(target)).tokenizer
    first, long_answer, last = load_heldout(folder)
    assert (first.text, first.reference) == ("And then?", turns[-1]["content"])
    text = tokenizer.decode(first.prompt_token_ids)
    assert text.startswith("<|user|>\nWhat is 7")
    assert text.endswith("And then?<|end|>\n<|assistant|>\n")
    assert long_answer.text == chat(9)[0]["content"], "the answer's length doesn't matter"
    assert manifest.num_heldout == 3
    assert len({first.prompt_id, long_answer.prompt_id, last.prompt_id}) == 3


def test_held_out_prompts_ask_as_the_target_is_served(root, target):
    _, folder = prepare(make_run(root, target, data__chat_template_kwargs={"mode": "brief"}))
    tokenizer = ChatTokenizer.load(str(target)).tokenizer
    for prompt in load_heldout(folder):
        assert tokenizer.decode(prompt.prompt_token_ids).endswith("<|assistant|>\nbrief")


@pytest.mark.parametrize("last_turn_only", [False, True])
def test_the_manifest_counts_the_turns_that_are_supervised_and_those_left_out(
    root, target, last_turn_only
):
    write(root / "train.jsonl", [chat(1) + chat(2) + chat(3), chat(4), chat(5) + chat(6)[:1]])
    manifest, folder = prepare(make_run(root, target, data__last_turn_only=last_turn_only))
    tokenizer = ChatTokenizer.load(str(target)).tokenizer
    texts = [
        [text for text, is_supervised in decoded_spans(tokenizer, prompt) if is_supervised]
        for prompt in load_prompts(folder)
    ]
    end = [f"{chat(number)[1]['content']}<|end|>" for number in range(6)]
    if last_turn_only:
        assert texts == [[end[3]], [end[4]], [end[5]]]
        assert manifest.turns == {"supervised": 3, "left_out": 2}
    else:
        assert texts == [end[1:4], [end[4]], [end[5]]]
        assert manifest.turns == {"supervised": 5}


def test_tools_are_told_to_the_target_in_training_and_in_held_out_prompts(root, target):
    template = target / "chat_template.jinja"
    template.write_text("{{ tools | map(attribute='name') | join }}" + template.read_text())
    tools = [{"name": "f"}, {"name": "g"}]
    for name, number in (("train", 1), ("heldout", 2)):
        row = {"messages": chat(number), "tools": tools}
        (root / f"{name}.jsonl").write_text(json.dumps(row))
    _, folder = prepare(make_run(root, target))
    tokenizer = ChatTokenizer.load(str(target)).tokenizer
    assert tokenizer.decode(load_prompts(folder)[0].token_ids).startswith("fg<|user|>")
    assert tokenizer.decode(load_heldout(folder)[0].prompt_token_ids).startswith("fg<|user|>")


def test_the_draft_vocabulary_holds_the_frequent_tokens_and_the_end_of_turn(root, target):
    manifest, folder = prepare(make_run(root, target, draft__vocab_size=5))
    counts = np.zeros(VOCAB_SIZE, dtype=int)
    for prompt in load_prompts(folder):
        np.add.at(counts, prompt.token_ids[prompt.loss_mask], 1)
    vocab = load_draft_vocab(folder)
    assert vocab.tolist() == sorted(vocab.tolist())
    assert (len(vocab), manifest.draft_vocab_size) == (5, 5)
    assert 2 in vocab, "<|end|>"
    assert counts[vocab].sum() == np.sort(counts)[-5:].sum()
    assert manifest.vocab_coverage == pytest.approx(counts[vocab].sum() / counts.sum())
    assert 0 < manifest.vocab_coverage < 1
    coverage = summarize(folder)["vocab_coverage"]
    assert 0 < coverage["min"] <= coverage["mean"] <= coverage["max"] < 1


def test_the_end_of_turn_is_in_the_smallest_draft_vocabulary(root, target):
    _, folder = prepare(make_run(root, target, draft__vocab_size=1))
    assert load_draft_vocab(folder).tolist() == [2]


def test_a_draft_vocabulary_of_the_targets_size_is_no_pruned_one(root, target):
    manifest, folder = prepare(make_run(root, target, draft__vocab_size=VOCAB_SIZE))
    assert load_draft_vocab(folder) is None
    assert manifest.vocab_coverage == 1.0


def test_prompts_are_read_by_index_across_row_groups(root, target):
    write(root / "train.jsonl", [chat(i) for i in range(1000, 1300)])
    _, folder = prepare(make_run(root, target))
    prompts = load_prompts(folder)
    rows = pq.read_table(folder / "prompts.parquet").to_pylist()
    assert len(prompts) == len(rows) == 300
    for index in [299, 0, 127, 128, 256, 255, *range(300)]:
        prompt = prompts[index]
        assert prompt.prompt_id == rows[index]["prompt_id"] == prompts.ids[index]
        assert prompt.token_ids.tolist() == rows[index]["token_ids"]
        assert prompt.loss_mask.tolist() == rows[index]["loss_mask"]
        assert prompts.lengths[index] == prompt.num_tokens
    assert len(set(prompts.ids)) == 300
    for index in (-1, 300):
        with pytest.raises(IndexError, match=f"prompt {index} of 300"):
            prompts[index]


def test_the_summary_tells_lengths_and_supervised_tokens(root, target):
    _, folder = prepare(make_run(root, target))
    prompts = list(load_prompts(folder))
    summary = summarize(folder)
    assert summary["num_tokens"]["max"] == max(p.num_tokens for p in prompts)
    expected = np.mean([p.loss_mask.sum() for p in prompts])
    assert summary["num_loss_tokens"]["mean"] == pytest.approx(expected)
    assert summary["num_tokens"]["count"] == 10
    assert "50%" in summary.index


def test_the_shipped_example_supervises_the_answers_and_nothing_else(tmp_path):
    run = RunConfig(
        model=ModelConfig(target=str(EXAMPLE)),
        data=DataConfig(
            train=(str(EXAMPLE / "train.jsonl"),), heldout=(str(EXAMPLE / "heldout.jsonl"),)
        ),
        draft=DraftConfig(vocab_size=512),
        training=TrainingConfig(),
        data_root=str(tmp_path),
    )
    manifest, folder = prepare(run)
    tokenizer = ChatTokenizer.load(str(EXAMPLE)).tokenizer
    rows = (EXAMPLE / "train.jsonl").read_text().splitlines()
    sources = pq.read_table(folder / "prompts.parquet")["source"].to_pylist()
    for prompt, source in zip(load_prompts(folder), sources, strict=True):
        messages = json.loads(rows[int(source.rpartition(":")[2]) - 1])["messages"]
        answers = [f"{m['content']}<|end|>" for m in messages if m["role"] == "assistant"]
        spans = decoded_spans(tokenizer, prompt)
        assert [text for text, is_supervised in spans if is_supervised] == answers
    assert manifest.vocab_coverage > 0.95


def test_a_draft_that_is_continued_keeps_its_vocabulary(root, target):
    """Its weights fit no other; the night's own most frequent tokens don't count."""
    first = make_run(root, target, draft__vocab_size=20)
    vocab = load_draft_vocab(prepare(first)[1])
    assert vocab is not None
    inherited = np.arange(len(vocab)) + 7
    champion = root / "champion"
    champion.mkdir()
    offsets = inherited - np.arange(len(inherited))
    save_file({"d2t": offsets.astype(np.int64)}, champion / "model.safetensors")
    training = first.training.model_copy(update={"continual_from": str(champion)})
    manifest, folder = prepare(first.model_copy(update={"training": training}))
    assert manifest.dataset_id != prepare(first)[0].dataset_id
    assert load_draft_vocab(folder).tolist() == inherited.tolist()
    assert manifest.vocab_coverage < 1
