"""α-β swap on grids of labels: the discrete solver under Puzzle Mix and Co-Mixup.

Boykov, Veksler & Zabih, "Fast approximate energy minimization via graph cuts", PAMI 2001. The labels are the same
whatever finds them: gco-wrapper where it is installed, else OR-Tools' maximum flow or, in grids of up to 4×4 cells that
are solved each by itself, dynamic programming. All energies are integers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# What gco-wrapper multiplies float energies by before it truncates them; the edge and distance factors multiply to
# the unary one.
UNARY_SCALE, EDGE_SCALE, DISTANCE_SCALE = 100_000, 1_000, 100
GCO_LARGEST = 10_000_000  # above it gco aborts the process
PAIRS_AT_ONCE = 8  # of each of the grids that are solved side by side


class NoSolver(ImportError):
    """No installed solver can do it; the message says what to install."""


def swap(unary: ArrayLike, distance: ArrayLike, vertical: ArrayLike, horizontal: ArrayLike) -> NDArray[np.int64]:
    """Labels of low energy Σ unary + Σ over neighbours of weight·distance, by α-β swaps until none lowers it.

    Starts from label 0 everywhere and takes the pairs in gco's order, α ascending, β descending; where several cuts
    are minimal, as many cells as possible get α, which is what gco does. A batch ends when the sum of its energies
    stops falling; a grid with many ties can differ then from what it gets alone, at the same energy or lower.

    Args:
        unary: [H, W, L] or [B, H, W, L] integer cost of every label in every cell. A batch is solved as one graph,
            which is up to 28 times faster than one by one.
        distance: [L, L] integers, symmetric, not negative, 0 on the diagonal.
        vertical: [H−1, W] or [B, H−1, W] integer weight ≥ 0 between a cell and the one below.
        horizontal: [H, W−1] or [B, H, W−1] integer weight ≥ 0 between a cell and the one to its right.

    Returns:
        int64 labels, [H, W] or [B, H, W].

    Raises:
        ValueError: wrong shape, not integers, a negative or asymmetric term, or energies beyond 64 bits.
        NoSolver: no solver is installed, or only gco-wrapper and the energies exceed its 32 bits.
    """
    unary, distance, vertical, horizontal = (_integers(x) for x in (unary, distance, vertical, horizontal))
    if unary.ndim not in (3, 4) or 0 in unary.shape:
        raise ValueError(f"unary must be [H, W, L] or [B, H, W, L] and not empty, got {unary.shape}")
    *batch, height, width, labels = unary.shape
    for name, array, shape in (
        ("distance", distance, (labels, labels)),
        ("vertical", vertical, (*batch, height - 1, width)),
        ("horizontal", horizontal, (*batch, height, width - 1)),
    ):
        if array.shape != shape:
            raise ValueError(f"{name} must be {shape} beside unary {unary.shape}, got {array.shape}")
        if array.min(initial=0) < 0:
            raise ValueError(f"{name} must not be negative, got {array.min()}")
    if distance.diagonal().any() or (distance != distance.T).any():
        raise ValueError(f"distance must be symmetric and 0 on the diagonal, got {distance.tolist()}")
    if labels == 1:
        return np.zeros(unary.shape[:-1], np.int64)

    weight = max(int(vertical.max(initial=0)), int(horizontal.max(initial=0)))
    solve = solver(max(int(unary.max()), -int(unary.min())), weight, int(distance.max()), unary.size)
    if batch:
        return solve(unary, distance, vertical, horizontal)
    return solve(unary[None], distance, vertical[None], horizontal[None])[0]


def solver(unary: int, weight: int, distance: int, terms: int) -> Callable[..., NDArray[np.int64]]:
    """The solver to use: ``swap_gco`` or ``swap_ortools``, for many small grids that need no checks one by one.

    Args:
        unary, weight, distance: largest magnitudes there will be.
        terms: B·H·W·L.

    Raises:
        ValueError: energies beyond 64 bits.
        NoSolver: as ``swap``.
    """
    # Python's integers do not overflow. Twice what one cell and its four neighbours can cost bounds every capacity.
    largest = 2 * (unary + 4 * weight * distance)
    if largest * terms >= 2**62:
        raise ValueError(f"energies do not fit 64 bits: unary up to {largest} in {terms} terms")
    if largest < 2**31 and max(weight, distance) <= GCO_LARGEST and _gco() is not None:
        return swap_gco
    if _ortools() is not None:
        return swap_ortools
    if _gco() is not None:
        raise NoSolver(f"energies up to {largest} are too large for gco-wrapper; install ortools: pip install ortools")
    raise NoSolver("this method needs a grid cut solver; install one: pip install ortools")


def scale_floats(
    unary: ArrayLike, distance: ArrayLike, vertical: ArrayLike, horizontal: ArrayLike
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Float energies to the integers gco-wrapper would make of them: scaled in their own precision, then truncated.

    Arguments and results in the order of ``swap``.
    """
    scales = (UNARY_SCALE, DISTANCE_SCALE, EDGE_SCALE, EDGE_SCALE)
    first, second, third, fourth = (
        (np.asarray(x) * scale).astype(np.int64)
        for x, scale in zip((unary, distance, vertical, horizontal), scales, strict=True)
    )
    return first, second, third, fourth


