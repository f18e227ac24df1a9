"""Co-Mixup: every output may take its cells from any image of its part of the batch.

Kim, Choo, Jeong & Song, "Co-Mixup: Saliency Guided Joint Mixup with Supermodular Diversity", ICLR 2021.
An image is cut into G = g×g cells. Which image each cell of each output is taken from is found by grid cuts
(``mixup.assignment``), which want salient cells, few seams, and inputs the other outputs do not use.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from .assignment import AssignSettings, sources
from .base import PartialMixing, Step, bce_loss, one_hot
from .saliency import input_gradient, ones_where_zero, root_mean_square
from .vanilla import Vanilla

if TYPE_CHECKING:
    from typing_extensions import Unpack

PEAK_WINDOW = 8  # pixels a side over which saliency is averaged before its peak is taken


def compatibility(saliency: Tensor, omega: float) -> Tensor:
    """How much using one image counts as using another: images whose saliency peaks far apart go well together.

    Args:
        saliency: [n, H, W], or [P, n, H, W] for P parts.
        omega: ω, weight of the distances.

    Returns:
        A = (1 − ω)I + ω·n·D/ΣD as [n, n] or [P, n, n], on saliency's device; D holds the L1 distances, in pixels,
        between the peaks of the 8×8 average of each map (a window no larger than the image). Without the second term
        where all peaks coincide.

    Raises:
        ValueError: wrong shape.
    """
    if saliency.ndim not in (3, 4) or 0 in saliency.shape:
        raise ValueError(f"saliency must be [n, H, W] or [P, n, H, W] and not empty, got {tuple(saliency.shape)}")
    *parts, n, height, width = saliency.shape
    smooth = F.avg_pool2d(
        saliency.reshape(-1, 1, height, width).float(), (min(PEAK_WINDOW, height), min(PEAK_WINDOW, width)), stride=1
    )
    peak = smooth.flatten(1).argmax(dim=1).reshape(*parts, n)
    position = torch.stack((peak // smooth.shape[3], peak % smooth.shape[3]), dim=-1)
    distance = (position[..., :, None, :] - position[..., None, :, :]).abs().sum(dim=-1).float()
    share = distance / distance.sum(dim=(-2, -1), keepdim=True).clamp(min=1) * n
    return (1 - omega) * torch.eye(n, device=saliency.device) + omega * share


def co_mix(
    images: Tensor,
    targets: Tensor,
    saliency: Tensor,
    *,
    prior: ArrayLike | Tensor,
    initial_labels: ArrayLike | Tensor,
    compatibility: ArrayLike | Tensor,
    **settings: Unpack[AssignSettings],
) -> tuple[Tensor, Tensor]:
    """Mix one part of a batch, or P parts of equal size at once.

    Args:
        images: [n, C, H, W] or [P, n, C, H, W].
        targets: [n, K] or [P, n, K], e.g. one-hot rows.
        saliency: [n, H, W] or [P, n, H, W] ≥ 0.
        prior, initial_labels, compatibility: as in ``mixup.assignment.assign``.
        settings: see ``mixup.assignment.AssignValues``.

    Returns:
        (mixed, mixed targets), shaped like images and targets. A part of one image comes back as it is.

    Raises:
        ValueError: wrong shape or value.
        NoSolver: no grid cut solver is installed.

    >>> A = compatibility(saliency, omega=0.001)
    >>> prior, labels = rng.dirichlet([2.0] * len(images)), rng.integers(len(images), size=(len(images), 4, 4))
    >>> mixed, soft = co_mix(images, targets, saliency, prior=prior, initial_labels=labels, compatibility=A)
    """
    if images.ndim != saliency.ndim + 1 or (*images.shape[:-3], *images.shape[-2:]) != tuple(saliency.shape):
        raise ValueError(f"images {tuple(images.shape)} do not go with saliency {tuple(saliency.shape)}")
    if targets.shape[:-1] != images.shape[:-3]:
        raise ValueError(f"targets {tuple(targets.shape)} do not go with images {tuple(images.shape)}")
    halves = sources(saliency, prior=prior, initial_labels=initial_labels, compatibility=compatibility, **settings)
    first, second = (_batch_index(x, images.shape[-4], images.device) for x in halves)
    mixed, mixed_targets = _blend(images.flatten(0, -4), targets.flatten(0, -2), first, second)
    return mixed.reshape(images.shape), mixed_targets.reshape(targets.shape)


def _batch_index(sources: NDArray[np.int64], n: int, device: torch.device) -> Tensor:
    """Image indices [.., n, g, g] within each part to indices [B, g, g] within the batch of all parts."""
    flat = sources.reshape(-1, n, *sources.shape[-2:])
    index = flat + n * np.arange(len(flat))[:, None, None, None]
    return torch.from_numpy(index.reshape(-1, *flat.shape[2:])).to(device, non_blocking=True)


def _blend(images: Tensor, targets: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Half of image ``first`` and half of image ``second`` [B, g, g] in every cell, and their targets alike."""
    # Picking pixels instead of a weighted sum over all images: exact where both halves are one image, and out of reach
    # of autocast and TF32.
    height, width = images.shape[-2:]
    halves = [images.gather(0, _enlarge(x, height, width)[:, None].expand_as(images)) for x in (first, second)]
    return (halves[0] + halves[1]) / 2, (targets[first] + targets[second]).mean(dim=(1, 2)) / 2


