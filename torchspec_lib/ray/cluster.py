"""Ray itself: reused, joined, or started here, and then taken down here without a trace."""

import json
import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import psutil
import ray

from torchspec_lib.config.settings import PROJECT_ROOT
from torchspec_lib.errors import ConfigError
from torchspec_lib.plan import ClusterPlan
from torchspec_lib.ray.capacity import missing_resources, placement_error

logger = logging.getLogger(__name__)

FORWARDED_ENV = (
    "NCCL_*",
    "NVSHMEM_*",
    "TORCH_SYMM_MEM_*",
    "GLOO_SOCKET_IFNAME",
    "TP_SOCKET_IFNAME",
    "HF_*",
    "MC_*",
    "OMP_NUM_THREADS",
)
"""What libraries read from the environment, and so must be the same in every actor."""
SPARE_CPUS = 4
"""For the actors without a bundle: controller, manager, store master and store client."""
OBJECT_STORE_BYTES = 200 << 20
"""Only metadata travels through Ray."""
LOCAL_LABEL = {"torchspec-instance": "local"}
"""Marks the node of an instance started here, which never grows."""
AUTH_TOKEN = secrets.token_hex(16)
"""Of the instances that this process starts, one after the other: Ray reads it once."""
EXIT_TIMEOUT_S = 5.0
TEMP_PREFIX, OWNER_FILE = "ts-", "owner"
MAX_TEMP_ROOT = 29
"""A Unix socket's path has at most 107 characters, and up to 78 are Ray's and ours."""


@dataclass(frozen=True, slots=True)
class RaySession:
    """How this process came by Ray."""

    origin: Literal["reused", "joined", "started"]
    address: str
    """What was joined, ``local`` for a fresh instance, empty where Ray was there already."""


@contextmanager
def ray_session(plan: ClusterPlan, num_gpus: int | None = None) -> Iterator[RaySession]:
    """Have Ray, and leave it as it was found.

    A Ray that this process already uses is reused. Otherwise RAY_ADDRESS says which cluster to
    join (``host:port``, ``ray://host:port``, ``auto``), ``local`` that there shall be a fresh
    instance. Without it the cluster that ``ray start`` left on this machine is joined if there
    is one. A fresh instance obeys only who has its token, which this process's children inherit;
    it goes with all its processes and files.

    Args:
        plan: A fresh instance has the CPUs for it, whatever this machine has.
        num_gpus: What a fresh instance shall show instead of the GPUs that are there.

    Raises:
        ConfigError: No Ray answers at RAY_ADDRESS.
    """
    with ExitStack() as stack:
        yield _ensure_ray_initialized(stack, plan, num_gpus)


def _ensure_ray_initialized(
    stack: ExitStack, plan: ClusterPlan, num_gpus: int | None
) -> RaySession:
    if ray.is_initialized():
        return RaySession("reused", "")
    address = _address_to_join()
    if address is None:
        stack.enter_context(_local_instance(plan, num_gpus))
        session = RaySession("started", "local")
    else:
        stack.callback(ray.shutdown)
        _join(address)
        session = RaySession("joined", address)
    logger.info("event=ray_ready origin=%s address=%s", session.origin, session.address)
    return session