def swap_gco(unary: NDArray, distance: NDArray, vertical: NDArray, horizontal: NDArray) -> NDArray[np.int64]:
    """``swap`` of a checked batch of at least two labels by gco-wrapper."""
    # Its C functions instead of its Python class, which takes longer than the cut itself of a small grid.
    gco = _gco()
    *shape, labels = unary.shape
    cells = unary.size // labels
    tail, head = _edges(tuple(shape))
    # gco keeps pointers to these
    data, smooth = np.ascontiguousarray(unary, np.intc), np.ascontiguousarray(distance, np.intc)
    weight = np.concatenate((vertical.ravel(), horizontal.ravel())).astype(np.intc)
    result, handle, energy = np.empty(cells, np.intc), ctypes.c_int(), ctypes.c_longlong()
    gco.CreateGeneralGraph(cells, labels, ctypes.byref(handle))
    gco.SetDataCost(handle, data.ctypes.data)
    gco.SetAllNeighbors(handle, tail.ctypes.data, head.ctypes.data, weight.ctypes.data, tail.size)
    gco.SetSmoothCost(handle, smooth.ctypes.data)
    gco.Swap(handle, -1, ctypes.byref(energy))
    gco.GetLabels(handle, result.ctypes.data)
    gco.DestroyGraph(handle)
    return result.astype(np.int64).reshape(shape)


def swap_ortools(unary: NDArray, distance: NDArray, vertical: NDArray, horizontal: NDArray) -> NDArray[np.int64]:
    """``swap`` of a checked batch by OR-Tools' maximum flow."""
    shape, count = unary.shape[:-1], unary.shape[-1]
    tail, head = _edges(shape)
    weight = np.concatenate((vertical.ravel(), horizontal.ravel()))
    pairs = [(alpha, beta) for alpha in range(count) for beta in range(count - 1, alpha, -1)]
    labels = np.zeros(shape, np.int64)

    def energy() -> int:
        seams = weight * distance[labels.ravel()[tail], labels.ravel()[head]]
        return int(np.take_along_axis(unary, labels[..., None], axis=-1).sum() + seams.sum())

    # A pair is solved only in grids that changed since it was solved last.
    changed, solved, clock = np.zeros(shape[0], np.int64), dict.fromkeys(pairs, -1), 0
    before, now = None, energy()
    while before is None or now < before:
        for alpha, beta in pairs:
            grids = changed > solved[alpha, beta]
            clock += 1
            solved[alpha, beta] = clock
            active = ((labels == alpha) | (labels == beta)) & grids[:, None, None]
            if not active.any():
                continue
            # what α saves in each cell, edges to other active cells aside
            between = distance[beta] - distance[alpha]
            between[[alpha, beta]] = 0
            saving = unary[..., beta] - unary[..., alpha] + _around(between[labels], vertical, horizontal)
            inner = active.ravel()[tail] & active.ravel()[head]
            sink = _sink_side(
                np.where(active, saving, 0).ravel(), tail[inner], head[inner], weight[inner] * distance[alpha, beta]
            )
            new = np.where(active, np.where(sink.reshape(shape), beta, alpha), labels)
            changed[(new != labels).any(axis=(1, 2))] = clock
            labels = new
        before, now = now, energy()
    return labels


def _around(values: NDArray, vertical: NDArray, horizontal: NDArray) -> NDArray:
    """Sum over the neighbours of each cell of ``values`` [B, H, W], times the weight of the edge to them."""
    total = np.zeros_like(values)
    total[:, :-1] += vertical * values[:, 1:]
    total[:, 1:] += vertical * values[:, :-1]
    total[:, :, :-1] += horizontal * values[:, :, 1:]
    total[:, :, 1:] += horizontal * values[:, :, :-1]
    return total


