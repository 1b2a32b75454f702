"""How fast one optimizer step of an EAGLE-3 draft is: forward, backward, clipping, update.

A table on the terminal, and the same as JSON. Without Ray, a store or a target's files: the
target's two matrices and the captured states are random. ``--device cpu --tiny`` rehearses it in
seconds. Run it as ``python -m benchmarks.trainer_step``; benchmarks/README.md has results.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.trainer_cases import (
    FULL,
    SUPERVISED,
    SWEEP,
    TINY,
    TINY_SWEEP,
    TTT_STEPS,
    Case,
    Model,
    needed_tflop,
)
from torchspec_lib.config.training import TrainingConfig
from torchspec_lib.models.batch import PackedBatch, pack
from torchspec_lib.models.draft_config import DraftModelConfig
from torchspec_lib.models.eagle3 import Eagle3Draft
from torchspec_lib.models.target_head import TargetHead
from torchspec_lib.models.ttt import Eagle3Model, supervise
from torchspec_lib.training.fsdp import Rendezvous, clip_gradients, init_process_group, parallelize
from torchspec_lib.training.optimizer import build_optimizer

DEPTH_DECAY, MAX_GRAD_NORM = 0.8, 0.5


@dataclass(frozen=True)
class Result:
    """What one case gave."""

    case: str
    tokens_per_s: float
    step_ms: float
    first_step_s: float
    """Compilation included."""
    peak_gb: float
    """Of the step, all that stays allocated included."""
    resident_gb: float
    """Parameters, the optimizer's state, and the target's two matrices."""
    tflop: float
    """Of the matrix products that the step needs; none of them is counted twice."""
    share: float
    """Of the measured matrix product's rate."""
    loss: float


