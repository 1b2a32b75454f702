"""What capturing costs SGLang: prefilled tokens/s without it, and with it.

Three engines of the same target, with dummy weights, on one device: SGLang alone; with capture
into pinned host memory; with capture into a Mooncake store that another process reads and empties
as a trainer would. They take turns at the same prompts. A table on the terminal, and the same as
JSON. ``--device cpu --tiny`` rehearses it. Run it as ``python -m benchmarks.engine_capture``;
benchmarks/README.md has results.
"""

import argparse
import importlib.metadata
import json
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from benchmarks.engine_capture_parts import HOST, EngineProcess, Reader, Setup
from torchspec_lib.config.run import RunConfig
from torchspec_lib.inference.engine.sgl_arguments import WHOLE, engine_arguments
from torchspec_lib.plan import MIB, make_plan
from torchspec_lib.target import aux_layer_ids, read_target
from torchspec_lib.transfer.mooncake.processes import allocated_bytes, start_client, start_master
from torchspec_lib.transfer.store import StoreAddress
from torchspec_lib.types import Prompt

VARIANTS = {
    "plain": "without capture",
    "pinned": "capture to pinned memory",
    "store": "capture into the store, read by another process",
}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
TINY = QWEN3_8B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def run_config(args: argparse.Namespace, folder: Path) -> RunConfig:
    """A run of the target in ``folder``."""
    on_gpu = args.device == "cuda"
    return RunConfig.model_validate(
        {
            "model": {"target": str(folder), "dtype": "bfloat16" if on_gpu else "float32"},
            "data": {"train": ["-"], "heldout": ["-"], "max_length": args.lengths[1]},
            "inference": {
                "engine": "sglang",
                "sglang": {
                    "prefill_tokens": args.prefill_tokens,
                    "extra_args": {"load_format": "dummy", **args.extra_args},
                },
            },
            "cluster": {"device": args.device},
        }
    )


def make_prompts(args: argparse.Namespace, vocab_size: int, round_: int) -> list[Prompt]:
    """Random ones; lengths are spread evenly, and the same in every round."""
    low, high = args.lengths
    lengths = np.random.default_rng(0).permutation(np.linspace(low, high, args.prompts, dtype=int))
    random = np.random.default_rng(round_)
    return [
        Prompt(
            f"{round_}-{i}",
            random.integers(0, vocab_size, length).astype(np.int32),
            np.ones(length, np.bool_),
        )
        for i, length in enumerate(lengths)
    ]


def start_store(stack: ExitStack, sample_bytes: int, in_flight: int) -> StoreAddress:
    """A store that holds the prompts in flight."""
    segment_bytes = max(64 * MIB, in_flight * sample_bytes)
    master = start_master(HOST)
    stack.callback(master.process.stop)
    client = start_client(HOST, master.endpoint.rpc, segment_bytes)
    stack.callback(client.process.stop)
    return StoreAddress(
        run_id="benchmark",
        mode="client_process",
        protocol="tcp",
        device_name="",
        master=master.endpoint.rpc,
        metrics=master.endpoint.metrics,
        clients={HOST: client.address},
        segment_bytes=segment_bytes,
        max_sample_bytes=sample_bytes,
    )


def measure(args: argparse.Namespace, stack: ExitStack) -> dict[str, list[float]]:
    """Tokens/s of every round, by variant; the first of all rounds is for warming up."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (folder / "config.json").write_text(json.dumps(TINY if args.tiny else QWEN3_8B))
    run = run_config(args, folder)
    target = read_target(run.model)
    sample_bytes = make_plan(run, target, args.prompts, args.lengths[1]).sample_bytes
    address = start_store(stack, sample_bytes, args.in_flight)
    layers, arguments = aux_layer_ids(run.draft, target), engine_arguments(run, target, WHOLE)
    setup = Setup(target, layers, arguments, address, args.in_flight)
    reader = Reader(address)
    stack.callback(reader.stop)
    engines = {name: EngineProcess(name, setup, reader.refs) for name in args.variants}
    for engine in engines.values():
        stack.callback(engine.stop)
    for name, engine in engines.items():
        engine.wait()
        print(f"up: {name}", flush=True)
    prompts = make_prompts(args, target.vocab_size, 0)
    for engine in engines.values():
        engine.send(prompts[: args.in_flight])
    for name, engine in engines.items():
        print(f"warm: {name}, {engine.seconds():.1f} s with the others beside it", flush=True)
    num_tokens = sum(prompt.num_tokens for prompt in prompts)
    if "store" in engines:
        reader.wait_for(len(prompts[: args.in_flight]))
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for round_ in range(1, args.rounds + 1):
        prompts = make_prompts(args, target.vocab_size, round_)
        for name in args.variants if round_ % 2 else reversed(args.variants):
            engines[name].send(prompts)
            seconds = engines[name].seconds()
            rates[name].append(num_tokens / seconds)
            line = f"round {round_}: {name} {num_tokens / seconds:,.0f} tokens/s"
            if name == "store":
                busy_s = reader.wait_for(len(prompts))
                line += f", reading {busy_s:.2f} s of {seconds:.2f}"
            print(line, flush=True)
    print(f"left in the store: {allocated_bytes(address.metrics)} bytes")
    return rates


def show(args: argparse.Namespace, rates: dict[str, list[float]], device: str) -> None:
    """Print the table, and write it as JSON if asked for."""
    base = rates.get("plain")
    report = []
    low, high = args.lengths
    version = importlib.metadata.version("sglang")
    print(f"\n{device}, torch {torch.__version__}, sglang {version}; {args.prompts} prompts of")
    print(f"{low} to {high} tokens, {args.in_flight} in flight, {args.rounds} rounds by turns")
    print(f"{'':<48}{'tokens/s':>9} {'lowest':>8} {'highest':>8} {'share':>7}")
    for name, values in rates.items():
        # Of the round's own baseline, since clocks drift.
        shares = [a / b for a, b in zip(values, base or values, strict=True)]
        share = statistics.median(shares)
        rate = statistics.median(values)
        spread = f"{min(values):8,.0f} {max(values):8,.0f}"
        print(f"{VARIANTS[name]:<48}{rate:9,.0f} {spread} {share:7.1%}")
        report.append({"variant": name, "tokens_per_s": rate, "rounds": values, "share": share})
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        content = {"device": device, "torch": torch.__version__, "sglang": version}
        args.json.write_text(
            json.dumps(content | {"settings": settings, "variants": report}, indent=1)
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the engines, let them take turns, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to rehearse")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--lengths", type=int, nargs=2, default=(256, 4096))
    parser.add_argument("--prefill-tokens", type=int, default=16384)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--extra-args", type=json.loads, default={}, help="SGLang's, as JSON")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args(arguments)
    with ExitStack() as stack:
        rates = measure(args, stack)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    show(args, rates, device)


if __name__ == "__main__":
    main()
