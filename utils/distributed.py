"""Many processes, one run: all that is distributed is in this file. Without torchrun everything here does nothing.

    torchrun --nproc_per_node=4 main.py …
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_endpoint=HOST:29500 --rdzv_backend=c10d main.py …

The batch of ``--batch_size`` images is split over the ranks; each mixes its part with draws of its own. Gradients
are averaged by DistributedDataParallel, every image counting alike. Rank 0 alone reads and writes the folder.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import BadArguments, UserError

MEETING = timedelta(minutes=5)  # torchrun starts all processes at once; one may have to import from a far disk


@dataclass(frozen=True)
class World:
    """The processes of a run. ``local_rank`` counts on one machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def part(self, number: int) -> slice:
        """This rank's consecutive part of ``number`` images; parts differ by at most one."""
        return slice(number * self.rank // self.size, number * (self.rank + 1) // self.size)


def join(ngpu: int, batch_size: int) -> World:
    """Meet the other processes, if torchrun started this one."""
    gpus = torch.cuda.device_count() if ngpu > 0 else 0
    if not dist.is_torchelastic_launched():
        if ngpu > 1 and gpus:
            raise BadArguments(f"--ngpu {ngpu} needs a process a GPU: torchrun --nproc_per_node={ngpu} main.py …")
        return World()
    world = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if batch_size % world.size:
        raise BadArguments(f"--batch_size {batch_size} does not divide over {world.size} processes")
    device = torch.device("cuda", world.local_rank) if gpus else None
    try:
        if device is not None:
            torch.cuda.set_device(device)
        store, _, _ = next(dist.rendezvous("env://", timeout=MEETING))
        store, backend = dist.PrefixStore(agreed_name(store, world), store), "nccl" if gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, device_id=device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"process {world.rank} did not meet the other {world.size - 1}: {reason}") from error
    return world


def agreed_name(store: dist.Store, world: World) -> str:
    """A name that the processes of this attempt alone know, chosen by rank 0.

    torchrun keeps one store through all its restarts, and a process that reads the address of a killed one there never
    meets the others. So every other process shows that it is alive by a new key, and is answered under that key.
    """
    mine = uuid.uuid4().hex
    if world.rank > 0:
        store.set(f"present/{world.rank}", mine)
        name = store.get(mine).decode()
        store.set(f"{name}/{world.rank}", "heard")
        return name
    for rank in range(1, world.size):
        while not store.check([f"{mine}/{rank}"]):
            store.set(store.get(f"present/{rank}").decode(), mine)  # a dead one's key at first, perhaps
            time.sleep(0.02)
    return mine


def leave() -> None:
    """Part from the other processes, all at once: one that leaves early looks like a failure to those that wait."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def from_first(value: Any) -> Any:
    """Rank 0's value, on every rank; it is pickled on the way."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks."""
    values = values.clone()
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def largest(value: int, device: torch.device) -> int:
    """The largest value of all ranks; waits for them."""
    if not dist.is_initialized():
        return value
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


@contextmanager
def one_first(world: World) -> Iterator[None]:
    """One process of every machine goes through the block before the others do."""
    if dist.is_initialized() and world.local_rank > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and world.local_rank == 0:
        dist.barrier()


def share_buffers(model: nn.Module) -> None:
    """Rank 0's batch-norm statistics for every rank, so that all evaluate the same network."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def data_parallel(model: nn.Module) -> nn.Module:
    """The network whose backward averages gradients over ranks; the network itself in a world of one."""
    return DistributedDataParallel(model) if dist.is_initialized() else model


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """The same network, every batch norm with statistics over all ranks."""
    if device.type != "cuda":
        raise BadArguments("--sync_bn True needs GPUs: PyTorch synchronises batch norm on CUDA alone")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
