#!/usr/bin/env bash
# Trains on Cloud TPU: makes the machines, sets them up, runs, follows the logs, starts again after a pre-emption, deletes.
#
#   launch/tpu_vm.sh [--dry-run] ACTION [arguments of adastate_jax.train after --]
#
#   create       make the TPU          setup   copy this checkout to all its machines, and install it
#   run          start training there  follow  show the log until the training ends; exits with its exit code
#   babysit      all of these, again and again until the training ends by itself; then delete. Where the connection was
#                lost and the training goes on, it follows that
#   status       what the TPU is       delete  delete it
#
# Settings are variables of the environment:
#   PROJECT ZONE NAME     of the cloud project, of the zone, of the TPU
#   TYPE                  v4-… v5litepod-… v5p-… v6e-… go through `gcloud compute tpus` (queued resources);
#                         a machine type, such as tpu7x-standard-4t, through Compute Engine, as newer chips do
#   TOPOLOGY HOSTS        of a slice of Compute Engine: 4x4x4, and how many machines that is (default 1)
#   PROVISION             spot (default), flex-start or standard          HOURS   of flex-start (default 24)
#   RUNTIME               software of the TPU (default by TYPE), or family of images for Compute Engine
#   IMAGE_PROJECT         project of that family (default ubuntu-os-accelerator-images)
#   PREPARE               a shell command for each machine before it is set up, such as the mount of the work directory
#   RESTARTS              how often babysit starts the training again at most (default 100)
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

DRY=
if [[ ${1:-} == --dry-run ]]; then DRY=1; shift; fi
ACTION=${1:-}
[[ -n $ACTION ]] || fail "name an action: create, setup, run, follow, babysit, status or delete"
shift
# What stands where it means nothing is refused: a --dry-run behind the action would make or delete what costs money.
[[ ${1:---} == -- ]] || fail "$1: --dry-run comes first, and what training is given behind --"
(($#)) && shift
TRAIN=("$@")
case $ACTION in
  run | babysit) ((${#TRAIN[@]})) || fail "name what to train after --: --config=… --workdir=…" ;;
  *) ((${#TRAIN[@]} == 0)) || fail "${TRAIN[0]}: $ACTION trains nothing" ;;
esac

for name in PROJECT ZONE NAME TYPE; do [[ -n ${!name:-} ]] || fail "$name is not set"; done
PROVISION=${PROVISION:-spot} HOURS=${HOURS:-24} HOSTS=${HOSTS:-1} TOPOLOGY=${TOPOLOGY:-}
RESTARTS=${RESTARTS:-100}
[[ $RESTARTS =~ ^[0-9]+$ ]] || fail "RESTARTS=$RESTARTS: must be a number"
PAUSE=${PAUSE:-60} # seconds between two looks
# shellcheck disable=SC2153
[[ $NAME =~ ^[a-z][a-z0-9-]{0,40}$ ]] || fail "NAME=$NAME: small letters, digits and dashes"
ROOT=$(cd "$(dirname "$0")/.." && pwd)
LOG=adastate/train.log

((HOSTS == 1)) || [[ -n $TOPOLOGY ]] || fail "TOPOLOGY is not set: of a slice of $HOSTS machines"
IMAGE_PROJECT=${IMAGE_PROJECT:-ubuntu-os-accelerator-images}

case $TYPE in
  v[0-9]*-[0-9]*) KIND=tpu ;;
  *) KIND=engine ;;
esac
if [[ -z ${RUNTIME:-} ]]; then
  case $TYPE in
    v4-*) RUNTIME=tpu-ubuntu2204-base ;;
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
    *) [[ $ACTION != create && $ACTION != babysit ]] || fail "RUNTIME is not set: the family of images for $TYPE" ;;
  esac
fi
case $PROVISION in spot | flex-start | standard) ;; *) fail "PROVISION=$PROVISION: must be spot, flex-start or standard" ;; esac

# Runs a command, or prints it as a shell would read it.
do_() {
  if [[ -n $DRY ]]; then printf '%q ' "$@"; printf '\n'; else "$@"; fi
}

HERE=(--project="$PROJECT" --zone="$ZONE")

# Runs a shell command on all machines, or on the first; of Compute Engine, @PROCESS@ in it is the machine's number.
on() {
  local worker=$1 command=$2
  if [[ $KIND == tpu ]]; then
    do_ gcloud compute tpus tpu-vm ssh "$NAME" "${HERE[@]}" --worker="$worker" --command="$command"
    return
  fi
  find_machines || return
  local index code=0 pids=()
  for index in "${!MACHINES[@]}"; do
    [[ $worker == all || $worker == "$index" ]] || continue
    # one after the other in a dry run, so that their lines do not mix
    do_ gcloud compute ssh "${MACHINES[index]}" "${HERE[@]}" --command="${command//@PROCESS@/"$index"}" &
    if [[ -n $DRY ]]; then wait $!; else pids+=($!); fi
  done
  for index in "${pids[@]}"; do wait "$index" || code=$?; done
  return "$code"
}

