"""Stores over Mooncake's processes: other nodes, lost parts, foreign bytes, touched segments."""

import asyncio
import multiprocessing
import os
import signal
import time
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from types import SimpleNamespace

import psutil
import pytest
import torch

from torchspec_lib.config.inference import TransferConfig
from torchspec_lib.errors import SampleLostError, StoreUnavailableError
from torchspec_lib.transfer.mooncake.connect import connect
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


def test_connecting_where_no_client_runs_names_the_nodes_that_have_one(stack: ExitStack):
    master = MooncakeMaster(HOST, *PATIENCE)
    stack.callback(master.stop)
    client = MooncakeClient(HOST, master.endpoint().rpc, 32 * MIB, TransferConfig(), *PATIENCE)
    stack.callback(client.stop)
    with pytest.raises(StoreUnavailableError, match=r"10\.0\.0\.9 has no client process.*127"):
        connect(store_address(master, client), "10.0.0.9", owns_memory=False)


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