class Float32Masters(nn.Module):
    """Computes in another dtype with copies of float32 parameters, as one FSDP rank does."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self._dtype = model, dtype

    def forward(self, *args: object) -> tuple[Tensor, object]:
        cast = {name: p.to(self._dtype) for name, p in self.model.named_parameters()}
        out: tuple[Tensor, object] = functional_call(self.model, cast, args)
        return out


def make_batch(case: Case, model: Model, head: TargetHead, dtype: torch.dtype) -> PackedBatch:
    """Random states; the target's choices lie in the draft vocabulary."""
    samples, device = [], head.draft_ids_V.device
    for _ in range(case.num_documents):
        ids = torch.randint(case.draft_vocab, (case.length,), device=device)
        aux = torch.randn(case.length, 3 * model.hidden, dtype=dtype, device=device)
        noise = torch.randn(case.length, model.hidden, dtype=dtype, device=device)
        samples.append(
            {
                "input_ids": torch.randint(model.vocab, (case.length,)),
                "loss_mask": torch.arange(case.length) >= (1 - SUPERVISED) * case.length,
                "aux_hidden_states": aux.cpu(),
                "last_hidden_states": (0.3 * noise + 8 * head.draft_rows_VdH[ids]).cpu(),
            }
        )
    return pack(samples)


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square matrix product on random data."""
    size = 8192 if device.type == "cuda" else 512
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    times = time_calls(lambda: a @ b, device, warmup=5, repeats=20)
    return 2 * size**3 / statistics.median(times) / 1e12


def time_calls(
    call: Callable[[], object], device: torch.device, warmup: int, repeats: int
) -> list[float]:
    """Seconds of each call, one after the other."""
    for _ in range(warmup):
        call()
    if device.type == "cpu":
        clocks = [time.perf_counter()]
        for _ in range(repeats):
            call()
            clocks.append(time.perf_counter())
        return np.diff(clocks).tolist()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


class Step:
    """A draft, its optimizer, and a step over one batch, built as the trainer does."""

    def __init__(self, case: Case, model: Model, args: argparse.Namespace) -> None:
        device: torch.device = args.device
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        config = DraftModelConfig(
            hidden_size=model.hidden,
            target_hidden_size=model.hidden,
            intermediate_size=model.intermediate,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            head_dim=model.head_dim,
            hidden_act="silu",
            rms_norm_eps=1e-6,
            vocab_size=model.vocab,
            draft_vocab_size=case.draft_vocab,
            max_position_embeddings=131_072,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            aux_layer_ids=(1, 17, 32),
            dtype="bfloat16",
            bos_token_id=None,
            eos_token_ids=(0,),
        )
        pruned = np.sort(np.random.default_rng(0).permutation(model.vocab)[: case.draft_vocab])
        with device:
            kept = None if case.draft_vocab == model.vocab else pruned
            shape = model.vocab, model.hidden
            embed, lm_head = (torch.randn(shape, dtype=dtype).mul_(0.02) for _ in range(2))
            self.head = TargetHead(embed, lm_head, kept).to(device)
            draft = Eagle3Draft(config)
        draft.init_weights(self.head.draft_rows_VdH, torch.Generator(device).manual_seed(0))
        self.model: nn.Module = Eagle3Model(draft, TTT_STEPS)
        if args.fsdp:
            parallelize(self.model, device, dtype)
        else:
            self.model = Float32Masters(self.model, dtype)
        self.optimizer = build_optimizer(self.model, TrainingConfig(optimizer=args.optimizer))
        self.batch = make_batch(case, model, self.head, dtype).to(device)
        depths_K = torch.arange(TTT_STEPS, device=device, dtype=torch.float64)
        self._depth_weights_K = DEPTH_DECAY**depths_K
        self.loss = torch.zeros(())

    def __call__(self) -> None:
        """Supervision, forward, backward, clipping, update."""
        supervised = supervise(self.batch, self.head, TTT_STEPS, "token")
        scale_K = self._depth_weights_K / supervised.weight_sums_K.clamp(min=1)
        loss, _ = self.model(self.batch, self.head, supervised, scale_K)
        loss.backward()
        clip_gradients(self.model, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = loss.detach()


def run_case(case: Case, args: argparse.Namespace, ceiling: float) -> Result:
    """Build, warm up and time one case."""
    device, model = args.device, TINY if args.tiny else FULL
    on_gpu = device.type == "cuda"
    step = Step(case, model, args)
    started = time.perf_counter()
    step()
    step.loss.item()
    first_s = time.perf_counter() - started
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated() if on_gpu else 0
    seconds = statistics.median(time_calls(step, device, args.warmup, args.repeats))
    tflop = needed_tflop(case, model, step.batch.chains.num_chains)
    result = Result(
        case=str(case),
        tokens_per_s=case.num_tokens / seconds,
        step_ms=seconds * 1e3,
        first_step_s=first_s,
        peak_gb=(torch.cuda.max_memory_allocated() if on_gpu else 0) / 1e9,
        resident_gb=resident / 1e9,
        tflop=tflop,
        share=tflop / seconds / ceiling,
        loss=step.loss.item(),
    )
    if args.profile:
        with torch.profiler.profile() as profiler:
            step()
            step.loss.item()
        key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=60))
    return result


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda", 0))
    parser.add_argument("--tiny", action="store_true", help="small sizes, to rehearse")
    parser.add_argument("--fsdp", action="store_true", help="one FSDP2 rank, as the trainer runs")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--cases", nargs="+", help="draft vocabulary:documents x length each")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="print each case's kernels")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    on_gpu = args.device.type == "cuda"
    ceiling = measure_ceiling(args.device, torch.bfloat16 if on_gpu else torch.float32)
    name = torch.cuda.get_device_name() if on_gpu else platform.processor()
    cases = [Case.parse(text) for text in args.cases or (TINY_SWEEP if args.tiny else SWEEP)]
    if args.fsdp:
        init_process_group(Rendezvous.listen("127.0.0.1"), 0, 1, args.device)
    results = []
    for case in cases:
        results.append(run_case(case, args, ceiling))
        print(f"done {results[-1]}", flush=True)
        if on_gpu:
            torch.cuda.empty_cache()
    if args.fsdp:
        torch.distributed.destroy_process_group()
    print(f"\n{name}, torch {torch.__version__}, matrix product {ceiling:.1f} TFLOP/s")
    print(f"{'case':>16} {'tokens/s':>9} {'ms':>8} {'peak GB':>8} {'TFLOP':>7} {'share':>6}")
    for r in results:
        row = f"{r.case:>16} {r.tokens_per_s:9,.0f} {r.step_ms:8.1f} {r.peak_gb:8.1f}"
        print(f"{row} {r.tflop:7.2f} {r.share:6.1%}")
    if args.json:
        report = {"device": name, "torch": torch.__version__, "matmul_tflops": ceiling}
        args.json.write_text(json.dumps(report | {"cases": [asdict(r) for r in results]}, indent=1))


if __name__ == "__main__":
    main()
