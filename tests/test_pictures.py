"""What the pictures of a run, of an evaluation and of a table say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mixup import build_method
from mixup.base import Mixed, bce_loss
from utils import pictures
from utils.run import COLUMNS


@pytest.fixture
def plotted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures that are not saved but kept."""
    figures: list[Figure] = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure))
    with matplotlib.rc_context(pictures.STYLE):
        yield figures


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 300])
@pytest.mark.parametrize("mixes", [True, False])
def test_curves_have_ticks_at_whole_epochs_and_name_what_was_trained_on(
    plotted: list[Figure], epochs: int, mixes: bool
) -> None:
    rows = [{**dict.fromkeys(COLUMNS, 1.0), "epoch": epoch, "valid_top1": None} for epoch in range(epochs)]
    pictures.plot_curves(Path("curves.png"), rows, "SAGE", [1], mixes)
    (figure,) = plotted
    for panel in figure.axes:
        low, high = panel.get_xlim()
        ticks = [tick for tick in panel.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == round(tick) for tick in ticks)
    legend = figure.axes[1].get_legend()
    assert legend is not None
    assert legend.get_texts()[0].get_text() == ("train (mixed images)" if mixes else "train")


DATA: Any = SimpleNamespace(mean=(0.5,) * 3, std=(0.25,) * 3, classes=["cat", "dog"])


def a_pair(**more: Any) -> dict[str, Any]:
    images = torch.rand(2, 3, 4, 4)
    return {"image a": images[0], "mixed": images[1], "target": torch.tensor([0.25, 0.75]), "lam": 0.25, **more}


def test_mixed_images_have_names_of_columns_lambda_and_shares(plotted: list[Figure]) -> None:
    maps = {"image b": torch.rand(3, 4, 4), "saliency a": torch.rand(4, 4), "saliency b": torch.rand(4, 4)}
    pairs = [a_pair(**maps), a_pair(**maps, target=torch.tensor([1.0, 0]), lam=None)]
    pictures.plot_mixed(Path("mixed.png"), pairs, DATA, "SAGE, epoch 7")
    (figure,) = plotted
    assert figure.get_suptitle() == "SAGE, epoch 7"
    names = ["image a", "image b", "saliency a", "saliency b", "mixed"]
    assert [panel.get_title() for panel in figure.axes] == names + [""] * 5
    assert [panel.texts[0].get_text() for panel in figure.axes[4::5]] == ["λ = 0.25: 75% dog + 25% cat", "100% cat"]
    for panel, (pair, name) in zip(figure.axes, [(pair, name) for pair in pairs for name in names], strict=True):
        expected = pair[name]
        if expected.ndim == 3:
            expected = (expected * 0.25 + 0.5).clamp(0, 1).permute(1, 2, 0)
        assert np.array_equal(panel.images[0].get_array(), expected)  # type: ignore[arg-type]


def test_plain_training_shows_an_image_once(plotted: list[Figure]) -> None:
    pair = a_pair()
    del pair["mixed"]
    pictures.plot_mixed(Path("mixed.png"), [pair], DATA, "Vanilla")
    (panel,) = plotted[0].axes
    assert panel.get_title() == "image"


def test_pairs_are_of_six_batches_of_the_first_and_the_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, list[float], str]] = []

    def plot(path: Path, pairs: Any, data: Any, title: str) -> None:
        path.touch()
        drawn.append((path.name, [pair["lam"] for pair in pairs], title))

    monkeypatch.setattr(pictures, "plot_mixed", plot)
    collector = pictures.MixedImages(tmp_path, DATA, build_method("input", "cifar10", num_classes=2), 3)
    images = torch.rand(4, 3, 4, 4)
    mixed = Mixed(images, torch.full((4, 2), 0.5), torch.zeros(()), partner=images, loss_function=bce_loss)
    for epoch, batches in enumerate((8, 8, 3)):
        for batch in range(batches):
            collector.collect(epoch, mixed, images, SimpleNamespace(lam=batch / 8))
        collector.draw()
    sixths = [batch / 8 for batch in range(6)]
    assert drawn == [("mixed.png", sixths, "Mixup, epoch 0"), ("mixed_last.png", sixths[:3], "Mixup, epoch 2")]


