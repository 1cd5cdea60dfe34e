#!/usr/bin/env bash
# One night as a SLURM job, submitted from the repository's root, which all nodes must see:
#
#   sbatch cluster/slurm.sh cluster/one-node.yaml              a config file, then key=value words
#   sbatch --array=0-7 cluster/slurm.sh cluster/one-node.yaml  eight nights with seeds 0 to 7
#   sbatch --nodes=2 cluster/slurm.sh cluster/two-nodes.yaml   a Ray cluster over two nodes
#   DRY_RUN=1 cluster/slurm.sh cluster/one-node.yaml           what would be run, the config, the plan
#
# A job that SLURM puts back into the queue resumes its night. SHARED is where runs and generations
# go (default: the directory of submission), VENV the environment with sleepRL in it.
#
#SBATCH --job-name=sleeprl
#SBATCH --output=%x-%j.out
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --time=12:00:00
set -euo pipefail

SHARED=${SHARED:-$PWD}
VENV=${VENV:-.venv}
PORT=${PORT:-6379}
job=${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-dry}}${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}
nodes=${SLURM_JOB_NUM_NODES:-${NODES:-1}} # NODES: for DRY_RUN, outside of a job
dry=${DRY_RUN:+--dry-run}

usage="usage: sbatch cluster/slurm.sh CONFIG.yaml [key=value ...]"
case ${1:-} in
    "") echo "$usage" >&2; exit 2 ;;
    -h | --help) echo "$usage"; sed '1d; /^#SBATCH/,$d; s/^# \{0,1\}//' "$0"; exit ;; # the lines on top
esac
if [ -f "$VENV/bin/activate" ]; then . "$VENV/bin/activate"; fi

# Prints a command, and runs it unless this is a dry run; the second form does not wait for it.
step() { echo "+ $*"; [ -n "$dry" ] || "$@"; }
start() { echo "+ $* &"; [ -n "$dry" ] || "$@" & }

run=$SHARED/runs/slurm-$job
token=$SHARED/runs/.slurm-$job.token # of this job's Ray; removed at its end

# Makes the token before any Ray starts: a head does not make one. Only this user can read the file.
make_token() {
    mkdir -p "$SHARED/runs"
    rm -f "$token" # its mode would stay; and a link would be followed
    (umask 077; set -o noclobber; od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token")
    [ "$(wc -c <"$token")" -eq 64 ] || { echo "$token could not be written: is the disk full?" >&2; exit 1; }
}

if [ -f "$run/config.yaml" ]; then
    night=(sleeprl night --resume "$run")
else
    night=(sleeprl night "$@" "name=slurm-$job" "runs=$SHARED/runs" "generations=$SHARED/generations")
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || night+=("seed=$SLURM_ARRAY_TASK_ID")
    [ "$nodes" -eq 1 ] || night+=(resources.address=auto)
fi

on=(srun --nodes=1 --ntasks=1)
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-32} # srun does not take it from sbatch

# On one node the night starts a Ray of its own. On several, the first is the head; the others join
# without CPUs and GPUs, because the engines and the learner must stay together on the first.
if [ "$nodes" -gt 1 ]; then
    if [ -n "$dry" ]; then
        mapfile -t names < <(seq -f 'node%g' 1 "$nodes")
    else
        mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        trap 'rm -f "$token"; kill $(jobs -p) 2>/dev/null || true' EXIT
        make_token
    fi
    # Without a token anybody on the network can run code on an open head, as this user. The variables
    # go with every srun; RAY_AUTH_TOKEN would win over the file.
    unset RAY_AUTH_TOKEN
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token
    echo "+ export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token"
    on+=(--overlap -w)
    address=${names[0]}:$PORT
    start "${on[@]}" "${names[0]}" ray start --head --port="$PORT" --block \
        --num-cpus="$SRUN_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-8}"
    for _ in {1..60}; do
        [ -z "$dry" ] && ! ray health-check --address "$address" 2>/dev/null || break
        sleep 2
    done
    for name in "${names[@]:1}"; do
        start "${on[@]}" "$name" ray start --address="$address" --block --num-cpus=0 --num-gpus=0
    done
    on+=("${names[0]}")
    export RAY_ADDRESS=$address # what resources.address=auto joins
fi

step "${on[@]}" "${night[@]}"
[ -z "$dry" ] || "${night[@]}" --dry-run
