"""What tests share: golden vectors with the fixed weights they were made with, and the programs in this process."""

from __future__ import annotations

import csv
import importlib
import io
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
GOLDEN = Path(__file__).parent / "golden"
MEAN = torch.tensor([125.3, 123.0, 113.9]) / 255
STD = torch.tensor([63.0, 62.1, 66.7]) / 255


def golden(name: str) -> dict[str, Any]:
    """Arrays of ``tests/golden/NAME`` (npz) or its JSON content."""
    path = GOLDEN / name
    return json.loads(path.read_text()) if path.suffix == ".json" else dict(np.load(path))


@contextmanager
def warned() -> Iterator[list[str]]:
    """The warnings of the block's code, as they come."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log, level = logging.getLogger("sage"), logging.getLogger("sage").level
    log.setLevel(logging.WARNING)  # a program before may have been told to be quiet
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def normalise(images_u8: np.ndarray) -> Tensor:
    """[B, 3, H, W] bytes to normalised float32, as every golden vector does it."""
    return (torch.from_numpy(images_u8).float() / 255 - MEAN[:, None, None]) / STD[:, None, None]


def load_fixed_weights(model: nn.Module) -> nn.Module:
    """Every state-dict entry drawn from a generator seeded by its name; see tests/golden/README.md."""
    state = {}
    for name, old in model.state_dict().items():
        rng = np.random.RandomState(zlib.crc32(name.encode()))
        shape = tuple(old.shape)
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif name.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        elif len(shape) == 4:
            value = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif len(shape) == 2:
            value = rng.standard_normal(shape) / np.sqrt(shape[1])
        elif name.endswith("weight"):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = 0.1 * rng.standard_normal(shape)
        state[name] = torch.as_tensor(value).to(old.dtype)
    model.load_state_dict(state)
    return model


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


class Done(NamedTuple):
    """What a command left: its exit code and what it said."""

    returncode: int
    stdout: str
    stderr: str


def main(*words: object, check: int | None = 0) -> Done:
    """main.py in this process; ``check`` is the exit code it must have."""
    done = run("main.py", *words)
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
    return done


def run(program: str, *words: object) -> Done:
    """A program of the project in this process, as its command line runs it: its own streams, signals put back."""
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv, folder = sys.argv, [program, *map(str, words)], os.getcwd()
    os.chdir(ROOT)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = module.main(sys.argv[1:])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        os.chdir(folder)
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.use_deterministic_algorithms(False)
    return Done(code, out.getvalue(), err.getvalue())


def process(*words: object, **how: Any) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, for what one process cannot show: imports, kills, signals."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, **how)


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without its measured columns."""
    with open(folder / "metrics.csv", newline="") as file:
        measured = ("seconds", "images_per_second", "peak_memory_gb")
        return [{k: v for k, v in row.items() if k not in measured} for row in csv.DictReader(file)]


def weights(folder: Path, name: str = "checkpoint.pth.tar") -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)["state_dict"]


@contextmanager
def limited_memory(spare: int) -> Iterator[None]:
    """At most ``spare`` bytes more than now, as ``ulimit -v`` does it."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
