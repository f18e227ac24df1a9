"""scripts/compare.py, benchmark.py, study_offsets.py and gpu_check.sh at tiny sizes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixup import METHODS
from models import build_model
from tests import common
from tests.common import ENVIRONMENT, ROOT


def run(script: str, *words: object, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a script, which must succeed."""
    done = common.run(f"scripts/{script}", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights alone, under the prefix that published checkpoints have."""
    torch.manual_seed(0)
    weights = build_model("preactresnet18", 10, 1, 64).state_dict()
    path = tmp_path_factory.mktemp("checkpoint") / "published.pth.tar"
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}, "epoch": 3}, path)
    return path


def test_compare_mixes_any_three_images(checkpoint: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    for name, shape, colour in zip("abc", [(70, 100), (64, 140), (90, 96)], colours, strict=True):  # height, width
        Image.fromarray((rng.integers(0, 6, (*shape, 3)) + colour).astype(np.uint8)).save(tmp_path / f"{name}.png")
    published = ["--checkpoint", checkpoint, "--arch", "preactresnet18", "--trained_on", "cifar10"]
    for out in ("one.png", "two.png"):
        run("compare.py", *(tmp_path / f"{name}.png" for name in "abc"), "--out", tmp_path / out, *published)
    picture = pixels(tmp_path / "one.png")
    assert np.array_equal(picture, pixels(tmp_path / "two.png"))  # one seed, one picture
    above, below = picture[picture.shape[0] // 4], picture[picture.shape[0] * 2 // 3]
    for colour in colours:  # the sources as they are; below them half red and half green
        assert (abs(above - colour).max(axis=1) <= 6).sum() > 200
    assert (abs(below - (127, 127, 3)).max(axis=1) <= 6).sum() > 200


def test_compare_draws_a_strip_of_each_method(tmp_path: Path) -> None:
    done = run("compare.py", "--image_size", 32, "--strips", tmp_path)
    assert set(tmp_path.iterdir()) == set(map(Path, done.stdout.splitlines()))
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in METHODS}


def test_compare_takes_images_of_a_dataset(tmp_path: Path) -> None:
    run("compare.py", "--dataset", "digits", "--seed", 3, "--out", tmp_path / "new" / "digits.pdf")
    assert (tmp_path / "new" / "digits.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (2, "a.png b.png", "three images"),
        (2, "a.png b.png c.png --dataset digits", "--dataset"),
        (2, "--lam 1.5", "--lam"),
        (2, "--dataset cifar", "did you mean cifar10"),
        (2, "--out picture.bmp", "picture.bmp"),
        (2, "--data_dir here", "--data_dir would have no effect without --dataset"),
        (2, "--arch wrn16_8", "--arch would have no effect without --checkpoint"),
        (2, "--strips here --out picture.png", "--out would have no effect"),
        (1, "nowhere/a.png b.png c.png", "nowhere/a.png"),
        (1, "--dataset digits --image_size 64", "image_size 64 is for the dataset folder"),
        (1, "--checkpoint nowhere.pth.tar", "nowhere.pth.tar"),
        (1, "--checkpoint PUBLISHED --trained_on cifar10", "does not say its network's arch"),
        (1, "--checkpoint PUBLISHED --arch preactresnet18", "does not say its network's image_size, mean, std"),
    ],
)
def test_compare_refuses_in_one_line(
    code: int, words: str, message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts import compare

    try:
        left = compare.main(words.replace("PUBLISHED", str(checkpoint)).split())
    except SystemExit as stopped:
        left = stopped.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert left == code
    assert message in error
    assert error.count("\n") == 1


def test_benchmark_measures_every_method(tmp_path: Path) -> None:
    words = "--arch preactresnet18 --initial_channels 2 --batch_size 4 --repeats 1 --threads 1 --search_sizes 8 32"
    done = run("benchmark.py", *words.split(), "--out", tmp_path / "b.json", "--plot", tmp_path / "b.png")
    result = json.loads((tmp_path / "b.json").read_text())
    assert {label.split(",")[0] for label in result["mixing"]} == set(METHODS) - {"vanilla", "manifold"}
    assert {f"puzzle, {n} blocks a side" for n in (2, 4, 8, 16)} <= result["mixing"].keys()
    assert {label.split(",")[0] for label in result["steps"]} == set(METHODS)
    assert result["steps"]["vanilla"]["ratio"] == 1
    assert all(row["median_ms"] > 0 for row in (result["mixing"] | result["steps"]).values())
    assert result["search"]["pixels"]["all offsets"]["ms_per_pair"].keys() == {"64", "1024"}
    assert {"cpu", "threads", "torch"} <= result["machine"].keys()
    assert "| × vanilla |" in done.stdout
    assert pixels(tmp_path / "b.png").std() > 0


def test_benchmark_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    words = "--parts mixing --methods puzzle cutmix --image_size 33 --batch_size 4 --repeats 1 --initial_channels 2"
    done = run("benchmark.py", *words.split(), "--out", tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["mixing"].keys() == {"cutmix"}
    assert "puzzle is left out: none of (2, 4, 8, 16) blocks a side" in done.stdout


def test_benchmark_measures_what_it_is_asked_for(tmp_path: Path) -> None:
    words = "--parts steps --methods cutmix --fast --initial_channels 2 --batch_size 4 --repeats 1 --image_size 64"
    run("benchmark.py", *words.split(), "--out", tmp_path / "b.json")
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["steps"].keys() == {"vanilla", "cutmix"}
    assert "mixing" not in result
    assert result["settings"]["fast"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods sagee", "did you mean sage"),
        ("--batch_size 0", "--batch_size"),
        ("--parts steps --plot search.png", "--plot is for search: add"),
        ("--parts search --methods sage", "--methods is for mixing, steps: add one"),
        ("--parts mixing --fast", "--fast is for steps"),
        ("--out nowhere/b.json", "nowhere"),
        ("--device tpu", "--device"),
    ],
)
def test_benchmark_refuses_in_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from scripts import benchmark

    with pytest.raises(SystemExit) as stopped:
        benchmark.main(words.split())
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("method", ["sage", "vanilla"])
def test_more_offsets_keep_more_of_the_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    from scripts import study_offsets

    monkeypatch.setattr(study_offsets, "BATCHES", 1)
    torch.manual_seed(0)
    settings = {"dataset": "digits", "arch": "preactresnet18", "initial_channels": 2, "method": method}
    weights = build_model("preactresnet18", 10, initial_channels=2).state_dict()
    state = {"settings": settings, "state_dict": weights, "progress": {"rows": []}, "digests": {"test": ""}}
    state |= {"classes": [*"0123456789"], "image_size": (32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    torch.save(state, tmp_path / "c.pth.tar")
    words = ["--checkpoint", tmp_path / "c.pth.tar", "--data_dir", tmp_path, "--ngpu", 0, "--plot", tmp_path / "p.png"]
    said = run("study_offsets.py", *words).stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| 1")]
    assert [row[0] for row in rows] == ["1%", "10%", "100%"]
    scores = [float(row[1]) for row in rows]
    assert scores == sorted(scores)
    assert scores[0] < scores[2] == 1
    assert pixels(tmp_path / "p.png").std() > 0


def test_saliency_is_of_labels_that_were_learnt_else_of_guesses(checkpoint: Path) -> None:
    """At the network's resolution, of images of any."""
    from scripts import compare
    from utils.checkpoint import load_network

    network, _ = load_network(checkpoint, arch="preactresnet18", dataset="cifar10")
    images = torch.rand(3, 3, 64, 96, requires_grad=True)
    logits = network(torch.nn.functional.interpolate(images, (32, 48), mode="bilinear", antialias=True))
    guesses = logits.argmax(dim=1)
    sources = compare.Sources(images.detach(), list("abc"), (guesses + 1) % 10)
    words = ["--checkpoint", str(checkpoint), "--arch", "preactresnet18", "--trained_on", "cifar10", "--dataset"]
    for dataset, labels in (("cifar10", sources.labels), ("cifar100", guesses)):
        maps, blur, _ = compare.saliency_of(sources, compare.make_parser().parse_args([*words, dataset]))
        loss = torch.nn.functional.cross_entropy(logits, labels)  # type: ignore[arg-type]
        (expected,) = torch.autograd.grad(loss, images, retain_graph=True)
        torch.testing.assert_close(maps, expected.abs().mean(dim=1))
        assert blur == 2


NINTH = """
import sys
import main
from scripts import benchmark, compare, summarize

def call(program, words):
    sys.argv = ["main.py", *words.split()]
    assert program(words.split()) == 0, words

small = "--arch preactresnet18 --initial_channels 2 --batch_size 100 --ngpu 0 --schedule 1 --gammas 0.1"
for method in ("vanilla", "resizemix --scale_high 0.5"):
    call(main.main, f"--dataset digits --labels_per_class 20 --root_dir RUNS --epochs 1 {small} --method {method}")
call(summarize.main, "RUNS --out summary")
call(benchmark.main, "--parts mixing steps --methods resizemix --initial_channels 2 --batch_size 4 --repeats 1 --out b")
call(compare.main, "--image_size 32 --seed 1 --strips strips")
"""


def test_a_ninth_method_is_a_file_and_a_line(tmp_path: Path) -> None:
    """The example of the page on methods, in a copy of the tree: trained, swept, summarised, measured, shown."""
    for name in ("mixup", "models", "utils", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("main.py", "load_data.py"):
        shutil.copy(ROOT / name, tmp_path)
    page = (ROOT / "mixup" / "README.md").read_text().split("## Adding a method")[1]
    (tmp_path / "mixup" / "resizemix.py").write_text(page.split("```python\n")[1].split("```")[0])
    registry = (tmp_path / "mixup" / "__init__.py").read_text()
    registry = registry.replace(
        "from .sage import Sage\n", "from .resizemix import ResizeMix\nfrom .sage import Sage\n"
    )
    (tmp_path / "mixup" / "__init__.py").write_text(
        registry.replace("        Sage,\n", "        Sage,\n        ResizeMix,\n")
    )

    words = {"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 240}
    environment = {**ENVIRONMENT, "PYTHON": sys.executable}
    done = subprocess.run([sys.executable, "-c", NINTH], env=environment, **words)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    swept = subprocess.run(["bash", "scripts/sweep.sh", "--dry_run"], env=environment, **words)  # type: ignore[call-overload]
    assert [line.split("--method ")[1].split()[0] for line in swept.stdout.splitlines()] == [*METHODS, "resizemix"]
    assert "ResizeMix" in (tmp_path / "summary" / "summary.md").read_text()
    measured = json.loads((tmp_path / "b").read_text())
    assert measured["mixing"].keys() == {"resizemix"}
    assert measured["steps"].keys() == {"vanilla", "resizemix"}
    assert pixels(tmp_path / "strips" / "resizemix.png").shape == pixels(tmp_path / "strips" / "cutmix.png").shape
    assert {path.stem for path in (tmp_path / "strips").iterdir()} == {*METHODS, "resizemix"}


def test_help_on_a_terminal_without_greek() -> None:
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "scripts/summarize.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("seconds", "environment", "error"),
    [
        *((seconds, {}, f"{seconds} is not a whole number") for seconds in ("half", "2.5", "-3", "09", "9 9")),
        ("60", {"EPOCHS": "many"}, "many is not a whole number"),
        ("60", {"DEVICE": "gpu"}, "DEVICE=gpu is neither cuda nor cpu"),
    ],
)
def test_gpu_check_refuses_what_it_does_not_know(
    tmp_path: Path, seconds: str, environment: dict[str, str], error: str
) -> None:
    done = subprocess.run(
        ["bash", "scripts/gpu_check.sh", tmp_path, tmp_path / "out", seconds],
        cwd=ROOT, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert error in done.stderr
    assert not (tmp_path / "out").exists()


def test_gpu_report_needs_three_epochs_of_both_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from scripts import gpu_report

    for name, second in (("vanilla", 2), ("sage", 4)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        rows = "".join(f"{epoch},{second if epoch else 60},{50 + epoch}\n" for epoch in range(3))
        (tmp_path / "runs" / name / "metrics.csv").write_text("epoch,seconds,test_top1\n" + rows)
        enough = name == "sage"
        assert gpu_report.main([str(tmp_path), "103"]) == int(not enough)
    # 400 s if neither slows the other, 300 s if both share one device; and 5% for what is not an epoch's
    assert capsys.readouterr().out == f"{round(1.05 * 350)}\n"
    assert gpu_report.main([str(tmp_path)]) == 0
    assert "- sage: 3 epochs, 4.00 s an epoch; test accuracy 52.00%" in capsys.readouterr().out
