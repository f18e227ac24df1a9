"""What a user may hand to ``mix`` and ``step``: draws or none, labels or rows, maps; and what is refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixup import METHODS, build_method
from tests.common import ROOT
from tests.test_seam import CASES, batch, case, draws_of, gradients, network

LOOKING = ["puzzle", "comix", "sage"]


def ready(name: str, seed: int = 0, classes: int = 10, **settings: Any) -> tuple[Any, nn.Module]:
    """A method and a small network that it can train."""
    model, method = network(), build_method(name, "cifar10", classes, seed=seed, **settings)
    if name == "manifold":
        method.points = [model[2]]  # type: ignore[attr-defined]
    return method, model


@pytest.mark.parametrize("name", METHODS)
def test_draws_of_its_own_depend_on_the_seed_alone(name: str) -> None:
    losses = []
    for seed in (3, 3, 4):
        method, model = ready(name, seed)
        losses.append([method.step(model, *batch(k)).loss.item() for k in range(3)])
    assert losses[0] == losses[1]
    assert (losses[0] != losses[2]) == (name != "vanilla")


@pytest.mark.parametrize(
    "name", ["vanilla", "input", "cutmix", "saliencymix", "puzzle", "puzzle clean", "comix", "sage"]
)
def test_rows_are_mixed_as_integers_are(name: str) -> None:
    images, labels = batch()
    found = []
    for given in (labels, labels.int(), F.one_hot(labels, 10).double()):
        model, method = network(), case(name)
        step = method.step(model, images, given, draws_of(method, images))
        step.loss.backward()
        found.append((step.mixed.targets, gradients(model)))
    for targets, grads in found[1:]:
        assert torch.equal(targets, found[0][0])
        torch.testing.assert_close(grads, found[0][1])
    soft = torch.rand(5, 10)
    draws = draws_of(method, images)
    assert method.step(network(), images, soft, draws).mixed.targets.sum() > 5.5 or name == "vanilla"


BAD_LABELS = {
    "no such class": torch.tensor([0, 1, 10, 3, 4]),
    "negative": torch.tensor([0, 1, -1, 3, 4]),
    "ignored": torch.tensor([0, 1, -100, 3, 4]),
    "a column": torch.zeros(5, 1, dtype=torch.int64),
    "one-hot integers": torch.zeros(5, 10, dtype=torch.int64),
    "other rows": torch.rand(5, 9),
    "floats": torch.rand(5),
    "booleans": torch.zeros(5, dtype=torch.bool),
    "too few": torch.arange(4),
    "a list": [0, 1, 2, 3, 4],
}


@pytest.mark.parametrize("kind", BAD_LABELS)
@pytest.mark.parametrize("name", METHODS)
def test_other_labels_are_refused(name: str, kind: str) -> None:
    method, model = ready(name)
    with pytest.raises(ValueError, match=r"labels must be \[5\] integers from 0 to 9, or floating rows \[5, 10\], not"):
        method.step(model, batch()[0], BAD_LABELS[kind])


@pytest.mark.parametrize("name", METHODS)
def test_saliency_that_is_given_replaces_the_pass(name: str) -> None:
    (images, labels), maps = batch(), torch.rand(5, 16, 16)
    method, model = ready(name)
    if name not in LOOKING:
        with pytest.raises(ValueError, match="takes no saliency"):
            method.step(model, images, labels, saliency=maps)
        return
    calls: list[Tensor] = []
    model.register_forward_hook(lambda module, given, output: calls.append(output))
    step = method.step(model, images, labels, saliency=maps)
    assert len(calls) == 1
    assert (step.mixed.clean_loss, step.mixed.share, step.mixed.held) == (0, 1, None)
    for wrong in (maps[:, 1:], -maps, maps.int()):
        with pytest.raises(ValueError, match="saliency must"):
            method.step(model, images, labels, saliency=wrong)


class Twice(nn.Module):
    """A network that runs one of its modules twice."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        x = self.body[:3](x)
        return self.body[3:](self.body[2](x))


