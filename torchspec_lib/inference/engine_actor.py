"""The Ray actor around an engine."""

import logging
from collections.abc import Sequence

from torchspec_lib.inference.factory import EngineSpec, build_engine
from torchspec_lib.ray.ray_actor import RayActor
from torchspec_lib.transfer.mooncake.store import connect
from torchspec_lib.types import CaptureRequest, CaptureResult, SampleKey

logger = logging.getLogger(__name__)


class EngineActor(RayActor):
    """One engine and its place in the store. Checked and ready once constructed."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__("engine", spec.rank, spec.run.cluster.device)
        self._store = connect(spec.store_address, self.node_ip, owns_memory=True)
        self._engine = build_engine(spec, self._store, self.device)
        check = self._engine.self_check()
        logger.info(
            "event=self_check tokens=%d max_relative_error=%.2e argmax_agreement=%.3f",
            check.num_tokens,
            check.max_relative_error,
            check.argmax_agreement,
        )

    def capture(self, requests: Sequence[CaptureRequest]) -> list[CaptureResult]:
        return self._engine.capture(requests)

    def discard(self, keys: Sequence[SampleKey]) -> None:
        """Free samples that nobody will read."""
        self._store.release(keys)

    def exit(self) -> None:
        """Free the device, leave the store, and end this actor's process."""
        self._engine.close()
        self._store.close()
        super().exit()
