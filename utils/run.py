"""A run: what it is, its folder, and the files it leaves there besides checkpoints and pictures."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import fcntl
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from load_data import Data
from mixup import settings_for
from mixup.base import Method

from . import options
from .device import device_name
from .distributed import World
from .errors import BadArguments, UserError
from .files import atomic_write, read_json, remove_leftovers, write_json

log = logging.getLogger("sage")

LOCK = ".lock"
# The columns of metrics.csv. The last three are measurements; the same command repeats all others exactly.
COLUMNS = (
    "epoch", "learning_rate", "train_loss", "train_top1", "train_top5", "valid_loss", "valid_top1", "valid_top5",
    "test_loss", "test_top1", "test_top5", "best_top1", "seconds", "images_per_second", "peak_memory_gb",
)  # fmt: skip


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
    """Where a run stands: everything a checkpoint holds besides weights and optimiser.

    Attributes:
        epoch: the epoch in progress, or the next one, from 0.
        step: batches of it that are done.
        sums: of the epoch so far: loss × images, top-1 hits, top-5 hits, images.
        seconds: spent on the epoch so far.
        rows: a row of ``COLUMNS`` for every finished epoch.
    """

    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best(self) -> float:
        """Test accuracy of the best epoch so far; 0 before the first."""
        return best_row(self.rows)["test_top1"] if self.rows else 0.0

    @property
    def last_begun(self) -> int:
        """The last epoch that a batch was trained on in."""
        return self.epoch if self.step else self.epoch - 1

    def next_epoch(self, row: dict[str, Any]) -> None:
        """The epoch in progress has ended as ``row`` says."""
        self.rows.append(row)
        self.epoch, self.step, self.sums, self.seconds = self.epoch + 1, 0, [0.0] * 4, 0.0

    def move_to(self, held: dict[str, Any]) -> None:
        """Stand where a checkpoint stands."""
        for name, value in dataclasses.asdict(Progress(**held)).items():
            setattr(self, name, value)


@dataclass(frozen=True)
class Run:
    """What training works on. ``folder`` is None where nothing is written: with --log_off, and on all ranks but 0."""

    training: Training
    identity: Identity
    data: Data
    method: Method
    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    world: World
    folder: Path | None
    progress: Progress

    def describe(self) -> str:
        """One line: method, data, model, device."""
        return (
            f"{self.method.name} on {self.data.name} ({self.data.source}): {self.data.describe()}; "
            f"{self.identity.settings['arch']}; {device_name(self.device)}"
        )


# ------------------------------------------------------------------------------------------------------------ identity


@dataclass(frozen=True)
class Identity:
    """What a run is. Where two agree, one run repeats the other.

    Attributes:
        settings: everything that determines the run's numbers, by flag name; ``labels_per_class`` is the limit that
            left images out, or None.
        digests: of the whole "train", "test" and perhaps "valid" split, see ``load_data.Data``.
        origin: digest of the weights that it was initialised from; None for random ones.
    """

    settings: dict[str, Any]
    digests: dict[str, str]
    origin: str | None = None

    @staticmethod
    def of(content: dict[str, Any]) -> Identity:
        """The identity in a checkpoint or a config.json."""
        settings = {name: list(v) if isinstance(v, tuple) else v for name, v in dict(content["settings"]).items()}
        return Identity(settings, dict(content["digests"]), content["origin"])

    def until(self, epoch: int) -> Identity:
        """Without what an epoch up to ``epoch`` does not depend on: the number of epochs, milestones that come later,
        and the name."""
        settings = {name: value for name, value in self.settings.items() if name not in ("epochs", "add_name")}
        reached = sum(milestone <= epoch for milestone in settings["schedule"])
        cut = {name: settings[name][:reached] for name in ("schedule", "gammas")}
        return dataclasses.replace(self, settings=settings | cut)


def differences(there: Identity, here: Identity) -> list[str]:
    """In what two runs differ: a text for each setting, for the images, and for the weights they were initialised from;
    none if they agree."""
    names = sorted(there.settings.keys() | here.settings.keys())
    found = [f"--{name}: {there.settings.get(name)} there, {here.settings.get(name)} here" for name in names
             if there.settings.get(name) != here.settings.get(name)]  # fmt: skip
    for split, name in (("train", "training"), ("valid", "validation"), ("test", "test")):
        digests = there.digests.get(split), here.digests.get(split)
        if digests[0] != digests[1]:
            found.append("other {} images: digest {} there, {} here".format(name, *digests))
    if there.origin != here.origin:
        origins = (f"weights {one.origin}" if one.origin else "random weights" for one in (there, here))
        found.append("initialised from {} there, {} here".format(*origins))
    return found


def refuse_another(folder: Path, there: Identity, here: Identity) -> None:
    """Raise ``BadArguments`` (``UserError`` if the images alone are others) where a folder's run is not this one."""
    found = differences(there, here)
    if found:
        of_settings = any(line.startswith("--") for line in found)
        raise (BadArguments if of_settings else UserError)(
            f"{folder} holds a run with other {'settings' if of_settings else 'images or weights'} "
            f"({'; '.join(found)}). Name this run with --add_name, or start anew with --overwrite True"
        )


