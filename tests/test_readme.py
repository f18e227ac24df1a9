"""README's commands and code are what the program takes."""

from __future__ import annotations

import re
import shlex

import pytest
import torch

from tests.common import ROOT
from utils import options

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for line in README.splitlines() if line.startswith("python3 main.py") and "…" not in line]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str) -> None:
    filled = command.replace("[arch]", "wrn16_8").replace("[baseline_method]", "comix")
    args, typed = options.parse(shlex.split(filled, comments=True)[2:])
    assert {"dataset", "data_dir"} & typed
    assert args.epochs > 0


def test_the_papers_commands_are_there() -> None:
    sage = [command for command in COMMANDS if "--method sage --blur_sigma 1.0 --seed 1 --kernel_size 5" in command]
    assert len(sage) == 4
    assert sum("[baseline_method]" in command for command in COMMANDS) == 2


def test_your_own_loop() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    images, saliency = torch.randn(4, 3, 32, 24), torch.rand(4, 32, 24)
    mixed, partner, ratio = names["sage_batch"](images, saliency, 0.4)  # type: ignore[operator]
    assert mixed.shape == images.shape
    assert sorted(partner.tolist()) == [0, 1, 2, 3]
    assert ((ratio > 0) & (ratio < 1)).all()


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"bash (scripts/\S+\.sh)", README))
def test_files_that_are_named_exist(path: str) -> None:
    assert (ROOT / path).exists()
