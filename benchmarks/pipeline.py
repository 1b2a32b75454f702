"""What the control plane costs a sample, and where the time of a whole training on the CPU goes.

``python -m benchmarks.pipeline`` prints three tables. *Plain*: controller, manager and ledger in
one asyncio loop, with engines and trainers that only answer; no Ray, no tensors. *Ray*: the same
classes as the actors of a run, so that Ray's calls are in it. *Training*: the tiny target with
everything real.
"""

import argparse
import asyncio
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from benchmarks.pipeline_training import measure_training
from torchspec_lib.controller.actors import _ControllerClient, _EngineClient
from torchspec_lib.controller.inference_manager import InferenceManager
from torchspec_lib.controller.limits import CapturePolicy
from torchspec_lib.controller.training_controller import Schedule, TrainingController
from torchspec_lib.types import (
    CaptureRequest,
    CaptureResult,
    Prompt,
    SampleKey,
    SampleRef,
    StepMetrics,
    StepReport,
)

BATCH, WORLD_SIZE, TOKENS = 32, 2, 64
NUM_SAMPLES, NUM_ENGINES = (100, 1_000, 10_000, 100_000), (1, 4, 16, 64)
METRICS = StepMetrics(1, 1.0, 1e-3, 1.0, (2,), (1,), BATCH, 4, 2, 0.1, 0.0)


@dataclass(frozen=True, slots=True)
class Cost:
    """A run's figures: ``cpu_us`` is the CPU time of all its processes over its samples."""

    num_samples: int
    num_engines: int
    seconds: float
    samples_per_s: float
    cpu_us: float


class OnePrompt:
    """A data set of prompts that differ in their ids alone."""

    def __init__(self, num_prompts: int) -> None:
        self._num_prompts = num_prompts
        self._ids = np.zeros(TOKENS, np.int32)
        self._mask = np.ones(TOKENS, np.bool_)

    def __len__(self) -> int:
        return self._num_prompts

    def __getitem__(self, index: int) -> Prompt:
        return Prompt(f"p{index}", self._ids, self._mask)


class AnsweringEngine:
    """Captures nothing, at once."""

    async def start(self, kill: bool) -> None:
        """It is up."""

    async def capture(self, requests: Sequence[CaptureRequest]) -> list[CaptureResult]:
        await asyncio.sleep(0)
        return _refs(requests)

    async def discard(self, keys: Sequence[SampleKey]) -> None:
        """There is nothing."""


class EngineProcess:
    """The same as an actor."""

    def life(self) -> str:
        return "first"

    def ping(self) -> None:
        """It is up."""

    def capture(self, _start: int, requests: Sequence[CaptureRequest]) -> list[CaptureResult]:
        return _refs(requests)


def _refs(requests: Sequence[CaptureRequest]) -> list[CaptureResult]:
    return [SampleRef(request.key, TOKENS, TOKENS, {}) for request in requests]


class ControllerProcess(TrainingController):
    """The controller as an actor."""

    def __init__(self, num_samples: int) -> None:
        super().__init__(OnePrompt(num_samples), _schedule())

    async def cpu_s(self) -> float:
        return time.process_time()


class ManagerProcess(InferenceManager):
    """The manager as an actor."""

    def __init__(self, controller: Any, engines: Sequence[Any], policy: CapturePolicy) -> None:
        clients = [_EngineClient(f"engine {i}", each, 1) for i, each in enumerate(engines)]
        super().__init__(_ControllerClient(controller), clients, policy, lambda tokens: tokens)

    async def cpu_s(self) -> float:
        return time.process_time()


def _schedule() -> Schedule:
    return Schedule("run", 0, 1, BATCH, WORLD_SIZE, TOKENS * BATCH, 0.0)


def _policy(num_engines: int, call_prompts: int, num_calls: int) -> CapturePolicy:
    window = TOKENS * call_prompts * num_calls
    return CapturePolicy(
        max_in_flight_bytes=2 * BATCH * TOKENS + num_engines * window,
        call_prompts=call_prompts,
        num_calls=num_calls,
        window_tokens=window,
        max_attempts=3,
        max_restarts=3,
        hang_timeout_s=600.0,
    )


