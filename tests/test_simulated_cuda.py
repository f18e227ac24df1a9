"""Whole training on a GPU that is not there.

Under ``FakeTensorMode`` tensors live on ``cuda`` without values: every operation checks shapes and devices. ``Watch``
sees each operation and writes down what crosses between host and device, what waits, and what is launched. Backward
passes need a real device; gradients of the right shape take their place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from load_data import NORMALISATION, Data, Split
from main import make_run
from mixup import METHODS, assignment, build_method, puzzle
from models import build_model
from models.preactresnet import PreActBlock, PreActResNet
from utils import options
from utils.checkpoint import Saver
from utils.device import as_tensors
from utils.errors import StopSignal
from utils.run import Run
from utils.train import Meter, evaluate, fit

GPU = torch.device("cuda", 0)
# what allocates, or makes a view that its schema does not call one: the device does nothing
FREE = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "lift_fresh", "_unsafe_view", "_reshape_alias"}


class Watch(TorchDispatchMode):
    """What operations did while it was on.

    ``launches``: names of those that give the device something to do. ``up``, ``down``: copies. ``waits``: those that
    wait for the device, or may. ``touched``: operations on the device with a tensor of the host, copies included: what
    a recorded step must not have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.up: list[str] = []
        self.down: list[str] = []
        self.waits: list[str] = []
        self.touched: list[str] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name == "_local_scalar_dense":
            self.waits += ["a value is read"] * given[0].is_cuda
            return 1.0 if given[0].is_floating_point() else 1
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        kinds = {x.device.type for x in given + made}
        if func.namespace != "aten" or "cuda" not in kinds:
            return result
        view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        if not self.paused and not view and name not in FREE:
            self.launches.append(name)
        if "cpu" in kinds:
            self.crossing(name, given, made, kwargs)
        return result

    def crossing(self, name: str, given: list[Tensor], made: list[Tensor], kwargs: dict[str, Any]) -> None:
        """An operation with tensors of both sides."""
        what = f"{name} of {', '.join(f'{x.device.type} {tuple(x.shape)}' for x in given)}"
        self.touched.append(what)
        source = given[-1] if name == "copy_" else given[0]
        if name not in ("_to_copy", "copy_"):
            self.waits.append(what)
        elif source.is_cuda:
            self.down.append(what)
            self.waits.append(what)
        else:
            self.up.append(what)
            if not (kwargs.get("non_blocking") and getattr(source, "pinned", False)):
                self.waits.append(what)


def clear_tables() -> None:
    """Tables that functions keep between calls: tensors of the simulation must not outlive it, nor others enter it."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "mixup":
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def pinned(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.pinned = True  # type: ignore[attr-defined]
    return copy


def to_host(tensor: Tensor) -> np.ndarray:
    """The copy to the host, and some numbers in place of its values."""
    tensor.detach().cpu()
    return np.full(tuple(tensor.shape), 0.5, np.float32)


def empty_gradients(loss: Tensor, inputs: Any, **_: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in inputs]


def small_network(*of_any_kind: Any) -> nn.Module:
    """A network for 10 classes, its weights made where they belong, because fake ones cannot be moved."""
    with torch.device(GPU):
        return PreActResNet(PreActBlock, (1, 1, 1, 1), 10, initial_channels=16)


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """In the test, ``cuda`` is a device, and its methods' two crossings to NumPy are made without values."""
    clear_tables()
    for module in (puzzle, assignment):
        monkeypatch.setattr(module, "to_host", to_host)
    # what is cut on the host does not matter here, and needs no solver
    monkeypatch.setattr(assignment, "_minimise", lambda cost, start, *rest: (start, start))
    monkeypatch.setattr(puzzle, "swap", lambda unary, *rest: np.zeros(unary.shape[:-1], np.int64))
    monkeypatch.setattr(torch.autograd, "grad", empty_gradients)
    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1e12, 1e12))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch, "compile", lambda forward, **how: forward)
    monkeypatch.setattr("main.build_model", small_network)
    monkeypatch.setattr(nn.Module, "to", lambda module, *given, **how: module)
    with FakeTensorMode():
        yield monkeypatch
    clear_tables()


