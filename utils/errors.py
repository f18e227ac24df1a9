"""How a command begins and ends: its streams, errors that the user can mend, signals, and exit codes."""

from __future__ import annotations

import importlib.util
import io
import os
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend: the message says what was wrong, the value, and what to do. No traceback."""


class BadArguments(UserError):
    """Arguments that turn out not to fit what is there."""


class OutOfMemory(UserError):
    """The machine has too little memory; what was to be read may be sound."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host's memory, or the limit set on it, did not suffice: PyTorch and threads have no type for that."""
    told = ("can't allocate memory", "not enough memory", "can't start new thread")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(part in str(error) for part in told)
    )


@contextmanager
def out_of_memory(what: str) -> Iterator[None]:
    """Turn a lack of memory within into ``OutOfMemory`` with ``what``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{what}; allow more memory, or ask for less") from None


def begin() -> None:
    """Before a program's imports, which take seconds: Ctrl-C ends it without a traceback, streams that the caller has
    closed lead nowhere (a file could otherwise get their number), and one line says if PyTorch is not there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if importlib.util.find_spec("torch") is None:
        sys.exit("error: this Python has no PyTorch; enter the environment first: source .venv/bin/activate")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        sys.exit(f"error: PyTorch cannot be loaded, for want of memory or of one of its files: {error}")


def run(program: Callable[[], int]) -> NoReturn:
    """Leave with a program's exit code. What the terminal has no letter for is shown as ?, and a reader of the output
    who has left (``| head``) is no error."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):
                stream.reconfigure(errors="replace")
    try:
        sys.exit(program())
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def exit_code(parser: ArgumentParser, work: Callable[[], int]) -> int:
    """What ``work()`` returns; after one line on stderr about what the user can mend: 2 for bad arguments, 130
    after Ctrl-C, 143 after any other signal, 1 for the rest."""
    import torch  # not above: ``begin`` is for a Python that may not have it

    from mixup.gridcut import NoSolver

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # a stream that was put in another's place
                stream.reconfigure(errors="replace")  # a ± is no reason to fail where the terminal has none
    try:
        return work()
    except BadArguments as error:
        parser.error(str(error))
    except (UserError, NoSolver) as error:
        print(f"error: {error}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("error: out of GPU memory: make --batch_size smaller", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            "error: out of memory: allow more, or make --batch_size, --image_size or --initial_channels smaller",
            file=sys.stderr,
        )
    except OSError as error:
        print(f"error: {error.filename or ''} {error.strerror or error}".replace("  ", " "), file=sys.stderr)
    except KeyboardInterrupt as stop:
        print("stopped", file=sys.stderr)
        return stop.args[0] if stop.args else 130
    return 1


def stopping_signals() -> list[int]:
    """What asks a run to save and end; SIGHUP where it is not ignored, as it is under nohup."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *hangup]


class StopSignal:
    """Remembers SIGTERM, SIGINT, SIGUSR1 or SIGHUP so that the loop can finish its batch and save. Stops at once, by
    ``KeyboardInterrupt`` with the exit code, while not ``training``, when there is nothing to save, and on a second
    SIGINT. ``exit_code`` is 0 until a signal came, then 130 (SIGINT) or 143."""

    def __init__(self) -> None:
        self.exit_code = 0
        self.training = False

    def listen(self) -> StopSignal:
        """From now on; SIGHUP stays ignored where it is, as under nohup."""
        for number in stopping_signals():
            signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and self.exit_code == 130
        self.exit_code = 130 if number == signal.SIGINT else 143
        if again or not self.training:
            raise KeyboardInterrupt(self.exit_code)
