#!/usr/bin/env bash
# A quarter of an hour on a GPU: what steps cost, plain training and SAGE on CIFAR-10 at full width, and the tests on CUDA.
#
#   bash scripts/gpu_check.sh DATA OUT SECONDS     DATA: CIFAR-10, as --data_dir takes it; OUT: a folder for one archive
#
# 1. scripts/benchmark.py: search and steps of vanilla and SAGE, without --fast and with it
# 2. the README's CIFAR-10 command with --fast for vanilla and SAGE side by side: 300 epochs, or 150 with --schedule 50 100 if
#    a minute shows that 300 would not end in time
# 3. with the seconds that are left: tests/test_devices.py and tests/test_graph.py
# It ends within SECONDS and leaves OUT/gpu_check.tar.gz: report.md, metrics, configs, logs and curves, no checkpoints. Called
# again with the same WORK, it continues: finished parts are skipped. From the environment:
#   WORK=…   where checkpoints and results stay between calls (experiments/gpu_check)      LATER=…   seconds of later calls (0)
#   PYTHON=… an environment with requirements-dev.txt
# A rehearsal on the CPU: DEVICE=cpu, and smaller: EPOCHS=6 SHORTER=3 PROBE=20 STEPS_ARGS="--initial_channels 4 --repeats 1"
# SEARCH_ARGS="--search_sizes 16 32 --repeats 1" RUN_ARGS="--initial_channels 4 --labels_per_class 20" TESTS="tests/test_devices.py".
set -uo pipefail
cd "$(dirname "$0")/.."
fail() { echo "gpu_check.sh: error: $*" >&2; exit 2; }
[ $# -eq 3 ] || fail "usage: bash scripts/gpu_check.sh DATA OUT SECONDS"
epochs=${EPOCHS:-300} shorter=${SHORTER:-150} probe=${PROBE:-60} later=${LATER:-0} device=${DEVICE:-cuda}
for number in "$3" "$epochs" "$shorter" "$probe" "$later"; do
  [[ $number =~ ^(0|[1-9][0-9]{0,5})$ ]] || fail "$number is not a whole number of seconds or epochs"
done
[[ $device =~ ^(cuda|cpu)$ ]] || fail "DEVICE=$device is neither cuda nor cpu"
[ -d "$1" ] || fail "there is no folder $1 with CIFAR-10"
work=${WORK:-experiments/gpu_check} deadline=$((SECONDS + $3 - 15)) # in which runs save, and all is packed
mkdir -p "$2" "$work/runs" || exit 1
data=$(cd "$1" && pwd) out=$(cd "$2" && pwd) work=$(cd "$work" && pwd) failed=0 child=""
export PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export TORCHINDUCTOR_CACHE_DIR=$work/compiled # what one part compiles, the next finds
export SAGE_FLAGS="--blur_sigma 1.0 --kernel_size 5 --mixup_alpha 1.0 --upper_lambda 0.6 --rand_pos 0.01 --update_ratio 0.7"

left() { echo $((deadline - SECONDS)); }
pack() {
  "$PYTHON" scripts/gpu_report.py "$work" >"$work/report.md" && cat "$work/report.md"
  (cd "$work" && find . -size -2M \( -name '*.md' -o -name '*.json' -o -name '*.log' -o -name '*.csv' -o -name 'log.txt' -o -name '*.png' \) \
    ! -path './compiled/*' -print0 | tar -czf "$out/gpu_check.tar.gz" --null -T -)
  echo "$out/gpu_check.tar.gz: $(du -k "$out/gpu_check.tar.gz" | cut -f1) KiB"
}
trap pack EXIT
trap '[ -z "$child" ] || { kill "$child"; wait "$child"; }; exit 143' TERM INT
part() { # part NAME SECONDS COMMAND…: unless it was finished; stopped by TERM, which a sweep answers by saving
  local name=$1 limit=$2 code
  shift 2
  [ ! -e "$work/$name.done" ] || return 0
  [ "$limit" -le "$(left)" ] || limit=$(left)
  [ "$limit" -gt 0 ] || return 124
  echo "+ $*" | tee -a "$work/$name.log"
  timeout --foreground --signal=TERM --kill-after=30 "$limit" "$@" >>"$work/$name.log" 2>&1 &
  child=$!
  [[ $name != train* ]] || decide
  wait "$child"
  code=$? child=""
  [ $code -ne 0 ] || touch "$work/$name.done"
  [ $code -eq 0 ] || [ $code -eq 124 ] || [ $code -eq 143 ] || { failed=1; echo "$name failed: $(tail -n 1 "$work/$name.log")"; }
  return $code
}
decide() { # while the runs go: whether the long training ends in time; once, after the first epochs of both
  local needs from=$SECONDS
  while [ ! -e "$work/epochs" ] && kill -0 "$child" 2>/dev/null; do
    sleep 2
    [ $((SECONDS - from)) -ge "$probe" ] && needs=$("$PYTHON" scripts/gpu_report.py "$work" "$epochs") || continue
    echo "$epochs epochs need $needs more seconds; $(left) and $later of later calls are left" | tee -a "$work/decision.log"
    echo $((needs > $(left) + later ? shorter : epochs)) >"$work/epochs"
    [ "$(cat "$work/epochs")" = "$epochs" ] || kill "$child"
  done
}
train() { # train EPOCHS; what RUN_ARGS says counts
  # shellcheck disable=SC2086
  part "train$1" "$(left)" bash scripts/sweep.sh --jobs 2 --methods "vanilla sage" --seeds 1 -- --dataset cifar10 --data_dir "$data" \
    --root_dir "$work/runs" --labels_per_class 5000 --arch preactresnet18 --learning_rate 0.2 --momentum 0.9 --decay 0.0001 \
    --epochs "$1" --schedule $(($1 / 3)) $(($1 * 2 / 3)) --gammas 0.1 0.1 --fast --checkpoint_minutes 1 --add_name "$1epochs" \
    --ngpu $([ "$device" = cuda ] && echo 1 || echo 0) ${RUN_ARGS:-}
}

benchmark=("$PYTHON" scripts/benchmark.py --device "$device" --parts)
# shellcheck disable=SC2086
{
  part search 20 "${benchmark[@]}" search ${SEARCH_ARGS:---search_sizes 32} --out "$work/search.json"
  part steps 30 "${benchmark[@]}" steps --methods vanilla sage ${STEPS_ARGS:-} --out "$work/steps.json"
  part steps_fast 90 "${benchmark[@]}" steps --methods vanilla sage --fast ${STEPS_ARGS:-} --out "$work/steps_fast.json"
  first=$(cat "$work/epochs" 2>/dev/null || echo "$epochs")
  train "$first" || [ "$(cat "$work/epochs" 2>/dev/null)" != "$shorter" ] || [ "$first" = "$shorter" ] || train "$shorter"
  part tests "$(left)" "$PYTHON" -m pytest -o addopts= -q -rfE ${TESTS:-$(ls tests/test_devices.py tests/test_graph.py 2>/dev/null)}
}
exit $failed
