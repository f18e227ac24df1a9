"""Puzzle Mix's transport: where the blocks of an image move, and moving them."""

from __future__ import annotations

import torch
from torch import Tensor

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
    rows, columns = mask.shape[1:]
    rounds, count = max(rows, columns), rows * columns
    row, column = torch.arange(rows, device=mask.device), torch.arange(columns, device=mask.device)
    y, x = (place.flatten() for place in torch.meshgrid(row, column, indexing="ij"))
    squares = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    distance = t_eps * squares.to(unary.dtype) / max(rounds - 1, 1) ** 2

    def cost(shown: Tensor, salient: Tensor) -> Tensor:
        return torch.addcmul(
            distance, salient.reshape(-1, count, 1), (shown > 0).to(salient.dtype).reshape(-1, 1, count), value=-1
        )

    # a few images at a time: in the CPU's cache, or within a GPU's memory
    on_cpu = mask.device.type == "cpu"
    part = max(1, (2**21 if on_cpu else 2**27) // count**2)
    plan = _plan_on_cpu if on_cpu else _plan
    plans = torch.cat([plan(cost(m, u), rounds) for m, u in zip(mask.split(part), unary.split(part), strict=True)])
    if on_cpu:
        again = (plans[:, 0] == UNSURE).nonzero()[:, 0]
        for index in again.split(part):
            plans[index] = _plan(cost(mask[index], unary[index]), rounds)
    return plans


def _plan(cost: Tensor, rounds: int) -> Tensor:
    """The rounds of ``transport_plan`` for cost [B, N, N], which it changes. Never waits for the device."""
    for _ in range(rounds):
        choice = cost.argmin(dim=2)
        wins = _contest(choice, cost.gather(2, choice[..., None])[..., 0])
        cost.scatter_add_(2, choice[..., None], (~wins).to(cost.dtype)[..., None])
    return torch.where(wins, choice, -1)


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
    # the source of each destination; blocks that are lost write behind the last
    source = torch.full((batch, count + 1), -1, device=images.device)
    source.scatter_(1, torch.where(plan < 0, count, plan), torch.arange(count, device=images.device).expand(batch, -1))
    source = source[:, :count]
    # the same for pixels, as indices into a flattened image
    block = source.clamp(min=0)
    corner = block // right * (tall * width) + block % right * wide
    row, column = torch.arange(tall, device=images.device), torch.arange(wide, device=images.device)
    pixel = corner.view(batch, down, 1, right, 1) + (row[:, None] * width + column)[:, None]
    filled = (source >= 0).to(images.dtype).view(batch, 1, down, 1, right, 1).expand(-1, -1, -1, tall, -1, wide)
    moved = images.flatten(2).gather(2, pixel.view(batch, 1, -1).expand(-1, channels, -1))
    return moved.view(images.shape) * filled.reshape(batch, 1, height, width)
