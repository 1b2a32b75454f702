"""Speed-ups that follow from measured costs, by hand."""

import pytest

from torchspec_lib.evaluation.projection import projected_chains
from torchspec_lib.results import EvalReport


def report(**changes) -> EvalReport:
    values = {
        "engine": "hf",
        "draft_steps": 2,
        "temperature": 0.0,
        "prompt_set": "heldout-abc (1 prompts)",
        "max_new_tokens": 96,
        "num_prompts": 1,
        "num_lossless": 1,
        "accept_length": 2.0,
        "accept_rates": (0.75, 0.5),
        "num_new_tokens": 6,
        "num_target_forwards": 3,
        "plain_s": 2.0,
        "speculative_s": 1.0,
        "draft_step_s": 0.1,
        "target_step_s": 1.0,
        "target_rows_s": {1: 1.0, 2: 1.1, 3: 1.3},
        "prompts": (),
    }
    return EvalReport.model_validate(values | changes)


def test_a_projected_speed_up_counts_the_drafts_steps_and_the_whole_verification():
    assert report().projected_speedup == pytest.approx(2.0 / (2 * 0.1 + 1.3))
    tree = report(draft_topk=4, num_draft_tokens=8, target_rows_s={1: 1.0, 8: 1.8})
    assert tree.projected_speedup == pytest.approx(2.0 / (2 * 0.1 + 1.8))


def test_a_shorter_chain_is_projected_with_its_own_accept_length_and_costs():
    projected = projected_chains(report())
    assert projected == {
        1: pytest.approx(1.75 / (0.1 + 1.1)),
        2: pytest.approx((1 + 0.75 + 0.375) / (0.2 + 1.3)),
    }


def test_without_costs_nothing_is_projected():
    served = report(engine="sglang", draft_step_s=None, target_step_s=None, target_rows_s={})
    assert served.projected_speedup is None
    assert projected_chains(served) == {}


def test_trees_and_records_without_costs_project_no_chains():
    assert projected_chains(report(target_rows_s={})) == {}
    tree = {"draft_topk": 4, "num_draft_tokens": 8, "target_rows_s": {1: 1.0, 8: 1.8}}
    assert projected_chains(report(**tree)) == {}


def test_a_record_made_before_there_were_trees_and_sets_reads_as_chains():
    row = report().model_dump(mode="json")
    for name in ("draft_topk", "num_draft_tokens", "target_rows_s", "sets", "chain"):
        del row[name]
    old = EvalReport.model_validate(row)
    assert (old.drafting, old.num_rows, old.sets) == ("chains of 2", 3, ())
    assert old.projected_speedup == pytest.approx(2.0 / (2 * 0.1 + 1.0))


def test_a_record_reads_as_it_was_written():
    assert EvalReport.model_validate_json(report().model_dump_json()) == report()
