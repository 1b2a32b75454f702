"""The accounts of a training that is stopped early; a controller with fake engines and trainers."""

import asyncio

import pytest

from tests.fakes import FakeEngine, make_prompts
from tests.unit.control_plane import Rank, policy, schedule, size_of
from torchspec_lib.controller.inference_manager import InferenceManager
from torchspec_lib.controller.ledger import Ledger, State
from torchspec_lib.controller.training_controller import RunTotals, TrainingController
from torchspec_lib.errors import LedgerError


def stop_after(num_steps: int, stopped_early: bool) -> RunTotals:
    """40 prompts in steps of 4; stopped once ``num_steps`` are reported."""

    async def main() -> RunTotals:
        controller = TrainingController(make_prompts(40), schedule())
        manager = InferenceManager(controller, [FakeEngine()], policy(8), size_of)
        capturing = asyncio.create_task(manager.run())
        training = asyncio.gather(*(Rank(i).run(controller, manager) for i in range(2)))
        while len(await controller.progress(0)) < num_steps:
            await asyncio.sleep(0)
        await controller.stop()
        await training
        try:
            totals = await controller.finish(stopped_early)
            await asyncio.sleep(0.05)  # captures that come too late
            assert not capturing.done() or capturing.exception() is None
            assert await controller.finish(stopped_early) == totals
            return totals
        finally:
            capturing.cancel()

    return asyncio.run(asyncio.wait_for(main(), timeout=20))


def test_what_is_left_by_an_early_stop_is_counted_and_nothing_else():
    totals = stop_after(3, stopped_early=True)
    assert 3 <= totals.num_steps < 10
    assert totals.num_trained == 4 * totals.num_steps
    assert totals.num_not_trained == 40 - totals.num_trained
    assert totals.num_rejected == 0


def test_prompts_that_are_left_without_an_early_stop_are_a_fault():
    with pytest.raises(LedgerError, match="which leaves"):
        stop_after(3, stopped_early=False)


def test_a_run_that_came_to_its_end_leaves_nothing_however_it_was_stopped():
    assert stop_after(10, stopped_early=True).num_not_trained == 0


def test_what_is_settled_stays_as_it_is():
    ledger = Ledger(4)
    for state in (State.CAPTURING, State.READY, State.DISPATCHED, State.TRAINED):
        ledger.move(0, state)
    ledger.move(1, State.CAPTURING)
    ledger.move(1, State.REJECTED, "too long")
    ledger.move(2, State.CAPTURING)
    ledger.leave_rest()
    ledger.settle()
    counts = [ledger.count(s) for s in (State.TRAINED, State.REJECTED, State.NOT_TRAINED)]
    assert counts == [1, 1, 2]
    assert ledger.rejections() == {"too long": 1}
