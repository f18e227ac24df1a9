"""main.py as a process, on small image trees made here."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
SMALL = [
    "--arch",
    "preactresnet18",
    "--initial_channels",
    "4",
    "--batch_size",
    "8",
    "--ngpu",
    "0",
    "--learning_rate",
    "0.05",
]
SAGE = [
    "--method",
    "sage",
    "--mixup_alpha",
    "1.0",
    "--upper_lambda",
    "0.6",
    "--rand_pos",
    "0.01",
    "--update_ratio",
    "0.7",
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def main(*words: object, check: int | None = 0, **options: object) -> subprocess.CompletedProcess[str]:
    """Run main.py; ``check`` is the exit code it must have."""
    command = [sys.executable, "main.py", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, **options)  # type: ignore[call-overload]
    assert "Traceback" not in done.stderr, done.stderr
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 training and 10 test images, 32×32, of two classes that differ in brightness."""
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for split, count in (("train", 15), ("test", 5)):
        for name, level in (("dark", 60), ("light", 180)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(level - 50, level + 50, (32, 32, 3), dtype=np.uint8)).save(
                    folder / f"{i}.png"
                )
    return root


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without its measured columns."""
    with open(folder / "metrics.csv", newline="") as file:
        measured = ("seconds", "images_per_second", "peak_memory_gb")
        return [{k: v for k, v in row.items() if k not in measured} for row in csv.DictReader(file)]


def weights(folder: Path, name: str = "checkpoint.pth.tar") -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def sage_run(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished SAGE run of three epochs."""
    root = tmp_path_factory.mktemp("runs")
    done = main(
        *SMALL, *SAGE, "--data_dir", tree, "--root_dir", root, "--epochs", 3, "--schedule", 1, 2, "--print_freq", 2
    )
    assert "final 10 epoch acc (median) : " in done.stdout
    (folder,) = root.iterdir()
    return folder


def test_a_run_leaves_every_record(sage_run: Path) -> None:
    assert sage_run.name.startswith("cifar10_preactresnet18_sage_seed0_")
    assert all(part in sage_run.name for part in ("upper_lambda0.6", "rand_pos0.01", "update_ratio0.7"))
    names = {path.name for path in sage_run.iterdir()}
    assert {
        "log.txt", "metrics.csv", "config.json", "result.json", "curves.png", "mixed.png", "checkpoint.pth.tar", "model_best.pth.tar",
    } <= names  # fmt: skip
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.endswith(".tmp") for name in names)
    assert [row["epoch"] for row in rows(sage_run)] == ["0", "1", "2"]
    assert [float(row["learning_rate"]) for row in rows(sage_run)] == pytest.approx([0.05, 0.005, 0.0005])
    config = json.loads((sage_run / "config.json").read_text())
    assert config["settings"]["upper_lambda"] == 0.6
    assert config["classes"] == ["dark", "light"]
    assert {"torch", "python"} <= config["versions"].keys()
    log = (sage_run / "log.txt").read_text()
    assert log.count("**Train** Prec@1") == log.count("**Test** Prec@1") == 3
    for picture in ("curves.png", "mixed.png"):
        with Image.open(sage_run / picture) as image:
            assert image.width > 400


def test_one_seed_gives_one_result(sage_run: Path, tree: Path, tmp_path: Path) -> None:
    main(
        *SMALL, *SAGE, "--data_dir", tree, "--root_dir", tmp_path, "--epochs", 3, "--schedule", 1, 2, "--print_freq", 7
    )
    folder = tmp_path / sage_run.name
    assert rows(folder) == rows(sage_run)
    ours, theirs = weights(folder), weights(sage_run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_finished_run_says_so(sage_run: Path, tree: Path) -> None:
    before = (sage_run / "checkpoint.pth.tar").stat().st_mtime_ns
    done = main(*SMALL, *SAGE, "--data_dir", tree, "--root_dir", sage_run.parent, "--epochs", 3, "--schedule", 1, 2)
    assert "is finished" in done.stdout
    assert (sage_run / "checkpoint.pth.tar").stat().st_mtime_ns == before


def test_other_settings_are_refused(sage_run: Path, tree: Path) -> None:
    done = main(
        *SMALL, *SAGE, "--data_dir", tree, "--root_dir", sage_run.parent, "--epochs", 4, "--schedule", 1, 2, check=2
    )
    assert "--epochs: 3 there, 4 here" in done.stderr


def test_evaluate_prints_the_test_numbers(sage_run: Path, tree: Path) -> None:
    done = main("--evaluate", "--resume", sage_run / "checkpoint.pth.tar", "--data_dir", tree, "--ngpu", 0)
    expected = f"**Test** Prec@1 {float(rows(sage_run)[-1]['test_top1']):.3f}"
    assert expected in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_run_continues_to_the_same_end(
    sage_run: Path, tree: Path, tmp_path: Path, number: signal.Signals
) -> None:
    words = [
        *SMALL,
        *SAGE,
        "--data_dir",
        tree,
        "--root_dir",
        tmp_path,
        "--epochs",
        3,
        "--schedule",
        1,
        2,
        "--checkpoint_minutes",
        "1e-6",
    ]
    folder = tmp_path / sage_run.name
    process = subprocess.Popen(
        [sys.executable, "main.py", *map(str, words)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    while not (folder / "metrics.csv").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(30) == (143 if number == signal.SIGTERM else -number)
    assert not (folder / "result.json").exists()
    done = main(*words)
    assert "continuing in epoch" in done.stdout
    assert rows(folder) == rows(sage_run)
    ours, theirs = weights(folder), weights(sage_run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method sagee", "did you mean sage"),
        ("--arch preactresnet19", "preactresnet1"),
        ("--learning_rate -1", "--learning_rate"),
        ("--learning_rate nan", "--learning_rate"),
        ("--epochs 0", "--epochs"),
        ("--schedule 100 200 --gammas 0.1", "--gammas"),
        ("--schedule 200 100", "rising"),
        ("--method sage --rand_pos 0", "--rand_pos"),
        ("--method sage --rand_pos 1.5", "--rand_pos"),
        ("--method sage --kernel_size 4", "kernel_size"),
        ("--method sage --upper_lambda 2", "--upper_lambda"),
        ("--method sage --mixup_alpha -1", "--mixup_alpha"),
        ("--dropout maybe", "maybe"),
        ("--evaluate", "--resume"),
        ("--unknown_flag 1", "--unknown_flag"),
    ],
)
def test_bad_arguments_cost_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from utils import options

    with pytest.raises(SystemExit) as stopped:
        options.parse(words.split())
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bad_folder_costs_one_line(tmp_path: Path) -> None:
    done = main(
        "--dataset", "folder", "--data_dir", tmp_path / "nowhere", "--root_dir", tmp_path / "runs", "--ngpu", 0, check=1
    )
    assert str(tmp_path / "nowhere") in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_gpu_is_a_warning_and_log_off_writes_nothing(tree: Path, tmp_path: Path) -> None:
    words = [
        *SMALL[:-4],
        "--learning_rate",
        0.05,
        "--ngpu",
        1,
        "--log_off",
        "True",
        "--epochs",
        1,
        "--schedule",
        1,
        "--gammas",
        0.1,
    ]
    done = main(*words, "--data_dir", tree, "--root_dir", tmp_path / "runs")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert "warning: --ngpu 1" in done.stdout
    assert not (tmp_path / "runs").exists()
