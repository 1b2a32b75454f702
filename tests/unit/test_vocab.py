import numpy as np
import pytest

from torchspec_lib.data.vocab import choose_draft_vocab
from torchspec_lib.errors import ConfigError


def test_the_most_frequent_tokens_are_chosen_in_ascending_order():
    counts = np.array([3, 9, 0, 7, 1, 8])
    assert choose_draft_vocab(counts, 3, always_in=()).tolist() == [1, 3, 5]


def test_ties_go_to_the_lower_id_and_unused_tokens_fill_up_from_the_lowest():
    counts = np.array([0, 2, 0, 2, 2, 0])
    assert choose_draft_vocab(counts, 2, always_in=()).tolist() == [1, 3]
    assert choose_draft_vocab(counts, 5, always_in=()).tolist() == [0, 1, 2, 3, 4]


def test_tokens_that_end_a_turn_are_in_however_rare():
    counts = np.array([9, 9, 9, 9, 0, 0])
    assert choose_draft_vocab(counts, 3, always_in={5}).tolist() == [0, 1, 5]


@pytest.mark.parametrize("seed", range(20))
def test_draft_ids_ascend_and_no_rarer_token_displaces_a_more_frequent_one(seed):
    rng = np.random.default_rng(seed)
    vocab_size = int(rng.integers(2, 400))
    size = int(rng.integers(1, vocab_size + 1))
    counts = rng.integers(0, 4, vocab_size)
    always_in = rng.integers(0, vocab_size, min(size, 3))
    ids = choose_draft_vocab(counts, size, always_in)
    assert (len(ids), ids.dtype) == (size, np.int64)
    assert (np.diff(ids) > 0).all()
    assert set(always_in.tolist()) <= set(ids.tolist())
    left_out = np.setdiff1d(np.arange(vocab_size), ids)
    chosen = np.setdiff1d(ids, always_in)
    if len(left_out) and len(chosen):
        worst = max((-counts[i], i) for i in chosen)
        assert worst < min((-counts[i], i) for i in left_out)


@pytest.mark.parametrize(("size", "always_in"), [(7, ()), (1, (2, 3))])
def test_an_impossible_size_is_refused(size, always_in):
    with pytest.raises(ConfigError, match=r"draft\.vocab_size: \d is impossible: .* has 6 tokens"):
        choose_draft_vocab(np.zeros(6, dtype=np.int64), size, always_in)
