"""Every picture: of a run, of an evaluation, of a table of runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib import rc_context, rcdefaults, rcParams
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from scipy import stats

from mixup import METHODS
from mixup.base import Method, Mixed

from .files import atomic_write
from .run import best_row, log

MIXED, MIXED_LAST = "mixed.png", "mixed_last.png"
PAIRS = 6  # shown in them
# After Okabe and Ito, distinct to colour-blind readers too, in the order of the registry; yellow is darkened.
PALETTE = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#8C6D1F", "#0072B2", "#CC79A7", "#D55E00")
SPLITS = {"train": "#0072B2", "valid": "#009E73", "test": "#D55E00"}
THREE = ("#0072B2", "#E69F00", "#009E73")  # of them, for pictures that do not show methods
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")


# What every picture has in common. Names of classes and settings are text, not formulas.
STYLE: Any = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "figure.constrained_layout.use": True,
    "figure.dpi": 120, "grid.alpha": 0.25, "legend.frameon": False, "text.parse_math": False,
}  # fmt: skip


def attempt(draw: Callable[..., None], *args: Any) -> None:
    """Draw a picture in this style, whatever the user's matplotlibrc says. Whatever goes wrong is one warning: no
    picture is worth a run."""
    try:
        with rc_context(), warnings.catch_warnings():
            rcdefaults()
            rcParams.update(STYLE)
            warnings.simplefilter("ignore")  # glyphs that the font lacks
            draw(*args)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        log.warning(f"warning: {args[0]} is not drawn: {reason}")


def plot_curves(
    path: Path, rows: Sequence[dict[str, Any]], title: str, schedule: Sequence[int], mixes: bool = True
) -> None:
    """Loss and accuracy against the epoch, with the epochs at which the learning rate changes. ``mixes``: whether the
    method mixes the training images."""
    figure = Figure(figsize=(11, 4.2))
    epochs = [row["epoch"] for row in rows]
    loss, accuracy = panels = figure.subplots(1, 2)
    reached = [milestone for milestone in schedule if milestone <= epochs[-1]]
    for panel, quantity in zip(panels, ("loss", "top1"), strict=True):
        for name, style in (("train", "--"), ("valid", "-"), ("test", "-")):
            values = [row[f"{name}_{quantity}"] for row in rows]
            if values[-1] is not None:
                label = "train (mixed images)" if name == "train" and mixes else name
                marker = "o" if len(rows) < 3 else None
                panel.plot(epochs, values, style, color=SPLITS[name], label=label, linewidth=1.6, marker=marker)
        for milestone in reached:
            panel.axvline(milestone, color="0.75", linewidth=1, zorder=0)
        panel.xaxis.set_major_locator(whole_numbers())
        panel.set_xlabel("epoch (grey lines: the learning rate changes)" if reached else "epoch")
        panel.grid()
    loss.set(ylabel="loss", title="train: binary cross-entropy; test: cross-entropy", yscale="log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(NullFormatter())
    best, last = best_row(rows), rows[-1]["test_top1"]
    scores = f"test: last {last:.2f}%, best {best['test_top1']:.2f}% in epoch {best['epoch']}"
    accuracy.set(ylabel="top-1 accuracy [%]", title=scores)
    figure.suptitle(title)
    accuracy.legend()
    save(figure, path)


def whole_numbers() -> MaxNLocator:
    """Ticks of an axis of epochs, of which there may be one alone."""
    return MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


class MixedImages:
    """mixed.png and mixed_last.png: a pair of each of the first six batches of the first epoch, and of the last.

    What the folder lacks is plotted from the first batches of this start. Numbers of the training are not touched.
    """

    def __init__(self, folder: Path | None, data: Any, method: Method, epochs: int) -> None:
        self.folder, self.data, self.method, self.epochs = folder, data, method, epochs
        self.epoch = -1
        self.path: Path | None = None  # of the picture that this epoch is for
        self.pairs: list[dict[str, Any]] = []

    def collect(self, epoch: int, mixed: Mixed, images: torch.Tensor, draws: Any) -> None:
        """Keep a pair of this batch, and draw the picture once there are enough."""
        if epoch != self.epoch:
            self.draw()
            self.epoch = epoch
            if self.folder is not None:
                name = MIXED_LAST if (self.folder / MIXED).exists() else MIXED
                wanted = name == MIXED or epoch == self.epochs - 1
                self.path = self.folder / name if wanted and not (self.folder / name).exists() else None
        plain = self.method.name == "vanilla"
        if self.path is None or (mixed.partner is mixed.mask is None and not plain):  # this batch stayed as it was
            return
        saliency_a, saliency_b = mixed.saliency or (None, None)
        named = {
            "image a": images, "image b": mixed.partner, "saliency a": saliency_a, "saliency b": saliency_b,
            "mask (white: a)": mixed.mask, "mixed": None if plain else mixed.images, "target": mixed.targets,
        }  # fmt: skip
        one = -1 - len(self.pairs) % len(images)  # where a part of a batch is mixed, that is its end
        pair = {name: value[one].detach().float().clone() for name, value in named.items() if value is not None}
        self.pairs.append({**pair, "lam": getattr(draws, "lam", None)})
        if len(self.pairs) == PAIRS:
            self.draw()

    def draw(self) -> None:
        """The picture of the pairs so far, such as all of an epoch of fewer batches."""
        if self.path is not None and self.pairs:
            attempt(plot_mixed, self.path, self.pairs, self.data, f"{self.method.title}, epoch {self.epoch}")
        self.path, self.pairs = None, []


def plot_mixed(path: Path, pairs: Sequence[dict[str, Any]], data: Any, title: str) -> None:
    """A pair a row: both images, both saliency maps, the mask, the mixed image; below, λ and the target's shares."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    styles: dict[str, dict[str, Any]] = {
        "image a": {}, "image b": {}, "saliency a": {"cmap": "magma"}, "saliency b": {"cmap": "magma"},
        "mask (white: a)": {"cmap": "gray", "vmin": 0, "vmax": 1}, "mixed": {},
    }  # fmt: skip
    names = [name for name in styles if name in pairs[0]]
    height, width = pairs[0]["image a"].shape[1:]
    size = 1.6 * len(names), len(pairs) * (1.6 * height / width + 0.2) + 0.5
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.1))  # room for a line of text
    panels = figure.subplots(len(pairs), len(names), squeeze=False)
    for pair, row in zip(pairs, panels, strict=True):
        for name, panel in zip(names, row, strict=True):
            picture = pair[name].cpu()
            if picture.ndim == 3:
                picture = (picture * std + mean).clamp(0, 1).permute(1, 2, 0)
            panel.imshow(picture.numpy(), **styles[name])
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(True)
        shares = sorted(((float(v), data.classes[k]) for k, v in enumerate(pair["target"]) if v > 0.005), reverse=True)
        text = " + ".join(f"{100 * value:.0f}% {label}" for value, label in shares[:3])
        text = text if pair["lam"] is None else f"λ = {float(pair['lam']):.2f}: {text}"
        style: dict[str, Any] = {"ha": "right", "va": "top", "fontsize": 9, "in_layout": False}
        row[-1].text(1, -0.03, text, transform=row[-1].transAxes, **style)
    for name, panel in zip(names, panels[0], strict=True):
        panel.set_title(name if len(names) > 1 else "image", fontsize=11)
    figure.suptitle(title)
    save(figure, path)


