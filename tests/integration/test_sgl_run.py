"""A whole training run with SGLang as its engine, as a process of its own."""

from importlib.util import find_spec

import pytest

from tests.run_process import Driver, config

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.mooncake,
    pytest.mark.ray,
    pytest.mark.skipif(find_spec("sglang") is None, reason="make sglang installs it"),
]


def test_a_run_with_sglang_trains_every_prompt_and_leaves_nothing_behind(tmp_path):
    run = config(
        tmp_path / "data",
        training={"global_batch_size": 6, "compute_dtype": "float32"},
        inference={"engine": "sglang", "request_size": 8, "sglang": {"prefill_tokens": 1024}},
    )
    driver = Driver(run, tmp_path)
    summary = driver.summary()
    assert (summary["num_trained"], summary["num_rejected"], summary["num_steps"]) == (24, 0, 4)
    assert summary["bytes_streamed"] > 2_000_000
    assert summary["object_store_bytes"] < 0.02 * summary["bytes_streamed"]
    assert driver.leftovers() == []
