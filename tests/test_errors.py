"""How a command ends."""

from __future__ import annotations

import os
import signal
from argparse import ArgumentParser
from collections.abc import Callable, Iterator

import pytest
import torch

from utils.errors import BadArguments, StopSignal, UserError, exit_code, stopping_signals


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """What this process does on signals is put back."""
    before = {number: signal.getsignal(number) for number in stopping_signals()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def failing(error: BaseException) -> Callable[[], int]:
    def fail() -> int:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("no such class"), 1, "error: no such class"),
        (OSError(28, "No space left on device", "a/b"), 1, "error: a/b No space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: out of GPU memory: make --batch_size smaller"),
        (ImportError("no module named gco"), 1, "error: no module named gco"),
        (KeyboardInterrupt(), 130, "stopped"),
        (KeyboardInterrupt(143), 143, "stopped"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(ArgumentParser(), failing(error)) == code
    assert capsys.readouterr().err == f"{line}\n"


def test_bad_arguments_and_mistakes_of_the_program() -> None:
    with pytest.raises(SystemExit) as stop:
        exit_code(ArgumentParser(), failing(BadArguments("--epochs 0")))
    assert stop.value.code == 2
    with pytest.raises(RuntimeError, match="mat1"):
        exit_code(ArgumentParser(), failing(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))


def test_a_signal_waits_for_the_batch_only_while_training() -> None:
    stop = StopSignal().listen()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    stop.training = True
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.exit_code == 143
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.exit_code == 130
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
