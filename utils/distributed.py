"""Many processes, one run: all that is distributed is in this file. Without torchrun everything here does nothing.

    torchrun --nproc_per_node=4 main.py …
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_endpoint=HOST:29500 --rdzv_backend=c10d main.py …

The batch of ``--batch_size`` images is split over the ranks; each mixes its part with draws of its own. Gradients
are averaged by DistributedDataParallel, every image counting alike. Rank 0 alone reads and writes the folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import BadArguments, UserError, stopping_signals


@dataclass(frozen=True)
class World:
    """The processes of a run. ``local_rank`` counts on one machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def part(self, number: int) -> slice:
        """This rank's consecutive part of ``number`` images; parts differ by at most one."""
        return slice(number * self.rank // self.size, number * (self.rank + 1) // self.size)


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def must_launch(ngpu: int) -> bool:
    """Whether this process is to start others, one a GPU, instead of training itself."""
    return ngpu > 1 and torch.cuda.is_available() and not is_launched()


def launch(ngpu: int, arguments: Sequence[str]) -> int:
    """Start a program with its ``arguments`` on ``ngpu`` GPUs of this machine, by torchrun; returns its exit code.

    Signals are passed on, and 128 + signal is returned once every process has saved and left.
    """
    if torch.cuda.is_available() and ngpu > torch.cuda.device_count():
        raise BadArguments(f"--ngpu {ngpu}: this machine has {torch.cuda.device_count()} GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ngpu}"]
    received: list[int] = []
    # saving and leaving may take longer than the 30 s after which torchrun kills; Ctrl-C reaches it through us alone
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600", **os.environ}
    child = subprocess.Popen([*command, *arguments], env=environment, start_new_session=True)

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        child.send_signal(signal.SIGTERM)

    for number in stopping_signals():
        signal.signal(number, pass_on)
    code = child.wait()
    return 128 + received[0] if received and code else code


def join(ngpu: int, batch_size: int) -> World:
    """Meet the other processes if torchrun started this one.

    Raises:
        BadArguments: the batch does not divide over the processes, or there is no GPU for this one.
        UserError: they did not meet; torchrun then tries again as often as its ``--max_restarts`` says.
    """
    if not is_launched():
        return World()
    world = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    backend, device = "gloo", None
    if ngpu > 0 and torch.cuda.is_available():
        if world.local_rank >= (count := torch.cuda.device_count()):
            raise BadArguments(f"process {world.local_rank} of this machine has no GPU: there are {count}")
        backend, device = "nccl", torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(backend, device_id=device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"process {world.rank} did not meet the other {world.size - 1}: {reason}") from error
    if batch_size % world.size:
        raise BadArguments(f"--batch_size {batch_size} does not divide over {world.size} processes")
    return world


def leave() -> None:
    """Part from the other processes, all at once: one that leaves early looks like a failure to those that wait."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def common_error(message: str) -> BaseException:
    """For a failure that every rank finds in the same place: a ``UserError`` to raise on the first one, a silent exit
    with the same code on the others."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    leave()
    return UserError(message) if rank == 0 else SystemExit(1)


def from_first(value: Any) -> Any:
    """Rank 0's value, on every rank; it is pickled on the way."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks."""
    if not dist.is_initialized():
        return values
    values = values.clone()
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
