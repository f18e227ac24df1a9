"""CutMix: Yun et al., "CutMix: Regularization strategy to train strong classifiers with localizable features",
ICCV 2019."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import Mixed, Model, PairDraws, PartialMixing, alpha, mixed_targets, partner_index, partners


def cut_box(height: int, width: int, lam: float, row: float, col: float) -> tuple[int, int, int, int]:
    """The box that is cut: sides √(1−λ)·H and √(1−λ)·W around a centre, clipped to the image.

    Args:
        height, width: of the image, in pixels.
        lam: λ in [0, 1], the share of image a before clipping.
        row, col: the centre in pixels, in [0, H] and [0, W].

    Returns:
        (top, bottom, left, right), bottom and right exclusive.

    Raises:
        ValueError: a value out of range.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1]: {lam}")
    if not (0 <= row <= height and 0 <= col <= width):
        raise ValueError(f"centre {(row, col)} lies outside of {height}×{width}")
    side = math.sqrt(1 - lam)
    return (
        int(max(row - side * height / 2, 0)),
        int(min(row + side * height / 2, height)),
        int(max(col - side * width / 2, 0)),
        int(min(col + side * width / 2, width)),
    )


def paste_box(images: Tensor, permutation: Any, box: tuple[Any, Any, Any, Any]) -> tuple[Tensor, Any, Tensor]:
    """Images with the pixels of their partners inside one box.

    Args:
        images: [B, C, H, W].
        permutation: [B] integers, array or tensor.
        box: (top, bottom, left, right) within the image, integers or tensors of one on the device of ``images``.

    Returns:
        (mixed [B, C, H, W]; ratio, the share of image a: a number, or a tensor if the box is; mask [H, W], 0 inside the
        box and 1 outside). Nothing waits for the device.

    Raises:
        ValueError: the permutation has another length than the batch.
    """
    top, bottom, left, right = box
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
    ratio = 1 - (bottom - top) * (right - left) / (height * width)
    return torch.where(inside, partners(images, permutation), images), ratio, (~inside).float()


@dataclass
class BoxDraws(PairDraws):
    """``PairDraws``, and the centre of the box in pixels: ``row`` in [0, H), ``col`` in [0, W)."""

    row: float
    col: float


@dataclass
class CutMix(PartialMixing):
    """CutMix as a training method, applied to every batch; settings as in ``PartialMixing``."""

    name = "cutmix"
    title = "CutMix"
    mixup_alpha: float = alpha(1.0, tiny=0.2)

    def _draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int) -> BoxDraws:
        """λ, a permutation of the last m images, and the centre of the box."""
        lam, permutation = self.draw_lam(rng), self.draw_permutation(rng, batch, epoch)
        return BoxDraws(lam, permutation, row=rng.uniform(0, height), col=rng.uniform(0, width))

    def _mix(self, model: Model, images: Tensor, labels: Tensor, draws: BoxDraws, saliency: Tensor | None) -> Mixed:
        """Mixed ``images`` [B, C, H, W] and ``labels`` [B]; ``model`` is ignored."""
        if len(draws.permutation) == 0:
            return self.unmixed(images, labels)
        permutation = partner_index(draws.permutation, len(images), images.device)
        height, width = images.shape[2:]
        box = cut_box(height, width, float(draws.lam), float(draws.row), float(draws.col))
        mixed, ratio, mask = paste_box(images, permutation, box)
        return self.mixed(
            mixed,
            mixed_targets(labels, permutation, ratio, self.num_classes),
            partner=images[permutation],
            mask=mask.expand(images[:, 0].shape),
        )
