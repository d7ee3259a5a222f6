#!/usr/bin/env bash
# Trains on a Slurm cluster of GPUs: one process per machine, which has all of its GPUs.
#
#   launch/slurm.sh [--dry-run] -- --config=… --workdir=…
#
# The job is put into the queue again after a pre-emption or when it has reached its time limit, and goes on from the
# newest checkpoint: Slurm sends SIGTERM to all processes two minutes before, they save the same step and leave.
#
# Settings are variables of the environment:
#   NODES GPUS       machines, and GPUs of each (default 1, 8)      TIME       limit of one go (default 24:00:00)
#   PARTITION ACCOUNT  of the cluster, where it has such            NAME       of the job (default adastate)
#   PYTHON           interpreter with this package (default python) CPUS       of each machine (default 16)
#   RESTARTS         how often it goes back into the queue at most (default 100)
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

DRY=
if [[ ${1:-} == --dry-run ]]; then DRY=1; shift; fi
# What stands where it means nothing is refused: a --dry-run behind it would start a job.
[[ ${1:---} == -- ]] || fail "$1: --dry-run comes first, and what training is given behind --"
(($#)) && shift
(($#)) || fail "name what to train after --: --config=… --workdir=…"
NODES=${NODES:-1} GPUS=${GPUS:-8} TIME=${TIME:-24:00:00} NAME=${NAME:-adastate} PYTHON=${PYTHON:-python} CPUS=${CPUS:-16}
RESTARTS=${RESTARTS:-100}
[[ $RESTARTS =~ ^[0-9]+$ ]] || fail "RESTARTS=$RESTARTS: must be a number"
ROOT=$(cd "$(dirname "$0")/.." && pwd)

options=(--job-name="$NAME" --nodes="$NODES" --ntasks-per-node=1 --gpus-per-node="$GPUS" --cpus-per-task="$CPUS"
  --time="$TIME" --requeue --open-mode=append --signal=TERM@120 --chdir="$ROOT" --output="$NAME-%j.log")
[[ -z ${PARTITION:-} ]] || options+=(--partition="$PARTITION")
[[ -z ${ACCOUNT:-} ]] || options+=(--account="$ACCOUNT")

# --kill-on-bad-exit=0: the processes end by themselves, each with a line that says why. JAX gives a process of Slurm one
# GPU unless it is told which are its own. srun's code is the highest of all: 143 stopped by SIGTERM, 137 one was killed,
# 134 the first is gone and JAX ended the others, 75 another process is gone.
gpus=$(seq -s, 0 $((GPUS - 1)))
script="#!/usr/bin/env bash
export JAX_LOCAL_DEVICE_IDS=$gpus
code=0
srun --label --kill-on-bad-exit=0 $(printf '%q ' "$PYTHON" -u -m adastate_jax.train "$@")|| code=\$?
case \$code in
  75 | 134 | 137 | 143) [[ \${SLURM_RESTART_COUNT:-0} -ge $RESTARTS ]] || scontrol requeue \"\$SLURM_JOB_ID\" ;;
esac
exit \$code"

if [[ -n $DRY ]]; then
  printf '%q ' sbatch "${options[@]}"
  printf '<<END\n%s\nEND\n' "$script"
else
  sbatch "${options[@]}" <<<"$script"
fi
