"""A child process that ends with the process that started it, however that ends.

The kernel sends a child its death signal when the *thread* that forked it ends, so all are
forked from one thread that lives as long as this process. The signal is asked for by a
launcher that then becomes the program: in a process with threads no Python may safely run
between fork and exec.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from torchspec_lib.errors import DependencyError
from torchspec_lib.transfer.mooncake.library import ENVIRONMENT, INSTALL

_STOP_TIMEOUT_S = 5.0
_POLL_S = 0.02
_LOG_TAIL_BYTES = 1000

_forker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forker")

_LAUNCHER = """
import ctypes, os, signal, sys
parent, program, *arguments = sys.argv[1:]
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != int(parent):
    sys.exit("the parent has ended already")
os.execv(program, [program, *arguments])
"""


class ManagedProcess:
    """A running program, in a process group of its own, so that Ctrl-C leaves it to us.

    Its output goes to a file without a name, which vanishes with it; the end of it says in
    errors what went wrong.
    """

    def __init__(self, program: str, arguments: Sequence[str]) -> None:
        """``program`` is found beside this Python or on the PATH.

        Raises:
            DependencyError: It isn't installed.
        """
        self.name = program
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
        self._command = [*launcher, _find_program(program), *arguments]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._process = self._spawn()

    def _spawn(self) -> "subprocess.Popen[bytes]":
        return _forker.submit(
            subprocess.Popen,
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            process_group=0,
            env={**ENVIRONMENT, **os.environ},
        ).result()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def listening_ports(self) -> set[int]:
        """The TCP ports it listens on; none if it has ended."""
        try:
            sockets = psutil.Process(self.pid).net_connections("tcp")
        except psutil.NoSuchProcess:
            return set()
        return {each.laddr.port for each in sockets if each.status == psutil.CONN_LISTEN}

    def wait_until(self, is_ready: Callable[[], bool], timeout_s: float) -> bool:
        """Whether it got ready, rather than exit or let ``timeout_s`` pass."""
        deadline = time.monotonic() + timeout_s
        while self.is_running and time.monotonic() < deadline:
            if is_ready():
                return self.is_running
            time.sleep(_POLL_S)
        return False

    def wait_for_end(self, timeout_s: float) -> bool:
        """Whether it has ended, or does within ``timeout_s``."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End it at once, even if it is stopped or hangs."""
        self._process.kill()
        self._process.wait()

    def restart(self, pause_s: float) -> bool:
        """Start it again as it was, ``pause_s`` from now; False if ``stop`` came before."""
        if self._stopping.wait(pause_s):
            return False
        with self._lock:
            if self.is_stopping:
                return False
            self._process = self._spawn()
            return True

    @property
    def is_stopping(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stopping.is_set()

    def ending(self) -> str:
        """How it ended, if it has: ``ended by SIGKILL``."""
        code = self._process.poll()
        if code is None:
            return "still runs"
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    def last_words(self) -> str:
        """How it ended, if it has, and the end of its log."""
        with self._lock:
            if self._log.closed:
                return f"{self.name} was stopped"
            file = self._log.fileno()
            start = max(0, os.fstat(file).st_size - _LOG_TAIL_BYTES)
            tail = os.pread(file, _LOG_TAIL_BYTES, start).decode(errors="replace").strip()
        return f"{self.name} {self.ending()}; its log ends: {tail or '(empty)'}"

    def stop(self) -> None:
        """End it, by force after 5 s. Safe to call twice."""
        with self._lock:
            if self.is_stopping:
                return
            self._stopping.set()
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        with self._lock:
            self._log.close()


def _find_program(name: str) -> str:
    beside_python = Path(sys.executable).with_name(name)
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if found is None:
        raise DependencyError(f"{name} is neither beside {sys.executable} nor on the PATH", INSTALL)
    return found
