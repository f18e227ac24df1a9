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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import nn

from load_data import Data
from mixup import build_method
from mixup.base import Method

from . import options, records
from .device import device_name
from .distributed import ImageWeight, World
from .errors import BadArguments, StopSignal, UserError
from .files import remove_leftovers
from .records import log

LOCK = ".lock"
RECORDS = ("config.json", "metrics.csv", "result.json")  # which no run ends without
MIXED, MIXED_LAST = "mixed.png", "mixed_last.png"  # pictures of the first epoch's first batch, and the last's
Found = TypeVar("Found")


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

    Raises:
        ValueError: values that no run can have.
    """

    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        counts = all(type(value) is int and 0 <= value < 2**31 for value in (self.epoch, self.step))
        numbers = isinstance(self.sums, list) and len(self.sums) == 4 and isinstance(self.rows, list)
        if not counts or not numbers or not all(is_amount(value) for value in [self.seconds, *self.sums]):
            raise ValueError("its progress is not one")
        first = self.epoch - len(self.rows)
        for number, row in enumerate(self.rows, start=first):
            if not isinstance(row, dict) or row.keys() != set(records.COLUMNS) or row["epoch"] != number:
                raise ValueError("its progress is not one of consecutive epochs")
            if not all((value is None and name.startswith("valid")) or is_amount(value) for name, value in row.items()):
                raise ValueError("its progress has numbers that no epoch has")

    @property
    def best(self) -> float:
        """Test accuracy of the best epoch so far; 0 before the first."""
        return records.best_row(self.rows)["test_top1"] if self.rows else 0.0

    @property
    def last_begun(self) -> int:
        """The last epoch that a batch was trained on in."""
        return self.epoch if self.step else self.epoch - 1

    def next_epoch(self, row: dict[str, Any]) -> None:
        """The epoch in progress has ended as ``row`` says."""
        self.rows.append(row)
        self.epoch, self.step, self.sums, self.seconds = self.epoch + 1, 0, [0.0] * 4, 0.0


def is_amount(value: Any) -> bool:
    """Whether it is a finite number, not below 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


@dataclass
class Run:
    """What training works on.

    Attributes:
        identity: settings, images, and the weights it was begun from.
        folder: None where nothing is written: with --log_off, and on all ranks but the first.
        lock: held while the run may write into the folder.
        resume: what --resume names, if anything.
        clock: the moment up to which ``progress.seconds`` counts.
        saved: the moment of the last save, or of the start.
        is_first_batch: whether no batch was trained on since this start.
        best: state of the best epoch since this start, as a checkpoint holds it.
        best_is_new: whether it is still to be written.
    """

    training: Training
    identity: Identity
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
    best: dict[str, Any] | None = None
    best_is_new: bool = False

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
            f"{len(data.classes)} classes, {len(data.test)} test images, {height}×{width}; "
            f"{self.identity.settings['arch']}; {device_name(self.device)}"
        )


# ------------------------------------------------------------------------------------------------------------ identity


@dataclass(frozen=True)
class Identity:
    """What a run is. Where two agree, one run repeats the other.

    Attributes:
        settings: everything that determines the run's numbers, by flag name; ``labels_per_class`` is the limit that
            left images out, or None.
        digests: of the whole "train" and "test" split, see ``load_data.Data``; empty for runs of older versions.
        origin: digest of the weights that it was begun from; None for random ones.
    """

    settings: dict[str, Any]
    digests: dict[str, str] = field(default_factory=dict)
    origin: str | None = None

    def until(self, epoch: int) -> Identity:
        """Without what an epoch up to ``epoch`` does not depend on: the number of epochs, milestones that come later,
        and the name."""
        settings = {name: value for name, value in self.settings.items() if name not in ("epochs", "add_name")}
        reached = sum(milestone <= epoch for milestone in settings.get("schedule", []))
        cut = {name: settings[name][:reached] for name in ("schedule", "gammas") if name in settings}
        return dataclasses.replace(self, settings=settings | cut)


