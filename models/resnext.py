"""ResNeXt: Xie et al., "Aggregated residual transformations for deep neural networks", CVPR 2017."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .mixing import MIXING_POINTS, through


class ResNeXtBottleneck(nn.Module):
    """1×1, grouped 3×3 (which carries the stride) and 1×1 convolution to 4·planes channels, each with batch norm."""

    def __init__(self, in_channels: int, planes: int, cardinality: int, base_width: int, stride: int) -> None:
        super().__init__()
        width = cardinality * (planes * base_width // 64)
        self.conv_reduce = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn_reduce = nn.BatchNorm2d(width)
        self.conv_conv = nn.Conv2d(width, width, 3, stride, padding=1, groups=cardinality, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv_expand = nn.Conv2d(width, 4 * planes, 1, bias=False)
        self.bn_expand = nn.BatchNorm2d(4 * planes)
        self.downsample = nn.Sequential()
        if stride != 1 or in_channels != 4 * planes:
            convolution = nn.Conv2d(in_channels, 4 * planes, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(4 * planes))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn_reduce(self.conv_reduce(x)), inplace=True)
        h = F.relu(self.bn(self.conv_conv(h)), inplace=True)
        h = self.bn_expand(self.conv_expand(h))
        return F.relu(h + self.downsample(x), inplace=True)


class ResNeXt(nn.Module):
    """Logits [B, num_classes] of images [B, 3, H, W].

    Args:
        depth: 9n + 2 for n blocks in each of the three stages.
        cardinality: groups of the 3×3 convolutions.
        base_width: channels of a group in the first stage.
        num_classes: K.
        dropout: dropout ½ before the classifier.
    """

    mixing_points = MIXING_POINTS

    def __init__(self, depth: int, cardinality: int, base_width: int, num_classes: int, dropout: bool = False) -> None:
        super().__init__()

        def stage(in_channels: int, planes: int, stride: int) -> nn.Sequential:
            first = ResNeXtBottleneck(in_channels, planes, cardinality, base_width, stride)
            rest = [
                ResNeXtBottleneck(4 * planes, planes, cardinality, base_width, 1) for _ in range((depth - 2) // 9 - 1)
            ]
            return nn.Sequential(first, *rest)

        self.conv_1_3x3 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(64)
        self.stage_1 = stage(64, 64, stride=1)
        self.stage_2 = stage(256, 128, stride=2)
        self.stage_3 = stage(512, 256, stride=2)
        self.dropout = nn.Dropout(0.5 if dropout else 0.0)
        self.classifier = nn.Linear(1024, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))
        nn.init.kaiming_normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor, mix_at: int | None = None, mix: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """``mix``, if given, is applied at mixing point ``mix_at``: 0 the input, 1 or 2 after that stage."""
        return through((self._stem, self.stage_2, self._head), x, mix_at, mix)

    def _stem(self, x: Tensor) -> Tensor:
        return self.stage_1(F.relu(self.bn_1(self.conv_1_3x3(x)), inplace=True))

    def _head(self, x: Tensor) -> Tensor:
        x = self.stage_3(x)
        return self.classifier(self.dropout(x.mean(dim=(2, 3))))
