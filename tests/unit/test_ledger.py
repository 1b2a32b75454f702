import pytest

from torchspec_lib.controller.ledger import EpochOrder, Ledger, State
from torchspec_lib.errors import LedgerError


def walk(ledger: Ledger, position: int, *states: State) -> None:
    for state in states:
        ledger.move(position, state, "why")


TRAINED = (State.CAPTURING, State.READY, State.DISPATCHED, State.TRAINED)


def test_a_prompt_cannot_be_trained_twice():
    ledger = Ledger(1)
    walk(ledger, 0, *TRAINED)
    with pytest.raises(LedgerError, match="TRAINED to TRAINED"):
        ledger.move(0, State.TRAINED)


def test_a_prompt_cannot_be_trained_before_it_was_captured():
    with pytest.raises(LedgerError, match="PENDING to TRAINED"):
        Ledger(1).move(0, State.TRAINED)


def test_a_run_that_left_a_prompt_open_is_not_settled():
    ledger = Ledger(3)
    walk(ledger, 0, *TRAINED)
    walk(ledger, 1, State.CAPTURING, State.REJECTED)
    walk(ledger, 2, State.CAPTURING, State.READY)
    with pytest.raises(LedgerError, match=r"1 were trained and 1 rejected.*'READY': 1"):
        ledger.settle()
    walk(ledger, 2, State.DISPATCHED, State.TRAINED)
    ledger.settle()
    assert ledger.count(State.TRAINED) + ledger.count(State.REJECTED) == 3


def test_rejections_are_counted_by_reason():
    ledger = Ledger(2)
    for position, reason in enumerate(["too long", "too long"]):
        ledger.move(position, State.CAPTURING)
        ledger.move(position, State.REJECTED, reason)
    assert ledger.rejections() == {"too long": 2}


def test_a_restored_ledger_knows_what_was_trained_and_forgets_what_was_in_flight():
    before = Ledger(4)
    walk(before, 0, *TRAINED)
    walk(before, 1, State.CAPTURING, State.REJECTED)
    walk(before, 2, State.CAPTURING, State.READY)
    after = Ledger(4)
    assert after.restore(before.snapshot(cursor=2)) == 2
    assert [after.state(p) for p in range(4)] == [
        State.TRAINED,
        State.REJECTED,
        State.PENDING,
        State.PENDING,
    ]
    assert after.rejections() == {"why": 1}


def test_every_epoch_has_every_prompt_once_in_another_order_that_the_seed_fixes():
    def epochs(seed: int) -> list[list[int]]:
        order = EpochOrder(50, seed)
        return [[order[e * 50 + i][1] for i in range(50)] for e in range(2)]

    first, second = epochs(seed=1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert epochs(seed=1) == [first, second]
    assert epochs(seed=2) != [first, second]


def test_positions_may_be_asked_in_any_order():
    order = EpochOrder(5, seed=0)
    forward = [order[p] for p in range(15)]
    assert [order[p] for p in reversed(range(15))] == forward[::-1]