# The names of Compute Engine's machines, in an order that stays; those of a group have endings of the cloud's choice.
find_machines() {
  if [[ -z $TOPOLOGY ]]; then MACHINES=("$NAME"); return; fi
  if [[ -n $DRY ]]; then
    mapfile -t MACHINES < <(seq -f "$NAME-%g" 0 $((HOSTS - 1)))
    return
  fi
  mapfile -t MACHINES < <(gcloud compute instance-groups managed list-instances "$NAME" "${HERE[@]}" \
    --format='value(instance.basename())' | sort)
  ((${#MACHINES[@]} == HOSTS)) || { echo "$NAME: has ${#MACHINES[@]} of $HOSTS machines" >&2; return 255; }
}

create() {
  if [[ $KIND == tpu ]]; then
    local way=() alpha=()
    case $PROVISION in
      spot) way=(--spot) ;;
      flex-start) alpha=(alpha) way=(--provisioning-model=FLEX_START --max-run-duration="${HOURS}h") ;;
    esac
    # flags of flex-start: the alpha command alone has them
    do_ gcloud "${alpha[@]}" compute tpus queued-resources create "$NAME" "${HERE[@]}" \
      --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${way[@]}"
    return
  fi
  local way=(--maintenance-policy=TERMINATE)
  case $PROVISION in
    spot) way+=(--provisioning-model=SPOT --instance-termination-action=DELETE) ;;
    flex-start)
      way+=(--provisioning-model=FLEX_START --max-run-duration="${HOURS}h" --instance-termination-action=DELETE
        --reservation-affinity=none)
      ;;
  esac
  if [[ -n $TOPOLOGY ]]; then
    do_ gcloud compute resource-policies create workload-policy "$NAME" --project="$PROJECT" --region="${ZONE%-*}" \
      --type=HIGH_THROUGHPUT --accelerator-topology="$TOPOLOGY"
    do_ gcloud compute instance-templates create "$NAME" --project="$PROJECT" --machine-type="$TYPE" \
      --image-family="$RUNTIME" --image-project="$IMAGE_PROJECT" "${way[@]}"
    # bulk: all machines or none
    do_ gcloud compute instance-groups managed create "$NAME" "${HERE[@]}" --template="$NAME" --size="$HOSTS" \
      --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing \
      --workload-policy="projects/$PROJECT/regions/${ZONE%-*}/resourcePolicies/$NAME"
    return
  fi
  do_ gcloud compute instances create "$NAME" "${HERE[@]}" --machine-type="$TYPE" --image-family="$RUNTIME" \
    --image-project="$IMAGE_PROJECT" "${way[@]}"
}

# What the TPU is: nothing, or in capitals the state that the cloud gives.
state() {
  if [[ $KIND == tpu ]]; then
    gcloud compute tpus queued-resources describe "$NAME" "${HERE[@]}" --format='value(state.state)' 2>/dev/null || true
  else
    find_machines 2>/dev/null || true
    [[ -z ${MACHINES[0]:-} ]] ||
      gcloud compute instances describe "${MACHINES[0]}" "${HERE[@]}" --format='value(status)' 2>/dev/null || true
  fi
}

# Waits until the machines are there; fails if they will not come.
await() {
  [[ -z $DRY ]] || return 0
  local now
  while true; do
    now=$(state)
    case $now in
      ACTIVE | RUNNING) return 0 ;;
      FAILED | SUSPENDED | SUSPENDING | TERMINATED | STOPPED | '') echo "$NAME: ${now:-not there}" >&2; return 1 ;;
      *) echo "$NAME: $now" >&2; sleep "$PAUSE" ;;
    esac
  done
}

setup() {
  local archive machine
  archive=$(mktemp "${TMPDIR:-/tmp}/adastate.XXXXXX")
  # Without what was made here: an environment would be unpacked into the one that is made there.
  do_ tar -czf "$archive" -C "$ROOT" --exclude=.git --exclude=.venv --exclude=venv --exclude=runs \
    --exclude=__pycache__ . || return
  if [[ $KIND == tpu ]]; then
    do_ gcloud compute tpus tpu-vm scp "$archive" "$NAME:adastate.tgz" "${HERE[@]}" --worker=all || return
  else
    find_machines || return
    for machine in "${MACHINES[@]}"; do
      do_ gcloud compute scp "$archive" "$machine:adastate.tgz" "${HERE[@]}" || return
    done
  fi
  rm -f "$archive"
  [[ -z ${PREPARE:-} ]] || on all "$PREPARE" || return
  # Ubuntu 22.04, which most TPUs have, comes with Python 3.10: uv brings a newer one.
  on all "set -e; mkdir -p adastate; tar -xzf adastate.tgz -C adastate; cd adastate; if [ ! -x .venv/bin/pip ]; then\
 if python3 -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))'; then python3 -m venv .venv;\
 else curl -LsSf https://astral.sh/uv/install.sh | sh; ~/.local/bin/uv venv --clear --seed --python 3.12 .venv; fi; fi;\
 .venv/bin/pip install -q -U 'jax[tpu]' -r requirements.txt"
}

