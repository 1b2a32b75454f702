"""A run whose Ray dies under it."""

import os
import signal

import pytest

from tests.run_process import Driver, config, wait_for
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.training.checkpoint_files import last_step

pytestmark = [pytest.mark.ray, pytest.mark.mooncake, pytest.mark.slow]


def test_a_run_whose_ray_has_died_ends_as_one_to_try_again_and_then_goes_on(tmp_path):
    training = {"global_batch_size": 5, "num_epochs": 20, "compute_dtype": "float32"}
    run = config(tmp_path / "data", 60, training=training | {"checkpoint_interval": 5})
    driver = Driver(run, tmp_path)
    runs = tmp_path / "data" / "runs"
    folder = RunFolder(wait_for(lambda: next(runs.glob("*/"), None), "run folder"))
    wait_for(lambda: last_step(folder.checkpoints), "checkpoint")
    [raylet] = [p for p in driver.processes() if p.info["cmdline"][0].endswith("/raylet")]
    os.kill(raylet.pid, signal.SIGKILL)
    code, _, err = driver.finish()
    assert code != 0
    assert err.splitlines()[-1].startswith(("GivenUpError: ", "WorkerLostError: "))
    driver.wait_until_gone(20)
    summary = Driver(run, tmp_path).summary()
    assert summary["resumed_from_step"] >= 5
    assert summary["num_trained"] == 60 * 20
