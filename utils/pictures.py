"""Pictures of a run: its curves, and mixed images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from mixup.base import Mixed

from .files import atomic_write
from .records import best_row


def plot_curves(
    path: Path, rows: Sequence[dict[str, Any]], title: str, schedule: Sequence[int], mixes: bool = True
) -> None:
    """Loss and accuracy against the epoch, with the epochs at which the learning rate changes. ``mixes``: whether the
    method mixes the training images."""
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
                label = "train (mixed images)" if name == "train" and mixes else name
                panel.plot(epochs, values, style, color=colour, label=label, linewidth=1.6, marker=marker)
        for milestone in schedule:
            if milestone <= epochs[-1]:
                panel.axvline(milestone, color="0.75", linewidth=1, zorder=0)
        panel.xaxis.set_major_locator(whole_numbers())
        panel.set_xlabel("epoch (grey lines: the learning rate changes)")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss")
    panels[0].set_title("train: binary cross-entropy; test: cross-entropy")
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    panels[1].set_ylabel("top-1 accuracy [%]")
    best = best_row(rows)
    panels[1].set_title(
        f"test: last {rows[-1]['test_top1']:.2f} %, best {best['test_top1']:.2f} % in epoch {best['epoch']}"
    )
    figure.suptitle(title, parse_math=False)
    panels[1].legend(frameon=False)
    _save(figure, path)


def whole_numbers() -> MaxNLocator:
    """Ticks of an axis of epochs, of which there may be one alone."""
    return MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


def plot_mixed(path: Path, mixed: Mixed, images: torch.Tensor, data: Any, title: str, pairs: int = 6) -> None:
    """The first pairs of a batch: both images, both saliency maps, the mask, the mixed image, the target's shares."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    count = min(pairs, len(images))

    def pixels(batch: torch.Tensor | None) -> list[np.ndarray] | None:
        if batch is None:
            return None
        return [(image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy() for image in batch[:count].detach().cpu()]

    def maps(batch: torch.Tensor | None) -> list[np.ndarray] | None:
        return None if batch is None else list(batch[:count].detach().float().cpu().numpy())

    saliency_a, saliency_b = mixed.saliency or (None, None)
    columns: list[tuple[str, list[np.ndarray] | None, dict[str, Any]]] = [
        ("image a", pixels(images), {}),
        ("image b", pixels(mixed.partner), {}),
        ("saliency a", maps(saliency_a), {"cmap": "magma"}),
        ("saliency b", maps(saliency_b), {"cmap": "magma"}),
        ("mask (white: a)", maps(mixed.mask), {"cmap": "gray", "vmin": 0, "vmax": 1}),
        ("mixed", pixels(mixed.images), {}),
    ]
    texts = []
    if mixed.targets is not None:
        for target in mixed.targets[:count].detach().float().cpu():
            shares = sorted(((float(v), data.classes[k]) for k, v in enumerate(target) if v > 0.005), reverse=True)
            texts.append(" + ".join(f"{100 * value:.0f} % {label}" for value, label in shares[:3]))
    figure = _mosaic([(name, content, style) for name, content, style in columns if content is not None], texts)
    figure.suptitle(title, parse_math=False)
    _save(figure, path)


def _mosaic(columns: Sequence[tuple[str, list[np.ndarray], dict[str, Any]]], texts: Sequence[str]) -> Figure:
    """Pictures of one size, in columns with a name, and a text below each row.

    All in one panel: to lay out one for each picture takes matplotlib about a second in all.
    """
    first = columns[0][1]
    rows, high, gap = len(first), first[0].shape[0] / first[0].shape[1], 0.06  # in widths of a picture
    step, right = high + 0.2, len(columns) * (1 + gap) - gap
    figure = Figure(figsize=(1.6 * len(columns), 1.6 * (rows * step + 0.15)), layout="constrained")
    panel = figure.subplots()
    for column, (name, content, style) in enumerate(columns):
        left = column * (1 + gap)
        panel.text(left + 0.5, -gap, name, fontsize=11, horizontalalignment="center")
        for row, picture in enumerate(content):
            panel.imshow(picture, extent=(left, left + 1, row * step + high, row * step), **style)
            panel.add_patch(Rectangle((left, row * step), 1, high, fill=False, linewidth=0.8))
    for row, text in enumerate(texts):
        panel.text(
            right, row * step + high + 0.03, text, fontsize=9, parse_math=False,
            horizontalalignment="right", verticalalignment="top", in_layout=False,
        )  # fmt: skip
    panel.set(xlim=(-0.01, right + 0.01), ylim=(rows * step, -0.01))
    panel.set_axis_off()
    return figure


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file)
