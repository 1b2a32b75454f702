"""Master and client process, killed and frozen: what comes back, what is lost, what is told."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import ray
import torch

from torchspec_lib.config.inference import TransferConfig
from torchspec_lib.errors import SampleLostError, StoreUnavailableError
from torchspec_lib.transfer.mooncake.connect import connect
from torchspec_lib.transfer.mooncake.master import MooncakeClient, MooncakeMaster
from torchspec_lib.transfer.mooncake.processes import allocated_bytes
from torchspec_lib.transfer.mooncake.store import MooncakeStore
from torchspec_lib.transfer.store import StoreAddress
from torchspec_lib.types import SampleKey, SampleRef

pytestmark = pytest.mark.mooncake

CPU = torch.device("cpu")
HOST = "127.0.0.1"
MIB = 1 << 20
RPC_TIMEOUT = -901
NUM_CLIENT_THREADS = 8
HANG_TIMEOUT_S = 3.0
LONGEST_DETECTION_S = HANG_TIMEOUT_S + 8.0
"""Two probes of 2 s, 2 s apart, and the first of them up to 2 s after the fault."""


class Cluster:
    """A master, a client process and a store attached to it; short of patience."""

    def __init__(self, stack: ExitStack, max_restarts: int = 3) -> None:
        self.master = MooncakeMaster(HOST, max_restarts, HANG_TIMEOUT_S)
        stack.callback(self.master.stop)
        self.client = MooncakeClient(
            HOST,
            self.master.endpoint().rpc,
            32 * MIB,
            TransferConfig(),
            max_restarts,
            HANG_TIMEOUT_S,
        )
        stack.callback(self.client.stop)
        self.address = StoreAddress(
            run_id="run",
            mode="client_process",
            protocol="tcp",
            device_name="",
            master=self.master.endpoint().rpc,
            metrics=self.master.endpoint().metrics,
            clients={HOST: self.client.address()},
            segment_bytes=32 * MIB,
            max_sample_bytes=4 * MIB,
        )
        self.store = self.connect(stack)

    def connect(self, stack: ExitStack) -> MooncakeStore:
        store = connect(self.address, HOST, False, put_timeout_s=0.5, retry_timeout_s=1.0)
        stack.callback(store.close)
        return store

    @property
    def master_pid(self) -> int:
        return self.master._process.pid

    @property
    def client_pid(self) -> int:
        return self.client._process.pid


def new_key() -> SampleKey:
    return SampleKey.first("run", 0, "p")


def put_until_it_works(store: MooncakeStore, value: int, timeout_s: float = 40.0) -> SampleRef:
    """As the manager does it: each attempt under a key of its own."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return store.put(new_key(), {"x": torch.full((1000,), value)})
        except StoreUnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


CAUSES = [(signal.SIGKILL, "ended by SIGKILL"), (signal.SIGSTOP, "didn't answer for")]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("fault", "cause"), CAUSES, ids=["killed", "frozen"])
def test_a_lost_master_comes_back_at_its_address_and_takes_no_client_with_it(
    stack: ExitStack, fault: signal.Signals, cause: str
):
    cluster = Cluster(stack)
    before = cluster.store.put(new_key(), {"x": torch.zeros(1000)})
    endpoint, client_pid = cluster.master.endpoint(), cluster.client_pid
    os.kill(cluster.master_pid, fault)
    with ThreadPoolExecutor(3 * NUM_CLIENT_THREADS) as callers:
        # All threads of the client process wait for the master now, and answer nobody.
        for _ in range(6 * NUM_CLIENT_THREADS):
            callers.submit(cluster.store._client.is_exist, "any")
        wait_until(lambda: cluster.master.recoveries() != [], LONGEST_DETECTION_S + 10)
    after = put_until_it_works(cluster.store, 5)
    assert (cluster.store.get(after, CPU)["x"] == 5).all()
    with pytest.raises(SampleLostError):
        cluster.store.get(before, CPU)
    assert cluster.master.endpoint() == endpoint
    assert cluster.client_pid == client_pid
    assert cluster.client.recoveries() == []
    (recovery,) = cluster.master.recoveries()
    assert recovery.part == f"mooncake_master on {HOST}"
    assert recovery.cause.startswith(cause)
    print(recovery)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("fault", "cause"), CAUSES, ids=["killed", "frozen"])