class Unseen(nn.Module):
    """A network whose operations are not counted."""

    def __init__(self, network: nn.Module, watch: Watch) -> None:
        super().__init__()
        self.network, self.watch = network, watch
        self.mixing_points = network.mixing_points

    def forward(self, *given: Any) -> Tensor:
        self.watch.paused = True
        try:
            return self.network(*given)
        finally:
            self.watch.paused = False


def batch(number: int = 100) -> tuple[Tensor, Tensor]:
    return torch.empty(number, 3, 32, 32, device=GPU), torch.empty(number, dtype=torch.int64, device=GPU)


def drawn(method: Any, number: int = 100, seed: int = 0, **fixed: Any) -> Any:
    draws = method.draw(np.random.default_rng(seed), number, 32, 32)
    if hasattr(draws, "mix"):
        draws.mix = True
    for name, value in fixed.items():
        setattr(draws, name, value)
    return draws


def watched_step(name: str, settings: dict[str, Any], fixed: dict[str, Any], recorded: bool = False) -> Watch:
    """The second step of a run, with batches of 100: tables are there."""
    method, watch, (images, labels) = build_method(name, "cifar10", 10, **settings), Watch(), batch()
    model = Unseen(small_network(), watch)
    for seed in (0, 1):
        draws = drawn(method, seed=seed, **fixed)
        if recorded:
            draws = as_tensors(draws, GPU)
        with watch if seed else Watch():
            method.step(model, images, labels, draws)
    return watch


SAGE_ALL = {"rand_pos": 1.0, "update_ratio": 0.7}
SAGE_FEW = {"rand_pos": 0.01, "update_ratio": 0.7}
# method, settings, draws; copies down, each of which waits, and copies up, which do not; launches of draw, mix and loss
# outside the network's passes, at most
TABLE: list[tuple[str, dict[str, Any], dict[str, Any], tuple[int, int], int]] = [
    ("vanilla", {}, {}, (0, 0), 11),
    ("input", {}, {}, (0, 1), 18),
    ("manifold", {}, {}, (0, 1), 16),
    ("cutmix", {}, {}, (0, 1), 29),
    ("cutmix", {"prob_mix": 0.5}, {}, (0, 1), 31),
    ("saliencymix", {}, {}, (0, 1), 120),
    ("sage", SAGE_ALL, {}, (0, 1), 90),
    ("sage", SAGE_FEW, {}, (0, 2), 62),
    ("puzzle", {}, {"num_blocks": 4}, (1, 2), 162),
    ("puzzle", {}, {"num_blocks": 16}, (1, 2), 225),
    ("puzzle", {"prob_mix": 0.5, "clean_lam": 1.0, "adv_p": 1.0}, {"num_blocks": 4}, (1, 3), 193),
    ("comix", {}, {}, (1, 1), 72),
    ("comix", {"m_part": 30}, {}, (2, 1), 102),  # a smaller part crosses by itself
]


@pytest.mark.parametrize(("name", "settings", "fixed", "crossings", "launches"), TABLE)
def test_what_a_step_copies_waits_for_and_launches(
    name: str, settings: Any, fixed: Any, crossings: tuple[int, int], launches: int, simulation: Any
) -> None:
    watch = watched_step(name, settings, fixed)
    assert (len(watch.down), len(watch.up)) == crossings, watch.touched
    assert watch.waits == watch.down
    assert len(watch.launches) <= launches


def test_every_method_is_in_the_table() -> None:
    assert {row[0] for row in TABLE} == set(METHODS)


RECORDED = [("vanilla", {}), ("input", {}), ("sage", SAGE_ALL), ("sage", SAGE_FEW), ("sage", {"rand_pos": 0.5})]


@pytest.mark.parametrize(("name", "settings"), RECORDED)
def test_a_recorded_step_touches_no_tensor_of_the_host(name: str, settings: Any, simulation: Any) -> None:
    watch = watched_step(name, settings, {}, recorded=True)
    assert watch.touched == watch.waits == []
    assert watch.launches


