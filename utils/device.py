"""The device, its precision, steps recorded as CUDA graphs, and the random numbers of a batch."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixup.base import Step, to_device

from .files import log

WARM_UP = 3  # steps taken as they are before one is recorded: plans, workspaces, momentum


def pick_device(ngpu: int) -> torch.device:
    """The device for ``--ngpu``; where there is no GPU the CPU, with a warning."""
    if ngpu > 0 and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if ngpu > 0:
        log.warning(f"warning: --ngpu {ngpu}: no GPU that this PyTorch can use was found; the CPU is used")
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """What a reader of the log calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.processor() or platform.machine()} {device.type}, {threads} thread{'s' * (threads > 1)}"


def set_precision(deterministic: bool) -> None:
    """TF32 as in the paper's PyTorch, cuDNN autotuning; or bitwise repeatability on CUDA, at its price."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def prepare(model: nn.Module, device: torch.device, fast: bool, batch: int | None = None) -> nn.Module:
    """The model on its device, in the layout that is quickest there.

    With ``fast``, its forward runs in bfloat16 autocast (compiled on CUDA): the same network, cheaper. Weights, loss,
    saliency, search and blend stay float32. ``batch`` is the usual number of images of a training step.
    """
    model, on_cpu = model.to(device), device.type == "cpu"
    if on_cpu and platform.libc_ver()[0] == "glibc":
        # keep the memory of activations, whose pages the system would clear anew: 5 to 10% of a float32 step
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its most
    # narrower convolutions of this layout make oneDNN write out of bounds (seen in PyTorch 2.14: a segfault)
    narrow = any(isinstance(module, nn.Conv2d) and module.out_channels < 16 for module in model.modules())
    if not narrow if on_cpu else fast:
        model = model.to(memory_format=torch.channels_last)
    if fast:
        if emulates_bfloat16(device):
            log.warning("warning: PyTorch emulates bfloat16 here: without --fast it is likely to be faster")
        forward = model.forward if on_cpu else compiled(model.forward, batch)
        model.forward = torch.autocast(device.type, dtype=torch.bfloat16)(forward)
    return model


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether PyTorch emulates bfloat16 there: on a GPU without it, and on a CPU where oneDNN does not take it."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compiled(forward: Callable[..., Tensor], batch: int | None = None, **how: Any) -> Callable[..., Tensor]:
    """``forward(x, *hook)`` of a network under ``torch.compile(**how)``, which compiles a function anew eight times and
    then leaves it as it is without a word. Each place where activations are mixed needs a graph for each size of
    ``x``; so a pass that mixes them and is not of ``batch`` images, the last one of an epoch, is not compiled."""
    quick = torch.compile(forward, **how)

    def chosen(x: Tensor, *hook: Any) -> Tensor:
        is_last = batch is not None and len(x) != batch
        return (forward if hook and is_last else quick)(x, *hook)

    return chosen


def record_cuda(work: Callable[[], Step]) -> tuple[Callable[[], None], Step]:
    """What does ``work`` again at one launch, and what it leaves its results in. Nothing is computed yet."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may be moving the next batch
            result = work()
    except RuntimeError:
        torch.cuda.set_stream(stream)  # a recording that could not be ended leaves its own
        raise
    return graph.replay, result


class Captured:
    """``take(images, labels, draws)`` recorded on its fourth call, and replayed from then on.

    Draws are handed over as tensors. A recording holds the shapes of its inputs and what ``baked`` returns: the rate.
    A lasting change makes a new one; a single batch of another shape is taken as it is. The tensors of a returned step
    are overwritten by the next one.
    """

    def __init__(
        self, take: Callable[..., Step], baked: Callable[[], Any], device: torch.device, record: Any = record_cuda
    ) -> None:
        self.take, self.baked, self.device, self.record = take, baked, device, record
        self.seen, self.works = 0, True
        self.before: Any = None  # shapes of the last call
        self.kept: Any = None  # shapes and what was baked in, inputs, replay, result

    def __call__(self, images: Tensor, labels: Tensor, draws: Any) -> Step:
        draws = as_tensors(draws, self.device)
        inputs = [images, labels, *(value for value in vars(draws).values() if value is not None)]
        now = [x.shape for x in inputs], self.baked()
        if self.works and self.seen >= WARM_UP and now[0] == self.before and (self.kept is None or self.kept[0] != now):
            self.capture(now, images, labels, draws)
        self.seen, self.before = self.seen + 1, now[0]
        if self.kept is None or self.kept[0] != now:
            return self.take(images, labels, draws)
        _, held, replay, result = self.kept
        for place, value in zip(held, inputs, strict=True):
            place.copy_(value, non_blocking=True)
        replay()
        return result

    def capture(self, now: Any, images: Tensor, labels: Tensor, draws: Any) -> None:
        """Record the step on tensors of its own. Where that fails, steps stay as they are."""
        self.kept = None  # two recordings at a time may not fit into memory
        own = SimpleNamespace(**{k: v if v is None else v.clone() for k, v in vars(draws).items()})
        x, y = images.clone(), labels.clone()
        try:
            replay, result = self.record(lambda: self.take(x, y, own))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            log.warning(f"warning: steps cannot be recorded as a CUDA graph ({reason}); they are launched one by one")
            self.works = False
            return
        self.kept = now, [x, y, *(v for v in vars(own).values() if v is not None)], replay, result


def as_tensors(draws: Any, device: torch.device) -> SimpleNamespace:
    """Numbers and arrays of ``draws`` as tensors on ``device``, float32 or integers, without waiting for it."""
    values = draws._asdict() if hasattr(draws, "_asdict") else vars(draws)  # a NamedTuple, or a dataclass
    tensors = {name: torch.as_tensor(value) for name, value in values.items() if value is not None}
    moved = {name: to_device(x.float() if x.is_floating_point() else x, device) for name, x in tensors.items()}
    return SimpleNamespace(**{**dict.fromkeys(values), **moved})


def step_generator(seed: int, epoch: int, step: int, rank: int = 0) -> np.random.Generator:
    """The generator of one batch. Randomness depends on (seed, epoch, step, rank) alone, so a run can be continued at
    any batch without any generator's state; PyTorch's own generator (dropout) is seeded from it as well."""
    rng = np.random.default_rng((seed, epoch, step, rank))
    torch.manual_seed(int(rng.integers(2**63)))
    return rng


def peak_memory(device: torch.device) -> float:
    """Peak memory in GB so far: allocated on a CUDA device, resident in the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
