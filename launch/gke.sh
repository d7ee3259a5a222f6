#!/usr/bin/env bash
# Trains on a TPU slice of GKE, as a JobSet made from launch/gke_jobset.yaml.
#
#   launch/gke.sh [--dry-run] apply -- --config=… --workdir=/runs/…      launch/gke.sh [--dry-run] follow | delete
#
# Settings are variables of the environment:
#   NAME             of the JobSet, at most 28 characters        IMAGE    container with this package and jax[tpu]
#   ACCELERATOR      tpu-v6e-slice, tpu-v5p-slice, …             TOPOLOGY 4x4
#   HOSTS CHIPS      machines of the slice, and chips of each    CLAIM    volume of all hosts, mounted at /runs
#   SPOT             1 for spot nodes (default 0)                RESTARTS how often it starts again (default 100)
#   CPU MEMORY       of each machine (default 16, 64Gi)
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

DRY=
if [[ ${1:-} == --dry-run ]]; then DRY=1; shift; fi
ACTION=${1:-}
[[ $# -gt 0 ]] && shift
# What stands where it means nothing is refused: a --dry-run behind the action would start or delete a training.
[[ ${1:---} == -- ]] || fail "$1: --dry-run comes first, and what training is given behind --"
(($#)) && shift
[[ $ACTION == apply || $# == 0 ]] || fail "$1: $ACTION trains nothing"
NAME=${NAME:-}
[[ $NAME =~ ^[a-z][a-z0-9-]{0,27}$ ]] || fail "NAME=$NAME: at most 28 small letters, digits and dashes; pods add to it"

# Runs a command, or prints it as a shell would read it.
do_() {
  if [[ -n $DRY ]]; then printf '%q ' "$@"; printf '\n'; else "$@"; fi
}

# The arguments as a list of JSON, which YAML is a superset of.
arguments() {
  local separator='' word
  printf '['
  for word in "$@"; do
    word=${word//\\/\\\\}
    printf '%s"%s"' "$separator" "${word//\"/\\\"}"
    separator=', '
  done
  printf ']'
}

# shellcheck disable=SC2034  # read by their names
manifest() {
  local text name SPOT_SELECTOR='' ARGUMENTS
  ARGUMENTS=$(arguments "$@")
  [[ ${SPOT:-0} == 1 ]] && SPOT_SELECTOR='cloud.google.com/gke-spot: "true"'
  text=$(cat "$(dirname "$0")/gke_jobset.yaml")
  for name in NAME IMAGE ACCELERATOR TOPOLOGY HOSTS CHIPS CLAIM RESTARTS CPU MEMORY SPOT_SELECTOR ARGUMENTS; do
    [[ $name == SPOT_SELECTOR || -n ${!name:-} ]] || fail "$name is not set"
    text=${text//"\${$name}"/"${!name:-}"}
  done
  printf '%s\n' "$text" | grep -v '^ *$'
}

RESTARTS=${RESTARTS:-100} CPU=${CPU:-16} MEMORY=${MEMORY:-64Gi}
case $ACTION in
  apply)
    (($#)) || fail "name what to train after --: --config=… --workdir=/runs/…"
    text=$(manifest "$@")
    if [[ -n $DRY ]]; then
      echo "kubectl apply -f - <<END"
      printf '%s\nEND\n' "$text"
    else
      kubectl apply -f - <<<"$text"
    fi
    ;;
  follow) do_ kubectl logs --follow --prefix --max-log-requests=100 --selector="jobset.sigs.k8s.io/jobset-name=$NAME" ;;
  delete) do_ kubectl delete jobset "$NAME" ;;
  *) fail "name an action: apply, follow or delete" ;;
esac
