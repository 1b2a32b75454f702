"""What SGLang's own EAGLE-3 class does with exported drafts, on the CPU.

``python -m tests.sglang_draft TARGET DRAFT...`` prints a line of JSON with the server's flags, and
one for each draft: parameters that its folder leaves unfilled, and tensors that none takes.
"""

import argparse
import json
import sys
from pathlib import Path

from torchspec_lib.inference.engine.sgl_cpu import choose_cpu

choose_cpu(1)

import torch  # noqa: E402 - SGLang's platform is chosen before anything loads it
from safetensors.torch import load_file  # noqa: E402
from sglang.srt.distributed.parallel_state import (  # noqa: E402
    init_distributed_environment,
    initialize_model_parallel,
)
from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3  # noqa: E402
from sglang.srt.runtime_context import SpawnRanks, publish  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from transformers import AutoConfig  # noqa: E402


def prepare(target: Path, draft: Path) -> None:
    """Make this process what SGLang's models expect to be built in."""
    arguments = ServerArgs(
        model_path=str(target),
        device="cpu",
        speculative_algorithm="EAGLE3",
        speculative_draft_model_path=str(draft),
        speculative_num_steps=3,
        speculative_eagle_topk=1,
        speculative_num_draft_tokens=4,
    )
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
    initialize_model_parallel("gloo")


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
    target, *drafts = map(Path, sys.argv[1:])
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    print(json.dumps({"flags": list(parser._option_string_actions)}))
    prepare(target, drafts[0])
    for draft in drafts:
        print(json.dumps(load(draft)))
