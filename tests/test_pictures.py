"""What the pictures of a run, of an evaluation and of a table say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mixup import build_method
from mixup.base import Mixed, bce_loss
from utils import pictures
from utils.run import COLUMNS

DATA: Any = SimpleNamespace(mean=(0.5,) * 3, std=(0.25,) * 3, classes=["cat", "dog"])


@pytest.fixture
def plotted(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are not saved but kept."""
    figures: list[Figure] = []
    monkeypatch.setattr(pictures, "save", lambda figure, path, **how: figures.append(figure))
    return figures


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(pictures.log, "warning", lines.append)
    return lines


def texts(labels: Any) -> list[str]:
    return [label.get_text() for label in labels]


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 300])
@pytest.mark.parametrize("mixes", [True, False])
def test_curves_have_ticks_at_whole_epochs_and_name_what_was_trained_on(
    plotted: list[Figure], epochs: int, mixes: bool
) -> None:
    rows = [{**dict.fromkeys(COLUMNS, 1.0), "epoch": epoch, "valid_top1": None} for epoch in range(epochs)]
    pictures.plot_curves(Path("curves.png"), rows, "SAGE", [1], mixes)
    for panel in plotted[0].axes:
        low, high = panel.get_xlim()
        ticks = [tick for tick in panel.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == round(tick) for tick in ticks)
    legend = plotted[0].axes[1].get_legend()
    assert legend is not None
    assert texts(legend.get_texts())[0] == ("train (mixed images)" if mixes else "train")


@pytest.mark.parametrize("losses", [(0.16, 1.3), (0.451, 0.453), (1e-4, 5.0), (0.5, 0.5)])
def test_losses_have_plain_numbers_at_their_axis(plotted: list[Figure], losses: tuple[float, float]) -> None:
    rows = [
        {**dict.fromkeys(COLUMNS, loss), "epoch": epoch, "valid_loss": None, "valid_top1": None}
        for epoch, loss in enumerate(losses)
    ]
    pictures.plot_curves(Path("curves.png"), rows, "SAGE", [1])
    FigureCanvasAgg(plotted[0]).draw()
    low, high = plotted[0].axes[0].get_ylim()
    labels = texts(plotted[0].axes[0].get_yticklabels(which="both"))
    assert [label for label in labels if label and low <= float(label.replace("−", "-")) <= high]


def test_pairs_are_of_six_batches_of_the_first_and_the_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures of them: images as pixels, maps and mask as they are, λ, and the shares of the target."""
    drawn: list[tuple[str, str, list[str]]] = []
    columns: dict[str, list[torch.Tensor]] = {}

    def plot(path: Path, images: dict[str, list[torch.Tensor]], rows: list[str], title: str) -> None:
        path.touch()
        columns.update(images)
        drawn.append((path.name, title, rows))

    monkeypatch.setattr(pictures, "plot_images", plot)
    collector = pictures.MixedImages(tmp_path, DATA, build_method("sage", "cifar10", num_classes=2), 3)
    images, partner, mixed = torch.randn(3, 4, 3, 4, 4)
    maps = torch.rand(3, 4, 4, 4)
    seen = {"partner": partner, "saliency": (maps[0], maps[1]), "mask": maps[2], "loss_function": bce_loss}
    result = Mixed(mixed, torch.tensor([[0.25, 0.75]] * 4), torch.zeros(()), **seen)  # type: ignore[arg-type]
    for epoch, batches in enumerate((8, 8, 3)):
        for batch in range(batches):
            collector.collect(epoch, result, images, SimpleNamespace(lam=batch / 8))
        collector.draw()
    rows = [f"λ = {batch / 8:.2f}\n75% dog\n25% cat" for batch in range(6)]
    assert drawn == [("mixed.png", "SAGE, epoch 0", rows), ("mixed_last.png", "SAGE, epoch 2", rows[:3])]
    expected = {"image a": images * 0.25 + 0.5, "image b": partner * 0.25 + 0.5, "saliency a": maps[0]}
    expected |= {"saliency b": maps[1], "mask (white: a)": maps[2], "mixed": mixed * 0.25 + 0.5}
    assert list(columns) == list(expected)
    for name, batch in expected.items():
        for row, image in enumerate(columns[name]):
            assert torch.equal(image, batch[-1 - row].expand_as(image))


def test_plain_training_shows_an_image_once(tmp_path: Path) -> None:
    collector = pictures.MixedImages(tmp_path, DATA, build_method("vanilla", "cifar10", num_classes=2), 3)
    images = torch.rand(4, 3, 4, 4)
    mixed = Mixed(images, torch.eye(2)[[0, 1, 0, 1]], torch.zeros(()), loss_function=bce_loss)
    collector.collect(0, mixed, images, None)
    assert collector.columns.keys() == {"image a"}
    assert collector.texts == ["100% dog"]


@pytest.mark.parametrize(("count", "length"), [(2, 3), (2, 60), (19, 20)])
def test_long_names_are_not_cut_off_and_leave_images_their_size(tmp_path: Path, count: int, length: int) -> None:
    columns = {
        f"{'c' * length}{number}": [torch.tensor([1.0, 0, 0]).expand(8, 8, 3).permute(2, 0, 1)] * 5
        for number in range(count)
    }
    pictures.plot_images(tmp_path / "a.png", columns, ["d" * length] * 5, "SAGE, epoch 7")
    pixels = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
    border = np.concatenate([pixels[:2].ravel(), pixels[-2:].ravel(), pixels[:, :2].ravel(), pixels[:, -2:].ravel()])
    assert border.min() == 1
    assert (pixels == [1, 0, 0]).all(axis=2).sum() == pytest.approx(
        5 * count * (200 * min(1.1, 8 / count) * 0.8) ** 2, rel=0.05
    )


@pytest.mark.parametrize("error", [RuntimeError("no LaTeX"), MemoryError(), KeyboardInterrupt()])
def test_a_picture_that_fails_is_one_warning(error: BaseException, warned: list[str], tmp_path: Path) -> None:
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
    tmp_path: Path, warned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The same bytes each time, too."""
    with matplotlib.rc_context({"text.usetex": True, "font.family": "no such font"}):
        for name in ("a.png", "b.png", "a.pdf", "b.pdf"):
            pictures.attempt(pictures.plot_confusion, tmp_path / name, np.eye(2), ["\u4e00$", "$x^$"], "$_$", 50.0)
        assert matplotlib.rcParams["text.usetex"]
    assert warned == []
    assert not caplog.records
    for kind, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        one, two = ((tmp_path / f"{name}.{kind}").read_bytes() for name in "ab")
        assert one[:4] == magic
        assert one == two
