#!/usr/bin/env bash
# Runs of main.py for a list of methods, architectures and seeds, one a GPU at a time.
#
#   bash scripts/sweep.sh --methods "vanilla cutmix sage" --seeds "1 2 3" -- --dataset cifar10 --data_dir DATA --root_dir RUNS …
#
#   --methods "…"   (default: all eight)        --archs "…"   (default: preactresnet18)
#   --seeds "…"     (default: 0)                --jobs N      runs side by side (default: number of GPUs, else 1)
#   --dry_run       print the commands, run nothing
#   --task N        run the N-th command alone, from 0 (for a job array); --count prints how many there are
# Everything behind -- goes to each run. SAGE's own settings for the paper: SAGE_FLAGS="--upper_lambda 0.6 …", which only
# SAGE gets. Finished runs are skipped and stopped ones continued, so the same call can be typed again. A failed run does
# not stop the others; failures are listed at the end, and the exit code is then 1.
set -uo pipefail
cd "$(dirname "$0")/.."

methods="vanilla input manifold cutmix saliencymix puzzle comix sage" archs=preactresnet18 seeds=0
jobs="" dry_run="" task="" count=""
die() { echo "sweep.sh: error: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --methods | --archs | --seeds | --jobs | --task)
      [ $# -ge 2 ] || die "$1 needs a value"
      printf -v "${1#--}" %s "$2"; shift 2 ;;
    --dry_run) dry_run=1; shift ;;
    --count) count=1; shift ;;
    --) shift; break ;;
    *) die "unknown word $1 (flags of main.py go behind --)" ;;
  esac
done
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
# the GPUs of the box, or those that the caller allows
IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd,)}"
gpus=${#devices[@]}
jobs=${jobs:-$((gpus > 0 ? gpus : 1))}
[[ $jobs =~ ^[1-9][0-9]*$ ]] || die "--jobs $jobs is not a number of runs"

commands=()
for arch in $archs; do
  for method in $methods; do
    for seed in $seeds; do
      extra=""
      [ "$method" = sage ] && extra=${SAGE_FLAGS:-}
      # shellcheck disable=SC2086
      commands+=("$(printf '%q ' "$python" main.py "$@" --arch "$arch" --method "$method" --seed "$seed" $extra)")
    done
  done
done
[ -z "$count" ] || { echo "${#commands[@]}"; exit; }
if [ -n "$task" ]; then
  [[ $task =~ ^[0-9]+$ ]] && [ "$task" -lt "${#commands[@]}" ] || die "--task $task: there are ${#commands[@]} runs, counted from 0"
  echo "${commands[task]}"
  [ -n "$dry_run" ] || eval "exec ${commands[task]}"
  exit
fi
if [ -n "$dry_run" ]; then
  printf '%s\n' "${commands[@]}"
  exit
fi

# One worker a slot takes every jobs-th command; slots are GPUs where there are any.
results=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 143' TERM
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 130' INT
worker() {
  local slot=$1 number code child=""
  trap 'kill $child 2>/dev/null; wait $child; exit 143' TERM INT
  [ "$gpus" -eq 0 ] || export CUDA_VISIBLE_DEVICES=${devices[slot % gpus]}
  for ((number = slot; number < ${#commands[@]}; number += jobs)); do
    echo "+ ${commands[number]}"
    eval "exec ${commands[number]}" >"$results/$number.out" 2>&1 &
    child=$!
    wait $child
    code=$?
    echo "$code" >"$results/$number.code"
    if [ $code -eq 0 ]; then
      grep -E "final 10 epoch|is finished" "$results/$number.out" | tail -n 1
    elif [ $code -gt 128 ]; then
      echo "stopped by signal $((code - 128)); the same call continues it"
    else
      echo "failed with exit code $code: $(tail -n 1 "$results/$number.out")"
    fi
  done
}
for ((slot = 0; slot < jobs; slot++)); do worker $slot & done
wait

failed=0
for number in "${!commands[@]}"; do
  [ "$(cat "$results/$number.code" 2>/dev/null)" = 0 ] || { failed=$((failed + 1)); list+="  ${commands[number]}"$'\n'; }
done
echo "$((${#commands[@]} - failed)) of ${#commands[@]} runs are finished"
if [ $failed -gt 0 ]; then
  printf '%s failed (what they said: %s):\n%s' "$failed" "$results" "$list"
  exit 1
fi
rm -rf "$results"
