"""What a run leaves behind: its log, metrics, configuration and TensorBoard events."""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from .files import atomic_write

log = logging.getLogger("sage")

# The last three are measurements; everything before them is repeated exactly by the same command.
COLUMNS = (
    "epoch", "learning_rate", "train_loss", "train_top1", "train_top5", "valid_loss", "valid_top1", "valid_top5",
    "test_loss", "test_top1", "test_top5", "best_top1", "seconds", "images_per_second", "peak_memory_gb",
)  # fmt: skip


def start_log(quiet: bool = False) -> None:
    """Lines to the terminal, unless ``quiet``. A full disk costs lines of the log, not the run."""
    logging.raiseExceptions = False
    log.handlers.clear()
    log.setLevel(logging.CRITICAL if quiet else logging.INFO)
    log.propagate = False
    screen = logging.StreamHandler(sys.stdout)
    log.addHandler(screen)
    log.addHandler(MemoryHandler(1000, flushLevel=logging.CRITICAL + 1))


def log_into(path: Path | None) -> None:
    """From now on the log's lines also go to the end of a file, if there is one, and first those that came before."""
    early = log.handlers.pop()
    if path is not None and (path.is_file() or not path.exists()):  # opening a pipe would wait for ever
        log.addHandler(logging.FileHandler(path, encoding="utf-8"))
        assert isinstance(early, MemoryHandler)
        early.setTarget(log.handlers[-1])
    early.close()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """``content`` as readable JSON, whole or not at all."""
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path) -> dict[str, Any]:
    """A file that ``write_json`` wrote; ``ValueError`` where it is damaged."""
    if not path.is_file():  # reading a pipe would wait for ever
        path.stat()
        raise ValueError(f"{path} is not a file")
    return json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))


def write_metrics(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A row an epoch."""
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: format_value(value) for key, value in row.items()} for row in rows)


def agree(folder: Path, epochs: int) -> bool:
    """Whether a folder's metrics.csv and result.json are those of one run of so many epochs."""
    try:
        with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
            accuracies = [float(row["test_top1"]) for row in csv.DictReader(file)]
        result = read_json(folder / "result.json")
        final, spread = final_accuracy([{"test_top1": value} for value in accuracies])
        close = max(abs(final - result["final_top1"]), abs(spread - result["spread"])) < 1e-3
        return close and len(accuracies) == result["epochs"] == epochs
    except (OSError, ValueError, LookupError, TypeError, csv.Error):
        return False


class Events:
    """TensorBoard scalars of a run: a file for every start of it, an appended record for every epoch.

    PyTorch's writer does the same in a thread, which dies of a full disk with a traceback.
    """

    def __init__(self, folder: Path, epochs: int) -> None:
        """``epochs`` were finished before this start; the last of them is repeated, as a killed run may lack it."""
        self.path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self.written = max(0, epochs - 1)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append what is new in ``rows``; an ``OSError`` leaves the file as it was."""
        new = rows[self.written :]
        events = [Event(step=row["epoch"], wall_time=time.time(), summary=Summary(value=scalars(row))) for row in new]
        with open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            if size == 0:  # readers then drop what an earlier file holds from that epoch on
                start = Event(step=new[0]["epoch"], session_log=SessionLog(status=SessionLog.START))
                events[:0] = [Event(file_version="brain.Event:2"), start]
            content = io.BytesIO()
            for event in events:
                RecordWriter(content).write(event.SerializeToString())
            if file.write(content.getbuffer()) != content.tell():
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self.written = len(rows)


def scalars(row: dict[str, Any]) -> list[Summary.Value]:
    """The numbers of an epoch, in groups by the first part of their name."""
    return [
        Summary.Value(tag=name.replace("_", "/", 1), simple_value=value)
        for name, value in row.items()
        if isinstance(value, float)
    ]


def format_value(value: Any) -> str:
    """Seven significant digits, so that a row reads well and still repeats exactly."""
    return f"{value:.7g}" if isinstance(value, float) else "" if value is None else str(value)


def git_commit() -> str | None:
    """The commit this code is at, with a + if files differ from it; None outside a checkout."""
    try:
        here = Path(__file__).parent
        command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first epoch with the highest accuracy on the validation set, or on the test set where there is none."""
    name = "test_top1" if rows[-1]["valid_top1"] is None else "valid_top1"
    return max(rows, key=lambda row: -1.0 if row[name] is None else row[name])


def final_accuracy(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Median of the last ten epochs' test accuracy, and the larger distance from it to their extremes, in %."""
    last = [row["test_top1"] for row in rows[-10:]]
    median = float(np.median(last))
    return median, max(max(last) - median, median - min(last))


def line_of_epoch(epoch: int, epochs: int, rate: float, best: float, seconds_left: float) -> str:
    """The published line that opens an epoch."""
    need = time.strftime("%H:%M:%S", time.gmtime(seconds_left % 86400))
    days = f"{int(seconds_left // 86400)}d " if seconds_left >= 86400 else ""
    return (
        f"\n==>>{time.strftime('[%Y-%m-%d-%H:%M:%S]')} [Epoch={epoch:03d}/{epochs:03d}] [Need: {days}{need}] "
        f"[learning_rate={rate:6.4f}] [Best : Accuracy={best:.2f}, Error={100 - best:.2f}]"
    )


def line_of_scores(name: str, scores: dict[str, float], prefix: str) -> str:
    """The published line of a training or test pass: top-1, top-5, error, and the loss."""
    top1, top5, loss = (scores[f"{prefix}_{key}"] for key in ("top1", "top5", "loss"))
    return f"  **{name}** Prec@1 {top1:.3f} Prec@5 {top5:.3f} Error@1 {100 - top1:.3f} Loss: {loss:.4f}"
