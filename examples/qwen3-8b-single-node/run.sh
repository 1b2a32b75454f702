#!/usr/bin/env bash
# A draft for Qwen3-8B on one machine, in a Ray of its own. `run.sh --plan` shows what goes where.
#
#   CUDA_VISIBLE_DEVICES=4,5,6,7 examples/qwen3-8b-single-node/run.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
config=examples/qwen3-8b-single-node/config.yaml
if [ "${1:-}" = --plan ]; then
    exec python -m torchspec_lib.plan_preview "$config"
fi
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0,1,2,3}"
export RAY_ADDRESS=local
exec pyflyte run workflows/train_draft.py train_draft --inputs-file "$config"
