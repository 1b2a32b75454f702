"""Engines and trainers of one run, brought up in one order and taken down in reverse.

Ray -> placement groups -> Mooncake master and clients -> engines -> controller and manager
-> trainers. A context manager, so that whatever fails or interrupts, all of it goes.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from torchspec_lib.config import RunConfig
from torchspec_lib.controller.actors import AsyncInferenceManager, AsyncTrainingController
from torchspec_lib.controller.inference_manager import CapturePolicy, CaptureStats
from torchspec_lib.controller.training_controller import RunTotals, Schedule
from torchspec_lib.errors import StoreUnavailableError
from torchspec_lib.inference.engine_actor import EngineActor
from torchspec_lib.inference.factory import EngineSpec
from torchspec_lib.models.export import validate_draft
from torchspec_lib.plan import ClusterPlan
from torchspec_lib.ray.cluster import ray_session
from torchspec_lib.ray.failures import unwrap
from torchspec_lib.ray.placement_group import Placement, create_placement_groups
from torchspec_lib.ray.train_group import RayTrainGroup
from torchspec_lib.results import DatasetManifest, TrainSummary
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.target import TargetSpec, read_target
from torchspec_lib.training import checkpoint
from torchspec_lib.training.trainer_actor import TrainerActor, TrainerSpec
from torchspec_lib.transfer.mooncake.master import MooncakeClient, MooncakeMaster
from torchspec_lib.transfer.mooncake.processes import evicted_keys
from torchspec_lib.transfer.store import StoreAddress
from torchspec_lib.types import StepMetrics, accept_length

logger = logging.getLogger(__name__)

EXIT_TIMEOUT_S = 10.0
"""For an actor to end by itself."""


@dataclass(frozen=True, slots=True)
class RunInputs:
    """What a training run is made of."""

    run: RunConfig
    run_id: str
    target: TargetSpec
    plan: ClusterPlan
    dataset_dir: Path
    manifest: DatasetManifest
    folder: RunFolder

    @classmethod
    def of(
        cls, run: RunConfig, plan: ClusterPlan, dataset_dir: Path, manifest: DatasetManifest
    ) -> "RunInputs":
        target = read_target(run.model)
        run_id = run.training_hash(f"{manifest.dataset_id} {target.fingerprint}")
        folder = RunFolder.of(run, run_id)
        return cls(run, run_id, target, plan, dataset_dir, manifest, folder)


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
        logger.info("event=already_trained run=%s", inputs.run_id)
        yield JointCluster(lambda: finished)
        return
    inputs.folder.open(run)
    with ExitStack() as stack:
        yield JointCluster(_bring_up(stack, inputs).train)


def _bring_up(stack: ExitStack, inputs: RunInputs) -> "_Training":
    start = time.monotonic()
    run, plan = inputs.run, inputs.plan
    _phase("starting or joining Ray")
    stack.enter_context(ray_session(plan))
    placement = create_placement_groups(plan, run.cluster.gpu_wait_s)
    stack.callback(placement.remove)
    _phase("starting the store")
    address = _start_store(stack, inputs, placement)
    _phase(f"starting {plan.num_engines} engine(s) and {run.training.world_size} trainer rank(s)")
    engines = _start_engines(stack, inputs, placement, address)
    resume_from = checkpoint.latest(inputs.folder.checkpoints)
    specs = [
        TrainerSpec(
            run=run,
            run_id=inputs.run_id,
            target=inputs.target,
            plan=plan,
            dataset_dir=str(inputs.dataset_dir),
            rank=rank,
            world_size=run.training.world_size,
            store_address=address,
            checkpoint_dir=str(inputs.folder.checkpoints),
            resume_from=None if resume_from is None else str(resume_from),
        )
        for rank in range(run.training.world_size)
    ]
    trainers = RayTrainGroup.start(TrainerActor, specs, placement.training)
    stack.callback(trainers.shutdown)
    _get([engine.ping.remote() for engine in engines])
    _phase(f"everything is up after {time.monotonic() - start:.0f} s")
    return _Training(stack, inputs, engines, trainers, address, resume_from)


def _phase(text: str) -> None:
    tqdm.write(f"  {text}")


def _start_store(stack: ExitStack, inputs: RunInputs, placement: Placement) -> StoreAddress:
    """The master beside the driver, and in client-process mode one client on every node."""
    run, plan = inputs.run, inputs.plan
    nodes = {slot.node_ip: slot.node_id for slot in placement.training + placement.inference}
    in_clients = run.transfer.mode == "client_process"
    segment_bytes = plan.owned_bytes(len(nodes) if in_clients else plan.num_engines)
    master = _actor(MooncakeMaster).remote(ray.util.get_node_ip_address())
    stack.callback(_end, master, "stop")
    endpoint = _get(master.endpoint.remote())
    clients = {}
    if in_clients:
        for node_ip, node_id in nodes.items():
            client = _actor(MooncakeClient, node_id).remote(
                node_ip, endpoint.rpc, segment_bytes, run.transfer
            )
            stack.callback(_end, client, "stop")
            clients[node_ip] = _get(client.address.remote())
    return StoreAddress(
        run_id=inputs.run_id,
        mode=run.transfer.mode,
        protocol=run.transfer.protocol,
        device_name=run.transfer.device_name,
        master=endpoint.rpc,
        metrics=endpoint.metrics,
        clients=clients,
        segment_bytes=segment_bytes,
        max_sample_bytes=plan.sample_bytes,
    )


def _start_engines(
    stack: ExitStack, inputs: RunInputs, placement: Placement, address: StoreAddress
) -> list[Any]:
    """Engines on their way up; ``ping`` waits for one, or raises what kept it from starting."""
    engine_class: Any = ray.remote(EngineActor)
    engines = []
    for rank in range(inputs.plan.num_engines):
        slot = placement.inference[rank]
        spec = EngineSpec(inputs.run, inputs.target, rank, address)
        engine = engine_class.options(**slot.options("inference")).remote(spec)
        stack.callback(_end, engine, "exit")
        engines.append(engine)
    return engines


class _Training:
    """The training loop as the driver sees it: it waits, and shows what comes."""

    def __init__(
        self,
        stack: ExitStack,
        inputs: RunInputs,
        engines: Sequence[Any],
        trainers: RayTrainGroup,
        address: StoreAddress,
        resume_from: Path | None,
    ) -> None:
        run = inputs.run
        self._inputs, self._trainers, self._address = inputs, trainers, address
        self._resume_step, ledger = checkpoint.position(resume_from)
        self._controller = _actor(AsyncTrainingController).remote(
            str(inputs.dataset_dir), _schedule(inputs), self._resume_step, ledger
        )
        stack.callback(ray.kill, self._controller)
        policy = CapturePolicy(
            inputs.plan.max_in_flight_bytes, run.inference.request_size, run.inference.max_attempts
        )
        self._manager = _actor(AsyncInferenceManager).remote(
            self._controller, list(engines), policy, inputs.plan
        )
        stack.callback(ray.kill, self._manager)

    def train(self) -> TrainSummary:
        """Train to the end, settle the accounts, export the draft.

        Raises:
            LedgerError: A prompt is neither trained nor rejected.
            StoreUnavailableError: The store evicted samples that nobody had read.
            WorkerLostError: A part of the run died.
        """
        start = time.monotonic()
        folder = self._inputs.folder
        metrics = folder.keep_metrics_until(self._resume_step)
        metrics += self._follow(self._trainers.run(self._controller, self._manager))
        totals: RunTotals = _get(self._controller.finish.remote())
        stats: CaptureStats = _get(self._manager.stats.remote())
        if evicted := evicted_keys(self._address.metrics):
            raise StoreUnavailableError("keep", f"it evicted {evicted} samples unread")
        self._trainers.export(str(folder.draft))
        validate_draft(folder.draft, self._inputs.target)
        summary = self._summary(metrics, totals, stats, time.monotonic() - start)
        folder.finish(summary)
        return summary

    def _follow(self, trainer_refs: list[Any]) -> list[StepMetrics]:
        """Show finished steps until every rank is done; raise what ends the run early."""
        seen: list[StepMetrics] = []
        open_refs = list(trainer_refs)
        capturing = self._manager.run.remote()
        num_left = self._inputs.plan.num_steps - self._resume_step
        with tqdm(total=num_left, desc="training", unit="step", dynamic_ncols=True) as bar:
            news = self._controller.progress.remote(0)
            while open_refs:
                done, _ = ray.wait([news, capturing, *open_refs], num_returns=1)
                if done[0] == capturing:
                    _get(capturing)
                elif done[0] == news:
                    seen += self._show(_get(news), bar)
                    news = self._controller.progress.remote(len(seen))
                else:
                    self._trainers.wait(done)
                    open_refs.remove(done[0])
            totals: RunTotals = _get(self._controller.finish.remote())
            if self._resume_step + len(seen) < totals.num_steps:
                seen += self._show(_get(news), bar)
        return seen

    def _show(self, steps: list[StepMetrics], bar: Any) -> list[StepMetrics]:
        self._inputs.folder.append_metrics(steps)
        bar.update(len(steps))
        last = steps[-1]
        bar.set_postfix(loss=f"{last.loss:.3f}", accept_length=f"{last.accept_length:.2f}")
        return steps

    def _summary(
        self,
        metrics: Sequence[StepMetrics],
        totals: RunTotals,
        stats: CaptureStats,
        wall_s: float,
    ) -> TrainSummary:
        tail = metrics[-max(1, len(metrics) // 10) :]
        return TrainSummary(
            run_id=self._inputs.run_id,
            draft_dir=str(self._inputs.folder.draft),
            num_steps=totals.num_steps,
            num_prompts=self._inputs.manifest.num_prompts,
            num_epochs=self._inputs.run.training.num_epochs,
            num_trained=totals.num_trained,
            num_rejected=totals.num_rejected,
            rejected=totals.rejected,
            num_tokens=sum(step.num_tokens for step in metrics),
            loss=metrics[-1].loss,
            accept_length=pooled_accept_length(tail),
            bytes_streamed=stats.num_bytes,
            resumed_from_step=self._resume_step,
            wall_s=wall_s,
            trainer_wait_s=sum(step.wait_s for step in metrics),
        )


def _schedule(inputs: RunInputs) -> Schedule:
    run = inputs.run
    return Schedule(
        run_id=inputs.run_id,
        seed=run.seed,
        num_epochs=run.training.num_epochs,
        global_batch_size=run.training.global_batch_size,
        world_size=run.training.world_size,
        micro_batch_tokens=run.training.micro_batch_tokens,
        max_failed_fraction=run.inference.max_failed_fraction,
    )


def pooled_accept_length(steps: Sequence[StepMetrics]) -> float:
    """Accept length over several steps, from their counts taken together."""
    chains = [sum(depth) for depth in zip(*(step.chains for step in steps), strict=True)]
    matches = [sum(depth) for depth in zip(*(step.matches for step in steps), strict=True)]
    return accept_length([m / c if c else 0.0 for m, c in zip(matches, chains, strict=True)])


def _actor(actor_class: type, node_id: str | None = None) -> Any:
    """An actor class without a bundle; on ``node_id``, or else beside the driver."""
    node = node_id or ray.get_runtime_context().get_node_id()
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(actor_class).options(num_cpus=0, scheduling_strategy=strategy)


def _get(refs: Any) -> Any:
    """``ray.get``, with the remote side's own errors."""
    try:
        return ray.get(refs)
    except RayError as error:
        raise unwrap(error) from error


def _end(actor: Any, farewell: str) -> None:
    """End an actor after its ``farewell`` method, or without it if it doesn't answer."""
    ray.wait([getattr(actor, farewell).remote()], timeout=EXIT_TIMEOUT_S)
    ray.kill(actor)
