#!/usr/bin/env bash
# Runs of main.py for a list of methods, architectures and seeds, one a GPU at a time.
#
#   bash scripts/sweep.sh --methods "vanilla cutmix sage" --seeds "1 2 3" -- --dataset cifar10 --data_dir DATA --root_dir RUNS …
#
#   --methods "…"   (default: all)              --archs "…"   (default: preactresnet18)
#   --seeds "…"     (default: 0)                --jobs N      runs side by side (default: number of GPUs, else 1)
#   --dry_run       print the commands, run nothing
#   --task N        run the N-th command alone, from 0 (for a job array); --count prints how many there are
# Everything behind -- goes to each run; --method, --arch or --seed there stand for a list of one. Flags for one method alone
# are in the environment: SAGE_FLAGS="--upper_lambda 0.6 …", COMIX_FLAGS and the like; SAGE_FLAGS_wrn16_8="…" take their place
# for one architecture. FLAGS_wrn16_8="…" are for every method on that architecture. Every word is checked before the first
# run: a wrong one is exit code 2. Finished runs are skipped and stopped ones continued, so the same call can be given again.
# A failed run does not stop the others; what is not finished is listed at the end, and the exit code is then 1.
# Relative paths count from the folder this is called in.
set -uo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd) program=main.py
[ "$PWD" -ef "$checkout" ] || program=$checkout/main.py

jobs="" dry_run="" task="" count="" methods="" archs="" seeds="" given=" "
die() { echo "sweep.sh: error: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --methods=* | --archs=* | --seeds=* | --jobs=* | --task=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
  esac
  [[ $given != *" $1 "* ]] || die "$1 is given twice"
  case $1 in
    --methods | --archs | --seeds | --jobs | --task)
      [ $# -ge 2 ] || die "$1 needs a value"
      [[ $2 =~ [^[:space:]] ]] || die "$1 names none"
      printf -v "${1#--}" %s "$2"; given+="$1 "; shift 2 ;;
    --dry_run) dry_run=1; given+="$1 "; shift ;;
    --count) count=1; given+="$1 "; shift ;;
    --) shift; break ;;
    -h | --help) sed -n '1d; /^set /q; s/^# \{0,1\}//p' "$0"; exit ;;
    *) die "unknown argument $1 (flags of main.py go behind --)" ;;
  esac
done
[ -z "$count" ] || [ -z "$task" ] || die "--count and --task exclude each other"
python=${PYTHON:-$([ -x "$checkout/.venv/bin/python" ] && echo "$checkout/.venv/bin/python" || echo python3)}
# the GPUs of the machine, or those that the caller allows
IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -xE '[0-9]+' | paste -sd,)}"
gpus=${#devices[@]}
jobs=${jobs:-$((gpus > 0 ? gpus : 1))}
[[ $jobs =~ ^[1-9][0-9]{0,3}$ ]] || die "--jobs $jobs is not a number of runs"

command -v "$python" >/dev/null || die "PYTHON=$python is not a program"
lines=$("$python" "$checkout/scripts/sweep_commands.py" "$methods" "$archs" "$seeds" "$python" "$program" "$@")
code=$?
[ $code -ne 2 ] || exit 2 # said by Python
[ $code -eq 0 ] && [ -n "$lines" ] || die "$python cannot list the runs"
commands=()
while IFS= read -r line; do commands+=("$line"); done <<<"$lines"
[ -z "$count" ] || { echo "${#commands[@]}"; exit; }
if [ -n "$task" ]; then
  [[ $task =~ ^(0|[1-9][0-9]{0,5})$ ]] && [ "$task" -lt "${#commands[@]}" ] || die "--task $task: there are ${#commands[@]} runs, counted from 0"
  echo "${commands[task]}"
  [ -n "$dry_run" ] || eval "exec ${commands[task]}"
  exit
fi
if [ -n "$dry_run" ]; then
  printf '%s\n' "${commands[@]}"
  exit
fi

# Workers, one a GPU where there are any, take the next run that none has taken; making its folder is the taking.
results=$(mktemp -d) || die "there is no folder for temporary files: TMPDIR=${TMPDIR:-/tmp}"
stop() { # the exit code: every run saves first
  kill $(jobs -p) 2>/dev/null
  wait
  rm -rf "$results"
  echo "stopped; the same call continues"
  exit "$1"
}
trap 'stop 143' TERM
trap 'stop 130' INT
trap 'stop 129' HUP # stays ignored under nohup
worker() {
  trap 'kill $! 2>/dev/null; wait $!; exit 143' TERM
  [ "$gpus" -eq 0 ] || export CUDA_VISIBLE_DEVICES=${devices[$1 % gpus]}
  local number code
  for number in "${!commands[@]}"; do
    mkdir "$results/$number" 2>/dev/null || continue
    echo "+ ${commands[number]}"
    eval "exec ${commands[number]}" >"$results/$number/out" 2>&1 &
    wait $!
    code=$?
    echo "$code" >"$results/$number/code"
    if [ $code -eq 0 ]; then
      grep -E "final 10 epoch|is finished" "$results/$number/out" | tail -n 1
    elif [ $code -gt 128 ]; then
      echo "stopped by signal $((code - 128)); the same call continues it"
    else
      echo "failed with exit code $code: $(tail -n 1 "$results/$number/out")"
    fi
  done
}
for ((slot = 0; slot < jobs; slot++)); do worker "$slot" & done
wait

left=()
for number in "${!commands[@]}"; do
  [ "$(cat "$results/$number/code" 2>/dev/null)" = 0 ] || left+=("  ${commands[number]}")
done
echo "$((${#commands[@]} - ${#left[@]})) of ${#commands[@]} runs are finished"
if [ ${#left[@]} -gt 0 ]; then
  echo "${#left[@]} are not (what they said: $results):"
  printf '%s\n' "${left[@]}"
  exit 1
fi
rm -rf "$results"
