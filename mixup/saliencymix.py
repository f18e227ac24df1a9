"""SaliencyMix: Uddin et al., "SaliencyMix: A saliency guided data augmentation strategy for better regularization",
ICLR 2021."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import Method, Mixed, Model, PairDraws, as_index, channels, mixed_targets
from .cutmix import paste_box
from .saliency import fine_grained_saliency


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
class HalfDraws(PairDraws):
    """``PairDraws`` of the whole batch, and whether the batch is mixed at all."""

    mix: bool


@dataclass
class SaliencyMix(Method):
    """SaliencyMix as a training method: every second batch on average, the box of one image's saliency peak for all.

    The published training code hands the normalised image to a routine that reads it as bytes, so that its saliency is
    noise; here it is the map of the image itself, as the paper says. Needs ``mean`` and ``std``.
    """

    name = "saliencymix"
    title = "SaliencyMix"
    needs_colours = True

    def _draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int) -> HalfDraws:
        """Whether this batch is mixed, with probability ½; λ ~ Beta(1, 1); a permutation [B]."""
        mix = rng.random() < 0.5
        return HalfDraws(lam=rng.beta(1, 1), permutation=rng.permutation(batch), mix=mix)

    def _mix(self, model: Model, images: Tensor, labels: Tensor, draws: HalfDraws, saliency: Tensor | None) -> Mixed:
        """``images`` [B, 3, H, W] and ``labels`` [B], mixed if ``draws.mix``; ``model`` is ignored.

        Raises:
            ValueError: mean and std are not known.
        """
        if not draws.mix:
            return self.unmixed(images, labels)
        permutation = as_index(draws.permutation, images.device)
        height, width = images.shape[2:]
        leader = self._bytes(images[permutation[:1]])
        row, col = saliency_peak(fine_grained_saliency(leader)[0])
        mixed, ratio, mask = paste_box(images, permutation, peak_box(height, width, float(draws.lam), row, col))
        return self.mixed(
            mixed,
            mixed_targets(labels, permutation, ratio, self.num_classes),
            partner=images[permutation],
            mask=mask.expand(images[:, 0].shape),
        )

    def _bytes(self, images: Tensor) -> Tensor:
        """Normalised [B, 3, H, W] as uint8 pixels."""
        mean, std = (channels(tuple(255 * v for v in colour), images.device) for colour in self.colours())
        pixels = (images * std + mean).round().clamp(0, 255).to(torch.uint8)
        return pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
