"""Takes all the room of a store for a while, as another run's leftovers would.

``python -m tests.fill_store HOST:PORT SECONDS`` attaches to the client process at that address.
"""

import secrets
import sys
import time

from torchspec_lib.transfer.mooncake.library import load_library

PIECE_BYTES, FULL = 1 << 20, -200


def main(client_process: str, seconds: float) -> None:
    library = load_library()
    client, config = library.MooncakeDistributedStore(), library.ReplicateConfig()
    config.with_hard_pin = True
    if client.setup_dummy(0, 0, client_process) != 0:
        sys.exit(f"no client process at {client_process}")
    piece = client.alloc_from_mem_pool(PIECE_BYTES)
    client.register_buffer(piece, PIECE_BYTES)
    prefix, keys = secrets.token_hex(4), []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:  # what is released meanwhile is taken too
        key = f"junk-{prefix}/{len(keys)}"
        if client.put_from(key, piece, PIECE_BYTES, config) == 0:
            keys.append(key)
        else:
            time.sleep(0.005)
    client.batch_remove(keys, True)
    client.close()
    if not keys:
        sys.exit("nothing could be put")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
