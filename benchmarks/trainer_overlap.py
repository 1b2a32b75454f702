"""How much of fetching and copying a trainer rank hides behind its computing.

The real trainer under FSDP2 with the real prefetching thread, over a store in this process's
memory: a step's samples are fetched, packed into page-locked memory, copied to the GPU and trained.
A profile says which of the copies ran beside kernels. ``--device cpu --tiny`` rehearses it. Run it
as ``python -m benchmarks.trainer_overlap``; benchmarks/README.md has results.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from benchmarks.trainer_cases import FULL, SUPERVISED, TINY, TTT_STEPS, Case, Model
from torchspec_lib.config.models import ModelConfig
from torchspec_lib.config.run import RunConfig
from torchspec_lib.target import TargetSpec, read_target
from torchspec_lib.training.checkpoint import CheckpointFolder
from torchspec_lib.training.eagle3_trainer import Eagle3Trainer
from torchspec_lib.training.fsdp import Rendezvous, init_process_group
from torchspec_lib.training.prefetch import Prefetcher, PreparedStep
from torchspec_lib.transfer.memory import MemoryStore
from torchspec_lib.types import MicroBatch, SampleKey, SampleRef, StepReport

Spans = list[tuple[float, float]]
"""Beginnings and ends in microseconds, one after the other, none touching."""


class Control:
    """Hands out steps whose samples are all in the store, and keeps the reports."""

    def __init__(self, steps: Sequence[tuple[MicroBatch, ...]]) -> None:
        self._steps = steps
        self.reports: list[StepReport] = []

    def next_step(self, _rank: int, step: int) -> tuple[MicroBatch, ...] | None:
        return self._steps[step - 1] if step <= len(self._steps) else None

    def fetched(self, keys: Sequence[SampleKey]) -> None:
        """Nobody counts bytes here."""

    def recapture(self, ref: SampleRef) -> Any:
        raise AssertionError(f"{ref.key} was lost")

    def report(self, report: StepReport) -> None:
        self.reports.append(report)

    def accounts(self, step: int) -> Any:
        raise AssertionError(f"step {step} is saved")

    def beat(self, _rank: int, _doing: str) -> None:
        """Nobody looks on."""


class NoCheckpoints(CheckpointFolder):
    """Saves nothing: that is measured elsewhere."""

    def is_due(self, step: int) -> bool:  # noqa: ARG002
        return False

    def finish(self, *_args: Any) -> None:
        """The end of the run."""


def make_target(folder: Path, model: Model, dtype: torch.dtype, device: torch.device) -> TargetSpec:
    """What a trainer reads of a target: its config, embedding and output head."""
    config = {
        "model_type": "llama",
        "num_hidden_layers": 36,
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "vocab_size": model.vocab,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    names = ("model.embed_tokens.weight", "lm_head.weight")
    shape = model.vocab, model.hidden
    save_file(
        {name: torch.randn(shape, dtype=dtype, device=device).mul_(0.02) for name in names},
        folder / "model.safetensors",
    )
    return read_target(ModelConfig(target=str(folder)))


def make_trainer(case: Case, folder: Path, args: argparse.Namespace) -> Eagle3Trainer:
    """As a run's trainer rank builds it."""
    on_gpu, model = args.device.type == "cuda", TINY if args.tiny else FULL
    dtype = torch.bfloat16 if on_gpu else torch.float32
    target = make_target(folder, model, dtype, args.device)
    name = str(dtype).removeprefix("torch.")
    run = RunConfig.model_validate(
        {
            "model": {"target": target.path, "dtype": name},
            "data": {"train": ["t.jsonl"], "heldout": ["h.jsonl"]},
            "draft": {"vocab_size": case.draft_vocab, "ttt_steps": TTT_STEPS},
            "training": {"compute_dtype": name},
        }
    )
    kept = np.sort(np.random.default_rng(0).permutation(model.vocab)[: case.draft_vocab])
    checkpoints = NoCheckpoints(folder / "checkpoints", {}, interval=1, keep=1)
    return Eagle3Trainer(run, target, kept, args.steps, checkpoints, args.device)