def _address_to_join() -> str | None:
    """The cluster to join; None where a fresh instance is wanted or there is nothing to join."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return None if address == "local" else address
    # Ray's own "auto" would also take any other program's private instance.
    noted = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    if not noted.is_file():
        return None
    started = noted.read_text().strip()
    return started if _answers(started) else None


def _join(address: str) -> None:
    remedy = "Start it (ray start --head), correct the address, or set RAY_ADDRESS=local"
    if address != "auto" and not _answers(address):
        raise ConfigError("RAY_ADDRESS", f"nothing answers at {address}", remedy)
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": forwarded_env(os.environ)},
            logging_level=logging.WARNING,
        )
    except ConnectionError as error:
        raise ConfigError("RAY_ADDRESS", f"no Ray answers at {address}: {error}", remedy) from error


def _answers(address: str) -> bool:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(
            "RAY_ADDRESS",
            f"{address!r} isn't an address",
            "Use host:port, ray://host:port, auto or local",
        )
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
        return True
    return False


def forwarded_env(environ: Mapping[str, str]) -> dict[str, str]:
    """What the actors on other nodes shall have of this process's environment.

    Inside a submitted job its own variables are left out: Ray forwards them already, and
    refuses a variable that comes from both sides.
    """
    job = json.loads(environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    forwarded_by_job = (job.get("runtime_env") or {}).get("env_vars") or {}
    wanted = {
        name: value
        for name, value in environ.items()
        if any(fnmatchcase(name, pattern) for pattern in FORWARDED_ENV)
    }
    wanted["PYTHONPATH"] = f"{PROJECT_ROOT}:${{PYTHONPATH}}"
    return {name: value for name, value in wanted.items() if name not in forwarded_by_job}


@contextmanager
def _local_instance(plan: ClusterPlan, num_gpus: int | None) -> Iterator[None]:
    root = tempfile.gettempdir()
    root = root if len(root) <= MAX_TEMP_ROOT else "/tmp"
    _remove_orphans(Path(root))
    folder = Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=root))
    (folder / OWNER_FILE).write_text(str(os.getpid()))
    needed_cpus = sum(bundle.num_cpus for bundle in plan.bundles) + SPARE_CPUS
    python_path = [str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        # Ray listens on every interface. It would make a token by itself, but in the user's
        # home, where it switches authentication on for every cluster of theirs.
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN", AUTH_TOKEN),
        "RAY_USAGE_STATS_ENABLED": "0",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "PYTHONPATH": os.pathsep.join(python_path),
    }
    # It would advise, on every run, to switch authentication off.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    try:
        with _environment(environment):
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, needed_cpus),
                num_gpus=num_gpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                labels=LOCAL_LABEL,
                logging_level=logging.WARNING,
                # Ray opens its folder to everybody; the one around it is the user's alone.
                _temp_dir=str(folder / "r"),
                # Nobody looks at a history of calls, for which it keeps 5 KiB a sample.
                _system_config={"task_events_report_interval_ms": 0},
            )
            yield
    finally:
        _take_down(folder)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set ``values`` for a while. RAY_AUTH_MODE is reset too: ``ray.init`` sets it."""
    before = {name: os.environ.get(name) for name in [*values, "RAY_AUTH_MODE"]}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _remove_orphans(root: Path) -> None:
    """Remove what runs that were killed couldn't: folders whose owner isn't there any more."""
    for note in root.glob(f"{TEMP_PREFIX}*/{OWNER_FILE}"):
        with suppress(FileNotFoundError, ValueError):  # another run was faster, or is just writing
            if not psutil.pid_exists(int(note.read_text())):
                shutil.rmtree(note.parent, ignore_errors=True)


def _take_down(folder: Path) -> None:
    """Shut down this process's instance; returns when its processes and ``folder`` are gone."""
    processes = _instance_processes(folder)
    try:
        ray.shutdown()
    finally:
        left = _await_exit(processes)
        for process in left:
            logger.warning("event=kill_leftover pid=%d", process.pid)
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _await_exit(left)
        shutil.rmtree(folder)


def _instance_processes(folder: Path) -> list[psutil.Process]:
    """Ray's processes that were started with ``folder``, and all that they started."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if str(folder) in " ".join(child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def _await_exit(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that are still there after a while."""
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    while (left := [p for p in processes if _is_alive(p)]) and time.monotonic() < deadline:
        time.sleep(0.05)  # Most aren't children of this process, so nothing can be waited on.
    return left


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        # A zombie is dead; its parent will reap it.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _wait_for_gpu_resources(plan: ClusterPlan, timeout_s: float) -> None:
    """Wait until the nodes together can hold the plan; GPU nodes often join after the head.

    Raises:
        PlacementError: They can't: at once on a local instance, which never grows, elsewhere
            after ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    told = None
    while True:
        nodes = living_nodes()
        resources = [node["Resources"] for node in nodes]
        missing = missing_resources(plan, resources)
        if missing is None:
            return
        if time.monotonic() >= deadline or any(_is_local(node) for node in nodes):
            raise placement_error(plan, resources, missing)
        if missing != told:
            logger.warning("event=waiting_for_nodes missing=%r timeout_s=%.0f", missing, timeout_s)
            told = missing
        time.sleep(min(1.0, timeout_s))  # Ray tells nobody when a node joins.


def living_nodes() -> list[dict[str, Any]]:
    """Ray's rows of the nodes that are up, with ``Resources`` and ``Labels``."""
    return [node for node in ray.nodes() if node["Alive"]]


def lost_nodes(node_ids: Collection[str]) -> list[str]:
    """The addresses of those nodes that have left the cluster."""
    gone = [node for node in ray.nodes() if not node["Alive"]]
    return [node["NodeManagerAddress"] for node in gone if node["NodeID"] in node_ids]


def _is_local(node: Mapping[str, Any]) -> bool:
    labels: Mapping[str, str] = node["Labels"]
    return LOCAL_LABEL.items() <= labels.items()
