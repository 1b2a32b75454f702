"""The gate, the champion's title, and what people read about both."""

from datetime import date

import pytest
import yaml

from torchspec_lib.config.models import DraftConfig
from torchspec_lib.config.run import RunConfig
from torchspec_lib.registry.candidate import (
    Candidate,
    code_version,
    config_hash,
    content_hash,
)
from torchspec_lib.registry.gate import check_champion, check_draft, conditions
from torchspec_lib.registry.model_card import model_card, run_summary
from torchspec_lib.results import (
    Cost,
    DatasetManifest,
    EvalReport,
    RegisteredDraft,
    SetResult,
    TrainSummary,
)
from torchspec_lib.target import TargetSpec


def make_report(**changes):
    fields = {
        "engine": "hf",
        "draft_steps": 5,
        "temperature": 0.0,
        "prompt_set": "heldout-3f9a0c12 (100 prompts)",
        "max_new_tokens": 128,
        "num_prompts": 100,
        "num_lossless": 100,
        "accept_length": 3.5,
        "accept_rates": (0.9, 0.8, 0.7, 0.6, 0.5),
        "num_new_tokens": 3600,
        "num_target_forwards": 1100,
        "plain_s": 8.0,
        "speculative_s": 10.0,
        "draft_step_s": 0.001,
        "target_step_s": 0.004,
        "prompts": (),
    }
    return EvalReport(**fields | changes)


def make_candidate(tmp_path, **changes):
    target = TargetSpec(
        path="examples/tiny_target",
        fingerprint="feedbeef00000000",
        num_layers=8,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=1024,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        hidden_act="silu",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_ids=(3,),
    )
    manifest = DatasetManifest(
        dataset_id="d4e5",
        num_prompts=1500,
        num_heldout=100,
        num_tokens=120_000,
        num_loss_tokens=60_000,
        longest=300,
        turns={"supervised": 100},
        rejected={"duplicate": 2, "too_long": 1},
        draft_vocab_size=512,
        vocab_coverage=0.99,
    )
    training = TrainSummary(
        run_id="run7",
        draft_dir=str(tmp_path),
        num_steps=300,
        num_prompts=1500,
        num_epochs=1,
        num_trained=1497,
        num_rejected=3,
        rejected={"the target's forward failed": 3},
        num_tokens=120_000,
        loss=0.9,
        accept_length=3.6,
        bytes_streamed=1 << 28,
        resumed_from_step=0,
        wall_s=70.0,
        trainer_wait_s=3.0,
        capture_wait_s=1.0,
    )
    fields = {
        "draft_dir": tmp_path,
        "target": target,
        "manifest": manifest,
        "training": training,
        "report": make_report(),
        "step_metrics": tmp_path / "metrics.jsonl",
        "stage_s": {"prepare": 4.0, "train": 70.4, "evaluate": 20.0},
        "cost": Cost(gpu_hours=0.16, num_gpus=8, num_workers=8, num_tokens=120_000, wall_s=94.4),
    }
    return Candidate(**fields | changes)


def make_outcome(**changes):
    fields = {
        "registered": True,
        "model_name": "eagle3-draft",
        "version": "4",
        "is_champion": True,
        "is_new": True,
        "decision": "accept length 3.500 beats the champion's 3.400 by 0.100",
        "tracking_uri": "sqlite:////data/registry/mlflow.db",
        "summary": "",
    }
    return RegisteredDraft(**fields | changes)


def test_a_lossless_draft_at_the_bar_passes():
    assert check_draft(make_report(accept_length=3.2), 3.2).passed


def test_a_draft_below_the_bar_fails_and_hears_by_how_much():
    decision = check_draft(make_report(accept_length=2.91), 3.2)
    assert not decision.passed
    assert "2.910 is 0.290 below registry.min_accept_length (3.2)" in decision.reason


def test_a_single_answer_that_differs_fails_the_draft_however_fast_it_is():
    decision = check_draft(make_report(num_lossless=99, accept_length=6.0), 1.0)
    assert not decision.passed
    assert "1 of 100 answers differ" in decision.reason


