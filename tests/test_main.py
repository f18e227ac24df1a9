"""main.py as a process, on small image trees made here."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import main as program
from tests.common import ENVIRONMENT, ROOT, SAGE, SMALL, main, rows, weights
from utils import checkpoint, options, train


@pytest.fixture(scope="module")
def sage_run(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished SAGE run of three epochs."""
    root = tmp_path_factory.mktemp("runs")
    words = [*SMALL, *SAGE, "--data_dir", tree, "--root_dir", root, "--epochs", 3, "--schedule", 1, 2]
    done = main(*words, "--print_freq", 2)
    assert "final 10 epoch acc (median) : " in done.stdout
    (folder,) = root.iterdir()
    return folder


def test_a_run_leaves_every_record(sage_run: Path) -> None:
    assert sage_run.name.startswith("cifar10_preactresnet18_sage_seed0_")
    assert all(part in sage_run.name for part in ("upper_lambda0.6", "rand_pos0.01", "update_ratio0.7"))
    names = {path.name for path in sage_run.iterdir()}
    expected = "log.txt metrics.csv config.json result.json curves.png mixed.png mixed_last.png checkpoint.pth.tar"
    assert {*expected.split(), "model_best.pth.tar"} <= names
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
    for picture in ("curves.png", "mixed.png", "mixed_last.png"):
        assert str(sage_run / picture) in log
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
    words = [*SMALL, "--ngpu", 1, "--log_off", "True", "--epochs", 1, "--schedule", 1, "--gammas", 0.1]
    done = main(*words, "--data_dir", tree, "--root_dir", tmp_path / "runs")
    if not torch.cuda.is_available():
        assert "warning: --ngpu 1" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_momentum_takes_the_layout_of_the_weights(tree: Path, tmp_path: Path) -> None:
    """A checkpoint from a device on which weights lie in another order, continued by the fused optimiser."""
    words = [*SMALL, "--data_dir", str(tree), "--initial_channels", "16", "--fast", "--resume", str(tmp_path / "c.pth")]
    args, given = options.parse(words)
    data = options.load_images(args, given)
    run = program.make_run(args, data, torch.device("cpu"))
    for parameter in run.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    run.optimizer.step()
    state = copy.deepcopy(checkpoint.state_of(run))
    for held in state["optimizer"]["state"].values():
        held["momentum_buffer"] = held["momentum_buffer"].contiguous()
    torch.save(state, tmp_path / "c.pth")
    again = program.make_run(args, data, torch.device("cpu"))
    checkpoint.restore(again, args.resume, checkpoint.read_resume(args.resume)[0])
    for before, after in zip(run.model.parameters(), again.model.parameters(), strict=True):
        after.grad = before.grad
    for one in (run, again):
        one.optimizer.step()
    for before, after in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(before, after)


def test_home_and_other_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    args, _ = options.parse(["--root_dir=~/runs", "--data_dir", "~/data", "--resume=~/x.pth"])
    assert (args.root_dir, args.data_dir, args.resume) == ("/home/me/runs", "/home/me/data", "/home/me/x.pth")


def test_a_checkpoints_settings_may_begin_with_a_dash(tmp_path: Path) -> None:
    args, given = options.parse([])
    options.adopt(args, given, {"add_name": "-x", "schedule": [3, 5], "fast": True})
    assert (args.add_name, args.schedule, args.fast) == ("-x", [3, 5], True)


def test_help_on_a_terminal_without_greek() -> None:
    done = subprocess.run(
        [sys.executable, "main.py", "--help"], cwd=ROOT, env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )  # fmt: skip
    assert (b"--method" in done.stdout, done.stderr) == (True, b"")


def test_waiting_for_the_device_at_the_end_of_an_epoch_counts(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU still works when the last batch has been queued."""
    args, given = options.parse([*SMALL, "--data_dir", str(tree), "--initial_channels", "2", "--epochs", "1"])
    run = program.make_run(args, options.load_images(args, given), torch.device("cpu"))
    read = train.Meter.read
    monkeypatch.setattr(train.Meter, "read", lambda *args: time.sleep(0.5) or read(*args))
    train.Meter(run).settle()
    assert run.progress.seconds > 0.5


def test_evaluate_reads_images_at_the_networks_size(sage_run: Path, tree: Path, tmp_path: Path) -> None:
    """Images of another size are brought to it; other images than the run's are a warning."""
    path = sage_run / "checkpoint.pth.tar"
    for split in ("train", "test"):
        for name in ("dark", "light"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (96, 64), (90, 60, 30)).save(folder / "0.png")
    words = ["--evaluate", "--resume", path, "--dataset", "folder", "--ngpu", 0, "--data_dir"]
    assert "warning" not in main(*words, tree).stdout
    assert "warning: the test images of" in main(*words, tmp_path).stdout
    args, given = options.parse([str(word) for word in [*words, tmp_path]])
    _, data, _ = checkpoint.network_and_images(args, given)
    assert data.image_size == (32, 32)


@pytest.mark.parametrize("flag", [["--arch", "preactresnet34"], ["--initial_channels", 8], ["--dropout", "True"]])
def test_a_flag_that_the_checkpoint_overrules_is_refused(sage_run: Path, tree: Path, flag: list[object]) -> None:
    done = main("--evaluate", "--resume", sage_run / "checkpoint.pth.tar", "--data_dir", tree, *flag, check=2)
    assert f"{flag[0]} {flag[1]}: " in done.stderr
    assert "was trained with" in done.stderr


def test_evaluate_needs_the_test_split_alone(sage_run: Path, tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree / "test", tmp_path / "test")
    done = main("--evaluate", "--resume", sage_run / "checkpoint.pth.tar", "--data_dir", tmp_path, "--ngpu", 0)
    assert f"**Test** Prec@1 {float(rows(sage_run)[-1]['test_top1']):.3f}" in done.stdout
    assert "warning" not in done.stdout + done.stderr


def test_a_batch_of_one_image_is_refused_before_training(tree: Path, tmp_path: Path) -> None:
    """Where a network ends in features of one pixel, whose statistics are those of the batch alone."""
    words = [*SMALL, "--dataset", "folder", "--data_dir", tree, "--batch_size", 29, "--root_dir", tmp_path]
    done = main(*words, "--image_size", 8, check=2)
    assert "--batch_size 29 leaves a batch of one image" in done.stderr
    assert "--image_size" in done.stderr
    main(*words, "--image_size", 16, "--epochs", 1)
