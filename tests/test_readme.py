"""README's commands and code are what the program takes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import main
from load_data import Data, Split, train_batches
from mixup import METHODS
from tests.common import ENVIRONMENT, ROOT
from utils import options

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for line in README.splitlines() if line.startswith("python3 main.py") and "…" not in line]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str) -> None:
    filled = command.replace("[arch]", "wrn16_8").replace("[baseline_method]", "comix")
    args, given = options.parse(shlex.split(filled, comments=True)[2:])
    assert {"dataset", "data_dir"} & given
    assert args.epochs > 0


BASELINES = [command for command in COMMANDS if "[baseline_method]" in command]
FILLED = [
    command.replace("[arch]", arch).replace("[baseline_method]", method)
    for command in BASELINES
    for arch in ("preactresnet18", "resnext29_4_24", "wrn16_8")
    for method in METHODS
]
build_once = cache(main.build_model)


@pytest.mark.parametrize("command", FILLED, ids=lambda command: " ".join(command.split()[3:4] + command.split()[-1:]))
def test_baselines_start(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As typed, but for the images: method, network and optimiser are made, and two quarter images are trained on."""
    args, _ = options.parse(shlex.split(command)[2:])
    classes = [str(k) for k in range(int(args.dataset.removeprefix("cifar")))]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.batch_size, 3, 16, 16), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(len(images)) % len(classes))
    data = Data(args.dataset, "random", classes, (0.5,) * 3, (0.25,) * 3, split, split, None, flip=True)  # type: ignore[arg-type]
    monkeypatch.setattr(main, "build_model", build_once)
    run = main.make_run(args, data, torch.device("cpu"))
    batch, labels = next(train_batches(data, batch_size=args.batch_size, seed=args.seed, epoch=0, device="cpu"))
    draws = run.method.draw(np.random.default_rng(0), 2, 16, 16)
    step = run.method.step(run.model, batch[:2], labels[:2], draws)
    step.loss.backward()
    assert step.loss.isfinite()
    assert step.logits.shape == (2, len(classes))


def test_the_papers_commands_are_there() -> None:
    sage = [command for command in COMMANDS if "--method sage --blur_sigma 1.0 --seed 1 --kernel_size 5" in command]
    assert len(sage) == 4
    assert len(BASELINES) == 2


def test_your_own_loop() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    model, images = main.build_model("preactresnet18", 5, initial_channels=4), torch.randn(4, 3, 32, 24)
    mixed, partner, ratio = names["sage_batch"](model, images, torch.arange(4), 5, 0.4)  # type: ignore[operator]
    assert mixed.shape == images.shape
    assert sorted(partner.tolist()) == [0, 1, 2, 3]
    assert ((ratio > 0) & (ratio < 1)).all()


BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
TYPED = [line for block in BLOCKS if not block.startswith("# needs ") for line in block.splitlines()]
# what a command of the page is run with instead of its words, so that it takes seconds
SHORTER = [
    (
        r"^bash scripts/quickstart.sh.*",
        "ROOT_DIR=RUNS NGPU=0 bash scripts/quickstart.sh --epochs 1 --schedule 1 --gammas 0.1",
    ),
    (r"^bash scripts/sweep.sh", "bash scripts/sweep.sh --dry_run"),
    (
        r"^python3 main.py --dataset folder .*",
        r"\g<0> --initial_channels 2 --epochs 1 --schedule 1 --gammas 1 --batch_size 8",
    ),
    (r"--images 100", "--images 1 --ngpu 0"),
    (r"--out paper", "--out RUNS/paper"),
    (r"^python3", sys.executable),
]
LEAVES = {
    "quickstart": "RUN/curves.png",
    "evaluate.py": "RUN/evaluation/checkpoint_corruptions.png",
    "summarize": "RUNS/paper/summary.tex",
    "--dataset folder": "RUNS/folder*/mixed.png",
}


def test_commands_of_the_page_are_run_or_say_what_they_need(tree: Path, tmp_path: Path) -> None:
    """As typed, in their order, but for their size: quickstart, sweep, tables, evaluation, a tree of images."""
    assert len(TYPED) >= 6
    left = dict(LEAVES)
    for line in TYPED:
        if line.startswith("bash scripts/test.sh"):
            continue  # is running
        command = line
        for pattern, words in SHORTER:
            command = re.sub(pattern, words, command)
        run = next(iter(tmp_path.glob("digits*")), tmp_path / "none")
        for word, path in (("RUNS", tmp_path), ("RUN", run), ("PATH", tree)):
            command = re.sub(rf"\b{word}\b", shlex.quote(str(path)), command)
        environment = ENVIRONMENT | {"PYTHON": sys.executable}
        done = subprocess.run(
            command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        for name in [name for name in left if name in line]:
            pattern = left.pop(name).replace("RUNS/", "").replace("RUN/", "digits*/")
            assert list(tmp_path.glob(pattern)), f"{line} leaves no {pattern}"
    assert not left


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"bash (scripts/\S+\.sh)", README))
def test_files_that_are_named_exist(path: str) -> None:
    assert (ROOT / path).exists()


def test_messages_of_the_troubleshooting_table_are_those_of_the_program() -> None:
    table = README.split("## Troubleshooting")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `(.*?)` \|", table, flags=re.MULTILINE)
    files = [ROOT / "main.py", ROOT / "load_data.py", *ROOT.glob("utils/*.py"), *ROOT.glob("mixup/*.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a string over several lines
    assert len(messages) > 8
    assert [part for message in messages for part in message.split(" … ") if part not in source] == []
