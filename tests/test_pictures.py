"""What the pictures of a run say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["image a", "image b", "saliency a", "saliency b", "mixed", *[""] * 5]
    assert [axes.get_xlabel() for axes in figure.axes[4::5]] == ["75 % dog + 25 % cat", "100 % cat"]
