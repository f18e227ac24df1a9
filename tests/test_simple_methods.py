"""input, manifold, cutmix and saliencymix: golden vectors, brute force, and what their draws look like."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mixup import METHODS, build_method
from mixup.base import Method, PartialMixing, bce_loss, one_hot, partner_index
from mixup.cutmix import CutMix, cut_box, paste_box
from mixup.input import InputMixup, mix_images
from mixup.manifold import ManifoldMixup
from mixup.saliency import SURROUND_RADII, fine_grained_saliency
from mixup.saliencymix import SaliencyMix, peak_box, saliency_peak
from models import build_model

from .common import MEAN, STD, golden, normalise

NAMES = ["input", "manifold", "cutmix", "saliencymix"]
PARTIAL = ["input", "manifold", "cutmix"]


def make(name: str, **changes: Any) -> Any:
    return build_method(name, "cifar10", 10, **changes)


class Probe(nn.Module):
    """Logits are the first ten pixels; it keeps what it was called with."""

    mixing_points = 3

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.calls: list[tuple[Tensor, int | None]] = []

    def forward(self, x: Tensor, mix_at: int | None = None, mix: Any = None) -> Tensor:
        self.calls.append((x, mix_at))
        x = x if mix is None else mix(x)
        return self.scale * x.flatten(1)[:, :10]


def batch(size: int, height: int = 16, width: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images_u8 = torch.randint(0, 256, (size, 3, height, width), generator=generator, dtype=torch.uint8)
    return normalise(images_u8.numpy()), torch.randint(0, 10, (size,), generator=generator)


def drawn(method: Method, size: int, height: int = 16, width: int = 16, epoch: int = 0, seed: int = 0) -> Any:
    draws = method.draw(np.random.default_rng(seed), size, height, width, epoch)
    if method.name == "saliencymix":
        draws.mix = True
    return draws


# --- the parts ---------------------------------------------------------------


def test_cut_boxes_are_golden() -> None:
    for height, width, lam, row, col, *box, ratio in golden("cutmix.npz")[
        "height_width_lam_cy_cx_top_bottom_left_right_ratio"
    ]:
        assert cut_box(int(height), int(width), lam, row, col) == tuple(box)
        images = torch.zeros(2, 3, int(height), int(width))
        assert paste_box(images, [1, 0], tuple(map(int, box)))[1] == pytest.approx(ratio, abs=1e-6)


def test_saliency_and_its_boxes_are_golden() -> None:
    file = golden("saliencymix.npz")
    maps = fine_grained_saliency(torch.from_numpy(file["images_u8"]))
    np.testing.assert_array_equal(maps.numpy(), file["saliency"])
    for index, (lam, peak_row, peak_col, *box, ratio) in enumerate(file["lam_peaky_peakx_top_bottom_left_right_ratio"]):
        row, col = saliency_peak(maps[index])
        assert (row, col) == (peak_row, peak_col)
        ours = peak_box(32, 32, lam, row, col)
        assert ours == tuple(box)
        assert paste_box(torch.zeros(2, 3, 32, 32), [1, 0], ours)[1].item() == pytest.approx(ratio, abs=1e-6)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_cut_box_lies_in_the_image(height: int, width: int, lam: float, row: float, col: float) -> None:
    top, bottom, left, right = cut_box(height, width, lam, row * height, col * width)
    assert 0 <= top <= bottom <= height
    assert 0 <= left <= right <= width
    assert bottom - top <= math.sqrt(1 - lam) * height + 1
    assert right - left <= math.sqrt(1 - lam) * width + 1
    if lam == 1:
        assert (bottom - top) * (right - left) == 0


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.data())
@settings(deadline=None)
def test_peak_box_by_the_formula(height: int, width: int, lam: float, data: st.DataObject) -> None:
    row, col = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    cut_height, cut_width = int(height * math.sqrt(1 - lam)), int(width * math.sqrt(1 - lam))
    assert peak_box(height, width, lam, torch.tensor(row), torch.tensor(col)) == (
        max(row - cut_height // 2, 0), min(row + cut_height // 2, height),
        max(col - cut_width // 2, 0), min(col + cut_width // 2, width),
    )  # fmt: skip


def test_the_first_of_several_peaks_counts() -> None:
    saliency = torch.zeros(4, 7, dtype=torch.uint8)
    assert saliency_peak(saliency) == (0, 0)
    saliency[2, 5] = saliency[2, 6] = saliency[3, 0] = 9
    assert saliency_peak(saliency) == (2, 5)


def test_paste_box_on_a_rectangle() -> None:
    images, _ = batch(4, 9, 14)
    before = images.clone()
    permutation = np.array([2, 0, 3, 1])
    mixed, ratio, mask = paste_box(images, permutation, (2, 7, 0, 5))
    expected = images.clone()
    expected[:, :, 2:7, 0:5] = images[permutation][:, :, 2:7, 0:5]
    assert torch.equal(mixed, expected)
    assert ratio == 1 - 25 / 126
    assert mask.mean().item() == pytest.approx(ratio)
    assert not mask[2:7, 0:5].any()
    assert torch.equal(images, before)


def test_mix_images_is_the_formula_for_numbers_tensors_and_activations() -> None:
    permutation = [1, 2, 0]
    for shape in [(3, 3, 5, 7), (3, 20), (3,)]:
        x = torch.randn(shape)
        expected = 0.3 * x + 0.7 * x[permutation]
        torch.testing.assert_close(mix_images(x, permutation, 0.3), expected)
        torch.testing.assert_close(mix_images(x, torch.tensor(permutation), torch.tensor(0.3)), expected)
        assert torch.equal(mix_images(x, permutation, 1.0), x)
        assert torch.equal(mix_images(x, permutation, 0.0), x[permutation])
        assert torch.equal(mix_images(x, [0, 1, 2], 0.3), x)
        # λ = 0.3 is not rounded to bfloat16's eight bits
        half = mix_images(x.bfloat16(), permutation, torch.tensor(0.3))
        assert torch.equal(half, torch.lerp(x[permutation].bfloat16().float(), x.bfloat16().float(), 0.3).bfloat16())


def test_parts_refuse_what_does_not_fit() -> None:
    images = torch.zeros(3, 3, 8, 8)
    with pytest.raises(ValueError, match=r"permutation must be \[3\].*\(2,\)"):
        mix_images(images, [1, 0], 0.5)
    with pytest.raises(ValueError, match=r"permutation must be \[3\].*\(2,\)"):
        paste_box(images, [1, 0], (0, 1, 0, 1))
    with pytest.raises(ValueError, match="a permutation of 4 does not fit a batch of 3"):
        partner_index([0, 1, 2, 3], 3, images.device)
    for lam in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=str(lam)):
            mix_images(images, [0, 1, 2], lam)
        with pytest.raises(ValueError, match=str(lam)):
            cut_box(8, 8, lam, 1, 1)
        with pytest.raises(ValueError, match=str(lam)):
            peak_box(8, 8, lam, torch.tensor(1), torch.tensor(1))
    with pytest.raises(ValueError, match=r"\(9, 1\)"):
        cut_box(8, 8, 0.5, 9, 1)
    for bad in (images, images[0].byte(), images[:, :1].byte(), images[:0].byte()):
        with pytest.raises(ValueError, match="uint8"):
            fine_grained_saliency(bad)
    with pytest.raises(ValueError, match=r"\(3, 3, 8, 8\)"):
        saliency_peak(images)


# --- fine-grained saliency by loops over pixels ------------------------------


def reference_saliency(image: np.ndarray) -> np.ndarray:
    """[3, H, W] bytes, in Python's integers."""
    _, height, width = image.shape
    grey = [
        [(3735 * int(r) + 19235 * int(g) + 9798 * int(b) + 16384) >> 15 for r, g, b in row]
        for row in image.transpose(1, 2, 0)
    ]

    def reflect(i: int, length: int) -> int:
        i = abs(i) if length > 1 else 0
        return 2 * (length - 1) - i if i >= length else i

    for _ in range(2):
        grey = [
            [
                (8 + sum(
                    (2 - abs(dy)) * (2 - abs(dx)) * grey[reflect(y + dy, height)][reflect(x + dx, width)]
                    for dy in (-1, 0, 1) for dx in (-1, 0, 1)
                )) >> 4
                for x in range(width)
            ]
            for y in range(height)
        ]  # fmt: skip
    values = np.array(grey, dtype=np.int64)
    on, off = np.zeros_like(values), np.zeros_like(values)
    for radius in (12, 24, 48, 28, 56, 112):
        for y in range(height):
            for x in range(width):
                window = values[max(y - radius + 1, 0) : y + radius + 1, max(x - radius + 1, 0) : x + radius + 1]
                center, others = int(values[y, x]), window.size - 1
                if others == 0:
                    continue
                excess = center * others - (int(window.sum()) - center)
                on[y, x] += max(excess, 0) // others
                off[y, x] += max(-excess, 0) // others

    def rescaled(maps: np.ndarray) -> np.ndarray:
        return 255 * maps // maps.max() if maps.max() else maps

    return rescaled(rescaled(on) + rescaled(off))


