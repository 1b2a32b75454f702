"""Takes a client process's memory from the system before samples need it.

A segment is only a promise at first: the system finds a page when it is written to for the first
time, and a put into such pages takes several times as long. So the segment is filled once and
emptied again, while the engines load their targets. Memory that was touched stays with the
client process, as it would have after the first samples.
"""

import logging
import re
import time
from typing import Any

import psutil

from torchspec_lib.errors import StoreUnavailableError
from torchspec_lib.transfer.mooncake.library import load_library, muted_stderr
from torchspec_lib.transfer.mooncake.processes import segment_of, used_bytes

logger = logging.getLogger(__name__)

BLOCK_BYTES = 4 << 20
_BLOCKS_BETWEEN_LOOKS = 16
_MAX_SHARE_OF_FREE_MEMORY = 0.5
_REMOVE_ATTEMPTS, _REMOVE_PAUSE_S = 60, 1.0


def touch_segment(client: str, metrics: str) -> int:
    """Write once to the memory of ``client`` (``ip:port``), the only one on its node.

    To the whole segment, or to half of the memory that the node has free now if that is less.
    Stops when somebody else puts, so that nobody waits for room that this takes.

    Args:
        client: The client process's address.
        metrics: The master's HTTP metrics, ``ip:port``.

    Returns:
        The bytes that were touched.

    Raises:
        DependencyError: Mooncake or a system library isn't installed.
        StoreUnavailableError: The client or the master doesn't answer.
    """
    start, prefix = time.monotonic(), f"touch/{client}"
    segment = segment_of(client.rsplit(":", 1)[0], metrics)
    library = load_library()
    config = library.ReplicateConfig()
    config.preferred_segment = segment.name
    store = library.MooncakeDistributedStore()
    if store.setup_dummy(0, 0, client) != 0:
        raise StoreUnavailableError("touching its memory", f"{client} doesn't answer")
    block = store.alloc_from_mem_pool(BLOCK_BYTES)
    store.register_buffer(block, BLOCK_BYTES)
    free = int(psutil.virtual_memory().available * _MAX_SHARE_OF_FREE_MEMORY)
    touched = 0
    try:
        while touched + BLOCK_BYTES <= min(segment.num_bytes, free):
            looks = touched % (_BLOCKS_BETWEEN_LOOKS * BLOCK_BYTES) == 0
            if looks and used_bytes(segment, metrics) > touched:
                break
            if store.put_from(f"{prefix}/{touched}", block, BLOCK_BYTES, config) != 0:
                break
            touched += BLOCK_BYTES
    finally:
        _empty(store, prefix)
        with muted_stderr():
            store.close()
    seconds = time.monotonic() - start
    logger.info("event=touched client=%s bytes=%d seconds=%.2f", client, touched, seconds)
    return touched


def _empty(store: Any, prefix: str) -> None:
    """Remove what was put, also if the store doesn't answer for a while.

    Raises:
        StoreUnavailableError: It stays away. Its programs' end, or their restart, frees all.
    """
    for _ in range(_REMOVE_ATTEMPTS):
        code = store.remove_by_regex(f"^{re.escape(prefix)}/", True)
        if code >= 0:
            return
        time.sleep(_REMOVE_PAUSE_S)
    raise StoreUnavailableError("touching its memory", f"Mooncake's code is {code}")
