"""One training run as a process of its own, for tests that interrupt it or look at what it leaves.

``python -m tests.drive CONFIG.json`` prints a line of JSON: the summary, and what went through
Ray's object store.
"""

import json
import sys
from pathlib import Path

import ray
from ray._private.internal_api import node_stats

from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.dataset import prepare_dataset
from torchspec_lib.errors import TorchSpecError
from torchspec_lib.joint_cluster import joint_cluster
from torchspec_lib.pipeline import preflight, provision


def object_store_bytes() -> int:
    """Bytes of every object that was ever put into this node's object store."""
    (node,) = ray.nodes()
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"])
    return stats.store_stats.cumulative_created_bytes


def main(config: str) -> None:
    run = RunConfig.model_validate_json(Path(config).read_text())
    manifest, dataset_dir = prepare_dataset(run, preflight(run))
    plan = provision(run, manifest)
    with joint_cluster(run, plan, dataset_dir, manifest) as cluster:
        summary = cluster.train()
        used_ray = ray.is_initialized()
        created = object_store_bytes() if used_ray else 0
    result = {"used_ray": used_ray, "object_store_bytes": created}
    print(json.dumps(summary.model_dump() | result))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except TorchSpecError as error:
        sys.exit(f"{type(error).__name__}: {error}")
