"""Mixup of activations: Verma et al., "Manifold mixup: Better representations by interpolating hidden states",
ICML 2019."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, nn

from .base import PartialMixing, Step, as_share, bce_loss, mixed_targets, partner_index
from .input import mix_images

MIXING_POINTS = 3  # the input, after the first stage, after the second


@dataclass
class ManifoldMixup(PartialMixing):
    """Manifold mixup as a training method; settings as in ``PartialMixing``. The network needs the models' hook
    ``forward(x, mix_at, mix)``."""

    name = "manifold"
    title = "Manifold Mixup"

    @classmethod
    def presets(cls, dataset: str) -> dict[str, Any]:
        """α = 0.2 for Tiny-ImageNet-200, else 2."""
        return {"mixup_alpha": 0.2 if dataset == "tiny-imagenet-200" else 2.0}

    def draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int = 0) -> SimpleNamespace:
        """``lam``, ``permutation`` [m] of the last m images, and the mixing point ``mix_at``."""
        return SimpleNamespace(
            lam=self.draw_lam(rng),
            permutation=rng.permutation(self.mixed_count(batch, epoch)),
            mix_at=int(rng.integers(MIXING_POINTS)),
        )

    def step(self, model: nn.Module, images: Tensor, labels: Tensor, draws: Any) -> Step:
        """Loss of ``images`` [B, C, H, W], ``labels`` [B], mixed on their way through the network.

        Raises:
            ValueError: ``draws.mix_at`` is not 0, 1 or 2.
        """
        if draws.mix_at not in range(MIXING_POINTS):
            raise ValueError(f"mix_at must be 0, 1 or 2: {draws.mix_at}")
        permutation = partner_index(draws.permutation, len(images), images.device)
        lam = as_share(draws.lam, images.device)

        # a function over tensors, so that torch.compile need not compile again for every λ
        def mix(activations: Tensor) -> Tensor:
            return mix_images(activations, permutation, lam)

        logits = model(images, int(draws.mix_at), mix)
        targets = mixed_targets(labels, permutation, lam, self.num_classes)
        return Step(bce_loss(logits, targets), logits, targets=targets, partner=images[permutation])
