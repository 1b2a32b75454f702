"""The benchmark of the transfer runs as documented, and carries what it claims to carry."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.transfer_sides import BYTES_PER_TOKEN, sample_in
from torchspec_lib.transfer.mooncake.layout import packed_size


@pytest.mark.mooncake
@pytest.mark.ray
@pytest.mark.timeout(180)
def test_every_way_is_measured_in_every_size(tmp_path: Path):
    path = tmp_path / "out.json"
    sizes = [1 << 16, 1 << 20]
    command = [sys.executable, "-m", "benchmarks.transfer", "--rounds", "1", "--json", str(path)]
    subprocess.run([*command, "--sizes", *map(str, sizes)], check=True, timeout=170)
    results = json.loads(path.read_text())
    assert [row["bytes"] for row in results["sizes"]] == sizes
    for row in results["sizes"]:
        assert len(row["GB/s"]) == 8
        assert all(rate > 0 for rate in row["GB/s"].values())
    assert all(rate > 0 for cold in results["cold"].values() for rate in cold.values())


@pytest.mark.parametrize("size", [1 << 16, 1 << 20])
def test_a_sample_has_the_bytes_that_its_rate_is_computed_from(size: int):
    """But for the rest of a token, and the store's own header."""
    sample = sample_in(torch.zeros(size, dtype=torch.uint8), size)
    assert size - BYTES_PER_TOKEN <= sum(tensor.nbytes for tensor in sample.values()) <= size
    assert packed_size(sample) <= size + 4096
