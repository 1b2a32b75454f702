"""Mooncake's two programs: the master, and a client that owns memory. And what they report."""

import errno
import json
import logging
import secrets
import socket
import struct
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torchspec_lib.errors import StoreUnavailableError
from torchspec_lib.transfer.mooncake.library import missing_dependency
from torchspec_lib.transfer.mooncake.managed_process import ManagedProcess

logger = logging.getLogger(__name__)

_START_ATTEMPTS = 3
_START_TIMEOUT_S = 60.0
_HTTP_TIMEOUT_S = 5.0
_PORTS = range(20_000, 32_000)
"""Out of the system's own range (from 32,768 on by default): any outgoing connection might get
a port of that one while the program it belongs to is being restarted."""
_CLIENT_THREADS = 8
"""Each call occupies one, for 5 s while the master is away; the others queue up behind."""
_PROBE_TIMEOUT_S = 2.0
_PROBE = struct.pack("<4B4I", 21, 0, 0, 0, 0, 0, 0, 0)
"""Mooncake's RPC (yalantinglibs' coro_rpc): magic number, version, serialization, message type,
sequence number, function, body bytes, attachment bytes. No function has the id 0."""


@dataclass(frozen=True, slots=True)
class MasterEndpoint:
    """Where a master listens, as ``ip:port``."""

    rpc: str
    metrics: str


@dataclass(frozen=True, slots=True)
class MasterProcess:
    """A master that answers."""

    process: ManagedProcess
    endpoint: MasterEndpoint
    is_up: Callable[[], bool]
    """Whether it answers on its ports."""


@dataclass(frozen=True, slots=True)
class ClientProcess:
    """A client whose memory belongs to the store, and to which actors on its node attach."""

    process: ManagedProcess
    address: str
    """``ip:port``."""
    is_up: Callable[[], bool]
    """Whether it answers on its port, and hands out shared memory."""


def start_master(host: str) -> MasterProcess:
    """Start a master on free ports of ``host``, an IP address; it answers when this returns.

    It never evicts: by default it would drop samples that nobody has read, without a word.

    Raises:
        DependencyError: The program or a system library is missing.
        StoreUnavailableError: It doesn't start.
    """

    def arguments(rpc: int, metrics: int) -> list[str]:
        return [
            f"--rpc_address={host}",
            f"--rpc_port={rpc}",
            f"--metrics_host={host}",
            f"--metrics_port={metrics}",
            "--eviction_high_watermark_ratio=1.0",
            "--eviction_ratio=0",
            "--default_kv_lease_ttl=300s",
            "--client_ttl=10",
            "--put_start_discard_timeout_sec=30",
            "--put_start_release_timeout_sec=60",
            "--rpc_thread_num=4",
            "--enable_metric_reporting=false",
        ]

    def is_ready(rpc: int, metrics: int) -> bool:
        try:
            health = _http_get(f"{host}:{metrics}", "/health")
        except StoreUnavailableError:
            return False
        return '"service_ready":true' in health.replace(" ", "") and responds(f"{host}:{rpc}")

    process, (rpc, metrics), is_up = _start("mooncake_master", host, 2, arguments, is_ready)
    return MasterProcess(process, MasterEndpoint(f"{host}:{rpc}", f"{host}:{metrics}"), is_up)


def start_client(
    host: str, master: str, segment_bytes: int, protocol: str = "tcp", device_name: str = ""
) -> ClientProcess:
    """Start a client on ``host``, this node's IP address, that lends ``segment_bytes``.

    Args:
        host: The address that other nodes reach this one by.
        master: The master's RPC, ``ip:port``.
        segment_bytes: At least 16 MiB. Taken from the system where it is written to.
        protocol: ``tcp`` or ``rdma``, between nodes.
        device_name: The RDMA devices, comma-separated.

    Raises:
        DependencyError: The program or a system library is missing.
        StoreUnavailableError: It doesn't start, or can't reach the master.
    """

    def arguments(port: int) -> list[str]:
        return [
            f"--host={host}",
            f"--port={port}",
            f"--global_segment_size={segment_bytes}",
            f"--master_server_address={master}",
            "--metadata_server=P2PHANDSHAKE",
            f"--protocol={protocol}",
            f"--device_names={device_name}",
            f"--threads={_CLIENT_THREADS}",
        ]

    def is_ready(port: int) -> bool:
        """Whether it has also opened the socket that hands out shared memory."""
        unix_sockets = Path("/proc/net/unix").read_text()
        return f"@mooncake_client_{port}.sock" in unix_sockets and responds(f"{host}:{port}")

    process, (port,), is_up = _start("mooncake_client", host, 1, arguments, is_ready)
    return ClientProcess(process, f"{host}:{port}", is_up)


