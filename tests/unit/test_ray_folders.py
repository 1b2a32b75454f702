"""Temporary folders of Ray instances whose runs were killed."""

import os
import subprocess

import pytest

from torchspec_lib.ray.cluster import OWNER_FILE, TEMP_PREFIX, _remove_orphans


@pytest.fixture(scope="module")
def gone() -> int:
    """A process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_folders_without_their_owner_are_removed_and_no_others(tmp_path, gone):
    owners = {"dead": str(gone), "living": str(os.getpid()), "cut-off": ""}
    for name, owner in owners.items():
        folder = tmp_path / f"{TEMP_PREFIX}{name}"
        folder.mkdir()
        (folder / OWNER_FILE).write_text(owner)
    (tmp_path / "elsewhere").mkdir()
    _remove_orphans(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"{TEMP_PREFIX}living", f"{TEMP_PREFIX}cut-off", "elsewhere"}
