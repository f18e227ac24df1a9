"""The sweep scripts, with a stand-in for Python that notes what it was asked to run."""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mixup import METHODS
from scripts import sweep_commands
from tests.common import ROOT
from utils.errors import BadArguments

STAND_IN = f"""#!/usr/bin/env bash
case $1 in *sweep_commands.py) exec "{sys.executable}" "$@" ;; esac
echo "$CUDA_VISIBLE_DEVICES: $*" >>"$CALLS"
case "$*" in *"$WAITS"*) until [ "$(wc -l <"$CALLS")" -ge 4 ]; do sleep 0.02; done ;; esac
case "$*" in *"$FAILS"*) echo "error: made to fail" >&2; exit 1 ;; esac
echo "final 10 epoch acc (median) : 90.00 (+- 1.00)"
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "a python"
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in {"PYTHON": program, "CALLS": tmp_path / "calls", "FAILS": "none", "WAITS": "none"}.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path / "calls"


def script(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", f"scripts/{name}", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


SWEEP = ["--methods", "vanilla sage", "--seeds", "1 2", "--", "--dataset", "digits", "--root_dir", "a b"]


def test_every_run_is_printed_and_run(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_FLAGS", "--upper_lambda 0.6")
    done = script("sweep.sh", *SWEEP)
    assert done.returncode == 0, done.stderr
    ran = calls.read_text().splitlines()
    assert len(ran) == 4
    assert all("--root_dir a b" in line and ("--upper_lambda 0.6" in line) == ("--method sage" in line) for line in ran)
    assert done.stdout.count("\n+ ") + done.stdout.startswith("+ ") == 4
    assert "4 of 4 runs are finished" in done.stdout


def test_a_failed_run_is_listed_and_the_others_go_on(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS", "--method vanilla --seed 2")
    done = script("sweep.sh", "--jobs", 2, *SWEEP)
    assert done.returncode == 1
    assert len(calls.read_text().splitlines()) == 4
    summary = done.stdout.split("3 of 4 runs are finished\n1 are not")[1]
    assert summary.count("main.py") == 1
    assert "--method vanilla --seed 2" in summary
    assert "made to fail" in done.stdout


def test_a_free_gpu_takes_the_next_run(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run waits until all others have begun, so one GPU has to run three."""
    monkeypatch.setenv("WAITS", "--method vanilla --seed 1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    done = script("sweep.sh", *SWEEP)
    assert done.returncode == 0, done.stderr
    gpus = {line.split("main.py")[1]: line.split(":")[0] for line in calls.read_text().splitlines()}
    assert len(gpus) == 4
    assert sorted(map(list(gpus.values()).count, ("3", "GPU-5"))) == [1, 3]


def test_dry_run_prints_commands_that_run_when_pasted(calls: Path) -> None:
    done = script("sweep.sh", "--dry_run", *SWEEP)
    assert not calls.exists()
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    subprocess.run(lines[3], shell=True, check=True, cwd=ROOT, capture_output=True)
    assert "--method sage --seed 2" in calls.read_text()
    assert shlex.split(lines[0])[0] == os.environ["PYTHON"]


def test_array_tasks_are_the_same_runs(calls: Path) -> None:
    assert script("sweep.sh", "--count", *SWEEP).stdout == "4\n"
    assert script("sweep.sh", "--task", 3, *SWEEP).returncode == 0
    assert "--method sage --seed 2" in calls.read_text()
    done = script("sweep.sh", "--task", 4, *SWEEP)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--seed", "1"], "unknown argument --seed (flags of main.py go behind --)"),
        (["--jobs", "0"], "--jobs 0 is not a number of runs"),
        (["--methods"], "--methods needs a value"),
        (["--seeds", " "], "--seeds names none"),
        (["--seeds=1", "--seeds", "2"], "--seeds is given twice"),
        (["--count", "--task", "1"], "--count and --task exclude each other"),
        (["--methods", "sage,cutmix"], "unknown name 'sage,cutmix'"),  # said by Python
    ],
)
def test_wrong_words_cost_one_line(calls: Path, words: list[str], error: str) -> None:
    done = script("sweep.sh", *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert error in done.stderr
    assert not calls.exists()


def lines(*flags: str, methods: str = "", archs: str = "", seeds: str = "", **environment: str) -> list[str]:
    """What of each run is not the same everywhere."""
    given = {"--methods": methods.split(), "--archs": archs.split(), "--seeds": seeds.split()}
    runs = sweep_commands.list_runs({name: value for name, value in given.items() if value}, flags, environment)
    return [" ".join(run) for run in runs]


def test_a_method_architecture_or_seed_behind_the_dashes_is_the_list() -> None:
    expected = ["--epochs 300 --arch wrn16_8 --method sage --seed 3"]
    assert lines("--arch", "wrn16_8", "--method=sage", "--epochs", "300", "--seed=3") == expected
    assert lines("--epochs", "300", archs="wrn16_8", methods="sage", seeds="3") == expected
    assert [line.split()[3] for line in lines(methods="all")] == [line.split()[3] for line in lines()] == [*METHODS]


@pytest.mark.parametrize(
    ("flags", "given", "error"),
    [
        ("", {"methods": "sage,cutmix"}, "--methods: unknown name 'sage,cutmix': did you mean cutmix?"),
        ("", {"methods": "sage all"}, "--methods: unknown name 'all'"),
        ("", {"archs": "wrn16-8"}, "did you mean wrn16_8?"),
        ("", {"seeds": "1 two"}, "--seeds: 'two' is not a whole number"),
        ("", {"seeds": "1-3"}, "--seeds: '1-3' is not a whole number"),
        ("", {"seeds": "-1"}, "--seeds: -1 is out of range"),
        ("", {"seeds": "1 2 01"}, "--seeds has 1 twice"),
        ("--method cutmix", {"methods": "sage"}, "--method cutmix behind -- contradicts --methods sage"),
        ("--seed 1 --seed=2", {}, "--seed 2 behind -- contradicts --seed 1"),
        ("--arch", {}, "--arch behind -- needs a value"),
        ("--arch vgg", {}, "--archs: unknown name 'vgg'"),
        ("--epohs 3", {}, "--epohs 3"),
        ("--epochs many", {}, "--epochs: 'many' is not a whole number"),
        ("--schedule 5 3 --gammas 0.1 0.1", {}, "--schedule 5 3 is not in rising order"),
        ("sage", {}, "unrecognized arguments: sage"),
        ("--help", {}, "--help behind -- runs nothing"),
        ("--rand_pos 1", {"methods": "vanilla cutmix"}, "--rand_pos is no setting of vanilla, cutmix"),
        ("--add_name a\nb", {}, "line break"),
        ("", {"SAGE_FLAGS": "--seed 4"}, "SAGE_FLAGS has --seed, which the sweep sets itself: --seeds"),
        ("", {"FLAGS_preactresnet18": "--arch=wrn16_8"}, "FLAGS_preactresnet18 has --arch"),
        ("", {"SAGE_FLAGS": "--n_labels 2"}, "SAGE_FLAGS: --n_labels is no setting of sage"),
        ("", {"SAGE_FLAGS": "--rand_pos 2"}, "--rand_pos"),
        ("", {"SAGE_FLAGS": "--rand_pos '1"}, "No closing quotation"),
        ("", {"COMIXUP_FLAGS": "--any 1"}, "COMIXUP_FLAGS names no method or architecture"),
        ("", {"SAGE_FLAGS_wrn168": "--rand_pos 1"}, "SAGE_FLAGS_wrn168 names no method or architecture"),
        ("", {"SAGEFLAGS": "--rand_pos 1"}, "SAGEFLAGS names no method or architecture"),
        ("", {"sage_flags": "--rand_pos 1"}, "sage_flags names no method or architecture"),
    ],
)
def test_every_word_is_checked_before_the_first_run(flags: str, given: dict[str, str], error: str) -> None:
    with pytest.raises(BadArguments) as refused:
        lines(*flags.split(" ") if flags else (), **given)
    assert error in str(refused.value)


def test_flags_of_one_method_or_architecture_alone() -> None:
    variables = {"SAGE_FLAGS": "--rand_pos 0.1", "SAGE_FLAGS_wrn16_8": "--rand_pos 1", "FLAGS_wrn16_8": "--decay 0.1"}
    others = {"XLA_FLAGS": "--xla_dump_to=x", "CFLAGS": "-O2", "COMIXUP_FLAGS": ""}
    got = lines(methods="vanilla sage", archs="preactresnet18 wrn16_8", **variables, **others)
    assert [line.split("--seed 0")[1].strip() for line in got] == [
        "", "--rand_pos 0.1", "--decay 0.1", "--decay 0.1 --rand_pos 1",
    ]  # fmt: skip


def test_nothing_is_finished_without_a_folder_for_temporary_files(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    done = script("sweep.sh", *SWEEP)
    assert done.returncode == 2
    assert "TMPDIR=" in done.stderr
    assert "finished" not in done.stdout


def test_relative_paths_count_from_the_callers_folder(calls: Path, tmp_path: Path) -> None:
    program = Path(os.environ["PYTHON"])
    program.write_text(program.read_text().replace('echo "$CUDA', 'echo "$PWD $CUDA'))
    subprocess.run(["bash", ROOT / "scripts" / "sweep.sh", *SWEEP], cwd=tmp_path, check=True, capture_output=True)
    lines = calls.read_text().splitlines()
    assert len(lines) == 4
    assert all(line.startswith(f"{tmp_path} ") and f" {ROOT}/main.py " in line for line in lines)


@pytest.mark.parametrize(("name", "first", "others"), [("cifar10", "0.6", "0.6"), ("cifar100", "0.5", "0.7")])
def test_reproduction_is_the_papers_table(calls: Path, name: str, first: str, others: str) -> None:
    lines = script(f"reproduce_{name}.sh", "data", "runs", "--dry_run").stdout.splitlines()
    assert len(set(lines)) == 3 * 8 * 3
    for line in lines:
        assert f"--dataset {name} --data_dir {ROOT}/data --root_dir {ROOT}/runs" in line
        assert "--epochs 300 --schedule 100 200 --gammas 0.1 0.1" in line
        setting = f"--upper_lambda {first if '--arch preactresnet18' in line else others} "
        assert (setting in line) == ("--method sage" in line)
    line = script(f"reproduce_{name}.sh", "data", "/runs", "--dry_run", "--seeds", 5, "--", "--fast").stdout
    assert "--root_dir /runs" in line
    assert "--fast" in line
    assert line.count("--seed 5") == line.count("main.py") == 8 * 3
    assert script(f"reproduce_{name}.sh", "data").returncode == 2
    line = script(f"reproduce_{name}.sh", "data", "runs", "--dry_run", "--", "--arch", "wrn16_8", "--seed=4").stdout
    assert line.count("--arch wrn16_8") == line.count("--seed 4") == line.count("main.py") == 8


def test_learning_rates_of_the_cifar10_table(calls: Path) -> None:
    """0.2 but for ResNeXt, which collapses at it, and Co-Mixup on PreActResNet18, which overflows."""
    printed = script("reproduce_cifar10.sh", "DATA", "RUNS", "--dry_run", "--seeds", 1).stdout.splitlines()
    rates = {}
    for line in printed:
        arguments = line.split()
        arch, method = (arguments[arguments.index(flag) + 1] for flag in ("--arch", "--method"))
        rates[arch, method] = [value for flag, value in itertools.pairwise(arguments) if flag == "--learning_rate"][-1]
    assert len(rates) == 3 * len(METHODS)
    other = {(arch, method): rate for (arch, method), rate in rates.items() if rate != "0.2"}
    resnext = {("resnext29_4_24", method): "0.02" if method == "comix" else "0.05" for method in METHODS}
    assert other == {**resnext, ("preactresnet18", "comix"): "0.1"}
