"""The controller and the manager as Ray actors: thin shells, nothing to test through Ray."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from torchspec_lib import logs
from torchspec_lib.controller.inference_manager import CapturePolicy, InferenceManager
from torchspec_lib.controller.training_controller import Schedule, TrainingController
from torchspec_lib.data.dataset import load_prompts
from torchspec_lib.plan import ClusterPlan
from torchspec_lib.ray.failures import unwrap
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.types import CaptureRequest, CaptureResult, SampleKey


class AsyncTrainingController(TrainingController):
    """The training controller over a prepared data set. An asyncio actor without a device."""

    def __init__(
        self,
        dataset_dir: str,
        folder: RunFolder,
        schedule: Schedule,
        resume_step: int,
        resume_ledger: dict[str, Any] | None,
    ) -> None:
        logs.setup("controller", level=logging.WARNING)
        self._in_use = folder.use()
        prompts = load_prompts(Path(dataset_dir))
        super().__init__(prompts, schedule, resume_step, resume_ledger, folder.append_metrics)


class AsyncInferenceManager(InferenceManager):
    """The inference manager over engine actors. An asyncio actor without a device."""

    def __init__(
        self, controller: Any, engines: Sequence[Any], policy: CapturePolicy, plan: ClusterPlan
    ) -> None:
        logs.setup("manager", level=logging.WARNING)
        clients = [_EngineClient(engine) for engine in engines]
        super().__init__(_ControllerClient(controller), clients, policy, plan.reserved_bytes)


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

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def capture(self, requests: Sequence[CaptureRequest]) -> list[CaptureResult]:
        try:
            results: list[CaptureResult] = await self._handle.capture.remote(requests)
        except ray.exceptions.RayError as error:
            raise unwrap(error) from error
        return results

    async def discard(self, keys: Sequence[SampleKey]) -> None:
        await self._handle.discard.remote(keys)