def plot_dots(path: Path, frame: pd.DataFrame) -> None:
    """Final accuracy of each seed, a row a method in the order of their means, with means and their 95% intervals.

    Args:
        frame: a run a row, of one setting; the columns label, method, seed, final, curve (accuracy by epoch),
            seconds_per_epoch.
    """
    styles = _styles(frame)
    means = frame.groupby("label")["final"].mean().sort_values(kind="stable")
    figure, panel = one_panel(7.2, 0.9 + 0.36 * len(means), dpi=150)
    for row, (label, mean) in enumerate(means.items()):
        finals, colour = frame["final"][frame["label"] == label], styles[label]["color"]
        panel.scatter(finals, [row - 0.13] * len(finals), s=26, color=colour, alpha=0.55, linewidth=0)
        if len(finals) > 1:
            half = stats.t.ppf(0.975, len(finals) - 1) * stats.sem(finals)
            bar: dict[str, Any] = {"fmt": "|", "markersize": 11, "markeredgewidth": 2, "capsize": 3}
            panel.errorbar(mean, row + 0.13, xerr=half, color=colour, **bar)
    plain = means[_plain(frame)]
    for mean in plain:
        panel.axvline(mean, color=PALETTE[0], linewidth=0.8, linestyle=":", zorder=0)
    panel.set_yticks(range(len(means)), _counted(frame, means.index))
    marks = f"seeds{_same_count(frame)}" + (", mean and 95% interval" if len(frame) > len(means) else "")
    panel.set_xlabel(f"test accuracy [%]: {marks}" + ("; dotted: plain training" if len(plain) else ""))
    panel.grid(axis="x")
    save(figure, path)


