"""Each store there is, started once for all that they promise."""

from collections.abc import Iterator

import pytest

from tests.contract.stores import CAPACITY_BYTES, HOST, MIB, PUT_TIMEOUT_S, Subject
from torchspec_lib.transfer.memory import MemoryStore
from torchspec_lib.transfer.mooncake.connect import connect
from torchspec_lib.transfer.mooncake.processes import MasterProcess, start_client, start_master
from torchspec_lib.transfer.store import StoreAddress, TensorStore


def _mooncake_address(mode: str, master: MasterProcess, clients: dict[str, str]) -> StoreAddress:
    return StoreAddress(
        run_id="run",
        mode=mode,
        protocol="tcp",
        device_name="",
        master=master.endpoint.rpc,
        metrics=master.endpoint.metrics,
        clients=clients,
        segment_bytes=CAPACITY_BYTES,
        max_sample_bytes=6 * MIB,
    )


@pytest.fixture(
    scope="package",
    params=[
        "memory",
        pytest.param("client_process", marks=pytest.mark.mooncake),
        pytest.param("embedded", marks=pytest.mark.mooncake),
    ],
)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "memory":
        yield Subject(
            MemoryStore(CAPACITY_BYTES), lambda: MemoryStore(CAPACITY_BYTES), address=None
        )
        return
    master = start_master(HOST)
    processes, clients = [master.process], {}
    if request.param == "client_process":
        client = start_client(HOST, master.endpoint.rpc, CAPACITY_BYTES)
        processes.append(client.process)
        clients[HOST] = client.address
    address = _mooncake_address(request.param, master, clients)
    store = connect(address, HOST, owns_memory=True, put_timeout_s=PUT_TIMEOUT_S)
    yield Subject(store, lambda: connect(address, HOST, owns_memory=False), address)
    store.close()
    for process in reversed(processes):
        process.stop()


@pytest.fixture
def store(subject: Subject) -> TensorStore:
    return subject.store