def _sink_side(saving: NDArray, tail: NDArray, head: NDArray, capacity: NDArray) -> NDArray[np.bool_]:
    """The smallest sink side of a minimum cut. A node pays its ``saving`` [N] there, or −saving at the source."""
    max_flow = _ortools()
    # An edge that costs c when cut either way is an arc of 2c whose tail pays c at the sink, and whose head −c:
    # half as many arcs.
    saving = saving.copy()
    np.add.at(saving, tail, capacity)
    np.subtract.at(saving, head, capacity)
    source, sink = saving.size, saving.size + 1
    wins, loses = np.flatnonzero(saving > 0), np.flatnonzero(saving < 0)
    flow = max_flow.SimpleMaxFlow()
    flow.add_arcs_with_capacity(
        np.concatenate((tail, np.full(wins.size, source), loses)).astype(np.int32),
        np.concatenate((head, wins, np.full(loses.size, sink))).astype(np.int32),
        np.concatenate((2 * capacity, saving[wins], -saving[loses])),
    )
    status = flow.solve(source, sink)
    if status != flow.OPTIMAL:
        raise RuntimeError(f"maximum flow failed with {status}")
    side = np.zeros(saving.size + 2, np.bool_)
    side[flow.get_sink_side_min_cut()] = True
    return side[:-2]


def swap_each(
    unary: NDArray, distance: NDArray, vertical: NDArray, horizontal: NDArray, allowed: Sequence[NDArray[np.int64]]
) -> NDArray[np.int64]:
    """``swap`` of every grid of a batch as if it were alone, each with its labels.

    By gco-wrapper one by one where it is installed, else side by side. Grids of up to 4×4 cells need no solver.

    Args:
        unary: [B, H, W, L] integers.
        distance: [B, L, L] integers, symmetric, not negative, 0 on the diagonal.
        vertical, horizontal: [H−1, W] and [H, W−1] integers ≥ 0, the same for all grids.
        allowed: the labels that each grid may use, ascending; it starts from the first.

    Returns:
        int64 labels [B, H, W].

    Raises:
        ValueError, NoSolver: as ``solver``.
    """
    grids, height, width, count = unary.shape
    cells = height * width
    largest = max(int(unary.max()), -int(unary.min()))
    weight, furthest = max(int(vertical.max(initial=0)), int(horizontal.max(initial=0))), int(distance.max())
    narrow = width <= 4 and cells <= 16
    # Side by side, sums must be exact in doubles, and leave room in 64 bits for one bit a cell.
    exact = 2 * (largest + 4 * weight * furthest) * cells * (cells * count + 1) < 2**46
    if _gco() is None and exact and (narrow or _ortools() is not None):
        return _swap_side_by_side(unary, distance, vertical, horizontal, allowed, _cut_narrow if narrow else _cut_flow)
    solve = solver(largest, weight, furthest, cells * count)
    found = np.empty((grids, height, width), np.int64)
    for b, labels in enumerate(allowed):
        if labels.size > 1:
            terms = unary[b][None, :, :, labels], distance[b][labels[:, None], labels]
            labels = labels[solve(*terms, vertical[None], horizontal[None])[0]]
        found[b] = labels
    return found


