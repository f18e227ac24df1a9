"""Co-Mixup: every output may take its cells from any image of its part of the batch.

Kim, Choo, Jeong & Song, "Co-Mixup: Saliency Guided Joint Mixup with Supermodular Diversity", ICLR 2021.
An image is cut into G = g×g cells. The outputs of a part of n images are found one after the other, each by a grid cut
over n labels ("this cell from image i") that wants salient cells, few seams, and inputs the other outputs do not use;
from the second round on some labels are soft and mean half of one image and half of another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from .base import PartialMixing, Step, bce_loss, one_hot
from .gridcut import DISTANCE_SCALE, UNARY_SCALE, scale_floats, solver
from .saliency import input_gradient, ones_where_zero, root_mean_square
from .vanilla import Vanilla

PEAK_WINDOW = 8  # pixels a side over which saliency is averaged before its peak is taken
SOFT_BONUS = 5e-4  # what a soft label costs less than the mean of its two images
SOFT_DISTANCE = 0.25  # between a soft label and either of its images
UNUSED = 2**62  # energy of a soft label that does not exist: above any other


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


def assign(
    saliency: Tensor,
    *,
    prior: ArrayLike | Tensor,
    initial_labels: ArrayLike | Tensor,
    compatibility: ArrayLike | Tensor,
    num_blocks: int = 4,
    beta: float = 0.32,
    gamma: float = 1.0,
    eta: float = 0.05,
    threshold: float = 0.83,
    threshold_type: str = "hard",
    set_resolve: bool = True,
    iterations: int = 4,
) -> Tensor:
    """Which images make up each cell of each output; the grid cuts run on the host.

    Args:
        saliency: [n, H, W] ≥ 0. Like all arrays here it may have a dimension of P parts in front, which are
            independent of each other and faster together than one by one.
        prior: [n] shares of the images (a Dirichlet draw): an image with a larger one is used more.
        initial_labels: [n, g, g] integers in 0 … n−1, where every output starts.
        compatibility: [n, n], of ``compatibility``.
        num_blocks: g, cells a side; it divides H and W.
        beta: weight of seams between cells.
        gamma: weight of the penalty on inputs that other outputs use.
        eta: weight of the prior.
        threshold: share of G an image's use may reach before it is penalised.
        threshold_type: "hard": the whole use counts then; "soft": what exceeds the threshold.
        set_resolve: tell outputs apart that use identical sets of images, before the last round.
        iterations: most rounds over all outputs.

    Returns:
        [n, g, g, n] float32 on saliency's device: shares of the n images (last) in each output (first) and cell, each
        0, ½ or 1, summing to 1 over the images.

    Raises:
        ValueError: wrong shape, label, threshold_type, or blocks that do not divide the image.
    """
    settings = (num_blocks, beta, gamma, eta, threshold, threshold_type, set_resolve, iterations)
    first, second = _sources(saliency, prior, initial_labels, compatibility, *settings)
    return torch.from_numpy(_dense(first, second, saliency.shape[-3])).to(saliency.device)


def co_mix(
    images: Tensor,
    targets: Tensor,
    saliency: Tensor,
    *,
    prior: ArrayLike | Tensor,
    initial_labels: ArrayLike | Tensor,
    compatibility: ArrayLike | Tensor,
    num_blocks: int = 4,
    beta: float = 0.32,
    gamma: float = 1.0,
    eta: float = 0.05,
    threshold: float = 0.83,
    threshold_type: str = "hard",
    set_resolve: bool = True,
    iterations: int = 4,
) -> tuple[Tensor, Tensor]:
    """Mix one part of a batch, or P parts of equal size at once.

    Args:
        images: [n, C, H, W] or [P, n, C, H, W].
        targets: [n, K] or [P, n, K], e.g. one-hot rows.
        saliency and all settings: as in ``assign``.

    Returns:
        (mixed, mixed targets), shaped like images and targets. A part of one image comes back as it is.

    Raises:
        ValueError: wrong shape or value.

    >>> A = compatibility(saliency, omega=0.001)
    >>> prior, labels = rng.dirichlet([2.0] * len(images)), rng.integers(len(images), size=(len(images), 4, 4))
    >>> mixed, soft = co_mix(images, targets, saliency, prior=prior, initial_labels=labels, compatibility=A)
    """
    if images.ndim != saliency.ndim + 1 or (*images.shape[:-3], *images.shape[-2:]) != tuple(saliency.shape):
        raise ValueError(f"images {tuple(images.shape)} do not go with saliency {tuple(saliency.shape)}")
    if targets.shape[:-1] != images.shape[:-3]:
        raise ValueError(f"targets {tuple(targets.shape)} do not go with images {tuple(images.shape)}")
    settings = (num_blocks, beta, gamma, eta, threshold, threshold_type, set_resolve, iterations)
    sources = _sources(saliency, prior, initial_labels, compatibility, *settings)
    first, second = (_batch_index(x, images.shape[-4], images.device) for x in sources)
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


def _sources(
    saliency: Tensor,
    prior: ArrayLike | Tensor,
    initial_labels: ArrayLike | Tensor,
    compatibility: ArrayLike | Tensor,
    num_blocks: int,
    beta: float,
    gamma: float,
    eta: float,
    threshold: float,
    threshold_type: str,
    set_resolve: bool,
    iterations: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``assign`` as two image indices [.., n, g, g], each standing for half of the cell."""
    if saliency.ndim not in (3, 4) or 0 in saliency.shape:
        raise ValueError(f"saliency must be [n, H, W] or [P, n, H, W] and not empty, got {tuple(saliency.shape)}")
    *parts, n, height, width = saliency.shape
    g = num_blocks
    if g < 1 or height % g or width % g:
        raise ValueError(f"num_blocks {g} does not divide an image of {height}×{width}")
    if threshold_type not in ("hard", "soft"):
        raise ValueError(f"threshold_type must be hard or soft, got {threshold_type!r}")
    shares, start, matrix = _host(prior, np.float32), _host(initial_labels, np.int64), _host(compatibility, np.float32)
    for name, array, shape in (
        ("prior", shares, (*parts, n)),
        ("initial_labels", start, (*parts, n, g, g)),
        ("compatibility", matrix, (*parts, n, n)),
    ):
        if array.shape != shape:
            raise ValueError(f"{name} must be {shape} beside saliency {tuple(saliency.shape)}, got {array.shape}")
    if start.min() < 0 or start.max() >= n:
        raise ValueError(f"initial_labels must lie in 0 … {n - 1}, got {start.min()} … {start.max()}")
    if n == 1:
        return start, start

    cells = g * g
    # of the pictures only these n·G numbers go to the host
    pooled = _host(_pool(saliency, g), np.float32).reshape(-1, n, cells)
    cost = -pooled - (eta / cells * np.log(shares.reshape(-1, n, 1) + 1e-8))
    first, second = _minimise(
        np.ascontiguousarray(cost.transpose(0, 2, 1)),
        start.reshape(-1, n, cells),
        matrix.reshape(-1, n, n),
        beta / cells,
        gamma / cells,
        threshold * cells,
        threshold_type == "hard",
        set_resolve,
        iterations,
    )
    return first.reshape(start.shape), second.reshape(start.shape)


