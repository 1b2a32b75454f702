"""A Hugging Face target on a GPU."""

import pytest
import torch

from tests.run_process import config
from torchspec_lib.models.target_model import load_target
from torchspec_lib.target import read_target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_target_attends_without_plans_that_every_new_length_needs(tmp_path):
    run = config(tmp_path)
    torch.backends.cuda.enable_cudnn_sdp(True)
    model = load_target(read_target(run.model), "bfloat16", torch.device("cuda"), False)
    with torch.profiler.profile() as profile, torch.inference_mode():
        model(torch.arange(2, 40, device="cuda")[None])
    kinds = {event.key for event in profile.key_averages() if "attention" in event.key}
    assert kinds
    assert not any("cudnn" in kind for kind in kinds)