# A pattern for pgrep and pkill, which by its brackets is not that of the shell in whose command it stands.
TRAINING='[a]dastate_jax.train'

# What starts the training on one machine, detached, with its exit code in a file beside the log.
command_line() {
  local words
  words=$(printf '%q ' "${TRAIN[@]}")
  if [[ $KIND == engine && $HOSTS -gt 1 ]]; then
    words+="--coordinator=${MACHINES[0]}:8476 --processes=$HOSTS --process=@PROCESS@ "
  fi
  echo "cd adastate && rm -f train.exit && nohup bash -c '.venv/bin/python -u -m adastate_jax.train ${words//\'/\'\\\'\'}; echo \$? > train.exit' > train.log 2>&1 < /dev/null &"
}

run() {
  [[ $KIND == tpu ]] || find_machines || return
  on all "$(command_line)"
}

# The log of the first machine as it grows; then the exit code of the training: 137 if it is gone without one, by a kill
# or because the machine was started again.
follow() {
  on 0 "mkdir -p adastate; tail -n +1 -F $LOG & while [ ! -s adastate/train.exit ]; do sleep 2; pgrep -f '$TRAINING' > /dev/null ||\
 [ -s adastate/train.exit ] || echo 137 > adastate/train.exit; done; kill \$!; exit \$(cat adastate/train.exit)"
}

# Ends what is left of a training on all machines: it holds the chips.
end_all() {
  on all "pkill -KILL -f '$TRAINING'; true"
}

delete() {
  if [[ $KIND == tpu ]]; then
    do_ gcloud compute tpus queued-resources delete "$NAME" "${HERE[@]}" --force --quiet
  elif [[ -n $TOPOLOGY ]]; then
    do_ gcloud compute instance-groups managed delete "$NAME" "${HERE[@]}" --quiet
    do_ gcloud compute instance-templates delete "$NAME" --project="$PROJECT" --quiet
    do_ gcloud compute resource-policies delete "$NAME" --project="$PROJECT" --region="${ZONE%-*}" --quiet
  else
    do_ gcloud compute instances delete "$NAME" "${HERE[@]}" --quiet
  fi
}

# Until the training ends by itself. 75 and 143 are its codes for "another process is gone" and "stopped by SIGTERM", 134
# is JAX's where the first process is gone, 137 a kill's, 255 ssh's for a machine that is gone: after all of them the
# training goes on from the newest checkpoint.
babysit() {
  local code lost='' dropped begun='' restarts=0 failures=0
  while true; do
    # Later on it may fail because the state could not be asked for, and the machines are there: `await` finds that out.
    if [[ -n $DRY || -z $(state) ]]; then create || [[ -n $begun ]] || return; fi
    begun=1 code=255 dropped=
    if await; then # until there are machines, for ever: they are not paid for
      if [[ -n $lost ]] || { setup && end_all && run; }; then
        code=0 failures=0
        follow || code=$? restarts=$((restarts + 1))
        [[ $code != 255 ]] || dropped=1
      else # a machine that ssh does not reach yet, say
        failures=$((failures + 1))
        ((failures < 4)) || { echo "$NAME: could not be set up, $failures times; given up" >&2; code=1; break; }
      fi
    fi
    lost=
    case $code in
      75 | 134 | 137 | 143 | 255)
        [[ -z $DRY ]] || break
        ((restarts <= RESTARTS)) || { echo "$NAME: ended with $code, after $RESTARTS restarts; given up" >&2; break; }
        echo "$NAME: ended with $code; again" >&2
        # Machines that are still there go on as they are; others are made anew. Where they are there and ssh is not, the
        # connection was lost, and the training may go on without it.
        case $(state) in
          ACTIVE | RUNNING) lost=$dropped ;;
          '') ;;
          *) delete || true ;;
        esac
        sleep "$PAUSE"
        ;;
      *) break ;;
    esac
  done
  delete
  return "$code"
}

case $ACTION in
  create | setup | run | follow | babysit | delete) "$ACTION" ;;
  status) if [[ -n $DRY ]]; then echo "gcloud … describe $NAME"; else state; fi ;;
  *) fail "$ACTION: no such action; --dry-run shows what each does" ;;
esac
