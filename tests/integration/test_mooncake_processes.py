"""Mooncake's processes: their start and their end."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from torchspec_lib.errors import StoreUnavailableError
from torchspec_lib.transfer.mooncake import processes
from torchspec_lib.transfer.mooncake.managed_process import ManagedProcess
from torchspec_lib.transfer.mooncake.processes import (
    allocated_bytes,
    evicted_keys,
    start_client,
    start_master,
)

pytestmark = pytest.mark.mooncake

HOST = "127.0.0.1"


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
