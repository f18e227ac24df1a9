"""Sweeps of real runs: failed, killed and stopped ones are finished by the same call."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.common import ENVIRONMENT, ROOT, SMALL
from tests.test_sweep import script


@pytest.fixture
def words(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Behind -- of a sweep of runs long enough to be caught."""
    for name, value in {**ENVIRONMENT, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, str(value))
    steady = ["--epochs", 5, "--schedule", 2, "--gammas", 0.1, "--checkpoint_minutes", "1e-6"]
    return ["--", *SMALL, *steady, "--data_dir", tree, "--root_dir", tmp_path]


def start(*words: object) -> subprocess.Popen[str]:
    command = ["bash", "scripts/sweep.sh", *map(str, words)]
    # bash cannot trap what is ignored when it starts, as SIGINT is in the background of a script
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for_an_epoch(sweep: subprocess.Popen[str], folder: Path) -> None:
    while not (folder / "checkpoint.pth.tar").exists():
        assert sweep.poll() is None
        time.sleep(0.02)


def test_the_second_call_finishes_what_is_missing(words: list[object], tmp_path: Path) -> None:
    """One run was made before, by its printed command; of the others one fails and one is killed."""
    sweep = ["--methods", "vanilla", "--seeds", "1 2 3"]
    printed = script("sweep.sh", "--dry_run", *sweep, *words).stdout.splitlines()
    folders = [tmp_path / f"cifar10_preactresnet18_vanilla_seed{seed}" for seed in (1, 2, 3)]
    subprocess.run(printed[0], shell=True, check=True, cwd=ROOT, capture_output=True)
    folders[1].write_text("in the way")
    first = start("--jobs", 2, *sweep, *words)
    wait_for_an_epoch(first, folders[2])
    subprocess.run(["pkill", "-KILL", "-f", f"root_dir {tmp_path} .*--seed 3"], check=True)
    said, _ = first.communicate(timeout=240)
    assert first.returncode == 1
    assert [line.strip() for line in said.split("1 of 3 runs are finished\n2 are not")[1].splitlines()[1:]] == [
        printed[1].strip(),
        printed[2].strip(),
    ]
    assert "failed with exit code 1: error: " in said
    assert "stopped by signal 9" in said

    written = (folders[0] / "result.json").stat().st_mtime_ns
    folders[1].unlink()
    second = script("sweep.sh", *sweep, *words)
    assert second.returncode == 0, second.stdout
    assert second.stdout.splitlines()[-1] == "3 of 3 runs are finished"
    assert second.stdout.count("is finished: ") == 1
    assert (folders[0] / "result.json").stat().st_mtime_ns == written
    assert all(json.loads((folder / "result.json").read_text())["epochs"] == 5 for folder in folders)
    assert "continuing in epoch" in (folders[2] / "log.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_saves_its_runs(words: list[object], tmp_path: Path, number: int) -> None:
    seeds = [1, 2] if number == signal.SIGTERM else [1]
    sweep = ["--methods", "vanilla", "--seeds", " ".join(map(str, seeds)), "--jobs", 2, *words]
    folders = [tmp_path / f"cifar10_preactresnet18_vanilla_seed{seed}" for seed in seeds]
    first = start(*sweep)
    for folder in folders:
        wait_for_an_epoch(first, folder)
    os.kill(first.pid, number)
    said, _ = first.communicate(timeout=240)
    assert first.returncode == 128 + number
    assert said.endswith("stopped; the same call continues\n")
    for folder in folders:
        assert "stopped in epoch" in (folder / "log.txt").read_text()
        assert not (folder / "result.json").exists()
    second = script("sweep.sh", *sweep)
    assert second.returncode == 0, second.stdout
    for folder in folders:
        assert "continuing in epoch" in (folder / "log.txt").read_text()
