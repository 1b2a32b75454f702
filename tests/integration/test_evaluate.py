"""Evaluation of an untrained draft on the shipped tiny target."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from torchspec_lib.config.inference import ClusterConfig
from torchspec_lib.config.models import DataConfig, DraftConfig, ModelConfig
from torchspec_lib.config.outcome import EvaluationConfig
from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.settings import PROJECT_ROOT
from torchspec_lib.data.dataset import load_draft_vocab, load_heldout, prepare_dataset
from torchspec_lib.data.selection import HeldoutPrompt
from torchspec_lib.errors import ConfigError, DataError, DraftFormatError
from torchspec_lib.evaluation.acceptance import ServedCounts
from torchspec_lib.evaluation.bench import Bench
from torchspec_lib.evaluation.evaluate import compare_served, evaluate_draft, set_result
from torchspec_lib.evaluation.prompt_sets import PromptSet, check_sets, digest_name
from torchspec_lib.evaluation.served import Served
from torchspec_lib.models.draft_config import DraftModelConfig
from torchspec_lib.models.eagle3 import Eagle3Draft
from torchspec_lib.models.export import save_draft
from torchspec_lib.models.target_head import TargetHead
from torchspec_lib.target import read_target

TINY_TARGET = PROJECT_ROOT / "examples" / "tiny_target"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A run, its target, an exported draft and a prepared data set."""
    root = tmp_path_factory.mktemp("evaluate")
    for name, count in (("train", 40), ("heldout", 6)):
        lines = (TINY_TARGET / f"{name}.jsonl").read_text().splitlines()[:count]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    run = RunConfig(
        model=ModelConfig(target=str(TINY_TARGET), dtype="float32"),
        data=DataConfig(
            train=(str(root / "train.jsonl"),),
            heldout=(str(root / "heldout.jsonl"),),
            max_length=512,
        ),
        draft=DraftConfig(vocab_size=256, ttt_steps=3),
        cluster=ClusterConfig(device="cpu"),
        evaluation=EvaluationConfig(draft_steps=3, max_new_tokens=10, max_prompts=5),
        data_root=str(root),
    )
    target = read_target(run.model)
    _, dataset_dir = prepare_dataset(run, target)
    vocab = load_draft_vocab(dataset_dir)
    head = TargetHead.load(target, vocab, torch.float32)
    config = DraftModelConfig.from_target(target, run.draft, len(vocab), "float32")
    draft = Eagle3Draft(config)
    draft.init_weights(head.draft_rows_VdH, torch.Generator().manual_seed(0))
    save_draft(root / "draft", draft.state_dict(), config, vocab)
    return run, target, root / "draft", dataset_dir


def test_an_evaluation_reports_figures_with_their_conditions(setting):
    run, target, draft_dir, dataset_dir = setting
    report = evaluate_draft(run, target, draft_dir, dataset_dir)
    assert report.lossless
    assert (report.num_prompts, report.draft_steps, report.max_new_tokens) == (5, 3, 10)
    assert report.prompt_set == digest_name("heldout", load_heldout(dataset_dir)[:5])
    assert "(5 prompts)" in report.prompt_set
    num_verifications = report.num_target_forwards - 5
    assert report.accept_length == (report.num_new_tokens - 5) / num_verifications
    assert 1.0 <= report.accept_length < 1.5
    assert len(report.accept_rates) == 3
    assert min(report.plain_s, report.speculative_s) > 0
    assert 0 < report.draft_step_s < report.target_step_s
    assert sorted(report.target_rows_s) == [1, 2, 3, 4]
    assert report.target_rows_s[1] == report.target_step_s
    assert report.chain is None
    (heldout,) = report.sets
    assert (heldout.name, heldout.category, heldout.num_prompts) == ("heldout", None, 5)
    assert heldout.accept_length == report.accept_length
    assert [p.prompt_id for p in report.prompts] == [
        p.prompt_id for p in load_heldout(dataset_dir)[:5]
    ]
    assert all(p.output_text and "<|" not in p.output_text for p in report.prompts)


def rerun(setting, **changes):
    run, target, draft_dir, dataset_dir = setting
    evaluation = run.evaluation.model_copy(update=changes)
    changed = run.model_copy(update={"evaluation": evaluation})
    return evaluate_draft(changed, target, draft_dir, dataset_dir)


def test_an_answer_that_is_not_the_targets_is_told_with_how_close_the_choice_was(
    setting, monkeypatch, caplog
):
    honest = Bench.compare

    def altered(bench, prompt, plain_first):
        plain, decoded, seconds = honest(bench, prompt, plain_first)
        wrong = [*plain[:4], (plain[4] + 1) % setting[1].vocab_size, *plain[5:]]
        return plain, replace(decoded, token_ids=wrong), seconds

    monkeypatch.setattr(Bench, "compare", altered)
    report = rerun(setting, max_prompts=2)
    assert (report.num_lossless, report.num_ties, report.num_changed) == (0, 0, 2)
    lines = [line for line in caplog.text.splitlines() if "event=not_lossless" in line]
    assert len(lines) == 2
    for line in lines:
        assert "new_token=4 " in line
        assert line.endswith("tie=False")
        chosen, other = map(float, line.rsplit("logits=", 1)[1].split()[0].split(","))
        assert chosen > other


