#!/usr/bin/env bash
# Trains a config on the processes of any MPI, with DDP. Needs mpi4py, and mpiexec of the MPI that it runs.
#
#   launch/mpirun.sh [CONFIG [OPTION ...]]           launch/mpirun.sh configs/quickstart.yaml --total.count=20000
#
# Paths are relative to the current folder. The options are those of `adabatch train`. From the environment:
#   NPROC             processes in all (one per GPU; 2 if there is none)
#   HOSTFILE          hosts, in the form of your MPI
#   MPIEXEC           its launcher, with your own options (mpiexec)
#   ADABATCH_BACKEND  what carries the collectives: nccl, gloo, or mpi4py if there is no network for those
#   PYTHON            the interpreter (python)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ ! -d "$root/adabatch" ] || export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # in a clone, its own code

config=${1:-$root/configs/digits_adamw.yaml}
[ $# -eq 0 ] || shift
python=${PYTHON:-python}
read -r -a mpiexec <<<"${MPIEXEC:-mpiexec}"
gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
nproc=${NPROC:-$((gpus > 0 ? gpus : 2))}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}
[ -z "${HOSTFILE:-}" ] || mpiexec+=(--hostfile "$HOSTFILE")

echo "mpirun: $config on $nproc process(es), $OMP_NUM_THREADS thread(s) each;" \
  "${mpiexec[*]}, collectives over ${ADABATCH_BACKEND:-NCCL or gloo}" >&2
# Not every MPI passes the environment on to other hosts.
exec "${mpiexec[@]}" -n "$nproc" env PYTHONPATH="${PYTHONPATH:-}" OMP_NUM_THREADS="$OMP_NUM_THREADS" \
  "$python" -m adabatch train --config "$config" "$@"
