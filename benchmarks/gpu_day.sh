#!/usr/bin/env bash
# All that is to be measured on a GPU, within 25 minutes, into one folder:
#
#   benchmarks/gpu_day.sh OUT              # requirements-dev.txt, and jax[cuda12]
#   benchmarks/gpu_day.sh --dry-run OUT    # on a processor, with small networks: shows that every line runs
#
# Each step has a time limit, a log OUT/STEP.log and a line in OUT/summary.txt; one that fails does not end the others,
# and the exit code is 1 in the end. No step runs past 25 minutes (SECONDS_IN_ALL) after the first one began: what has
# less than half a minute left is named as not run. Compiled programs are kept in OUT/cache. REFERENCES names a folder
# of reference files for `verify`, beside those that ship.
set -uo pipefail

DRY=
if [[ ${1:-} == --dry-run ]]; then DRY=1; shift; fi
if (($# != 1)); then echo "error: name one folder for the results" >&2; exit 2; fi
if [[ -e $1 ]]; then echo "error: $1: is there already; name another folder" >&2; exit 2; fi
mkdir -p "$1/cache" || exit 2
OUT=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2  # OUT is where the caller said
PYTHON=${PYTHON:-python}
export JAX_COMPILATION_CACHE_DIR=$OUT/cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

if [[ -n $DRY ]]; then
  export JAX_PLATFORMS=cpu
  platform=cpu config=(--config=configs/tiny.py --repeats=2) training=pass long=10 peers=(--sizes trial --turns 1)
else
  platform=cuda config=(--config=configs/wan_1_3b.py) training=training long=400 peers=(--dtype=bfloat16 --device=cuda --compile --turns 5)
fi

failed=0
in_all=${SECONDS_IN_ALL:-1500}
step() {  # NAME SECONDS COMMAND…
  local name=$1 limit=$2 began=$SECONDS code=0
  shift 2
  if ((in_all - began < 30)); then
    printf '%-14s not run: of %d s less than half a minute is left\n' "$name" "$in_all" | tee -a "$OUT/summary.txt"
    failed=1
    return
  fi
  ((limit <= in_all - began)) || limit=$((in_all - began))
  echo "== $name: $*" | tee "$OUT/$name.log"
  timeout --signal=INT --kill-after=20 "$limit" "$@" >> "$OUT/$name.log" 2>&1 || code=$?
  ((code == 0)) || failed=1
  printf '%-14s exit %3d, %4d s\n' "$name" "$code" $((SECONDS - began)) | tee -a "$OUT/summary.txt"
}

command -v nvidia-smi > /dev/null && step machine 30 nvidia-smi
step versions 60 "$PYTHON" -m pip list
step verify 300 "$PYTHON" -m adastate_jax.verify
step bfloat16 120 "$PYTHON" -m adastate_jax.verify --dtype=bfloat16 --attention=auto
step int8 90 "$PYTHON" -m adastate_jax.verify --weights=int8
step float8 90 "$PYTHON" -m adastate_jax.verify --weights=float8
[[ -z ${REFERENCES:-} ]] || step references 420 "$PYTHON" -m adastate_jax.verify "$REFERENCES"
TEST_PLATFORM=$platform step tests 300 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_accelerator.py
step bench 420 "$PYTHON" -m adastate_jax.bench "${config[@]}" --output="$OUT/bench.json"
step steady 180 "$PYTHON" -m adastate_jax.bench "${config[@]}" --only chunk --repeats="$long" --output="$OUT/steady.json"
step training 300 "$PYTHON" -m adastate_jax.bench "${config[@]}" --only "$training" --output="$OUT/training.json"
step peers 480 "$PYTHON" -m benchmarks.peers "${peers[@]}" --output="$OUT/peers.json"
rm -rf "$OUT/cache"
exit $failed
