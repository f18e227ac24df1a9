"""α-β swap on grids of labels: the discrete solver under Puzzle Mix and Co-Mixup.

Boykov, Veksler & Zabih, "Fast approximate energy minimization via graph cuts", PAMI 2001. Two solvers give the same
labels: gco-wrapper where it is installed, else OR-Tools' maximum flow. All energies are integers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# What gco-wrapper multiplies float energies by before it truncates them; the edge and distance factors multiply to
# the unary one.
UNARY_SCALE, EDGE_SCALE, DISTANCE_SCALE = 100_000, 1_000, 100
GCO_LARGEST = 10_000_000  # above it gco aborts the process


class NoSolver(RuntimeError):
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
    pairs = [(alpha, beta) for alpha in range(count) for beta in range(count - 1, alpha, -1)]
    tail, head = _edges(shape)
    weight = np.concatenate((vertical.ravel(), horizontal.ravel()))
    unary = unary.reshape(-1, count)
    cell = np.arange(len(unary))
    labels = np.zeros(len(unary), np.int64)
    # cost[i, l]: what label l costs cell i while its neighbours keep theirs
    cost = unary.copy()
    for this, other in ((tail, head), (head, tail)):
        np.add.at(cost, this, weight[:, None] * distance[labels[other]])

    def energy() -> int:
        return int((unary[cell, labels] + cost[cell, labels]).sum()) // 2

    # A pair is solved only in grids where something can move and that changed since it was solved last.
    movable = _movable(cost, labels.reshape(shape), distance, tail, head, weight)
    changed, solved, clock = np.zeros(shape[0], np.int64), dict.fromkeys(pairs, -1), 0
    before, now = None, energy()
    while before is None or now < before:
        for alpha, beta in pairs:
            grids = movable[:, alpha, beta] & (changed > solved[alpha, beta])
            clock += 1
            solved[alpha, beta] = clock
            if not grids.any():
                continue
            active = (((labels == alpha) | (labels == beta)).reshape(shape[0], -1) & grids[:, None]).ravel()
            nodes = np.flatnonzero(active)
            inner = active[tail] & active[head]
            start, end, capacity = tail[inner], head[inner], weight[inner]
            # what α saves in each cell, edges to other active cells aside
            saving = cost[:, beta] - cost[:, alpha]
            between = distance[beta] - distance[alpha]
            for this, other in ((start, end), (end, start)):
                np.subtract.at(saving, this, capacity * between[labels[other]])
            index = np.empty(len(unary), np.int64)
            index[nodes] = np.arange(nodes.size)
            sink = _sink_side(saving[nodes], index[start], index[end], capacity * distance[alpha, beta])
            new = labels.copy()
            new[nodes] = np.where(sink, beta, alpha)
            moved = new != labels
            if not moved.any():
                continue
            for this, other in ((tail, head), (head, tail)):
                touched = moved[other]
                step = distance[new[other[touched]]] - distance[labels[other[touched]]]
                np.add.at(cost, this[touched], weight[touched, None] * step)
            labels = new
            changed[moved.reshape(shape[0], -1).any(axis=1)] = clock
            movable = _movable(cost, labels.reshape(shape), distance, tail, head, weight)
        before, now = now, energy()
    return labels.reshape(shape)


def _movable(
    cost: NDArray, labels: NDArray, distance: NDArray, tail: NDArray, head: NDArray, weight: NDArray
) -> NDArray:
    """[B, L, L]: False where the swap of a pair certainly leaves a grid as it is.

    That is where no cell of either label gains by taking the other, be it spared the edges to its own label: an upper
    bound on its part in the gain of any group of cells. (On a tie the lower label wins.)
    """
    grids, count = len(labels), cost.shape[-1]
    if count <= 4:  # of few pairs most can move, and to find out costs as much as to solve them
        return np.ones((grids, count, count), np.bool_)
    labels = labels.ravel()
    same = labels[tail] == labels[head]
    within = np.zeros(labels.size, np.int64)
    for end in (tail, head):
        np.add.at(within, end[same], weight[same])
    own = labels[:, None] == np.arange(count)
    gain = cost[own][:, None] + within[:, None] * distance[labels] - cost
    wants = (gain > 0) | ((gain == 0) & (np.arange(count) < labels[:, None]))
    from_own, to_other = (x.reshape(grids, -1, count).astype(np.float32) for x in (own, wants))
    some = from_own.transpose(0, 2, 1) @ to_other > 0
    return some | some.transpose(0, 2, 1)


def _sink_side(saving: NDArray, tail: NDArray, head: NDArray, capacity: NDArray) -> NDArray[np.bool_]:
    """The smallest sink side of a minimum cut. A node pays its ``saving`` [N] there, or −saving at the source."""
    max_flow = _ortools()
    source, sink = saving.size, saving.size + 1
    wins, loses = np.flatnonzero(saving > 0), np.flatnonzero(saving < 0)
    flow = max_flow.SimpleMaxFlow()
    flow.add_arcs_with_capacity(
        np.concatenate((tail, head, np.full(wins.size, source), loses)).astype(np.int32),
        np.concatenate((head, tail, wins, np.full(loses.size, sink))).astype(np.int32),
        np.concatenate((capacity, capacity, saving[wins], -saving[loses])),
    )
    status = flow.solve(source, sink)
    if status != flow.OPTIMAL:
        raise RuntimeError(f"maximum flow failed with {status}")
    side = np.zeros(saving.size + 2, np.bool_)
    side[flow.get_sink_side_min_cut()] = True
    return side[:-2]


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
    """gco-wrapper's C functions, or None. A broken build counts as none: it fails in ways of its own on import."""
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
