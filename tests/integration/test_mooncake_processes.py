"""Mooncake's processes: their start, their end, and what survives theirs."""

import asyncio
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from types import SimpleNamespace

import psutil
import pytest
import torch

from torchspec_lib.config.inference import TransferConfig
from torchspec_lib.errors import SampleLostError, StoreUnavailableError
from torchspec_lib.transfer.mooncake import processes
from torchspec_lib.transfer.mooncake.connect import connect
from torchspec_lib.transfer.mooncake.managed_process import ManagedProcess
from torchspec_lib.transfer.mooncake.master import MooncakeClient, MooncakeMaster
from torchspec_lib.transfer.mooncake.processes import (
    allocated_bytes,
    evicted_keys,
    start_client,
    start_master,
)
from torchspec_lib.transfer.mooncake.touch import touch_segment
from torchspec_lib.transfer.store import StoreAddress
from torchspec_lib.types import SampleKey

pytestmark = pytest.mark.mooncake

CPU = torch.device("cpu")
HOST = "127.0.0.1"
MIB = 1 << 20
PATIENCE = 0, 60.0
"""No restarts: what dies here stays dead."""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def store_address(master: MooncakeMaster, client: MooncakeClient | None) -> StoreAddress:
    return StoreAddress(
        run_id="run",
        mode="embedded" if client is None else "client_process",
        protocol="tcp",
        device_name="",
        master=master.endpoint().rpc,
        metrics=master.endpoint().metrics,
        clients={} if client is None else {HOST: client.address()},
        segment_bytes=32 * MIB,
        max_sample_bytes=4 * MIB,
    )


def new_key() -> SampleKey:
    return SampleKey.first("run", 0, "p")


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 - not a file to keep
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_master_answers_once_started_and_ends_when_stopped():
    master = start_master(HOST)
    assert evicted_keys(master.endpoint.metrics) == 0
    assert allocated_bytes(master.endpoint.metrics) == 0
    master.process.stop()
    master.process.stop()
    assert not is_alive(master.process.pid)
    with pytest.raises(StoreUnavailableError, match=master.endpoint.metrics):
        evicted_keys(master.endpoint.metrics)


def test_masters_started_at_once_dont_take_each_others_ports(stack: ExitStack):
    masters = [start_master(HOST) for _ in range(3)]
    for master in masters:
        stack.callback(master.process.stop)
    addresses = {a for m in masters for a in (m.endpoint.rpc, m.endpoint.metrics)}
    assert len(addresses) == 6


def test_a_port_that_was_lost_leads_to_a_start_on_another(stack: ExitStack):
    taken = stack.enter_context(socket.socket())
    taken.bind((HOST, 0))
    taken.listen()
    lost = taken.getsockname()[1]
    tried: list[int] = []

    def arguments(rpc: int, metrics: int) -> list[str]:
        tried.append(rpc)
        rpc_port = lost if len(tried) == 1 else rpc
        return [f"--rpc_address={HOST}", f"--rpc_port={rpc_port}", f"--metrics_port={metrics}"]

    process, ports, _ = processes._start("mooncake_master", HOST, 2, arguments, lambda *ports: True)
    stack.callback(process.stop)
    assert len(tried) == 2
    assert ports[0] == tried[1]


def test_a_start_that_cant_succeed_says_why_with_the_programs_own_words(stack: ExitStack):
    master = start_master(HOST)
    stack.callback(master.process.stop)
    with pytest.raises(
        StoreUnavailableError, match=r"(?s)mooncake_client on 127.0.0.1.*ended by SIGABRT.*Failed"
    ):
        start_client(HOST, master.endpoint.rpc, segment_bytes=1000)


def test_an_address_that_isnt_this_machines_is_refused_by_name():
    with pytest.raises(StoreUnavailableError, match=r"192\.0\.2\.1"):
        start_master("192.0.2.1")


