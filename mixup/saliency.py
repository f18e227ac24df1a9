"""Saliency: gradients of the loss in the input (SAGE, Puzzle Mix, Co-Mixup), and what stands out from its surroundings
(SaliencyMix)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Clean, Model, channels, check_logits, counting, kept, to_device
from .settings import setting

SURROUND_RADII = (12, 24, 48, 28, 56, 112)  # of fine-grained saliency, in pixels
FEW_PIXELS = 1 << 16  # of so many all sizes of surroundings are summed at once: fewer launches; of more, in the cache


def saliency_pass(
    model: Model, images: Tensor, loss_of: Callable[[Tensor], Tensor], share: float = 0.0, eval_mode: bool = False
) -> tuple[Tensor, Clean | None]:
    """One pass whose gradient in the pixels is the saliency, and whose gradients in the parameters may count as well.

    Args:
        model: maps images to logits [B, K]. It runs in the modes its modules are in.
        images: [B, C, H, W] floating; left as they are.
        loss_of: maps the logits to a scalar loss.
        share: weight of that loss in the training objective. With 0 no gradient in the parameters is computed.
        eval_mode: run in eval mode instead; every module then gets its mode back.

    Returns:
        (gradient [B, C, H, W] of the loss in the pixels; the pass's part of the objective, or None with share 0).

    Raises:
        ValueError: a network whose parameters' gradients would be lost (FSDP), or that allows no second pass.
    """
    if share and not isinstance(model, nn.Module):
        raise ValueError(f"the clean loss trains the network's parameters: it needs a module, not {model!r}")
    if getattr(model, "static_graph", False):
        raise ValueError("DistributedDataParallel(static_graph=True) allows no saliency pass: leave static_graph out")
    pixels = images.detach().requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) and share else []
    # float16 would lose small gradients; a power of two is taken out again without a rounding error
    half = torch.is_autocast_enabled(images.device.type) and torch.get_autocast_dtype(images.device.type) == torch.half
    scale = 2.0**12 if half else 1.0
    # under DistributedDataParallel gradients are exchanged once, in the backward pass of the whole objective
    alone = getattr(model, "no_sync", nullcontext)
    with torch.enable_grad(), alone(), modes_kept(model, eval_mode):
        loss = loss_of(check_logits(model(pixels), len(pixels)))
        weighted = loss * share if share else loss
        found = torch.autograd.grad(weighted * scale if half else weighted, [pixels, *parameters], allow_unused=True)
    in_pixels = torch.zeros_like(pixels) if found[0] is None else found[0]
    if half or share:
        in_pixels = in_pixels / (scale * (share or 1.0))
    if not share:
        return in_pixels, None
    lost = [g is None and type(p).__name__ == "DTensor" for p, g in zip(parameters, found[1:], strict=True)]
    if any(lost) or (parameters and all(g is None for g in found[1:])):
        raise ValueError(
            "the clean pass gave the network's parameters no gradients, as under FSDP, which trains copies of them: "
            "use DistributedDataParallel, or settings without a clean loss (update_ratio=1, clean_lam=0)"
        )
    used = [(p, g / scale if half else g) for p, g in zip(parameters, found[1:], strict=True) if g is not None]
    return in_pixels, Clean(weighted.detach().float(), [p for p, _ in used], [g for _, g in used])


def clean_weight(presets: dict[str, float]) -> Any:
    """The setting ``clean_lam`` of Puzzle Mix and Co-Mixup."""
    return setting(0.0, "weight of the clean loss in the saliency pass", low=0, presets=presets)


def cross_entropy_maps(
    model: Model, images: Tensor, labels: Tensor, weight: float, eval_mode: bool, known: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Clean | None]:
    """Saliency of Puzzle Mix and Co-Mixup, from a pass whose loss is the mean cross-entropy; ``weight`` times that loss
    is part of the objective. With ``known`` maps there is no pass.

    Returns:
        (maps [B, H, W]; the gradient in the pixels; the pass's part of the objective), None where there is no such.
    """
    if known is not None:
        return known.float(), None, None
    gradient, clean = saliency_pass(
        model,
        images,
        lambda logits: (weight or 1.0) * F.cross_entropy(logits.float(), labels),
        share=float(weight > 0),
        eval_mode=eval_mode,
    )
    with torch.no_grad():
        return root_mean_square(gradient), gradient, clean


@contextmanager
def modes_kept(model: Any, eval_mode: bool) -> Iterator[None]:
    """The block runs in eval mode, if so asked; then every module's mode is put back. A function runs as it is."""
    modes = []
    if eval_mode and isinstance(model, nn.Module):
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def mean_magnitude(gradient: Tensor) -> Tensor:
    """[B, C, H, W] to [B, H, W]: mean over channels of |gradient| (SAGE)."""
    return gradient.abs().mean(dim=1)


def root_mean_square(gradient: Tensor) -> Tensor:
    """[B, C, H, W] to [B, H, W]: root of the mean over channels of gradient² (Puzzle Mix, Co-Mixup)."""
    return gradient.square().mean(dim=1).sqrt()


def ones_where_zero(saliency: Tensor) -> Tensor:
    """Maps [B, H, W] that are 0 everywhere (of a saturated network) become 1, so that they can be normalised."""
    one = channels((1.0,), saliency.device).to(saliency.dtype)
    return torch.where(saliency.any(dim=(1, 2), keepdim=True), saliency, one)


def fine_grained_saliency(images_u8: Tensor) -> Tensor:
    """Fine-grained static saliency of every image: how far a pixel is from the mean of its surroundings, over six sizes
    (Montabone & Soto, "Human detection using a mobile platform and novel features derived from a visual saliency
    mechanism", 2010); the bytes that OpenCV's ``StaticSaliencyFineGrained`` gives for an image handed over as RGB.

    Args:
        images_u8: [B, 3, H, W] uint8, RGB.

    Returns:
        uint8 [B, H, W]; all 0 for an image of one colour.

    Raises:
        ValueError: another shape or type.
    """
    if images_u8.dtype != torch.uint8 or images_u8.ndim != 4 or images_u8.shape[1] != 3 or images_u8.numel() == 0:
        raise ValueError(f"images must be uint8 [B, 3, H, W], got {images_u8.dtype} {tuple(images_u8.shape)}")
    height, width = images_u8.shape[2:]
    channels = images_u8.int()
    grey = (3735 * channels[:, 0] + 19235 * channels[:, 1] + 9798 * channels[:, 2] + 16384) >> 15
    # images last, so that rows and columns are picked in contiguous pieces
    grey = _binomial_blur(_binomial_blur(grey)).permute(1, 2, 0).contiguous()

    # int32 may wrap around in the integral of a huge image; differences are right all the same
    integral = F.pad(grey, (0, 0, 1, 0, 1, 0)).cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)
    on, off = torch.zeros_like(grey, dtype=torch.float32), torch.zeros_like(grey, dtype=torch.float32)
    for radii in [SURROUND_RADII] if grey.numel() <= FEW_PIXELS else zip(SURROUND_RADII):
        top, bottom, left, right, tall, wide = _surroundings(radii, height, width, grey.device)
        strips = integral.index_select(1, right).sub_(integral.index_select(1, left)).view(-1, width, grey.shape[2])
        total = strips.index_select(0, bottom).sub_(strips.index_select(0, top)).view(len(radii), *grey.shape)
        area = tall * wide
        # centre minus surround. Below 2**24 the float is exact, and at these radii no quotient rounds up to an integer
        difference = (grey * area).sub_(total).float().div_((area - 1).clamp_(min=1)).trunc_()
        on += difference.clamp(min=0).sum(dim=0)
        off -= difference.clamp_(max=0).sum(dim=0)
    return _rescaled(_rescaled(on) + _rescaled(off)).permute(2, 0, 1).contiguous().to(torch.uint8)


@kept
def _surroundings(radii: tuple[int, ...], height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    """Surroundings of R radii, clipped by the image, as (top, bottom, left, right, tall, wide).

    left, right [R·W] are columns of an integral image [H+1, W+1], whose differences are strips [(H+1)·R, W]; top,
    bottom [R·H] are rows of these, whose differences are sums over the surroundings; tall [R, H, 1, 1] and
    wide [R, 1, W, 1] are their sides.
    """
    radius = to_device(radii, device)[:, None]
    rows, columns = counting(height, device) + 1, counting(width, device) + 1
    top, bottom = (rows - radius).clamp(min=0), (rows + radius).clamp(max=height)
    left, right = (columns - radius).clamp(min=0), (columns + radius).clamp(max=width)
    strip = counting(len(radii), device)[:, None]
    edges = (x.flatten() for x in (top * len(radii) + strip, bottom * len(radii) + strip, left, right))
    return *edges, (bottom - top)[:, :, None, None].int(), (right - left)[:, None, :, None].int()


def _binomial_blur(grey: Tensor) -> Tensor:
    """[B, H, W] integers, 3×3 weights 1 2 1, rounded; borders reflected without the edge."""
    height, width = grey.shape[1:]
    first, last = min(1, height - 1), max(height - 2, 0)
    above, below = grey[:, first : first + 1], grey[:, last : last + 1]
    grey = torch.cat([above, grey, below], dim=1)
    first, last = min(1, width - 1), max(width - 2, 0)
    before, after = grey[:, :, first : first + 1], grey[:, :, last : last + 1]
    grey = torch.cat([before, grey, after], dim=2)
    grey = grey[:, :-2] + 2 * grey[:, 1:-1] + grey[:, 2:]
    return (grey[:, :, :-2] + 2 * grey[:, :, 1:-1] + grey[:, :, 2:] + 8) >> 4


def _rescaled(maps: Tensor) -> Tensor:
    """⌊255·value/max⌋ of every map in [H, W, B]; 0 where the maximum is 0."""
    return (255 * maps / maps.amax(dim=(0, 1)).clamp(min=1)).floor()
