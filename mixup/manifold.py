"""Mixup of activations: Verma et al., "Manifold mixup: Better representations by interpolating hidden states",
ICML 2019."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from .base import Mixed, PairDraws, PartialMixing, Step, alpha, as_share, mixed_targets, partner_index
from .input import mix_images

MIXING_POINTS = 3  # of this project's networks: the input, after the first stage, after the second


@dataclass
class ManifoldDraws(PairDraws):
    """``PairDraws``, and where to mix: 0 the input, k the k-th point inside the network."""

    mix_at: int


@dataclass
class ManifoldMixup(PartialMixing):
    """Manifold Mixup as a training method; settings as in ``PartialMixing``.

    A network of this project has a hook of its own, ``forward(x, mix_at, mix)``. For any other, say at whose output to
    mix: ``manifold.points = [model.layer1, model.layer2]``.

    Attributes:
        points: modules of the network, each with one tensor [B, …] as output; None for this project's networks.
    """

    name = "manifold"
    title = "Manifold Mixup"
    points = None
    mixup_alpha: float | None = alpha(2.0, tiny=0.2)

    def draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int = 0) -> ManifoldDraws:
        """λ, a permutation of the last m images, and where to mix, uniform over the input and all points."""
        lam, permutation = self.draw_lam(rng), self.draw_permutation(rng, batch, epoch)
        places = MIXING_POINTS if self.points is None else 1 + len(self.points)
        return ManifoldDraws(lam, permutation, mix_at=int(rng.integers(places)))

    def mix(self, model: nn.Module, images: Tensor, labels: Tensor, draws: Any) -> Mixed:
        """There are no mixed images.

        Raises:
            ValueError: always; it names ``step``.
        """
        raise ValueError(
            "Manifold Mixup mixes inside the network and has no mixed images: use step(model, images, labels, draws)"
        )

    def step(self, model: nn.Module, images: Tensor, labels: Tensor, draws: ManifoldDraws) -> Step:
        """``images`` [B, C, H, W] mixed on their way through the network, ``labels`` [B], and the loss.

        Raises:
            ValueError: ``draws.mix_at`` is no mixing point of the network, or the network has none.
        """
        if len(draws.permutation) == 0:
            mixed = self.unmixed(images, labels)
            logits = model(images)
            return Step(mixed.loss(logits), logits, mixed)
        permutation = partner_index(draws.permutation, len(images), images.device)
        lam = as_share(draws.lam, images.device)

        # a function over tensors, so that torch.compile need not compile again for every λ
        def mix(activations: Tensor) -> Tensor:
            return mix_images(activations, permutation, lam)

        logits = self._forward(model, images, int(draws.mix_at), mix)
        targets = mixed_targets(labels, permutation, lam, self.num_classes)
        mixed = self.mixed(None, targets, partner=images[permutation])
        return Step(mixed.loss(logits), logits, mixed)

    def _forward(self, model: nn.Module, images: Tensor, mix_at: int, mix: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of a pass with ``mix`` applied at ``mix_at``."""
        inner = getattr(model, "module", model)  # of DistributedDataParallel
        places = 1 + len(self.points) if self.points is not None else getattr(inner, "mixing_points", None)
        if places is None:
            raise ValueError(
                f"Manifold Mixup needs to know where in a {type(inner).__name__} to mix: set points, e.g. "
                "manifold.points = [model.layer1, model.layer2]"
            )
        if mix_at not in range(places):
            raise ValueError(f"mix_at must be {', '.join(map(str, range(places - 1)))} or {places - 1}: {mix_at}")
        if self.points is None:
            return model(images, mix_at, mix)
        if mix_at == 0:
            return model(mix(images))
        with mixed_output(self.points[mix_at - 1], mix):
            return model(images)


@contextmanager
def mixed_output(module: nn.Module, mix: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, ``module`` gives its output through ``mix``."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(f"the output of a {type(module).__name__} is a {type(output).__name__}, not one tensor")
        return mix(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
