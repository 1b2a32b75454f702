import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from torchspec_lib.config.models import DataConfig, DraftConfig, ModelConfig
from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.training import TrainingConfig
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.data.dataset import (
    load_draft_vocab,
    load_heldout,
    load_prompts,
    prepare_dataset,
)
from torchspec_lib.data.summary import decoded_spans, summarize
from torchspec_lib.errors import ConfigError, DataError
from torchspec_lib.target import read_target

VOCAB_SIZE = 320
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{{ mode }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'user' %}{{ m.content }}{% else %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
)
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_target"


@pytest.fixture
def target(tmp_path):
    """A target's folder without weights; preparing data needs none."""
    folder = tmp_path / "target"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([turn["content"] for turn in chat(3)] * 5, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    sizes = {"num_hidden_layers": 8, "hidden_size": 16, "intermediate_size": 32}
    rest = {"num_attention_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(
        json.dumps({**sizes, **rest, "vocab_size": VOCAB_SIZE, "eos_token_id": 2})
    )
    return folder


def chat(number, answer=None):
    return [
        {"role": "user", "content": f"What is {number} and one more?"},
        {"role": "assistant", "content": answer or f"One more than {number} is {number + 1}."},
    ]


def write(path, chats):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))


def make_run(root, target, **changes):
    """A run over ``train.jsonl`` and ``heldout.jsonl``; changes are ``section__field``."""
    settings = {
        "model": {"target": str(target)},
        "data": {
            "train": [str(root / "train.jsonl")],
            "heldout": [str(root / "heldout.jsonl")],
            "max_length": 256,
        },
        "data_root": str(root / "data"),
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        settings.setdefault(section, {})[field] = value
    return RunConfig.model_validate(settings)


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "train.jsonl", [chat(i) for i in range(10)])
    write(tmp_path / "heldout.jsonl", [chat(i) for i in range(100, 103)])
    return tmp_path


def prepare(run):
    return prepare_dataset(run, read_target(run.model))


def folders(root):
    datasets = root / "data" / "datasets"
    return sorted(path.name for path in datasets.iterdir()) if datasets.exists() else []


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


def test_every_conversation_is_a_prompt_or_counted_with_its_reason(root, target):
    chats = [
        chat(1),
        chat(2, answer="long " * 300),
        chat(3, answer="x"),
        chat(1),
        chat(100, answer="Leaked into training."),
        chat(4),
    ]
    write(root / "train.jsonl", chats)
    manifest, folder = prepare(make_run(root, target))
    assert manifest.rejected == {
        "also_in_heldout": 1,
        "duplicate": 1,
        "too_few_supervised_tokens": 1,
        "too_long": 1,
    }
    assert manifest.num_prompts + sum(manifest.rejected.values()) == len(chats)
    sources = pq.read_table(folder / "prompts.parquet")["source"].to_pylist()
    assert sources == [f"{root}/train.jsonl:1", f"{root}/train.jsonl:6"]


def test_only_the_first_so_many_usable_prompts_are_taken(root, target):
    _, everything = prepare(make_run(root, target))
    manifest, folder = prepare(make_run(root, target, data__max_prompts=3))
    assert manifest.num_prompts == 3
    assert load_prompts(folder).ids == load_prompts(everything).ids[:3]


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


def test_a_setting_that_the_template_does_not_read_is_refused_with_nothing_left(root, target):
    with pytest.raises(ConfigError, match=r"data\.chat_template_kwargs: .* doesn't read thinking"):
        prepare(make_run(root, target, data__chat_template_kwargs={"thinking": False}))
    assert folders(root) == []


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


def test_a_held_out_prompt_beyond_the_limit_is_counted(root, target):
    long = [{"role": "user", "content": "why " * 300}, *chat(1)[1:]]
    write(root / "heldout.jsonl", [long, chat(100)])
    manifest, _ = prepare(make_run(root, target))
    assert (manifest.num_heldout, manifest.rejected) == (1, {"heldout_too_long": 1})


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


@pytest.mark.parametrize(
    ("template", "extent"),
    [
        (
            "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}",
            "no",
        ),
        (
            "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
            "every",
        ),
    ],
)
def test_a_mask_of_all_zeros_or_all_ones_is_refused_with_the_sample_named(
    root, target, template, extent
):
    (target / "chat_template.jinja").write_text(template)
    with pytest.raises(DataError, match=rf"train.jsonl:1: .* makes {extent} token"):
        prepare(make_run(root, target))
    assert folders(root) == []


