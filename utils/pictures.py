"""Every picture: of a run, of an evaluation, of a table of runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps, rc_context, rcdefaults, rcParams
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from scipy import stats

from mixup import METHODS
from mixup.base import Method, Mixed

from .files import atomic_write
from .run import best_row, log

MIXED, MIXED_LAST = "mixed.png", "mixed_last.png"
PAIRS = 6  # shown in them
# After Okabe and Ito, distinct to colour-blind readers too, in the order of the registry; yellow is darkened.
PALETTE = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#8C6D1F", "#0072B2", "#CC79A7", "#D55E00")
BLUE, GREEN, RED, GREY = PALETTE[5], PALETTE[3], PALETTE[7], "0.6"
THREE = (BLUE, "#E69F00", GREEN)  # for pictures that do not show methods
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
STYLE: dict[Any, Any] = {
    "figure.dpi": 150, "font.size": 9, "axes.titlesize": "medium", "grid.alpha": 0.25, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False,  # names are no formulas
}  # fmt: skip


def use_style() -> None:
    """From now on plot in this project's style, whatever the user's matplotlibrc says."""
    rcdefaults()
    rcParams.update(STYLE)


def attempt(draw: Callable[..., None], *args: Any) -> None:
    """Draw a picture in this project's style. Whatever goes wrong is one warning: no picture is worth a run."""
    try:
        with rc_context(), warnings.catch_warnings():
            use_style()
            warnings.simplefilter("ignore")  # glyphs that the font lacks
            draw(*args)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        log.warning(f"warning: {args[0]} is not drawn: {reason}")


def save(figure: Figure, path: Path, **how: Any) -> None:
    """A PNG or PDF, by its name; without a date, so that it is the same each time."""
    kind = path.suffix.removeprefix(".")
    with atomic_write(path) as file:
        figure.savefig(file, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None, **how)


def one_panel(width: float, height: float, title: str = "") -> tuple[Figure, Any]:
    """A figure of one panel, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panel = figure.subplots()
    panel.set_title(title)
    return figure, panel


def plot_curves(
    path: Path, rows: Sequence[dict[str, Any]], title: str, schedule: Sequence[int], mixes: bool = True
) -> None:
    """Loss and accuracy against the epoch, with the epochs at which the learning rate changes. ``mixes``: whether the
    method mixes the training images."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    reached = [milestone for milestone in schedule if milestone <= epochs[-1]]
    for panel, quantity in ((loss, "loss"), (accuracy, "top1")):
        for name, colour, line in (("train", BLUE, "--"), ("valid", GREEN, "-"), ("test", RED, "-")):
            values = [row[f"{name}_{quantity}"] for row in rows]
            if values[-1] is not None:
                label = "train (mixed images)" if name == "train" and mixes else name
                marker = "o" if len(rows) < 3 else None
                panel.plot(epochs, values, line, color=colour, label=label, marker=marker)
        for milestone in reached:
            panel.axvline(milestone, color="0.75", linewidth=1, zorder=0)
        panel.set_xlabel("epoch (grey lines: the learning rate changes)" if reached else "epoch")
        panel.locator_params("x", integer=True, min_n_ticks=1)
        panel.grid()
    loss.set(ylabel="loss", yscale="log", title="train: binary cross-entropy; test: cross-entropy")
    loss.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
    best, last = best_row(rows), rows[-1]["test_top1"]
    accuracy.set_title(f"test: last {last:.2f}%, best {best['test_top1']:.2f}% in epoch {best['epoch']}")
    accuracy.set_ylabel("top-1 accuracy [%]")
    accuracy.legend()
    figure.suptitle(title)
    save(figure, path)


