"""Wide ResNets: Zagoruyko & Komodakis, "Wide residual networks", BMVC 2016."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .mixing import MIXING_POINTS, through


class WideBlock(nn.Module):
    """Two 3×3 convolutions with biases, each after batch norm and ReLU; the second one carries the stride."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1)
        # unlike the pre-activation ResNets here, of x itself
        changes = stride != 1 or in_channels != channels
        self.shortcut = nn.Sequential(*([nn.Conv2d(in_channels, channels, 1, stride)] if changes else []))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.bn1(x), inplace=True))
        h = self.conv2(F.relu(self.bn2(h), inplace=True))
        return h + self.shortcut(x)


class WideResNet(nn.Module):
    """Logits [B, num_classes] of images [B, 3, H, W].

    Args:
        depth: 6n + 4 for n blocks in each of the three stages.
        widen: the stages have 16, 32 and 64 times as many channels.
        num_classes: K.
        stride: of the first convolution.
        dropout: dropout ½ before the classifier.
    """

    mixing_points = MIXING_POINTS

    def __init__(self, depth: int, widen: int, num_classes: int, stride: int = 1, dropout: bool = False) -> None:
        super().__init__()
        n = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, stride, padding=1)
        self.layer1 = _stage(16, 16 * widen, n, stride=1)
        self.layer2 = _stage(16 * widen, 32 * widen, n, stride=2)
        self.layer3 = _stage(32 * widen, 64 * widen, n, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * widen, momentum=0.9)
        self.dropout = nn.Dropout(0.5 if dropout else 0.0)
        self.linear = nn.Linear(64 * widen, num_classes)

    def forward(self, x: Tensor, mix_at: int | None = None, mix: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """``mix``, if given, is applied at mixing point ``mix_at``: 0 the input, 1 or 2 after that stage."""
        return through((self._stem, self.layer2, self._head), x, mix_at, mix)

    def _stem(self, x: Tensor) -> Tensor:
        return self.layer1(self.conv1(x))

    def _head(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.layer3(x)), inplace=True)
        return self.linear(self.dropout(x.mean(dim=(2, 3))))


def _stage(in_channels: int, channels: int, depth: int, stride: int) -> nn.Sequential:
    blocks = [WideBlock(in_channels, channels, stride)]
    blocks += [WideBlock(channels, channels, 1) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)
