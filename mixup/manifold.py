"""Mixup of activations: Verma et al., "Manifold mixup: Better representations by interpolating hidden states",
ICML 2019."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .base import Mixed, Model, PairDraws, PartialMixing, Step, alpha, as_share, mixed_targets, partner_index
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
    mixup_alpha: float = alpha(2.0, tiny=0.2)

    def _draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int) -> ManifoldDraws:
        """λ, a permutation of the last m images, and where to mix, uniform over the input and all points."""
        lam, permutation = self.draw_lam(rng), self.draw_permutation(rng, batch, epoch)
        places = MIXING_POINTS if self.points is None else 1 + len(self.points)
        return ManifoldDraws(lam, permutation, mix_at=int(rng.integers(places)))

    def _mix(self, model: Model, images: Tensor, labels: Tensor, draws: Any, saliency: Tensor | None) -> Mixed:
        """There are no mixed images.

        Raises:
            ValueError: always; it names ``step``.
        """
        raise ValueError(
            "Manifold Mixup mixes inside the network and has no mixed images: use step(model, images, labels, draws)"
        )

    def step(
        self, model: Model, images: Tensor, labels: Tensor, draws: Any = None, *, saliency: Tensor | None = None
    ) -> Step:
        """``images`` [B, C, H, W] mixed on their way through the network, ``labels`` [B], and the loss.

        Raises:
            ValueError: ``draws.mix_at`` is no mixing point of the network, the network has none, or the output of that
                point was not mixed exactly once.
        """
        labels, draws = self._checked(images, labels, draws, saliency)
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

    def _forward(self, model: Model, images: Tensor, mix_at: int, mix: Callable[[Tensor], Tensor]) -> Tensor:
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
    """Within the block, ``module`` gives its output through ``mix``; ``ValueError`` unless it did so exactly once."""
    times, recorded = 0, torch.is_grad_enabled()

    def hook(module: nn.Module, inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(f"the output of a {type(module).__name__} is a {type(output).__name__}, not one tensor")
        nonlocal times
        times += 1
        if torch.is_grad_enabled() != recorded:
            raise ValueError("Manifold Mixup's points do not go with reentrant checkpointing: use_reentrant=False")
        return mix(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if times != 1:
        raise ValueError(
            f"the output of the {type(module).__name__} in points was mixed {times} times, not once: is it a module of "
            "this network, not of a copy, does it run once a pass, and is the network not compiled?"
        )