def test_connecting_where_no_client_runs_names_the_nodes_that_have_one(stack: ExitStack):
    master = MooncakeMaster(HOST, *PATIENCE)
    stack.callback(master.stop)
    client = MooncakeClient(HOST, master.endpoint().rpc, 32 * MIB, TransferConfig(), *PATIENCE)
    stack.callback(client.stop)
    with pytest.raises(StoreUnavailableError, match=r"10\.0\.0\.9 has no client process.*127"):
        connect(store_address(master, client), "10.0.0.9", owns_memory=False)


def test_a_process_outlives_the_thread_that_asked_for_it(stack: ExitStack):
    started: list[ManagedProcess] = []
    thread = threading.Thread(target=lambda: started.append(start_master(HOST).process))
    thread.start()
    thread.join()
    stack.callback(started[0].stop)
    time.sleep(0.3)
    assert started[0].is_running


_PARENT = """
import time
from torchspec_lib.transfer.mooncake.processes import start_client, start_master
master = start_master("127.0.0.1")
client = start_client("127.0.0.1", master.endpoint.rpc, 32 << 20)
print(master.process.pid, client.process.pid, flush=True)
time.sleep(60)
"""


def test_killing_the_parent_ends_master_and_client():
    with subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_alive(pid) for pid in pids)
        parent.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not any(is_alive(pid) for pid in pids), timeout_s=10)


def test_without_a_master_calls_end_with_an_error_instead_of_waiting_for_ever(stack: ExitStack):
    master = MooncakeMaster(HOST, *PATIENCE)
    client = MooncakeClient(HOST, master.endpoint().rpc, 32 * MIB, TransferConfig(), *PATIENCE)
    stack.callback(client.stop)
    address = store_address(master, client)
    store = connect(address, HOST, owns_memory=False, put_timeout_s=0.5, retry_timeout_s=0.5)
    stack.callback(store.close)
    ref = store.put(new_key(), {"x": torch.zeros(1000)})
    master.stop()
    with pytest.raises(StoreUnavailableError, match="get of run/"):
        store.get(ref, CPU)
    with pytest.raises(StoreUnavailableError, match="put of run/"):
        store.put(new_key(), {"x": torch.zeros(1000)})


def test_a_sample_put_on_one_node_is_read_on_another(stack: ExitStack):
    master = MooncakeMaster(HOST, *PATIENCE)
    stack.callback(master.stop)
    nodes, clients = [HOST, "127.0.0.2"], {}
    for node in nodes:
        client = MooncakeClient(node, master.endpoint().rpc, 32 * MIB, TransferConfig(), *PATIENCE)
        stack.callback(client.stop)
        clients[node] = client.address()
    address = replace(store_address(master, None), mode="client_process", clients=clients)
    here, there = (connect(address, node, owns_memory=False) for node in nodes)
    stack.callback(here.close)
    stack.callback(there.close)
    refs = [here.put(new_key(), {"x": torch.full((1000,), i)}) for i in range(10)]
    for i, ref in enumerate(refs):
        assert torch.equal(there.get(ref, CPU)["x"], torch.full((1000,), i))
    there.release([ref.key for ref in refs])
    assert allocated_bytes(address.metrics) == 0


def test_samples_of_an_engine_that_died_are_lost_not_waited_for(stack: ExitStack):
    master = MooncakeMaster(HOST, *PATIENCE)
    stack.callback(master.stop)
    address = store_address(master, client=None)
    here, there = multiprocessing.Pipe()
    engine = multiprocessing.get_context("spawn").Process(
        target=_own_a_sample, args=(address, there), daemon=True
    )
    engine.start()
    assert here.poll(80)
    ref = here.recv()
    store = connect(address, HOST, owns_memory=False)
    stack.callback(store.close)
    assert torch.equal(store.get(ref, CPU)["x"], torch.ones(1000))
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    engine.join()
    with pytest.raises(SampleLostError, match=str(ref.key)):
        store.get(ref, CPU)


def _own_a_sample(address: StoreAddress, pipe: Connection) -> None:
    store = connect(address, HOST, owns_memory=True)
    pipe.send(store.put(new_key(), {"x": torch.ones(1000)}))
    time.sleep(60)


