"""Attaches a process to a run's Mooncake store.

Two ways, alike from then on. ``client_process``: a client process on the node owns the memory
and is reached through shared memory. ``embedded``: the calling process takes part itself, and
bytes cross processes over the network.

A process that has connected must not fork: a forked child hangs at its first call.
"""

import ctypes
import logging
import time
from typing import Any

import torch

from torchspec_lib.errors import StoreUnavailableError
from torchspec_lib.transfer.mooncake.library import load_library
from torchspec_lib.transfer.mooncake.store import (
    PUT_TIMEOUT_S,
    RETRY_TIMEOUT_S,
    MooncakeStore,
    unavailable,
)
from torchspec_lib.transfer.store import StoreAddress

logger = logging.getLogger(__name__)

_NUM_BUFFERS = 3
_MIN_BUFFER_BYTES = 4 << 20
"""So that an engine's self-check fits where all prompts are tiny."""
_CONNECT_TIMEOUT_S, _PAUSE_S = 60.0, 1.0


def connect(
    address: StoreAddress,
    node_ip: str,
    owns_memory: bool,
    put_timeout_s: float = PUT_TIMEOUT_S,
    retry_timeout_s: float = RETRY_TIMEOUT_S,
    connect_timeout_s: float = _CONNECT_TIMEOUT_S,
) -> MooncakeStore:
    """Attach this process to the run's store, which may just be coming back.

    Args:
        address: The run's store.
        node_ip: This node's address, as in ``address.clients``.
        owns_memory: In embedded mode, whether this process contributes a segment.
        put_timeout_s: How long a put waits for room.
        retry_timeout_s: How long a master or client process that is away is waited for later.
        connect_timeout_s: How long it is waited for now.

    The time-outs end the asking, not the call that is under way. Any put, get, release or clear,
    with 0.5 s and 1 s, took at most 4.5 s with the master or the client process dead, 5.0 s with
    the master frozen (``MC_RPC_TIMEOUT_MS``), and 30 s with the client process frozen: for that
    one Mooncake has no setting. It ends earlier if the process is killed for its silence.

    Raises:
        DependencyError: Mooncake or a system library isn't installed.
        StoreUnavailableError: The store isn't there.
    """
    if address.mode == "client_process" and node_ip not in address.clients:
        nodes = ", ".join(address.clients) or "no node"
        raise StoreUnavailableError("connect", f"{node_ip} has no client process, but {nodes}")
    deadline = time.monotonic() + connect_timeout_s
    while True:
        try:
            client, buffers, config = _connect(address, node_ip, owns_memory)
            break
        except StoreUnavailableError as error:
            if time.monotonic() > deadline:
                raise
            logger.warning("event=store_away error=%s", error)
            time.sleep(_PAUSE_S)
    return MooncakeStore(
        client, buffers, address.segment_bytes, config, put_timeout_s, retry_timeout_s
    )


def _connect(
    address: StoreAddress, node_ip: str, owns_memory: bool
) -> tuple[Any, list[torch.Tensor], Any]:
    """A client that is attached, the buffers that it knows, and how it shall put."""
    library = load_library()
    client, config = library.MooncakeDistributedStore(), library.ReplicateConfig()
    config.with_hard_pin = True
    size = max(address.max_sample_bytes, _MIN_BUFFER_BYTES)
    if address.mode == "client_process":
        _attach_to_client(client, address.clients[node_ip])
        buffers = [_shared_buffer(client, size) for _ in range(_NUM_BUFFERS)]
    else:
        _take_part(client, address, node_ip, owns_memory)
        buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(_NUM_BUFFERS)]
        if owns_memory:
            config.preferred_segment = client.get_hostname()
    for buffer in buffers:
        _check_connected(client.register_buffer(buffer.data_ptr(), size), address.master)
    return client, buffers, config


def _attach_to_client(client: Any, server: str) -> None:
    # No pool and no local buffer: both serve calls that copy, and buffers are allocated apart.
    _check_connected(client.setup_dummy(0, 0, server), f"the client process {server}")


def _shared_buffer(client: Any, size: int) -> torch.Tensor:
    pointer = client.alloc_from_mem_pool(size)
    if pointer == 0:
        raise StoreUnavailableError("connect", f"no {size:,} bytes of shared memory")
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(pointer), dtype=torch.uint8)


def _take_part(client: Any, address: StoreAddress, node_ip: str, owns_memory: bool) -> None:
    code = client.setup(
        local_hostname=node_ip,
        metadata_server="P2PHANDSHAKE",
        global_segment_size=address.segment_bytes if owns_memory else 0,
        local_buffer_size=0,
        protocol=address.protocol,
        rdma_devices=address.device_name,
        master_server_addr=address.master,
    )
    _check_connected(code, f"the master {address.master}")


def _check_connected(code: int, peer: str) -> None:
    if code != 0:
        raise unavailable(f"connect to {peer}", code)