def run_name(args: argparse.Namespace) -> str:
    """Dataset, architecture, method, seed, the settings that differ from the method's preset, and --add_name."""
    preset = settings_for(args.method, args.dataset)
    ours = settings_for(args.method, args.dataset, **options.method_settings(args))
    changed = [f"{name}{ours[name]}" for name in preset if ours[name] != preset[name]]
    named = [args.add_name] if args.add_name else []
    return "_".join([args.dataset, args.arch, args.method, f"seed{args.seed}", *changed, *named])


def run_settings(args: argparse.Namespace, limit: int | None) -> dict[str, Any]:
    """Everything that determines a run's numbers, by flag name. ``limit`` is the number of training images a class
    where there were more."""
    given = options.method_settings(args)
    left_out = options.NOT_PART_OF_A_RUN | given.keys()
    flags = {name: value for name, value in vars(args).items() if name not in left_out and value is not None}
    return {**flags, **settings_for(args.method, args.dataset, **given), "labels_per_class": limit}


# ---------------------------------------------------------------------------------------------------------- the folder


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
        raise UserError(f"another run is writing into {folder}; wait, or name this one with --add_name") from None
    except OSError as error:  # some network file systems
        print(f"warning: {folder} cannot be locked ({error.strerror}): nothing keeps a second run out", file=sys.stderr)
    return held


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


def is_finished(run: Run) -> bool:
    """Whether the folder holds this run, finished, which is then said.

    Raises:
        BadArguments, UserError: it holds another run, or a damaged record; the message names the difference.
    """
    if run.folder is None:
        return False
    try:
        if (run.folder / "config.json").exists():
            refuse_another(run.folder, Identity.of(read_json(run.folder / "config.json")), run.identity)
        elif (run.folder / "result.json").exists():
            raise UserError(f"{run.folder} holds a result.json and no config.json: remove it, or name this run "
                            "with --add_name")  # fmt: skip
        if not (run.folder / "result.json").exists():
            return False
        print(f"{run.folder} is finished: {read_json(run.folder / 'result.json')['summary']}")
        return True
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"a record of {run.folder} is damaged ({error}); remove it and repeat the command") from error


# --------------------------------------------------------------------------------------------------------- its records


def start_log(quiet: bool = False) -> None:
    """Lines to the terminal, unless ``quiet``. A full disk costs lines of the log, not the run."""
    logging.raiseExceptions = False
    log.handlers.clear()
    log.setLevel(logging.CRITICAL if quiet else logging.INFO)
    log.propagate = False
    log.addHandler(logging.StreamHandler(sys.stdout))
    log.addHandler(MemoryHandler(1000, flushLevel=logging.CRITICAL + 1))


def log_into(path: Path) -> None:
    """From now on the log's lines also go to the end of a file, first those that came before."""
    early = log.handlers.pop()
    assert isinstance(early, MemoryHandler)
    log.addHandler(logging.FileHandler(path, encoding="utf-8"))
    early.setTarget(log.handlers[-1])
    early.close()


