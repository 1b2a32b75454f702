"""SGLang as the evaluation starts it: plain decoding, which it can do on a CPU too."""

import multiprocessing
import os
import signal
import threading
from importlib.util import find_spec
from itertools import islice

import pytest
import torch

from tests.run_process import config, wait_for
from torchspec_lib.data.dataset import load_heldout, prepare_dataset
from torchspec_lib.errors import ConfigError, WorkerLostError
from torchspec_lib.evaluation.served import serve
from torchspec_lib.evaluation.speculative import decode_plain
from torchspec_lib.evaluation.verification import TargetChoice
from torchspec_lib.models.target_model import load_target
from torchspec_lib.target import read_target

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(find_spec("sglang") is None, reason="make sglang installs it"),
]

RUN = {"evaluation": {"max_new_tokens": 24}}


def test_sglang_answers_as_the_plain_evaluation_does_and_refuses_what_is_too_long(tmp_path):
    run = config(tmp_path, **RUN)
    target = read_target(run.model)
    _, dataset = prepare_dataset(run, target)
    prompts = [prompt.prompt_token_ids.tolist() for prompt in load_heldout(dataset)[:4]]
    answers = serve(run, target, None, [*prompts, [5] * 2040])
    found = list(islice(answers, len(prompts)))
    with pytest.raises(ConfigError, match=r"evaluation.max_new_tokens.*2040 tokens.*Lower it"):
        next(answers)
    model = load_target(target, run.model.dtype, torch.device("cpu"), trust_remote_code=False)
    choose = TargetChoice(0.0, run.evaluation.max_new_tokens)
    expected = [decode_plain(model, ids, choose, target.eos_token_ids) for ids in prompts]
    assert [answer.token_ids for answer in found] == expected
    assert all(answer.counts is None and answer.seconds > 0 for answer in found)
    assert not multiprocessing.active_children()


def test_the_loss_of_its_process_is_told(tmp_path):
    run = config(tmp_path, **RUN)

    def kill() -> None:
        (child,) = wait_for(multiprocessing.active_children, "process", 30)
        os.kill(child.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(WorkerLostError, match="exit code -9"):
        list(serve(run, read_target(run.model), None, [[5]]))
    killer.join()