@pytest.mark.parametrize("losses", [(0.16, 1.3), (0.451, 0.453), (1e-4, 5.0), (0.5, 0.5)])
def test_losses_have_plain_numbers_at_their_axis(plotted: list[Figure], losses: tuple[float, float]) -> None:
    rows = [
        {**dict.fromkeys(COLUMNS, loss), "epoch": epoch, "valid_loss": None, "valid_top1": None}
        for epoch, loss in enumerate(losses)
    ]
    pictures.plot_curves(Path("curves.png"), rows, "SAGE", [1])
    (figure,) = plotted
    FigureCanvasAgg(figure).draw()
    low, high = figure.axes[0].get_ylim()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels(which="both")]
    values = [float(label.replace("−", "-")) for label in labels if label]
    assert [value for value in values if low <= value <= high]


@pytest.mark.parametrize("error", [RuntimeError("no LaTeX"), MemoryError(), KeyboardInterrupt()])
def test_a_picture_that_fails_is_one_warning(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(pictures.log, "warning", warned.append)

    def fail(path: Path) -> None:
        raise error

    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            pictures.attempt(fail, tmp_path / "a.png")
    else:
        pictures.attempt(fail, tmp_path / "a.png")
        assert warned == [f"warning: {tmp_path / 'a.png'} is not drawn: {str(error) or type(error).__name__}"]


@pytest.mark.filterwarnings("error")
def test_the_users_matplotlibrc_and_letters_without_glyphs_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(pictures.log, "warning", warned.append)
    with matplotlib.rc_context({"text.usetex": True, "font.family": "no such font"}):
        for kind in ("png", "pdf"):
            confusion, classes = np.eye(2), ["\u4e00$", "$x^"]
            pictures.attempt(pictures.plot_confusion, tmp_path / f"a.{kind}", confusion, classes, "$_", 50.0)
        assert matplotlib.rcParams["text.usetex"]
    assert warned == []
    assert not caplog.records
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "a.pdf").read_bytes()[:4] == b"%PDF"


def test_a_legend_lies_outside_the_bars_and_names_what_is_there(plotted: list[Figure]) -> None:
    bins = [(0, np.nan, np.nan), (10, 0.5, 0.75)]
    pictures.plot_reliability(Path("a.png"), bins, 25.0, 75.0, 50.0, "SAGE")
    above = plotted[0].axes[0]
    legend = above.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["calibrated", "accuracy", "overconfident by"]
    FigureCanvasAgg(plotted[0]).draw()
    assert legend.get_window_extent().x0 >= above.get_window_extent().x1


def test_dots_explain_only_marks_that_are_there(plotted: list[Figure]) -> None:
    frame = pd.DataFrame(
        {"label": ["SAGE", "Vanilla"], "method": ["sage", "vanilla"], "seed": 1, "final": [76.0, 74.0]}
    )
    pictures.plot_dots(Path("a.png"), frame)
    pictures.plot_dots(
        Path("a.png"), pd.DataFrame({"label": "SAGE", "method": "sage", "seed": [1, 2], "final": [76.0, 77.0]})
    )
    one, sage = (figure.axes[0] for figure in plotted)
    assert one.get_xlabel() == "test accuracy [%]: seeds (n = 1); dotted: plain training"
    assert sage.get_xlabel() == "test accuracy [%]: seeds (n = 2), mean and 95% interval"
    assert [label.get_text() for label in one.get_yticklabels()] == ["Vanilla", "SAGE"]
    assert np.asarray(sage.collections[0].get_offsets())[:, 0].tolist() == [76.0, 77.0]


def test_names_of_corruptions_are_not_cut_off(tmp_path: Path) -> None:
    shown = {f"elastic_transform_{number}": [torch.zeros(3, 8, 8, dtype=torch.uint8)] * 5 for number in range(19)}
    pictures.plot_corrupted_images(tmp_path / "a.png", shown, "made here")
    pixels = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
    border = np.concatenate([pixels[:2].ravel(), pixels[-2:].ravel(), pixels[:, :2].ravel(), pixels[:, -2:].ravel()])
    assert border.min() == 1
    below = pixels[np.flatnonzero((pixels == 0).mean(axis=(1, 2)) > 0.7)[-1] + 1 :]
    assert (below < 0.5).any(axis=(1, 2)).sum() > 150  # as high as the names are long


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("length", [3, 60])
def test_long_names_of_classes_leave_mixed_images_their_size(plotted: list[Figure], length: int) -> None:
    data: Any = SimpleNamespace(mean=(0.5,) * 3, std=(0.25,) * 3, classes=["c" * length, "d" * length])
    pairs = [a_pair(**{"image b": torch.rand(3, 4, 4)}) for _ in range(6)]
    pictures.plot_mixed(Path("mixed.png"), pairs, data, "CutMix, epoch 0")
    FigureCanvasAgg(plotted[0]).draw()
    assert 165 < plotted[0].axes[0].get_window_extent().width < 195
