#!/usr/bin/env bash
# Trains a config under torchrun, one process per device, with DDP.
#
#   launch/torchrun.sh [CONFIG [OPTION ...]]         launch/torchrun.sh configs/quickstart.yaml --total.count=20000
#
# Paths are relative to the current folder. The options are those of `adabatch train`. From the environment:
#   NPROC          processes on this node (one per GPU; 2 if there is none)
#   NNODES         nodes, each of which runs this script (1), and then, on each:
#   NODE_RANK      number of this node, from 0
#   MASTER_ADDR    host of node 0;  MASTER_PORT  a free port there (29500)
#   PYTHON         the interpreter (python)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ ! -d "$root/adabatch" ] || export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # in a clone, its own code

config=${1:-$root/configs/digits_adamw.yaml}
[ $# -eq 0 ] || shift
python=${PYTHON:-python}
gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
nproc=${NPROC:-$((gpus > 0 ? gpus : 2))}
nnodes=${NNODES:-1}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}

if [ "$nnodes" -eq 1 ]; then
  where=(--standalone)
else
  where=(--node-rank "${NODE_RANK:?says which of the $nnodes nodes this is}"
    --master-addr "${MASTER_ADDR:?is the host of node 0}" --master-port "${MASTER_PORT:-29500}")
fi
echo "torchrun: $config on $nnodes node(s) x $nproc process(es), $OMP_NUM_THREADS thread(s) each; ${where[*]}" >&2
exec "$python" -m torch.distributed.run --nnodes "$nnodes" --nproc-per-node "$nproc" "${where[@]}" \
  -m adabatch train --config "$config" "$@"
