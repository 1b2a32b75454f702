"""The reports on what a draft is worth, what became of it, and what failed."""

import dataclasses
import re
from html import unescape
from pathlib import Path

import pytest
from transformers import ByT5Tokenizer

from tasks import reports
from tasks.evaluation_report import evaluation_report
from tasks.failure_page import failure_report
from tests.flyte.pages import PageCheck, plots, run_in
from tests.flyte.records import MANIFEST, SUMMARY
from torchspec_lib.registry.candidate import Candidate
from torchspec_lib.results import Cost, EvalReport, PromptResult, RegisteredDraft, SetResult
from torchspec_lib.target import TargetSpec


def evaluated(prompts: tuple[PromptResult, ...]) -> EvalReport:
    return EvalReport(
        engine="hf",
        draft_steps=2,
        temperature=0.0,
        prompt_set="heldout-abc (1 prompts)",
        max_new_tokens=96,
        num_prompts=1,
        num_lossless=1,
        accept_length=2.5,
        accept_rates=(0.75, 0.5),
        num_new_tokens=6,
        num_target_forwards=3,
        plain_s=2.0,
        speculative_s=1.0,
        draft_step_s=0.001,
        target_step_s=0.004,
        prompts=prompts,
    )


def answer(text: str, accepted: tuple[int, ...], num_new_tokens: int) -> PromptResult:
    return PromptResult(
        prompt_id="p0",
        text="What is it?",
        output_text=text,
        accepted=accepted,
        num_new_tokens=num_new_tokens,
        lossless=True,
    )


def test_the_evaluation_report_marks_the_tokens_that_the_draft_got_right(tokenizer) -> None:
    text = "It is red."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first, *others = [tokenizer.decode([i]) for i in ids]
    accepted = len(others) - 1  # all but the first and the last, which are the target's own
    html = evaluation_report(evaluated((answer(text, (accepted,), len(ids)),)), None, tokenizer)
    assert PageCheck(html).marked == others[:-1]
    assert first not in PageCheck(html).marked


def test_the_evaluation_report_shows_the_champion_beside_the_draft(tokenizer) -> None:
    draft = evaluated((answer("It is red.", (2, 1), 6),))
    champion = draft.model_copy(update={"accept_length": 2.25, "accept_rates": (0.5, 0.25)})
    html = evaluation_report(draft, champion, tokenizer)
    PageCheck(html)
    assert "Better than the champion: 2.50 against 2.25 tokens per target forward (+11.1%)" in html
    assert "<td>" in html.partition("the champion</th>")[2]
    (acceptance,) = plots(html)
    assert "the champion" in acceptance
    assert "25%" in acceptance
    assert "Not better" in evaluation_report(champion, draft, tokenizer)
    alone = evaluation_report(draft, None, tokenizer)
    assert "the champion" not in alone + plots(alone)[0]


def test_the_evaluation_report_shows_answers_that_the_draft_changed_before_the_others(
    tokenizer,
) -> None:
    good, best = answer("It is red.", (0, 0), 3), answer("It is blue.", (2, 2), 7)
    changed = answer("It is <i>green</i>.", (1,), 3).model_copy(update={"lossless": False})
    report = evaluated((best, good, changed))
    report = report.model_copy(update={"num_prompts": 3, "num_lossless": 2})
    html = evaluation_report(report, None, tokenizer)
    PageCheck(html)
    assert "1 of 3 answers differ from plain decoding" in html
    titles = [
        html.index(title)
        for title in (
            "2.00 tokens per forward, not what plain decoding gives",
            "1.00 tokens per forward:",
            "3.00 tokens per forward:",
        )
    ]
    assert titles == sorted(titles)


def test_the_evaluation_report_tells_rounding_from_a_fault(tokenizer) -> None:
    other = answer("It is green.", (1,), 3).model_copy(update={"lossless": False})
    report = evaluated((other,)).model_copy(update={"num_lossless": 0, "num_ties": 1})
    html = evaluation_report(report, None, tokenizer)
    assert "rounding chose there, not the draft" in html
    assert "must not change any" not in html


def test_an_answer_whose_tokens_are_uncertain_is_left_unmarked(tokenizer) -> None:
    html = evaluation_report(evaluated((answer("It is red.", (2, 2, 2), 40),)), None, tokenizer)
    assert PageCheck(html).marked == []
    assert "It is red." in html


def test_the_answers_of_a_slow_tokenizer_are_shown_unmarked() -> None:
    html = evaluation_report(evaluated((answer("Red.", (3,), 5),)), None, ByT5Tokenizer())
    assert PageCheck(html).marked == []
    assert "Red." in html


def test_the_evaluation_report_of_sglangs_figures_leaves_out_what_sglang_does_not_tell(
    tokenizer,
) -> None:
    prompt = answer("It is red.", (1, 2), 6).model_copy(update={"in_order": False})
    costs = {"draft_step_s": None, "target_step_s": None}
    report = evaluated((prompt,)).model_copy(update={"engine": "sglang", **costs})
    html = evaluation_report(report, None, tokenizer)
    page = PageCheck(html)
    assert page.marked == []
    assert "2.50 tokens per forward: What is it?" in html
    assert "of SGLang, one prompt at a time" in html
    assert "SGLang doesn&#x27;t tell which" in html
    assert "Projected" not in html
    assert "None" not in html
    (acceptance,) = plots(html)
    assert " 0% 50% 50% draft tokens accepted per target forward" in acceptance


