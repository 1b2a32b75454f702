"""The Ray actor around an engine."""

import logging
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch

from torchspec_lib.config.run import RunConfig
from torchspec_lib.errors import EngineError, RecoverableError, StoreFullError
from torchspec_lib.inference.engine_parts import EngineParts
from torchspec_lib.inference.factory import EngineSpec, build_engine
from torchspec_lib.inference.start_fence import StartFence
from torchspec_lib.ray.placement_group import Slot
from torchspec_lib.ray.ray_actor import RayActor
from torchspec_lib.transfer.mooncake.connect import connect
from torchspec_lib.types import CaptureRequest, CaptureResult, SampleKey

logger = logging.getLogger(__name__)

MAX_STORE_PATIENCE_S = 20.0

PASSING = (RecoverableError, StoreFullError, EngineError, torch.OutOfMemoryError)
"""What another start may not meet again: a store or a peer that was away, memory that was used."""


def engine_options(run: RunConfig) -> dict[str, int]:
    """Ray's options for an ``EngineActor``, besides its place."""
    inference = run.inference
    # SGLang takes calls side by side. Those of a manager that is gone may be there still, and
    # questions such as ``life`` mustn't wait for either.
    num_threads = 1 if inference.engine == "hf" else 2 * inference.num_calls + 4
    # Ray starts a dead one again, in its bundle; the manager says when it is enough.
    return {"max_restarts": -1, "max_concurrency": num_threads}


class EngineActor(RayActor):
    """One engine and its place in the store. Checked and ready once constructed.

    It outlives the trainers and the manager that it captures for.
    """

    def __init__(self, spec: EngineSpec, others: Sequence[Slot] = ()) -> None:
        """Start the engine; if it has parts on other nodes, these are their slots."""
        super().__init__("engine", spec.rank, spec.run.cluster.device)
        self._life = uuid.uuid4().hex
        self._opened = ExitStack()
        self._failure: EngineError | None = None
        try:
            self._open(spec, others)
        except PASSING as error:
            if not self.is_restarted:
                raise
            # Raised here it would be final: Ray starts no actor again whose constructor raised.
            cause = f"it couldn't be started again: {error}"
            self._failure = EngineError(f"{spec.rank}", cause)
        else:
            if self.is_restarted:
                logger.warning("event=recovered part=%r", f"engine {spec.rank}")

    def _open(self, spec: EngineSpec, others: Sequence[Slot]) -> None:
        patience_s = _store_patience_s(spec.run)
        attach = partial(
            connect,
            spec.store_address,
            self.node_ip,
            put_timeout_s=patience_s,
            retry_timeout_s=patience_s,
        )
        self._store = attach(owns_memory=True)
        self._opened.callback(self._store.close)
        self._fence = StartFence(self._store, spec.store_address.run_id)
        engine_attaches = partial(attach, owns_memory=False)
        parts = EngineParts(spec, others, self.node_ip) if others else None
        self._engine = build_engine(spec, self._store, self.device, engine_attaches, parts)
        self._opened.callback(self._engine.close)
        if parts is not None:
            self._opened.callback(parts.close)
        check = self._engine.self_check()
        logger.info(
            "event=self_check tokens=%d max_relative_error=%.2e argmax_agreement=%.3f",
            check.num_tokens,
            check.max_relative_error,
            check.argmax_agreement,
        )

    def life(self) -> str:
        """Answers once the constructor is through, differently after every restart."""
        return self._life

    def ping(self) -> None:
        """Answers once the constructor is through.

        Raises:
            EngineError: It couldn't be started again, this time.
        """
        if self._failure is not None:
            raise self._failure

    def capture(self, start: int, requests: Sequence[CaptureRequest]) -> list[CaptureResult]:
        """Capture for the manager of the run's ``start``-th start of trainers.

        Raises:
            EngineError: The engine is unusable, or works for a later start already.
            StoreUnavailableError: What an earlier start left couldn't be freed.
        """
        self.ping()
        with self._fence.capturing(start, [request.key for request in requests]):
            return self._engine.capture(requests)

    def discard(self, keys: Sequence[SampleKey]) -> None:
        """Free samples that nobody will read, those too that are just being captured."""
        self.ping()
        self._fence.wait_for(keys)
        self._store.release(keys)

    def exit(self) -> None:
        """Free the device, leave the store, and end this actor's process."""
        self._opened.close()
        super().exit()


def _store_patience_s(run: RunConfig) -> float:
    """How long to wait for a store that is full or away.

    All prompts of a call together must not take so long that the engine itself passes for hung.
    """
    share = run.recovery.hang_timeout_s / (4 * run.inference.request_size)
    return min(MAX_STORE_PATIENCE_S, share)
