"""A run: what it is and is made of, its folder, who may write into it, and what the folder says of it."""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from load_data import Data
from mixup import build_method
from mixup.base import Method

from . import options, records
from .archive import remove_leftovers
from .device import device_name
from .errors import BadArguments, StopSignal, UserError
from .processes import ImageWeight, World

LOCK = ".lock"


@dataclass(frozen=True)
class Training:
    """What the loop needs to know of the command line, by flag name."""

    epochs: int = 300
    batch_size: int = 100
    learning_rate: float = 0.1
    schedule: tuple[int, ...] = (150, 225)
    gammas: tuple[float, ...] = (0.1, 0.1)
    seed: int = 0
    start_epoch: int = 0
    fast: bool = False
    checkpoint_minutes: float = 5.0
    print_freq: int = 100

    def rate(self, epoch: int) -> float:
        """The base rate times the factors of the milestones that have been reached."""
        reached = [gamma for milestone, gamma in zip(self.schedule, self.gammas, strict=True) if epoch >= milestone]
        return self.learning_rate * math.prod(reached)


@dataclass
class Progress:
    """Where a run stands: everything a checkpoint holds beside weights and optimiser.

    Attributes:
        epoch: the epoch in progress, or the next one, from 0.
        step: batches of it that are done.
        sums: of the epoch so far: loss × images, top-1 hits, top-5 hits, images.
        seconds: spent on the epoch so far.
        rows: a row of records.COLUMNS for every finished epoch.
    """

    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        whole = isinstance(self.epoch, int) and isinstance(self.step, int) and isinstance(self.seconds, float)
        if not whole or len(self.sums) != 4 or any(row.keys() != set(records.COLUMNS) for row in self.rows):
            raise ValueError("its progress is not one")

    @property
    def best(self) -> float:
        return max((row["test_top1"] for row in self.rows), default=0.0)

    def next_epoch(self, row: dict[str, Any]) -> None:
        """The epoch in progress has ended as ``row`` says."""
        self.rows.append(row)
        self.epoch, self.step, self.sums, self.seconds = self.epoch + 1, 0, [0.0] * 4, 0.0


@dataclass
class Run:
    """What training works on.

    Attributes:
        settings: everything that determines the run's numbers, by flag name.
        folder: None where nothing is written: with --log_off, and on all ranks but the first.
        lock: held while the run may write into the folder.
        resume: what --resume names, if anything.
        clock: the moment up to which ``progress.seconds`` counts.
        saved: the moment of the last save, or of the start.
        is_first_batch: whether no batch was trained on since this start.
    """

    training: Training
    settings: dict[str, Any]
    data: Data
    method: Method
    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    progress: Progress
    world: World = field(default_factory=World)
    stop: StopSignal = field(default_factory=StopSignal)
    folder: Path | None = None
    lock: IO | None = None
    resume: str = ""
    weight: ImageWeight = field(default_factory=ImageWeight)
    clock: float = field(default_factory=time.monotonic)
    saved: float = field(default_factory=time.monotonic)
    is_first_batch: bool = True

    def count_time(self) -> float:
        """Add what has passed since the last call to the seconds of the epoch; returns the moment."""
        now = time.monotonic()
        self.progress.seconds += now - self.clock
        self.clock = now
        return now

    def describe(self) -> str:
        """One line: method, data, model, device."""
        data, (height, width) = self.data, self.data.image_size
        return (
            f"{self.method.name} on {data.name} ({data.source}): {len(data.train)} training images of "
            f"{len(data.classes)} classes, {len(data.test)} test images, {height}×{width}; {self.settings['arch']}; "
            f"{device_name(self.device)}"
        )


# ------------------------------------------------------------------------------------------------- names and settings


def run_name(args: argparse.Namespace, method: Method) -> str:
    """Dataset, architecture, method, seed, the settings that differ from the method's preset, and --add_name."""
    preset = build_method(args.method, args.dataset, 2)
    changed = [
        f"{field.name}{getattr(method, field.name)}"
        for field in dataclasses.fields(method)
        if getattr(method, field.name) != getattr(preset, field.name)
    ]
    return "_".join(
        [args.dataset, args.arch, args.method, f"seed{args.seed}", *changed, *filter(None, [args.add_name])]
    )


def run_settings(args: argparse.Namespace, method: Method) -> dict[str, Any]:
    """Everything that determines a run's numbers, by flag name."""
    own = {
        name: value for name, value in vars(args).items() if name not in options.NOT_PART_OF_A_RUN and value is not None
    }
    of_method = dataclasses.asdict(method)
    for name in ("num_classes", "mean", "std"):  # follow from the data
        of_method.pop(name, None)
    unused = options.method_settings(args).keys() - of_method.keys()
    return {**{name: value for name, value in own.items() if name not in unused}, **of_method}


