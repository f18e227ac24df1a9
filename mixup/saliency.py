"""Saliency: gradients of the loss in the input (SAGE, Puzzle Mix, Co-Mixup), and what stands out from its surroundings
(SaliencyMix)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SURROUND_RADII = (12, 24, 48, 28, 56, 112)  # of fine-grained saliency, in pixels


def input_gradient(
    model: nn.Module, images: Tensor, loss_of: Callable[[Tensor], Tensor], weight_share: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Gradient of a loss in the input pixels, in one pass.

    Args:
        model: called in the mode (train or eval) it is in.
        images: [B, C, H, W] float32.
        loss_of: maps the logits [B, K] to a scalar loss.
        weight_share: what part of the loss' weight gradient is added to the parameters' ``.grad``. With 0 the weight
            gradients are not even computed, but by a compiled network, which knows one backward pass only.

    Returns:
        (gradient [B, C, H, W] of the whole loss, the loss as a detached scalar). ``images`` is left as it was.
    """
    pixels = images.detach().requires_grad_(True)
    # under DistributedDataParallel gradients travel once, with the second pass
    on_its_own = getattr(model, "no_sync", nullcontext)
    with torch.enable_grad(), on_its_own():
        loss = loss_of(model(pixels))
        if weight_share == 0:
            (gradient,) = torch.autograd.grad(loss, pixels)
        else:
            (loss * weight_share).backward()
            assert pixels.grad is not None
            gradient = pixels.grad / weight_share
    return gradient, loss.detach()


def mean_magnitude(gradient: Tensor) -> Tensor:
    """[B, C, H, W] to [B, H, W]: mean over channels of |gradient| (SAGE)."""
    return gradient.abs().mean(dim=1)


def root_mean_square(gradient: Tensor) -> Tensor:
    """[B, C, H, W] to [B, H, W]: root of the mean over channels of gradient² (Puzzle Mix, Co-Mixup)."""
    return gradient.square().mean(dim=1).sqrt()


def ones_where_zero(saliency: Tensor) -> Tensor:
    """Maps [B, H, W] whose sum is 0 (a saturated network) become 1 everywhere, so that they can be normalised."""
    return torch.where(saliency.sum(dim=(1, 2), keepdim=True) == 0, 1.0, saliency)


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
    rows = torch.arange(1, height + 1, device=grey.device)
    columns = torch.arange(1, width + 1, device=grey.device)
    for radius in SURROUND_RADII:
        top, bottom = (rows - radius).clamp(min=0), (rows + radius).clamp(max=height)
        left, right = (columns - radius).clamp(min=0), (columns + radius).clamp(max=width)
        band = integral.index_select(0, bottom).sub_(integral.index_select(0, top))
        total = band.index_select(1, right).sub_(band.index_select(1, left))
        area = ((bottom - top)[:, None] * (right - left)).int()[:, :, None]
        # centre minus surround. Below 2**24 the float is exact, and at these radii no quotient rounds up to an integer
        difference = (grey * area).sub_(total).float().div_((area - 1).clamp(min=1)).trunc_()
        on += difference.clamp(min=0)
        off -= difference.clamp_(max=0)
    return _rescaled(_rescaled(on) + _rescaled(off)).permute(2, 0, 1).contiguous().to(torch.uint8)


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
