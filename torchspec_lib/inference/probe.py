"""Can SGLang's states of a target be captured? ``python -m torchspec_lib.inference.probe MODEL``.

Prints what was found of the target, starts an engine on it with a store of its own, compares its
states with transformers' on four prompts, and says a verdict. The exit code is 0 if it works.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from torchspec_lib import logs
from torchspec_lib.config.run import RunConfig
from torchspec_lib.errors import TorchSpecError
from torchspec_lib.inference.engine.checks import probe_prompt
from torchspec_lib.inference.engine.sgl_check import TransformersReference
from torchspec_lib.inference.engine.sgl_cpu import choose_cpu
from torchspec_lib.inference.engine.sgl_engine import SglEngine
from torchspec_lib.inference.factory import EngineSpec, build_engine
from torchspec_lib.models.target_head import TargetHead
from torchspec_lib.plan import make_plan
from torchspec_lib.target import TargetSpec, aux_layer_ids, read_target
from torchspec_lib.transfer.mooncake.connect import connect
from torchspec_lib.transfer.mooncake.processes import start_client, start_master
from torchspec_lib.transfer.store import StoreAddress

HOST = "127.0.0.1"
PROMPT_LENGTHS = (1, 32, 177, 500)
PREFILL_TOKENS = 128
"""So that the longer prompts are run in pieces."""

Say = Callable[[str, object], None]


def probe(run: RunConfig, say: Say) -> None:
    """Try ``run``'s target, and say what was found.

    Raises:
        TorchSpecError: It can't be captured from; the message says why.
    """
    target = read_target(run.model)
    layers = aux_layer_ids(run.draft, target)
    say("target", f"{target.path}: {target.num_layers} layers of {target.hidden_size}")
    say("auxiliary layers", ", ".join(map(str, layers)))
    say("chat template", _template(target))
    TargetHead.load(target, None, getattr(torch, run.model.dtype))
    say("embedding, lm_head", "tied" if target.tie_word_embeddings else "two tensors")
    reference = TransformersReference(target, layers, run.model.dtype, run.model.trust_remote_code)
    say("in transformers", reference.description)
    with ExitStack() as stack:
        engine = _start_engine(run, target, stack)
        check = engine.self_check()
        say("lm_head rebuilds", f"log-probabilities within {check.max_relative_error:.1e}")
        for length in PROMPT_LENGTHS:
            prompt = probe_prompt(target, length)
            errors = reference.compare(prompt, engine.sample(prompt))
            found = zip(reference.names, errors, strict=True)
            words = ", ".join(f"{name} {error:.1e}" for name, error in found)
            say(f"off by, {prompt.num_tokens} tokens", words)


def _template(target: TargetSpec) -> str:
    folder = Path(target.path)
    if (folder / "chat_template.jinja").is_file():
        return "chat_template.jinja"
    config = folder / "tokenizer_config.json"
    if config.is_file() and '"chat_template"' in config.read_text():
        return "in tokenizer_config.json"
    return "none: conversations can't be tokenized"


def _start_engine(run: RunConfig, target: TargetSpec, stack: ExitStack) -> SglEngine:
    plan = make_plan(run, target, num_prompts=1, longest=max(PROMPT_LENGTHS))
    master = start_master(HOST)
    stack.callback(master.process.stop)
    client = start_client(HOST, master.endpoint.rpc, plan.segment_bytes)
    stack.callback(client.process.stop)
    address = StoreAddress(
        run_id="probe",
        mode="client_process",
        protocol="tcp",
        device_name="",
        master=master.endpoint.rpc,
        metrics=master.endpoint.metrics,
        clients={HOST: client.address},
        segment_bytes=plan.segment_bytes,
        max_sample_bytes=plan.sample_bytes,
    )
    attach = partial(connect, address, HOST, owns_memory=False)
    store = attach()
    stack.callback(store.close)
    engine = build_engine(
        EngineSpec(run, target, 0, address), store, torch.device(run.cluster.device), attach
    )
    stack.callback(engine.close)
    assert isinstance(engine, SglEngine)
    return engine


def main(arguments: Sequence[str] | None = None) -> int:
    """Probe the model that the command line names."""
    parser = argparse.ArgumentParser(prog="torchspec_lib.inference.probe", description=__doc__)
    parser.add_argument("model", help="a Hugging Face model id, or a folder")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--extra-args", type=json.loads, default={}, help="SGLang's, as JSON")
    given = parser.parse_args(arguments)
    logs.setup("probe")
    if given.device == "cpu":
        choose_cpu(given.tp_size)  # before transformers is imported
    run = RunConfig.model_validate(
        {
            "model": {
                "target": given.model,
                "dtype": given.dtype or ("bfloat16" if given.device == "cuda" else "float32"),
                "trust_remote_code": given.trust_remote_code,
            },
            "data": {"train": ["none"], "heldout": ["none"], "max_length": max(PROMPT_LENGTHS)},
            "inference": {
                "engine": "sglang",
                "inference_num_gpus": given.tp_size,
                "sglang": {
                    "tp_size": given.tp_size,
                    "prefill_tokens": PREFILL_TOKENS,
                    "extra_args": given.extra_args,
                },
            },
            "cluster": {"device": given.device},
        }
    )

    def say(what: str, found: object) -> None:
        sys.stdout.write(f"{what:<20}{found}\n")
        sys.stdout.flush()

    try:
        probe(run, say)
    except TorchSpecError as error:
        say("verdict", f"no: {error}")
        return 1
    say("verdict", "yes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
