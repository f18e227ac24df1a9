"""No mixing: the clean loss every other method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, nn

from .base import Method, Step, bce_loss, one_hot


@dataclass
class Vanilla(Method):
    """Plain training on the images as they are."""

    name = "vanilla"
    title = "Vanilla"
    recordable = True

    def draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int = 0) -> SimpleNamespace:
        """Nothing is random here."""
        return SimpleNamespace()

    def step(self, model: nn.Module, images: Tensor, labels: Tensor, draws: Any = None) -> Step:
        """Clean loss of ``images`` [B, C, H, W] and ``labels`` [B]; ``draws`` is ignored."""
        logits = model(images)
        targets = one_hot(labels, self.num_classes)
        return Step(bce_loss(logits, targets), logits, targets=targets, mixed=images)
