"""What is read of SGLang's answers, without SGLang."""

import pytest

from torchspec_lib.errors import EngineError
from torchspec_lib.evaluation.acceptance import ServedCounts
from torchspec_lib.evaluation.served import accepted_counts, until_end


def test_what_sglang_emits_behind_the_end_is_no_answer():
    assert until_end([7, 8, 3, 9, 3], {3}) == [7, 8, 3]
    assert until_end([7, 8], {3}) == [7, 8]


def test_an_answer_that_was_over_with_its_first_token_has_no_verifications():
    assert accepted_counts({"finish_reason": {"type": "stop"}}, 1) == ServedCounts((), 1)


def test_an_sglang_that_does_not_tell_what_it_accepted_is_refused():
    with pytest.raises(EngineError, match=r"spec_correct_drafts_histogram is \[\].* 5 new tokens"):
        accepted_counts({"finish_reason": {"type": "stop"}}, 5)
