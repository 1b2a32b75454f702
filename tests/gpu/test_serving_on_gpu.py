"""What SGLang itself makes of a trained draft, beside what the plain evaluation says of it."""

from importlib.util import find_spec

import pytest
import torch

from tests.run_process import config
from tests.trained_draft import train_draft
from torchspec_lib.data.dataset import prepare_dataset
from torchspec_lib.evaluation.evaluate import evaluate_draft
from torchspec_lib.target import read_target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("sglang") is None, reason="needs SGLang"),
    pytest.mark.timeout(900),  # SGLang starts four times, and compiles kernels the first time
]

NUM_PROMPTS = 60
EXTRA = {
    "attention_backend": "triton",  # its kernels come with it, whatever was installed
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.3,
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A run, its target, a trained draft and a prepared data set."""
    root = tmp_path_factory.mktemp("serving")
    run = config(
        root,
        num_prompts=1500,
        model={"target": config(root).model.target, "dtype": "bfloat16"},
        draft={"vocab_size": 512, "ttt_steps": 5},
        training={
            "global_batch_size": 5,
            "learning_rate": 5e-3,
            "warmup_ratio": 0.05,
            "lr_schedule": "cosine",
            "compute_dtype": "float32",
        },
        inference={"sglang": {"extra_args": EXTRA}},
        cluster={"device": "cuda"},
        evaluation={"draft_steps": 5, "max_new_tokens": 96, "max_prompts": NUM_PROMPTS},
    )
    target = read_target(run.model)
    _, dataset = prepare_dataset(run, target)
    train_draft(run, target, dataset, root / "draft")
    return run, target, root / "draft", dataset


def evaluated(setting, **changes):
    run, target, draft, dataset = setting
    evaluation = run.evaluation.model_copy(update=changes)
    return evaluate_draft(run.model_copy(update={"evaluation": evaluation}), target, draft, dataset)


@pytest.mark.parametrize(
    "shape", [{}, {"draft_topk": 4, "num_draft_tokens": 8}], ids=["chains", "trees"]
)
def test_sglang_has_the_accept_length_that_the_evaluation_predicts(setting, shape):
    here, served = evaluated(setting, **shape), evaluated(setting, engine="sglang", **shape)
    print(f"\n{here.drafting}, {torch.cuda.get_device_name()}")
    for report in (here, served):
        print(
            f"{report.engine}: accept length {report.accept_length:.3f}, by position "
            f"{' '.join(f'{rate:.2f}' for rate in report.accept_rates)}, lossless "
            f"{report.num_lossless} of {report.num_prompts}, {report.measured_speedup:.2f}x "
            f"({report.plain_s:.2f} s plain, {report.speculative_s:.2f} s with the draft)"
        )
    assert here.accept_length > 2.0
    assert served.accept_length == pytest.approx(here.accept_length, rel=0.02)
    assert served.accept_rates[0] == pytest.approx(here.accept_rates[0], abs=0.03)
    assert served.prompt_set == here.prompt_set
    # In bfloat16 rounding turns a choice between two tokens that are as good as equal.
    assert served.num_lossless >= 0.95 * NUM_PROMPTS
    assert served.projected_speedup is None
    assert not any(prompt.in_order for prompt in served.prompts)