def _pool(saliency: Tensor, g: int) -> Tensor:
    """Maps [.., H, W] to their cells' shares [.., g, g]; a map without (finite) saliency counts as constant."""
    height, width = saliency.shape[-2:]
    pooled = F.avg_pool2d(saliency.reshape(-1, 1, height, width).float(), (height // g, width // g))
    total = pooled.sum(dim=(1, 2, 3), keepdim=True)
    pooled = torch.where(total.isfinite() & (total > 0), pooled / total, 1 / g**2)
    return pooled.reshape(*saliency.shape[:-2], g, g)


def _host(array: ArrayLike | Tensor, dtype: type) -> NDArray:
    return np.asarray(array.detach().cpu() if isinstance(array, Tensor) else array).astype(dtype, copy=False)


def _minimise(
    cost: NDArray[np.float32],
    start: NDArray[np.int64],
    matrix: NDArray[np.float32],
    beta: float,
    gamma: float,
    threshold: float,
    hard: bool,
    set_resolve: bool,
    iterations: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rounds over all outputs: cost [P, G, n], start [P, n, G], A [P, n, n] to two image indices [P, n, G].

    Parts do not see each other. They share the NumPy calls, most of whose cost is the call at this size.
    """
    parts, cells, n = cost.shape
    g = math.isqrt(cells)
    part = np.arange(parts)[:, None]
    sources = np.stack((start, start), axis=3)
    counts = _count(sources, n)  # [P, outputs, images]
    total = counts.sum(axis=1)
    extra = np.zeros((parts, n, n), np.float32)
    done, before = np.zeros(parts, np.bool_), np.full(parts, np.inf)

    # Labels 0 … n−1 are the images, n … n+2 soft: which two images one means differs from cut to cut.
    labels, soft = n + 3, n + np.arange(3)
    images = np.broadcast_to(np.arange(n)[:, None], (parts, n, 2))
    _, potts, down, across = scale_floats(
        0.0, 1 - np.eye(labels), np.full((g - 1, g), beta, np.float32), np.full((g, g - 1), beta, np.float32)
    )
    close = int(SOFT_DISTANCE * DISTANCE_SCALE)
    distance = np.tile(potts, (parts, 1, 1))
    seams = np.zeros((g, g), np.int64)  # weight of all edges of a cell
    for view, edges in ((seams[:-1], down), (seams[1:], down), (seams[:, :-1], across), (seams[:, 1:], across)):
        view += edges
    margin = (seams * DISTANCE_SCALE).reshape(cells, 1, 1)
    weight = max(int(down.max(initial=0)), int(across.max(initial=0)))
    down, across = down[None], across[None]

    for index in range(iterations):
        if index > 0:
            pairs_of, number_of = _soft_pairs(counts)
        for o in range(n):
            total -= counts[:, o]
            load = (matrix @ total[:, :, None])[:, :, 0]
            over = load > threshold
            modular = (matrix @ (total * over)[:, :, None])[:, :, 0] if hard else (load - threshold) * over
            unary = cost + 2 * gamma * modular[:, None] + gamma * extra[:, o, None]
            energy, images_of = (unary * UNARY_SCALE).astype(np.int64), images
            largest = int(np.abs(energy).max())
            if index > 0:
                pairs, number = pairs_of[:, o], number_of[:, o]
                both = unary[part[..., None, None], np.arange(cells)[:, None, None], pairs[:, None]]
                means = (((both[..., 0] + both[..., 1]) / 2 - SOFT_BONUS) * UNARY_SCALE).astype(np.int64)
                means = np.where(np.arange(3) < number[:, None], means, UNUSED)
                energy = np.concatenate((energy, means), axis=2)
                images_of = np.concatenate((images, pairs), axis=1)
                distance[:, n:] = potts[n:]
                for k in (0, 1):
                    distance[part, soft, pairs[:, :, k]] = close
                distance[:, :, n:] = distance[:, n:].transpose(0, 2, 1)
            by_cell = energy.swapaxes(0, 1)
            beats = (by_cell[:, :, None] > (by_cell + margin)[..., None]).all(axis=0)
            wins, loses = _bits(beats), _bits(beats.transpose(0, 2, 1))
            swap = solver(largest, weight, DISTANCE_SCALE, energy[0].size)
            active = np.flatnonzero(~done)
            chosen = np.empty((active.size, cells), np.int64)
            for row, p in enumerate(active):
                keep = _reachable(wins[p], loses[p])
                if keep.size > 1:
                    unaries = energy[p][:, keep].reshape(1, g, g, -1)
                    keep = keep[swap(unaries, distance[p][keep[:, None], keep], down, across).ravel()]
                chosen[row] = keep
            sources[active, o] = images_of[active[:, None], chosen]
            counts[:, o] = _count(sources[:, o], n)
            total += counts[:, o]

        if set_resolve and index == iterations - 2:
            extra = np.stack([_resolve(x) for x in counts])
        halves = sources.reshape(parts, n, g, g, 2)
        mask = _dense(halves[..., 0], halves[..., 1], n)
        value = _objective(cost, mask, counts, beta, gamma)
        done |= np.abs(before - value) < 1e-6 * np.abs(before)
        before = value
        if done.all():
            break
    return sources[..., 0], sources[..., 1]


def _count(sources: NDArray[np.int64], n: int) -> NDArray[np.float32]:
    """Cells [.., n] that each image has in outputs with sources [.., G, 2], half cells counting ½."""
    shape = (*sources.shape[:-2], n)
    rows = math.prod(shape[:-1])
    index = sources.reshape(rows, -1) + n * np.arange(rows)[:, None]
    return (np.bincount(index.ravel(), minlength=rows * n).reshape(shape) / 2).astype(np.float32)


def _soft_pairs(counts: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Images of the soft labels of outputs with ``counts`` [.., n]: [.., 3, 2], and how many of them exist [.., 1]."""
    n = counts.shape[-1]
    used = (counts > 0).sum(axis=-1)
    # the largest three; on ties what torch.topk picks is part of the reference
    largest = torch.topk(torch.from_numpy(counts), min(3, n)).indices.numpy()
    top = np.full((*used.shape, 3), n)
    top[..., : largest.shape[-1]] = largest
    top[used < 3, 2] = n
    top.sort(axis=-1)
    pairs = np.minimum(top, n - 1)[..., [[0, 1], [0, 2], [1, 2]]]
    return pairs, np.array([0, 0, 1, 3])[np.minimum(used, 3), None]


def _reachable(wins: list[int], loses: list[int]) -> NDArray[np.int64]:
    """Labels that α-β swap from all 0 can ever give to a cell; without the others it does the same, only sooner.

    Args:
        wins: [L]; bit b of the a-th integer is set where label a costs less than label b in every cell, by more than
            all edges there: then the swap of a and b gives all their cells to a.
        loses: the same transposed.

    Follows the pairs in the solver's order with the set of labels that may be in use. A label that wins against every
    other has all cells in the end: once it meets the label where the swap starts, only labels above it are in use
    beside it, until it meets these.
    """
    count = len(wins)
    for label, others in enumerate(wins):
        if others == (1 << count) - 1 ^ 1 << label:
            return np.array([label])
    ever = possible = 1
    starts = set()
    while possible not in starts:
        starts.add(possible)
        for a in range(count):
            rest = (1 << count) - (2 << a)  # labels above a that are still to come
            while rest:
                # the next pair that may change something
                movable = rest & (possible | ~wins[a]) if possible >> a & 1 else rest & possible & ~loses[a]
                if not movable:
                    break
                b = movable.bit_length() - 1
                rest &= (1 << b) - 1
                possible |= 1 << a | 1 << b
                if wins[a] >> b & 1:
                    possible ^= 1 << b
                elif loses[a] >> b & 1:
                    possible ^= 1 << a
                ever |= possible
        others = (1 << count) - 1 & ~possible
        if all(others & ~wins[a] == 0 for a in range(count) if possible >> a & 1):
            break  # what is left in use gives nothing away any more
    return np.array([label for label in range(count) if ever >> label & 1])


def _bits(rows: NDArray[np.bool_]) -> list[list[int]]:
    """Rows of booleans [P, L, L] to integers, the first column being the lowest bit."""
    count = rows.shape[1]
    return (rows @ np.array([1 << bit for bit in range(count)], np.int64 if count < 64 else object)).tolist()


def _resolve(counts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Extra costs [n, n] that tell outputs apart which use one set of at least two images."""
    extra = np.zeros_like(counts)
    twins: dict[bytes, list[int]] = {}
    for o, used in enumerate(counts > 0):
        twins.setdefault(used.tobytes(), []).append(o)
    for outputs in twins.values():
        used = np.flatnonzero(counts[outputs[0]])
        if used.size > 1:
            # for every two of them: the earlier is told off the lowest image, the later off the second
            extra[outputs[:-1], used[0]] = 1
            extra[outputs[1:], used[1]] = 1
    return extra


def _dense(first: NDArray[np.int64], second: NDArray[np.int64], n: int) -> NDArray[np.float32]:
    """Shares [.., n] of two image indices of any shape."""
    unit = np.eye(n, dtype=np.float32)
    return np.asarray((unit[first] + unit[second]) / 2, np.float32)


def _objective(
    cost: NDArray[np.float32], mask: NDArray[np.float32], counts: NDArray[np.float32], beta: float, gamma: float
) -> NDArray[np.float64]:
    """What the rounds lower, [P], of masks [P, outputs, g, g, images]."""
    parts, n, g = mask.shape[:3]
    unary = (cost.reshape(parts, 1, g, g, n) * mask).sum(axis=(1, 2, 3, 4), dtype=np.float64)
    seams = sum(np.square(np.diff(mask, axis=axis)).sum(axis=(1, 2, 3, 4), dtype=np.float64) for axis in (2, 3))
    together = np.square(counts.sum(axis=1)).sum(axis=1, dtype=np.float64)
    return unary + beta / 2 * seams + gamma * (together - np.square(counts).sum(axis=(1, 2), dtype=np.float64))


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
            sources = _sources(
                maps,
                prior,
                labels,
                compatibility(maps, self.m_omega),
                draws.num_blocks,
                self.m_beta,
                self.m_gamma,
                self.m_eta,
                self.m_thres,
                self.m_thres_type,
                self.set_resolve,
                self.m_niter,
            )
            indices.append([start + _batch_index(x, n, saliency.device) for x in sources])
        first, second = (torch.cat(x) for x in zip(*indices, strict=True))
        return first, second
