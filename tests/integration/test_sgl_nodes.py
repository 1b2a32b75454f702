"""An SGLang engine over two nodes: two bundles of a local Ray, an actor in each, as in a run."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from tests.engine_process import run_config
from tests.run_process import Driver, config, wait_for
from tests.tiny_targets import make_target
from torchspec_lib.config.run import RunConfig
from torchspec_lib.inference.engine.hf_engine import HFEngine
from torchspec_lib.inference.engine_actor import EngineActor
from torchspec_lib.inference.factory import EngineSpec
from torchspec_lib.plan import make_plan
from torchspec_lib.ray.cluster import ray_session
from torchspec_lib.ray.placement_group import create_placement_groups
from torchspec_lib.target import read_target
from torchspec_lib.transfer.mooncake.connect import connect
from torchspec_lib.transfer.mooncake.processes import start_client, start_master
from torchspec_lib.transfer.store import StoreAddress, TensorStore
from torchspec_lib.types import CaptureRequest, Prompt, SampleKey

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.mooncake,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(480),
    pytest.mark.skipif(find_spec("sglang") is None, reason="make sglang installs it"),
]

MIB = 1 << 20
CPU = torch.device("cpu")
TWO_NODES = {"tp_size": 2, "nnodes": 2}


@pytest.fixture
def store_address() -> Iterator[StoreAddress]:
    with ExitStack() as stack:
        node_ip = ray.util.get_node_ip_address()
        master = start_master(node_ip)
        stack.callback(master.process.stop)
        client = start_client(node_ip, master.endpoint.rpc, 32 * MIB)
        stack.callback(client.process.stop)
        yield StoreAddress(
            run_id="run",
            mode="client_process",
            protocol="tcp",
            device_name="",
            master=master.endpoint.rpc,
            metrics=master.endpoint.metrics,
            clients={node_ip: client.address},
            segment_bytes=32 * MIB,
            max_sample_bytes=8 * MIB,
        )


@pytest.fixture
def store(store_address: StoreAddress) -> Iterator[TensorStore]:
    (node_ip,) = store_address.clients
    store = connect(store_address, node_ip, owns_memory=False, put_timeout_s=1.0)
    yield store
    store.close()


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    make_target("llama", tmp_path)
    return run_config(str(tmp_path), **TWO_NODES)


@pytest.fixture
def engine(run, store_address, monkeypatch) -> Iterator[Any]:
    """An engine's actor in the first of two bundles; it starts the second one's."""
    alone = run.cluster.model_copy(update={"placement": "debug_inference_only"})
    target = read_target(run.model)
    plan = make_plan(run.model_copy(update={"cluster": alone}), target, 1, 250)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with ExitStack() as stack:
        stack.enter_context(ray_session(plan))
        placement = create_placement_groups(plan, 30)
        stack.callback(placement.remove)
        slot, *others = placement.inference
        assert len(others) == 1
        actor = ray.remote(EngineActor).options(**slot.options("inference"))
        yield actor.remote(EngineSpec(run, target, 0, store_address), others)


def make_requests(run_id: str, lengths: list[int]) -> list[CaptureRequest]:
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(f"p{i}", rng.integers(0, 97, n).astype(np.int32), rng.random(n) < 0.5)
        for i, n in enumerate(lengths)
    ]
    return [CaptureRequest(SampleKey.first(run_id, 0, p.prompt_id), p) for p in prompts]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_two_actors_as_two_nodes_capture_what_the_hf_engine_does_and_leave_no_process(
    run, engine, store
):
    lengths = [1, 15, 16, 17, 53, 200]
    ours = ray.get(engine.capture.remote(1, make_requests("ours", lengths)), timeout=280)
    hf = HFEngine.load(read_target(run.model), run.draft.aux_layer_ids, store, "float32", CPU)
    theirs = hf.capture(make_requests("theirs", lengths))
    for our_ref, their_ref in zip(ours, theirs, strict=True):
        our, their = store.get(our_ref, CPU), store.get(their_ref, CPU)
        for name in ("input_ids", "loss_mask"):
            assert torch.equal(our[name], their[name])
        assert error(our["aux_hidden_states"], their["aux_hidden_states"]) < 1e-6
        assert error(our["last_hidden_states"], their["last_hidden_states"]) < 1e-5
    processes = [p for p in psutil.process_iter(["cmdline"]) if is_of_an_engine(p)]
    assert len(processes) >= 5, "two actors, a scheduler each, and a detokenizer"
    ray.wait([engine.exit.remote()], timeout=30)
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert alive == []


def is_of_an_engine(process: psutil.Process) -> bool:
    title = (process.info["cmdline"] or [""])[0]
    return title.startswith(("ray::EngineActor", "ray::EnginePartActor", "sglang::"))


@pytest.mark.parametrize(
    ("number", "title"),
    [
        (signal.SIGKILL, "ray::EnginePartActor"),
        (signal.SIGKILL, "sglang::scheduler_TP1"),
        (signal.SIGKILL, "ray::EngineActor"),
        (signal.SIGSTOP, "sglang::scheduler_TP1"),
    ],
)
def test_whichever_part_is_lost_the_whole_engine_comes_back_and_the_run_goes_on(
    tmp_path, number, title
):
    run = config(
        tmp_path / "data",
        num_prompts=200,
        training={
            "training_num_gpus_per_node": 1,
            "global_batch_size": 4,
            "compute_dtype": "float32",
        },
        inference={
            "engine": "sglang",
            "inference_num_gpus": 2,
            "sglang": {**TWO_NODES, "prefill_tokens": 2048},
        },
        recovery={"hang_timeout_s": 15.0},
    )
    driver = Driver(run, tmp_path)
    folders = tmp_path / "data" / "runs"

    def has_stepped() -> bool:
        return any(file.stat().st_size for file in folders.glob("*/metrics.jsonl"))

    wait_for(has_stepped, "first step", 200)

    def victims() -> list[psutil.Process]:
        return [p for p in driver.processes() if p.info["cmdline"][0].startswith(title)]

    (victim,) = wait_for(victims, title)
    os.kill(victim.pid, number)
    summary = driver.summary()
    assert (summary["num_trained"], summary["num_rejected"]) == (200, 0)
    assert [recovery["part"] for recovery in summary["recoveries"]] == ["engine 0"]
    assert driver.leftovers() == []
