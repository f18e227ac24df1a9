"""Co-Mixup: every output may take its cells from any image of its part of the batch.

Kim, Choo, Jeong & Song, "Co-Mixup: Saliency Guided Joint Mixup with Supermodular Diversity", ICLR 2021.
An image is cut into G = g×g cells. Which image each cell of each output is taken from is found by grid cuts
(``mixup.assignment``), which want salient cells, few seams, and inputs the other outputs do not use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .assignment import AssignSettings, AssignValues, sources
from .base import BLOCK_COUNTS, Mixed, Model, PartialMixing, alpha, behind, counting, laid_out_as, one_hot, to_device
from .saliency import clean_weight, cross_entropy_maps, ones_where_zero
from .settings import ANY, passed_on, setting, stands_for

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
    first, second = to_device(_batch_index(halves, images.shape[-4]), images.device)
    mixed, mixed_targets = _blend(images.flatten(0, -4), targets.flatten(0, -2), first, second)
    return mixed.reshape(images.shape), mixed_targets.reshape(targets.shape)


def _batch_index(halves: tuple[NDArray[np.int64], NDArray[np.int64]], n: int) -> NDArray[np.int64]:
    """Two image indices [.., n, g, g] within each part to indices [2, B, g, g] within the batch of all parts."""
    flat = np.stack(halves).reshape(2, -1, n, *halves[0].shape[-2:])
    index = flat + n * np.arange(flat.shape[1])[:, None, None, None]
    return index.reshape(2, -1, *flat.shape[3:])


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
class CoMixupDraws:
    """Blocks a side, and what each part of the batch starts from.

    Attributes:
        num_blocks: g.
        prior: [m] shares of the last m images, which sum to 1 in each part.
        initial_labels: [m, g, g] integers, which count from 0 in each part.
    """

    num_blocks: int
    prior: NDArray[np.float64]
    initial_labels: NDArray[np.int64]


@dataclass
class CoMixup(PartialMixing):
    """Co-Mixup as a training method: a saliency pass, then a pass over the mixed images.

    Settings in addition to those of ``PartialMixing``; see also ``mixup.assignment.AssignValues``:
        mixup_alpha: of the symmetric Dirichlet draws, one a part; above 0.
        clean_lam: 2·clean_lam·(mean cross-entropy)/K of the saliency pass is part of the objective.
        m_block_num: cells a side; −1: 2, 4, 8 or 16 at random, of those that divide the image.
        m_part: images that are mixed among themselves, consecutive ones; the last part may be smaller.
        m_omega: omega of ``compatibility``.
    """

    name = "comix"
    title = "Co-Mixup"
    takes_saliency = True
    mixup_alpha: float = alpha(2.0)
    clean_lam: float = clean_weight(presets={ANY: 1.0})
    m_block_num: int = setting(4, "blocks a side; -1: 2, 4, 8 or 16 at random", low=1, besides=-1)
    m_part: int = setting(20, "images that are mixed among themselves", low=1)
    m_beta: float = stands_for(AssignValues, "beta")
    m_gamma: float = stands_for(AssignValues, "gamma")
    m_thres: float = stands_for(AssignValues, "threshold")
    m_thres_type: str = stands_for(AssignValues, "threshold_type")
    m_eta: float = stands_for(AssignValues, "eta")
    m_omega: float = setting(0.001, "weight of the compatibility of distant saliency", low=0, high=1)
    set_resolve: bool = stands_for(AssignValues, "set_resolve")
    m_niter: int = stands_for(AssignValues, "iterations")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixup_alpha == 0:
            raise ValueError("mixup_alpha 0 is out of range: must be above 0")

    def _draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int) -> CoMixupDraws:
        """Blocks a side, and priors and initial labels part after part.

        Raises:
            ValueError: blocks that do not divide the image.
        """
        fitting = [g for g in BLOCK_COUNTS if height % g == 0 and width % g == 0]
        if self.m_block_num == -1 and not fitting:
            raise ValueError(f"none of {BLOCK_COUNTS} blocks a side divides an image of {height}×{width}")
        g = int(rng.choice(fitting)) if self.m_block_num == -1 else self.m_block_num
        if height % g or width % g:
            raise ValueError(f"m_block_num {g} does not divide an image of {height}×{width}")
        count = self.mixed_count(batch, epoch)
        sizes = [min(self.m_part, count - start) for start in range(0, count, self.m_part)]
        prior = [rng.dirichlet(np.full(n, self.mixup_alpha)) for n in sizes]
        labels = [rng.integers(n, size=(n, g, g)) for n in sizes]
        return CoMixupDraws(
            g, np.concatenate(prior or [np.zeros(0)]), np.concatenate(labels or [np.zeros((0, g, g), int)])
        )

    def _mix(self, model: Model, images: Tensor, labels: Tensor, draws: CoMixupDraws, saliency: Tensor | None) -> Mixed:
        """Mixed ``images`` [B, C, H, W] and ``labels`` [B].

        Raises:
            ValueError: draws that do not fit the batch, blocks that do not divide the image.
            NoSolver: no grid cut solver is installed.
        """
        count = len(draws.prior)
        clean = len(images) - count
        if count == 0:
            return self.unmixed(images, labels)
        weight = 2 * self.clean_lam / self.num_classes
        known = None if saliency is None else saliency[clean:]
        maps, _, clean_pass = cross_entropy_maps(model, images[clean:], labels[clean:], weight, False, known)
        with torch.no_grad():
            targets = one_hot(labels, self.num_classes)
            saliency = ones_where_zero(maps)
            first, second = self._assign(saliency, draws)
            mixed, soft = _blend(images[clean:], targets[clean:], first, second)
            own = counting(count, images.device)[:, None, None]
            mask = _enlarge(((first == own).float() + (second == own)) / 2, *images.shape[2:])
            saliency = behind(clean, saliency)
            return self.mixed(
                laid_out_as(behind(images[:clean], mixed), images),
                behind(targets[:clean], soft),
                clean_pass,
                saliency=(saliency, saliency),  # an output has more than one image b, and none has a map of its own
                mask=behind(clean, mask, 1.0),
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
                **passed_on(self),
            )
            indices.append(start + _batch_index(halves, n))
        first, second = to_device(np.concatenate(indices, axis=1), saliency.device)
        return first, second
