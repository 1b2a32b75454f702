"""A whole training on the tiny target, watched from outside."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.run_process import Driver, config

ROLES = {
    "ray::EngineActor": "engine",
    "ray::TrainerActor": "trainers",
    "ray::AsyncTrainingController": "controller",
    "ray::AsyncInferenceManager": "manager",
}
BATCH, NUM_PROMPTS, NUM_EPOCHS = 10, 250, 2


def measure_training(folder: Path) -> dict[str, Any]:
    """Train on 500 samples with one engine and two ranks; print and give the figures.

    What each part used of a core is its CPU time between the first look at which some step was
    done and the last, over the time between.
    """
    run = config(
        folder / "data",
        NUM_PROMPTS,
        training={
            "training_num_gpus_per_node": 2,
            "num_epochs": NUM_EPOCHS,
            "global_batch_size": BATCH,
            "compute_dtype": "float32",
        },
    )
    driver = Driver(run, folder)
    looks: list[tuple[float, int, dict[str, float]]] = []
    while driver.process.poll() is None:
        time.sleep(0.5)
        steps = _steps(run.data_path)
        cpu = _cpu_s(driver)
        if steps and set(cpu) == set(ROLES.values()):
            looks.append((time.monotonic(), len(steps), cpu))
    driver.summary()
    (start, first, before), (end, last, after) = looks[0], looks[-1]
    steps = _steps(run.data_path)[first:last]
    seconds, num_samples = end - start, sum(step["num_samples"] for step in steps)
    busy = {name: (after[name] - before[name]) / seconds for name in before}
    figures = {
        "num_samples": num_samples,
        "seconds": seconds,
        "samples_per_s": num_samples / seconds,
        "tokens_per_s": sum(step["num_tokens"] for step in steps) / seconds,
        "waiting_for_samples": sum(step["wait_s"] for step in steps) / seconds,
        "cores": busy,
        "control_plane_us": 1e6 * seconds * (busy["controller"] + busy["manager"]) / num_samples,
    }
    print("training\n" + json.dumps(figures, indent=2))
    return figures


def _steps(data: Path) -> list[dict[str, Any]]:
    metrics = next(iter(data.glob("runs/*/metrics.jsonl")), None)
    lines = metrics.read_text().splitlines(keepends=True) if metrics is not None else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _cpu_s(driver: Driver) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for process in driver.processes():
        program = process.info["cmdline"][0]
        role = next((name for title, name in ROLES.items() if title in program), None)
        if role is not None:
            with suppress(psutil.NoSuchProcess):
                used = process.cpu_times()
                seconds[role] = seconds.get(role, 0.0) + used.user + used.system
    return seconds
