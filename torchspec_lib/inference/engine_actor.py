"""The Ray actor around an engine."""

import logging
import os
from collections.abc import Sequence
from functools import partial

from torchspec_lib.config.run import RunConfig
from torchspec_lib.errors import RecoverableError, StoreFullError
from torchspec_lib.inference.factory import EngineSpec, build_engine
from torchspec_lib.inference.start_fence import StartFence
from torchspec_lib.ray.ray_actor import RayActor
from torchspec_lib.transfer.mooncake.connect import connect
from torchspec_lib.types import CaptureRequest, CaptureResult, SampleKey

logger = logging.getLogger(__name__)

MAX_STORE_PATIENCE_S = 20.0


class EngineActor(RayActor):
    """One engine and its place in the store. Checked and ready once constructed.

    It outlives the trainers and the manager that it captures for.
    """

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__("engine", spec.rank, spec.run.cluster.device)
        try:
            self._open(spec)
        except (RecoverableError, StoreFullError) as error:
            if not self.is_restarted:
                raise
            # Ray starts an actor again whose process died, but not one whose constructor raised.
            logger.error("event=engine_start_failed engine=%d cause=%s", spec.rank, error)  # noqa: TRY400
            os._exit(1)
        if self.is_restarted:
            logger.warning("event=recovered part=%r", f"engine {spec.rank}")

    def _open(self, spec: EngineSpec) -> None:
        patience_s = _store_patience_s(spec.run)
        attach = partial(
            connect,
            spec.store_address,
            self.node_ip,
            put_timeout_s=patience_s,
            retry_timeout_s=patience_s,
        )
        self._store = attach(owns_memory=True)
        self._fence = StartFence(self._store, spec.store_address.run_id)
        engine_attaches = partial(attach, owns_memory=False)
        self._engine = build_engine(spec, self._store, self.device, engine_attaches)
        check = self._engine.self_check()
        logger.info(
            "event=self_check tokens=%d max_relative_error=%.2e argmax_agreement=%.3f",
            check.num_tokens,
            check.max_relative_error,
            check.argmax_agreement,
        )

    def capture(self, start: int, requests: Sequence[CaptureRequest]) -> list[CaptureResult]:
        """Capture for the manager of the run's ``start``-th start of trainers.

        Raises:
            EngineError: The engine is unusable, or works for a later start already.
            StoreUnavailableError: What an earlier start left couldn't be freed.
        """
        self._fence.enter(start)
        return self._engine.capture(requests)

    def discard(self, keys: Sequence[SampleKey]) -> None:
        """Free samples that nobody will read."""
        self._store.release(keys)

    def exit(self) -> None:
        """Free the device, leave the store, and end this actor's process."""
        self._engine.close()
        self._store.close()
        super().exit()


def _store_patience_s(run: RunConfig) -> float:
    """How long to wait for a store that is full or away.

    All prompts of a call together must not take so long that the engine itself passes for hung.
    """
    share = run.recovery.hang_timeout_s / (4 * run.inference.request_size)
    return min(MAX_STORE_PATIENCE_S, share)
