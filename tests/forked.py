"""main.py as a child of a process that has imported everything once: a run starts in milliseconds.

The fork server (``warm.py`` says what it imports) has one thread and has never computed anything, so its children may
use PyTorch as any new process may.
"""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import resource
import signal
import subprocess
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from tests.common import ROOT

CONTEXT = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """The server takes its environment from this process, when it starts."""
    before = dict(os.environ)
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    CONTEXT.set_forkserver_preload(["tests.warm"])
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


class Child(NamedTuple):
    """A run in progress."""

    process: Any
    pipe: Connection

    def send(self, number: int) -> None:
        """A signal."""
        os.kill(self.process.pid, number)

    def end(self) -> tuple[int, str]:
        """Exit code (the negative signal that killed it) and all it said, once it is over."""
        if not self.pipe.poll(120):
            self.process.kill()
            raise TimeoutError("the run hangs")
        try:
            said = self.pipe.recv()
        except EOFError:
            said = ""
        self.process.join(60)
        return self.process.exitcode, said


def is_stopped(child: Child) -> bool:
    """Whether a SIGSTOP has taken effect; a SIGCONT sent before would be lost."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(child.process.pid)], capture_output=True, text=True).stdout
    assert state, "the run is over"
    return state.startswith("T")


def start(*words: object, first: Callable[[], None] | None = None) -> Child:
    """main.py with these words; ``first`` is called in the child before."""
    pipe, other = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_child, args=([str(word) for word in words], other, first), daemon=True)
    process.start()
    other.close()
    return Child(process, pipe)


def _child(words: list[str], pipe: Connection, first: Callable[[], None] | None) -> None:
    import main

    multiprocessing.set_start_method("fork", force=True)  # locks without names, which killed runs would leave behind
    said, code = io.StringIO(), 99
    try:
        with redirect_stdout(said), redirect_stderr(said):
            if first is not None:
                first()
            code = main.main(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 98
    except BaseException:
        import traceback

        said.write(traceback.format_exc())
    finally:
        pipe.send(said.getvalue())
        raise SystemExit(code)


# ------------------------------------------------------------------------------------------ what may be done to a child


def each(*firsts: Callable[[], None]) -> None:
    """Several of these."""
    for first in firsts:
        first()


def limit_files(size: int) -> None:
    """No file may grow beyond ``size`` bytes: writing fails as on a full disk, without needing one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def without_pictures() -> None:
    """Plotting takes most of the time of a small run: pictures of mixed images are their titles alone."""
    from utils import pictures

    pictures.plot_curves = lambda path, *rest: path.write_bytes(b"")
    pictures.plot_mixed = lambda path, mixed, images, data, title: path.write_text(title)  # type: ignore[assignment]


def saturate(epoch: int = 0) -> None:
    """From this epoch on the network has so large a bias that no gradient is left."""
    import torch

    from utils import train

    begin = train.begin_epoch

    def begin_saturated(run: Any) -> None:
        begin(run)
        if run.progress.epoch == epoch:
            with torch.no_grad():
                run.model.linear.bias[0] = 1e4

    train.begin_epoch = begin_saturated


def send_at(where: str, *numbers: int, call: int = 1) -> None:
    """This process sends itself signals when function ``module:name`` is called for the given time."""
    counts = {"calls": 0}

    def before() -> None:
        counts["calls"] += 1
        if counts["calls"] == call:
            for number in numbers:
                os.kill(os.getpid(), number)

    _call_before(where, before)


def fail_at(where: str, errno: int) -> None:
    """Function ``module:name`` raises an ``OSError``."""

    def before() -> None:
        raise OSError(errno, os.strerror(errno))

    _call_before(where, before)


def unreadable(name: str, errno: int, reading: int) -> None:
    """The ``reading``-th time that a file of this name is read as text, the disk refuses."""
    from pathlib import Path

    read_text, counts = Path.read_text, {"readings": 0}

    def refuse(path: Path, *args: Any, **named: Any) -> str:
        if path.name == name:
            counts["readings"] += 1
            if counts["readings"] == reading:
                raise OSError(errno, os.strerror(errno), str(path))
        return read_text(path, *args, **named)

    Path.read_text = refuse  # type: ignore[method-assign]


def _call_before(where: str, before: Callable[[], None]) -> None:
    module, name = where.split(":")
    original = getattr(importlib.import_module(module), name)

    def replacement(*args: Any, **named: Any) -> Any:
        before()
        return original(*args, **named)

    setattr(importlib.import_module(module), name, replacement)


def kill_in_save(folder: str, operation: int, pipe: Connection) -> None:
    """Write checkpoints of epoch 0, 1 and 2, each the best; killed before the nth file operation of the last one."""
    from pathlib import Path

    import torch

    from utils import checkpoint

    for epoch in range(3):
        if epoch == 2:
            done = {"operations": 0}

            def before(done: dict[str, int] = done) -> None:
                done["operations"] += 1
                if done["operations"] == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

            for name in ("open", "write", "fsync", "chmod", "link", "unlink", "replace", "close"):
                _call_before(f"os:{name}", before)
        state = {"sage": 1, "state_dict": {"weight": torch.full((300,), float(epoch))}, "progress": {"epoch": epoch}}
        checkpoint.save(state, Path(folder), best=state)
    pipe.send(done["operations"])
