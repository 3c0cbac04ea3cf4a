#!/usr/bin/env bash
# Starts the processes of one node. Run it once on every node (Slurm: launch/slurm/train.sbatch does).

# First of all: an ignored signal stays ignored across exec, until launch.processes.agent holds it for the ranks.
trap '' "${STOP_SIGNAL:-USR1}" TERM
set -euo pipefail

usage() {
    cat <<'HELP'
usage: [NAME=value ...] launch/torchrun.sh train CONFIG [key=value ...] [--resume [PATH]]

One node:             NPROC=8 launch/torchrun.sh train configs/mine.yaml
Many, any order:      NNODES=4 RDZV_ENDPOINT=node1:29400 NPROC=8 launch/torchrun.sh train configs/mine.yaml
As many as there are: NNODES=2:4 RDZV_ENDPOINT=node1:29400 NPROC=8 launch/torchrun.sh train configs/mine.yaml
Many, numbered:       NNODES=4 NODE_RANK=0 MASTER_ADDR=node1 MASTER_PORT=29400 NPROC=8 launch/torchrun.sh train ...

  NPROC          processes on this node (default: its GPUs as Slurm or nvidia-smi counts them, or 1)
  NNODES         number of nodes (default: 1). MIN:MAX leaves it open: when a node is lost the others go on from the
                 newest checkpoint, and one that is started later joins them (docs/cluster.md)
  RDZV_ENDPOINT  host:port that all nodes reach, on one of them; the nodes number themselves (c10d rendezvous)
  RDZV_ID        name of this launch, the same on all nodes and another one for every launch (default: infini)
  NODE_RANK      number of this node, 0 on MASTER_ADDR; in place of RDZV_ENDPOINT
  RDZV_CONF      further settings of the rendezvous, as torchrun's --rdzv-conf takes them (key=value,...)
  MAX_RESTARTS   restarts after a failure (default: 0; with NNODES=MIN:MAX 3 without a new checkpoint in between)
  STOP_SIGNAL    signal for 'save and leave' (default: USR1); nothing dies of it while starting up
  PYTHON         interpreter (default: the project's .venv, else python3)
  MODULE         module that each process runs (default: launch.cli)
HELP
}

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    usage
    exit $(($# == 0 ? 2 : 0))
fi

fail() {
    echo "torchrun.sh: error: $1" >&2
    exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x $root/.venv/bin/python ]] && PYTHON=$root/.venv/bin/python
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

NNODES=${NNODES:-1}
NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-}}
if [[ -z $NPROC ]]; then
    NPROC=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || NPROC=0
    ((NPROC > 0)) || NPROC=1
fi

[[ $NNODES == *:* ]] && restarts=3 || restarts=0
options=(--nnodes "$NNODES" --nproc-per-node "$NPROC" --max-restarts "${MAX_RESTARTS:-$restarts}")
[[ -z ${RDZV_CONF:-} ]] || options+=(--rdzv-conf "$RDZV_CONF")
if [[ -n ${RDZV_ENDPOINT:-} && -n ${NODE_RANK:-} ]]; then
    fail "RDZV_ENDPOINT and NODE_RANK exclude each other: set one of them"
elif [[ $NNODES == *:* && -z ${RDZV_ENDPOINT:-} ]]; then
    fail "NNODES=$NNODES needs RDZV_ENDPOINT=host:port: nodes that come and go have no numbers"
elif [[ -n ${RDZV_ENDPOINT:-} ]]; then
    [[ $RDZV_ENDPOINT == *:* ]] || fail "RDZV_ENDPOINT=$RDZV_ENDPOINT must be host:port"
    options+=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-infini}")
    [[ $RDZV_ENDPOINT != 127.0.0.1:* ]] || options+=(--local-addr 127.0.0.1)
elif [[ -n ${NODE_RANK:-} ]]; then
    [[ -n ${MASTER_ADDR:-} && -n ${MASTER_PORT:-} ]] || fail "NODE_RANK needs MASTER_ADDR and MASTER_PORT of node 0"
    options+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
    options+=(--rdzv-id "${RDZV_ID:-infini}")
elif [[ $NNODES != 1 ]]; then
    fail "NNODES=$NNODES needs RDZV_ENDPOINT=host:port, or NODE_RANK with MASTER_ADDR and MASTER_PORT"
else
    options+=(--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1 --rdzv-id "$$-$RANDOM-$RANDOM")
fi

# launch.processes.agent is torchrun, quieter and gentler with signals (see there).
exec "$PYTHON" -m launch.processes.agent "${options[@]}" -m "${MODULE:-launch.cli}" "$@"
