"""No mixing: the clean loss every other method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .base import Method, Mixed, Model


@dataclass
class NoDraws:
    """Nothing is random here."""


@dataclass
class Vanilla(Method):
    """Plain training on the images as they are."""

    name = "vanilla"
    title = "Vanilla"
    recordable = True

    def _draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int) -> NoDraws:
        """Nothing."""
        return NoDraws()

    def _mix(self, model: Model, images: Tensor, labels: Tensor, draws: Any, saliency: Tensor | None) -> Mixed:
        """``images`` [B, C, H, W] and ``labels`` [B] as they are; ``model`` and ``draws`` are ignored."""
        return self.unmixed(images, labels)