@pytest.mark.filterwarnings("error")
def test_figures_that_are_all_zero_are_drawn_without_a_complaint(tokenizer) -> None:
    over_at_once = evaluated((answer("It", (), 1),)).model_copy(update={"accept_rates": (0.0, 0.0)})
    assert plots(evaluation_report(over_at_once, None, tokenizer))


def test_the_evaluation_report_tells_sets_categories_and_what_trees_gain(tokenizer) -> None:
    report = evaluated((answer("It is red.", (2, 1), 6),))
    assert "Prompt sets" not in evaluation_report(report, None, tokenizer)
    heldout = SetResult(
        name="heldout",
        category=None,
        prompt_set=report.prompt_set,
        num_prompts=1,
        num_lossless=1,
        accept_length=2.5,
        accept_rates=(0.75, 0.5),
        num_new_tokens=6,
        plain_s=2.0,
        speculative_s=1.6,
    )
    named = {"name": "mt_bench", "accept_length": 1.75}
    sets = (heldout, *(heldout.model_copy(update=named | {"category": c}) for c in (None, "<a>")))
    trees = {"draft_topk": 4, "num_draft_tokens": 8, "target_rows_s": {1: 0.004, 8: 0.006}}
    html = evaluation_report(
        report.model_copy(update={"sets": sets, "chain": heldout, **trees}), None, tokenizer
    )
    PageCheck(html)
    _, _, table = html.partition("Prompt sets")
    assert table.count("mt_bench") == 2
    assert "&lt;a&gt;" in table
    assert "trees of 2 steps, top-k 4, 8 tokens" in table
    assert "1.25x" in table.partition("chains of 2")[2]
    chains = report.model_copy(update={"target_rows_s": {1: 0.004, 2: 0.0045, 3: 0.02}})
    html = evaluation_report(chains, None, tokenizer)
    PageCheck(html)
    assert "Chains of 1 would gain most here" in html


def outcome(**changes: object) -> RegisteredDraft:
    kept = RegisteredDraft(
        registered=True,
        model_name="draft",
        version="12",
        is_champion=True,
        is_new=True,
        decision="accept length 2.5 beats 2.2",
        tracking_uri="sqlite:///x.db",
        summary="registered     <script>",
    )
    return kept.model_copy(update=changes)


@pytest.fixture
def candidate(target: TargetSpec) -> Candidate:
    return Candidate(
        draft_dir=Path("draft"),
        target=target,
        manifest=MANIFEST,
        training=SUMMARY,
        report=evaluated((answer("It.", (), 1),)),
        step_metrics=Path("metrics.jsonl"),
        stage_s={"prepare": 1.0, "train": 90_000.0},
        cost=Cost(gpu_hours=1.25, num_gpus=8, num_workers=8, num_tokens=24_000, wall_s=31.0),
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "Registered as version 12, the new champion: accept"),
        ({"is_champion": False}, "Registered as version 12; the champion stays: accept"),
        ({"is_new": False}, "Already registered as version 12, with this very content: accept"),
        ({"registered": False, "version": ""}, "Not registered: accept"),
    ],
)
def test_the_registration_report_says_what_became_of_the_draft(
    candidate: Candidate, changes: dict[str, object], expected: str
) -> None:
    html = reports.registration_report(outcome(**changes), candidate, run_in(Path("data")))
    PageCheck(html)
    assert expected in html
    assert ('class="decision bad"' in html) == expected.startswith("Not")


def test_the_registration_report_shows_each_condition_of_the_gate_with_cost_and_lineage(
    candidate: Candidate,
) -> None:
    champion = candidate.report.model_copy(update={"accept_length": 2.75})
    compared = dataclasses.replace(candidate, champion_report=champion)
    html = reports.registration_report(outcome(), compared, run_in(Path("data")))
    words = " ".join(unescape(re.sub("<[^>]*>", " ", html)).split())
    assert "accept length at least 1 2.500 ✓ met" in words
    assert "the same, to be champion above the champion's 2.750 2.500 ✗ not met" in words
    assert "train 25.0 h" in words
    assert "GPU-hours 1.25 on 8 GPUs" in words
    assert "training run c0ffee" in words


def test_the_registration_report_escapes_what_it_quotes(candidate: Candidate) -> None:
    quoted = outcome(model_name="<b>draft</b>", decision="1.2 is 0.8 below <2.0>")
    html = reports.registration_report(quoted, candidate, run_in(Path("data")))
    PageCheck(html)
    assert "0.8 below &lt;2.0&gt;" in html
    assert "<script>" not in html


def test_the_failure_report_begins_with_the_error_and_says_what_a_relaunch_finds() -> None:
    trace = "Traceback:\n  line <1>\n\nStoreFullError: no room: raise <transfer.segment_bytes>\n"
    html = failure_report("n3", trace, ["run c0ffee is unfinished"], ["/data/datasets/.half"])
    PageCheck(html)
    told = (
        "raise &lt;transfer.segment_bytes&gt;",
        "run c0ffee",
        "/data/datasets/.half",
        "Traceback",
    )
    places = [html.index(text) for text in told]
    assert places == sorted(places)
    assert "In full" not in failure_report("n0", "no file", [], [])
