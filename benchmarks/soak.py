"""Memory of a long run of 10,000 samples: of every process, and what the store holds.

``python -m benchmarks.soak`` trains a tiny draft on short prompts and prints a table as it goes.
Growth is what the last fifth of the run has more than the second: the first is warm-up.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from tests.run_process import Driver, config
from torchspec_lib.transfer.mooncake.processes import allocated_bytes

MIB = 1 << 20
NUM_PROMPTS, NUM_EPOCHS, BATCH = 1000, 10, 10
NUM_ROWS = 20
ROLES = {
    "ray::EngineActor": "engine",
    "ray::TrainerActor": "trainer",
    "ray::AsyncTrainingController": "controller",
    "ray::AsyncInferenceManager": "manager",
    "mooncake_master": "master",
    "mooncake_client": "client",
    "raylet": "raylet",
    "gcs_server": "gcs",
}

Row = dict[str, float]


def memory(driver: Driver) -> Row:
    """MiB by process; trainers are told apart, what the store holds comes last."""
    sizes: Row = {"driver": psutil.Process(driver.process.pid).memory_info().rss / MIB}
    store = 0.0
    for process in sorted(driver.processes(), key=lambda p: p.pid):
        with suppress(psutil.NoSuchProcess):
            program = process.info["cmdline"][0]
            role = next((name for title, name in ROLES.items() if title in program), None)
            if role is None:
                continue
            while role in sizes:
                role += "'"
            # Shared pages are the store's, which is counted by itself.
            sizes[role] = (process.memory_info().rss - process.memory_info().shared) / MIB
            if role == "master":
                store = allocated_bytes(_metrics_address(process.cmdline())) / MIB
    return sizes | {"store": store}


def _metrics_address(command: list[str]) -> str:
    flags = dict(part.lstrip("-").split("=", 1) for part in command if "=" in part)
    return f"{flags['metrics_host']}:{flags['metrics_port']}"


def growth(rows: list[Row]) -> Mapping[str, float]:
    """MiB that the mean of the last fifth has over that of the second."""
    fifth = len(rows) // 5

    def mean(name: str, part: list[Row]) -> float:
        return sum(row.get(name, 0.0) for row in part) / len(part)

    second, last = rows[fifth : 2 * fifth], rows[-fifth:]
    return {name: mean(name, last) - mean(name, second) for name in rows[-1]}


def main() -> None:
    """Train, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=NUM_EPOCHS)
    num_epochs = parser.parse_args().epochs
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        run = config(
            Path(folder) / "data",
            NUM_PROMPTS,
            training={
                "training_num_gpus_per_node": 2,
                "num_epochs": num_epochs,
                "global_batch_size": BATCH,
                "compute_dtype": "float32",
                "checkpoint_interval": 50,
            },
            transfer={"max_in_flight_bytes": 32 * MIB},
        )
        soak(Driver(run, Path(folder)), run.data_path, NUM_PROMPTS * num_epochs)


def soak(driver: Driver, data: Path, num_samples: int) -> None:
    """Print a row now and then until the run is over."""
    rows: list[Row] = []
    header: list[str] = []
    while driver.process.poll() is None:
        time.sleep(0.5)
        metrics = next(iter(data.glob("runs/*/metrics.jsonl")), None)
        done = BATCH * metrics.read_text().count("\n") if metrics is not None else 0
        if done <= num_samples * len(rows) / NUM_ROWS:
            continue
        row = memory(driver)
        if not header:
            header = list(row)
            print("resident MiB\n" + " ".join(f"{name:>10}" for name in ["samples", *header]))
        rows.append(row)
        figures = " ".join(f"{row.get(name, 0.0):10.1f}" for name in header)
        print(f"{done:10} {figures}", flush=True)
    print(f"{'growth':>10} " + " ".join(f"{growth(rows)[name]:10.1f}" for name in header))
    summary = driver.summary()
    print(f"{summary['num_trained']} trained, {summary['num_rejected']} rejected")


if __name__ == "__main__":
    main()
