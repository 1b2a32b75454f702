#!/usr/bin/env bash
# A draft for Kimi K2.5 on the cluster of setup_ray_cluster.sh; on its head node, once all three
# have joined. `run.sh --plan` shows what goes where, anywhere.
set -euo pipefail
cd "$(dirname "$0")/../.."
config=examples/kimi-k25-3node-h100/config.yaml
if [ "${1:-}" = --plan ]; then
    exec python -m torchspec_lib.plan_preview "$config"
fi
export RAY_ADDRESS="${RAY_ADDRESS:-auto}"
exec pyflyte run workflows/train_draft.py train_draft --inputs-file "$config"