@pytest.mark.parametrize("size", [(32, 32), (7, 45), (1, 1), (1, 6), (2, 2), (3, 1), (60, 26)])
def test_fine_grained_saliency_by_loops(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (1, 3, *size), dtype=np.uint8)
    smooth = np.broadcast_to(np.arange(size[1]) * 5 % 256, (1, 3, *size)).astype(np.uint8)
    spot = np.zeros((1, 3, *size), np.uint8)
    spot[..., size[0] // 2, size[1] // 2] = 255
    images = np.concatenate([noise, smooth, spot, 255 - spot])
    maps = fine_grained_saliency(torch.from_numpy(images))
    assert maps.dtype == torch.uint8
    for image, actual in zip(images, maps.numpy(), strict=True):
        np.testing.assert_array_equal(actual, reference_saliency(image))


def test_fine_grained_saliency_of_large_images() -> None:
    """300×260 exceeds every window, and its sum what a float32 holds exactly."""
    image = torch.from_numpy(np.random.default_rng(1).integers(180, 256, (1, 3, 300, 260), dtype=np.uint8))
    image[..., 100:120, 50:80] //= 4
    maps = fine_grained_saliency(image.repeat(2, 1, 1, 1))
    assert torch.equal(maps[0], maps[1])
    channels = image[0].numpy().astype(np.int64)
    grey = np.pad((3735 * channels[0] + 19235 * channels[1] + 9798 * channels[2] + 16384) >> 15, 2, mode="reflect")
    for _ in range(2):
        rows = grey[:-2] + 2 * grey[1:-1] + grey[2:]
        grey = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:] + 8) >> 4
    integral = np.pad(grey, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    y, x = np.arange(300)[:, None], np.arange(260)
    on, off = np.zeros_like(grey), np.zeros_like(grey)
    for r in SURROUND_RADII:
        top, bottom = np.maximum(y - r + 1, 0), np.minimum(y + r + 1, 300)
        left, right = np.maximum(x - r + 1, 0), np.minimum(x + r + 1, 260)
        total = integral[bottom, right] - integral[top, right] - integral[bottom, left] + integral[top, left]
        area = (bottom - top) * (right - left)
        on += np.maximum(grey * area - total, 0) // (area - 1)
        off += np.maximum(total - grey * area, 0) // (area - 1)
    both = 255 * on // on.max() + 255 * off // off.max()
    # the frame was widened once for both blurs here, so the outermost pixels differ
    np.testing.assert_array_equal(maps[0].numpy()[1:-1, 1:-1], (255 * both // both.max())[1:-1, 1:-1])


def test_fine_grained_saliency_of_one_colour_is_zero() -> None:
    images = torch.tensor([0, 37, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 20, 30)
    assert not fine_grained_saliency(images).any()


# --- the draws ---------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_draws_depend_on_the_generator_alone(name: str) -> None:
    method = make(name)
    first, second, other = (method.draw(np.random.default_rng(seed), 9, 16, 24) for seed in (3, 3, 4))
    np.testing.assert_equal(vars(first), vars(second))
    assert first.lam != other.lam
    assert sorted(first.permutation) == list(range(9))


def test_lam_is_a_beta_draw() -> None:
    rng = np.random.default_rng(0)
    for alpha in (0.2, 1.0, 2.0):
        lam = np.array([make("input", mixup_alpha=alpha).draw(rng, 1, 8, 8).lam for _ in range(4000)])
        assert lam.mean() == pytest.approx(0.5, abs=0.03)
        assert lam.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)
    assert make("input", mixup_alpha=0).draw(rng, 1, 8, 8).lam == 1


def test_mixing_points_and_centres_are_uniform() -> None:
    rng = np.random.default_rng(0)
    points = np.bincount([make("manifold").draw(rng, 2, 8, 8).mix_at for _ in range(3000)])
    assert len(points) == 3
    assert np.abs(points - 1000).max() < 120
    centres = np.array([[d.row, d.col] for d in (make("cutmix").draw(rng, 2, 10, 30) for _ in range(3000))])
    for column, length in zip(centres.T, (10, 30), strict=True):
        counts = np.histogram(column, bins=10, range=(0, length))[0]
        assert counts.sum() == 3000
        assert np.abs(counts - 300).max() < 75


def test_saliencymix_mixes_half_of_the_batches() -> None:
    rng = np.random.default_rng(0)
    draws = [make("saliencymix").draw(rng, 2, 8, 8) for _ in range(2000)]
    assert np.mean([d.mix for d in draws]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([d.lam for d in draws]) == pytest.approx(0.5, abs=0.03)
    assert np.var([d.lam for d in draws]) == pytest.approx(1 / 12, rel=0.1)


@pytest.mark.parametrize("name", PARTIAL)
def test_schedule_of_the_share(name: str) -> None:
    def counts(**changes: Any) -> list[int]:
        method = make(name, **changes)
        assert isinstance(method, PartialMixing)
        return [
            len(method.draw(np.random.default_rng(0), 100, 8, 8, epoch=e).permutation) for e in (0, 4, 8, 9, 10, 50)
        ]

    assert counts() == [100] * 6
    assert counts(prob_mix=0) == [0] * 6
    assert counts(prob_mix=0.255) == [25] * 6
    assert counts(mix_schedule="scheduled", mix_scheduled_epoch=10) == [10, 50, 90, 100, 100, 100]
    assert counts(mix_schedule="scheduled", mix_scheduled_epoch=10, prob_mix=0.5) == [5, 25, 45, 50, 50, 50]
    assert counts(mix_schedule="delayed", mix_scheduled_epoch=9, prob_mix=0.5) == [0, 0, 0, 50, 50, 50]


# --- the steps ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["input", "cutmix", "saliencymix"])
def test_what_a_step_shows_fits_together(name: str) -> None:
    method, (images, labels) = make(name), batch(6, 16, 24)
    model, draws = Probe(), drawn(method, 6, 16, 24, seed=1)
    step = method.step(model, images, labels, draws)
    assert torch.equal(step.mixed.partner, images[draws.permutation])
    mask = step.mixed.mask[:, None]
    torch.testing.assert_close(step.mixed.images, mask * images + (1 - mask) * step.mixed.partner)
    assert step.mixed.mask.shape == (6, 16, 24)
    assert 0 < step.mixed.mask.mean() < 1
    ratio = step.mixed.mask.mean(dim=(1, 2))[:, None]
    labels_b = labels[draws.permutation]
    torch.testing.assert_close(step.mixed.targets, ratio * one_hot(labels, 10) + (1 - ratio) * one_hot(labels_b, 10))
    assert torch.equal(model.calls[0][0], step.mixed.images)
    assert len(model.calls) == 1


def test_manifold_mixes_where_the_draw_says() -> None:
    method, (images, labels) = make("manifold"), batch(4)
    for mix_at in range(3):
        model, draws = Probe(), drawn(method, 4)
        draws.mix_at = mix_at
        step = method.step(model, images, labels, draws)
        assert model.calls[0][1] == mix_at
        assert torch.equal(model.calls[0][0], images)
        torch.testing.assert_close(step.logits, mix_images(images, draws.permutation, draws.lam).flatten(1)[:, :10])
        wanted = draws.lam * one_hot(labels, 10) + (1 - draws.lam) * one_hot(labels[draws.permutation], 10)
        torch.testing.assert_close(step.mixed.targets, wanted.float())
    draws.mix_at = 3
    with pytest.raises(ValueError, match="mix_at must be 0, 1 or 2: 3"):
        method.step(model, images, labels, draws)


def test_manifold_at_the_input_is_input_mixup() -> None:
    images, labels = batch(6)
    torch.manual_seed(0)
    model = build_model("preactresnet18", 10, initial_channels=4)
    draws = drawn(make("manifold"), 6)
    results = []
    for mix_at in range(3):
        draws.mix_at = mix_at
        results.append(make("manifold").step(model, images, labels, draws).logits)
    expected = make("input").step(model, images, labels, draws).logits
    assert torch.equal(results[0], expected)
    assert not torch.allclose(results[1], expected)
    assert not torch.allclose(results[1], results[2])


@pytest.mark.parametrize("name", PARTIAL)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_partial_mixing_mixes_the_last_images_among_themselves(name: str, share: float) -> None:
    method, (images, labels) = make(name, prob_mix=share), batch(5)
    draws = drawn(method, 5, seed=2)
    count = int(5 * share)
    assert len(draws.permutation) == count
    model = Probe()
    step = method.step(model, images, labels, draws)
    assert len(model.calls) == 1

    clean = 5 - count
    sums = torch.zeros(())
    if clean:
        logits = Probe()(images[:clean])
        assert torch.equal(step.logits[:clean], logits)
        assert torch.equal(step.mixed.targets[:clean], one_hot(labels[:clean], 10))
        sums = sums + bce_loss(logits, one_hot(labels[:clean], 10)) * logits.numel()
    if count:
        mixed = make(name).step(Probe(), images[clean:], labels[clean:], draws)
        torch.testing.assert_close(step.logits[clean:], mixed.logits)
        torch.testing.assert_close(step.mixed.targets[clean:], mixed.mixed.targets)
        sums = sums + mixed.loss * mixed.logits.numel()
    torch.testing.assert_close(step.loss, sums / (5 * 10))


def test_saliencymix_leaves_the_other_half_clean() -> None:
    method, (images, labels) = make("saliencymix"), batch(5)
    draws = drawn(method, 5)
    draws.mix = False
    model = Probe()
    step = method.step(model, images, labels, draws)
    assert torch.equal(model.calls[0][0], images)
    assert torch.equal(step.mixed.targets, one_hot(labels, 10))
    torch.testing.assert_close(step.loss, bce_loss(step.logits, step.mixed.targets))


def test_saliencymix_cuts_around_the_peak_of_the_first_partner() -> None:
    images_u8 = torch.full((3, 3, 24, 40), 90, dtype=torch.uint8)
    for i, (row, col) in enumerate([(3, 5), (12, 30), (20, 10)]):
        images_u8[i, :, row - 1 : row + 2, col - 1 : col + 2] = 250
    images = normalise(images_u8.numpy())
    draws = SimpleNamespace(mix=True, lam=0.75, permutation=np.array([1, 2, 0]))
    step = make("saliencymix").step(Probe(), images, torch.arange(3), draws)
    outside = torch.ones(24, 40)
    outside[12 - 6 : 12 + 6, 30 - 10 : 30 + 10] = 0
    assert torch.equal(step.mixed.mask, outside.expand(3, 24, 40))
    torch.testing.assert_close(step.mixed.targets[0, :3], torch.tensor([0.75, 0.25, 0.0]))


def test_saliencymix_sees_the_bytes_the_images_were_made_of() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(make("saliencymix")._bytes(normalise(every_byte.numpy())), every_byte)


# --- the settings ------------------------------------------------------------


def test_presets() -> None:
    alphas = {"input": (1, 0.2), "manifold": (2, 0.2), "cutmix": (1, 0.2)}
    for name, (small, tiny) in alphas.items():
        for dataset in ("cifar10", "cifar100", "digits", "folder"):
            assert build_method(name, dataset, 10).mixup_alpha == small
        assert build_method(name, "tiny-imagenet-200", 200).mixup_alpha == tiny
        assert build_method(name, "tiny-imagenet-200", 200, mixup_alpha=0.7).mixup_alpha == 0.7
    assert [m for m in METHODS if m in NAMES] == NAMES
    assert InputMixup(10).mixup_alpha == CutMix(10).mixup_alpha == 1
    assert ManifoldMixup(10).mixup_alpha == 2
    method = make("saliencymix")
    torch.testing.assert_close(torch.tensor([method.mean, method.std]), torch.stack([MEAN, STD]))
    assert not isinstance(method, PartialMixing)


@pytest.mark.parametrize(
    "setting",
    [
        {"mixup_alpha": -0.5}, {"mixup_alpha": math.nan}, {"prob_mix": 1.5}, {"prob_mix": -0.5}, {"prob_mix": math.nan},
        {"mix_schedule": "sometimes"}, {"mix_scheduled_epoch": 0},
    ],
)  # fmt: skip
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    for kind in (InputMixup, ManifoldMixup, CutMix):
        with pytest.raises(ValueError, match=str(next(iter(setting.values())))):
            kind(10, **setting)


def test_mean_and_std_out_of_range() -> None:
    for mean, std in (((0.5, 0.5), (1, 1, 1)), ((0.5, 0.5, 0.5), (1, 0, 1))):
        with pytest.raises(ValueError, match="mean and std"):
            SaliencyMix(10, mean=mean, std=std)
