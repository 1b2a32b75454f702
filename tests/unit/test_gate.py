"""The gate, the champion's title, and a run's last lines."""

import pytest

from tests.candidates import make_candidate, make_outcome, make_report
from torchspec_lib.registry.gate import check_champion, check_draft, conditions
from torchspec_lib.registry.model_card import run_summary


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


def test_answers_that_part_at_a_tie_are_not_held_against_a_draft():
    assert check_draft(make_report(num_lossless=97, num_ties=3), 1.0).passed
    decision = check_draft(make_report(num_lossless=97, num_ties=2), 1.0)
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
