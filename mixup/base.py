"""What every method shares: the contract of ``draw`` and ``step``, the loss, and the targets."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class Step:
    """What one step of a method returns. The tensors after ``logits`` are for pictures and tests; None where a method
    has no such thing.

    Attributes:
        loss: scalar for ``backward()``; a clean pass whose weight gradient counts was added to ``.grad`` already.
        logits: [B, K] of the (mixed) pass, row i belonging to ``labels[i]`` as image a.
        targets: [B, K] rows that sum to 1.
        mixed: [B, C, H, W], what the network was trained on.
        partner: [B, C, H, W], image b of every pair before it is moved.
        saliency: ([B, H, W], [B, H, W]) of image a and image b.
        mask: [B, H, W] weight of image a.
    """

    loss: Tensor
    logits: Tensor
    targets: Tensor | None = None
    mixed: Tensor | None = None
    partner: Tensor | None = None
    saliency: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None


@dataclass
class Method:
    """A training method. Subclasses are dataclasses whose fields are named like the command-line flags.

    ``draw`` makes every random choice on the host; ``step`` depends on its arguments alone. The loop zeroes gradients
    before ``step`` and calls ``.loss.backward()`` after.
    """

    name: ClassVar[str]
    title: ClassVar[str]  # in tables and pictures
    recordable: ClassVar[bool] = False  # draws steer ``step`` as tensors alone, so that it can be a CUDA graph
    num_classes: int

    @classmethod
    def presets(cls, dataset: str) -> dict[str, Any]:
        """Settings that ``--method`` sets for ``dataset``; a value the user gives wins over them."""
        return {}

    def draw(self, rng: np.random.Generator, batch: int, height: int, width: int, epoch: int = 0) -> SimpleNamespace:
        """Random choices for one batch of ``batch`` images of ``height`` × ``width`` in epoch ``epoch`` (from 0)."""
        raise NotImplementedError

    def step(self, model: nn.Module, images: Tensor, labels: Tensor, draws: Any) -> Step:
        """The loss of one batch: ``images`` [B, C, H, W] normalised float32, ``labels`` [B] int64."""
        raise NotImplementedError


@dataclass
class PartialMixing(Method):
    """A method that can mix only the last int(B·p) images of a batch, among themselves, and leave the others clean.

    Settings (defaults of the flags; ``mixup_alpha`` None means the preset):
        mixup_alpha: α of λ ~ Beta(α, α), one λ a batch; 0: always λ = 1, image a alone.
        prob_mix: p.
        mix_schedule: "fixed"; "scheduled": p grows linearly until ``mix_scheduled_epoch``; "delayed": 0 before it.
        mix_scheduled_epoch: that epoch, at least 1.
    """

    mixup_alpha: float | None = None
    prob_mix: float = 1.0
    mix_schedule: str = "fixed"
    mix_scheduled_epoch: int = 300

    def __post_init__(self) -> None:
        if self.mixup_alpha is None:
            self.mixup_alpha = self.presets("")["mixup_alpha"]
        assert self.mixup_alpha is not None
        if not self.mixup_alpha >= 0:
            raise ValueError(f"mixup_alpha must not be negative: {self.mixup_alpha}")
        if not 0 <= self.prob_mix <= 1:
            raise ValueError(f"prob_mix must lie in [0, 1]: {self.prob_mix}")
        if self.mix_schedule not in ("fixed", "scheduled", "delayed"):
            raise ValueError(f"mix_schedule must be fixed, scheduled or delayed: {self.mix_schedule!r}")
        if self.mix_scheduled_epoch < 1:
            raise ValueError(f"mix_scheduled_epoch must be at least 1: {self.mix_scheduled_epoch}")

    def mixed_count(self, batch: int, epoch: int) -> int:
        """How many images at the end of a batch are mixed in ``epoch`` (from 0)."""
        share = self.prob_mix
        if self.mix_schedule == "scheduled":
            share *= min(1.0, (epoch + 1) / self.mix_scheduled_epoch)
        elif self.mix_schedule == "delayed" and epoch < self.mix_scheduled_epoch:
            share = 0.0
        return int(batch * share)

    def draw_lam(self, rng: np.random.Generator) -> float:
        """λ, the share of image a."""
        assert self.mixup_alpha is not None
        return rng.beta(self.mixup_alpha, self.mixup_alpha) if self.mixup_alpha > 0 else 1.0


class _BinaryCrossEntropy(torch.autograd.Function):
    """``F.binary_cross_entropy`` in value and gradient, without its range check, which turns a NaN into an abort of
    the CUDA context instead of a NaN loss the training loop can report."""

    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(probabilities, targets)
        log_p = probabilities.log().clamp(min=-100)
        log_q = (-probabilities).log1p().clamp(min=-100)
        return ((targets - 1) * log_q - targets * log_p).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        p, t = ctx.saved_tensors
        return grads[0] * (p - t) / ((1 - p) * p).clamp(min=1e-12) / p.numel(), None


def bce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy between softmax(logits) and the target rows, averaged over B·K, in float32.

    Args:
        logits: [B, K] of any floating type.
        targets: [B, K] rows that sum to 1.

    Equals ``F.binary_cross_entropy(softmax(logits.float(), 1), targets)`` in value and gradient; the published
    learning rates belong to this loss, not to cross-entropy.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return _BinaryCrossEntropy.apply(torch.softmax(logits.float(), dim=1), targets.float())


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """[B] integer labels to [B, K] float32 rows."""
    # comparison instead of F.one_hot, which reads the largest label back to the host
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()


def mixed_targets(labels: Tensor, permutation: Tensor, ratio: Tensor | float, num_classes: int) -> Tensor:
    """ratio·y + (1 − ratio)·y[P] as [B, K]; ``ratio`` is one number or [B], the share of image a."""
    rows = one_hot(labels, num_classes)
    # lerp keeps rows exact whose image is its own partner
    return torch.lerp(rows[permutation], rows, as_share(ratio, rows.device).reshape(-1, 1))


def as_share(value: Any, device: torch.device) -> Tensor:
    """A number, or a tensor, as float32 tensor on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32, non_blocking=True)
    # filled there: copying a number to a GPU would wait for it
    return torch.full((), float(value), device=device)


def as_index(permutation: Any, device: torch.device) -> Tensor:
    """A permutation given as array, list or tensor, as int64 on ``device``."""
    return torch.as_tensor(permutation, dtype=torch.int64).to(device, non_blocking=True)


def partner_index(permutation: Any, batch: int, device: torch.device) -> Tensor:
    """[B] int64 on ``device``: the position of every image's partner when the last m = len(permutation) images of a
    batch are permuted among themselves. The images in front of them stay clean: each is its own partner."""
    index = as_index(permutation, device)
    clean = batch - len(index)
    if clean < 0:
        raise ValueError(f"a permutation of {len(index)} does not fit a batch of {batch}")
    return torch.cat([torch.arange(clean, device=device), index + clean]) if clean else index


def partners(images: Tensor, permutation: Any) -> Tensor:
    """``images[P]`` of a batch [B, …] and a permutation [B], array or tensor; ``ValueError`` if lengths differ."""
    index = as_index(permutation, images.device)
    if index.shape != images.shape[:1]:
        raise ValueError(f"permutation must be [{len(images)}] for {tuple(images.shape)}, got {tuple(index.shape)}")
    return images[index]
