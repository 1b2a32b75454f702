"""Ray itself: sessions, placement and the trainer group, in one local instance."""

import contextlib
import os
import signal
import time

import pytest
import ray
from ray.exceptions import ActorUnavailableError

from tests.cluster_plans import make_plan
from tests.run_process import is_alive
from torchspec_lib.errors import CheckpointError, EngineError, PlacementError, WorkerLostError
from torchspec_lib.ray.cluster import ray_session
from torchspec_lib.ray.part_group import PartGroup
from torchspec_lib.ray.placement_group import create_placement_groups
from torchspec_lib.ray.ray_actor import RayActor
from torchspec_lib.ray.train_group import RayTrainGroup

pytestmark = pytest.mark.ray

NUM_GPUS = 4
"""Pretended: placement only counts them."""


@pytest.fixture(scope="module")
def session():
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_ADDRESS", "local")
    with ray_session(make_plan(num_trainers=2, num_engines=2), num_gpus=NUM_GPUS) as session:
        yield session
    patch.undo()


@pytest.fixture
def place(session):
    """Places plans, and gives the bundles back after the test."""
    placements = []

    def create(plan, timeout_s=5.0):
        placements.append(create_placement_groups(plan, timeout_s))
        return placements[-1]

    yield create
    for placement in placements:
        placement.remove()


def living_groups():
    rows = ray.util.placement_group_table().values()
    return [row["name"] for row in rows if row["state"] != "REMOVED"]


def are_gone(pids, within_s):
    deadline = time.monotonic() + within_s
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(is_alive(pid) for pid in pids)


class Where:
    def gpus(self):
        return ray.get_runtime_context().get_accelerator_ids()["GPU"]


class Rank(RayActor):
    """A trainer rank that meets the others over Gloo, then behaves as its spec says."""

    def __init__(self, spec):
        self._rank, self._world_size, self._behaviour = spec
        if self._behaviour == "refuse":
            raise CheckpointError("step-7", "is torn", "Remove it")
        super().__init__("trainer", self._rank, "cpu")

    def create_rendezvous(self):
        import torch.distributed as dist

        self._server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return "127.0.0.1", self._server.port

    def join(self, host, port):
        import torch.distributed as dist

        store = dist.TCPStore(host, port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=self._rank, world_size=self._world_size)

    def run(self):
        if self._behaviour == "die":
            os._exit(1)
        if self._behaviour == "echo":
            raise RuntimeError("gloo: connection closed by peer")
        if self._behaviour == "raise":
            time.sleep(0.5)
            raise CheckpointError("step-7", "is torn", "Remove it")
        import torch
        import torch.distributed as dist

        total = torch.tensor([float(self._rank + 1)])
        dist.all_reduce(total)
        return total.item()

    def pid(self):
        return os.getpid()


class Part(RayActor):
    """Belongs to an owner; does as it is told in ``run``."""

    def __init__(self, spec):
        super().__init__("part", spec, "cpu")

    def where(self):
        return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")

    def run(self, behaviour):
        if behaviour == "die":
            os._exit(1)
        if behaviour == "raise":
            raise EngineError("0", "no memory")
        time.sleep(300)


class Owner(Part):
    """Starts parts in its constructor, as an engine over several nodes does."""

    def __init__(self, slots):
        super().__init__(0)
        self.group = PartGroup("a part", Part, range(len(slots)), slots, timeout_s=60)

    def everyone(self):
        return [self.where(), *ray.get([part.where.remote() for part in self.group._actors])]

    def first_end(self, behaviours, timeout_s):
        self.group.run(behaviours)
        end = self.group.first_end(timeout_s)
        return type(end).__name__, str(end)


def start_ranks(placement, *behaviours):
    specs = [(rank, len(behaviours), behaviour) for rank, behaviour in enumerate(behaviours)]
    return RayTrainGroup.start(Rank, specs, placement.training, timeout_s=60)


def test_separate_placement_gives_every_actor_a_bundle_of_its_own(place):
    placement = place(make_plan(num_trainers=2, num_engines=1, gpus=1, engine_gpus=2))
    assert [len(slot.gpu_ids) for slot in placement.training] == [1, 1]
    assert [len(slot.gpu_ids) for slot in placement.inference] == [2]
    gpus = [gpu for slot in placement.training + placement.inference for gpu in slot.gpu_ids]
    assert sorted(gpus) == ["0", "1", "2", "3"]
    assert len(placement.groups) == 2
    node = ray.nodes()[0]
    for slot in placement.training + placement.inference:
        assert (slot.node_ip, slot.node_id) == (node["NodeManagerAddress"], node["NodeID"])


def test_colocation_puts_a_trainer_and_an_engine_on_the_same_gpu(place):
    placement = place(make_plan("colocate", num_trainers=2, gpus=1))
    assert placement.training == placement.inference
    assert len(placement.groups) == 1
    where = ray.remote(Where)
    for slot in placement.training:
        both = [where.options(**slot.options(role)).remote() for role in ("training", "inference")]
        gpus = ray.get([actor.gpus.remote() for actor in both], timeout=60)
        assert gpus == [list(slot.gpu_ids)] * 2


