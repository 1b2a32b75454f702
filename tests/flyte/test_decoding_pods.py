"""The decoder of snapshots in the plan of a Kubernetes cluster, and in its drawing."""

import pytest

from tasks.plan_drawing import drawing
from tasks.ray_pods import worker_groups
from torchspec_lib.config.run import RunConfig
from torchspec_lib.plan import make_plan
from torchspec_lib.target import read_target


@pytest.mark.parametrize("placement", ["separate", "colocate"])
def test_a_decoder_has_a_pod_of_its_own_unless_it_is_colocated(placement):
    run = RunConfig.model_validate(
        {
            "model": {"target": "examples/tiny_target"},
            "data": {"train": ["t.jsonl"], "heldout": ["h.jsonl"]},
            "snapshots": {"interval_steps": 10},
            "cluster": {"placement": placement},
        }
    )
    plan = make_plan(run, read_target(run.model), num_prompts=100, longest=64)
    groups = {group.name: (group.num_pods, group.num_gpus) for group in worker_groups(run, plan)}
    alone = {"training": (1, 1)}
    if placement == "separate":
        alone |= {"inference": (1, 1), "decoding": (1, 1)}
    assert groups == alone
    shown = "decoding node" if placement == "separate" else "rank 0 + engine 0 + decoder"
    assert shown in drawing(plan)
