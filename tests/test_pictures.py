"""What the pictures of a run say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mixup.base import Mixed, bce_loss
from utils import pictures, records


@pytest.fixture
def plotted(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are not saved but kept."""
    figures: list[Figure] = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: figures.append(figure))
    return figures


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 300])
@pytest.mark.parametrize("mixes", [True, False])
def test_curves_have_ticks_at_whole_epochs_and_name_what_was_trained_on(
    plotted: list[Figure], epochs: int, mixes: bool
) -> None:
    rows = [{**dict.fromkeys(records.COLUMNS, 1.0), "epoch": epoch, "valid_top1": None} for epoch in range(epochs)]
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


def test_mixed_images_have_a_title_names_of_columns_and_targets(plotted: list[Figure]) -> None:
    images, partners, blend = torch.rand(3, 2, 3, 4, 4)
    maps = torch.rand(2, 2, 4, 4)
    targets = torch.tensor([[0.25, 0.75], [1, 0]])
    mixed = Mixed(
        blend, targets, torch.zeros(()), partner=partners, saliency=(maps[0], maps[1]), loss_function=bce_loss
    )
    data: Any = SimpleNamespace(mean=(0.5,) * 3, std=(0.25,) * 3, classes=["cat", "dog"])
    pictures.plot_mixed(Path("mixed.png"), mixed, images, data, "SAGE, epoch 7")
    (figure,) = plotted
    assert figure.get_suptitle() == "SAGE, epoch 7"
    (panel,) = figure.axes
    titles, shares = ["image a", "image b", "saliency a", "saliency b", "mixed"], ["75 % dog + 25 % cat", "100 % cat"]
    assert [text.get_text() for text in panel.texts] == titles + shares
    lefts = [image.get_extent()[0] for image in panel.images]
    tops = [image.get_extent()[3] for image in panel.images]
    assert (len(set(lefts)), len(set(tops))) == (5, 2)
    assert [lefts.count(left) for left in sorted(set(lefts))] == [2] * 5
    shown = {(image.get_extent()[3], image.get_extent()[0]): image.get_array() for image in panel.images}
    for row, top in enumerate(sorted(set(tops))):
        cells = [shown[top, left] for left in sorted(set(lefts))]
        for cell, normalised in zip((cells[0], cells[1], cells[4]), (images, partners, blend), strict=True):
            assert np.array_equal(cell, (normalised[row] * 0.25 + 0.5).clamp(0, 1).permute(1, 2, 0))
        for cell, saliency in zip(cells[2:4], maps, strict=True):
            assert np.array_equal(cell, saliency[row])
    # each name above its column, each target below its row
    for text, left in zip(panel.texts[:5], sorted(set(lefts)), strict=True):
        assert left < text.get_position()[0] < left + 1
        assert text.get_position()[1] < 0
    for text, top in zip(panel.texts[5:], sorted(set(tops)), strict=True):
        assert top + 1 < text.get_position()[1] < top + 1.2


@pytest.mark.parametrize("losses", [(0.16, 1.3), (0.451, 0.453), (1e-4, 5.0), (0.5, 0.5)])
def test_losses_have_plain_numbers_at_their_axis(plotted: list[Figure], losses: tuple[float, float]) -> None:
    rows = [
        {**dict.fromkeys(records.COLUMNS, loss), "epoch": epoch, "valid_loss": None, "valid_top1": None}
        for epoch, loss in enumerate(losses)
    ]
    pictures.plot_curves(Path("curves.png"), rows, "SAGE", [1])
    (figure,) = plotted
    FigureCanvasAgg(figure).draw()
    low, high = figure.axes[0].get_ylim()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels(which="both")]
    values = [float(label.replace("−", "-")) for label in labels if label]
    assert [value for value in values if low <= value <= high]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("length", [3, 60])
def test_long_names_of_classes_leave_mixed_images_their_size(plotted: list[Figure], length: int) -> None:
    images = torch.rand(6, 3, 4, 4)
    mixed = Mixed(images, torch.full((6, 2), 0.5), torch.zeros(()), partner=images, loss_function=bce_loss)
    data: Any = SimpleNamespace(mean=(0.5,) * 3, std=(0.25,) * 3, classes=["c" * length, "d" * length])
    pictures.plot_mixed(Path("mixed.png"), mixed, images, data, "CutMix, epoch 0")
    (figure,) = plotted
    FigureCanvasAgg(figure).draw()
    (panel,) = figure.axes
    assert 140 < panel.transData.transform((1, 0))[0] - panel.transData.transform((0, 0))[0] < 160
