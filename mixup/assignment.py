"""Which images make up each cell of each output of Co-Mixup: the minimisation, on the host.

The outputs of a part of n images are found one after the other, each by a grid cut over n labels ("this cell from
image i"); from the second round on some labels are soft and mean half of one image and half of another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .base import to_host
from .gridcut import DISTANCE_SCALE, UNARY_SCALE, scale_floats, swap_each
from .settings import check, setting

if TYPE_CHECKING:
    from typing_extensions import Unpack

SOFT_BONUS = 5e-4  # what a soft label costs less than the mean of its two images
SOFT_DISTANCE = 0.25  # between a soft label and either of its images


class AssignSettings(TypedDict, total=False):
    """Keyword arguments of ``assign`` and ``co_mix``; ``AssignValues`` has their meaning and defaults."""

    num_blocks: int
    beta: float
    gamma: float
    eta: float
    threshold: float
    threshold_type: str
    set_resolve: bool
    iterations: int


@dataclass
class AssignValues:
    """All of ``AssignSettings``, checked.

    num_blocks: g, cells a side; it divides H and W.
    beta: weight of seams between cells.
    gamma: weight of the penalty on inputs that other outputs use.
    eta: weight of the prior.
    threshold: share of G an image's use may reach before it is penalised.
    threshold_type: "hard": the whole use counts then; "soft": what exceeds the threshold.
    set_resolve: tell outputs apart that use identical sets of images, before the last round.
    iterations: most rounds over all outputs.

    Raises:
        ValueError: a value out of range.
    """

    num_blocks: int = setting(4, "blocks a side", low=1)
    beta: float = setting(0.32, "smoothness of the masks", low=0)
    gamma: float = setting(1.0, "diversity", low=0)
    eta: float = setting(0.05, "weight of the prior", low=0)
    threshold: float = setting(0.83, "threshold of the diversity term", low=0)
    threshold_type: str = setting("hard", "hard or soft threshold", choices=("hard", "soft"))
    set_resolve: bool = setting(True, "keep two outputs from using the same images")
    iterations: int = setting(4, "rounds", low=1)

    def __post_init__(self) -> None:
        check(self)


def assign(
    saliency: Tensor,
    *,
    prior: ArrayLike | Tensor,
    initial_labels: ArrayLike | Tensor,
    compatibility: ArrayLike | Tensor,
    **settings: Unpack[AssignSettings],
) -> Tensor:
    """Which images make up each cell of each output; the grid cuts run on the host.

    Args:
        saliency: [n, H, W] ≥ 0. Like all arrays here it may have a dimension of P parts in front, which are
            independent of each other and faster together than one by one.
        prior: [n] shares of the images (a Dirichlet draw): an image with a larger one is used more.
        initial_labels: [n, g, g] integers in 0 … n−1, where every output starts.
        compatibility: [n, n], of ``mixup.comix.compatibility``.
        settings: see ``AssignValues``.

    Returns:
        [n, g, g, n] float32 on saliency's device: shares of the n images (last) in each output (first) and cell, each
        0, ½ or 1, summing to 1 over the images.

    Raises:
        ValueError: wrong shape, label or setting, or blocks that do not divide the image.
        NoSolver: no grid cut solver is installed.
    """
    first, second = sources(
        saliency, prior=prior, initial_labels=initial_labels, compatibility=compatibility, **settings
    )
    return torch.from_numpy(_dense(first, second, saliency.shape[-3])).to(saliency.device)


def sources(
    saliency: Tensor,
    *,
    prior: ArrayLike | Tensor,
    initial_labels: ArrayLike | Tensor,
    compatibility: ArrayLike | Tensor,
    **settings: Unpack[AssignSettings],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``assign`` as two image indices [.., n, g, g], each standing for half of the cell."""
    values = AssignValues(**settings)
    if saliency.ndim not in (3, 4) or 0 in saliency.shape:
        raise ValueError(f"saliency must be [n, H, W] or [P, n, H, W] and not empty, got {tuple(saliency.shape)}")
    *parts, n, height, width = saliency.shape
    g = values.num_blocks
    if height % g or width % g:
        raise ValueError(f"num_blocks {g} does not divide an image of {height}×{width}")
    # of the pictures only these few numbers go to the host
    pooled, compatibility = _at_once(_pool(saliency, g), compatibility)
    shares, start, matrix = _host(prior, np.float32), _host(initial_labels, np.int64), _host(compatibility, np.float32)
    for name, array, shape in (
        ("prior", shares, (*parts, n)),
        ("initial_labels", start, (*parts, n, g, g)),
        ("compatibility", matrix, (*parts, n, n)),
    ):
        if array.shape != shape:
            raise ValueError(f"{name} must be {shape} for saliency {tuple(saliency.shape)}, got {array.shape}")
    if start.min() < 0 or start.max() >= n:
        raise ValueError(f"initial_labels must lie in 0 … {n - 1}, got {start.min()} … {start.max()}")
    if n == 1:
        return start, start

    cells = g * g
    cost = -_host(pooled, np.float32).reshape(-1, n, cells) - (
        values.eta / cells * np.log(shares.reshape(-1, n, 1) + 1e-8)
    )
    first, second = _minimise(
        np.ascontiguousarray(cost.transpose(0, 2, 1)), start.reshape(-1, n, cells), matrix.reshape(-1, n, n), values
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


def _at_once(pooled: Tensor, compatibility: Any) -> tuple[Any, Any]:
    """Both on the host, in one copy if they lie on a device."""
    if not isinstance(compatibility, Tensor) or compatibility.device.type == "cpu":
        return pooled, compatibility
    flat = to_host(torch.cat((pooled.flatten(), compatibility.flatten().to(pooled))))
    first, second = np.split(flat, [pooled.numel()])
    return first.reshape(pooled.shape), second.reshape(compatibility.shape)


def _minimise(
    cost: NDArray[np.float32], start: NDArray[np.int64], matrix: NDArray[np.float32], values: AssignValues
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rounds over all outputs: cost [P, G, n], start [P, n, G], A [P, n, n] to two image indices [P, n, G].

    Parts do not see each other. They share the NumPy calls, most of whose cost is the call at this size.
    """
    parts, cells, n = cost.shape
    g = math.isqrt(cells)
    beta, gamma = values.beta / cells, values.gamma / cells
    halves = np.stack((start, start), axis=3)  # the two images of each cell
    counts = _count(halves, n)  # [P, outputs, images]
    total = counts.sum(axis=1)
    extra = np.zeros((parts, n, n), np.float32)
    done, before = np.zeros(parts, np.bool_), np.full(parts, np.inf)
    # Labels 0 … n−1 are the images, n … n+2 soft: which two images one means differs from cut to cut.
    images = np.broadcast_to(np.arange(n)[:, None], (parts, n, 2))
    _, potts, down, across = scale_floats(
        0.0, 1 - np.eye(n + 3), np.full((g - 1, g), beta, np.float32), np.full((g, g - 1), beta, np.float32)
    )
    potts = np.broadcast_to(potts, (parts, n + 3, n + 3))
    margin = _edges_of_cells(down, across).reshape(cells, 1, 1) * DISTANCE_SCALE

    for index in range(values.iterations):
        if index > 0:
            pairs, number = _soft_pairs(counts)
        for o in range(n):
            total -= counts[:, o]
            penalty = _modular(matrix, total, values.threshold * cells, values.threshold_type == "hard")
            unary = cost + 2 * gamma * penalty[:, None] + gamma * extra[:, o, None]
            energy, meaning, distance = (unary * UNARY_SCALE).astype(np.int64), images, potts[:, :n, :n]
            if index > 0:
                absent = np.abs(energy).max() + margin.max() + 1  # beaten by every image in every cell
                soft = np.where(np.arange(3) < number[:, o, None], _soft_energy(unary, pairs[:, o]), absent)
                energy, meaning = np.concatenate((energy, soft), axis=2), np.concatenate((images, pairs[:, o]), axis=1)
                distance = _with_soft_distances(potts, pairs[:, o])
            active = np.flatnonzero(~done)
            energy = energy[active]
            grids = energy.reshape(active.size, g, g, -1)
            labels = swap_each(grids, distance[active], down, across, _within_reach(energy, margin))
            halves[active, o] = meaning[active[:, None], labels.reshape(-1, cells)]
            counts[:, o] = _count(halves[:, o], n)
            total += counts[:, o]

        if values.set_resolve and index == values.iterations - 2:
            extra = np.stack([_resolve(x) for x in counts])
        mask = _dense(halves[..., 0], halves[..., 1], n).reshape(parts, n, g, g, n)
        value = _objective(cost, mask, counts, beta, gamma)
        done |= np.abs(before - value) < 1e-6 * np.abs(before)
        before = value
        if done.all():
            break
    return halves[..., 0], halves[..., 1]


def _modular(
    matrix: NDArray[np.float32], total: NDArray[np.float32], threshold: float, hard: bool
) -> NDArray[np.float32]:
    """What images [P, n] cost beyond their own because the other outputs use them in ``total`` cells."""
    load = (matrix @ total[:, :, None])[:, :, 0]
    over = load > threshold
    return (matrix @ (total * over)[:, :, None])[:, :, 0] if hard else (load - threshold) * over


def _edges_of_cells(down: NDArray[np.int64], across: NDArray[np.int64]) -> NDArray[np.int64]:
    """Weight [g, g] of all edges of each cell."""
    seams = np.pad(down, ((0, 1), (0, 0))) + np.pad(down, ((1, 0), (0, 0)))
    return seams + np.pad(across, ((0, 0), (0, 1))) + np.pad(across, ((0, 0), (1, 0)))


def _soft_energy(unary: NDArray[np.float32], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Energy [P, G, 3] of the soft labels that mean these pairs [P, 3, 2] of images."""
    parts, cells, _ = unary.shape
    both = unary[np.arange(parts)[:, None, None, None], np.arange(cells)[:, None, None], pairs[:, None]]
    return (((both[..., 0] + both[..., 1]) / 2 - SOFT_BONUS) * UNARY_SCALE).astype(np.int64)


def _with_soft_distances(potts: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Distances [P, n+3, n+3] of labels the last three of which mean these pairs [P, 3, 2] of images."""
    distance, part, soft = potts.copy(), np.arange(len(potts))[:, None], np.arange(-3, 0)
    for image in (pairs[:, :, 0], pairs[:, :, 1]):
        distance[part, soft, image] = distance[part, image, soft] = int(SOFT_DISTANCE * DISTANCE_SCALE)
    return distance


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


def _within_reach(energy: NDArray[np.int64], margin: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Labels of each part that matter, of ``energy`` [P, G, L] and weights ``margin`` [G, 1, 1] of a cell's edges."""
    by_cell = np.ascontiguousarray(energy.swapaxes(0, 1))
    beats = np.logical_and.reduce(by_cell[:, :, None] > (by_cell + margin)[..., None])
    return [_reachable(*rows) for rows in zip(_bits(beats), _bits(beats.transpose(0, 2, 1)), strict=True)]


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
    if count <= 53:  # doubles hold the integers
        return (rows @ 2.0 ** np.arange(count)).astype(np.int64).tolist()
    return (rows @ np.array([1 << bit for bit in range(count)], object)).tolist()


def _resolve(counts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Extra costs [n, n] that tell outputs apart which use one set of at least two images."""
    extra = np.zeros_like(counts)
    twins: dict[bytes, list[int]] = {}
    for o, used in enumerate(counts > 0):
        twins.setdefault(used.tobytes(), []).append(o)
    for outputs in twins.values():
        used = np.flatnonzero(counts[outputs[0]])
        if used.size > 1:
            # for every two of them: the earlier pays for the lowest image, the later for the second
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
