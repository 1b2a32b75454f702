"""The Ray actor around an engine's part on another node than its first."""

from dataclasses import replace

from torchspec_lib.errors import EngineError
from torchspec_lib.inference.engine.sgl_arguments import Part
from torchspec_lib.inference.factory import EngineSpec, build_part
from torchspec_lib.ray.ray_actor import RayActor


class EnginePartActor(RayActor):
    """Computes with the engine's first part, whose process it belongs to. Captures nothing."""

    def __init__(self, spec: EngineSpec) -> None:
        """Take the bundle. ``spec`` is the engine's: ``run`` says which part this is."""
        super().__init__("engine-part", spec.rank, spec.run.cluster.device)
        self._spec = spec

    def run(self, part: Part) -> None:
        """Meet the other parts and compute with them, until a process of this one ends.

        Raises:
            EngineError: It didn't start, or one of its processes ended. The engine is lost.
            ConfigError: SGLang refuses an argument.
        """
        build_part(replace(self._spec, part=part)).wait()
        raise EngineError(f"{self._spec.rank}", f"a process of part {part.node_rank} died")
