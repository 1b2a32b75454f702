"""Conversations that are left out and counted, and input that is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from tests.unit.dataset.cases import chat, folders, make_run, prepare, write
from torchspec_lib.data.dataset import (
    load_prompts,
)
from torchspec_lib.errors import ConfigError, DataError

MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'user' %}{{ m.content }}{% else %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
)


def test_a_setting_that_the_template_does_not_read_is_refused_with_nothing_left(root, target):
    with pytest.raises(ConfigError, match=r"data\.chat_template_kwargs: .* doesn't read thinking"):
        prepare(make_run(root, target, data__chat_template_kwargs={"thinking": False}))
    assert folders(root) == []


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


def test_a_held_out_prompt_beyond_the_limit_is_counted(root, target):
    long = [{"role": "user", "content": "why " * 300}, *chat(1)[1:]]
    write(root / "heldout.jsonl", [long, chat(100)])
    manifest, _ = prepare(make_run(root, target))
    assert (manifest.num_heldout, manifest.rejected) == (1, {"heldout_too_long": 1})


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
    write(root / "heldout.jsonl", [chat(5, answer="half \ud83d")])
    with pytest.raises(DataError, match=r"heldout.jsonl:1: holds .*half of a character"):
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
