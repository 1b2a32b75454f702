"""The README of a registered draft."""

import importlib.metadata
from datetime import date

import pytest
import yaml

from tests.candidates import make_candidate, make_outcome, make_report, make_run
from torchspec_lib.config.models import DraftConfig
from torchspec_lib.registry.candidate import (
    code_version,
    config_hash,
    content_hash,
)
from torchspec_lib.registry.model_card import model_card, run_summary
from torchspec_lib.results import (
    SetResult,
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


def test_code_has_a_version_even_where_git_refuses_another_users_checkout(monkeypatch):
    assert len(code_version()) >= len("0.1.0")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert code_version() == importlib.metadata.version("torchspec-flyte")
