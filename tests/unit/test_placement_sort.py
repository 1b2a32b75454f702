"""The pure parts of the ray package: order, capacity, environment, errors."""

import socket

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from torchspec_lib.errors import EngineError, WorkerLostError
from torchspec_lib.plan import Bundle, ClusterPlan
from torchspec_lib.ray.capacity import missing_resources, placement_error
from torchspec_lib.ray.cluster import forwarded_env
from torchspec_lib.ray.failures import unwrap
from torchspec_lib.ray.held_port import hold_port
from torchspec_lib.ray.placement_group import Placement, Slot, sort_slots

TRAINER = Bundle(roles=("training",), num_cpus=1, num_gpus=1)
ENGINE = Bundle(roles=("inference",), num_cpus=2, num_gpus=2)
SHARED = Bundle(roles=("training", "inference"), num_cpus=2, num_gpus=1)


def slot(node_ip: str, *gpu_ids: str, index: int = 0, bundle: Bundle = TRAINER) -> Slot:
    return Slot(None, index, bundle, node_ip, f"node-{node_ip}", gpu_ids)


def plan(training: tuple[Bundle, ...], inference: tuple[Bundle, ...] = ()) -> ClusterPlan:
    return ClusterPlan(
        device="cuda",
        placement="separate",
        training_bundles=training,
        inference_bundles=inference,
        training_num_nodes=1,
        inference_num_nodes=1,
        num_engines=1,
        num_steps=1,
        bytes_per_token=1,
        sample_bytes=1,
        max_in_flight_bytes=1,
        segment_bytes=1,
        weight_bytes=1,
    )


def test_slots_are_ordered_by_addresses_and_gpus_as_numbers():
    ordered = [
        slot("10.0.0.9", "2"),
        slot("10.0.0.9", "10"),
        slot("10.0.0.10", "0"),
        slot("10.0.0.10", "1"),
        slot("192.168.0.1", "0"),
        slot("fd00::9", "0"),
        slot("fd00::10", "0"),
    ]
    assert sort_slots(ordered[::-1]) == ordered


def test_slots_without_gpus_keep_the_order_of_their_bundles_within_a_node():
    ordered = [slot("10.0.0.2", index=0), slot("10.0.0.2", index=1), slot("10.0.0.11", index=2)]
    assert sort_slots([ordered[1], ordered[2], ordered[0]]) == ordered


def test_gpus_named_by_uuid_are_ordered_too():
    ordered = [slot("10.0.0.2", "GPU-0aa"), slot("10.0.0.2", "GPU-9bb")]
    assert sort_slots(ordered[::-1]) == ordered


def test_an_engines_parts_are_neighbours_and_the_first_one_answers():
    slots = [slot(f"10.0.0.{node}", "0", bundle=ENGINE) for node in (9, 2, 11, 10)]
    placement = Placement((), tuple(sort_slots(slots)), ())
    nodes = [[part.node_ip for part in engine] for engine in placement.engines(2)]
    assert nodes == [["10.0.0.2", "10.0.0.9"], ["10.0.0.10", "10.0.0.11"]]
    assert [len(engine) for engine in placement.engines(1)] == [1] * 4


@pytest.mark.parametrize(
    ("bundle", "role", "num_cpus", "num_gpus"),
    [(TRAINER, "training", 1, 1), (ENGINE, "inference", 2, 2), (SHARED, "inference", 1, 0.5)],
)
def test_the_roles_of_a_slot_share_it_evenly(bundle, role, num_cpus, num_gpus):
    options = slot("10.0.0.2", "0", bundle=bundle).options(role)
    assert (options["num_cpus"], options["num_gpus"]) == (num_cpus, num_gpus)


def test_a_slot_refuses_a_role_that_it_is_not_for():
    with pytest.raises(AssertionError, match="inference"):
        slot("10.0.0.2", "0").options("inference")


@pytest.mark.parametrize(
    ("nodes", "missing"),
    [
        ([], "4 GPUs and 4 CPUs"),
        ([{"CPU": 8.0}], "4 GPUs"),
        ([{"CPU": 8.0, "GPU": 3.0}], "1 GPU"),
        ([{"CPU": 3.0, "GPU": 4.0}], "1 CPU"),
        ([{"CPU": 8.0, "GPU": 1.0}] * 4, "a node with 2 GPUs and 2 CPUs"),
        ([{"CPU": 8.0, "GPU": 2.0}] * 2, None),
        ([{"CPU": 8.0, "GPU": 8.0}], None),
    ],
)
def test_what_is_missing_is_said_in_numbers(nodes, missing):
    assert missing_resources(plan((TRAINER, TRAINER), (ENGINE,)), nodes) == missing


def test_a_placement_error_says_what_was_asked_what_is_there_and_what_is_missing():
    wanted, nodes = plan((TRAINER, TRAINER), (ENGINE,)), [{"CPU": 8.0, "GPU": 1.0}] * 2
    text = str(placement_error(wanted, nodes, "2 GPUs"))
    assert "4 GPUs and 4 CPUs in 3 bundle(s)" in text
    assert "the cluster has 2 GPUs and 16 CPUs on 2 node(s), missing 2 GPUs" in text


def test_actors_get_what_libraries_read_from_the_environment_and_nothing_else():
    environ = {"NCCL_SOCKET_IFNAME": "eth0", "HF_TOKEN": "t", "MC_X": "1", "AWS_SECRET": "s"}
    forwarded = forwarded_env(environ)
    assert {k: v for k, v in forwarded.items() if k != "PYTHONPATH"} == {
        "NCCL_SOCKET_IFNAME": "eth0",
        "HF_TOKEN": "t",
        "MC_X": "1",
    }
    assert forwarded["PYTHONPATH"].endswith(":${PYTHONPATH}")


def test_a_variable_that_the_submitted_job_forwards_is_not_forwarded_twice():
    job = '{"runtime_env": {"env_vars": {"HF_HOME": "/models"}}}'
    environ = {"HF_HOME": "/models", "HF_TOKEN": "t", "RAY_JOB_CONFIG_JSON_ENV_VAR": job}
    assert set(forwarded_env(environ)) == {"HF_TOKEN", "PYTHONPATH"}


def test_a_death_seen_by_the_callee_is_not_blamed_on_the_callee():
    error = RayTaskError("run", "traceback", ActorDiedError())
    assert unwrap(error, "trainer rank 1").role != "trainer rank 1"
    assert unwrap(ActorDiedError(), "trainer rank 1").role == "trainer rank 1"


def test_what_a_constructor_raised_keeps_its_type_and_is_no_death():
    cause = EngineError("hf", "failed its self-check")
    error = unwrap(ActorDiedError(RayTaskError("__init__", "traceback", cause)), "engine 0")
    assert error is cause
    assert not isinstance(error, WorkerLostError)


def test_a_held_port_is_only_for_a_server_that_asks_for_it():
    with hold_port() as port, socket.socket() as other, socket.socket() as server:
        with pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", port))
        server.listen()
    with socket.socket() as after:
        after.bind(("", port))