def fill(store: MemoryStore, case: Case, model: Model, args: argparse.Namespace) -> Control:
    """Put every step's samples; each step is ``args.micro_batches`` packs of the case."""
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    sample = {
        "input_ids": torch.randint(model.vocab, (case.length,), dtype=torch.int32),
        "loss_mask": torch.arange(case.length) >= (1 - SUPERVISED) * case.length,
        "aux_hidden_states": torch.randn(case.length, 3 * model.hidden).to(dtype),
        "last_hidden_states": torch.randn(case.length, model.hidden).to(dtype),
    }
    steps = []
    for step in range(args.steps):
        names = (f"{step}-{i}" for i in range(args.micro_batches * case.num_documents))
        refs = [store.put(SampleKey.first("run", 0, name), sample) for name in names]
        packs = [refs[i :: args.micro_batches] for i in range(args.micro_batches)]
        steps.append(tuple(map(tuple, packs)))
    return Control(steps)


@dataclass
class Profiled:
    """The steps, with the profiler on for the last of them."""

    steps: Iterable[PreparedStep]
    first: int
    profiler: torch.profiler.profile

    def __iter__(self) -> Iterator[PreparedStep]:
        for prepared in self.steps:
            if prepared.step == self.first:
                self.profiler.start()
            yield prepared


def spans_of(events: Sequence[dict[str, Any]], *categories: str) -> Spans:
    """The times at which any event of these categories runs."""
    spans: Spans = []
    for event in sorted(events, key=lambda event: float(event.get("ts", 0))):
        if event.get("cat") not in categories:
            continue
        start = float(event["ts"])
        end = start + float(event["dur"])
        if spans and start <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], end)
        else:
            spans.append((start, end))
    return spans


def length(spans: Spans) -> float:
    """Microseconds."""
    return sum(end - start for start, end in spans)


def shared(a: Spans, b: Spans) -> float:
    """Microseconds for which both go on."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def describe(trace: Path, num_steps: int) -> str:
    """What the profile says of ``num_steps`` steps."""
    events = json.loads(trace.read_text())["traceEvents"]
    kernels = spans_of(events, "kernel")
    copies = spans_of([event for event in events if "HtoD" in event.get("name", "")], "gpu_memcpy")
    whole_us = kernels[-1][1] - kernels[0][0]
    hidden = shared(kernels, copies) / length(copies)
    return (
        f"GPU computing {length(kernels) / whole_us:.1%} of the time; host-to-device copies "
        f"{length(copies) / num_steps / 1e3:.1f} ms a step, {hidden:.1%} of that beside kernels"
    )


def run_case(case: Case, args: argparse.Namespace, folder: Path) -> str:
    """Train ``args.steps`` steps, the last half profiled on a GPU; a line of results."""
    on_gpu, model = args.device.type == "cuda", TINY if args.tiny else FULL
    trainer = make_trainer(case, folder, args)
    store = MemoryStore(capacity_bytes=1 << 40)
    control = fill(store, case, model, args)
    profiled = args.steps // 2
    profiler = torch.profiler.profile()
    prefetcher = Prefetcher(
        control,
        store,
        rank=0,
        first_step=1,
        prefetch_steps=2,
        empty=trainer.empty_batch,
        pin_memory=on_gpu,
    )
    with prefetcher as steps:
        first = args.steps - profiled + 1
        trainer.run(Profiled(steps, first, profiler) if on_gpu else steps, control)
    metrics = [report.metrics for report in control.reports if report.metrics is not None]
    usual = metrics[profiled // 2 : -profiled]
    step_s, wait_s = (
        sum(getattr(step, name) for step in usual) / len(usual) for name in ("step_s", "wait_s")
    )
    tokens = case.num_tokens * args.micro_batches
    line = (
        f"{args.micro_batches} x {case}: {tokens / (step_s + wait_s):,.0f} tokens/s, "
        f"{step_s * 1e3:.1f} ms a step and {wait_s * 1e3:.1f} ms waiting for samples"
    )
    if on_gpu:
        profiler.stop()
        profiler.export_chrome_trace(str(folder / "trace.json"))
        line += "; " + describe(folder / "trace.json", profiled)
    return line


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda", 0))
    parser.add_argument("--tiny", action="store_true", help="small sizes, to rehearse")
    parser.add_argument("--cases", nargs="+", help="draft vocabulary:documents x length each")
    parser.add_argument("--micro-batches", type=int, default=1, help="packs of a step")
    parser.add_argument("--steps", type=int, default=16)
    args = parser.parse_args()
    cases = args.cases or (["100:3x21"] if args.tiny else ["32000:1x4096", "32000:4x4096"])
    init_process_group(Rendezvous.listen("127.0.0.1"), 0, 1, args.device)
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            print(run_case(Case.parse(case), args, Path(folder)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