def test_every_failure_is_named():
    decision = check_draft(make_report(num_lossless=98, accept_length=1.1), 2.0)
    assert "2 of 100" in decision.reason
    assert "0.900 below" in decision.reason


@pytest.mark.parametrize(
    ("champion", "passed", "words"),
    [
        (None, True, "first champion"),
        (3.4, True, "by 0.100"),
        (3.5, False, "0.000 less"),
        (3.75, False, "0.250 less"),
    ],
)
def test_the_title_goes_to_the_strictly_better_draft(champion, passed, words):
    decision = check_champion(make_report(), champion)
    assert decision.passed == passed
    assert words in decision.reason


@pytest.mark.parametrize(
    "change",
    [
        {"engine": "sglang"},
        {"draft_steps": 4},
        {"temperature": 0.5},
        {"prompt_set": "heldout-00000000 (100 prompts)"},
        {"max_new_tokens": 64},
    ],
)
def test_conditions_differ_wherever_figures_cant_be_compared(change):
    assert conditions(make_report(**change)) != conditions(make_report())
    assert conditions(make_report(accept_length=2.0)) == conditions(make_report())


def test_the_summary_says_what_became_of_the_run(tmp_path):
    text = run_summary(make_candidate(tmp_path), make_outcome())
    lines = text.splitlines()
    assert lines[0].endswith("eagle3-draft version 4, alias champion: " + make_outcome().decision)
    for expected in (
        "3.50 tokens per target forward (plain decoding: 1.00)",
        "90% 80% 70% 60% 50%",
        "hf, chains of 5, temperature 0, heldout-3f9a0c12 (100 prompts), at most 128 tokens",
        "100 of 100 prompts",
        "0.80x measured",
        "1.56x projected",
        "1,497 trained, 3 rejected (the target's forward failed 3), of 1,500 prompts x 1 epoch",
        "3 filtered out (duplicate 2, too_long 1)",
        "prepare 4 s, train 70 s, evaluate 20 s; 94 s in all",
        "mlflow ui --backend-store-uri sqlite:////data/registry/mlflow.db",
        str(tmp_path),
    ):
        assert expected in text


def test_the_summary_of_a_refused_draft_says_why_and_points_to_no_version(tmp_path):
    refusal = make_outcome(registered=False, version="", is_champion=False, decision="too short")
    text = run_summary(make_candidate(tmp_path), refusal)
    assert text.splitlines()[0] == "not registered too short"
    assert "version" not in text
    assert "mlflow" not in text


def test_a_server_is_named_by_its_address(tmp_path):
    text = run_summary(make_candidate(tmp_path), make_outcome(tracking_uri="https://mlflow.corp"))
    assert text.splitlines()[-1].endswith(" https://mlflow.corp")
    assert "backend-store" not in text


def make_run(target="examples/tiny_target", **sections):
    return RunConfig.model_validate(
        {
            "model": {"target": target},
            "data": {"train": ["t.jsonl"], "heldout": ["h.jsonl"]},
            **sections,
        }
    )


def test_the_model_card_says_how_to_serve_the_draft(tmp_path):
    card = model_card(make_run(), make_candidate(tmp_path), "abc123", date(2026, 1, 2))
    assert "--speculative-algorithm EAGLE3" in card
    assert "--speculative-num-steps 5" in card
    assert "--speculative-num-draft-tokens 6" in card
    assert '{"method": "eagle3", "model": "THIS_FOLDER", "num_speculative_tokens": 5}' in card
    assert "abc123" in card


@pytest.mark.parametrize(
    ("norms", "are_told"),
    [({}, True), ({"fc_norm": False}, True), ({"fc_norm": False, "norm_output": False}, False)],
)
def test_the_model_card_warns_of_engines_that_lack_a_drafts_norms(tmp_path, norms, are_told):
    run = make_run()
    run = run.model_copy(update={"draft": DraftConfig(**norms)})
    card = model_card(run, make_candidate(tmp_path), "abc123", date(2026, 1, 2))
    assert ("EAGLE-3.1" in card) == are_told