class MixedImages:
    """mixed.png and mixed_last.png: a pair of each of the first six batches of the first epoch, and of the last; or, in
    a run that was stopped, of this start's first batches of that epoch. No number of the training is touched."""

    def __init__(self, folder: Path | None, data: Any, method: Method, epochs: int) -> None:
        self.folder, self.data, self.method, self.epochs = folder, data, method, epochs
        self.epoch = -1
        self.path: Path | None = None  # of the picture that pairs are collected for
        self.columns: dict[str, list[torch.Tensor]] = {}
        self.texts: list[str] = []

    def collect(self, epoch: int, mixed: Mixed, images: torch.Tensor, draws: Any) -> None:
        """Keep a pair of this batch, with λ and the target's shares; draw the picture once there are enough."""
        if epoch != self.epoch:
            names = (MIXED, MIXED_LAST) if epoch == self.epochs - 1 else (MIXED,)
            paths = [self.folder / name for name in names] if self.folder else []
            self.epoch, self.path = epoch, next((path for path in paths if not path.exists()), None)
        plain = self.method.name == "vanilla"
        if self.path is None or (mixed.partner is mixed.mask is None and not plain):  # this batch stayed as it was
            return
        one = -1 - len(self.texts) % len(images)  # where a part of a batch is mixed, that is its end
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.data.mean, self.data.std))
        saliency_a, saliency_b = mixed.saliency or (None, None)
        for name, batch in {
            "image a": images, "image b": mixed.partner, "saliency a": saliency_a, "saliency b": saliency_b,
            "mask (white: a)": mixed.mask, "mixed": None if plain else mixed.images,
        }.items():  # fmt: skip
            if batch is not None:
                image = batch[one].detach().float().cpu()
                image = image * std + mean if image.ndim == 3 else image
                image = image.expand(3, -1, -1) if batch is mixed.mask else image
                self.columns.setdefault(name, []).append(image)
        shares = sorted(zip(mixed.targets[one].tolist(), self.data.classes, strict=True), reverse=True)[:3]
        lines = [f"λ = {float(draws.lam):.2f}"] if hasattr(draws, "lam") else []
        self.texts.append("\n".join(lines + [f"{100 * share:.0f}% {name}" for share, name in shares if share > 0.005]))
        if len(self.texts) == PAIRS:
            self.draw()

    def draw(self) -> None:
        """The picture of the pairs so far: an epoch may have fewer batches."""
        if self.path is not None and self.texts:
            attempt(plot_images, self.path, self.columns, self.texts, f"{self.method.title}, epoch {self.epoch}")
        self.path, self.columns, self.texts = None, {}, []


