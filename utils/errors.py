"""How a command ends: errors the user can mend, signals, exit codes."""

from __future__ import annotations

import io
import os
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from types import FrameType

import torch


class UserError(Exception):
    """Something the user can mend: the message says what was wrong, the value, and what to do. No traceback."""


class BadArguments(UserError):
    """Arguments that turn out not to fit what is there."""


def exit_code(parser: ArgumentParser, work: Callable[[], int]) -> int:
    """What ``work()`` returns. After one line on stderr about what the user can mend: 2 for bad arguments, 130 after
    Ctrl-C, 143 after any other signal, 1 for the rest."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a ± is no reason to fail where the terminal has none
    try:
        return work()
    except BadArguments as error:
        parser.error(str(error))
    except BrokenPipeError:  # the reader of the output has left, as in "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except torch.OutOfMemoryError:
        print("error: out of GPU memory: make --batch_size smaller", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or ''} {error.strerror or error}".replace("  ", " "), file=sys.stderr)
    except (UserError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt as stop:
        print("stopped", file=sys.stderr)
        return stop.args[0] if stop.args else 130
    return 1


def stopping_signals() -> list[int]:
    """Signals that ask a run to save and leave; SIGHUP only where it is not ignored, as it is under nohup."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *hangup]


class StopSignal:
    """Remembers a signal, so that the loop can finish its batch and save. Before training, when there is nothing to
    save, and on a second Ctrl-C it stops at once, by ``KeyboardInterrupt`` with the exit code. ``exit_code`` is 0 until
    a signal came, then 130 (SIGINT) or 143."""

    def __init__(self) -> None:
        self.exit_code = 0
        self.training = False

    def listen(self) -> StopSignal:
        """From now on."""
        for number in stopping_signals():
            signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and self.exit_code == 130
        self.exit_code = 130 if number == signal.SIGINT else 143
        if again or not self.training:
            raise KeyboardInterrupt(self.exit_code)