class Reentrant(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.body[3:](checkpoint(self.body[:3], self.body[:0](x.requires_grad_(True)), use_reentrant=True))


@pytest.mark.parametrize("kind", ["copy", "twice", "compiled", "reentrant"])
def test_points_that_were_not_mixed_once_raise(kind: str) -> None:
    method, model = ready("manifold")
    images, labels = batch()
    draws = SimpleNamespace(lam=0.3, permutation=[1, 2, 3, 4, 0], mix_at=1)
    other: Any = {"copy": copy.deepcopy, "twice": Twice, "reentrant": Reentrant}.get(kind, lambda x: x)(model)
    if kind == "compiled":
        other = torch.compile(model, backend="aot_eager")
        other(images)
    with pytest.raises(ValueError, match="reentrant" if kind == "reentrant" else r"was mixed \d times, not once"):
        method.step(other, images, labels, draws)
    assert not model[2]._forward_hooks


@pytest.mark.parametrize("name", LOOKING)
def test_every_method_trains_compiled(name: str) -> None:
    """As without compilation."""
    images, labels = batch()
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        method, model = case("puzzle clean" if name == "puzzle" else name), network()
        run: Any = torch.compile(model, backend="aot_eager") if compiled else model
        for seed in range(2):
            method.step(run, images, labels, draws_of(method, images, seed)).loss.backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_one_channel(name: str) -> None:
    method = build_method(name, "mine", 10, mean=(0.5,), std=(0.25,), **({"adv_p": 1} if name == "puzzle" else {}))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    if name == "manifold":
        method.points = [model[1]]  # type: ignore[attr-defined]
    for k in range(3):
        step = method.step(model, torch.randn(5, 1, 16, 16), batch(k)[1])
        assert step.loss.isfinite()
        assert step.mixed.images is None or step.mixed.images.shape == (5, 1, 16, 16)


def test_puzzle_mix_names_the_sizes_that_fit() -> None:
    with pytest.raises(ValueError, match=r"28×28; sides that fit: .*24, .*32.*or give neigh_size=1, t_size=-1"):
        build_method("puzzle", "cifar10", 10).draw(np.random.default_rng(0), 4, 28, 28)
    build_method("puzzle", "cifar10", 10, neigh_size=1, t_size=-1).draw(np.random.default_rng(0), 4, 28, 28)


@pytest.mark.parametrize("name", CASES)
def test_nan_reaches_the_loss(name: str) -> None:
    """One pixel is enough, unless a pasted box hides it."""
    method, (images, labels) = case(name), batch()
    images[2, 1, 7, 7] = torch.nan
    if name in ("cutmix", "saliencymix"):
        images[2] = torch.nan
    assert method.step(network(), images, labels, draws_of(method, images)).loss.isnan()


@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_network_no_generator_and_no_batch_is_one_line(name: str) -> None:
    method, model = ready(name)
    images, labels = batch()
    for rng in (0, torch.Generator()):
        with pytest.raises(ValueError, match="rng must be a NumPy generator"):
            method.draw(rng, 5, 16, 16)
    for output in (lambda x: {"out": x}, lambda x: (x, x)):
        other = nn.Sequential(*model)
        other.register_forward_hook(lambda module, given, result, output=output: output(result))  # type: ignore[misc]
        with pytest.raises(ValueError, match="must return one tensor of logits"):
            method.step(other, images, labels)
    with pytest.raises(ValueError, match="images must be a floating tensor"):
        method.step(model, images.to(torch.uint8), labels)
    if name in LOOKING:
        with pytest.raises(ValueError, match="takes saliency from a network, not from None"):
            method.mix(None, images, labels)
        model.static_graph = True  # type: ignore[assignment]
        with pytest.raises(ValueError, match="static_graph"):
            method.step(model, images, labels)
    elif name != "manifold":
        assert method.mix(None, images, labels).images is not None
    if name != "vanilla":
        for other in (3, 7):
            with pytest.raises(ValueError, match=f"draws for {other} images do not fit a batch of 5"):
                method.step(model, images, labels, method.draw(np.random.default_rng(0), other, 16, 16))


@pytest.mark.parametrize("name", ["sage", "puzzle clean", "comix"])
def test_a_function_that_hides_the_parameters_is_refused(name: str) -> None:
    model = network()
    with pytest.raises(ValueError, match="it needs a module, not <function"):
        case(name).step(lambda x: model(x), *batch())
    for alone in ("sage alone", "puzzle"):
        assert case(alone).step(lambda x: model(x), *batch()).loss.isfinite()


def test_gradients_that_would_be_lost_are_refused() -> None:
    """As with FSDP, which runs copies of the parameters."""
    model, copied = network(), network()
    model.forward = copied.forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"under FSDP.*DistributedDataParallel"):
        case("sage").step(model, *batch())


SHARDED = """
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from mixup import build_method
from tests.test_seam import batch, network

dist.init_process_group("gloo")
mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
for name, settings in (("sage", {"update_ratio": 0.5}), ("comix", {}), ("sage", {}), ("puzzle", {}), ("cutmix", {})):
    model, alone = network(), network()
    fully_shard(model[3], mesh=mesh)
    fully_shard(model, mesh=mesh)
    try:
        for each in (model, alone):
            build_method(name, "cifar10", 10, **settings).step(each, *batch(rank)).loss.backward()
        for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            dist.all_reduce(theirs.grad)
            assert (ours.grad.full_tensor() - theirs.grad / 2).abs().max() < 1e-6
        said = "right"
    except ValueError as error:
        said = "refused" if "FSDP" in str(error) else str(error)
    if rank == 0:
        print(name, said)
dist.destroy_process_group()
"""


def test_under_fsdp_gradients_are_right_or_the_method_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sharded.py").write_text(SHARDED)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        tmp_path / "sharded.py",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    expected = ["sage refused", "comix refused", "sage right", "puzzle right", "cutmix right"]
    assert done.stdout.splitlines() == expected, done.stderr
