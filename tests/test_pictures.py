"""What the pictures of a run say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
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
    images = torch.zeros(2, 3, 4, 4)
    maps = torch.rand(2, 2, 4, 4)
    targets = torch.tensor([[0.25, 0.75], [1, 0]])
    mixed = Mixed(images, targets, torch.zeros(()), partner=images, saliency=(maps[0], maps[1]), loss_function=bce_loss)
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
    shown = [panel.images[lefts.index(left)] for left in sorted(set(lefts))]
    assert np.array_equal(shown[2].get_array(), maps[0, 0])
    assert np.array_equal(shown[3].get_array(), maps[1, 0])
    # each name above its column, each target below its row
    for text, left in zip(panel.texts, sorted(set(lefts)), strict=False):
        assert left < text.get_position()[0] < left + 1
    for text, top in zip(panel.texts[5:], sorted(set(tops)), strict=True):
        assert top + 1 < text.get_position()[1] < top + 1.2
