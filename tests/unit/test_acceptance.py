"""Acceptance figures, worked out by hand."""

import doctest

import pytest

from torchspec_lib.evaluation import acceptance
from torchspec_lib.evaluation.acceptance import (
    ChainCounts,
    ServedCounts,
    accept_length,
    accept_rates,
)
from torchspec_lib.types import accept_length as accept_length_of_rates


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(acceptance).failed == 0
    assert doctest.testmod(acceptance).attempted == 2


def test_plain_decoding_and_a_draft_that_is_never_right_have_length_one():
    assert accept_length([ChainCounts((0,) * 9, 10)]) == 1.0
    assert accept_rates([ChainCounts((0,) * 9, 10)], 3) == (0.0, 0.0, 0.0)


def test_a_draft_that_is_always_right_has_length_k_plus_one():
    assert accept_length([ChainCounts((5, 5), 13)]) == 6.0
    assert accept_rates([ChainCounts((5, 5), 13)], 5) == (1.0,) * 5


def test_length_weighs_forwards_not_prompts():
    long, short = ChainCounts((3,) * 9, 37), ChainCounts((0,), 2)
    assert accept_length([long, short]) == pytest.approx(37 / 10)


def test_rates_are_conditional_on_the_earlier_positions():
    counts = [ChainCounts((0, 1, 2, 3), 11)]
    assert accept_rates(counts, 3) == pytest.approx((3 / 4, 2 / 3, 1 / 2))
    assert accept_length_of_rates(accept_rates(counts, 3)) == pytest.approx(accept_length(counts))


def test_what_a_cut_verification_had_no_room_for_is_neither_accepted_nor_refused():
    whole, cut = ChainCounts((2,), 4), ChainCounts((2,), 3)
    assert not whole.last_is_cut
    assert cut.last_is_cut
    assert accept_rates([whole], 3) == (1.0, 1.0, 0.0)
    assert accept_rates([whole, cut], 3) == (1.0, 1.0, 0.0)
    assert accept_rates([cut, ChainCounts((3,), 5)], 3) == (1.0, 1.0, 1.0)
    assert accept_length([cut]) == 2.0


def test_only_the_last_verification_is_taken_for_cut():
    assert accept_rates([ChainCounts((1, 1), 4)], 2) == pytest.approx((1.0, 0.0))


def test_an_answer_of_one_token_says_nothing_about_the_draft():
    assert accept_length([ChainCounts((), 1)]) == 1.0
    assert accept_rates([ChainCounts((), 1)], 2) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("accepted", "num_new_tokens"), [((2, 1), 7), ((2, 1), 4), ((2, 0), 4), ((), 0)]
)
def test_counts_that_contradict_each_other_are_refused(accepted, num_new_tokens):
    with pytest.raises(ValueError, match="new tokens can't come from"):
        ChainCounts(accepted, num_new_tokens)


def test_counts_in_no_order_give_the_figures_of_those_in_order():
    chains, served = ChainCounts((3, 0, 2), 9), ServedCounts((0, 2, 3), 9)
    assert accept_length([served]) == accept_length([chains])
    assert accept_rates([served], 3) == accept_rates([chains], 3)


def test_what_an_engine_verified_behind_the_end_counts_as_verified_but_not_as_emitted():
    served = ServedCounts((0, 2, 5), 8)
    assert accept_length([served]) == pytest.approx(7 / 3)
    assert accept_rates([served], 5) == pytest.approx((2 / 3, 1.0, 1 / 2, 1.0, 1.0))


@pytest.mark.parametrize(
    ("accepted", "num_new_tokens"), [((2, 1), 7), ((2, 1), 3), ((), 5), ((), 0)]
)
def test_counts_of_an_engine_that_contradict_each_other_are_refused(accepted, num_new_tokens):
    with pytest.raises(ValueError, match="can't come from"):
        ServedCounts(accepted, num_new_tokens)