def identity_of(content: dict[str, Any]) -> Identity:
    """The identity that a checkpoint or a config.json holds; ``ValueError`` where it is none."""
    settings, digests, origin = content.get("settings"), content.get("digests", {}), content.get("origin")
    if not isinstance(settings, dict) or not settings:
        raise ValueError("it holds no settings")
    for name, value in settings.items():
        values = value if isinstance(value, list | tuple) else [value]
        if not isinstance(name, str) or len(values) > 100:
            raise ValueError(f"its setting {str(name)[:40]!r} is none")
        if not all(one is None or isinstance(one, str | int | float) for one in values):
            raise ValueError(f"its setting {name[:40]!r} is neither a number nor a text")
    if not isinstance(digests, dict) or not all(isinstance(text, str) for text in [*digests, *digests.values()]):
        raise ValueError("its digests are none")
    if origin is not None and not isinstance(origin, str):
        raise ValueError("its origin is none")
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return Identity(listed, dict(digests), origin)


def differences(there: Identity, here: Identity) -> list[str]:
    """In what two runs differ, a text for each setting, for the images, and for the weights they were begun from; none
    if they agree. What a run of an older version does not hold is not compared; a setting has its default then."""
    names = there.settings.keys() | here.settings.keys()
    complete = there.digests and here.digests
    if not complete:
        names -= {"labels_per_class"}  # it was the flag, also where that limited nothing
    ours, theirs = with_defaults(here.settings), with_defaults(there.settings)
    found = [f"--{name}: {theirs.get(name)} there, {ours.get(name)} here" for name in sorted(names)
             if theirs.get(name) != ours.get(name)]  # fmt: skip
    if complete:
        for split, name in (("train", "training"), ("test", "test")):
            if there.digests.get(split) != here.digests.get(split):
                digests = there.digests.get(split), here.digests.get(split)
                found.append("other {} images: digest {} there, {} here".format(name, *digests))
        if there.origin != here.origin:
            origins = (f"weights {one.origin}" if one.origin else "random weights" for one in (there, here))
            found.append("begun from {} there, {} here".format(*origins))
    return found


def with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of any version, with the flags' and the method's defaults for those that it did not have."""
    return {**flag_defaults(), **preset(str(settings.get("method")), str(settings.get("dataset"))), **settings}


@cache
def flag_defaults() -> dict[str, Any]:
    return vars(options.make_parser().parse_args([]))


@cache
def preset(method: str, dataset: str) -> dict[str, Any]:
    """A method's settings for a data set; nothing where there is no such method."""
    try:
        return vars(build_method(method, dataset, 2))
    except ValueError:
        return {}


def refuse_another(folder: Path | str, there: Identity, here: Identity) -> None:
    """Raise ``BadArguments`` (``UserError`` if the images alone are others) where a folder's run is not this one."""
    found = differences(there, here)
    if not found:
        if not there.digests:
            log.warning(
                f"warning: {folder} is of an older version, which kept no digest of its images; settings, classes and "
                "the number of images are compared"
            )
        return
    of_settings = any(line.startswith("--") for line in found)
    raise (BadArguments if of_settings else UserError)(
        f"{folder} holds a run with other {'settings' if of_settings else 'images or weights'} ({'; '.join(found)}). "
        "Give this run a name of its own with --add_name, or start anew with --overwrite True"
        + how_to_go_on(there, here)
    )


