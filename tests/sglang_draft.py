"""What SGLang itself makes of our arguments and of exported drafts, on the CPU.

``python -m tests.sglang_draft DRAFT...`` prints a line of JSON with the server's flags, the shape
of the proposals that it read from our arguments, and what it tells of an answer; and one for each
draft: parameters that its folder leaves unfilled, and tensors that none takes.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torchspec_lib.inference.engine.sgl_cpu import choose_cpu

choose_cpu(1)

import torch  # noqa: E402 - SGLang's platform is chosen before anything loads it
from safetensors.torch import load_file  # noqa: E402
from sglang.srt.distributed.parallel_state import (  # noqa: E402
    init_distributed_environment,
    initialize_model_parallel,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager  # noqa: E402
from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3  # noqa: E402
from sglang.srt.runtime_context import SpawnRanks, publish  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from tests.run_process import config  # noqa: E402
from torchspec_lib.evaluation.served import serving_arguments  # noqa: E402
from torchspec_lib.target import read_target  # noqa: E402


def prepare(draft: Path) -> ServerArgs:
    """Make this process what SGLang's models expect to be built in."""
    run = config(Path("unused"), evaluation={"draft_topk": 4, "num_draft_tokens": 6})
    target = read_target(run.model)
    ServerArgs(**serving_arguments(run, target, None))
    arguments = ServerArgs(**serving_arguments(run, target, draft))
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
    initialize_model_parallel("gloo")
    return arguments


def told(accepted: list[int], num_new_tokens: int) -> dict[str, Any]:
    """What SGLang says of an answer whose verifications accepted so many tokens each."""
    received = SimpleNamespace(
        spec_verify_ct=[len(accepted)],
        spec_num_correct_drafts=[sum(accepted)],
        spec_correct_drafts_histogram=[[accepted.count(a) for a in range(max(accepted) + 1)]],
        completion_tokens=[num_new_tokens],
    )
    meta_info: dict[str, Any] = {}
    TokenizerManager._calculate_spec_decoding_metrics(None, meta_info, received, 0)
    return meta_info


def load(draft: Path) -> dict[str, list[str]]:
    """Load ``draft`` tensor by tensor into parameters that are all NaN."""
    model = LlamaForCausalLMEagle3(AutoConfig.from_pretrained(draft))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    unused = []
    for name, tensor in load_file(draft / "model.safetensors").items():
        unfilled = num_unfilled(model)
        model.load_weights([(name, tensor)])
        if name == "d2t":
            taken = torch.equal(model.hot_token_id, tensor + torch.arange(len(tensor)))
        else:
            taken = unfilled - num_unfilled(model) >= tensor.numel()  # it pads the head
        unused += [] if taken else [name]
    missing = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    return {"unfilled": missing, "unused": unused}


def num_unfilled(model: torch.nn.Module) -> int:
    return sum(int(parameter.isnan().sum()) for parameter in model.parameters())


if __name__ == "__main__":
    drafts = [Path(name) for name in sys.argv[1:]]
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    server = prepare(drafts[0])
    shape = [
        getattr(server, f"speculative_{name}")
        for name in ("num_steps", "eagle_topk", "num_draft_tokens")
    ]
    flags = list(parser._option_string_actions)
    print(json.dumps({"flags": flags, "shape": shape, "told": told([0, 2, 5], 8)}))
    for draft in drafts:
        print(json.dumps(load(draft)))
