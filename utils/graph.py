"""A training step as one CUDA graph: some thousand kernels for the price of one launch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mixup.base import Step, to_device

from .records import log

WARM_UP = 3  # steps taken as they are before one is recorded: plans, workspaces, momentum
Take = Callable[[Tensor, Tensor, Any], Step]


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

    def __init__(self, take: Take, baked: Callable[[], Any], device: torch.device, record: Any = record_cuda) -> None:
        self.take, self.baked, self.device, self.record = take, baked, device, record
        self.seen = 0
        self.before: Any = None  # shapes of the last call
        self.kept: Any = None  # what was baked in, inputs, replay, result
        self.works = True

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

    def moved(value: Any) -> Tensor:
        tensor = torch.as_tensor(value)
        return to_device(tensor.float() if tensor.is_floating_point() else tensor, device)

    values = draws._asdict() if hasattr(draws, "_asdict") else vars(draws)  # a NamedTuple, or a dataclass
    return SimpleNamespace(**{name: v if v is None else moved(v) for name, v in values.items()})
