"""Mixup of whole images: Zhang et al., "mixup: Beyond empirical risk minimization", ICLR 2018."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .base import PartialMixing, Step, as_share, bce_loss, mixed_targets, partner_index, partners


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

    @classmethod
    def presets(cls, dataset: str) -> dict[str, Any]:
        """α = 0.2 for Tiny-ImageNet-200, else 1."""
        return {"mixup_alpha": 0.2 if dataset == "tiny-imagenet-200" else 1.0}

    def draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int = 0) -> SimpleNamespace:
        """``lam`` and ``permutation`` [m] of the last m images."""
        return SimpleNamespace(lam=self.draw_lam(rng), permutation=rng.permutation(self.mixed_count(batch, epoch)))

    def step(self, model: nn.Module, images: Tensor, labels: Tensor, draws: Any) -> Step:
        """Loss of the mixed ``images`` [B, C, H, W], ``labels`` [B]."""
        permutation = partner_index(draws.permutation, len(images), images.device)
        lam = as_share(draws.lam, images.device)
        mixed = mix_images(images, permutation, lam)
        targets = mixed_targets(labels, permutation, lam, self.num_classes)
        logits = model(mixed)
        return Step(
            loss=bce_loss(logits, targets),
            logits=logits,
            targets=targets,
            mixed=mixed,
            partner=images[permutation],
            mask=lam.reshape(1, 1, 1).expand(images[:, 0].shape),
        )
