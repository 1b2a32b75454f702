#!/usr/bin/env bash
# Joins this machine to the Ray cluster that run.sh uses. On every node, the head first:
#
#   setup_ray_cluster.sh head                 # prints the address for the others
#   setup_ray_cluster.sh worker 10.0.0.1:6379
#
# Name the network between the nodes where it isn't the default route's, on every node alike:
#   export NCCL_SOCKET_IFNAME=eth1 GLOO_SOCKET_IFNAME=eth1 TP_SOCKET_IFNAME=eth1
set -euo pipefail
role="${1:-}"
port=6379
case "$role" in
    head) exec ray start --head --port="$port" --num-gpus=8 ;;
    worker)
        address="${2:?usage: setup_ray_cluster.sh worker IP:PORT}"
        exec ray start --address="$address" --num-gpus=8
        ;;
    *)
        echo "usage: setup_ray_cluster.sh head | worker IP:PORT" >&2
        exit 2
        ;;
esac
