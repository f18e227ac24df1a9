"""Corrupted images, attacks and calibration, with PyTorch, torchvision and Pillow alone."""

from __future__ import annotations

import io
import math
import zlib

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor, nn

from mixup.saliency import saliency_pass

SEVERITIES = 5
# One strength for each severity. Lengths are pixels of an image whose shorter side is 32, and grow with it.
CORRUPTIONS: dict[str, tuple[float, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # σ, for pixels in [0, 1]
    "shot_noise": (500, 250, 100, 75, 50),  # photons that make full brightness
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),  # share of values that become black or white
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # σ, pixels
    "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),  # largest of the zooms that are averaged
    "brightness": (1.1, 1.2, 1.35, 1.55, 1.8),  # factor
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor, towards the mean grey
    "saturation": (0.7, 0.5, 0.3, 0.15, 0.0),  # factor, towards each pixel's grey
    "elastic_transform": (0.3, 0.5, 0.7, 0.9, 1.2),  # root mean square of the displacement in a direction, pixels
    "pixelate": (0.9, 0.75, 0.6, 0.5, 0.4),  # side that is left
    "jpeg_compression": (80, 65, 50, 35, 20),  # quality
}
CHUNK = 500  # images that are corrupted together; part of what a seed means


def corrupt(images: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Images under one of ``CORRUPTIONS``, in the manner of Hendrycks & Dietterich, "Benchmarking Neural Network
    Robustness to Common Corruptions and Perturbations", 2019. These are not the arrays published with it.

    Random choices depend on ``seed``, ``name`` and the position of an image, not on ``severity``.

    Takes and returns uint8 [N, 3, H, W] on the CPU. ``ValueError``: another name, severity (1 to 5), shape or type.
    """
    if name not in CORRUPTIONS or severity not in range(1, SEVERITIES + 1):
        raise ValueError(f"no corruption {name!r} of severity {severity}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 [N, 3, H, W], got {images.dtype} {tuple(images.shape)}")
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    strength = CORRUPTIONS[name][severity - 1]
    return torch.cat([_corrupt(chunk, name, strength, generator) for chunk in images.split(CHUNK)])


def _corrupt(images: Tensor, name: str, strength: float, generator: torch.Generator) -> Tensor:
    """One chunk."""
    if name == "jpeg_compression":
        return torch.stack([_jpeg(image, int(strength)) for image in images])
    pixels = images.float() / 255
    height, width = pixels.shape[2:]
    scale = min(height, width) / 32
    if name == "gaussian_noise":
        pixels = pixels + strength * torch.randn(pixels.shape, generator=generator)
    elif name == "shot_noise":
        pixels = torch.poisson(pixels * strength, generator=generator) / strength
    elif name == "impulse_noise":
        chance = torch.rand(pixels.shape, generator=generator)
        pixels = pixels.masked_fill(chance < strength, 1.0).masked_fill(chance < strength / 2, 0.0)
    elif name == "gaussian_blur":
        sigma = strength * scale
        pixels = TF.gaussian_blur(pixels, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma] * 2)
    elif name == "zoom_blur":
        zooms = torch.linspace(1, strength, 8).tolist()
        bilinear = TF.InterpolationMode.BILINEAR
        shown = [TF.affine(pixels, 0.0, [0, 0], zoom, [0.0, 0.0], interpolation=bilinear) for zoom in zooms]
        pixels = torch.stack(shown).mean(dim=0)
    elif name == "brightness":
        pixels = TF.adjust_brightness(pixels, strength)
    elif name == "contrast":
        pixels = TF.adjust_contrast(pixels, strength)
    elif name == "saturation":
        pixels = TF.adjust_saturation(pixels, strength)
    elif name == "elastic_transform":
        coarse = torch.randn(len(pixels), 2, 6, 6, generator=generator)
        shift = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
        shift *= strength * scale / shift.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        whole = torch.eye(2, 3).expand(len(pixels), -1, -1)
        grid = F.affine_grid(whole, list(pixels.shape), align_corners=False)
        grid = grid + shift.permute(0, 2, 3, 1) * torch.tensor([2 / width, 2 / height])
        pixels = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    elif name == "pixelate":
        small = TF.resize(pixels, [max(1, round(strength * height)), max(1, round(strength * width))], antialias=True)
        pixels = F.interpolate(small, (height, width), mode="nearest-exact")
    return (255 * pixels.clamp(0, 1)).round().to(torch.uint8)


def _jpeg(image: Tensor, quality: int) -> Tensor:
    """[3, H, W] through a JPEG file; by Pillow, as torchvision gives its own encoder up."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    with Image.open(file) as decoded:
        return torch.from_numpy(np.array(decoded)).permute(2, 0, 1)


def fgsm(model: nn.Module, pixels: Tensor, labels: Tensor, eps: float) -> Tensor:
    """One step of ``eps`` along the sign of the gradient (Goodfellow et al., "Explaining and Harnessing Adversarial
    Examples", 2015).

    Takes a network of pixels in [0, 1] that normalises them itself, in eval mode; pixels [B, C, H, W] in [0, 1], true
    labels [B] int64, and the largest change of a pixel. Returns pixels; they stay where the gradient is zero.
    """
    sign, _ = _ascent(model, pixels, labels)
    return (pixels + eps * sign).clamp(0, 1)


def pgd(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    eps: float,
    *,
    steps: int,
    step_size: float,
    restarts: int,
    generator: torch.Generator,
) -> Tensor:
    """Projected gradient ascent from random starts (Madry et al., "Towards Deep Learning Models Resistant to
    Adversarial Attacks", 2018).

    Arguments are those of ``fgsm``, the number of steps and of random starts, the change of a pixel in a step, and the
    CPU's generator of the starts, which are drawn for all images. Returns [B, C, H, W], nowhere further than ``eps``
    from ``pixels``: the first image found that is misclassified (at first the one given), else the last one tried.
    """
    found = pixels.clone()
    with torch.no_grad():
        left = (model(pixels).argmax(dim=1) == labels).nonzero()[:, 0]
    for _ in range(restarts):
        start = eps * (2 * torch.rand(pixels.shape, generator=generator) - 1)
        found[left] = (pixels[left] + start.to(pixels)[left]).clamp(0, 1)
        for step in range(steps + 1):
            if not len(left):
                return found
            sign, correct = _ascent(model, found[left], labels[left])
            left, sign = left[correct], sign[correct]
            if step < steps:
                centre = pixels[left]
                moved = (found[left] + step_size * sign).clamp(centre - eps, centre + eps)
                found[left] = moved.clamp(0, 1)
    return found


def _ascent(model: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sign of the cross-entropy's gradient in the pixels [B, C, H, W], and which images are classified rightly."""
    correct: list[Tensor] = []

    def loss(logits: Tensor) -> Tensor:
        correct.append(logits.argmax(dim=1) == labels)
        return F.cross_entropy(logits, labels, reduction="sum")  # so that an image's gradient is its own

    gradient, _ = saliency_pass(model, pixels, loss)
    return gradient.sign(), correct[0]


def calibration(logits: Tensor, labels: Tensor, bins: int = 15) -> tuple[float, list[tuple[int, float, float]]]:
    """Expected calibration error (Guo et al., "On Calibration of Modern Neural Networks", 2017).

    Images fall into ``bins`` equal intervals (0, 1/bins], … by their confidence, the largest softmax probability. The
    error is the mean over images of |accuracy − mean confidence| of their bin.

    Takes logits [N, K] and labels [N] int64. Returns the error in [0, 1], and of each bin its number of images,
    accuracy and mean confidence; 0, nan, nan of an empty one.
    """
    confidence, guess = logits.double().softmax(dim=1).max(dim=1)
    number = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = number.bincount(minlength=bins).double()
    correct = number.bincount((guess == labels).double(), minlength=bins)
    sure = number.bincount(confidence, minlength=bins)
    error = (correct - sure).abs().sum() / len(labels)
    rows = zip(count.long().tolist(), (correct / count).tolist(), (sure / count).tolist(), strict=True)
    return float(error), list(rows)
