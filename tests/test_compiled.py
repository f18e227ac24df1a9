"""What ``--fast`` compiles on CUDA, traced on the CPU: no graph breaks, and few compilations however long a run is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mixup import METHODS, build_method, puzzle
from models import ARCHITECTURES, build_model
from models.mixing import MIXING_POINTS, through
from utils.device import compiled

# PyTorch compiles a function anew 8 times, and from then on runs it as it is without a word
MOST = 6


class Compilations:
    """A backend that compiles nothing, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architectures_have_no_graph_break(arch: str) -> None:
    with torch.device("meta"):  # no numbers: widths do not matter
        model, images = build_model(arch, 10, initial_channels=4, dropout=True), torch.empty(2, 3, 32, 32)
    for stage in model.children():
        if isinstance(stage, nn.Sequential):
            assert len({type(block) for block in stage}) == 1
            del stage[2:]  # the later blocks of a stage are like its second
    seen = Compilations()
    forward = torch.compile(model.forward, backend=seen, fullgraph=True)
    assert forward(images).shape == (2, 10)
    assert seen.count == 1
    if arch in ("preactresnet18", "wrn16_8", "resnext29_4_24"):  # of each family one
        assert forward(images, 1, torch.neg).shape == (2, 10)
        assert seen.count == 2


def test_a_graph_break_would_be_an_error() -> None:
    class Peeking(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x.sum().item() if x.sum() > 0 else x

    with pytest.raises(Exception, match=r"data-dependent|Data-dependent|graph break"):
        torch.compile(Peeking(), backend=Compilations(), fullgraph=True)(torch.ones(2))


class Small(nn.Module):
    """The hook of all networks, and little to trace."""

    mixing_points = MIXING_POINTS

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3))
        self.linear = nn.Linear(3, 10)

    def forward(self, x: torch.Tensor, mix_at: int | None = None, mix: Any = None) -> torch.Tensor:
        return self.linear(through(list(self.parts), x, mix_at, mix).mean(dim=(2, 3)))


@pytest.mark.parametrize(("name", "schedule"), [*((name, "fixed") for name in METHODS), ("manifold", "delayed")])
def test_a_run_is_compiled_a_few_times_and_never_for_a_value(
    name: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs and evaluations with a smaller last batch each."""
    monkeypatch.setattr(puzzle, "swap", lambda unary, *rest: np.zeros(unary.shape[:-1], np.int64))  # needs no solver
    torch.manual_seed(0)
    model, seen = Small(), Compilations()
    model.forward = torch.autocast("cpu", torch.bfloat16)(compiled(model.forward, batch=6, backend=seen))  # type: ignore[method-assign]
    settings: dict[str, Any] = {"sage": {"rand_pos": 0.01, "update_ratio": 0.7}, "comix": {"m_part": 4}}.get(name, {})
    if schedule == "delayed":
        settings = {"mix_schedule": "delayed", "mix_scheduled_epoch": 1}
    method = build_method(name, "cifar10", 10, **settings)
    counts = []
    for epoch in range(4):  # the fourth one brings no new shape
        model.train()
        for number, size in enumerate((6, 6, 6, 5)):
            images, labels = torch.randn(size, 3, 16, 16), torch.arange(size)
            draws = method.draw(np.random.default_rng((epoch, number)), size, 16, 16, epoch)
            if name == "manifold":
                draws.mix_at = (number + 2 * epoch) % 3 if number < 3 else epoch % 3
            if name == "saliencymix":
                draws.mix = number % 2 == 0
            method.step(model, images, labels, draws).loss.backward()
            model.zero_grad()
        model.eval()
        with torch.no_grad():
            for size in (8, 8, 3):
                model(torch.randn(size, 3, 16, 16))
        counts.append(seen.count)
    assert 2 <= counts[3] <= MOST
    assert counts[3] == counts[2]


def test_a_value_that_compiles_anew_is_counted() -> None:
    """λ as a number instead of a tensor."""
    model, seen = Small(), Compilations()
    forward = compiled(model.forward, backend=seen)

    def times(lam: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: lam * x

    for lam in (0.25, 0.5, 0.75):
        forward(torch.ones(2, 3, 16, 16), 1, times(lam))
    assert seen.count >= 2


def test_a_mixing_pass_of_another_size_is_not_compiled() -> None:
    model, seen = Small().eval(), Compilations()
    forward = compiled(model.forward, batch=4, backend=seen)
    images = torch.randn(3, 3, 16, 16)
    assert torch.equal(forward(images, 1, torch.neg), model.forward(images, 1, torch.neg))
    assert seen.count == 0
    forward(images)
    assert seen.count == 1
