"""Mooncake's programs as Ray actors, one process each. Wrap the classes with ``ray.remote``.

A process ends with its actor, also if that is killed or its driver vanishes. If the process
itself dies or hangs, it comes back at the same address, and whoever was attached attaches again
by itself. The samples it held are gone then: who asks for one learns that it is lost.

The actors are asynchronous for ``watch``: it waits as long as the run, beside other calls.
"""

import asyncio
import logging

from torchspec_lib.config.inference import TransferConfig
from torchspec_lib.errors import StoreUnavailableError
from torchspec_lib.transfer.mooncake.managed_process import ManagedProcess
from torchspec_lib.transfer.mooncake.processes import (
    MasterEndpoint,
    responds,
    start_client,
    start_master,
)
from torchspec_lib.transfer.mooncake.touch import touch_segment
from torchspec_lib.transfer.mooncake.watch import Patience, Watch
from torchspec_lib.types import Recovery

logger = logging.getLogger(__name__)

_MASTER_PAUSE_S = 0.5
_CLIENT_PAUSE_S = 10.0
"""Actors attach again only to a client process that they saw gone. They ask every second, and
what they ask fails after 4.3 s; one that is answered by the next process before believes to be
attached, and its puts fail for ever (measured with a pause of 2 s). From 7 s on all attach, but
every second put fails until the master has struck off the dead one's memory, 10 s after its
death: a shorter pause would buy failures."""


class _Program:
    """What both have in common: a program, and a watch over it."""

    _process: ManagedProcess
    _watch: Watch

    def recoveries(self) -> list[Recovery]:
        """Every time that the program was lost and came back, oldest first."""
        return self._watch.recoveries()

    async def watch(self) -> None:
        """Returns when it is stopped.

        Raises:
            StoreUnavailableError: Restarts are no use any more.
        """
        await asyncio.shield(asyncio.wrap_future(self._watch.ended))

    def stop(self) -> None:
        self._process.stop()


class MooncakeMaster(_Program):
    """The run's master. Answers once constructed."""

    def __init__(self, node_ip: str, max_restarts: int, hang_timeout_s: float) -> None:
        """Start it on ``node_ip``.

        ``max_restarts`` in a row, without a minute of being up in between; it is killed if it
        doesn't answer for ``hang_timeout_s``.
        """
        master = start_master(node_ip)
        self._process, self._endpoint = master.process, master.endpoint
        self._watch = Watch(
            master.process,
            part=f"mooncake_master on {node_ip}",
            is_up=master.is_up,
            is_silent=lambda: not responds(master.endpoint.rpc),
            patience=Patience(max_restarts, hang_timeout_s, _MASTER_PAUSE_S),
        )

    def endpoint(self) -> MasterEndpoint:
        return self._endpoint


class MooncakeClient(_Program):
    """One node's share of the store's memory, for the actors on it to attach to."""

    def __init__(
        self,
        node_ip: str,
        master: str,
        segment_bytes: int,
        transfer: TransferConfig,
        max_restarts: int,
        hang_timeout_s: float,
    ) -> None:
        """Start it on ``node_ip``. ``master`` is its RPC's ``ip:port``.

        ``max_restarts`` and ``hang_timeout_s`` are as the master's. It isn't taken to hang
        while the master doesn't answer, for which its threads may all be waiting.
        """
        client = start_client(
            node_ip, master, segment_bytes, transfer.protocol, transfer.device_name
        )
        self._process, self._address = client.process, client.address
        self._watch = Watch(
            client.process,
            part=f"mooncake_client on {node_ip}",
            is_up=client.is_up,
            is_silent=lambda: not responds(client.address) and responds(master),
            patience=Patience(max_restarts, hang_timeout_s, _CLIENT_PAUSE_S),
        )

    def address(self) -> str:
        """``ip:port``."""
        return self._address

    async def touch(self, metrics: str) -> None:
        """Have its memory ready before the first samples come; see ``touch_segment``.

        ``metrics`` is the master's HTTP, ``ip:port``. Puts work without it, if slower at first.
        """
        try:
            await asyncio.to_thread(touch_segment, self._address, metrics)
        except StoreUnavailableError as error:
            logger.warning("event=untouched client=%s error=%s", self._address, error)
