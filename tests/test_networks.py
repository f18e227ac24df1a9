"""Every method on networks that researchers bring: a vision transformer, a ConvNeXt, a ResNet-50, at 96 pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import ConvNeXt, ResNet, VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import Bottleneck

from mixup import METHODS, build_method


def transformer() -> tuple[nn.Module, nn.Module]:
    model = VisionTransformer(96, 16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
    return model, model.encoder.layers[0]  # type: ignore[return-value]


def convnext() -> tuple[nn.Module, nn.Module]:
    model = ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=5)
    return model, model.features[1]


def resnet() -> tuple[nn.Module, nn.Module]:
    """The blocks of a ResNet-50, one a stage, in a sixteenth of its width."""
    model = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, width_per_group=4)
    return model, model.layer1


@pytest.mark.parametrize("network", [transformer, convnext, resnet])
@pytest.mark.parametrize("name", METHODS)
def test_three_steps_of_adamw_under_autocast(name: str, network: Callable[[], tuple[nn.Module, nn.Module]]) -> None:
    torch.manual_seed(0)
    model, inside = network()
    method: Any = build_method(name, "mine", 5, mean=(0.5,) * 3, std=(0.25,) * 3)
    if name == "manifold":
        method.points = [inside]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    images, labels = torch.randn(4, 3, 96, 96), torch.arange(4)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = method.step(model, images, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    changed = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert all(changed)