def test_named_sets_are_reported_beside_the_held_out_prompts_whole_and_by_category(
    setting, tmp_path, caplog
):
    rows = [
        {"turns": ["What is 2 plus 2?", "And doubled?"], "category": "math"},
        {"prompt": "Name a colour.", "category": "words"},
        {"messages": [{"role": "user", "content": "What is 3 plus 4?"}], "category": "math"},
    ]
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.INFO):
        report = rerun(setting, sets={"mt_bench": str(path)}, max_prompts=3)
    found = [(one.name, one.category, one.num_prompts) for one in report.sets]
    assert found == [
        ("heldout", None, 3),
        ("mt_bench", None, 3),
        ("mt_bench", "math", 2),
        ("mt_bench", "words", 1),
    ]
    _, whole, math, words = report.sets
    assert whole.num_lossless == 3
    assert whole.num_new_tokens == math.num_new_tokens + words.num_new_tokens
    assert math.prompt_set != words.prompt_set
    assert (report.num_prompts, len(report.prompts)) == (3, 3)
    assert "set=mt_bench category=math" in caplog.text


def test_the_template_is_given_what_the_target_is_served_with(setting):
    run, *rest = setting
    data = run.data.model_copy(update={"chat_template_kwargs": {"enable_thinking": False}})
    with pytest.raises(ConfigError, match="template doesn't read enable_thinking"):
        evaluate_draft(run.model_copy(update={"data": data}), *rest)


def test_a_set_that_asks_nothing_is_refused_with_the_line(setting, tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text('{"messages": [{"role": "assistant", "content": "Hello."}]}\n')
    with pytest.raises(DataError, match=r"question.jsonl:1.*asks nothing"):
        rerun(setting, sets={"mt_bench": str(path)})


def test_a_set_with_a_broken_line_is_refused_before_anything_is_loaded(setting, tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text('{"prompt": "Name a colour."}\n{"prompt": \n')
    run = setting[0]
    evaluation = run.evaluation.model_copy(update={"sets": {"mt_bench": str(path)}})
    with pytest.raises(DataError, match=r"question.jsonl:2"):
        check_sets(run.model_copy(update={"evaluation": evaluation}))


def test_trees_are_reported_beside_chains_of_as_many_steps(setting):
    chains = rerun(setting)
    trees = rerun(setting, draft_topk=3, num_draft_tokens=8)
    assert trees.lossless
    assert trees.drafting == "trees of 3 steps, top-k 3, 8 tokens"
    assert trees.chain.accept_length == chains.accept_length
    assert trees.chain.num_lossless == trees.num_prompts == 5
    assert trees.accept_length >= chains.accept_length
    assert sorted(trees.target_rows_s) == [1, 8]


def test_the_answers_of_sglang_go_back_to_their_sets():
    def asked(name: str, category: str | None) -> PromptSet:
        prompt = HeldoutPrompt(f"{name}/0", np.arange(4, dtype=np.int32), "What?", "")
        return PromptSet(name, (prompt,), (category,))

    sets = [asked("heldout", None), asked("mt_bench", "math")]
    plain = [Served([7, 8, 9], None, 2.0), Served([4, 5, 6], None, 3.0)]
    drafted = [
        Served([7, 8, 9], ServedCounts((1,), 3), 1.0),
        Served([4, 5, 3], ServedCounts((0, 0), 3), 1.5),
    ]
    (heldout,), (math,) = compare_served(sets, plain, drafted)
    assert (heldout.prompt.prompt_id, heldout.category, heldout.lossless) == (
        "heldout/0",
        None,
        True,
    )
    assert (heldout.plain_s, heldout.speculative_s) == (2.0, 1.0)
    assert (math.prompt.prompt_id, math.category, math.lossless) == ("mt_bench/0", "math", False)
    assert set_result("mt_bench", None, [math], 2).accept_rates == (0.0, 0.0)
    assert set_result("heldout", None, [heldout], 2).accept_length == 2.0


def test_equal_names_of_prompt_sets_mean_equal_prompts(setting):
    prompts = load_heldout(setting[-1])
    name = digest_name("heldout", prompts)
    assert name != digest_name("heldout", prompts[:-1])
    assert name != digest_name("heldout", prompts[::-1])
    assert name == digest_name("heldout", list(prompts))


def test_a_draft_of_another_target_is_refused_before_anything_is_loaded(setting):
    run, target, draft_dir, dataset_dir = setting
    other = target.model_copy(update={"vocab_size": 2048, "path": "/nowhere"})
    with pytest.raises(DraftFormatError, match="vocab_size"):
        evaluate_draft(run, other, draft_dir, dataset_dir)