def plot_images(path: Path, columns: dict[str, list[torch.Tensor]], texts: Sequence[str], title: str) -> None:
    """Images of one size, as for ``colours_of``, in columns of these names, with a text for each row."""
    pixels = np.array([[colours_of(image) for image in column] for column in columns.values()])
    gap = max(1, min(pixels.shape[2:4]) // 32)
    tiles = np.pad(pixels, ((0, 0), (0, 0), (gap, gap), (gap, gap), (0, 0)), constant_values=200)
    across, down, height, width, _ = tiles.shape
    inches = min(1.1, 8 / across)  # for names that can be read at the width of a page
    figure = Figure(figsize=(inches * across, inches * down * height / width))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.imshow(tiles.transpose(1, 2, 0, 3, 4).reshape(down * height, across * width, 3), aspect="auto")
    rotation = 90 if max(map(len, columns)) > 14 * inches else 0
    panel.set_xticks(width * (np.arange(across) + 0.5), list(columns), rotation=rotation)
    panel.set_yticks(height * (np.arange(down) + 0.5), texts)
    panel.tick_params(length=0, labelbottom=False, labeltop=True, labelleft=False, labelright=True)
    panel.spines[:].set_visible(False)
    panel.set_title(title)
    save(figure, path, bbox_inches="tight", dpi=200)  # a layout engine would cut images down for long names


def colours_of(image: torch.Tensor) -> np.ndarray:
    """Colours [3, H, W] in [0, 1] as they are, a map [H, W] from black (0) to yellow (its maximum): uint8 [H, W, 3]."""
    if image.ndim == 2:
        return colormaps["magma"]((image / image.max().clamp(min=1e-30)).numpy(), bytes=True)[..., :3]
    return (255 * image.clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0).numpy()


def plot_dots(path: Path, frame: pd.DataFrame) -> None:
    """Final accuracy of each seed, a row a method in the order of their means, with means and their 95% intervals.
    ``frame``: a run a row, of one setting, with label, method, final, curve (accuracy by epoch), seconds_per_epoch."""
    table = _by_label(frame)
    figure, panel = one_panel(7.2, 0.9 + 0.36 * len(table))
    for place, row in enumerate(table.itertuples()):
        finals = frame["final"][frame["label"] == row.Index]
        panel.scatter(finals, [place - 0.13] * len(finals), s=26, color=row.colour, alpha=0.55, linewidth=0)
        if row.seeds > 1:
            half = stats.t.ppf(0.975, row.seeds - 1) * row.spread / row.seeds**0.5
            bar: dict[str, Any] = {"fmt": "|", "markersize": 11, "markeredgewidth": 2, "capsize": 3}
            panel.errorbar(row.mean, place + 0.13, xerr=half, color=row.colour, **bar)
    for mean in table["mean"][table["method"] == "vanilla"]:
        panel.axvline(mean, color=PALETTE[0], linewidth=0.8, linestyle=":", zorder=0)
    panel.set_yticks(range(len(table)), table["text"])
    panel.set_xlabel("test accuracy [%]: seeds; mean and its 95% interval; dotted: plain training")
    panel.grid(axis="x")
    save(figure, path)


def plot_learning_curves(path: Path, frame: pd.DataFrame) -> None:
    """Mean accuracy by epoch of the same frame; beside it the last quarter, with the standard deviation of plain
    training and of the method that ends highest."""
    table = _by_label(frame)[::-1]
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    whole, end = figure.subplots(1, 2)
    for row in table.itertuples():
        curves = np.array(frame["curve"][frame["label"] == row.Index].tolist())
        mean, epochs = curves.mean(axis=0), np.arange(1, curves.shape[1] + 1)
        last = slice(-max(1, len(epochs) // 4), None)
        outstanding = row.Index == table.index[0] or row.method == "vanilla"
        whole.plot(epochs, mean, row.line, color=row.colour, label=row.text, linewidth=1.1)
        end.plot(epochs[last], mean[last], row.line, color=row.colour, linewidth=2 if outstanding else 1)
        if row.seeds > 1 and outstanding:
            spread = curves.std(axis=0, ddof=1)
            band = epochs[last], (mean - spread)[last], (mean + spread)[last]
            end.fill_between(*band, color=row.colour, alpha=0.15, linewidth=0)
    whole.legend(loc="lower right")
    whole.set_ylabel("test accuracy [%], mean over seeds")
    end.set_title("last quarter" + ("; bands: ± standard deviation" if end.collections else ""))
    for panel in (whole, end):
        panel.set_xlabel("epoch")
        panel.locator_params("x", integer=True, min_n_ticks=1)
        panel.grid()
    save(figure, path)


def plot_cost(path: Path, frame: pd.DataFrame) -> None:
    """Final accuracy of the same frame against the time of an epoch: of plain training, where that was measured."""
    table = _by_label(frame)[::-1].dropna(subset="time")
    plain = table["time"][table["method"] == "vanilla"]
    unit = plain.iloc[0] if len(plain) else 1
    figure, panel = one_panel(6.4, 4.2)
    for row in table.itertuples():
        fill = "full" if row.line == "-" else "none"
        style: dict[str, Any] = {"color": row.colour, "fillstyle": fill, "markersize": 7, "capsize": 3}
        panel.errorbar(row.time / unit, row.mean, row.spread, fmt=row.marker, label=row.text, **style)
    panel.set_xlabel("time of an epoch" + (", plain training = 1" if len(plain) else " [s]"))
    panel.set_ylabel("test accuracy [%], mean ± standard deviation")
    panel.legend()
    panel.grid()
    save(figure, path)


def _by_label(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a label, in the order of their means: its numbers, its text, its method's colour and marker, and a line for
    each of the method's settings."""
    table = frame.groupby("label", sort=False).agg(
        method=("method", "first"), seeds=("final", "size"), mean=("final", "mean"), spread=("final", "std"),
        time=("seconds_per_epoch", "mean"),
    )  # fmt: skip
    places = [list(METHODS).index(method) % len(PALETTE) for method in table["method"]]
    table["colour"], table["marker"] = [PALETTE[i] for i in places], [MARKERS[i] for i in places]
    table["line"] = [("-", "--", ":", "-.")[i % 4] for i in table.groupby("method").cumcount()]
    table["text"] = [f"{label}, n = {count}" for label, count in table["seeds"].items()]
    return table.sort_values("mean", kind="stable")


def plot_confusion(path: Path, confusion: np.ndarray, classes: Sequence[str], title: str, top1: float) -> None:
    """Shares of each true class in %, with text if it fits; ``confusion`` [K, K] counts images, a row a true class."""
    shares = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    few = len(classes) <= 20
    figure, panel = one_panel(7, 6.2, f"{title}\ntop-1 {top1:.2f}%")
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
    figure = Figure(figsize=(7, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.bar(lefts, accuracy, color=BLUE, label="accuracy", **style)
    above.bar(lefts, gap.clip(0), bottom=accuracy, color=PALETTE[1], label="overconfident by", **style)
    above.bar(lefts, (-gap).clip(0), bottom=sure, color=PALETTE[2], label="underconfident by", **style)
    above.plot([0, 1], [0, 1], "--", color="0.4", linewidth=1, label="calibrated")
    above.set(ylabel="accuracy", title=f"{title}\nexpected calibration error {ece:.2f}%")
    below.bar(lefts, 100 * count / count.sum(), color=GREY, **style)
    below.axvline(confidence / 100, color=RED, linewidth=1.2, label=f"mean confidence {confidence:.1f}%")
    below.axvline(top1 / 100, color=BLUE, linewidth=1.2, linestyle="--", label=f"accuracy {top1:.1f}%")
    below.set(xlabel="confidence", ylabel="images [%]", xlim=(0, 1))
    for panel in (above, below):
        panel.legend(loc="upper left", bbox_to_anchor=(1.02, 1))
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


def _write_numbers(panel: Any, values: np.ndarray, dark: float, size: float) -> None:
    """Whole numbers into the cells of a picture; white where the cell is dark. Zero stays empty."""
    for (row, column), value in np.ndenumerate(values):
        if value > 0.5:
            colour = "white" if value > dark else "black"
            panel.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=size, color=colour)


def plot_corrupted_images(path: Path, shown: dict[str, list[torch.Tensor]], title: str) -> None:
    """One image, uint8 [3, H, W], under every corruption, severities downwards, below the clean one if it is there."""
    columns = {name.replace("_", " "): [image / 255 for image in images] for name, images in shown.items()}
    severities = ["clean", *(f"severity {number}" for number in range(1, 6))]
    plot_images(path, columns, severities[-len(next(iter(shown.values()))) :], title)


def plot_bars(path: Path, groups: Sequence[str], series: dict[str, list[float]], title: str) -> None:
    """Top-1 accuracy in % as groups of bars, a bar a series in each (NaN: none); the first series is the reference."""
    figure, panel = one_panel(2.4 + 0.6 * len(groups) * len(series), 3.8, title)
    width = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        places = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        bars = panel.bar(places, values, 0.95 * width, label=label, color=(GREY, BLUE, RED, GREEN)[i % 4])
        panel.bar_label(bars, fmt="%.1f", padding=2)
    panel.set_xticks(range(len(groups)), groups)
    panel.set(ylim=(0, 108), ylabel="top-1 accuracy [%]")
    figure.legend(loc="outside lower center", ncols=len(series))
    save(figure, path)
