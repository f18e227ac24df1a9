"""Puzzle Mix (Kim, Choo & Song, "Puzzle Mix: Exploiting saliency and local statistics for optimal mixup", ICML 2020).

Every block of a pair takes one of a few mixing weights, chosen by a grid cut: each image shows where it is salient,
and neighbouring blocks fit together. Then both images' blocks move to where their image shows (transport).

    >>> mixed, ratio = puzzle_mix(images, saliency, permutation, lam=0.4, num_blocks=4, mean=mean, std=std)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .base import (
    BLOCK_COUNTS,
    Mixed,
    Model,
    PairDraws,
    PartialMixing,
    alpha,
    as_index,
    behind,
    channels,
    laid_out_as,
    mixed_targets,
    partner_index,
    to_device,
    to_host,
)
from .gridcut import swap
from .saliency import clean_weight, cross_entropy_maps, ones_where_zero
from .settings import check, setting
from .transport import move_blocks, transport_plan

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MaskSettings(TypedDict, total=False):
    """Keyword arguments of ``puzzle_mix`` and ``block_mask``; ``MaskValues`` has their meaning and defaults."""

    n_labels: int
    beta: float
    gamma: float
    eta: float
    neigh_size: int
    transport: bool
    t_eps: float
    t_size: int


@dataclass
class MaskValues:
    """All of ``MaskSettings``, checked; the defaults are the paper's for CIFAR.

    n_labels: how many mixing weights, equally spaced from 1 to 0.
    beta, gamma, eta: weight of smooth labels, of smooth images, and of the prior that λ gives.
    neigh_size: pixels are compared after average pooling by this much, or by the block where that is smaller.
    transport: move blocks; without it images stay as they are and only the mask is computed.
    t_eps: cost of moving a block across the image, relative to its saliency.
    t_size: pixels a side of a moved block, at most a mask block's; −1: a mask block.

    Raises:
        ValueError: a value out of range.
    """

    n_labels: int = setting(3, "mask values", low=2, high=256)
    beta: float = setting(1.2, "smoothness of the mask", low=0)
    gamma: float = setting(0.5, "smoothness of the mixed image", low=0)
    eta: float = setting(0.2, "weight of the prior", low=0)
    neigh_size: int = setting(4, "pooling of neighbour distances, in pixels", low=1)
    transport: bool = setting(True, "move blocks")
    t_eps: float = setting(0.8, "cost of moving a block", low=0)
    t_size: int = setting(
        4, "side of the blocks that move, in pixels; -1: the mask's blocks", low=1, besides=-1,
        presets={"tiny-imagenet-200": -1}, flag_default=-1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)


class Sizes(NamedTuple):
    """Pixels (rows, columns) of one mask block, of one pixel of the images that are compared, of one moved block."""

    block: tuple[int, int]
    pixel: tuple[int, int]
    moved: tuple[int, int]


def block_sizes(height: int, width: int, num_blocks: int, neigh_size: int, t_size: int) -> Sizes:
    """The sizes that ``num_blocks`` a side give an image; rectangular blocks where it is not square.

    Raises:
        ValueError: a size that does not divide the image or its blocks.
    """
    if num_blocks < 1 or height % num_blocks or width % num_blocks:
        raise ValueError(f"num_blocks {num_blocks} does not divide an image of {height}×{width}")
    block = (height // num_blocks, width // num_blocks)
    pixel = (min(neigh_size, block[0]), min(neigh_size, block[1]))
    moved = block if t_size == -1 else (min(t_size, block[0]), min(t_size, block[1]))
    for name, (rows, columns) in (("neigh_size", pixel), ("t_size", moved)):
        if block[0] % rows or block[1] % columns:
            raise ValueError(f"{name} {rows}×{columns} does not divide blocks of {block[0]}×{block[1]}")
    return Sizes(block, pixel, moved)


def puzzle_mix(
    images: Tensor,
    saliency: Tensor,
    permutation: Tensor,
    lam: float,
    num_blocks: int,
    mean: Any,
    std: Any,
    **settings: Unpack[MaskSettings],
) -> tuple[Tensor, Tensor]:
    """Puzzle Mix of every image with its partner.

    Args:
        images: [B, C, H, W] float32, normalised by ``mean`` and ``std`` ([C] or [1, C, 1, 1], for pixels in [0, 1]).
        saliency: [B, H, W] ≥ 0, of ``images``; a map of zeros counts as uniform.
        permutation: [B] int64; image b of pair i is ``images[permutation[i]]``.
        lam: share of image a, in [0, 1].
        num_blocks: n; the mask has n×n blocks of H/n × W/n pixels.
        settings: see ``MaskValues``.

    Returns:
        (mixed [B, C, H, W], ratio [B]: mean weight of image a).

    Raises:
        ValueError: wrong shape or setting, or a size that does not divide the image.
        NoSolver: no grid cut solver is installed.
    """
    permutation, values = as_index(permutation, images.device), MaskValues(**settings)
    mask = _mask(images, saliency, permutation, lam, num_blocks, mean, std, values)
    return _blend(images, images[permutation], saliency, permutation, mask, values)


def _blend(
    a: Tensor, b: Tensor, saliency: Tensor, permutation: Tensor, mask: Tensor, values: MaskValues
) -> tuple[Tensor, Tensor]:
    """Images a and b [B, C, H, W], their blocks moved if ``transport``, weighted by ``mask`` [B, n, n]; its mean."""
    height, width = a.shape[2:]
    if values.transport:
        size = block_sizes(height, width, mask.shape[1], 1, values.t_size).moved
        grid = _enlarge(mask, height // size[0], width // size[1])
        unary = _unary(saliency, size)
        plans = transport_plan(torch.cat((grid, 1 - grid)), torch.cat((unary, unary[permutation])), values.t_eps)
        a, b = move_blocks(torch.cat((a, b)), plans, size).chunk(2)
    weight = _enlarge(mask, height, width)[:, None]
    return torch.lerp(b, a, weight), mask.mean(dim=(1, 2))


@torch.no_grad()
def block_mask(
    images: Tensor,
    saliency: Tensor,
    permutation: Tensor,
    lam: float,
    num_blocks: int,
    mean: Any,
    std: Any,
    **settings: Unpack[MaskSettings],
) -> Tensor:
    """Weight of image a in each block: [B, n, n] float32 on the images' device. Arguments and errors as ``puzzle_mix``.

    Only the block energies leave the device, and labels come back.
    """
    permutation = as_index(permutation, images.device)
    return _mask(images, saliency, permutation, lam, num_blocks, mean, std, MaskValues(**settings))


def _mask(
    images: Tensor,
    saliency: Tensor,
    permutation: Tensor,
    lam: float,
    num_blocks: int,
    mean: Any,
    std: Any,
    values: MaskValues,
) -> Tensor:
    """``block_mask``, its settings in one object."""
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images must be [B, C, H, W] with B ≥ 1, got {tuple(images.shape)}")
    batch, _, height, width = images.shape
    if saliency.shape != (batch, height, width):
        raise ValueError(f"saliency must be {(batch, height, width)}, got {tuple(saliency.shape)}")
    if permutation.shape != (batch,):
        raise ValueError(f"permutation must be ({batch},), got {tuple(permutation.shape)}")
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")
    lam = float(lam)
    sizes = block_sizes(height, width, num_blocks, values.neigh_size, values.t_size if values.transport else -1)
    n = num_blocks
    beta = values.beta / n / 16
    unary = _unary(saliency, sizes.block)
    unary = torch.stack((unary[permutation], unary))  # of image b, of image a
    mean, std = (_channels(x, images) for x in (mean, std))
    pixels = F.avg_pool2d(images * std + mean, sizes.pixel)
    pixels = torch.stack((pixels, pixels[permutation]))
    weights = []
    for axis in (1, 2):
        # the pixels on both sides of every edge between blocks, along the axis
        k = sizes.block[axis - 1] // sizes.pixel[axis - 1]
        lines = pixels.transpose(3, axis + 2)
        before, after = (x.transpose(3, axis + 2) for x in (lines[:, :, :, k - 1 : -1 : k], lines[:, :, :, k::k]))
        # mean distance of the touching pixels of neighbouring blocks; first letter: the upper or left image
        steps = (before[:, None] - after).abs().mean(dim=3).unflatten(5 - axis, (n, -1)).mean(dim=6 - axis)
        (d_aa, d_ab), (d_ba, d_bb) = steps = steps * (beta * values.gamma)
        of_pairs = unary.transpose(2, axis + 1)
        of_pairs[:, :, :-1].add_((steps.sum(dim=1) / 2).transpose(2, axis + 1))  # those that have a next block
        of_pairs[:, :, 1:].add_((steps.sum(dim=0) / 2).transpose(2, axis + 1))  # and those that have a previous one
        weights.append((d_ab + d_ba - d_aa - d_bb) / 2 + beta)
    terms = to_host(torch.cat([x.flatten() for x in (unary, *weights)]))  # the one copy to the host
    return to_device(_weights_of_a(terms, batch, n, lam, values), images.device, images.dtype)


def _weights_of_a(
    terms: NDArray[np.float32], batch: int, n: int, lam: float, values: MaskValues
) -> NDArray[np.float32]:
    """The grid cuts: [B, n, n] from the blocks' energies of image b and image a [2, B, n, n] and the weights of the
    edges down [B, n−1, n] and across [B, n, n−1], all in one row."""
    n_labels, kind = values.n_labels, terms.dtype.type
    shapes = ((2, batch, n, n, 1), (batch, n - 1, n), (batch, n, n - 1))
    parts = np.split(terms, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
    (unary_b, unary_a), *weights = (part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
    steps = np.arange(n_labels)
    tau = steps.astype(kind) / kind(n_labels - 1)
    prior = np.array([-math.log(p + 1e-8) for p in _binomial(lam, n_labels - 1)], dtype=kind)
    unary = (1 - tau) * unary_b + tau * unary_a + kind(values.eta / n**2) * prior
    # NaN, of a network that diverged, must reach the loss and not stop here
    with np.errstate(invalid="ignore", over="ignore"):
        costs, vertical, horizontal = (np.nan_to_num(x * kind(1000 * n**2)).astype(np.int64) for x in (unary, *weights))
    labels = swap(
        costs * (n_labels - 1) ** 2,
        (steps[:, None] - steps) ** 2,
        np.maximum(vertical, 0),  # they are not negative while gamma ≤ 1 and pixels are in [0, 1]
        np.maximum(horizontal, 0),
    )
    weights_of_a = 1 - labels.astype(kind) / kind(n_labels - 1)
    lost = np.isnan(unary).any(axis=(1, 2, 3))
    for edges in weights:
        lost |= np.isnan(edges).any(axis=(1, 2))
    weights_of_a[lost] = np.nan
    return weights_of_a


def _channels(values: Any, images: Tensor) -> Tensor:
    """A number a channel, in the type and on the device of ``images``, as [C, 1, 1]."""
    if isinstance(values, (Tensor, np.ndarray)):
        return torch.as_tensor(values, dtype=images.dtype, device=images.device).reshape(-1, 1, 1)
    return channels(tuple(values), images.device).to(images.dtype)


def _unary(saliency: Tensor, size: tuple[int, int]) -> Tensor:
    """Saliency [B, H, W] averaged over blocks of ``size``, each map divided by its sum."""
    pooled = ones_where_zero(F.avg_pool2d(saliency[:, None], size)[:, 0])
    return pooled / pooled.sum(dim=(1, 2), keepdim=True)


def _enlarge(mask: Tensor, rows: int, columns: int) -> Tensor:
    batch, down, across = mask.shape
    wide = mask[:, :, None, :, None].expand(-1, -1, rows // down, -1, columns // across)
    return wide.reshape(batch, rows, columns)


def _binomial(lam: float, trials: int) -> list[float]:
    """Probability of 0, 1, … failures in ``trials`` of success λ."""
    return [math.comb(trials, k) * lam ** (trials - k) * (1 - lam) ** k for k in range(trials + 1)]


@dataclass
class PuzzleDraws(PairDraws):
    """``PairDraws``, the number of blocks a side, and with ``adv_p`` > 0 the adversarial perturbations.

    Attributes:
        num_blocks: one that divides the image.
        perturbed: whether image a and image b of the batch's pairs are.
        noise: [m, 3, H, W] in ±1, where they start; in units of adv_eps.
        strength: how much of the perturbation is used, in [0, 1].
    """

    num_blocks: int
    perturbed: Any = None
    noise: NDArray[np.float32] | None = None
    strength: float = 1.0


@dataclass
class PuzzleMix(MaskValues, PartialMixing):
    """Puzzle Mix as a training method: a pass whose input gradient is the saliency, then a pass over the mixed images.

    Settings in addition to those of ``PartialMixing`` and ``MaskValues``:
        clean_lam: 0: saliency of the network in eval mode. Above 0: in the modes its modules are in, and
            2·clean_lam·(mean cross-entropy)/K of that pass is part of the objective.
        adv_p: probability, for image a and for image b of a batch each, of an adversarial perturbation before mixing.
            The mask and the transport are those of the images without it.
        adv_eps: size of that perturbation, of 255.

    Needs ``mean`` and ``std``. Only the images that are mixed have a saliency pass.
    """

    name = "puzzle"
    title = "Puzzle Mix"
    takes_saliency = needs_colours = True
    mixup_alpha: float = alpha(1.0)
    clean_lam: float = clean_weight(presets={"tiny-imagenet-200": 1.0})
    adv_p: float = setting(0.0, "probability of the adversarial perturbation", low=0, high=1)
    adv_eps: float = setting(10.0, "size of the adversarial perturbation, of 255", low=0)

    def __post_init__(self) -> None:
        PartialMixing.__post_init__(self)

    def _draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int) -> PuzzleDraws:
        """λ, a permutation of the last m images, the number of blocks, and the perturbations.

        Raises:
            ValueError: none of 2, 4, 8, 16 blocks a side fits the image.
        """
        fitting = [n for n in BLOCK_COUNTS if self._fits(height, width, n)]
        if not fitting:
            near = [
                str(side)
                for side in range(max(2, min(height, width) - 16), max(height, width) + 17)
                if any(self._fits(side, side, n) for n in BLOCK_COUNTS)
            ]
            raise ValueError(
                f"none of {BLOCK_COUNTS} blocks a side, with neigh_size {self.neigh_size} and t_size {self.t_size}, "
                f"divides an image of {height}×{width}; sides that fit: {', '.join(near)}; or give "
                "neigh_size=1, t_size=-1"
            )
        lam, permutation = self.draw_lam(rng), self.draw_permutation(rng, batch, epoch)
        draws = PuzzleDraws(lam, permutation, num_blocks=int(rng.choice(fitting)))
        if self.adv_p > 0:
            draws.perturbed = rng.random(2) < self.adv_p
            if any(draws.perturbed):
                draws.noise = 2 * rng.random((len(permutation), 3, height, width), np.float32) - 1
                draws.strength = rng.random()
        return draws

    def _fits(self, height: int, width: int, num_blocks: int) -> bool:
        try:
            block_sizes(height, width, num_blocks, self.neigh_size, self.t_size if self.transport else -1)
        except ValueError:
            return False
        return True

    def _mix(self, model: Model, images: Tensor, labels: Tensor, draws: PuzzleDraws, saliency: Tensor | None) -> Mixed:
        """Mixed ``images`` [B, 3, H, W] and ``labels`` [B].

        Raises:
            ValueError: mean and std are not known, or the blocks do not fit the image.
            NoSolver: no grid cut solver is installed.
        """
        perturbed = getattr(draws, "perturbed", None)
        if saliency is not None and (self.adv_p > 0 or perturbed is not None):
            raise ValueError(f"adv_p {self.adv_p} needs the gradient of the network: it does not go with saliency=")
        clean = len(images) - len(draws.permutation)
        if clean == len(images):
            return self.unmixed(images, labels)
        permutation = partner_index(draws.permutation, len(images), images.device)
        part, partner = images[clean:], permutation[clean:] - clean
        attack = Attack(self, part, draws) if perturbed is not None and any(perturbed) else None
        maps, gradient, clean_pass = cross_entropy_maps(
            model,
            attack.start if attack else part,
            labels[clean:],
            weight=2 * self.clean_lam / self.num_classes,
            eval_mode=self.clean_lam == 0,
            known=None if saliency is None else saliency[clean:],
        )
        with torch.no_grad():
            saliency = ones_where_zero(maps)
            mask = _mask(part, saliency, partner, float(draws.lam), int(draws.num_blocks), *self.colours(), self)
            if attack is None or gradient is None:
                a, b = part, part[partner]
            else:
                a, b = attack.images(gradient, partner, perturbed)
            mixed, ratio = _blend(a, b, saliency, partner, mask, self)
            targets = mixed_targets(labels, permutation, behind(clean, ratio, 1.0), self.num_classes)
            return self.mixed(
                laid_out_as(behind(images[:clean], mixed), images),
                targets,
                clean_pass,
                partner=images[permutation],
                saliency=(behind(clean, saliency), behind(clean, saliency[partner])),
                mask=behind(clean, _enlarge(mask, *images.shape[2:]), 1.0),
            )


class Attack:
    """Adversarial perturbation of images [m, 3, H, W], as PuzzleMix's ``adv_p`` and ``adv_eps`` say.

    ``start``: the images at a random place within ±adv_eps/255, among valid pixels; the gradient is taken there.
    """

    def __init__(self, method: PuzzleMix, images: Tensor, draws: PuzzleDraws) -> None:
        self.mean, self.std = (channels(colour, images.device) for colour in method.colours())
        self.reach, self.push = method.adv_eps / 255, (method.adv_eps + 2) / 255
        self.given, self.pixels, self.strength = images, images * self.std + self.mean, float(draws.strength)
        noise = to_device(draws.noise, images.device, torch.float32)[:, : images.shape[1]] * self.reach
        self.noise = (self.pixels + noise).clamp(0, 1) - self.pixels
        self.start = images + self.noise / self.std

    def images(self, gradient: Tensor, partner: Tensor, perturbed: Any) -> tuple[Tensor, Tensor]:
        """Images a and b, perturbed where so drawn: a step along the sign of the gradient, clipped to ±adv_eps/255,
        times the strength, and clipped to valid pixels."""
        noise = (self.noise + self.push * gradient.sign()).clamp(-self.reach, self.reach) * self.strength
        attacked = ((self.pixels + noise).clamp(0, 1) - self.mean) / self.std
        a = attacked if perturbed[0] else self.given
        b = attacked if perturbed[1] else self.given
        return a, b[partner]
