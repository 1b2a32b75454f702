"""Set-up that all tests share: nothing of the user's home is touched, nothing phones home."""

import logging
import os

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption("--faults", type=int, default=4, help="how many, for test_chaos.py")
    parser.addoption("--seed", type=int, default=0, help="of their moments, for test_chaos.py")


@pytest.fixture(autouse=True)
def unset_logging():
    """Each test begins as a process does: what another one set up would hide lines from caplog."""
    logger = logging.getLogger("torchspec_lib")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