def write_config(run: Run, arguments: dict[str, Any]) -> None:
    """Settings, when the run was started, and versions, device, commit and command as it was last continued."""
    if run.folder is None:
        return
    path, now = run.folder / "config.json", time.strftime("%Y-%m-%d %H:%M:%S")
    started = read_json(path).get("started", now) if path.exists() else now
    write_json(path, {
        **dataclasses.asdict(run.identity),
        "arguments": arguments,
        "command": options.command_line(),
        "classes": run.data.classes,
        "images": {"train": len(run.data.train), "test": len(run.data.test)},
        "mean": run.data.mean,
        "std": run.data.std,
        "device": device_name(run.device),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "torchvision", "numpy")}},
        "git_commit": git_commit(),
        "started": started,
        "continued": now if now != started else None,
    })  # fmt: skip


def git_commit() -> str | None:
    """The commit this code is at, with a + if files differ from it; None outside a checkout."""
    here = str(Path(__file__).parent)
    command = ["git", "-C", here, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def write_metrics(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A row an epoch; seven significant digits read well and still repeat exactly."""
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{v:.7g}" if isinstance(v, float) else v for name, v in row.items()})


def write_result(run: Run) -> str:
    """result.json, which marks the run as finished, and a last metrics.csv; returns the closing lines of the log."""
    rows = run.progress.rows
    (median, spread), best = final_accuracy(rows), best_row(rows)
    lines = [f"\nfinal 10 epoch acc (median) : {median:.2f} (+- {spread:.2f})"]
    lines += [f"best acc : {best['test_top1']:.2f} in epoch {best['epoch']}"]
    if run.folder is not None:
        write_metrics(run.folder / "metrics.csv", rows)
        write_json(run.folder / "result.json", {
            "summary": f"final {median:.2f}% (+- {spread:.2f}), best {best['test_top1']:.2f}%",
            "final_top1": median,
            "spread": spread,
            "best_top1": best["test_top1"],
            "best_epoch": best["epoch"],
            "epochs": len(rows),
            "seconds": round(sum(row["seconds"] for row in rows), 1),
        })  # fmt: skip
        pictures = sorted(str(path) for path in run.folder.glob("mixed*.png"))
        lines += [f"curves: {run.folder / 'curves.png'}", f"mixed images: {', '.join(pictures)}"]
    return "\n".join(lines)


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first epoch with the highest accuracy on the validation set, or on the test set where there is none."""
    name = "test_top1" if rows[-1]["valid_top1"] is None else "valid_top1"
    return max(rows, key=lambda row: -1.0 if row[name] is None else row[name])


def final_accuracy(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Median of the last ten epochs' test accuracy, and the larger distance from it to their extremes, in %."""
    last = [row["test_top1"] for row in rows[-10:]]
    median = float(np.median(last))
    return median, max(max(last) - median, median - min(last))


def line_of_epoch(progress: Progress, training: Training) -> str:
    """The published line that opens an epoch."""
    mean = sum(row["seconds"] for row in progress.rows) / max(1, len(progress.rows))
    left, best = mean * (training.epochs - progress.epoch), progress.best
    days = f"{int(left // 86400)}d " if left >= 86400 else ""
    need = days + time.strftime("%H:%M:%S", time.gmtime(left % 86400))
    now = time.strftime("[%Y-%m-%d-%H:%M:%S]")
    return (
        f"\n==>>{now} [Epoch={progress.epoch:03d}/{training.epochs:03d}] [Need: {need}] "
        f"[learning_rate={training.rate(progress.epoch):6.4f}] [Best : Accuracy={best:.2f}, Error={100 - best:.2f}]"
    )


def line_of_scores(name: str, scores: dict[str, float], prefix: str) -> str:
    """The published line of a training or test pass: top-1, top-5, error, and the loss."""
    top1, top5, loss = (scores[f"{prefix}_{key}"] for key in ("top1", "top5", "loss"))
    return f"  **{name}** Prec@1 {top1:.3f} Prec@5 {top5:.3f} Error@1 {100 - top1:.3f} Loss: {loss:.4f}"
