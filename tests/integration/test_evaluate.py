"""Evaluation of an untrained draft on the shipped tiny target."""

import logging

import pytest
import torch

from torchspec_lib.config.inference import ClusterConfig
from torchspec_lib.config.models import DataConfig, DraftConfig, ModelConfig
from torchspec_lib.config.outcome import EvaluationConfig
from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.settings import PROJECT_ROOT
from torchspec_lib.data.dataset import load_draft_vocab, load_heldout, prepare_dataset
from torchspec_lib.errors import DraftFormatError
from torchspec_lib.evaluation.evaluate import _Bench, evaluate_draft, prompt_set
from torchspec_lib.evaluation.speculative import Decoded
from torchspec_lib.models.draft_config import DraftModelConfig
from torchspec_lib.models.eagle3 import Eagle3Draft
from torchspec_lib.models.export import load_draft, save_draft
from torchspec_lib.models.target_head import TargetHead
from torchspec_lib.models.target_model import load_target
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
    assert report.prompt_set == prompt_set(load_heldout(dataset_dir)[:5])
    assert "(5 prompts)" in report.prompt_set
    num_verifications = report.num_target_forwards - 5
    assert report.accept_length == (report.num_new_tokens - 5) / num_verifications
    assert 1.0 <= report.accept_length < 1.5
    assert len(report.accept_rates) == 3
    assert min(report.plain_s, report.speculative_s) > 0
    assert 0 < report.draft_step_s < report.target_step_s
    assert [p.prompt_id for p in report.prompts] == [
        p.prompt_id for p in load_heldout(dataset_dir)[:5]
    ]
    assert all(p.output_text and "<|" not in p.output_text for p in report.prompts)


def test_an_answer_that_differs_is_reported_with_how_close_the_choice_was(setting, caplog):
    run, target, draft_dir, dataset_dir = setting
    model = load_target(target, run.model.dtype, torch.device("cpu"), trust_remote_code=False)
    bench = _Bench(run, target, model, load_draft(draft_dir))
    prompt = load_heldout(dataset_dir)[0]
    right = bench._plain(prompt)
    wrong = [*right[:4], (right[4] + 1) % target.vocab_size, *right[5:]]
    bench._speculative = lambda prompt: Decoded(wrong, (0,) * (len(wrong) - 1))
    with caplog.at_level(logging.WARNING):
        plain, decoded, _ = bench.compare(prompt, plain_first=True)
    assert (plain, decoded.token_ids) == (right, wrong)
    assert f"new_token=4 plain={right[4]} speculative={wrong[4]}" in caplog.text
    chosen, other = map(float, caplog.text.rsplit("logits=", 1)[1].split(","))
    assert chosen > other


def test_equal_names_of_prompt_sets_mean_equal_prompts(setting):
    prompts = load_heldout(setting[-1])
    assert prompt_set(prompts) != prompt_set(prompts[:-1])
    assert prompt_set(prompts) != prompt_set(prompts[::-1])
    assert prompt_set(prompts) == prompt_set(list(prompts))


def test_a_draft_of_another_target_is_refused_before_anything_is_loaded(setting):
    run, target, draft_dir, dataset_dir = setting
    other = target.model_copy(update={"vocab_size": 2048, "path": "/nowhere"})
    with pytest.raises(DraftFormatError, match="vocab_size"):
        evaluate_draft(run, other, draft_dir, dataset_dir)
