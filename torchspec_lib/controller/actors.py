"""The controller and the manager as Ray actors: thin shells, nothing to test through Ray."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError

from torchspec_lib import logs
from torchspec_lib.controller.inference_manager import InferenceManager
from torchspec_lib.controller.limits import CapturePolicy
from torchspec_lib.controller.training_controller import Schedule, TrainingController
from torchspec_lib.data.dataset import load_prompts
from torchspec_lib.data.set_aside import TrainedPrompts, set_aside
from torchspec_lib.errors import HungError, WorkerLostError
from torchspec_lib.plan import ClusterPlan
from torchspec_lib.ray.failures import unwrap
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.types import CaptureRequest, CaptureResult, SampleKey

START_TIMEOUT_S = 1800.0
"""For an engine to come back: a very large target takes long to load."""
PAUSE_S = 0.2


class AsyncTrainingController(TrainingController):
    """The training controller over a prepared data set. An asyncio actor without a device."""

    def __init__(
        self,
        dataset_dir: str,
        folder: RunFolder,
        schedule: Schedule,
        num_set_aside: int,
        resume_step: int,
        resume_ledger: dict[str, Any] | None,
    ) -> None:
        """All prompts in ``dataset_dir`` are trained on, but for those set aside."""
        logs.setup("controller", level=logging.WARNING)
        self._in_use = folder.use()
        stored = load_prompts(Path(dataset_dir))
        prompts = TrainedPrompts(stored, set_aside(len(stored), num_set_aside, schedule.seed))
        super().__init__(prompts, schedule, resume_step, resume_ledger, folder.append_metrics)


class AsyncInferenceManager(InferenceManager):
    """The inference manager over engine actors. An asyncio actor without a device."""

    def __init__(
        self,
        controller: Any,
        engines: Sequence[Any],
        start: int,
        policy: CapturePolicy,
        plan: ClusterPlan,
        folder: RunFolder,
    ) -> None:
        """``start`` counts how often the run's trainers were started."""
        logs.setup("manager", level=logging.WARNING)
        self._in_use = folder.use()
        clients = [_EngineClient(f"engine {i}", each, start) for i, each in enumerate(engines)]
        super().__init__(
            _ControllerClient(controller),
            clients,
            policy,
            plan.reserved_bytes,
            folder.append_recovery,
        )


class _ControllerClient:
    """A controller's handle as the protocol that the manager asks for."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def take(self, max_prompts: int) -> list[CaptureRequest]:
        taken: list[CaptureRequest] = await self._handle.take.remote(max_prompts)
        return taken

    async def deliver(self, results: Sequence[CaptureResult]) -> None:
        await self._handle.deliver.remote(results)


class _EngineClient:
    """An engine's handle as the protocol that the manager asks for."""

    def __init__(self, name: str, handle: Any, start: int) -> None:
        self._name, self._handle, self._start = name, handle, start
        self._life: str | None = None
        """Of the engine that was started last."""

    async def capture(self, requests: Sequence[CaptureRequest]) -> list[CaptureResult]:
        results: list[CaptureResult] = await self._answer(
            self._handle.capture.remote(self._start, requests)
        )
        return results

    async def discard(self, keys: Sequence[SampleKey]) -> None:
        await self._answer(self._handle.discard.remote(keys))

    async def start(self, kill: bool) -> None:
        lost = self._life if kill else None  # may still answer for a moment
        if kill:
            ray.kill(self._handle, no_restart=False)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while (life := await self._current_life()) in (None, lost):
                    await asyncio.sleep(PAUSE_S)
        except TimeoutError:
            raise HungError(self._name, f"not up after {START_TIMEOUT_S:.0f} s") from None
        self._life = life
        await self._answer(self._handle.ping.remote())

    async def _current_life(self) -> str | None:
        """Waits for an actor that is starting; None for one that is just ending."""
        try:
            life: str = await self._answer(self._handle.life.remote())
        except WorkerLostError as error:
            if isinstance(error.__cause__, ActorUnavailableError):
                return None
            raise
        return life

    async def _answer(self, call: Any) -> Any:
        try:
            return await call
        except RayError as error:
            raise unwrap(error, self._name) from error