def test_every_recordable_method_is_looked_at() -> None:
    assert {name for name, _ in RECORDED} == {name for name, method in METHODS.items() if method.recordable}


# ----------------------------------------------------------------------------------------------------------- whole runs


def simulated_run(name: str, *flags: str, images_on_host: bool = False) -> Run:
    """A run of 250 training and 150 test images, as main.py makes it."""
    args, _ = options.parse(
        ["--method", name, "--dataset", "cifar10", "--data_dir", "x", "--arch", "preactresnet18", *flags]
    )
    train, test = (
        Split(torch.empty(number, 3, 32, 32, dtype=torch.uint8), torch.empty(number, dtype=torch.int64))
        for number in (250, 150)
    )
    mean, std = NORMALISATION["cifar10"]
    data = Data("cifar10", "nowhere", [str(k) for k in range(10)], mean, std, train, test, None, True)
    if images_on_host:
        object.__setattr__(data, "to", lambda device: data)
    return make_run(args, data, GPU)


def backward_with(run: Run) -> Callable[[Tensor], None]:
    """Every parameter gets a gradient."""

    def backward(loss: Tensor) -> None:
        for parameter in run.model.parameters():
            parameter.grad = torch.empty_like(parameter)

    return backward


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_an_epoch_waits_at_its_end_alone(name: str, fast: bool, simulation: pytest.MonkeyPatch) -> None:
    """Loader, draws, steps with a smaller last batch, optimiser and meter; Puzzle Mix and Co-Mixup wait once a step."""
    run = simulated_run(name, "--epochs", "1", *(["--fast"] if fast else []))
    simulation.setattr(Tensor, "backward", backward_with(run))
    run.optimizer.param_groups[0]["fused"] = None  # a kernel that the simulation lacks
    simulation.setattr("utils.train.Captured", lambda step, *rest: step)  # there is nothing to record either
    results: list[Any] = []
    add = Meter.add
    simulation.setattr(Meter, "add", lambda meter, result, labels: (results.append(result), add(meter, result, labels)))
    ends: list[int] = []
    simulation.setattr("utils.train.after_epoch", lambda *given: (ends.append(len(watch.waits)), 1 / 0))
    assert next(run.model.parameters()).device == GPU
    with Watch() as watch, pytest.raises(ZeroDivisionError):
        fit(run, Saver(run), StopSignal())
    assert [len(result.logits) for result in results] == [100, 100, 50]
    assert {result.logits.dtype for result in results} == {torch.bfloat16 if fast else torch.float32}
    assert {result.loss.dtype for result in results} == {torch.float32}
    of_steps = {"puzzle": 3, "comix": 4}.get(name, 0)  # the last 50 images are two parts of 20 and a smaller one
    # the four sums, and whether a gradient is not 0
    assert ends == [of_steps + 4 + 1], watch.waits


def test_images_on_the_host_cross_without_a_wait(simulation: pytest.MonkeyPatch) -> None:
    from load_data import test_batches, train_batches

    run = simulated_run("vanilla", images_on_host=True)
    with Watch() as watch:
        for kind in (
            train_batches(run.data, batch_size=100, seed=0, epoch=0, device=GPU),
            test_batches(run.data.test, run.data, batch_size=100, device=GPU),
        ):
            for images, labels in kind:
                assert images.device == labels.device == GPU
    assert watch.waits == []
    assert len(watch.up) == 1 + 2 * 2 + 2 * (3 + 2)  # draws; mean and std; images and labels of each batch


@pytest.mark.parametrize("fast", [False, True])
def test_evaluation_waits_at_its_end_alone(fast: bool, simulation: pytest.MonkeyPatch) -> None:
    run = simulated_run("vanilla", *(["--fast"] if fast else []))
    simulation.setattr("utils.train.EVALUATION_BATCH", {"cuda": 100})
    with Watch() as watch:
        evaluate(run.model, run.data.test, run.data, run.device, "test")
    assert watch.waits == ["a value is read"] * 3  # loss and hits of all batches