def plot_learning_curves(path: Path, frame: pd.DataFrame) -> None:
    """Mean accuracy by epoch of the same frame; beside it the last quarter, with the standard deviation of plain
    training and of the method that ends highest."""
    styles = _styles(frame)
    order = frame.groupby("label")["final"].mean().sort_values(ascending=False, kind="stable").index
    figure = Figure(figsize=(9.6, 4.2), dpi=150)
    whole, end = figure.subplots(1, 2)
    for label, text in zip(order, _counted(frame, order), strict=True):
        curves = np.array(frame["curve"][frame["label"] == label].tolist())
        mean, epochs = curves.mean(axis=0), np.arange(1, curves.shape[1] + 1)
        last = slice(-max(1, len(epochs) // 4), None)
        whole.plot(epochs, mean, label=text, linewidth=1.1, **styles[label])
        outstanding = label in (order[0], *_plain(frame))
        end.plot(epochs[last], mean[last], linewidth=2 if outstanding else 1, **styles[label])
        if len(curves) > 1 and outstanding:
            low, high = (mean + sign * curves.std(axis=0, ddof=1) for sign in (-1, 1))
            end.fill_between(epochs[last], low[last], high[last], color=styles[label]["color"], alpha=0.15, linewidth=0)
    whole.legend(fontsize=9, loc="lower right")
    several = len(frame) > len(order)
    whole.set_ylabel("test accuracy [%]" + (f", mean{_same_count(frame)}" if several else _same_count(frame)))
    end.set_title("last quarter" + ("; bands: ± standard deviation" if end.collections else ""), fontsize=10)
    for panel in (whole, end):
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(whole_numbers())
        panel.grid()
    save(figure, path)


def plot_cost(path: Path, frame: pd.DataFrame) -> None:
    """Final accuracy of the same frame against the time of an epoch: of plain training, where that was measured."""
    styles = _styles(frame)
    times = frame.groupby("label", sort=False)["seconds_per_epoch"].mean().dropna()
    plain = times[times.index.isin(_plain(frame))]
    times = times / plain.iloc[0] if len(plain) else times
    figure, panel = one_panel(6.4, 4.2, dpi=150)
    for label, time in times.items():
        of_label = frame[frame["label"] == label]
        spread = of_label["final"].std() if len(of_label) > 1 else None
        style = {"color": styles[label]["color"], "fillstyle": "full" if styles[label]["linestyle"] == "-" else "none"}
        marker = MARKERS[list(METHODS).index(of_label["method"].iloc[0]) % len(MARKERS)]
        mean = of_label["final"].mean()
        panel.errorbar(time, mean, spread, fmt=marker, markersize=7, capsize=3, label=label, **style)
    panel.set_xlabel("time of an epoch" + (", plain training = 1" if len(plain) else " [s]"))
    several = len(frame) > frame["label"].nunique()
    panel.set_ylabel("test accuracy [%]" + (", mean ± standard deviation" if several else ""))
    panel.legend(fontsize=9)
    panel.grid()
    save(figure, path)


def _styles(frame: pd.DataFrame) -> dict[Any, dict[str, Any]]:
    """Colour of the method, and a line of its own for each of the method's settings."""
    found: dict[Any, dict[str, Any]] = {}
    for method, labels in frame.groupby("method", sort=False)["label"].unique().items():
        colour = PALETTE[list(METHODS).index(str(method)) % len(PALETTE)]
        for label, line in zip(labels, cycle(LINES), strict=False):
            found[label] = {"color": colour, "linestyle": line}
    return found


def _plain(frame: pd.DataFrame) -> list[Any]:
    """The labels of plain training."""
    return frame["label"][frame["method"] == "vanilla"].unique().tolist()


def _same_count(frame: pd.DataFrame) -> str:
    """The number of seeds, if all methods have the same."""
    counts = frame["label"].value_counts().unique()
    return f" (n = {counts[0]})" if len(counts) == 1 else ""


def _counted(frame: pd.DataFrame, labels: Iterable[Any]) -> list[str]:
    """Names of the methods, with their numbers of seeds where these differ."""
    counts = frame["label"].value_counts()
    return [label if counts.nunique() == 1 else f"{label}, n = {counts[label]}" for label in labels]


# ---------------------------------------------------------------------------------------------------- of an evaluation


def plot_confusion(path: Path, confusion: np.ndarray, classes: Sequence[str], title: str, top1: float) -> None:
    """Shares of each true class, in %, with numbers and names where they fit; ``confusion`` [K, K] counts images, a row
    a true class."""
    shares = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    few = len(classes) <= 20
    figure, panel = one_panel(7, 6.2, f"{title}\ntop-1 {top1:.2f}%")
    panel.spines[:].set_visible(True)
    scale = PowerNorm(1 if few else 0.4, 0, 100)  # of many classes, confusions would not be seen
    image = panel.imshow(shares, cmap="Blues", norm=scale)
    if few:
        panel.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        panel.set_yticks(range(len(classes)), classes)
        _write_numbers(panel, shares, 50, 9 if len(classes) <= 12 else 6)
    panel.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(image, label="share of the true class [%]", shrink=0.8)
    save(figure, path)


def plot_reliability(
    path: Path, bins: Sequence[tuple[int, float, float]], ece: float, confidence: float, top1: float, title: str
) -> None:
    """Accuracy of each bin of confidence (images, accuracy, mean confidence, the latter in [0, 1]) next to its
    confidence, over the number of images in it; ``ece``, ``confidence`` and ``top1`` are in %."""
    count, accuracy, sure = np.nan_to_num(np.array(bins)).T
    lefts, gap = np.linspace(0, 1, len(bins) + 1)[:-1], sure - accuracy
    style: dict[str, Any] = {"width": 1 / len(bins), "align": "edge", "edgecolor": "white", "linewidth": 0.5}
    figure = Figure(figsize=(7, 5.6))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.bar(lefts, accuracy, color=PALETTE[5], label="accuracy", **style)
    for part, bottom, colour, label in (
        (gap, accuracy, PALETTE[1], "overconfident by"),
        (-gap, sure, PALETTE[2], "underconfident by"),
    ):
        if (part > 0).any():
            above.bar(lefts, part.clip(0), bottom=bottom, color=colour, label=label, **style)
    above.plot([0, 1], [0, 1], "--", color="0.4", linewidth=1, label="calibrated")
    above.set_ylabel("accuracy")
    above.set_title(f"{title}\nexpected calibration error {ece:.2f}%", fontsize=9)
    above.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=9)
    below.bar(lefts, 100 * count / count.sum(), color="0.6", **style)
    below.axvline(confidence / 100, color=PALETTE[7], linewidth=1.2, label=f"mean confidence {confidence:.1f}%")
    below.axvline(top1 / 100, color=PALETTE[5], linewidth=1.2, linestyle="--", label=f"accuracy {top1:.1f}%")
    below.set(xlabel="confidence", ylabel="images [%]", xlim=(0, 1))
    below.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=9)
    save(figure, path)