def refuse_other_settings(folder: Path, held: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise ``BadArguments`` with the difference, if there is any. What a run of an older version does not hold is its
    flag's default."""
    parser = options.make_parser()
    held = {**{name: parser.get_default(name) for name in settings}, **held}
    different = [
        f"--{name}: {held.get(name)} there, {settings.get(name)} here"
        for name in sorted(held.keys() | settings.keys())
        if held.get(name) != settings.get(name)
    ]
    if different:
        raise BadArguments(
            f"{folder} holds a run with other settings ({'; '.join(different)}). Give this run a name of its own "
            "with --add_name, or start anew with --overwrite True"
        )


# -------------------------------------------------------------------------------------------------------- the folder


@contextmanager
def hold(folder: Path | None, overwrite: bool, resume: str) -> Iterator[IO | None]:
    """The folder, made ready and held by this process alone; a dead process holds nothing. Nothing where it is None.

    Raises:
        UserError: another process holds it.
        BadArguments: ``overwrite`` would move ``resume`` away.
    """
    if folder is None:
        yield None
        return
    held = lock(folder)
    try:
        if overwrite and not is_restarted() and os.listdir(folder) != [LOCK]:
            set_aside(folder, resume)
            held.close()
            held = lock(folder)
        remove_leftovers(folder)
        yield held
    finally:
        held.close()


def lock(folder: Path) -> IO:
    """Make the folder and lock it for this process, until the file is closed."""
    folder.mkdir(parents=True, exist_ok=True)
    held = open(folder / LOCK, "a")  # noqa: SIM115
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        held.close()
        raise UserError(
            f"another run is writing into {folder}; wait for it, or give this one another --add_name"
        ) from None
    except OSError as error:  # some network file systems
        warn(f"{folder} cannot be locked ({error.strerror}): nothing keeps a second run from writing into it")
    return held


def lock_is_lost(folder: Path, lock: IO) -> bool:
    """Whether the folder's lock is another file than the one this run holds."""
    try:
        return not os.path.samestat(os.stat(folder / LOCK), os.fstat(lock.fileno()))
    except OSError:
        return False


def is_restarted() -> bool:
    """Whether torchrun or Slurm started this command again by itself."""
    counts = (os.environ.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(count.strip().isdigit() and int(count) > 0 for count in counts)


def set_aside(folder: Path, resume: str) -> None:
    """Rename the folder for --overwrite."""
    if resume and Path(resume).resolve().is_relative_to(folder.resolve()):
        raise BadArguments(f"--overwrite would move --resume {resume} away; copy that checkpoint elsewhere")
    aside = folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
    folder.rename(aside)
    print(f"the old run is kept as {aside}")


def warn(line: str) -> None:
    """A warning before there is a log."""
    print(f"warning: {line}", file=sys.stderr)


def is_finished(folder: Path | None, settings: dict[str, Any]) -> bool:
    """Whether the folder holds a finished run of these settings, which is then said.

    Raises:
        BadArguments: it holds a run of other settings; the message shows the difference.
    """
    if folder is None:
        return False
    held = read(folder / "config.json", "settings")
    if held is not None:
        refuse_other_settings(folder, held, settings)
    summary = read(folder / "result.json", "summary")
    if summary is not None:
        print(f"{folder} is finished: {summary}")
    return summary is not None


def read(path: Path, key: str) -> Any:
    """One entry of a JSON file; None where there is no file, or a damaged one, which the run will write anew."""
    if not path.exists():
        return None
    try:
        return records.read_json(path)[key]
    except (ValueError, TypeError, KeyError) as error:
        warn(f"{path} is damaged ({error}); it is written anew")
        return None


def write_config(run: Run, arguments: dict[str, Any]) -> None:
    """Settings, when the run was started, and versions, device, commit and command as it was last continued."""
    if run.folder is None:
        return
    versions = {name: version(name) for name in ("torch", "torchvision", "numpy")}
    started = now = time.strftime("%Y-%m-%d %H:%M:%S")
    with suppress(OSError, ValueError, LookupError, TypeError):  # none yet, or damaged
        started = records.read_json(run.folder / "config.json")["started"]
    content = {
        "settings": run.settings,
        "arguments": arguments,
        "command": options.command_line(),
        "classes": run.data.classes,
        "images": {"train": len(run.data.train), "test": len(run.data.test)},
        "mean": run.data.mean,
        "std": run.data.std,
        "device": device_name(run.device),
        "versions": {"python": platform.python_version(), **versions},
        "git_commit": records.git_commit(),
        "started": started,
        "continued": now if now != started else None,
    }
    records.write_json(run.folder / "config.json", content)


def write_result(run: Run) -> str:
    """result.json, which marks the run as finished, and a last metrics.csv; returns the closing lines of the log."""
    rows = run.progress.rows
    median, spread = records.final_accuracy(rows)
    best = max(rows, key=lambda row: row["test_top1"])
    lines = [f"\nfinal 10 epoch acc (median) : {median:.2f} (+- {spread:.2f})"]
    lines += [f"best acc : {best['test_top1']:.2f} in epoch {best['epoch']}"]
    if run.folder is not None:
        records.write_metrics(run.folder / "metrics.csv", rows)
        result = {
            "summary": f"final {median:.2f} % (+- {spread:.2f}), best {best['test_top1']:.2f} %",
            "final_top1": median,
            "spread": spread,
            "best_top1": best["test_top1"],
            "best_epoch": best["epoch"],
            "epochs": len(rows),
            "seconds": round(sum(row["seconds"] for row in rows), 1),
        }
        records.write_json(run.folder / "result.json", result)
        lines += [f"curves: {run.folder / 'curves.png'}", f"mixed images: {run.folder / 'mixed.png'}"]
    return "\n".join(lines)
