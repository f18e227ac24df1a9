#!/usr/bin/env bash
# What this project does on your GPU, in one command of at most 9 minutes, offline:
#
#   bash scripts/gpu_check.sh DATA OUT        DATA: a folder with CIFAR-10, as --data_dir takes it; OUT: a folder for results
#
# 1. scripts/benchmark.py: steps in both modes, the search
# 2. tests on CUDA: every method against the CPU and the golden vectors, --fast against the default, repeatability
# 3. the README's CIFAR-10 SAGE command, for 40 seconds by default and then with --fast for as long as time is left
# OUT gets report.md, which ends with every target and whether it was reached, tests.log, the benchmark's JSON files, and
# metrics and config of both runs; what fails is in report.md too, and the exit code is then 1. MINUTES=30 allows more time
# (300 epochs), PARTS="train" runs a part alone, PYTHON=… names the environment, which needs requirements-dev.txt; a grid
# cut solver may be missing. DEVICE=cpu rehearses it all without a GPU, with a small network and few images.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -eq 2 ] || { echo "usage: bash scripts/gpu_check.sh DATA OUT" >&2; exit 2; }
minutes=${MINUTES:-9}
[[ $minutes =~ ^[1-9][0-9]{0,3}$ ]] || { echo "error: MINUTES=$minutes is not a whole number from 1 to 9999" >&2; exit 2; }
read -ra parts <<<"${PARTS:-benchmark tests train}"
device=${DEVICE:-cuda}
[ ${#parts[@]} -gt 0 ] || { echo "error: PARTS is empty; give some of benchmark, tests, train" >&2; exit 2; }
for part in "${parts[@]}"; do
  [[ $part =~ ^(benchmark|tests|train)$ ]] || { echo "error: PARTS has $part; give some of benchmark, tests, train" >&2; exit 2; }
done
[[ $device =~ ^(cuda|cpu)$ ]] || { echo "error: DEVICE=$device is neither cuda nor cpu" >&2; exit 2; }
[ -d "$1" ] || { echo "error: there is no folder $1 with CIFAR-10" >&2; exit 2; }
mkdir -p "$2" || exit 1
rm -f "$2"/{default,fast}.{csv,json,log} "$2"/steps{,_fast}.{json,log} "$2"/search.{json,log} "$2/tests.log"
data=$(cd "$1" && pwd) out=$(cd "$2" && pwd)
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
small_steps=() small_search=() small_run=()
[ "$device" = cuda ] || small_steps=(--initial_channels 8 --repeats 1) small_search=(--search_sizes 16 32 --repeats 1) \
  small_run=(--initial_channels 8 --labels_per_class 50)
deadline=$((SECONDS + 60 * minutes - 15))
runs=$(mktemp -d) failed=0
trap 'rm -rf "$runs"' EXIT
export TORCHINDUCTOR_CACHE_DIR=$runs/compiled  # what one part compiles, the next finds
left() { echo $((deadline - SECONDS)); }
within() {  # within SECONDS COMMAND…: stopped by SIGTERM, which main.py answers by saving
  local limit=$1; shift
  [ "$limit" -gt 0 ] || { echo "no time left for: $*"; return 124; }
  timeout --signal=TERM --kill-after=20 "$limit" "$@"
}
note() { echo "$*" | tee -a "$out/report.md"; }

"$python" - "$device" >"$out/report.md" <<'PY' || exit 1
import platform, sys, time, torch
from importlib.util import find_spec
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("error: this PyTorch finds no CUDA device")
name = torch.cuda.get_device_name(0) if sys.argv[1] == "cuda" else "A rehearsal on the CPU"
solver = any(find_spec(name) for name in ("gco", "ortools"))
print(f"# {name}\n\n{time.strftime('%Y-%m-%d')}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, "
      f"cuDNN {torch.backends.cudnn.version()}, Python {platform.python_version()}\n")
if not solver:
    print("Neither gco-wrapper nor ortools is installed: all tests of Puzzle Mix and Co-Mixup are skipped. "
          "With a wheel of ortools from a file (pip install --no-index FILE) they run.\n")
PY
cat "$out/report.md"

if [[ " ${parts[*]} " == *" benchmark "* ]]; then
  for mode in "" --fast; do
    name=steps${mode:+_fast}
    # shellcheck disable=SC2086
    within "$([ "$mode" ] && echo 150 || echo 75)" "$python" scripts/benchmark.py --device "$device" --parts steps --methods vanilla sage $mode "${small_steps[@]}" --out "$out/$name.json" |
      tee "$out/$name.log" | grep '^|\|^whole' || { failed=1; note "- the benchmark of steps $mode failed"; }
  done
  within 60 "$python" scripts/benchmark.py --device "$device" --parts search "${small_search[@]}" --out "$out/search.json" |
    tee "$out/search.log" | grep '^|\|^search' || { failed=1; note "- the benchmark of the search failed"; }
  for name in steps steps_fast search; do
    [ -f "$out/$name.log" ] && { echo; grep '^|\|^whole\|^search' "$out/$name.log" | sed 's/^\(whole.*\|search.*\)$/\n\1\n/'; } >>"$out/report.md"
    rm -f "$out/$name.log"
  done
fi

if [[ " ${parts[*]} " == *" tests "* ]]; then
  within $((minutes * 20)) "$python" -m pytest -o addopts= tests/test_graph.py tests/test_devices.py -v -rfE >"$out/tests.log" 2>&1 ||
    { [ $? -ne 124 ] || note "- the tests were stopped by the time limit"; failed=1; grep -E "(^(FAILED|ERROR)| (FAILED|ERROR) +\[)" "$out/tests.log" | sed 's/^/- /' | tee -a "$out/report.md"; }
  note "Tests of test_devices.py and test_graph.py: $(tail -n 1 "$out/tests.log")"
fi

train() {  # train NAME SECONDS FLAGS…
  local name=$1 limit=$2; shift 2
  within "$limit" "$python" main.py --dataset cifar10 --data_dir "$data" --root_dir "$runs" --labels_per_class 5000 \
    --arch preactresnet18 --learning_rate 0.2 --momentum 0.9 --decay 0.0001 --epochs 300 --schedule 100 200 \
    --gammas 0.1 0.1 --method sage --blur_sigma 1.0 --seed 1 --kernel_size 5 --ngpu $([ "$device" = cuda ] && echo 1 || echo 0) --workers 2 --mixup_alpha 1.0 \
    --upper_lambda 0.6 --rand_pos 0.01 --update_ratio 0.7 --add_name "$name" "${small_run[@]}" "$@" >"$out/$name.log" 2>&1
  local code=$?
  for folder in "$runs"/*"$name"; do
    cp "$folder/metrics.csv" "$out/$name.csv" && cp "$folder/config.json" "$out/$name.json"
  done 2>/dev/null
  [ $code -eq 0 ] || [ $code -eq 143 ] || [ $code -eq 124 ] || { failed=1; tail -n 5 "$out/$name.log"; }
  "$python" - "$out/$name.csv" "$name" "$(echo "${small_run[@]}" "$@")" <<'PY' | tee -a "$out/report.md"
import csv, statistics, sys
from pathlib import Path
path = Path(sys.argv[1])
rows = list(csv.DictReader(path.open())) if path.exists() else []
if not rows:
    print(f"\n{sys.argv[2]}: no epoch was finished")
    sys.exit()
later = [float(row["seconds"]) for row in rows[1:]] or [float(rows[0]["seconds"])]
rate = statistics.median(float(row["images_per_second"]) for row in rows)
flags, epochs = f" {sys.argv[3]}".rstrip(), f"{len(rows)} epoch{'s' * (len(rows) > 1)}"
print(f"\nSAGE on CIFAR-10{flags}: {epochs}; {statistics.median(later):.2f} s an epoch (the first "
      f"{float(rows[0]['seconds']):.1f}), {rate:.0f} images/s in training; test accuracy {float(rows[-1]['test_top1']):.2f} %, "
      f"best {max(float(row['test_top1']) for row in rows):.2f} %")
PY
}
if [[ " ${parts[*]} " == *" train "* ]]; then
  [ "$(left)" -gt 120 ] && train default 40
  train fast "$(left)" --fast
fi
"$python" - "$out" "$device" <<'PY' | tee -a "$out/report.md"
import csv, json, re, statistics, sys
from pathlib import Path
out, device = Path(sys.argv[1]), sys.argv[2]
print("\n## Targets\n" + ("" if device == "cuda" else "\nA rehearsal: none of these numbers is one of a GPU.\n"))

def read(name, part):
    path = out / f"{name}.json"
    return json.loads(path.read_text()).get(part) if path.exists() else None

def say(target, found):  # found: (what, whether it was reached) of everything measured for it
    for what, reached in found or [("not measured", None)]:
        print(f"- {target}: {what}" + ("" if reached is None else f" – {'reached' if reached else 'NOT reached'}"))

search, steps = read("search", "search"), {"": read("steps", "steps"), " --fast": read("steps_fast", "steps")}
times = {}
if search:
    counts = sorted(search["candidates"], key=int)
    total = int(counts[-1])
    times = {"1% of the offsets": search["candidates"][str(total // 100)], "all offsets": search["candidates"][counts[-1]]}
rows = [(f"sage, {k}", f"{k}{mode}", table) for mode, table in steps.items() if table for k in ("1% of the offsets", "all offsets")]
say("SAGE's search of a batch in at most 0.3 ms", [(f"{k}: {ms:.2f} ms", ms <= 0.3) for k, ms in times.items()])
shares = [(name, times[label[6:]] / table[label]["median_ms"]) for label, name, table in rows if times]
say("the search at most 3 % of a step", [(f"{name}: {share:.1%}", share <= 0.03) for name, share in shares])
ratios = [(name, table[label]["ratio"]) for label, name, table in rows]
say("a step of SAGE at most 2.05 × vanilla's", [(f"{name}: {ratio:.2f}", ratio <= 2.05) for name, ratio in ratios])

log = (out / "tests.log").read_text() if (out / "tests.log").exists() else ""
def tests(name):
    ends = re.findall(rf"::{name}(?:\[\S*\])? (PASSED|FAILED|ERROR|SKIPPED)", log)
    if not ends or set(ends) == {"SKIPPED"}:
        return [(f"{len(ends)} tests, all skipped" if ends else "not measured", None)]
    return [(f"{ends.count('PASSED')} of {len(ends)} tests passed", set(ends) <= {"PASSED", "SKIPPED"})]

say("no wait for the GPU in a step", tests("test_no_step_waits_for_the_gpu"))
path = out / "fast.csv"
seconds = [float(row["seconds"]) for row in csv.DictReader(path.open())] if path.exists() else []
if seconds:
    minutes = (seconds[0] + 299 * statistics.median(seconds[1:] or seconds)) / 60
    seconds = [(f"{minutes:.1f} minutes, from {len(seconds)} epochs", minutes <= 10 if device == "cuda" else None)]
say("300 epochs of SAGE on CIFAR-10 with --fast in at most 10 minutes", seconds)
say("the same weights, to the last bit, from a run that was stopped, with --deterministic True",
    tests("test_a_stopped_run_on_cuda_goes_on_bitwise"))
PY
exit $failed
