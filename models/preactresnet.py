"""Pre-activation ResNets: He et al., "Identity mappings in deep residual networks", ECCV 2016."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .mixing import MIXING_POINTS, through


class PreActBlock(nn.Module):
    """Two 3×3 convolutions, each after batch norm and ReLU."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(h)
        h = self.conv1(h)
        h = self.conv2(F.relu(self.bn2(h), inplace=True))
        return h + shortcut


class PreActBottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolution to four times the channels, each after batch norm and ReLU."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, self.expansion * channels, 1, bias=False)
        self.shortcut = _shortcut(in_channels, self.expansion * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(h)
        h = self.conv1(h)
        h = self.conv2(F.relu(self.bn2(h), inplace=True))
        h = self.conv3(F.relu(self.bn3(h), inplace=True))
        return h + shortcut


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """The 1×1 convolution where the shape changes; None where the input itself is added."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))


class PreActResNet(nn.Module):
    """Logits [B, num_classes] of images [B, 3, H, W].

    Args:
        block: ``PreActBlock`` or ``PreActBottleneck``.
        depths: number of blocks in each of the four stages.
        num_classes: K.
        stride: of the first convolution.
        initial_channels: channels of the first stage; the next ones have 2, 4 and 8 times as many.
        dropout: dropout ½ before the classifier.
    """

    mixing_points = MIXING_POINTS

    def __init__(
        self,
        block: type[PreActBlock | PreActBottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int,
        stride: int = 1,
        initial_channels: int = 64,
        dropout: bool = False,
    ) -> None:
        super().__init__()
        c = initial_channels
        self.conv1 = nn.Conv2d(3, c, 3, stride, padding=1, bias=False)
        self.layer1 = _stage(block, c, c, depths[0], stride=1)
        self.layer2 = _stage(block, c * block.expansion, 2 * c, depths[1], stride=2)
        self.layer3 = _stage(block, 2 * c * block.expansion, 4 * c, depths[2], stride=2)
        self.layer4 = _stage(block, 4 * c * block.expansion, 8 * c, depths[3], stride=2)
        self.dropout = nn.Dropout(0.5 if dropout else 0.0)
        self.linear = nn.Linear(8 * c * block.expansion, num_classes)

    def forward(self, x: Tensor, mix_at: int | None = None, mix: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """``mix``, if given, is applied at mixing point ``mix_at``: 0 the input, 1 or 2 after that stage."""
        return through((self._stem, self.layer2, self._head), x, mix_at, mix)

    def _stem(self, x: Tensor) -> Tensor:
        return self.layer1(self.conv1(x))

    def _head(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(x))
        return self.linear(self.dropout(x.mean(dim=(2, 3))))


def _stage(
    block: type[PreActBlock | PreActBottleneck], in_channels: int, channels: int, depth: int, stride: int
) -> nn.Sequential:
    blocks = [block(in_channels, channels, stride)]
    blocks += [block(channels * block.expansion, channels, 1) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)