def test_the_model_card_has_every_figure_with_its_conditions_and_the_lineage(tmp_path):
    report = make_report()
    sets = [
        SetResult(
            name=name,
            category=category,
            prompt_set=f"{name}-1234 (80 prompts)",
            num_prompts=80,
            num_lossless=79,
            accept_length=length,
            accept_rates=(0.5, 0.25),
            num_new_tokens=900,
            plain_s=4.0,
            speculative_s=2.0,
        )
        for name, category, length in [("heldout", None, 3.5), ("mt_bench", "math", 2.75)]
    ]
    report = report.model_copy(update={"sets": tuple(sets)})
    run = make_run(training={"continual_from": "/home/me/champions/c0ffee"})
    card = model_card(run, make_candidate(tmp_path, report=report), "abc123", date(2026, 1, 2))
    lines = card.splitlines()
    for line in (
        "| heldout-1234 (80 prompts) | 80 | 3.50 | 50% 25% | 79 of 80 | 2.00x |",
        "| mt_bench: math | 80 | 2.75 | 50% 25% | 79 of 80 | 2.00x |",
        "| engine | hf, on cuda |",
        "| target | `examples/tiny_target` in bfloat16 |",
        "| K (draft tokens, one behind the other) | 5 |",
        "| temperature | 0 |",
        "| date | 2026-01-02 |",
        "| data | `d4e5`: 1,500 prompts, 120,000 tokens |",
        "| started from | `champions/c0ffee` |",
        "| code | `abc123` |",
        f"| settings | `{config_hash(run)}`, in `config.json` beside the draft's folder |",
        "| GPU-hours | 0.16 |",
        "| tokens trained | 120,000 |",
        "| wall time | 94 s |",
    ):
        assert line in lines
    assert "/home/me" not in card


def test_a_draft_that_sglang_measured_is_told_without_what_sglang_does_not_tell(tmp_path):
    costs = {"draft_step_s": None, "target_step_s": None}
    candidate = make_candidate(tmp_path, report=make_report(engine="sglang", **costs))
    card = model_card(make_run(), candidate, "abc123", date(2026, 1, 2))
    assert "| engine | sglang, on cuda |" in card
    assert "The speed-up is SGLang's own, answering one prompt at a time." in card
    summary = run_summary(candidate, make_outcome())
    assert "0.80x in SGLang, one prompt at a time (8.0 s plain, 10.0 s with the draft)" in summary
    assert "projected" not in card + summary


def test_the_hub_reads_tags_and_the_base_model_and_no_licence_is_chosen(tmp_path):
    path = "/cache/hub/models--Qwen--Qwen3-8B/snapshots/0123abcd"
    candidate = make_candidate(tmp_path)
    fetched = make_candidate(tmp_path, target=candidate.target.model_copy(update={"path": path}))
    run = make_run("Qwen/Qwen3-8B", registry={"push_to_hub": "me/draft"})
    card = model_card(run, fetched, "abc123", date(2026, 1, 2))
    _, head, body = card.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["base_model"] == "Qwen/Qwen3-8B"
    assert {"eagle3", "speculative-decoding"} <= set(front["tags"])
    assert front.keys() == {"base_model", "library_name", "pipeline_tag", "tags"}
    assert "--model-path Qwen/Qwen3-8B" in body
    assert "--speculative-draft-model-path me/draft" in body
    assert "revision `0123abcd`" in body
    assert "/cache" not in card
    # A folder's name means nothing to the hub, which would refuse it.
    card = model_card(make_run(), candidate, "abc123", date(2026, 1, 2))
    assert "base_model" not in yaml.safe_load(card.split("---\n", 2)[1])


def test_a_drafts_content_is_its_files_and_not_its_model_card(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = content_hash(tmp_path)
    (tmp_path / "README.md").write_text("whatever")
    assert content_hash(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    assert content_hash(tmp_path) != first
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    assert content_hash(tmp_path) != first


def test_code_has_a_version():
    assert len(code_version()) >= len("0.1.0")
