"""Puzzle Mix (Kim, Choo & Song, "Puzzle Mix: Exploiting saliency and local statistics for optimal mixup", ICML 2020).

Every block of a pair takes one of a few mixing weights, chosen by a grid cut: each image shows where it is salient,
and neighbouring blocks fit together. Then both images' blocks move to where their image shows (transport).

    >>> mixed, ratio = puzzle_mix(images, saliency, permutation, lam=0.4, num_blocks=4, mean=mean, std=std)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import PartialMixing, Step, as_index, bce_loss, mixed_targets, partner_index
from .gridcut import swap
from .saliency import input_gradient, ones_where_zero, root_mean_square
from .transport import move_blocks, transport_plan
from .vanilla import Vanilla

if TYPE_CHECKING:
    from typing_extensions import Unpack

BLOCK_COUNTS = (2, 4, 8, 16)


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


@dataclass(frozen=True)
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

    n_labels: int = 3
    beta: float = 1.2
    gamma: float = 0.5
    eta: float = 0.2
    neigh_size: int = 4
    transport: bool = True
    t_eps: float = 0.8
    t_size: int = 4

    def __post_init__(self) -> None:
        if self.n_labels < 2:
            raise ValueError(f"n_labels must be at least 2, got {self.n_labels}")
        for name in ("beta", "gamma", "eta", "t_eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if self.neigh_size < 1:
            raise ValueError(f"neigh_size {self.neigh_size} must be at least 1")
        if self.t_size < 1 and self.t_size != -1:
            raise ValueError(f"t_size {self.t_size} must be at least 1, or −1")


MASK_SETTINGS = tuple(MaskSettings.__annotations__)


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
        images: [B, C, H, W] float32, normalised by ``mean`` and ``std`` ([C] or [1, C, 1, 1], of 1).
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
    permutation = as_index(permutation, images.device)
    mask = block_mask(images, saliency, permutation, lam, num_blocks, mean, std, **settings)
    return _blend(images, images[permutation], saliency, permutation, mask, MaskValues(**settings))


def _blend(
    a: Tensor,
    b: Tensor,
    saliency: Tensor,
    permutation: Tensor,
    mask: Tensor,
    values: MaskValues,
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
    permutation, lam = as_index(permutation, images.device), float(lam)
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images must be [B, C, H, W] with B ≥ 1, got {tuple(images.shape)}")
    batch, _, height, width = images.shape
    if saliency.shape != (batch, height, width):
        raise ValueError(f"saliency must be {(batch, height, width)}, got {tuple(saliency.shape)}")
    if permutation.shape != (batch,):
        raise ValueError(f"permutation must be ({batch},), got {tuple(permutation.shape)}")
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")
    values = MaskValues(**settings)
    sizes = block_sizes(height, width, num_blocks, values.neigh_size, values.t_size if values.transport else -1)
    n, scale, n_labels = num_blocks, 1000 * num_blocks**2, values.n_labels
    beta = values.beta / n / 16

    unary_a = _unary(saliency, sizes.block)
    unary_b = unary_a[permutation]
    weights = []
    mean, std = (torch.as_tensor(x, dtype=images.dtype, device=images.device).reshape(1, -1, 1, 1) for x in (mean, std))
    pixels = F.avg_pool2d(images * std + mean, sizes.pixel)
    for axis in (1, 2):
        # the pixels on both sides of every edge between blocks, along the axis
        k = sizes.block[axis - 1] // sizes.pixel[axis - 1]
        inside = torch.arange(1, n, device=images.device) * k
        before, after = pixels.index_select(axis + 1, inside - 1), pixels.index_select(axis + 1, inside)

        def apart(p: Tensor, q: Tensor, axis: int = axis) -> Tensor:
            """Mean distance of the touching pixels of neighbouring blocks."""
            steps = (p - q).abs().mean(dim=1).unflatten(3 - axis, (n, -1)).mean(dim=4 - axis)
            return steps * (beta * values.gamma)

        # first letter: the upper or left image
        d_aa, d_ab, d_ba = apart(before, after), apart(before, after[permutation]), apart(before[permutation], after)
        d_bb = d_aa[permutation]
        has_next, has_previous = ((0, 0, 0, 1), (0, 0, 1, 0)) if axis == 1 else ((0, 1), (1, 0))
        unary_a = unary_a + F.pad((d_ba + d_bb) / 2, has_next) + F.pad((d_ab + d_bb) / 2, has_previous)
        unary_b = unary_b + F.pad((d_ab + d_aa) / 2, has_next) + F.pad((d_ba + d_aa) / 2, has_previous)
        weights.append((d_ab + d_ba - d_aa - d_bb) / 2 + beta)

    tau = torch.arange(n_labels, dtype=images.dtype) / (n_labels - 1)
    prior = torch.tensor([-math.log(p + 1e-8) for p in _binomial(lam, n_labels - 1)], dtype=images.dtype)
    tau, prior = torch.stack((tau, prior)).to(images.device, non_blocking=True)
    unary = (1 - tau) * unary_b[..., None] + tau * unary_a[..., None] + values.eta / n**2 * prior
    # One copy to the host. NaN, of a network that diverged, must reach the loss and not stop here.
    terms = torch.cat([(x * scale).flatten() for x in (unary, *weights)]).nan_to_num(0).long().cpu().numpy()
    shapes = (tuple(unary.shape), (batch, n - 1, n), (batch, n, n - 1))
    parts = np.split(terms, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
    costs, vertical, horizontal = (part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
    steps = np.arange(n_labels)
    labels = swap(
        costs * (n_labels - 1) ** 2,
        (steps[:, None] - steps) ** 2,
        np.maximum(vertical, 0),  # they are not negative while gamma ≤ 1 and pixels are in [0, 1]
        np.maximum(horizontal, 0),
    )
    return 1 - torch.from_numpy(labels).to(images.device, non_blocking=True).to(images.dtype) / (n_labels - 1)


def _unary(saliency: Tensor, size: tuple[int, int]) -> Tensor:
    """Saliency [B, H, W] averaged over blocks of ``size``, each map divided by its sum."""
    pooled = ones_where_zero(F.avg_pool2d(saliency[:, None], size)[:, 0])
    return pooled / pooled.sum(dim=(1, 2), keepdim=True)


def _enlarge(mask: Tensor, rows: int, columns: int) -> Tensor:
    return mask.repeat_interleave(rows // mask.shape[1], dim=1).repeat_interleave(columns // mask.shape[2], dim=2)


def _binomial(lam: float, trials: int) -> list[float]:
    """Probability of 0, 1, … failures in ``trials`` of success λ."""
    return [math.comb(trials, k) * lam ** (trials - k) * (1 - lam) ** k for k in range(trials + 1)]


@dataclass
class PuzzleMix(PartialMixing):
    """Puzzle Mix as a training method: a pass whose input gradient is the saliency, then a pass over the mixed images.

    Settings (defaults of the flags; ``mixup_alpha`` None means the preset) beside those of ``PartialMixing``:
        n_labels, beta, gamma, eta, neigh_size, transport, t_eps, t_size: see ``puzzle_mix``.
        clean_lam: 0: saliency of the network in eval mode, and its weight gradient is dropped. Above 0: in train mode,
            and the weight gradient of 2·clean_lam·(mean cross-entropy)/K is kept.
        adv_p: probability, for image a and for image b of a batch each, of an adversarial perturbation before mixing.
            The mask and the transport are those of the images without it.
        adv_eps: size of that perturbation, of 255.
        mean, std: [3] of 1, what the images are normalised with.

    Only the images that are mixed have a saliency pass.
    """

    name = "puzzle"
    title = "Puzzle Mix"
    n_labels: int = 3
    beta: float = 1.2
    gamma: float = 0.5
    eta: float = 0.2
    neigh_size: int = 4
    transport: bool = True
    t_eps: float = 0.8
    t_size: int = -1
    clean_lam: float = 0.0
    adv_p: float = 0.0
    adv_eps: float = 10.0
    mean: Sequence[float] = field(kw_only=True)
    std: Sequence[float] = field(kw_only=True)

    @classmethod
    def presets(cls, dataset: str) -> dict[str, Any]:
        """The paper's; Tiny-ImageNet-200 moves whole mask blocks and keeps the clean loss."""
        common = {"mixup_alpha": 1.0, "n_labels": 3, "beta": 1.2, "gamma": 0.5, "eta": 0.2}
        common |= {"neigh_size": 4, "transport": True, "t_eps": 0.8}
        if dataset == "tiny-imagenet-200":
            return common | {"t_size": -1, "clean_lam": 1.0}
        return common | {"t_size": 4, "clean_lam": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_labels < 2:
            raise ValueError(f"n_labels must be at least 2: {self.n_labels}")
        for name in ("beta", "gamma", "eta", "t_eps", "clean_lam", "adv_eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")
        if not 0 <= self.adv_p <= 1:
            raise ValueError(f"adv_p must lie in [0, 1]: {self.adv_p}")
        if self.neigh_size < 1:
            raise ValueError(f"neigh_size must be at least 1: {self.neigh_size}")
        if self.t_size < 1 and self.t_size != -1:
            raise ValueError(f"t_size must be at least 1, or -1: {self.t_size}")
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise ValueError(f"mean and std must have 3 values, std positive: {self.mean}, {self.std}")

    def draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int = 0) -> SimpleNamespace:
        """``lam``, ``permutation`` [m] of the last m images and ``num_blocks``, one that divides the image.

        With ``adv_p`` > 0 also ``perturbed``, whether image a and image b are, and if so ``noise`` [m, 3, H, W]
        uniform in ±1 and ``strength``, uniform in 0 … 1.

        Raises:
            ValueError: none of 2, 4, 8, 16 blocks a side fits the image.
        """
        fitting = [n for n in BLOCK_COUNTS if self._fits(height, width, n)]
        if not fitting:
            raise ValueError(
                f"none of {BLOCK_COUNTS} blocks a side, with neigh_size {self.neigh_size} and t_size {self.t_size}, "
                f"divides an image of {height}×{width}"
            )
        draws = SimpleNamespace(
            lam=self.draw_lam(rng),
            permutation=rng.permutation(self.mixed_count(batch, epoch)),
            num_blocks=int(rng.choice(fitting)),
        )
        if self.adv_p > 0:
            draws.perturbed = rng.random(2) < self.adv_p
            if draws.perturbed.any():
                draws.noise = 2 * rng.random((len(draws.permutation), 3, height, width), np.float32) - 1
                draws.strength = rng.random()
        return draws

    def _fits(self, height: int, width: int, num_blocks: int) -> bool:
        try:
            block_sizes(height, width, num_blocks, self.neigh_size, self.t_size if self.transport else -1)
        except ValueError:
            return False
        return True

    def step(self, model: nn.Module, images: Tensor, labels: Tensor, draws: Any) -> Step:
        """Loss of the mixed ``images`` [B, 3, H, W], ``labels`` [B]. Leaves the network in train mode.

        With ``clean_lam`` > 0 the saliency pass has added its weight gradient to the parameters' ``.grad``.
        """
        permutation = partner_index(draws.permutation, len(images), images.device)
        clean = len(images) - len(draws.permutation)
        if clean == len(images):
            return Vanilla(self.num_classes).step(model, images, labels)
        part, partner = images[clean:], permutation[clean:] - clean
        mean, std = (torch.as_tensor(x, device=images.device)[:, None, None] for x in (self.mean, self.std))
        perturbed = self.adv_p > 0 and any(draws.perturbed)
        reach = self.adv_eps / 255
        probe = part
        if perturbed:
            pixels = part * std + mean
            noise = torch.as_tensor(draws.noise, dtype=torch.float32).to(images.device) * reach
            noise = (pixels + noise).clamp(0, 1) - pixels
            probe = part + noise / std

        keep = self.clean_lam > 0
        scale = 2 * self.clean_lam / self.num_classes if keep else 1.0
        model.train(keep)
        gradient, _ = input_gradient(
            model, probe, lambda logits: scale * F.cross_entropy(logits.float(), labels[clean:]), float(keep)
        )
        model.train()

        with torch.no_grad():
            saliency = ones_where_zero(root_mean_square(gradient))
            settings: Any = {name: getattr(self, name) for name in MASK_SETTINGS}
            mask = block_mask(
                part, saliency, partner, draws.lam, int(draws.num_blocks), self.mean, self.std, **settings
            )
            a, b = part, part[partner]
            if perturbed:
                noise = (noise + (self.adv_eps + 2) / 255 * gradient.sign()).clamp(-reach, reach)
                noise = float(draws.strength) * noise / std
                a = a + noise * float(draws.perturbed[0])
                b = b + noise[partner] * float(draws.perturbed[1])
            mixed, ratio = _blend(a, b, saliency, partner, mask, MaskValues(**settings))
            mixed = torch.cat((images[:clean], mixed))
            targets = mixed_targets(labels, permutation, F.pad(ratio, (clean, 0), value=1.0), self.num_classes)
        logits = model(mixed)
        front = (0, 0, 0, 0, clean, 0)
        return Step(
            loss=bce_loss(logits, targets),
            logits=logits,
            targets=targets,
            mixed=mixed,
            partner=images[permutation],
            saliency=(F.pad(saliency, front), F.pad(saliency[partner], front)),
            mask=F.pad(_enlarge(mask, *images.shape[2:]), front, value=1.0),
        )