def test_a_lost_client_process_comes_back_at_its_address_and_leaves_the_master_alone(
    stack: ExitStack, fault: signal.Signals, cause: str
):
    cluster = Cluster(stack)
    others = [cluster.connect(stack) for _ in range(2)]
    before = cluster.store.put(new_key(), {"x": torch.zeros(1000)})
    address, master_pid = cluster.client.address(), cluster.master_pid
    os.kill(cluster.client_pid, fault)
    wait_until(lambda: cluster.client.recoveries() != [], LONGEST_DETECTION_S + 30)
    for value, store in enumerate([cluster.store, *others]):
        after = put_until_it_works(store, value)
        assert (store.get(after, CPU)["x"] == value).all()
        store.release([after.key])
    with pytest.raises(SampleLostError):
        cluster.store.get(before, CPU)
    assert cluster.client.address() == address
    assert cluster.master_pid == master_pid
    assert cluster.master.recoveries() == []
    (recovery,) = cluster.client.recoveries()
    assert recovery.part == f"mooncake_client on {HOST}"
    assert recovery.cause.startswith(cause)
    print(recovery)


class DeafAfterPut:
    """Mooncake's client, one of whose answers after a put gets lost."""

    def __init__(self, client: Any) -> None:
        self._client, self._heard = client, False

    def get_size(self, key: str) -> int:
        if self._heard:
            return int(self._client.get_size(key))
        self._heard = True
        return RPC_TIMEOUT

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def test_a_put_that_failed_leaves_nothing_once_another_one_succeeds(stack: ExitStack):
    cluster = Cluster(stack)
    cluster.store._client = DeafAfterPut(cluster.store._client)
    with pytest.raises(StoreUnavailableError):
        cluster.store.put(new_key(), {"x": torch.zeros(500_000)})
    assert allocated_bytes(cluster.address.metrics) >= 2 * MIB - 100_000
    ref = cluster.store.put(new_key(), {"x": torch.zeros(1000)})
    assert allocated_bytes(cluster.address.metrics) < 100_000
    cluster.store.release([ref.key])


@pytest.mark.timeout(120)
def test_used_up_restarts_end_the_watch_of_a_ray_actor_that_answers_meanwhile():
    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
    try:
        actor = ray.remote(MooncakeMaster).remote(HOST, 0, HANG_TIMEOUT_S)
        watch = actor.watch.remote()
        assert ray.get(actor.endpoint.remote(), timeout=60).rpc.startswith(HOST)
        assert ray.wait([watch], timeout=0.5)[0] == []
        pid = ray.get(actor.__ray_call__.remote(lambda self: self._process.pid))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(
            StoreUnavailableError, match=rf"(?s)mooncake_master on {HOST}: .*SIGKILL.*log ends"
        ):
            ray.get(watch, timeout=30)
        assert ray.get(actor.recoveries.remote()) == []
        ray.get(actor.stop.remote())
    finally:
        ray.shutdown()


def test_the_watch_of_what_is_stopped_ends_quietly(stack: ExitStack):
    master = MooncakeMaster(HOST, 3, HANG_TIMEOUT_S)

    async def stop_while_it_is_watched() -> None:
        watch = asyncio.create_task(master.watch())
        await asyncio.sleep(0.1)
        assert not watch.done()
        master.stop()
        await asyncio.wait_for(watch, timeout=10)

    asyncio.run(stop_while_it_is_watched())
    assert master.recoveries() == []
