"""What a run leaves behind: its folder, log, metrics, configuration, pictures and TensorBoard events."""

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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from mixup.base import Step

from .files import atomic_write

log = logging.getLogger("sage")

# The last three are measurements; everything before them is repeated exactly by the same command.
COLUMNS = (
    "epoch", "learning_rate", "train_loss", "train_top1", "train_top5", "valid_loss", "valid_top1", "valid_top5",
    "test_loss", "test_top1", "test_top5", "best_top1", "seconds", "images_per_second", "peak_memory_gb",
)  # fmt: skip


def start_log(path: Path | None, quiet: bool = False) -> None:
    """Lines to the terminal, unless ``quiet``, and, appended, to ``path``. A full disk costs lines of the log, not the
    run."""
    logging.raiseExceptions = False
    log.handlers.clear()
    log.setLevel(logging.CRITICAL if quiet else logging.INFO)
    log.propagate = False
    screen = logging.StreamHandler(sys.stdout)
    log.addHandler(screen)
    if path is not None:
        log.addHandler(logging.FileHandler(path, encoding="utf-8"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """``content`` as readable JSON, whole or not at all."""
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path) -> dict[str, Any]:
    """A file that ``write_json`` wrote; ``ValueError`` where it is damaged."""
    return json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))


def write_metrics(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A row an epoch."""
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: format_value(value) for key, value in row.items()} for row in rows)


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


def final_accuracy(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Median of the last ten epochs' test accuracy, and the larger distance from it to their extremes, in %."""
    last = [row["test_top1"] for row in rows[-10:]]
    median = float(np.median(last))
    return median, max(max(last) - median, median - min(last))


def draw_curves(path: Path, rows: Sequence[dict[str, Any]], title: str, schedule: Sequence[int]) -> None:
    """Loss and accuracy against the epoch, with the epochs at which the learning rate changes."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    marker = "o" if len(rows) < 3 else None
    panels = figure.subplots(1, 2)
    series: tuple[tuple[str, str, str], ...] = (
        ("train", "tab:blue", "--"),
        ("valid", "tab:green", "-"),
        ("test", "tab:orange", "-"),
    )
    for panel, quantity in zip(panels, ("loss", "top1"), strict=True):
        for name, colour, style in series:
            values = [row[f"{name}_{quantity}"] for row in rows]
            if values[-1] is not None:
                label = f"{name} (mixed images)" if name == "train" else name
                panel.plot(epochs, values, style, color=colour, label=label, linewidth=1.6, marker=marker)
        for milestone in schedule:
            if milestone <= epochs[-1]:
                panel.axvline(milestone, color="0.75", linewidth=1, zorder=0)
        panel.set_xlabel("epoch (grey lines: the learning rate changes)")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss")
    panels[0].set_title("train: binary cross-entropy; test: cross-entropy")
    panels[0].set_yscale("log")
    panels[1].set_ylabel("top-1 accuracy [%]")
    best = max(rows, key=lambda row: row["test_top1"])
    panels[1].set_title(
        f"test: last {rows[-1]['test_top1']:.2f} %, best {best['test_top1']:.2f} % in epoch {best['epoch']}"
    )
    figure.suptitle(title, parse_math=False)
    panels[1].legend(frameon=False)
    _save(figure, path)


def draw_mixed(path: Path, step: Step, images: torch.Tensor, data: Any, pairs: int = 6) -> None:
    """The first pairs of a batch: both images, both saliency maps, the mask, the mixed image, the target's shares."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    count = min(pairs, len(images))

    def pixels(batch: torch.Tensor | None) -> list[np.ndarray] | None:
        if batch is None:
            return None
        return [(image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy() for image in batch[:count].detach().cpu()]

    def maps(batch: torch.Tensor | None) -> list[np.ndarray] | None:
        return None if batch is None else list(batch[:count].detach().float().cpu().numpy())

    saliency_a, saliency_b = step.saliency or (None, None)
    columns: list[tuple[str, list[np.ndarray] | None, dict[str, Any]]] = [
        ("image a", pixels(images), {}),
        ("image b", pixels(step.partner), {}),
        ("saliency a", maps(saliency_a), {"cmap": "magma"}),
        ("saliency b", maps(saliency_b), {"cmap": "magma"}),
        ("mask (white: a)", maps(step.mask), {"cmap": "gray", "vmin": 0, "vmax": 1}),
        ("mixed", pixels(step.mixed), {}),
    ]
    shown = [(title, content, style) for title, content, style in columns if content is not None]
    figure = Figure(figsize=(1.6 * len(shown), 1.85 * count), layout="constrained")
    axes = figure.subplots(count, len(shown), squeeze=False)
    for column, (title, content, style) in enumerate(shown):
        for row, picture in enumerate(content):
            axes[row, column].imshow(picture, **style)
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
        axes[0, column].set_title(title, fontsize=11)
    if step.targets is not None:
        for row, target in enumerate(step.targets[:count].detach().float().cpu()):
            shares = sorted(((float(v), data.classes[k]) for k, v in enumerate(target) if v > 0.005), reverse=True)
            text = " + ".join(f"{100 * value:.0f} % {name}" for value, name in shares[:3])
            axes[row, -1].set_xlabel(text, fontsize=9, loc="right", parse_math=False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file, pil_kwargs={"optimize": True})


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