def plot_corruptions(path: Path, errors: dict[str, list[float]], title: str) -> None:
    """Errors in % as a table in colours: a row a corruption, a column a severity, and their mean."""
    values = np.array([[*row, np.mean(row)] for row in errors.values()])
    severities = values.shape[1] - 1
    figure, panel = one_panel(5.6, 1.4 + 0.32 * len(values), title)
    panel.imshow(values, cmap="Reds", vmin=0, vmax=100, aspect="auto")
    _write_numbers(panel, values, 60, 9)
    panel.axvline(severities - 0.5, color="white", linewidth=4)
    panel.set_xticks(range(severities + 1), [*map(str, range(1, severities + 1)), "mean"])
    panel.set_yticks(range(len(values)), [name.replace("_", " ") for name in errors])
    panel.set_xlabel("severity")
    save(figure, path)


def plot_corrupted_images(path: Path, shown: dict[str, list[torch.Tensor]], title: str) -> None:
    """One image, uint8 [3, H, W], under every corruption, severities downwards; below the clean image where the lists
    begin with it."""
    gap = max(1, min(next(iter(shown.values()))[0].shape[1:]) // 32)
    columns = [[F.pad(image, (gap,) * 4, value=255) for image in images] for images in shown.values()]
    mosaic = torch.cat([torch.cat(column, dim=1) for column in columns], dim=2).permute(1, 2, 0).numpy()
    rows, (height, width) = len(columns[0]), columns[0][0].shape[1:]
    size = max(8.0, 0.8 * len(shown))  # can be read at the width of a page
    figure = Figure(figsize=(0.8 * len(shown), 0.8 * rows * height / width))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.imshow(mosaic, interpolation="nearest", aspect="auto")
    names = [name.replace("_", " ") for name in shown]
    places = width * (np.arange(len(shown)) + 0.5) - 0.5
    panel.set_xticks(places, names, fontsize=size, rotation=90)
    severities = ["clean", "1", "2", "3", "4", "5"][-rows:]
    panel.set_yticks(height * (np.arange(rows) + 0.5) - 0.5, severities, fontsize=size)
    panel.set_ylabel("severity", fontsize=size)
    panel.set_title(title, fontsize=size)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    save(figure, path, bbox_inches="tight")  # a layout engine would cut long names


def plot_attacks(path: Path, clean: float, accuracies: dict[str, dict[float, float]], title: str) -> None:
    """Top-1 accuracy in % under attacks of each size (of 255), next to that of the same images without attack."""
    sizes = sorted({size for found in accuracies.values() for size in found})
    figure, panel = one_panel(2.2 + 1.1 * len(sizes), 3.6, title)
    width = 0.8 / len(accuracies)
    bars = [panel.bar(0, clean, 0.4, color="0.6")]
    for i, (label, found) in enumerate(accuracies.items()):
        places = [1 + sizes.index(size) + (i - (len(accuracies) - 1) / 2) * width for size in found]
        colour = PALETTE[(5, 7, 3, 6)[i % 4]]
        bars.append(panel.bar(places, list(found.values()), 0.9 * width, label=label, color=colour))
    for group in bars:
        panel.bar_label(group, fmt="%.1f", fontsize=8, padding=2)
    panel.set_xticks(range(len(sizes) + 1), ["clean", *(f"{size:g}/255" for size in sizes)])
    panel.set(ylim=(0, 108), xlabel="largest change of a pixel", ylabel="top-1 accuracy [%]")
    figure.legend(loc="outside lower center", ncols=len(accuracies), fontsize=8)
    save(figure, path)


def plot_shifts(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Top-1 accuracy in % on other test sets (``name``, ``images``, ``top1``, ``own_top1``, ``ece`` or None), each next
    to that on the same classes of the in-distribution test set."""
    figure, panel = one_panel(2.4 + 1.3 * len(rows), 3.8, title)
    for offset, key, colour, label in (
        (-0.2, "own_top1", "0.6", "in-distribution test set"),
        (0.2, "top1", PALETTE[5], "this test set"),
    ):
        bars = panel.bar(np.arange(len(rows)) + offset, [row[key] for row in rows], 0.38, color=colour, label=label)
        panel.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    names = [f"{row['name']}\n{row['images']:,} images" for row in rows]
    names = [n if row["ece"] is None else f"{n}\nECE {row['ece']:.1f}%" for n, row in zip(names, rows, strict=True)]
    panel.set_xticks(range(len(rows)), names, fontsize=8)
    panel.set(ylim=(0, 108), ylabel="top-1 accuracy [%]")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    save(figure, path)


def one_panel(width: float, height: float, title: str = "", dpi: int = 120) -> tuple[Figure, Any]:
    """A figure of one panel."""
    figure = Figure(figsize=(width, height), dpi=dpi)
    panel = figure.subplots()
    panel.set_title(title)
    return figure, panel


def _write_numbers(panel: Any, values: np.ndarray, dark: float, size: float) -> None:
    """Whole numbers into the cells of a picture; white where the cell is dark. Zero stays empty."""
    for (row, column), value in np.ndenumerate(values):
        if value > 0.5:
            colour = "white" if value > dark else "black"
            panel.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=size, color=colour)


def save(figure: Figure, path: Path, **how: Any) -> None:
    """A PNG or PDF, by its name; without a date, so that it is the same each time."""
    kind = path.suffix.removeprefix(".")
    with atomic_write(path) as file:
        figure.savefig(file, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None, **how)