def test_the_optimiser_launches_a_few_operations_for_all_parameters(simulation: pytest.MonkeyPatch) -> None:
    simulation.setattr(sys.modules["torch.optim.optimizer"], "_foreach_supported_types", [FakeTensor, nn.Parameter])
    assert simulated_run("vanilla", "--fast").optimizer.defaults["fused"]  # one kernel, which the simulation lacks
    run = simulated_run("vanilla")
    backward_with(run)(torch.empty(()))
    run.optimizer.step()
    with Watch() as watch:
        run.optimizer.step()
    assert len(watch.launches) <= 6, watch.launches
    assert watch.waits == []


def test_held_gradients_add_one_call() -> None:
    """On the CPU, where there is a backward pass; beside the additions of autograd."""
    torch.manual_seed(0)
    counts = []
    for ratio in (1.0, 0.7):
        method = build_method("sage", "cifar10", 10, rand_pos=0.01, update_ratio=ratio)
        model = build_model("preactresnet18", 10, initial_channels=4)
        images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
        mixed = method.mix(model, images, labels, method.draw(np.random.default_rng(0), 4, 32, 32))
        loss = mixed.loss(model(mixed.images))
        watch = Names()
        with watch:
            loss.backward()
        counts.append(watch.names)
    plain, held = counts
    assert held.count("_foreach_mul") == plain.count("_foreach_mul") + 1
    assert len(held) <= len(plain) + 1 + held.count("add") + held.count("add_") + 2


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------ the harness itself can fail

PROVOCATIONS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: bool(x.sum() > 0),
    "cpu": lambda x: x.cpu(),
    "cpu, not blocking": lambda x: x.to("cpu", non_blocking=True),
    "a copy of a host tensor": lambda x: torch.zeros(3).to(GPU),
    "a copy from memory that is not pinned": lambda x: torch.zeros(3).to(GPU, non_blocking=True),
    "a pinned copy that blocks": lambda x: torch.zeros(3).pin_memory().to(GPU),
    "a constant made on the device from a list": lambda x: torch.tensor([1.0, 2.0], device=GPU),
    "a copy into a tensor": lambda x: x.copy_(torch.zeros(4, 4)),
    "a host constant": lambda x: x * torch.tensor(2.0),
    "a host index": lambda x: x[torch.tensor([0, 2])],
    "a list as index": lambda x: x[[0, 2]],
}


@pytest.mark.parametrize("what", PROVOCATIONS)
def test_the_watch_sees(what: str, simulation: Any) -> None:
    with Watch() as watch:
        PROVOCATIONS[what](torch.empty(4, 4, device=GPU))
    assert len(watch.waits) == 1, watch.waits
    assert bool(watch.touched) == (what not in ("item", "if"))


@pytest.mark.parametrize("spoil", ["item", "cpu", "a host constant"])
def test_the_watch_sees_it_within_a_step(spoil: str, simulation: pytest.MonkeyPatch) -> None:
    import mixup.sage

    whole = mixup.sage.mean_magnitude

    def spoilt(gradient: Tensor) -> Tensor:
        PROVOCATIONS[spoil](gradient)
        return whole(gradient)

    simulation.setattr(mixup.sage, "mean_magnitude", spoilt)
    watch = watched_step("sage", SAGE_ALL, {}, recorded=True)
    assert len(watch.waits) == 1


@pytest.mark.parametrize(
    ("mistake", "message"), [(lambda x: x + torch.zeros(4), "device"), (lambda x: x[x > 0], "Dynamic|nonzero")]
)
def test_the_simulation_refuses(mistake: Callable[[Tensor], object], message: str, simulation: Any) -> None:
    with pytest.raises(Exception, match=message), Watch():
        mistake(torch.empty(4, 4, device=GPU))


def test_nothing_of_the_simulation_is_left() -> None:
    clear_tables()
    model = build_model("preactresnet18", 10, initial_channels=4)
    method = build_method("sage", "cifar10", 10)
    step = method.step(
        model, torch.randn(4, 3, 32, 32), torch.arange(4), method.draw(np.random.default_rng(0), 4, 32, 32)
    )
    assert not isinstance(step.loss, FakeTensor)
    assert isinstance(SimpleNamespace(x=step.loss).x.item(), float)
