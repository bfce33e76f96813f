#!/usr/bin/env bash
# Trains a config by local SGD under torchrun: processes step on their own, and average periodically.
#
#   launch/local_sgd.sh [CONFIG [OPTION ...]]        SYNC_EVERY=8 launch/local_sgd.sh configs/digits_adamw.yaml
#
# Paths are relative to the current folder. The options are those of `adabatch train`. From the environment:
#   SYNC_EVERY     steps from one average to the next, for a config that does not name `local_sgd` itself
#   all that launch/torchrun.sh reads: NPROC, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, PYTHON
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

config=${1:-$here/../configs/local_sgd_mnist.yaml}
[ $# -eq 0 ] || shift
averages=() when="as the config says"
if [ -n "${SYNC_EVERY:-}" ]; then
  when="every $SYNC_EVERY steps"
  averages=(--local_sgd.class_path=adabatch.LocalSGD "--local_sgd.init_args.sync_every=$SYNC_EVERY")
fi
echo "local_sgd: $config, averages $when" >&2
exec "$here/torchrun.sh" "$config" "${averages[@]}" "$@"
