#!/usr/bin/env bash
# The same command on each machine:
#
#   NODES=4 HEAD=node-1 docs/cluster/torchrun.sh t2i_cc12m --preset 64 --data /shared/CC12M --out /shared/runs/64
#
# NODES: how many machines; HEAD: the name of one of them, which all of them can reach; PORT: where they meet;
# PROCESSES: on each machine, by default one for each of its GPUs.
set -eu
: "${NODES:?how many machines there are}" "${HEAD:?the name of one of them}"

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # without it --max-restarts fails: pytorch issue 135712
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}" # seconds to save in after SIGTERM
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec torchrun --nnodes="$NODES" --nproc-per-node="${PROCESSES:-gpu}" --max-restarts="${RESTARTS:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29500}" --rdzv-id="${JOB:-mdm}" \
    -m mdm_models.cli train "$@"
