"""Mooncake's programs as Ray actors, one process each. Wrap the classes with ``ray.remote``.

A process ends with its actor, also if that is killed or its driver vanishes. If the process
itself dies, it comes back at the same address, and whoever was attached attaches again by
itself. The samples it held are gone then: who asks for one learns that it is lost.
"""

from torchspec_lib.config import TransferConfig
from torchspec_lib.transfer.mooncake.processes import MasterEndpoint, start_client, start_master

_MAX_RESTARTS = 3
_MASTER_PAUSE_S = 0.5
_CLIENT_PAUSE_S = 10.0
"""Actors attach again only to a client process that they saw gone. They ask every second, and
an answer may be 4.3 s in coming: after a shorter pause they wouldn't have noticed. By now the
master has struck off the old one's memory too, so that no sample goes there."""


class MooncakeMaster:
    """The run's master. Answers once constructed."""

    def __init__(self, node_ip: str) -> None:
        self._master = start_master(node_ip)
        self._master.process.keep_running(_MAX_RESTARTS, _MASTER_PAUSE_S)

    def endpoint(self) -> MasterEndpoint:
        return self._master.endpoint

    def stop(self) -> None:
        self._master.process.stop()


class MooncakeClient:
    """One node's share of the store's memory, for the actors on it to attach to."""

    def __init__(
        self, node_ip: str, master: str, segment_bytes: int, transfer: TransferConfig
    ) -> None:
        """``master`` is its RPC's ``ip:port``."""
        self._client = start_client(
            node_ip, master, segment_bytes, transfer.protocol, transfer.device_name
        )
        self._client.process.keep_running(_MAX_RESTARTS, _CLIENT_PAUSE_S)

    def address(self) -> str:
        """``ip:port``."""
        return self._client.address

    def stop(self) -> None:
        self._client.process.stop()
