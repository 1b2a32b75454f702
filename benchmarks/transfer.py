"""Engine to trainer on one node: the store beside memcpy, raw TCP and Ray's object store.

``python -m benchmarks.transfer`` starts a real master and client process, and two actors that
stand for an engine and a trainer. Every way carries the same bytes, taking turns within a round;
a figure is the median over rounds, and a ratio the median of the rounds' own ratios.

- *memcpy*: one copy within a process, by one thread; *by 3*: by as many threads as copy when the
  store is in use (the engine's, the client process's one, the trainer's)
- *put*: packing into shared memory and handing over. *borrow*: handing back, to be read.
  *get*: that and copying out to the trainer's memory
- *store*: from the engine's tensors to the trainer's memory, both ends at work at the same time
- *copying*: all four copies of that, beside *memcpy by 3*, the most that could be copied
- *TCP*: a stream over loopback. *Ray*: ``ray.put`` in one actor, and copying out in the other
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import ray

from benchmarks.transfer_sides import HOST, Reader, Writer
from torchspec_lib.transfer.mooncake.processes import MasterEndpoint, start_client, start_master
from torchspec_lib.transfer.mooncake.touch import touch_segment
from torchspec_lib.transfer.store import StoreAddress

KIB, MIB = 1 << 10, 1 << 20
SIZES = (64 * KIB, 1 * MIB, 16 * MIB, 128 * MIB)
SEGMENT_BYTES = 512 * MIB
COLD_SIZE = 16 * MIB
COLD_NUM = 28
"""Objects of a pass that leaves next to nothing of the segment untouched."""
COLD_ROUNDS = 3
BYTES_A_ROUND, MAX_OBJECTS, MIN_OBJECTS = 256 * MIB, 64, 4
NUM_COPYING_THREADS, NUM_COPIES = 3, 4
"""Of the store; see docs/architecture.md."""
COLUMNS = ("memcpy", "memcpy by 3", "put", "borrow", "get", "store", "TCP", "Ray")

PACKAGES = ("torch", "ray", *packages_distributions()["mooncake"])

Rates = dict[str, float]
"""GB/s by column."""


@contextmanager
def store_of(max_sample_bytes: int, is_touched: bool) -> Iterator[StoreAddress]:
    """A master and a client process, up for as long as the context."""
    master = start_master(HOST)
    client = start_client(HOST, master.endpoint.rpc, SEGMENT_BYTES)
    try:
        if is_touched:
            touch_segment(client.address, master.endpoint.metrics)
        yield _address(master.endpoint, client.address, max_sample_bytes)
    finally:
        client.process.stop()
        master.process.stop()


def _address(master: MasterEndpoint, client: str, max_sample_bytes: int) -> StoreAddress:
    return StoreAddress(
        run_id="run",
        mode="client_process",
        protocol="tcp",
        device_name="",
        master=master.rpc,
        metrics=master.metrics,
        clients={HOST: client},
        segment_bytes=SEGMENT_BYTES,
        max_sample_bytes=max_sample_bytes,
    )


def first_pass(writer: Any, is_touched: bool) -> tuple[float, float]:
    """GB/s of the first puts into a new segment, and of the second ones."""
    with store_of(COLD_SIZE + MIB, is_touched) as address:
        ray.get(writer.attach.remote(address))
        seconds = [ray.get(writer.put.remote(COLD_SIZE, COLD_NUM, held=COLD_NUM)) for _ in range(2)]
        ray.get(writer.leave.remote())
    first, second = (COLD_NUM * COLD_SIZE / each / 1e9 for each in seconds)
    return first, second


def one_round(writer: Any, reader: Any, size: int) -> Rates:
    """All ways once."""
    num = max(MIN_OBJECTS, min(MAX_OBJECTS, BYTES_A_ROUND // size))
    both: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "store": (writer.send.remote, reader.receive.remote),
        "TCP": (writer.send_raw.remote, reader.receive_raw.remote),
    }
    seconds = {
        "memcpy": ray.get(writer.memcpy.remote(size, num, 1)),
        "memcpy by 3": ray.get(writer.memcpy.remote(size, num, NUM_COPYING_THREADS)),
        "put": ray.get(writer.put.remote(size, num, held=1)),
    }
    seconds["borrow"], seconds["get"] = ray.get(reader.get.remote(size, num))
    for name, (send, receive) in both.items():
        received = receive(size, num)
        seconds[name] = ray.get(send(size, num))
        ray.get(received)
    seconds["Ray"] = ray.get(writer.send_objects.remote(size, num, reader))
    return {name: num * size / seconds[name] / 1e9 for name in COLUMNS}


def report(size: int, rounds: list[Rates]) -> dict[str, Any]:
    """Medians, and each way's share of one thread's memcpy."""
    return {
        "bytes": size,
        "GB/s": {name: _median(each[name] for each in rounds) for name in COLUMNS},
        "of memcpy": {
            name: _median(each[name] / each["memcpy"] for each in rounds) for name in COLUMNS
        },
        "copying": _median(NUM_COPIES * each["store"] / each["memcpy by 3"] for each in rounds),
    }


def _median(values: Iterator[float]) -> float:
    return round(statistics.median(values), 3)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes of a sample")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init("local", num_cpus=2, object_store_memory=SEGMENT_BYTES, include_dashboard=False)
    writer, reader = (
        ray.remote(num_cpus=0, max_concurrency=1)(side).remote(max(*args.sizes, COLD_SIZE))
        for side in (Writer, Reader)
    )
    ports = ray.get(writer.ports.remote())
    ray.get([writer.accept.remote(), reader.dial.remote(*ports)])
    cold = {
        name: [first_pass(writer, is_touched) for _ in range(min(args.rounds, COLD_ROUNDS))]
        for name, is_touched in (("as it comes", False), ("touched at start", True))
    }
    results = {
        "versions": {name: version(name) for name in PACKAGES},
        "cold": {
            name: {"first": _median(a for a, _ in passes), "second": _median(b for _, b in passes)}
            for name, passes in cold.items()
        },
        "sizes": [],
    }
    with store_of(max(args.sizes) + MIB, is_touched=True) as address:
        ray.get([side.attach.remote(address) for side in (writer, reader)])
        rounds = [
            {size: one_round(writer, reader, size) for size in args.sizes}
            for _ in range(args.rounds)
        ]
        ray.get([side.leave.remote() for side in (writer, reader)])
    results["sizes"] = [report(size, [each[size] for each in rounds]) for size in args.sizes]
    show(results)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1))
    ray.shutdown()


def show(results: dict[str, Any]) -> None:
    """The tables."""
    print("GB/s, and the share of one thread's memcpy")
    print(f"{'bytes':>12}" + "".join(f"{name:>16}" for name in (*COLUMNS, "copying")))
    for row in results["sizes"]:
        cells = (f"{row['GB/s'][name]:8.2f} {row['of memcpy'][name]:6.0%}" for name in COLUMNS)
        line = f"{row['bytes']:12,}" + "".join(f"{cell:>16}" for cell in cells)
        print(f"{line}{row['copying']:16.0%}")
    print(f"\nputs of {COLD_SIZE:,} bytes into a new segment, GB/s: first pass, second pass")
    for name, passes in results["cold"].items():
        print(f"{name:>18} {passes['first']:8.2f} {passes['second']:8.2f}")


if __name__ == "__main__":
    main()
