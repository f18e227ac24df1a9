"""No mixing: the clean loss every other method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from .base import Method, Mixed


@dataclass
class NoDraws:
    """Nothing is random here."""


@dataclass
class Vanilla(Method):
    """Plain training on the images as they are."""

    name = "vanilla"
    title = "Vanilla"
    recordable = True

    def draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int = 0) -> NoDraws:
        """Nothing."""
        return NoDraws()

    def mix(self, model: nn.Module, images: Tensor, labels: Tensor, draws: Any = None) -> Mixed:
        """``images`` [B, C, H, W] and ``labels`` [B] as they are; ``model`` and ``draws`` are ignored."""
        return self.unmixed(images, labels)
