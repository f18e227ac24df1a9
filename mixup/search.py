"""SAGE's search: the offset at which two overlaid saliency maps keep most of their mass.

All (2H−1)(2W−1) offsets are scored at once by Fourier transforms, at a cost that grows as H·W·log(H·W), and the leaders
again exactly (Ma et al., "SAGE: Saliency-Guided Mixup with Optimal Rearrangements", BMVC 2022, defines the score; it
tries about 1% of the offsets one by one).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .base import counting, kept, to_device

# 1/x ≈ Σ w·exp(−t·x), fitted so that |error|·min(x, x²) ≤ 2.3e-4 for 0 < x ≤ 30, x being saliency over its RMS
EXPONENTS = (0.023358, 0.13365, 0.39224, 0.98411, 2.4016, 5.9133, 15.248, 43.622, 148.82, 697.56)
WEIGHTS = (0.061019, 0.16807, 0.37722, 0.8822, 2.1433, 5.4147, 15.077, 49.063, 200.98, 1262.6)
LEADERS = 8  # offsets a pair whose exact score is computed after the approximate search
SHORT_LIST = 256  # up to so many candidates it is cheaper to score each exactly
SPECTRUM_BYTES = {"cpu": 2 << 20, "cuda": 48 << 20}  # spectra held at a time: what suits the cache; few, large launches
WINDOW_PIXELS = {"cpu": 1 << 20, "cuda": 1 << 22}  # pixels of moved maps held at a time


@torch.no_grad()
def best_offsets(a: Tensor, b: Tensor, candidates: Any = None) -> Tensor:
    """For every pair the offset of image b at which Σ (A² + B'²)/(A + B') is largest, B' being B moved by the offset.

    All offsets, and long lists, are first scored approximately, by Fourier transforms whose cost grows as
    H·W·log(H·W), and the leaders again exactly. On saliency of networks the exact score of the result is then the best
    one's within 1e-6, relative; on maps that are constant but for a percent, with the same mass, within 1e-4.

    Args:
        a: [B, H, W] saliency of image a with mass λ; not negative.
        b: [B, H, W] saliency of image b with mass 1 − λ, not yet moved.
        candidates: [K, 2] integers (dy, dx), |dy| < H, |dx| < W: image b's content moves down by dy and right by dx,
            and zeros enter. None stands for every offset, in row-major order from (−(H−1), −(W−1)). An array, a list
            or a tensor; one on the CPU has its range checked.

    Maps narrower than float32 are searched in float32.

    Returns:
        [B, 2] int64 on a's device; the first in candidate order among equals.

    Raises:
        ValueError: a wrong shape, or a candidate that leaves no overlap.
    """
    check_pair(a, b)
    if a.dtype.itemsize < 4:
        a, b = a.float(), b.float()
    height, width = a.shape[1:]
    if candidates is None:
        return _best_of(a, b, every_offset(height, width, a.device), approximate_scores(a, b))
    if not (isinstance(candidates, Tensor) and candidates.device.type != "cpu"):
        candidates = np.asarray(candidates, dtype=np.int64)
    _check_candidates(candidates, height, width)
    on_device = to_device(candidates, a.device, torch.int64)
    if len(on_device) > SHORT_LIST:
        index = (on_device[:, 0] + height - 1) * (2 * width - 1) + on_device[:, 1] + width - 1
        return _best_of(a, b, on_device, approximate_scores(a, b)[:, index])
    if a.device.type == "cpu":
        scores = _list_scores(a, b, on_device.tolist())
    else:
        scores = exact_scores(a, b, on_device.expand(len(a), -1, -1))
    return on_device[scores.argmax(dim=1)]


def exact_scores(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Σ (A² + B'²)/(A + B') as [B, R] for each pair's own ``offsets`` [B, R, 2]."""
    parts = []
    for part in offsets.split(max(1, WINDOW_PIXELS[_kind(a)] // a.numel()), dim=1):
        shown = moved(b[:, None], part)[:, 0]
        total = (a[:, None] + shown).clamp_(min=1e-30)
        parts.append(shown.square_().add_(a.square()[:, None]).div_(total).sum(dim=(2, 3)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _list_scores(a: Tensor, b: Tensor, candidates: list[list[int]]) -> Tensor:
    """Exact scores [B, K] of one list for all pairs, visiting only the pixels that overlap: the fastest on a CPU."""
    height, width = a.shape[1:]
    # pairs last, so that a row of the overlap is one piece of memory
    a, b = a.permute(1, 2, 0).contiguous(), b.permute(1, 2, 0).contiguous()
    inverse_a, inverse_b = a.reciprocal(), b.reciprocal()
    scores = []
    for dy, dx in candidates:
        above = slice(max(dy, 0), height + min(dy, 0)), slice(max(dx, 0), width + min(dx, 0))
        below = slice(max(-dy, 0), height + min(-dy, 0)), slice(max(-dx, 0), width + min(-dx, 0))
        # (a² + b²)/(a + b) = a + b − 2/(1/a + 1/b), also where one or both are 0
        shared = (inverse_a[above] + inverse_b[below]).reciprocal_()
        scores.append(b[below].sum(dim=(0, 1)) - 2 * shared.sum(dim=(0, 1)))
    return (torch.stack(scores) + a.sum(dim=(0, 1))).T


def approximate_scores(a: Tensor, b: Tensor) -> Tensor:
    """Scores [B, (2H−1)(2W−1)] of every offset in row-major order.

    With (a² + b²)/(a + b) = a + b − 2ab/(a + b) and 1/(a + b) as a sum of exponentials, the score of all offsets is
    the mass in the frame less a sum of cross-correlations, of a·exp(−ta) with b·exp(−tb), which are added up in
    frequency space. The mass is exact.
    """
    height, width = a.shape[1:]
    rows, columns = 2 * height - 1, 2 * width - 1
    size = _fast_length(rows), _fast_length(columns)
    exponents, half_log_weights = _quadrature(a.device, a.dtype)
    # a correlation is a convolution with the map turned round; its place (0, 0) is then the first offset
    pair = torch.stack([a, b.flip(1, 2)])
    rms = torch.linalg.vector_norm(pair, dim=(0, 2, 3))[:, None, None].clamp(min=1e-15) / math.sqrt(height * width)
    pair_bytes = 2 * len(EXPONENTS) * size[0] * (size[1] // 2 + 1) * 2 * a.element_size()
    part = max(1, SPECTRUM_BYTES[_kind(a)] // pair_bytes)
    pair = pair / rms
    shared = []
    for maps in pair[:, :, None].split(part, dim=1):
        weighted = torch.addcmul(half_log_weights, exponents, maps, value=-1).exp_().mul_(maps)
        spectra = torch.fft.rfft2(weighted, s=size)
        shared.append(torch.fft.irfft2(spectra[0].mul_(spectra[1]).sum(dim=1), s=size)[:, :rows, :columns])
    gain = _mass_in_frame(pair[1]).sub_(shared[0] if len(shared) == 1 else torch.cat(shared), alpha=2)
    return torch.addcmul(a.sum(dim=(1, 2), keepdim=True), rms, gain).flatten(1)


def _best_of(a: Tensor, b: Tensor, candidates: Tensor, approximate: Tensor) -> Tensor:
    """The best [B, 2] of ``candidates`` [K, 2] on the device, given their approximate scores [B, K]."""
    leaders = approximate.topk(min(LEADERS, len(candidates)), dim=1)
    # where hundreds of offsets tie, the first of them is to win, which need not be among the leaders
    tied = approximate >= leaders.values[:, :1] * (1 - 1e-6)
    first = tied.max(dim=1, keepdim=True).indices
    index = torch.cat([leaders.indices, first], dim=1).sort(dim=1).values
    offsets = candidates[index]
    best = exact_scores(a, b, offsets).argmax(dim=1)
    return offsets.gather(1, best[:, None, None].expand(-1, -1, 2))[:, 0]


def _mass_in_frame(turned: Tensor) -> Tensor:
    """[B, 2H−1, 2W−1]: how much of a map stays in the frame at every offset, given the map turned round [B, H, W].

    Values are whole multiples of 2⁻³²: their sums are exact, and the same on every run and device.
    """
    above, beside, unit = _frames(*turned.shape[1:], turned.device)
    whole = (turned * unit).trunc_()
    return (above @ whole @ beside).to(turned.dtype)


@kept
def _frames(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """[2H−1, H] and [W, 2W−1]: which rows and columns are in the frame, the latter in units of 2⁻³²; and 2³² as [1]."""
    exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no other
    above, beside = (
        (counting(2 * n - 1, device)[:, None] - counting(n, device)).remainder(2 * n - 1) < n for n in (height, width)
    )
    unit = torch.full((1,), 2.0**32, dtype=exact, device=device)
    return above.to(exact), beside.T.to(exact) / unit, unit


@kept
def every_offset(height: int, width: int, device: torch.device) -> Tensor:
    """[(2H−1)(2W−1), 2] int64: every (dy, dx) that leaves some overlap, row-major."""
    return torch.cartesian_prod(
        torch.arange(1 - height, height, device=device), torch.arange(1 - width, width, device=device)
    )


@kept
def _quadrature(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Exponents and half the weights' logarithms as [K, 1, 1]."""
    table = to_device((EXPONENTS, [0.5 * math.log(w) for w in WEIGHTS]), device, dtype)
    return table[0, :, None, None], table[1, :, None, None]


def _fast_length(length: int) -> int:
    """The next even length without prime factors above 7; transforms of other lengths cost twice as much or more."""
    while 2**20 * 3**13 * 5**9 * 7**8 % length or length % 2:
        length += 1
    return length


def _kind(tensor: Tensor) -> str:
    return "cuda" if tensor.is_cuda else "cpu"


def _check_candidates(candidates: Any, height: int, width: int) -> None:
    if candidates.ndim != 2 or candidates.shape[1] != 2 or len(candidates) == 0:
        raise ValueError(f"candidates must be [K, 2] with K ≥ 1, not {tuple(candidates.shape)}")
    if isinstance(candidates, np.ndarray):  # looking at those of a tensor would wait for the device
        outside = (np.abs(candidates) >= (height, width)).any(axis=1)
        if outside.any():
            raise ValueError(f"offset {tuple(candidates[outside][0].tolist())} leaves no overlap in {height}×{width}")


def moved(maps: Tensor, offsets: Tensor) -> Tensor:
    """Content of ``maps`` [B, C, H, W] moved by each of ``offsets`` [B, R, 2], |dy| ≤ H, |dx| ≤ W, zeros entering:
    [B, C, R, H, W]."""
    height, width = maps.shape[2:]
    rows, columns = _sources(height, width, maps.device)[counting(2, maps.device), offsets].unbind(dim=2)
    index = rows[:, :, :height, None] + columns[:, :, None, :width]
    # what lies outside is read from a row and a column of zeros behind the last
    source = F.pad(maps, (0, 1, 0, 1)).flatten(2)
    found = source.gather(2, index.flatten(1)[:, None].expand(-1, maps.shape[1], -1))
    return found.view(*maps.shape[:2], *index.shape[1:])


@kept
def _sources(height: int, width: int, device: torch.device) -> Tensor:
    """[2, 2L + 1, L] for the longer axis L: where rows and where columns come from when content moves.

    Row d, counted from the end where d < 0, is for a move by d: positions in a map with one more row and column, which
    together with the other axis's add up to an index; ``height`` and ``width`` where they come from outside.
    """
    length = max(height, width)
    place = counting(length, device)
    shift = torch.cat([counting(length + 1, device), place - length])
    source = place - shift[:, None]
    return torch.stack(
        [
            source.masked_fill((source < 0) | (source >= size), size) * stride
            for size, stride in ((height, width + 1), (width, 1))
        ]
    )


def check_pair(a: Tensor, b: Tensor) -> None:
    if a.ndim != 3 or a.shape != b.shape or a.numel() == 0:
        raise ValueError(f"a and b must be two [B, H, W] of one shape, not {tuple(a.shape)} and {tuple(b.shape)}")
    if not a.is_floating_point() or a.dtype != b.dtype:
        raise ValueError(f"a and b must be of one floating type, not {a.dtype} and {b.dtype}")
