"""Mixup of whole images: Zhang et al., "mixup: Beyond empirical risk minimization", ICLR 2018."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import Mixed, Model, PairDraws, PartialMixing, alpha, as_share, mixed_targets, partner_index, partners


def mix_images(images: Tensor, permutation: Any, lam: Any) -> Tensor:
    """λ·x + (1 − λ)·x[P], computed in float32, returned in the type of ``images``.

    Args:
        images: [B, …] images or activations.
        permutation: [B] integers, array or tensor; an image that is its own partner comes back as it is.
        lam: λ in [0, 1], a number or a tensor of one.

    Raises:
        ValueError: the permutation has another length, or λ as a number is out of range.
    """
    if not isinstance(lam, Tensor) and not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1]: {lam}")
    mixed = torch.lerp(partners(images, permutation).float(), images.float(), as_share(lam, images.device))
    return mixed.to(images.dtype)


@dataclass
class InputMixup(PartialMixing):
    """Mixup of the input as a training method; settings as in ``PartialMixing``."""

    name = "input"
    title = "Mixup"
    recordable = True
    mixup_alpha: float = alpha(1.0, tiny=0.2)

    def _draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int) -> PairDraws:
        """λ, and a permutation of the last m images."""
        return PairDraws(self.draw_lam(rng), self.draw_permutation(rng, batch, epoch))

    def _mix(self, model: Model, images: Tensor, labels: Tensor, draws: PairDraws, saliency: Tensor | None) -> Mixed:
        """Mixed ``images`` [B, C, H, W] and ``labels`` [B]; ``model`` is ignored."""
        if len(draws.permutation) == 0:
            return self.unmixed(images, labels)
        permutation = partner_index(draws.permutation, len(images), images.device)
        lam = as_share(draws.lam, images.device)
        return self.mixed(
            mix_images(images, permutation, lam),
            mixed_targets(labels, permutation, lam, self.num_classes),
            partner=images[permutation],
            mask=lam.reshape(1, 1, 1).expand(images[:, 0].shape),
        )