def responds(rpc: str) -> bool:
    """Whether the threads behind a program's RPC port ``rpc`` (``ip:port``) are at work.

    Calls a function that doesn't exist; the refusal comes from those threads, in 0.1 ms, and
    asks no other program. (A client asked for anything real would wait for the master: to the
    one who asks, a client that hangs and a master that hangs look alike.) A process that is
    stopped still accepts the connection, but says nothing.
    """
    host, port = rpc.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), _PROBE_TIMEOUT_S) as connection:
            connection.sendall(_PROBE)
            return connection.recv(1) != b""
    except OSError:
        return False


def evicted_keys(metrics: str) -> int:
    """Samples that the master at ``metrics`` (``ip:port``) dropped by itself; must be 0."""
    return _metric(metrics, "master_evicted_key_count")


def allocated_bytes(metrics: str) -> int:
    """Bytes of the store that samples take now."""
    return _metric(metrics, "master_allocated_bytes")


@dataclass(frozen=True, slots=True)
class Segment:
    """Memory that a process lends to the store."""

    name: str
    num_bytes: int


def segment_of(host: str, metrics: str) -> Segment:
    """The segment that the process on ``host`` lends, as the master at ``metrics`` knows it.

    Raises:
        StoreUnavailableError: The master doesn't answer, or knows of none.
    """
    for segment in json.loads(_http_get(metrics, "/get_segments_detail"))["segments"]:
        if segment["segment_name"].startswith(f"{host}:"):
            return Segment(segment["segment_name"], segment["size_bytes"])
    raise StoreUnavailableError(f"segments at {metrics}", f"none is lent by {host}")


def used_bytes(segment: Segment, metrics: str) -> int:
    """Bytes of ``segment`` that samples take now."""
    return _metric(metrics, f'segment_allocated_bytes{{segment="{segment.name}"}}')


def _start(
    program: str,
    host: str,
    num_ports: int,
    arguments: Callable[..., list[str]],
    is_ready: Callable[..., bool],
) -> tuple[ManagedProcess, list[int], Callable[[], bool]]:
    """Start ``program``; on other ports if it exits, since another process may be faster.

    Ready means that it listens on all its ports itself: for a moment a master reports to be
    well even if its RPC port is someone else's. Returns the check for that too.
    """

    def is_up(process: ManagedProcess, ports: list[int]) -> bool:
        return set(ports) <= process.listening_ports() and is_ready(*ports)

    deadline = time.monotonic() + _START_TIMEOUT_S
    for attempt in range(1, _START_ATTEMPTS + 1):
        ports = _free_ports(host, num_ports)
        process = ManagedProcess(program, arguments(*ports))
        check = partial(is_up, process, ports)
        if process.wait_until(check, deadline - time.monotonic()):
            logger.info("event=started program=%s pid=%d ports=%s", program, process.pid, ports)
            return process, ports, check
        words, gave_up = process.last_words(), process.is_running
        process.stop()
        if "error while loading shared libraries" in words:
            raise missing_dependency(words)
        if gave_up:
            break
        logger.warning("event=start_failed attempt=%d cause=%s", attempt, words)
    raise StoreUnavailableError(f"start of {program} on {host}", words)


def _free_ports(host: str, num: int) -> list[int]:
    ports: list[int] = []
    for port in secrets.SystemRandom().sample(_PORTS, len(_PORTS)):
        if len(ports) == num:
            break
        try:
            with socket.socket() as free:
                free.bind((host, port))
            ports.append(port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise StoreUnavailableError(
                    f"search for a free port on {host}", str(error)
                ) from error
    return ports


def _metric(metrics: str, name: str) -> int:
    for line in _http_get(metrics, "/metrics").splitlines():
        if line.startswith(f"{name} "):
            return int(float(line.split()[1]))
    raise StoreUnavailableError(f"metrics at {metrics}", f"no {name} among them")


def _http_get(address: str, path: str) -> str:
    # A proxy of the environment is for the world outside, not for our own nodes.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}{path}", timeout=_HTTP_TIMEOUT_S) as reply:
            content: bytes = reply.read()
    except OSError as error:
        raise StoreUnavailableError(f"GET http://{address}{path}", str(error)) from error
    return content.decode()
