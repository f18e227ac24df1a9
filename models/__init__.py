"""The networks: one file a family. They know nothing of mixing but the hook ``forward(x, mix_at=None, mix=None)``.

>>> model = build_model("preactresnet18", num_classes=10)
>>> logits = model(images)
"""

from __future__ import annotations

import difflib

from torch import nn

from .preactresnet import PreActBlock, PreActBottleneck, PreActResNet
from .resnext import ResNeXt
from .wideresnet import WideResNet

_PREACT: dict[str, tuple[type[PreActBlock | PreActBottleneck], tuple[int, int, int, int]]] = {
    "preactresnet18": (PreActBlock, (2, 2, 2, 2)),
    "preactresnet34": (PreActBlock, (3, 4, 6, 3)),
    "preactresnet50": (PreActBottleneck, (3, 4, 6, 3)),
    "preactresnet101": (PreActBottleneck, (3, 4, 23, 3)),
    "preactresnet152": (PreActBottleneck, (3, 8, 36, 3)),
}
_WIDE = {"wrn16_8": (16, 8), "wrn28_2": (28, 2), "wrn28_10": (28, 10)}  # depth, widening
_RESNEXT = {"resnext29_4_24": (29, 4, 24)}  # depth, cardinality, base width

ARCHITECTURES = [*_PREACT, *_WIDE, *_RESNEXT]


def build_model(
    arch: str, num_classes: int, stride: int = 1, initial_channels: int = 64, dropout: bool = False
) -> nn.Module:
    """A network with random weights, [B, 3, H, W] images of any size to [B, num_classes] logits.

    Args:
        arch: one of ``ARCHITECTURES``.
        num_classes: K.
        stride: of the first convolution, 2 for 64×64 images; the ResNeXt ignores it.
        initial_channels: width of the first stage of a preactresnet; the other families ignore it.
        dropout: dropout ½ before the classifier.

    Its ``forward(x, mix_at=None, mix=None)`` applies the callable ``mix`` to the activations at mixing point
    ``mix_at``: 0 the input, 1 after the first stage, 2 after the second. Entries of ``state_dict()`` are named and
    shaped as in published checkpoints.

    Raises:
        ValueError: unknown architecture, or a number below 1.
    """
    for name, value in {"num_classes": num_classes, "stride": stride, "initial_channels": initial_channels}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1: {value}")
    if arch in _PREACT:
        block, depths = _PREACT[arch]
        return PreActResNet(block, depths, num_classes, stride, initial_channels, dropout)
    if arch in _WIDE:
        return WideResNet(*_WIDE[arch], num_classes, stride, dropout)
    if arch in _RESNEXT:
        return ResNeXt(*_RESNEXT[arch], num_classes, dropout)
    nearest = difflib.get_close_matches(arch, ARCHITECTURES, n=1, cutoff=0)
    raise ValueError(f"unknown architecture {arch!r}; did you mean {nearest[0]}?")
