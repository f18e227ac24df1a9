"""The sweep scripts, with a stand-in for Python that notes what it was asked to run."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.common import ROOT

STAND_IN = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in *"$FAILS"*) echo "error: made to fail" >&2; exit 1 ;; esac
echo "final 10 epoch acc (median) : 90.00 (+- 1.00)"
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "a python"
    program.write_text(STAND_IN)
    program.chmod(0o755)
    for name, value in {"PYTHON": program, "CALLS": tmp_path / "calls", "FAILS": "no such run"}.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path / "calls"


def script(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", f"scripts/{name}", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


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
    summary = done.stdout.split("3 of 4 runs are finished")[1]
    assert summary.count("main.py") == 1
    assert "--method vanilla --seed 2" in summary
    assert "made to fail" in done.stdout


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


@pytest.mark.parametrize("words", [["--seed", "1"], ["--jobs", "0"], ["--methods"]])
def test_wrong_words_cost_one_line(calls: Path, words: list[str]) -> None:
    done = script("sweep.sh", *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(("name", "first"), [("reproduce_cifar10.sh", "0.6"), ("reproduce_cifar100.sh", "0.5")])
def test_reproduction_is_the_papers_table(calls: Path, monkeypatch: pytest.MonkeyPatch, name: str, first: str) -> None:
    monkeypatch.setenv("DRY_RUN", "1")
    lines = script(name, "data", "runs").stdout.splitlines()
    assert len(lines) == 3 * 8 * 3
    sage = [line for line in lines if "--method sage" in line]
    assert f"--upper_lambda {first}" in sage[0]
    assert all("--epochs 300 --schedule 100 200 --gammas 0.1 0.1" in line for line in lines)