@pytest.mark.parametrize(
    ("mode", "num_training", "num_inference"),
    [("debug_train_only", 2, 0), ("debug_inference_only", 0, 2)],
)
def test_one_side_alone_is_placed_alone(place, mode, num_training, num_inference):
    placement = place(make_plan(mode, num_trainers=2, num_engines=2))
    assert len(placement.training) == num_training
    assert len(placement.inference) == num_inference
    assert [slot.gpu_ids for slot in placement.training] == [()] * num_training


def test_a_plan_beyond_the_local_machine_is_refused_at_once_with_the_numbers(session):
    start = time.monotonic()
    with pytest.raises(PlacementError) as error:
        create_placement_groups(make_plan(num_trainers=3, num_engines=3, gpus=1), timeout_s=60)
    assert time.monotonic() - start < 3
    assert error.value.asked.startswith("6 GPUs and 6 CPUs")
    assert error.value.present.startswith(f"{NUM_GPUS} GPUs")
    assert error.value.missing == "2 GPUs"
    assert living_groups() == []


def test_a_group_that_others_leave_no_room_for_is_refused_in_time_and_nothing_is_kept(place):
    place(make_plan("debug_train_only", num_trainers=3, gpus=1))
    before = living_groups()
    with pytest.raises(PlacementError, match=r"room for 1 .* bundle.*0 GPUs and 4 CPUs are free"):
        create_placement_groups(make_plan(num_trainers=1, num_engines=1, gpus=1), timeout_s=1)
    assert living_groups() == before


def test_ranks_meet_and_the_group_returns_what_they_say(place):
    group = start_ranks(place(make_plan("debug_train_only", num_trainers=2)), "work", "work")
    pids = group.wait(group._call("pid"))
    assert group.wait(group.run()) == [3.0, 3.0]
    group.shutdown()
    group.shutdown()
    assert are_gone(pids, within_s=5)


def test_a_rank_that_dies_ends_the_group_and_is_named(place):
    group = start_ranks(place(make_plan("debug_train_only", num_trainers=2)), "work", "die")
    pids = group.wait(group._call("pid"))
    start = time.monotonic()
    with pytest.raises(WorkerLostError) as error:
        group.wait(group.run())
    assert error.value.role == "trainer rank 1"
    assert time.monotonic() - start < 10
    assert are_gone(pids, within_s=5)


def test_a_rank_that_raises_ends_the_group_with_its_own_error_not_its_peers_echo(place):
    plan = make_plan("debug_train_only", num_trainers=3)
    group = start_ranks(place(plan), "work", "echo", "raise")  # rank 0 hangs
    pids = group.wait(group._call("pid"))
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="is torn"):
        group.wait(group.run())
    assert time.monotonic() - start < 10
    assert are_gone(pids, within_s=5)


def test_a_half_started_group_is_torn_down_with_the_constructors_own_error(place):
    placement = place(make_plan("debug_train_only", num_trainers=2))
    with pytest.raises(CheckpointError, match="is torn") as error:
        start_ranks(placement, "work", "refuse")
    assert error.tb is not None  # it keeps the handles alive: rank 0 doesn't end by itself
    start_ranks(placement, "work", "work").shutdown()  # the bundles are free again


@pytest.fixture
def owner(place):
    """Of a part, each with two (pretended) GPUs."""
    placement = place(make_plan("debug_inference_only", num_engines=2, gpus=2))
    slot, *others = placement.inference
    options = slot.options("inference") | {"max_restarts": -1}
    owner = ray.remote(Owner).options(**options).remote(others)
    yield owner
    ray.kill(owner)


def test_parts_have_all_the_gpus_of_their_bundles_and_end_with_their_owner(owner):
    first = ray.get(owner.everyone.remote(), timeout=60)
    assert [gpus for _, gpus in first] == ["0,1", "2,3"]
    os.kill(first[0][0], signal.SIGKILL)
    assert are_gone([pid for pid, _ in first], within_s=10)
    again = None
    while again is None:
        with contextlib.suppress(ActorUnavailableError):  # while it is just ending
            again = ray.get(owner.everyone.remote(), timeout=60)
    assert [gpus for _, gpus in again] == ["0,1", "2,3"]
    assert not {pid for pid, _ in first} & {pid for pid, _ in again}


@pytest.mark.parametrize(
    ("behaviour", "timeout_s", "kind", "words"),
    [
        ("sleep", 1.0, "NoneType", "None"),
        ("raise", 30.0, "EngineError", "engine 0: no memory"),
        ("die", 30.0, "WorkerLostError", "lost a part"),
    ],
)
def test_an_owner_learns_how_a_part_ended(owner, behaviour, timeout_s, kind, words):
    end = ray.get(owner.first_end.remote([behaviour], timeout_s), timeout=60)
    assert end[0] == kind
    assert end[1].startswith(words)


def test_a_ray_that_is_there_already_is_reused_and_left_alone(session):
    with ray_session(make_plan()) as inner:
        assert inner.origin == "reused"
    assert ray.is_initialized()
