"""SGLang on a machine without a GPU: its scheduler, request path and models on torch's operators.

SGLang lets a platform be added from outside: ``pyproject.toml`` names ``platform`` below as an
entry point. What it imports and would only use on a GPU is stood in for by empty modules, in
SGLang's own processes alone. For tests and laptops: it is real, but it isn't fast.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torchspec_lib.errors import DependencyError

PLATFORM = "torchspec_cpu"
"""The entry point's name."""

STAND_INS = {"triton": "3.9.0", "torchvision": "0.28.0", "IPython": "9.0.0"}
"""Packages that are imported and never called, with the version they pretend to be. The wheels
of the first two are builds for CUDA: 190 MB, and one that doesn't load beside torch for CPUs."""


def choose_cpu(num_ranks: int, first_rank: int = 0) -> None:
    """Have SGLang run on the CPU in this process and its children. Before it is imported.

    Args:
        num_ranks: Of tensor parallelism, over all nodes. They share the cores, a core each.
        first_rank: The first of them in this process, which counts its own from 0.

    Raises:
        DependencyError: This project was installed before it knew SGLang.
    """
    if not importlib.metadata.entry_points(group="sglang.srt.platforms", name=PLATFORM):
        raise DependencyError(
            "SGLang doesn't find this project's platform for CPUs",
            "Install the project again: make setup sglang",
        )
    os.environ["SGLANG_PLATFORM"] = PLATFORM
    if num_ranks > 1:
        cores = sorted(os.sched_getaffinity(0))
        ranks = range(first_rank, first_rank + num_ranks)
        shares = [str(cores[rank % len(cores)]) for rank in ranks]
        os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(shares)
    stand_in_where_chosen()


def stand_in_where_chosen() -> None:
    """Stand in for the missing packages, if ``choose_cpu`` was called here or by a parent."""
    is_done = any(isinstance(finder, _StandInFinder) for finder in sys.meta_path)
    if os.environ.get("SGLANG_PLATFORM") == PLATFORM and not is_done:
        from torch.utils._triton import has_triton_package

        assert "transformers" not in sys.modules, "it has looked for what is stood in for"
        has_triton_package()  # torch remembers that there is none
        warnings.filterwarnings("ignore", module="sglang")  # of every GPU that it misses
        sys.meta_path.insert(0, _StandInFinder())


def platform() -> str | None:
    """The platform's class, for SGLang's search; None where it wasn't chosen."""
    if os.environ.get("SGLANG_PLATFORM") != PLATFORM:
        return None
    return "torchspec_lib.inference.engine.sgl_platform:CpuPlatform"


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of the packages that are stood in for."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 - the protocol's
        target: types.ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in STAND_INS:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = STAND_INS[module.__name__.partition(".")[0]]  # type: ignore[attr-defined]


class _StandIn(types.ModuleType):
    """Has every name: a class where it is capitalised, else a decorator."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _StandInType(name, (_StandInObject,), {}) if name[0].isupper() else _StandInName()
        setattr(self, name, value)
        return value


class _StandInType(type):
    """A class whose constants are their names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _StandInObject:
    """Can be made from anything."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass


class _StandInName:
    """Leaves what it decorates as it is, with arguments or without; has every attribute too."""

    def __getattr__(self, name: str) -> "_StandInName":
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandInName()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return _unchanged


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
