#!/usr/bin/env bash
# Trains a config under the deepspeed launcher, on DeepSpeed's engine.
#
#   launch/deepspeed.sh [CONFIG [OPTION ...]]        launch/deepspeed.sh configs/digits_adamw.yaml --total.count=5000
#
# Paths are relative to the current folder. The options are those of `adabatch train`. From the environment:
#   NPROC          processes on this node (one per GPU; 2 if there is none)
#   HOSTFILE       DeepSpeed's list of nodes and slots, for several nodes
#   ENGINE_CONFIG  DeepSpeed's JSON (launch/deepspeed.json)
#   MASTER_PORT    a free port of the first node (29500)
#   PYTHON         the interpreter (python)
# Without a GPU it runs on the CPU and does not build DeepSpeed's own kernels.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ ! -d "$root/adabatch" ] || export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # in a clone, its own code

config=${1:-$root/configs/digits_adamw.yaml}
[ $# -eq 0 ] || shift
python=${PYTHON:-python}
engine_config=${ENGINE_CONFIG:-$root/launch/deepspeed.json}
gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
nproc=${NPROC:-$((gpus > 0 ? gpus : 2))}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}
if [ "$gpus" -eq 0 ]; then
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} DS_BUILD_OPS=${DS_BUILD_OPS:-0}
fi

where=(--master_port "${MASTER_PORT:-29500}")
if [ -n "${HOSTFILE:-}" ]; then
  where+=(--hostfile "$HOSTFILE")
else
  where+=(--num_gpus "$nproc")
fi
echo "deepspeed: $config with $engine_config, ${DS_ACCELERATOR:-cuda}, $OMP_NUM_THREADS thread(s) each; ${where[*]}" >&2
exec "$python" -m deepspeed.launcher.runner "${where[@]}" --no_local_rank --module \
  adabatch train --config "$config" --engine deepspeed --engine_config "$engine_config" "$@"
