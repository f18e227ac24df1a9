"""SAGE: saliency-guided mixup with optimal rearrangements (Ma, Dvornik, Zhang, Pishdad, Derpanis, Fazly; BMVC 2022).

Image b of every pair is moved by the offset at which the two overlaid saliency maps keep most of their
mass (``mixup.search``); then the two images are blended pixel by pixel in the proportion of their saliency.

    >>> a, b = lam * saliency, (1 - lam) * saliency[permutation]  # each map of sum 1 before
    >>> offsets = best_offsets(a, b)
    >>> mixed, ratio = blend(images, images[permutation], a, b, offsets)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .base import Method, Mixed, Model, alpha, as_index, check_logits, kept, laid_out_as, mixed_rows, one_hot
from .saliency import mean_magnitude, ones_where_zero, saliency_pass
from .search import best_offsets, check_pair, moved
from .settings import setting


def blend(images_a: Tensor, images_b: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Image a and the moved image b, weighted pixel by pixel by their saliency.

    Args:
        images_a, images_b: [B, C, H, W]; images_b already permuted, not yet moved.
        a, b: [B, H, W], as in ``best_offsets``.
        offsets: [B, 2] integers (dy, dx) on the same device.

    Returns:
        (mixed [B, C, H, W], ratio [B]: the mean weight of image a). Where image b left the frame it counts as 0.

    Raises:
        ValueError: wrong shapes.
    """
    check_pair(a, b)
    if images_a.ndim != 4 or images_a.shape != images_b.shape or images_a[:, 0].shape != a.shape:
        raise ValueError(
            f"images must be two [B, C, H, W] for saliency {tuple(a.shape)}, "
            f"not {tuple(images_a.shape)} and {tuple(images_b.shape)}"
        )
    if offsets.shape != (len(a), 2):
        raise ValueError(f"offsets must be [{len(a)}, 2], not {tuple(offsets.shape)}")
    # an offset that leaves no overlap shows nothing of image b, however far it goes
    height, width = a.shape[1:]
    near = torch.stack([offsets[:, 0].clamp(-height, height), offsets[:, 1].clamp(-width, width)], dim=1)
    mixed, mask = _blend(images_a, a, torch.cat([b[:, None], images_b], dim=1), near)
    return mixed, mask.mean(dim=(1, 2))