def _swap_side_by_side(
    unary: NDArray,
    distance: NDArray,
    vertical: NDArray,
    horizontal: NDArray,
    allowed: Sequence[NDArray[np.int64]],
    cut: Callable[[NDArray, NDArray, NDArray], NDArray[np.bool_]],
) -> NDArray[np.int64]:
    """``swap_each`` where every grid goes through its pairs at its own pace, a few pairs in each turn of the loop.

    ``cut`` finds which cells take β in N pairs, given what α saves in each cell [H, W, N] and the weights of the edges
    [H−1, W, N] and [H, W−1, N].
    """
    grids, height, width, _ = unary.shape
    cells, grid = height * width, np.arange(grids)
    names, alone, table, scale = _tables(unary.reshape(grids, cells, -1), distance, allowed)
    count = names.shape[1]
    if count == 1:
        return np.broadcast_to(names[:, None], (grids, height, width))
    alphas, betas, order = _pairs(count)
    edges = _adjacency(vertical, horizontal)
    vertical, horizontal = vertical[..., None].astype(np.float64), horizontal[..., None].astype(np.float64)

    labels = np.zeros((cells, grids), np.int64)
    place = np.arange(cells * grids).reshape(cells, grids) * 2 * count
    # Pairs are numbered in their order. A grid's round continues with those after ``solved`` and before ``end``.
    solved, end, moved_last = np.full(grids, -1), np.full(grids, order.size), np.full(grids, -1)
    going, before = np.ones(grids, np.bool_), np.full(grids, np.inf)
    while True:
        own = table[grid, labels]
        around = (edges @ own.reshape(cells, -1)).reshape(own.shape)
        around[..., count:] += alone  # now what each label costs while the neighbours keep theirs
        here = place + labels
        paid = around.take(here + count)
        movable = _movable(own, around, around.take(here), paid)[:, alphas, betas]
        to_come = movable & (order > solved[:, None]) & (order < end[:, None])
        over = going & ~to_come.any(axis=1)
        if over.any():  # these go round again if their energy fell
            energy = (alone.take(place // 2 + labels) + paid).sum(axis=0) // (2 * scale)
            going &= ~over | (energy < before)
            over &= going
            before[over], solved[over], end[over] = energy[over], -1, moved_last[over]
            to_come[over] = (movable & (order < end[:, None]))[over]
            if not to_come.any():
                return names[grid, labels].T.reshape(grids, height, width)

        # The next pairs of every grid at once. What comes after the first that moves something is solved in vain.
        at, pair = (to_come & (to_come.cumsum(axis=1) <= PAIRS_AT_ONCE)).nonzero()
        alpha, beta, old = alphas[pair], betas[pair], labels[:, at]
        active = (old == alpha) | (old == beta)
        apart = table[at, alpha, count + beta]
        # what α saves in each cell, edges to other active cells aside
        saving = around[:, at, count + beta] - around[:, at, count + alpha]
        saving += (around[:, at, beta] - around[:, at, alpha]) * apart
        inner = active.reshape(height, width, -1)
        seams = inner * apart
        down, across = vertical * inner[:-1] * seams[1:], horizontal * inner[:, :-1] * seams[:, 1:]
        takes_beta = cut((saving * active).reshape(inner.shape), down, across).reshape(cells, -1)
        new = np.where(active, np.where(takes_beta, beta, alpha), old)
        solved[at] = pair  # of each grid the last stays
        moved = (new != old).any(axis=0).nonzero()[0][::-1]
        at, pair = at[moved], pair[moved]  # and from here the first
        labels[:, at], solved[at], moved_last[at], end[at] = new[:, moved], pair, pair, order.size


def _tables(
    unary: NDArray, distance: NDArray, allowed: Sequence[NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray, NDArray, float]:
    """A grid's labels counted from 0, as doubles.

    Returns:
        names: [B, L'] which label each is, ``allowed`` in a table.
        alone: [cells, B, L'] its cost aside from edges, times ``scale``; infinite where a grid has fewer.
        table: [B, L', 2L'] what a cell adds to the sums of its neighbours: which label it has, and how far each label
            is from that, times ``scale``.
        scale: more than the sum of the little that a higher label costs in addition, so that of two labellings of
            equal energy the one with more of the lower label wins.
    """
    grids, cells, _ = unary.shape
    count, grid = max(x.size for x in allowed), np.arange(grids)[:, None]
    names, missing = np.zeros((grids, count), np.int64), np.ones((grids, count), np.bool_)
    for b, labels in enumerate(allowed):
        names[b, : labels.size], missing[b, : labels.size] = labels, False
    scale = float(cells * count + 1)
    alone = np.take_along_axis(unary, names[:, None], axis=2).swapaxes(0, 1) * scale
    alone += np.where(missing, np.inf, np.arange(count))
    table = np.empty((grids, count, 2 * count))
    table[..., :count] = np.eye(count)
    table[..., count:] = distance[grid[..., None], names[:, :, None], names[:, None]] * scale
    return names, alone, table, scale


def _movable(own: NDArray, around: NDArray, within: NDArray, paid: NDArray) -> NDArray:
    """[B, L, L]: False where the swap of a pair certainly leaves a grid as it is.

    That is where no cell of either label gains by taking the other, be it spared the edges to its own label: an upper
    bound on its part in the gain of any group of cells.
    """
    count = own.shape[2] // 2
    most = within[..., None] * own[..., count:] + paid[..., None]
    gains = (most > around[..., count:]).astype(np.float64)
    some = own[..., :count].transpose(1, 2, 0) @ gains.transpose(1, 0, 2)
    return some + some.transpose(0, 2, 1) > 0


def _adjacency(vertical: NDArray, horizontal: NDArray) -> NDArray[np.float64]:
    """Weights of the edges between all cells of a grid, [H·W, H·W]."""
    height, width = len(horizontal), vertical.shape[1]
    index = np.arange(height * width).reshape(height, width)
    edges = np.zeros((index.size, index.size))
    edges[index[:-1], index[1:]], edges[index[:, :-1], index[:, 1:]] = vertical, horizontal
    return edges + edges.T


def _cut_narrow(saving: NDArray, vertical: NDArray, horizontal: NDArray) -> NDArray[np.bool_]:
    """The cheapest shares of N narrow grids, exactly: row by row over all 2^W ways to share a row's cells."""
    height, width, _ = saving.shape
    ways, across, change, who = _ways(height, width)
    # The energy stands in the high bits of a number, in the low ones which cells take β: the least tells both.
    rows = (ways @ saving + across @ horizontal).astype(np.int64) << height * width
    rows += who
    changes = (ways @ vertical).astype(np.int64) << height * width
    best = rows[0]
    for r in range(1, height):
        steps = np.take(changes[r - 1], change, axis=0)
        steps += best[:, None]
        best = np.minimum.reduce(steps) + rows[r]
    return (np.minimum.reduce(best) >> np.arange(height * width)[:, None] & 1).astype(np.bool_)


@cache
def _ways(height: int, width: int) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """The 2^W ways to share a row's cells: which cells take β, which edges are cut, the way by which two of them
    differ, and their bits in each row [H, 2^W, 1]."""
    way = np.arange(2**width)
    ways = (way[:, None] >> np.arange(width) & 1).astype(np.float64)
    bits = way[:, None] << width * np.arange(height)[:, None, None]
    return ways, np.abs(np.diff(ways, axis=1)), way[:, None] ^ way, bits


def _cut_flow(saving: NDArray, vertical: NDArray, horizontal: NDArray) -> NDArray[np.bool_]:
    """The cheapest shares of N grids by OR-Tools, as one graph."""
    node = np.arange(saving.size).reshape(saving.shape)
    tail = np.concatenate((node[:-1].ravel(), node[:, :-1].ravel()))
    head = np.concatenate((node[1:].ravel(), node[:, 1:].ravel()))
    capacity = np.concatenate((vertical.ravel(), horizontal.ravel())).astype(np.int64)
    real = capacity > 0
    return _sink_side(saving.ravel().astype(np.int64), tail[real], head[real], capacity[real])


@cache
def _pairs(count: int) -> tuple[NDArray, NDArray, NDArray]:
    """α and β of all pairs of ``count`` labels in the solver's order, and their numbers."""
    alpha, beta = np.array([(a, b) for a in range(count) for b in range(count - 1, a, -1)]).T
    return alpha, beta, np.arange(alpha.size)


@lru_cache(maxsize=64)
def _edges(shape: tuple[int, ...]) -> tuple[NDArray, NDArray]:
    """Cell indices at both ends of the vertical, then the horizontal edges of grids [B, H, W]; none joins two grids."""
    cell = np.arange(np.prod(shape), dtype=np.intc).reshape(shape)
    tail = np.concatenate((cell[:, :-1].ravel(), cell[:, :, :-1].ravel()))
    head = np.concatenate((cell[:, 1:].ravel(), cell[:, :, 1:].ravel()))
    return tail, head


def _integers(array: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(array)
    if array.dtype.kind not in "iu":
        raise ValueError(f"energies must be integers, got {array.dtype}")
    return array.astype(np.int64)


@cache
def _gco() -> Any:
    """gco-wrapper's C functions, or None. A broken build counts as none: it may fail in any way on import."""
    try:
        from gco.cgco import _cgco
    except Exception:
        return None
    number, pointer = ctypes.c_int, ctypes.c_void_p
    signatures = {
        "CreateGeneralGraph": (number, number, pointer),
        "SetDataCost": (number, pointer),
        "SetAllNeighbors": (number, pointer, pointer, pointer, number),
        "SetSmoothCost": (number, pointer),
        "Swap": (number, number, pointer),
        "GetLabels": (number, pointer),
        "DestroyGraph": (number,),
    }
    # plain pointers: the wrapper's own checks of every array take as long as setting up a small grid
    return SimpleNamespace(
        **{name: ctypes.CFUNCTYPE(number, *types)((f"gco{name}", _cgco)) for name, types in signatures.items()}
    )


@cache
def _ortools() -> Any:
    """OR-Tools' maximum flow module, or None."""
    try:
        from ortools.graph.python import max_flow
    except ImportError:
        return None
    return max_flow
