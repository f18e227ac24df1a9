"""Puzzle Mix's transport: where the blocks of an image move, and moving them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import counting, kept

UNSURE = -2  # marks an image whose plan takes all rounds of all blocks


@torch.no_grad()
def transport_plan(mask: Tensor, unary: Tensor, t_eps: float) -> Tensor:
    """Where every block of an image moves, so that its salient blocks lie where the image shows.

    As many rounds as the longest side has blocks: each block chooses its cheapest destination, each destination takes
    the cheapest of those that chose it, the others pay 1 more for that choice from then on.

    Args:
        mask: [B, R, S] weight of the image at each block of the grid.
        unary: [B, R, S] saliency of each block, of sum 1.
        t_eps: cost of a move, times (squared distance)/(longest side − 1)².

    Returns:
        [B, R·S] int64: the destination of each block, in row-major order, −1 for a block that is lost.

    Raises:
        ValueError: shapes that differ.
    """
    if mask.ndim != 3 or mask.shape != unary.shape:
        raise ValueError(f"mask and unary must be two [B, R, S], got {tuple(mask.shape)} and {tuple(unary.shape)}")
    if unary.dtype.itemsize < 4:
        unary = unary.float()  # half precision would round costs away
    rows, columns = mask.shape[1:]
    rounds, count = max(rows, columns), rows * columns
    distance = _distances(rows, columns, t_eps, unary.dtype, unary.device)

    def cost(shown: Tensor, salient: Tensor) -> Tensor:
        return torch.addcmul(
            distance, salient.reshape(-1, count, 1), (shown > 0).to(salient.dtype).reshape(-1, 1, count), value=-1
        )

    # a few images at a time: in the CPU's cache, or within a GPU's memory
    on_cpu = mask.device.type == "cpu"
    part = max(1, (2**21 if on_cpu else 2**26) // count**2)
    plan = _plan_on_cpu if on_cpu else _plan
    plans = torch.cat([plan(cost(m, u), rounds) for m, u in zip(mask.split(part), unary.split(part), strict=True)])
    if on_cpu:
        again = (plans[:, 0] == UNSURE).nonzero()[:, 0]
        for index in again.split(part):
            plans[index] = _plan(cost(mask[index], unary[index]), rounds)
    return plans


def _plan(cost: Tensor, rounds: int) -> Tensor:
    """The rounds of ``transport_plan`` for cost [B, N, N], which it changes. Never waits for the device."""
    paid = torch.zeros_like(cost)  # by each block at each destination: 0 but where it goes
    index = counting(cost.shape[1], cost.device)
    for turn in range(rounds):
        price, choice = cost.min(dim=2, keepdim=True)
        paid.scatter_(2, choice, price)
        loses = paid.argmin(dim=1).gather(1, choice[..., 0]) != index
        if turn < rounds - 1:
            cost.scatter_(2, choice, price + loses[..., None])
            paid.scatter_(2, choice, 0.0)
    return choice[..., 0].masked_fill(loses, -1)


def _plan_on_cpu(cost: Tensor, rounds: int) -> Tensor:
    """``_plan``, following only the blocks that can still win; UNSURE throughout for an image where that is not enough.

    A block that has to pay more than 0 loses from then on, and pays for ever more distant places. What it chooses
    matters to nobody, unless it is block 0: see ``_contest``.
    """
    batch, count = cost.shape[:2]
    table = cost.view(batch * count, count).numpy()
    choice = torch.from_numpy(table.argmin(axis=1)).view(batch, count)
    price = cost.gather(2, choice[..., None])[..., 0]
    chosen, paid = choice.view(-1).numpy(), price.view(-1).numpy()
    unsure = torch.zeros(batch, 1, dtype=torch.bool)
    for turn in range(rounds):
        wins = _contest(choice, price)
        losers = (~wins & (price <= 0)).view(-1).nonzero()[:, 0].numpy()
        if turn == rounds - 1 or not losers.size:
            break
        table[losers, chosen[losers]] += 1
        chosen[losers] = table[losers].argmin(axis=1)
        paid[losers] = table[losers, chosen[losers]]
        unsure |= price[:, :1] > 0
    return torch.where(unsure, UNSURE, torch.where(wins, choice, -1))


def _contest(choice: Tensor, price: Tensor) -> Tensor:
    """Which blocks [B, N] win the destination they chose.

    The winner is the first minimum over all blocks of what they pay there, 0 for those that chose another place.
    """
    count = choice.shape[1]
    index = torch.arange(count, device=choice.device).expand_as(choice)
    lowest = torch.full_like(price, torch.inf).scatter_reduce_(1, choice, price, "amin")
    contender = torch.where(price == lowest.gather(1, choice), index, count)
    first = torch.full_like(choice, count).scatter_reduce_(1, choice, contender, "amin").gather(1, choice)
    # The first block that chose elsewhere stands there with 0: block 0, except where block 0 itself chose.
    beside_zero = choice == choice[:, :1]
    absent = torch.where(beside_zero, torch.where(beside_zero, count, index).amin(dim=1, keepdim=True), 0)
    return (first == index) & ((price < 0) | ((price == 0) & (index < absent)) | (absent == count))


def move_blocks(images: Tensor, plan: Tensor, size: tuple[int, int]) -> Tensor:
    """Blocks of ``size`` (rows, columns) pixels of ``images`` [B, C, H, W] moved by a ``plan`` of ``transport_plan``.

    Places that receive nothing become zero.
    """
    batch, channels, height, width = images.shape
    (tall, wide), count = size, plan.shape[1]
    down, right = height // tall, width // wide
    corners, within = _pixels(height, width, size, images.device)
    # the first pixel of what comes to each destination, which is behind the image where nothing comes; blocks that are
    # lost go behind the last
    source = torch.full((batch, count + 1), height * width, device=images.device)
    source.scatter_(1, plan.masked_fill(plan < 0, count), corners.expand(batch, -1))
    pixel = source[:, :count].view(batch, down, 1, right, 1) + within
    shown = F.pad(images.flatten(2), (0, tall * width))
    return shown.gather(2, pixel.view(batch, 1, -1).expand(-1, channels, -1)).view(images.shape)


@kept
def _distances(rows: int, columns: int, t_eps: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a move from each block of a grid to each other costs: [R·S, R·S]."""
    y, x = (
        place.flatten() for place in torch.meshgrid(counting(rows, device), counting(columns, device), indexing="ij")
    )
    squares = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    return t_eps * squares.to(dtype) / max(rows - 1, columns - 1, 1) ** 2


@kept
def _pixels(height: int, width: int, size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the first pixel of each block [N] lies in a flattened image, and the pixels of a block [rows, 1, columns],
    counted from there."""
    tall, wide = size
    down, right = counting(height // tall, device), counting(width // wide, device)
    corners = down[:, None] * (tall * width) + right * wide
    within = counting(tall, device)[:, None] * width + counting(wide, device)
    return corners.flatten(), within[:, None]
