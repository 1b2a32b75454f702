"""Engines and trainers of one run, brought up in one order and taken down in reverse.

Ray -> placement groups -> Mooncake master and clients -> engines, which all stand to the end, and
trainers, controller and manager, which are started again together where one of them is lost. A
context manager, so that whatever fails or interrupts, all of it goes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from tqdm import tqdm

from torchspec_lib.attempt import RunInputs, Standing
from torchspec_lib.config.run import RunConfig
from torchspec_lib.controller.actors import START_TIMEOUT_S
from torchspec_lib.inference.engine_actor import EngineActor, engine_options
from torchspec_lib.inference.factory import EngineSpec
from torchspec_lib.plan import ClusterPlan
from torchspec_lib.ray.cluster import ray_session
from torchspec_lib.ray.failures import get
from torchspec_lib.ray.placement_group import (
    Placement,
    create_placement_groups,
    driver_actor,
)
from torchspec_lib.results import DatasetManifest, TrainSummary
from torchspec_lib.snapshots.decoder import DecoderSpec, SnapshotDecoder
from torchspec_lib.training_run import TrainingRun
from torchspec_lib.transfer.mooncake.master import MooncakeClient, MooncakeMaster
from torchspec_lib.transfer.store import StoreAddress

EXIT_TIMEOUT_S = 10.0
"""For an actor to end by itself."""


class JointCluster:
    """A run that is up: trains to the end, or gives the summary of a finished one."""

    def __init__(self, train: Callable[[], TrainSummary]) -> None:
        self.train = train


@contextmanager
def joint_cluster(
    run: RunConfig, plan: ClusterPlan, dataset_dir: Path, manifest: DatasetManifest
) -> Iterator[JointCluster]:
    """Bring up everything that a training run needs; a finished run needs nothing.

    Raises:
        PlacementError: The cluster can't hold the plan.
        EngineError: An engine didn't start or failed its self-check.
        DependencyError: Mooncake or a system library is missing.
        WorkerLostError: An actor died.
    """
    inputs = RunInputs.of(run, plan, dataset_dir, manifest)
    finished = None if run.fresh else inputs.folder.finished()
    if finished is not None:
        _phase(f"run {inputs.folder.run_id} is trained already (fresh: true trains it again)")
        yield JointCluster(lambda: finished)
        return
    with ExitStack() as stack:
        stack.enter_context(inputs.folder.claim())
        inputs.folder.open(run)
        yield JointCluster(_bring_up(stack, inputs).train)


def _bring_up(stack: ExitStack, inputs: RunInputs) -> TrainingRun:
    start = time.monotonic()
    run, plan = inputs.run, inputs.plan
    _phase("starting or joining Ray")
    stack.enter_context(ray_session(plan))
    placement = create_placement_groups(plan, run.cluster.gpu_wait_s)
    stack.callback(placement.remove)
    _phase("starting the store")
    address, store_actors = _start_store(stack, inputs, placement)
    _phase(f"starting {plan.num_engines} engine(s) and {run.training.world_size} trainer rank(s)")
    engines = _start_engines(stack, inputs, placement, address)
    if run.inference.engine == "sglang" and run.cluster.placement == "colocate":
        # It takes a share of what it finds free: the others come to what it has left.
        get([engine.ping.remote() for engine in engines], START_TIMEOUT_S, "an engine's start")
    decoder = _start_decoder(stack, inputs, placement)
    standing = Standing(engines, placement.training, address, store_actors, decoder)
    training = TrainingRun(inputs, standing)
    stack.callback(training.close)
    training.start()
    starting = [*engines, *([] if decoder is None else [decoder])]
    get([actor.ping.remote() for actor in starting], START_TIMEOUT_S, "an engine's start")
    _phase(f"everything is up after {time.monotonic() - start:.0f} s")
    return training


def _phase(text: str) -> None:
    tqdm.write(f"  {text}")


def _start_store(
    stack: ExitStack, inputs: RunInputs, placement: Placement
) -> tuple[StoreAddress, list[Any]]:
    """The master beside the driver; in client-process mode a client where samples are handled."""
    run, plan = inputs.run, inputs.plan
    capturing = [slots[0] for slots in placement.engines(run.inference.num_nodes_per_engine)]
    nodes = {slot.node_ip: slot.node_id for slot in [*placement.training, *capturing]}
    in_clients = run.transfer.mode == "client_process"
    segment_bytes = plan.owned_bytes(len(nodes) if in_clients else plan.num_engines)
    patience = (run.recovery.max_restarts, run.recovery.hang_timeout_s)
    master = driver_actor(MooncakeMaster).remote(ray.util.get_node_ip_address(), *patience)
    stack.callback(_end, [master], "stop")
    endpoint = get(master.endpoint.remote())
    client_actors: list[Any] = []
    stack.callback(_end, client_actors, "stop")
    clients = {}
    if in_clients:
        for node_ip, node_id in nodes.items():
            client = driver_actor(MooncakeClient, node_id).remote(
                node_ip, endpoint.rpc, segment_bytes, run.transfer, *patience
            )
            client_actors.append(client)
            clients[node_ip] = get(client.address.remote())
            client.touch.remote(endpoint.metrics)  # beside what starts next; nobody waits for it
    address = StoreAddress(
        run_id=inputs.folder.run_id,
        mode=run.transfer.mode,
        protocol=run.transfer.protocol,
        device_name=run.transfer.device_name,
        master=endpoint.rpc,
        metrics=endpoint.metrics,
        clients=clients,
        segment_bytes=segment_bytes,
        max_sample_bytes=plan.sample_bytes,
    )
    return address, [master, *client_actors]


def _start_engines(
    stack: ExitStack, inputs: RunInputs, placement: Placement, address: StoreAddress
) -> list[Any]:
    """Engines on their way up; ``ping`` waits for one, or raises what kept it from starting."""
    engine_class: Any = ray.remote(EngineActor)
    engines: list[Any] = []
    stack.callback(_end, engines, "exit")
    num_parts = inputs.run.inference.num_nodes_per_engine
    for rank, (slot, *others) in enumerate(placement.engines(num_parts)):
        spec = EngineSpec(inputs.run, inputs.target, rank, address)
        options = slot.options("inference") | engine_options(inputs.run)
        engine = engine_class.options(**options).remote(spec, others)
        engines.append(engine)
    return engines


def _start_decoder(stack: ExitStack, inputs: RunInputs, placement: Placement) -> Any | None:
    """The decoder of snapshots, on its way up, if there are to be any."""
    if not placement.decoding:
        return None
    [slot] = placement.decoding
    spec = DecoderSpec(
        inputs.run, inputs.target, inputs.plan.weight_bytes, str(inputs.dataset_dir), inputs.folder
    )
    options = slot.options("decoding") | {
        # Ray starts a dead one again, and has it do again what it was at.
        "max_restarts": inputs.run.recovery.max_restarts,
        "max_task_retries": -1,
        "max_concurrency": 2,
    }
    decoder_class: Any = ray.remote(SnapshotDecoder)
    decoder = decoder_class.options(**options).remote(spec)
    stack.callback(ray.kill, decoder)
    return decoder


def _end(actors: Sequence[Any], farewell: str) -> None:
    """End actors after their ``farewell`` method, or without it those that don't answer."""
    calls = [getattr(actor, farewell).remote() for actor in actors]
    if calls:
        ray.wait(calls, num_returns=len(calls), timeout=EXIT_TIMEOUT_S)
    for actor in actors:
        ray.kill(actor)