def _blend(images_a: Tensor, a: Tensor, of_b: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed images, and the mask M = A/(A + B') [B, H, W]; ``of_b`` [B, 1 + C, H, W] is B in front of the images b."""
    of_b = moved(of_b, offsets[:, None])[:, :, 0]
    least = max(1e-16, torch.finfo(a.dtype).tiny)  # 1e-16 is 0 in float16
    mask = a / (a + of_b[:, 0]).clamp(min=least)
    return torch.lerp(of_b[:, 1:], images_a, mask[:, None]), mask


def gaussian_blur(maps: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """[B, H, W] under a normalised Gaussian of ``kernel_size`` (odd) pixels, borders reflected without the edge."""
    weights = _gaussian(kernel_size, sigma, maps.dtype, maps.device)
    padded = F.pad(maps[:, None], (kernel_size // 2,) * 4, mode="reflect")
    with torch.autocast(maps.device.type, enabled=False):
        return F.conv2d(F.conv2d(padded, weights[None, None, :, None]), weights[None, None, None, :])[:, 0]


@kept
def _gaussian(kernel_size: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[kernel_size] weights of sum 1."""
    margin = kernel_size // 2
    x = torch.arange(-margin, margin + 1, dtype=dtype, device=device)
    return torch.softmax(-0.5 * (x / sigma) ** 2, dim=0)


@dataclass
class SageDraws:
    """λ, the pairs, and the offsets that compete.

    Attributes:
        lam: share of image a's saliency, in [0, 1].
        permutation: [B]; image i is mixed with image ``permutation[i]``.
        candidates: [K, 2] distinct offsets (dy, dx), the same for all pairs; None: every offset.
    """

    lam: float
    permutation: NDArray[np.int64]
    candidates: NDArray[np.int64] | None = None


@dataclass
class Sage(Method):
    """SAGE as a training method: a clean pass whose input gradient is the saliency, then a pass over the mixed images.

    Settings:
        mixup_alpha: α of λ ~ upper_lambda·Beta(α, α), one λ a batch; 0: always ½·upper_lambda.
        upper_lambda: largest share of image a.
        blur_sigma, kernel_size: Gaussian blur of the saliency, in pixels; the size is odd.
        eval_mode: clean pass with the network in eval mode.
        rand_pos: share of all (2H−1)(2W−1) offsets that compete, drawn anew for each batch; 1 searches all of them.
        update_ratio: r, the loss being (1 − r)·L(clean) + r·L(mixed).
    """

    name = "sage"
    title = "SAGE"
    recordable = takes_saliency = True
    mixup_alpha: float = alpha(1.0)
    blur_sigma: float = setting(1.0, "σ of the Gaussian blur of the saliency, in pixels", above=0)
    kernel_size: int = setting(5, "its width in pixels, odd", low=1)
    eval_mode: bool = setting(False, "clean pass in evaluation mode")
    rand_pos: float = setting(0.5, "share of all offsets that are searched; 1 searches every one", above=0, high=1)
    update_ratio: float = setting(1.0, "share of the mixed loss; the rest is the clean loss", low=0, high=1)
    upper_lambda: float = setting(1.0, "λ is this times the Beta draw", above=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd: {self.kernel_size}")

    def _draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int) -> SageDraws:
        """λ, a permutation of the batch, and the candidates."""
        self._check_size(height, width)
        lam = self.upper_lambda * (rng.beta(self.mixup_alpha, self.mixup_alpha) if self.mixup_alpha > 0 else 0.5)
        draws = SageDraws(lam, rng.permutation(batch))
        if self.rand_pos < 1:
            rows, columns = 2 * height - 1, 2 * width - 1
            count = max(1, math.floor(rows * columns * self.rand_pos))
            index = rng.choice(rows * columns, size=count, replace=False)
            draws.candidates = np.stack([index // columns - (height - 1), index % columns - (width - 1)], axis=1)
        return draws

    def _mix(self, model: Model, images: Tensor, labels: Tensor, draws: SageDraws, saliency: Tensor | None) -> Mixed:
        """Mixed ``images`` [B, C, H, W] and ``labels`` [B]; the clean loss weighs 1 − r, the mixed one r.

        ``draws.lam`` may be a number, a tensor of one, or [B, 1, 1]: one for each pair.

        Raises:
            ValueError: images too small for the blur.
        """
        self._check_size(*images.shape[2:])
        permutation = as_index(draws.permutation, images.device)
        clean = one_hot(labels, self.num_classes)
        share, clean_pass = self.update_ratio, None
        if saliency is None:
            gradient, clean_pass = saliency_pass(
                model,
                images,
                lambda logits: self.loss(check_logits(logits, *clean.shape), clean),
                1 - share,
                self.eval_mode,
            )
        with torch.no_grad():
            maps, share = (mean_magnitude(gradient), share) if saliency is None else (saliency.float(), 1.0)
            saliency = ones_where_zero(gaussian_blur(maps, self.kernel_size, self.blur_sigma))
            unit = saliency / saliency.sum(dim=(1, 2), keepdim=True)
            lam = draws.lam.to(unit.dtype) if isinstance(draws.lam, Tensor) else float(draws.lam)
            share_a, share_b = _floored(lam), _floored(1 - lam)
            # image b and its maps are looked up, and moved, as channels of one tensor: fewer launches on a GPU
            of_b = torch.cat([saliency[:, None], unit[:, None], images], dim=1)[permutation]
            a, b = share_a * unit, of_b[:, 1].mul_(share_b)
            mixed, mask = _blend(images, a, of_b[:, 1:], best_offsets(a, b, draws.candidates))
            targets = mixed_rows(clean, permutation, mask.mean(dim=(1, 2)))
            return self.mixed(
                laid_out_as(mixed, images),
                targets,
                clean_pass,
                share=share,
                partner=of_b[:, 2:],
                saliency=(saliency, of_b[:, 0]),
                mask=mask,
            )

    def _check_size(self, height: int, width: int) -> None:
        if min(height, width) <= self.kernel_size // 2:
            raise ValueError(f"images of {height}×{width} are too small for kernel_size {self.kernel_size}")


def _floored(share: Any) -> Any:
    """A share of mass, a number or a tensor, of at least 1e-12."""
    return share.clamp(min=1e-12) if isinstance(share, Tensor) else max(share, 1e-12)
