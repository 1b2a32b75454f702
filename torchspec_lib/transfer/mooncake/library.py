"""The one place that imports Mooncake, with the environment it reads set before."""

import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torchspec_lib.errors import DependencyError

ENVIRONMENT = {
    "MC_LOG_LEVEL": "ERROR",
    "MC_STORE_CLIENT_SETUP_RETRIES": "1",
    "MC_RPC_TIMEOUT_MS": "5000",
    "MC_TCP_STATUS_TIMEOUT_SEC": "5",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "5",
    "MC_TCP_SLICE_SIZE": "4194304",
}
"""Mooncake's only settings for these. A dead peer shows after 5 s instead of 30; slices of
4 MiB carry 1.25 times as much over TCP. What is set already is left as it is."""

INSTALL = "Install this project with its extra for the machine: pip install '.[cpu]' or '.[gpu]'"

_PACKAGES = {
    "libibverbs": "libibverbs1",
    "libnuma": "libnuma1",
    "libcurl": "libcurl4",
    "libmlx5": "ibverbs-providers",
}
"""Debian package of each system library that the wheel links to."""


def load_library() -> ModuleType:
    """``mooncake.store``.

    Raises:
        DependencyError: Mooncake or a system library isn't installed.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("mooncake.store")
    except ImportError as error:
        raise missing_dependency(str(error)) from error


def missing_dependency(message: str) -> DependencyError:
    """What to install, from the loader's or importer's complaint."""
    found = re.search(r"(lib[\w+-]+)\.so[.\d]*", message)
    if found is None:
        return DependencyError(f"Mooncake isn't installed ({message})", INSTALL)
    library = found.group(1)
    if library in ("libcudart", "libcuda"):
        remedy = "This machine has no CUDA: install the wheel without it, pip install '.[cpu]'"
    elif library in _PACKAGES:
        # All of the three come in one go: the next one missing shows only after the first is there.
        names = dict.fromkeys(["libibverbs1", "libnuma1", "libcurl4", _PACKAGES[library]])
        remedy = f"apt-get install -y --no-install-recommends {' '.join(names)}"
    else:
        remedy = f"Install the system package that holds {found.group(0)}"
    return DependencyError(f"Mooncake needs {found.group(0)}, which isn't there", remedy)


@contextmanager
def muted_stderr() -> Iterator[None]:
    """Hold back what Mooncake's own code writes: closing, it complains of being closed."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
