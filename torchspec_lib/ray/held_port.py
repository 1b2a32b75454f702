"""Ports that are chosen before their listener starts."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hold_port() -> Iterator[int]:
    """A TCP port of this node that goes to nobody but a listener that asks for it by number.

    A port that is merely found free can be lost before it is used. This one may stay held until
    its listener is there, which sets SO_REUSEADDR as servers do. Where a listener can choose its
    port itself (port 0), let it.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("", 0))
        yield held.getsockname()[1]
