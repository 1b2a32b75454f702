"""SGLang's engine for real, on the CPU: its own processes, its scheduler, and Mooncake."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import PreTrainedModel

from tests.engine_process import HOST, EngineProcess, run_config
from tests.tiny_targets import FAMILIES, make_target
from torchspec_lib.errors import ConfigError, EngineError, StoreFullError
from torchspec_lib.inference.engine.sgl_arguments import WHOLE, Part
from torchspec_lib.models.target_model import captured_outputs
from torchspec_lib.ray.held_port import hold_port
from torchspec_lib.target import read_target
from torchspec_lib.transfer.mooncake.connect import connect
from torchspec_lib.transfer.mooncake.processes import allocated_bytes, start_client, start_master
from torchspec_lib.transfer.store import StoreAddress, TensorStore
from torchspec_lib.types import CaptureFailure, CaptureRequest, Prompt, SampleKey, SampleRef

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.mooncake,
    pytest.mark.skipif(find_spec("sglang") is None, reason="make sglang installs it"),
]

MIB = 1 << 20
CPU = torch.device("cpu")
AUX = (0, 2, 4)
CHUNK = 16
"""Tokens of a forward: most prompts are run in pieces."""


@pytest.fixture(scope="module")
def address() -> Iterator[StoreAddress]:
    with ExitStack() as stack:
        master = start_master(HOST)
        stack.callback(master.process.stop)
        client = start_client(HOST, master.endpoint.rpc, 32 * MIB)
        stack.callback(client.process.stop)
        yield StoreAddress(
            run_id="run",
            mode="client_process",
            protocol="tcp",
            device_name="",
            master=master.endpoint.rpc,
            metrics=master.endpoint.metrics,
            clients={HOST: client.address},
            segment_bytes=32 * MIB,
            max_sample_bytes=8 * MIB,
        )


@pytest.fixture(scope="module")
def store(address: StoreAddress) -> Iterator[TensorStore]:
    store = connect(address, HOST, owns_memory=False, put_timeout_s=1.0)
    yield store
    store.close()


class Case:
    """A target, the same one in transformers, and an engine for it."""

    def __init__(
        self, family: str, folder: Path, address: StoreAddress, parts: Sequence[Part], **settings
    ) -> None:
        self.model: PreTrainedModel = make_target(family, folder)
        run = run_config(str(folder), **settings)
        target = read_target(run.model)
        self.parts = [EngineProcess(run, target, address, part) for part in parts]
        self.engine = self.parts[0]

    def scheduler(self) -> psutil.Process:
        (found,) = [child for child in self.engine.children() if "scheduler" in child.name()]
        return found

    def states(self, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
        """Auxiliary and last states as transformers computes them."""
        decoder = self.model.model
        modules = [*(decoder.layers[i] for i in AUX), decoder.norm]
        with torch.inference_mode(), captured_outputs(modules) as states:
            decoder(input_ids=torch.tensor(prompt.token_ids[None].astype("int64")))
            *aux, last = states
        return torch.cat(aux, dim=-1), last


@pytest.fixture(scope="module")
def start(address, tmp_path_factory) -> Iterator[Callable[..., Case]]:
    """Starts an engine on a family's target, and sees to its end."""
    with ExitStack() as stack:

        def start_case(family: str, parts: Sequence[Part] = (WHOLE,), **settings) -> Case:
            case = Case(family, tmp_path_factory.mktemp(family), address, parts, **settings)
            for engine in case.parts:
                stack.callback(engine.stop)
            for engine in case.parts:
                engine.wait()
            return case

        yield start_case


@pytest.fixture(scope="module")
def case(start) -> Case:
    return start("llama")


def request(prompt_id: str, num_tokens: int, seed: int = 0) -> CaptureRequest:
    rng = np.random.default_rng([seed, num_tokens])
    ids = rng.integers(0, 97, num_tokens).astype(np.int32)
    prompt = Prompt(prompt_id, ids, rng.random(num_tokens) < 0.5)
    return CaptureRequest(SampleKey.first("run", 0, prompt_id), prompt)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def fill(store: TensorStore, keys: list[SampleKey]) -> None:
    """Put samples under ``keys`` until there is no room."""
    while True:
        key = SampleKey.first("fill", 0, str(len(keys)))
        keys.append(store.put(key, {"x": torch.zeros(4 * MIB, dtype=torch.uint8)}).key)


def check_parity(case: Case, store: TensorStore) -> None:
    lengths = [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5, 2, 100, 7]
    requests = [request(f"p{i}", length) for i, length in enumerate(lengths)]
    refs = case.engine.call("capture", requests)
    for wanted, ref in zip(requests, refs, strict=True):
        assert isinstance(ref, SampleRef), ref
        sample = store.get(ref, CPU)
        aux, last = case.states(wanted.prompt)
        assert sample["input_ids"].tolist() == wanted.prompt.token_ids.tolist()
        assert sample["loss_mask"].tolist() == wanted.prompt.loss_mask.tolist()
        assert error(sample["aux_hidden_states"], aux) < 1e-6
        assert error(sample["last_hidden_states"], last) < 1e-5
    store.release([ref.key for ref in refs])


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_equal_the_states_that_transformers_computes(family, case, start, store, address):
    subject = case if family == "llama" else start(family)
    check_parity(subject, store)
    check = subject.engine.call("self_check")
    assert check.max_relative_error < 1e-5
    assert check.argmax_agreement == 1.0
    assert allocated_bytes(address.metrics) == 0, "the check's sample is freed"
    if subject is not case:
        subject.engine.stop()