def test_a_broken_line_is_named_before_the_tokenizer_is_looked_at(root, target):
    (target / "tokenizer.json").write_text("broken too")
    with (root / "train.jsonl").open("a") as file:
        file.write('{"messages": [}\n')
    with pytest.raises(DataError, match=r"train.jsonl:11: is not valid JSON"):
        prepare(make_run(root, target))
    assert folders(root) == []


def test_data_without_a_usable_conversation_is_refused_with_the_reasons(root, target):
    write(root / "train.jsonl", [chat(1, answer="x"), chat(100)])
    with pytest.raises(DataError, match=r"data\.train: .*'too_few_supervised_tokens': 1"):
        prepare(make_run(root, target))


def test_a_held_out_conversation_that_asks_nothing_is_refused(root, target):
    write(root / "heldout.jsonl", [chat(1)[1:]])
    with pytest.raises(DataError, match=r"heldout.jsonl:1: asks nothing"):
        prepare(make_run(root, target))


def test_a_missing_file_is_named_with_its_setting(root, target):
    run = make_run(root, target, data__heldout=[str(root / "no.jsonl")])
    with pytest.raises(ConfigError, match=r"data\.heldout\[0\]: .* doesn't exist"):
        prepare(run)


def test_a_draft_vocabulary_beyond_the_targets_is_refused(root, target):
    with pytest.raises(ConfigError, match=r"draft\.vocab_size: 321 exceeds"):
        prepare(make_run(root, target, draft__vocab_size=321))


def test_a_tokenizer_that_does_not_fit_the_target_is_refused(root, target):
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(ConfigError, match=r"model\.target: .* vocabulary has 100 tokens"):
        prepare(make_run(root, target))


def test_an_error_half_way_leaves_nothing(root, target):
    template = target / "chat_template.jinja"
    whole = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    template.write_text(
        f"{{% if '9' in messages[0].content %}}{whole}{{% else %}}{MARKED}{{% endif %}}"
    )
    with pytest.raises(DataError, match=r"train.jsonl:10: .* makes every token"):
        prepare(make_run(root, target))
    assert folders(root) == []


def test_what_does_not_fit_the_template_is_left_out_and_told(root, target, caplog):
    with (target / "chat_template.jinja").open("a") as file:
        file.write("{{ raise_exception('no nines') if '9' in messages[0].content }}")
    manifest, _ = prepare(make_run(root, target))
    assert (manifest.num_prompts, manifest.rejected) == (9, {"unfit_for_template": 1})
    assert "train.jsonl:10: the target's chat template refuses it: no nines" in caplog.text
    write(root / "train.jsonl", [chat(9), chat(19)])
    with pytest.raises(DataError, match=r"'unfit_for_template': 2.*the first: .*:1: .* no nines"):
        prepare(make_run(root, target))


def test_empty_messages_and_halves_of_characters_are_left_out_of_training(root, target):
    broken = [chat(1, answer=" \n"), [{"role": "user", "content": ""}, *chat(2)[1:]]]
    write(root / "train.jsonl", [*broken, chat(3, answer="half \ud83d"), chat(4)])
    manifest, _ = prepare(make_run(root, target))
    assert manifest.rejected == {"empty_message": 2, "unfit_for_template": 1}
    assert manifest.num_prompts == 1
    write(root / "heldout.jsonl", [chat(5, answer=" "), broken[1]])
    with pytest.raises(DataError, match=r"heldout.jsonl:2: has an empty message"):
        prepare(make_run(root, target))


def test_a_run_killed_half_way_leaves_no_half_data_set(root, target):
    write(root / "train.jsonl", [chat(i) for i in range(3000)])
    run = make_run(root, target)
    code = (
        "import sys\n"
        "from torchspec_lib.config.run import RunConfig\n"
        "from torchspec_lib.data.dataset import prepare_dataset\n"
        "from torchspec_lib.target import read_target\n"
        "run = RunConfig.model_validate_json(sys.argv[1])\n"
        "prepare_dataset(run, read_target(run.model))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, run.model_dump_json()], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not folders(root) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert folders(root), "it was killed before it began"
    assert all(name.startswith(".") for name in folders(root))
    manifest, folder = prepare(run)
    assert manifest.num_prompts == len(load_prompts(folder)) == 3000 - 3


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