def _enlarge(cells: Tensor, height: int, width: int) -> Tensor:
    """[B, g, g] to [B, H, W]."""
    g = cells.shape[-1]
    return cells.repeat_interleave(height // g, dim=1).repeat_interleave(width // g, dim=2)


@dataclass
class CoMixup(PartialMixing):
    """Co-Mixup as a training method: a saliency pass in train mode, then a pass over the mixed images.

    Settings (defaults of the flags; see also ``PartialMixing``):
        mixup_alpha: of the symmetric Dirichlet draws, one a part; above 0.
        clean_lam: the weight gradient of 2·clean_lam·(mean cross-entropy)/K of the saliency pass is kept.
        m_block_num: cells a side; −1: 2, 4, 8 or 16 at random, of those that divide the image.
        m_part: images that are mixed among themselves, consecutive ones; the last part may be smaller.
        m_beta, m_gamma, m_eta, m_thres, m_thres_type, set_resolve, m_niter: beta, gamma, eta, threshold,
            threshold_type, set_resolve and iterations of ``co_mix``.
        m_omega: omega of ``compatibility``.
    """

    name = "comix"
    title = "Co-Mixup"
    clean_lam: float = 0.0
    m_block_num: int = 4
    m_part: int = 20
    m_beta: float = 0.32
    m_gamma: float = 1.0
    m_thres: float = 0.83
    m_thres_type: str = "hard"
    m_eta: float = 0.05
    m_omega: float = 0.001
    set_resolve: bool = True
    m_niter: int = 4

    @classmethod
    def presets(cls, dataset: str) -> dict[str, Any]:
        """α = 2, and the clean loss kept, everywhere."""
        return {"mixup_alpha": 2.0, "clean_lam": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixup_alpha == 0:
            raise ValueError("mixup_alpha must be positive: 0")
        if self.m_block_num != -1 and self.m_block_num < 1:
            raise ValueError(f"m_block_num must be positive, or -1 for a random one: {self.m_block_num}")
        if self.m_thres_type not in ("hard", "soft"):
            raise ValueError(f"m_thres_type must be hard or soft: {self.m_thres_type!r}")
        for name in ("m_part", "m_niter"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: {getattr(self, name)}")
        for name in ("clean_lam", "m_beta", "m_gamma", "m_eta", "m_omega"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")

    def draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int = 0) -> SimpleNamespace:
        """``num_blocks`` g, and part after part of the last m images: ``prior`` [m], which sums to 1 in each part, and
        ``initial_labels`` [m, g, g], which count from 0 in each part."""
        assert self.mixup_alpha is not None
        fitting = [g for g in (2, 4, 8, 16) if height % g == 0 and width % g == 0]
        if self.m_block_num == -1 and not fitting:
            raise ValueError(f"neither of 2, 4, 8, 16 blocks a side divides an image of {height}×{width}")
        g = int(rng.choice(fitting)) if self.m_block_num == -1 else self.m_block_num
        if height % g or width % g:
            raise ValueError(f"m_block_num {g} does not divide an image of {height}×{width}")
        count = self.mixed_count(batch, epoch)
        sizes = [min(self.m_part, count - start) for start in range(0, count, self.m_part)]
        return SimpleNamespace(
            num_blocks=g,
            prior=np.concatenate([rng.dirichlet(np.full(n, self.mixup_alpha)) for n in sizes] or [np.zeros(0)]),
            initial_labels=np.concatenate(
                [rng.integers(n, size=(n, g, g)) for n in sizes] or [np.zeros((0, g, g), int)]
            ),
        )

    def step(self, model: nn.Module, images: Tensor, labels: Tensor, draws: Any) -> Step:
        """Loss of the mixed ``images`` [B, C, H, W], ``labels`` [B].

        With clean_lam > 0 the saliency pass has added its weight gradient to the parameters' ``.grad`` when this
        returns. Leaves the network in train mode.
        """
        count = len(draws.prior)
        clean = len(images) - count
        if clean < 0:
            raise ValueError(f"draws for {count} images do not fit a batch of {len(images)}")
        if count == 0:
            return Vanilla(self.num_classes).step(model, images, labels)
        keep = self.clean_lam > 0
        scale = 2 * self.clean_lam / self.num_classes if keep else 1.0
        model.train()
        gradient, _ = input_gradient(
            model, images[clean:], lambda logits: scale * F.cross_entropy(logits.float(), labels[clean:]), float(keep)
        )
        with torch.no_grad():
            targets = one_hot(labels, self.num_classes)
            saliency = ones_where_zero(root_mean_square(gradient))
            first, second = self._assign(saliency, draws)
            mixed, soft = _blend(images[clean:], targets[clean:], first, second)
            mixed, targets = torch.cat((images[:clean], mixed)), torch.cat((targets[:clean], soft))
            own = torch.arange(count, device=images.device)[:, None, None]
            mask = _enlarge(((first == own).float() + (second == own)) / 2, *images.shape[2:])
        logits = model(mixed)
        front = (0, 0, 0, 0, clean, 0)
        saliency = F.pad(saliency, front)
        return Step(
            loss=bce_loss(logits, targets),
            logits=logits,
            targets=targets,
            mixed=mixed,
            saliency=(saliency, saliency),  # an output has more than one image b, and none has a map of its own
            mask=F.pad(mask, front, value=1.0),
        )

    def _assign(self, saliency: Tensor, draws: Any) -> tuple[Tensor, Tensor]:
        """Two images [m, g, g] for each cell, as indices into the m mixed images with these maps [m, H, W]."""
        count = len(saliency)
        full = count - count % self.m_part
        indices = []
        # the parts of full size at once, then the smaller one
        for start, end, n in ((0, full, self.m_part), (full, count, count - full)):
            if start == end:
                continue
            maps, prior, labels = (
                x[start:end].reshape(-1, n, *x.shape[1:]) for x in (saliency, draws.prior, draws.initial_labels)
            )
            halves = sources(
                maps,
                prior=prior,
                initial_labels=labels,
                compatibility=compatibility(maps, self.m_omega),
                num_blocks=draws.num_blocks,
                beta=self.m_beta,
                gamma=self.m_gamma,
                eta=self.m_eta,
                threshold=self.m_thres,
                threshold_type=self.m_thres_type,
                set_resolve=self.set_resolve,
                iterations=self.m_niter,
            )
            indices.append([start + _batch_index(x, n, saliency.device) for x in halves])
        first, second = (torch.cat(x) for x in zip(*indices, strict=True))
        return first, second