@pytest.mark.slow
def test_two_ranks_of_tensor_parallelism_capture_the_same(start, store):
    case = start("llama", tp_size=2)
    check_parity(case, store)
    case.engine.stop()


@pytest.mark.slow
def test_an_engine_over_two_nodes_captures_the_same(start, store):
    with hold_port() as port:
        parts = [Part(rank, f"{HOST}:{port}") for rank in range(2)]
        case = start("llama", parts, tp_size=2, nnodes=2)
    check_parity(case, store)
    for part in case.parts:
        part.stop()


@pytest.mark.slow
def test_a_part_that_does_not_come_is_not_waited_for_for_ever(start):
    with hold_port() as port, pytest.raises(EngineError, match="1/2 clients joined"):
        start("llama", [Part(0, f"{HOST}:{port}")], tp_size=2, nnodes=2, dist_timeout=5)


def test_an_aborted_prompt_fails_alone_and_may_be_tried_again(case, store):
    requests = [request(f"a{i}", 3, seed=i) for i in range(12)]
    scheduler = case.scheduler()
    scheduler.suspend()
    case.engine.send("capture", requests)
    time.sleep(0.5)
    case.engine.call_beside("abort", requests[5].key)
    scheduler.resume()
    results = case.engine.answer()
    failed = [result for result in results if isinstance(result, CaptureFailure)]
    assert [(failure.key, failure.fault) for failure in failed] == [(requests[5].key, "engine")]
    (ref,) = case.engine.call("capture", [requests[5]])
    store.release([ref.key, *(each.key for each in results if isinstance(each, SampleRef))])


def test_many_prompts_of_mixed_length_are_answered_in_their_order(case, store):
    lengths = np.random.default_rng(0).integers(1, 200, 64)
    requests = [request(f"m{i}", int(length), seed=i) for i, length in enumerate(lengths)]
    refs = case.engine.call("capture", requests)
    assert [ref.key for ref in refs] == [wanted.key for wanted in requests]
    assert [ref.num_tokens for ref in refs] == lengths.tolist()
    for wanted, ref in zip(requests, refs, strict=True):
        _, last = case.states(wanted.prompt)
        assert error(store.get(ref, CPU)["last_hidden_states"], last) < 1e-5
    store.release([ref.key for ref in refs])


def test_the_same_prompt_twice_is_computed_twice(case, store):
    """SGLang's prefix cache would leave out what it computed before."""
    for _ in range(2):
        (ref,) = case.engine.call("capture", [request("again", 40)])
        assert ref.num_tokens == 40
        store.release([ref.key])


def test_a_prompt_that_cannot_run_fails_alone(case, store):
    good, long, other = request("g", 20), request("l", 300), request("o", 20)
    full = request("f", 256)  # without a position for the token that SGLang draws
    first, *failures, last = case.engine.call("capture", [good, long, full, other])
    for failure in failures:
        assert isinstance(failure, CaptureFailure)
        assert failure.fault == "prompt"
    assert isinstance(first, SampleRef)
    assert isinstance(last, SampleRef)
    store.release([first.key, last.key])


def test_a_full_store_is_the_stores_fault_and_frees_the_engine(case, store):
    filler: list[SampleKey] = []
    with pytest.raises(StoreFullError):
        fill(store, filler)
    results = case.engine.call("capture", [request(f"f{i}", 200) for i in range(16)])
    assert {result.fault for result in results if isinstance(result, CaptureFailure)} == {"store"}
    store.release([result.key for result in results if isinstance(result, SampleRef)])
    store.release(filler)
    (ref,) = case.engine.call("capture", [request("after", 30)])
    assert isinstance(ref, SampleRef)
    store.release([ref.key])


def test_a_killed_scheduler_is_an_error_of_the_engine(start):
    case = start("qwen3")
    scheduler = case.scheduler()
    case.engine.send("capture", [request(f"k{i}", 200, seed=i) for i in range(64)])
    time.sleep(0.5)
    scheduler.kill()
    with pytest.raises(EngineError, match="died"):
        case.engine.answer()
    with pytest.raises(EngineError, match="died"):
        case.engine.call("capture", [request("late", 5)])
    children = case.engine.children()
    case.engine.process.kill()
    assert psutil.wait_procs(children, timeout=10)[1] == [], "they end with the engine's process"


def test_a_layer_that_is_not_captured_fails_the_self_check_and_closing_ends_all(start):
    case = start("llama", aux_layer_ids=(0, 2, 5))
    with pytest.raises(EngineError, match="2 of 3 auxiliary layers"):
        case.engine.call("self_check")
    case.engine.call("fail", "a part of it is lost")
    with pytest.raises(EngineError, match="a part of it is lost"):
        case.engine.call("capture", [request("lost", 5)])
    children = case.engine.children()
    assert len(children) >= 2, "a scheduler and a detokenizer"
    case.engine.call("close")
    case.engine.call("close")
    assert psutil.wait_procs(children, timeout=10)[1] == []
    with pytest.raises(EngineError, match="closed"):
        case.engine.call("capture", [request("late", 5)])


def test_an_argument_that_sglang_does_not_know_is_named(start):
    with pytest.raises(ConfigError, match="no_such_argument"):
        start("llama", extra_args={"no_such_argument": 1})