async def _train(rank: int, controller: Any, manager: Any) -> None:
    """A rank that does nothing with its samples."""
    step = 1
    while (batches := await controller.next_step(rank, step)) is not None:
        keys = tuple(ref.key for batch in batches for ref in batch)
        await manager.release(keys)
        await controller.report(StepReport(step, rank, keys, (), METRICS if rank == 0 else None))
        step += 1


async def _plain(num_samples: int, num_engines: int, policy: CapturePolicy) -> None:
    controller = TrainingController(OnePrompt(num_samples), _schedule())
    engines = [AnsweringEngine() for _ in range(num_engines)]
    manager = InferenceManager(controller, engines, policy, lambda tokens: tokens)
    capturing = asyncio.create_task(manager.run())
    await asyncio.gather(*(_train(rank, controller, manager) for rank in range(WORLD_SIZE)))
    capturing.cancel()
    assert (await controller.finish()).num_trained == num_samples


def measure_plain(num_samples: int, num_engines: int) -> Cost:
    """A run of plain classes, in calls of 4 prompts, 2 at a time, as by default."""
    start, cpu = time.perf_counter(), time.process_time()
    asyncio.run(_plain(num_samples, num_engines, _policy(num_engines, 4, 2)))
    return _cost(num_samples, num_engines, time.perf_counter() - start, time.process_time() - cpu)


def _cost(num_samples: int, num_engines: int, seconds: float, cpu_s: float) -> Cost:
    return Cost(num_samples, num_engines, seconds, num_samples / seconds, 1e6 * cpu_s / num_samples)


class _Remote:
    """An actor whose methods are awaited like an object's."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name).remote


def measure_ray(num_samples: int, call_prompts: int, num_calls: int) -> Cost:
    """One engine; the CPU time is the controller's and the manager's."""

    def actor(cls: type, *arguments: Any) -> Any:
        return ray.remote(cls).options(num_cpus=0).remote(*arguments)

    policy = _policy(1, call_prompts, num_calls)
    engines = [actor(EngineProcess)]
    controller = actor(ControllerProcess, num_samples)
    manager = actor(ManagerProcess, controller, engines, policy)
    parts = [controller, manager]
    before = sum(ray.get([part.cpu_s.remote() for part in parts]))
    start = time.perf_counter()
    manager.run.remote()

    async def train() -> None:
        ranks = (_train(r, _Remote(controller), _Remote(manager)) for r in range(WORLD_SIZE))
        await asyncio.gather(*ranks)

    asyncio.run(train())
    seconds = time.perf_counter() - start
    cost = sum(ray.get([part.cpu_s.remote() for part in parts])) - before
    for each in [*parts, *engines]:
        ray.kill(each)
    return _cost(num_samples, 1, seconds, cost)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plain", action="store_true", help="the first table alone")
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": _machine()}
    print("plain classes\n  samples engines samples/s  CPU us/sample")
    cases = [(n, 4) for n in NUM_SAMPLES] + [(10_000, n) for n in NUM_ENGINES]
    results["plain"] = [_shown(measure_plain(*case)) for case in cases]
    if not options.plain:
        print("as Ray actors: prompts of a call, then as above; controller and manager alone")
        results["ray"] = _over_ray()
        with tempfile.TemporaryDirectory(prefix="pipeline-") as folder:
            results["training"] = measure_training(Path(folder))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2))


def _over_ray() -> list[dict[str, float]]:
    os.environ |= {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled"}
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        rows = []
        for call_prompts, num_calls in ((1, 8), (4, 2), (4, 8), (16, 8)):
            print(f"  {call_prompts:2} x {num_calls}", end=" ")
            cost = _shown(measure_ray(2_000, call_prompts, num_calls))
            rows.append({"call_prompts": call_prompts, "num_calls": num_calls, **cost})
    finally:
        ray.shutdown()
    return rows


def _shown(cost: Cost) -> dict[str, float]:
    print(
        f"{cost.num_samples:9,} {cost.num_engines:7} {cost.samples_per_s:9,.0f}",
        f"{cost.cpu_us:14.1f}",
        flush=True,
    )
    return asdict(cost)


def _machine() -> dict[str, Any]:
    packages = ("ray", "torch")
    return {
        "cores": psutil.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


if __name__ == "__main__":
    main()