def test_bytes_of_another_object_under_a_samples_key_are_recognised(stack: ExitStack):
    master = MooncakeMaster(HOST, *PATIENCE)
    stack.callback(master.stop)
    store = connect(store_address(master, client=None), HOST, owns_memory=True)
    stack.callback(store.close)
    ref = store.put(new_key(), {"x": torch.ones(1000)})
    store.release([ref.key])
    foreign = torch.full((ref.num_bytes,), 7, dtype=torch.uint8)
    code = store._client.put_from(str(ref.key), foreign.data_ptr(), ref.num_bytes, store._config)
    assert code == 0
    with pytest.raises(SampleLostError, match="another object"):
        store.get(ref, CPU)


def test_a_master_evicts_nothing_even_if_it_isnt_pinned_or_leased(stack: ExitStack):
    master = MooncakeMaster(HOST, *PATIENCE)
    stack.callback(master.stop)
    store = connect(store_address(master, client=None), HOST, owns_memory=True)
    stack.callback(store.close)
    client, content = store._client, torch.zeros(MIB, dtype=torch.uint8)
    keys = [str(new_key()) for _ in range(60)]
    stored = [key for key in keys if client.put_from(key, content.data_ptr(), MIB) == 0]
    time.sleep(0.5)
    assert 20 < len(stored) < 60
    assert [key for key in stored if client.get_size(key) != MIB] == []
    assert evicted_keys(master.endpoint().metrics) == 0


def resident_bytes(pid: int) -> int:
    return psutil.Process(pid).memory_info().rss


def test_a_touched_segment_is_in_memory_and_empty_up_to_half_of_what_is_free(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
):
    master = start_master(HOST)
    stack.callback(master.process.stop)
    client = start_client(HOST, master.endpoint.rpc, 64 * MIB)
    stack.callback(client.process.stop)
    before = resident_bytes(client.process.pid)
    with monkeypatch.context() as small_machine:
        memory = SimpleNamespace(available=50 * MIB)
        small_machine.setattr(psutil, "virtual_memory", lambda: memory)
        assert touch_segment(client.address, master.endpoint.metrics) == 24 * MIB
    assert 24 * MIB <= resident_bytes(client.process.pid) - before < 64 * MIB
    assert touch_segment(client.address, master.endpoint.metrics) == 64 * MIB
    assert resident_bytes(client.process.pid) - before >= 64 * MIB
    assert allocated_bytes(master.endpoint.metrics) == 0


def test_touching_stops_where_others_put_and_leaves_them_theirs(stack: ExitStack):
    master = MooncakeMaster(HOST, *PATIENCE)
    stack.callback(master.stop)
    client = MooncakeClient(HOST, master.endpoint().rpc, 32 * MIB, TransferConfig(), *PATIENCE)
    stack.callback(client.stop)
    store = connect(store_address(master, client), HOST, owns_memory=False)
    stack.callback(store.close)
    ref = store.put(new_key(), {"x": torch.full((1000,), 3)})
    held = allocated_bytes(master.endpoint().metrics)
    assert touch_segment(client.address(), master.endpoint().metrics) == 0
    assert allocated_bytes(master.endpoint().metrics) == held
    assert (store.get(ref, CPU)["x"] == 3).all()


def test_a_client_that_cant_be_touched_goes_on(stack: ExitStack, caplog: pytest.LogCaptureFixture):
    master = MooncakeMaster(HOST, *PATIENCE)
    stack.callback(master.stop)
    client = MooncakeClient(HOST, master.endpoint().rpc, 32 * MIB, TransferConfig(), *PATIENCE)
    stack.callback(client.stop)
    asyncio.run(client.touch("127.0.0.1:1"))
    assert "event=untouched" in caplog.text
    asyncio.run(client.touch(master.endpoint().metrics))
    store = connect(store_address(master, client), HOST, owns_memory=False)
    stack.callback(store.close)
    store.put(new_key(), {"x": torch.zeros(1000)})
