"""An engine over several nodes, seen from the actor of its first part."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torchspec_lib.errors import EngineError
from torchspec_lib.inference.engine.sgl_arguments import Part
from torchspec_lib.inference.engine_part_actor import EnginePartActor
from torchspec_lib.inference.factory import EngineSpec
from torchspec_lib.ray.held_port import hold_port
from torchspec_lib.ray.part_group import PartGroup
from torchspec_lib.ray.placement_group import Slot

_LAST_WORDS_S = 2.0
"""For a part that failed to say why, before its peers' complaint of it is believed."""
_JOIN_TIMEOUT_S = 10.0


class EngineParts:
    """The engine's parts on other nodes: an actor each, which this process starts and owns.

    The engine lives and dies as one. When this process ends, Ray ends the others; when one of
    them ends, this part is told to fail, and is started again by whoever restarts engines.
    """

    def __init__(self, spec: EngineSpec, slots: Sequence[Slot], node_ip: str) -> None:
        """Have an actor ready in each of ``slots``.

        Args:
            spec: The engine's.
            slots: The bundles of its second part, and of those after it.
            node_ip: This node's address, where the parts will meet if no other is configured.

        Raises:
            WorkerLostError: An actor died, or wasn't there in time (``HungError``).
            DependencyError: A node has no GPU that torch sees.
        """
        self._rank, self._node_ip, self._num_others = spec.rank, node_ip, len(slots)
        self._address = spec.run.inference.sglang.dist_init_addr
        name = f"a part of engine {spec.rank}"
        self._group = PartGroup(name, EnginePartActor, [spec] * len(slots), slots)
        self._watcher: threading.Thread | None = None

    @contextmanager
    def meeting(self) -> Iterator[Part]:
        """Send the others to where they meet the first part, which has to start meanwhile.

        Raises:
            EngineError: The parts didn't start.
            WorkerLostError: Another part's actor died.
            ConfigError: SGLang refuses an argument.
        """
        with ExitStack() as stack:
            address = self._address
            if address is None:
                address = f"{self._node_ip}:{stack.enter_context(hold_port())}"
            self._group.run([Part(rank + 1, address) for rank in range(self._num_others)])
            try:
                yield Part(0, address)
            except EngineError as error:
                cause = self._group.first_end(_LAST_WORDS_S)
                if cause is None:
                    raise
                if not isinstance(cause, EngineError):
                    raise cause from error
                # Either may be the echo of the other.
                both = f"{error.cause}; a part on another node: {cause.cause}"
                raise EngineError(f"{self._rank}", both) from error

    def watch(self, fail: Callable[[str], None]) -> None:
        """Call ``fail`` with the cause, from a thread of its own, when one of them is lost."""

        def wait() -> None:
            fail(str(self._group.first_end()))

        self._watcher = threading.Thread(target=wait, name="engine-parts", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """End them, before the first part is closed. Safe to call twice."""
        for process in multiprocessing.active_children():
            if process.pid is not None:
                os.kill(process.pid, signal.SIGSTOP)  # or they would complain of lost peers
        self._group.kill()
        if self._watcher is not None:
            self._watcher.join(_JOIN_TIMEOUT_S)
