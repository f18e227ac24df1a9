"""docs/recipes.md: the order of calls of each loop, and the recipe itself where its library is installed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixup.base import Method
from tests.common import ROOT
from tests.test_seam import batch, case, draws_of, gradients, network

LIMIT = 1e-3  # of the gradient's norm; it always acts


def loss_of(method: Method, model: nn.Module, seed: int) -> Tensor:
    images, labels = batch(seed)
    return method.step(model, images, labels, draws_of(method, images, seed)).loss


def by_hand(method: Method, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The gradients of two batches, each by itself, then their mean, clipped."""
    found = []
    for seed in (0, 1):
        model.zero_grad()
        loss_of(method, model, seed).backward()
        found.append(gradients(model))
    for parameter, *both in zip(model.parameters(), *found, strict=True):
        parameter.grad = (both[0] + both[1]) / 2
    nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
    optimizer.step()


def lightning(method: Method, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """training_step, zero_grad, backward in a closure; the last batch's is called by the optimiser, and clips."""

    def closure(seed: int) -> Tensor:
        loss = loss_of(method, model, seed) / 2
        if seed == 0:
            optimizer.zero_grad()
        loss.backward()
        if seed == 1:
            nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        return loss

    closure(0)
    optimizer.step(lambda: float(closure(1).detach()))


def timm(method: Method, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The loss over two and scaled, backward; after the second unscale, clip, step, then zero_grad."""
    scaler = torch.amp.GradScaler("cpu")
    for seed in (0, 1):
        scaler.scale(loss_of(method, model, seed) / 2).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def accelerate(method: Method, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The forward pass is replaced by one that returns float32 under autocast; step and zero_grad after the second."""
    forward = model.forward

    def wrapped(*args: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            return forward(*args).float()

    model.forward = wrapped  # type: ignore[method-assign]
    for seed in (0, 1):
        (loss_of(method, model, seed) / 2).backward()
    nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("order", [lightning, timm, accelerate])
@pytest.mark.parametrize("name", ["cutmix", "puzzle clean", "comix", "sage", "sage eval"])
def test_the_order_of_its_calls(name: str, order: Callable[[Method, nn.Module, Any], None]) -> None:
    after = []
    for way in (by_hand, order):
        model = network()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        way(case(name), model, torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9))
        after.append([old - new.detach() for old, new in zip(before, model.parameters(), strict=True)])
    assert sum(float(change.square().sum()) for change in after[0]) ** 0.5 == pytest.approx(LIMIT, rel=1e-2)
    for expected, got in zip(*after, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * LIMIT)


RECIPES = dict(
    re.findall(r"\n## (\w+)\n.*?```python\n(.*?)```", (ROOT / "docs/recipes.md").read_text("utf-8"), flags=re.DOTALL)
)


def test_there_are_three() -> None:
    assert list(RECIPES) == ["Lightning", "timm", "accelerate"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_where_its_library_is_installed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name.lower())
    monkeypatch.chdir(tmp_path)
    data = torch.utils.data.TensorDataset(torch.randn(16, 3, 32, 32), torch.randint(10, (16,)))
    names: dict[str, Any] = {"loader": torch.utils.data.DataLoader(data, batch_size=4)}
    exec(RECIPES[name], names)
    if name != "Lightning":
        assert names["loss"].isfinite()
        assert names["net"].training
