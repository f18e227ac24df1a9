"""A recorded step does what the step does. Recording is imitated here; tests/test_devices.py does it on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixup import METHODS, build_method
from mixup.base import Step
from models import build_model
from utils.device import WARM_UP, Captured, as_tensors

CPU = torch.device("cpu")
UNMIXED = build_method("vanilla", "cifar10", 2).unmixed(torch.zeros(1, 3, 2, 2), torch.zeros(1, dtype=torch.int64))
RECORDABLE = [name for name, method in METHODS.items() if method.recordable]


def imitate(work: Callable[[], Step]) -> tuple[Callable[[], None], Any]:
    """Like a CUDA graph: nothing is computed when recording, ``work`` is done on the same tensors at every replay."""
    result = SimpleNamespace()
    return lambda: vars(result).update(vars(work())), result


def training(name: str, recorded: bool) -> tuple[dict[str, Tensor], list[float], list[str]]:
    """Weights and losses after nine steps of two learning rates, with a smaller batch in between, and what happened."""
    torch.manual_seed(0)
    model: nn.Module = build_model("preactresnet18", 10, initial_channels=4)
    method = build_method(name, "cifar10", 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True)
    happened: list[str] = []

    def take(images: Tensor, labels: Tensor, draws: Any) -> Step:
        happened.append("step")
        optimizer.zero_grad()
        step = method.step(model, images, labels, draws)
        step.loss.backward()
        optimizer.step()
        return step

    def record(work: Callable[[], Step]) -> tuple[Callable[[], None], Any]:
        happened.append("record")
        return imitate(work)

    taken = Captured(take, lambda: optimizer.param_groups[0]["lr"], CPU, record) if recorded else take
    losses = []
    for number, count in enumerate([6, 6, 6, 6, 6, 4, 6, 6, 6]):
        optimizer.param_groups[0]["lr"] = 0.1 if number < 7 else 0.01
        rng = np.random.default_rng(number)
        images = torch.from_numpy(rng.standard_normal((count, 3, 12, 12), dtype=np.float32))
        labels = torch.from_numpy(rng.integers(10, size=count))
        draws = method.draw(rng, count, 12, 12)
        losses.append(taken(images, labels, draws if recorded else as_tensors(draws, CPU)).loss.item())
    return model.state_dict(), losses, happened


@pytest.mark.parametrize("name", RECORDABLE)
def test_a_recorded_step_does_what_the_step_does(name: str) -> None:
    weights, losses, _ = training(name, False)
    ours, our_losses, happened = training(name, True)
    assert our_losses == losses
    assert all(torch.equal(ours[key], weights[key]) for key in weights)
    assert happened[: WARM_UP + 1] == ["step"] * WARM_UP + ["record"]
    assert happened.count("record") == 2  # once for each learning rate


def test_a_lasting_change_of_shape_is_recorded_anew() -> None:
    """Also where the fourth batch, the first to be recorded, would be the last and smaller one of an epoch."""
    recorded: list[int] = []

    def record(work: Callable[[], Step]) -> tuple[Callable[[], None], Any]:
        recorded.append(number)
        return imitate(work)

    taken = Captured(lambda images, labels, draws: Step(2 * images.sum(), images, UNMIXED), lambda: 0, CPU, record)
    for number, count in enumerate([6, 6, 6, 4, 6, 6, 4, 6, 5, 5, 5, 6]):
        images = torch.full((count,), float(number))
        assert taken(images, images, SimpleNamespace()).loss == 2 * number * count
    assert recorded == [5, 9]


def test_sage_is_recordable() -> None:
    assert {"vanilla", "sage"} <= set(RECORDABLE)


def test_where_recording_fails_steps_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    def take(images: Tensor, labels: Tensor, draws: Any) -> Step:
        return Step(images.sum(), images, UNMIXED)

    def refuse(work: Callable[[], Step]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    taken = Captured(take, lambda: 0, CPU, refuse)
    for number in range(6):
        images = torch.full((2,), float(number))
        assert taken(images, images, SimpleNamespace()).loss == 2 * number
    assert [record.message.count("one by one") for record in caplog.records] in ([1], [])
    assert not taken.works


def test_draws_become_tensors() -> None:
    draws = as_tensors(SimpleNamespace(lam=0.25, permutation=np.array([1, 0]), candidates=None), CPU)
    assert draws.lam.dtype == torch.float32
    assert draws.permutation.dtype == torch.int64
    assert draws.candidates is None


def test_draws_may_be_a_named_tuple() -> None:
    class Draws(NamedTuple):
        lam: float
        permutation: np.ndarray
        candidates: None = None

    moved = as_tensors(Draws(0.25, np.array([1, 0])), CPU)
    assert moved.candidates is None
    assert torch.equal(moved.lam, torch.tensor(0.25))
    assert torch.equal(moved.permutation, torch.tensor([1, 0]))