def how_to_go_on(there: Identity, here: Identity) -> str:
    """A hint where two runs differ in their length alone."""
    epochs = here.settings.get("epochs", 0), there.settings.get("epochs", 0)
    if epochs[0] <= epochs[1] or differences(there.until(epochs[1] - 1), here.until(epochs[1] - 1)):
        return ""
    return (
        f"; to train it longer, add --resume THAT_FOLDER/checkpoint.pth.tar --add_name longer to --epochs {epochs[0]}"
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


def run_settings(args: argparse.Namespace, method: Method, limit: int | None) -> dict[str, Any]:
    """Everything that determines a run's numbers, by flag name. ``limit`` is the number of training images a class
    where there were more."""
    own = {
        name: value for name, value in vars(args).items() if name not in options.NOT_PART_OF_A_RUN and value is not None
    }
    of_method = dataclasses.asdict(method)
    for name in ("num_classes", "mean", "std"):  # follow from the data
        of_method.pop(name, None)
    unused = options.method_settings(args).keys() - of_method.keys()
    return {
        **{name: value for name, value in own.items() if name not in unused},
        **of_method,
        "labels_per_class": limit,
    }


# -------------------------------------------------------------------------------------------------------- the folder


@contextmanager
def hold(folder: Path | None, overwrite: bool, resume: str) -> Iterator[IO | None]:
    """The folder, made ready and held by this process alone; a dead process holds nothing. Nothing where it is None.

    Raises:
        UserError: another process holds it, or a record of the run is not a file.
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
        for name in RECORDS:
            refuse_other_than_file(folder / name)
        yield held
    finally:
        held.close()


def lock(folder: Path) -> IO:
    """Make the folder and lock it for this process, until the file is closed."""
    folder.mkdir(parents=True, exist_ok=True)
    refuse_other_than_file(folder / LOCK)
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


def refuse_other_than_file(path: Path) -> None:
    """Raise ``UserError`` where there is a folder in place of a file, or a pipe, which could not be read to its end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file; remove it")


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


def read_or_set_aside(path: Path, take: Callable[[dict[str, Any]], Found]) -> Found | None:
    """What ``take`` finds in a JSON file of the run; None where there is none. A damaged one, of which ``take`` raises
    ``ValueError``, counts as none: it gets another name, and the run writes it anew. One that cannot be read at the
    moment is an ``OSError``, and stays as it is."""
    if not path.exists():
        return None
    try:
        content = records.read_json(path)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return take(content)
    except (ValueError, RecursionError) as error:
        aside = path.with_name(f"{path.name}.damaged")
        os.replace(path, aside)
        warn(f"{path} is damaged ({error}); it is kept as {aside.name} and written anew")
        return None


def summary_of(content: dict[str, Any]) -> str:
    """The line that a result.json says of a run; ``ValueError`` where it says none."""
    if not isinstance(content.get("summary"), str):
        raise ValueError("it holds no summary")
    return content["summary"]


def write_missing_config(run: Run, arguments: dict[str, Any]) -> None:
    """config.json of a finished run that has lost it, or whose was damaged and set aside."""
    if run.folder is not None and not (run.folder / "config.json").exists():
        write_config(run, arguments)


def write_config(run: Run, arguments: dict[str, Any]) -> None:
    """Settings, when the run was started, and versions, device, commit and command as it was last continued."""
    if run.folder is None:
        return
    versions = {name: version(name) for name in ("torch", "torchvision", "numpy")}
    path, now = run.folder / "config.json", time.strftime("%Y-%m-%d %H:%M:%S")
    started = records.read_json(path).get("started", now) if path.exists() else now
    content = {
        "settings": run.identity.settings,
        "digests": run.identity.digests,
        "origin": run.identity.origin,
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
    records.write_json(path, content)


def write_result(run: Run) -> str:
    """result.json, which marks the run as finished, and a last metrics.csv; returns the closing lines of the log."""
    rows = run.progress.rows
    median, spread = records.final_accuracy(rows)
    best = records.best_row(rows)
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
        mixed = [str(path) for name in (MIXED, MIXED_LAST) if (path := run.folder / name).exists()]
        lines += [f"curves: {run.folder / 'curves.png'}", f"mixed images: {', '.join(mixed)}"]
    return "\n".join(lines)
