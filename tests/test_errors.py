"""How a command ends."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable

import numpy as np
import pytest
import torch

from utils.errors import exit_code


@pytest.mark.parametrize("work", [lambda: np.empty(2**55), lambda: torch.empty(2**50), lambda: bytearray(2**60)])
def test_out_of_memory_is_one_line(work: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(ArgumentParser(), work) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: out of memory")
    assert len(line.splitlines()) == 1


def test_mistakes_of_the_program_are_not_hidden() -> None:
    def fail() -> int:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        exit_code(ArgumentParser(), fail)
