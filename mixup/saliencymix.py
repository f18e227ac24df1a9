"""SaliencyMix: Uddin et al., "SaliencyMix: A saliency guided data augmentation strategy for better regularization",
ICLR 2021."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .base import Method, Step, as_index, bce_loss, mixed_targets
from .cutmix import paste_box
from .saliency import fine_grained_saliency
from .vanilla import Vanilla


def saliency_peak(saliency: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column) of the first maximum, row by row, of one map [H, W]: tensors of one on its device."""
    if saliency.ndim != 2 or saliency.numel() == 0:
        raise ValueError(f"saliency must be one map [H, W], got {tuple(saliency.shape)}")
    position = saliency.flatten().argmax()
    width = saliency.shape[1]
    return position // width, position % width


def peak_box(height: int, width: int, lam: float, row: Any, col: Any) -> tuple[Any, Any, Any, Any]:
    """The box around a peak: per axis of length D, cut = ⌊D·√(1−λ)⌋ and [peak − cut//2, peak + cut//2), clipped.

    Args:
        height, width: of the image, in pixels.
        lam: λ in [0, 1].
        row, col: the peak in pixels, as tensors of one; they stay on their device.

    Returns:
        (top, bottom, left, right), tensors of one; bottom and right exclusive.

    Raises:
        ValueError: λ is out of range.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1]: {lam}")
    half_height, half_width = (int(length * math.sqrt(1 - lam)) // 2 for length in (height, width))
    return (
        (row - half_height).clamp(min=0),
        (row + half_height).clamp(max=height),
        (col - half_width).clamp(min=0),
        (col + half_width).clamp(max=width),
    )


@dataclass
class SaliencyMix(Method):
    """SaliencyMix as a training method: every second batch on average, the box of one image's saliency peak for all.

    The published training code hands the normalised image to a routine that reads it as bytes, so that its saliency is
    noise; here it is the map of the image itself, as the paper says.

    Settings:
        mean, std: [3] of 1, what the images are normalised with.
    """

    name = "saliencymix"
    title = "SaliencyMix"
    mean: Sequence[float] = field(kw_only=True)
    std: Sequence[float] = field(kw_only=True)

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise ValueError(f"mean and std must have 3 values, std positive: {self.mean}, {self.std}")

    def draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int = 0) -> SimpleNamespace:
        """``mix``, whether this batch is mixed; ``lam`` ~ Beta(1, 1); ``permutation`` [B]."""
        return SimpleNamespace(mix=rng.random() < 0.5, lam=rng.beta(1, 1), permutation=rng.permutation(batch))

    def step(self, model: nn.Module, images: Tensor, labels: Tensor, draws: Any) -> Step:
        """Loss of ``images`` [B, 3, H, W], ``labels`` [B], mixed if ``draws.mix``."""
        if not draws.mix:
            return Vanilla(self.num_classes).step(model, images, labels)
        permutation = as_index(draws.permutation, images.device)
        height, width = images.shape[2:]
        leader = self._bytes(images[permutation[:1]])
        row, col = saliency_peak(fine_grained_saliency(leader)[0])
        mixed, ratio, mask = paste_box(images, permutation, peak_box(height, width, float(draws.lam), row, col))
        targets = mixed_targets(labels, permutation, ratio, self.num_classes)
        logits = model(mixed)
        return Step(
            loss=bce_loss(logits, targets),
            logits=logits,
            targets=targets,
            mixed=mixed,
            partner=images[permutation],
            mask=mask.expand(images[:, 0].shape),
        )

    def _bytes(self, images: Tensor) -> Tensor:
        """Normalised [B, 3, H, W] as uint8 pixels."""
        # channel by channel with plain numbers: copying mean and std to a GPU would wait for it
        channels = [images[:, c] * (255 * self.std[c]) + 255 * self.mean[c] for c in range(3)]
        return torch.stack(channels, dim=1).round().clamp(0, 255).to(torch.uint8)
