"""An engine actor that is started again, and what keeps it from starting."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import ray
import torch

from tests.run_process import TINY
from torchspec_lib.config.run import RunConfig
from torchspec_lib.controller.actors import _EngineClient
from torchspec_lib.controller.engine_slot import EngineSlot
from torchspec_lib.controller.limits import CapturePolicy
from torchspec_lib.errors import HungError, StoreFullError
from torchspec_lib.inference.engine_actor import EngineActor, engine_options
from torchspec_lib.inference.factory import EngineSpec
from torchspec_lib.plan import make_plan
from torchspec_lib.ray.cluster import ray_session
from torchspec_lib.ray.placement_group import create_placement_groups
from torchspec_lib.target import read_target
from torchspec_lib.transfer.mooncake.connect import connect
from torchspec_lib.transfer.mooncake.processes import start_client, start_master
from torchspec_lib.transfer.store import StoreAddress, TensorStore
from torchspec_lib.types import SampleKey

pytestmark = [pytest.mark.ray, pytest.mark.mooncake]

MIB = 1 << 20
MAX_RESTARTS = 3
HUNG = HungError("engine 0", "no answer")
"""So that the engine is killed, and no last answer of that one passes for its successor's."""


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"target": str(TINY), "dtype": "float32"},
            "data": {"train": ["-"], "heldout": ["-"]},
            "cluster": {"device": "cpu", "placement": "debug_inference_only"},
            # So that a full store isn't waited for long.
            "recovery": {"hang_timeout_s": 8.0},
        }
    )


@pytest.fixture(scope="module")
def engine(run) -> Iterator[tuple[object, TensorStore]]:
    """An engine's actor, as a run starts it, and its store."""
    target = read_target(run.model)
    plan = make_plan(run, target, num_prompts=1, longest=64)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("RAY_ADDRESS", "local")
        stack.enter_context(ray_session(plan))
        placement = create_placement_groups(plan, 30)
        stack.callback(placement.remove)
        (slot,) = placement.inference
        master = start_master(slot.node_ip)
        stack.callback(master.process.stop)
        client = start_client(slot.node_ip, master.endpoint.rpc, 32 * MIB)
        stack.callback(client.process.stop)
        address = StoreAddress(
            run_id="run",
            mode="client_process",
            protocol="tcp",
            device_name="",
            master=master.endpoint.rpc,
            metrics=master.endpoint.metrics,
            clients={slot.node_ip: client.address},
            segment_bytes=32 * MIB,
            max_sample_bytes=8 * MIB,
        )
        store = connect(address, slot.node_ip, owns_memory=False, put_timeout_s=1.0)
        stack.callback(store.close)
        options = slot.options("inference") | engine_options(run)
        actor = ray.remote(EngineActor).options(**options)
        engine = actor.remote(EngineSpec(run, target, 0, address))
        stack.callback(ray.kill, engine)
        ray.get(engine.ping.remote(), timeout=120)
        yield engine, store


def policy(run: RunConfig, max_restarts: int) -> CapturePolicy:
    return replace(CapturePolicy.of(run, MIB), max_restarts=max_restarts)


def fill(store: TensorStore) -> list[SampleKey]:
    """Put samples until there is no room."""
    keys: list[SampleKey] = []
    for size in (4 * MIB, MIB, 64 << 10, 4 << 10):
        while True:
            key = SampleKey.first("fill", 0, f"{len(keys)}")
            try:
                store.put(key, {"x": torch.zeros(size, dtype=torch.uint8)})
            except StoreFullError:
                break
            keys.append(key)
    return keys


def test_a_restart_that_fails_is_tried_again_as_often_as_allowed(engine, run):
    """A full store fails the self-check, as memory does that something else uses just now."""
    actor, store = engine

    async def lose_it_while_the_store_is_full() -> tuple[bool, int]:
        slot = EngineSlot(0, _EngineClient("engine 0", actor, 1), policy(run, MAX_RESTARTS))
        assert await slot.start(None)
        filler = fill(store)
        starting = asyncio.create_task(slot.start(HUNG))
        while slot.num_restarts < 2:
            await asyncio.sleep(0.1)
        store.release(filler)
        return await starting, slot.num_restarts

    is_up, num_restarts = asyncio.run(lose_it_while_the_store_is_full())
    assert is_up
    assert num_restarts == 2
    ray.get(actor.ping.remote(), timeout=10)


def test_an_engine_that_never_starts_again_is_given_up_after_as_many_restarts(engine, run):
    actor, store = engine

    async def lose_it() -> tuple[bool, int]:
        slot = EngineSlot(0, _EngineClient("engine 0", actor, 1), policy(run, 1))
        assert await slot.start(None)
        return await slot.start(HUNG), slot.num_restarts

    filler = fill(store)
    assert asyncio.run(lose_it()) == (False, 1)
    store.release(filler)
