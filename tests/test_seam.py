"""``draw → mix → loss`` in other people's loops: gradients, modes, networks and folders that are not this project's."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixup import METHODS, build_method
from mixup.base import Method, bce_loss, one_hot
from models import build_model
from tests.common import GOLDEN, ROOT, load_fixed_weights, normalise

CASES: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "input": {},
    "cutmix": {"prob_mix": 0.5},
    "saliencymix": {},
    "puzzle": {"clean_lam": 0},
    "puzzle clean": {"clean_lam": 1},
    "puzzle adversarial": {"clean_lam": 1, "adv_p": 1},
    "comix": {"m_part": 3},
    "comix alone": {"m_part": 3, "clean_lam": 0},
    "sage": {"update_ratio": 0.7, "rand_pos": 0.1},
    "sage eval": {"update_ratio": 0.7, "rand_pos": 0.1, "eval_mode": True},
    "sage alone": {"update_ratio": 1.0, "rand_pos": 0.1},
}
MIXING = [name for name in CASES if name != "vanilla"]


def case(name: str) -> Method:
    return build_method(name.split()[0], "cifar10", 10, **CASES[name])


def network(seed: int = 0) -> nn.Module:
    """A small network with batch norm that is none of this project's."""
    torch.manual_seed(seed)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def batch(seed: int = 0, number: int = 5) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(number, 3, 16, 16, generator=rng), torch.randint(10, (number,), generator=rng)


def draws_of(method: Method, images: Tensor, seed: int = 0) -> Any:
    draws = method.draw(np.random.default_rng(seed), len(images), *images.shape[2:])
    if hasattr(draws, "mix"):
        draws.mix = True
    return draws


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def plain(method: Method, seed: int = 0) -> list[Tensor]:
    """mix, forward, backward, nothing else."""
    model, (images, labels) = network(), batch(seed)
    mixed = method.mix(model, images, labels, draws_of(method, images, seed))
    assert mixed.images is not None
    mixed.loss(model(mixed.images)).backward()
    return gradients(model)


def two_passes(method: Method) -> list[Tensor]:
    """The gradient of the objective from two ordinary backward passes, one after the other."""
    model, (images, labels) = network(), batch()
    draws = draws_of(method, images)
    mixed = method.mix(copy.deepcopy(model), images, labels, draws)
    assert mixed.images is not None
    if method.name == "sage":
        model.train(not method.eval_mode)  # type: ignore[attr-defined]
        ((1 - mixed.share) * bce_loss(model(images), one_hot(labels, 10))).backward()
    elif method.name in ("puzzle", "comix") and method.clean_lam > 0:  # type: ignore[attr-defined]
        probe = images
        if getattr(draws, "perturbed", None) is not None:
            probe = method_start(method, images, draws)
        (2 * F.cross_entropy(model(probe), labels) / 10).backward()
    model.train()
    (mixed.share * bce_loss(model(mixed.images), mixed.targets)).backward()
    return gradients(model)


def method_start(method: Any, images: Tensor, draws: Any) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (method.mean, method.std))
    pixels = images * std + mean
    return ((pixels + torch.from_numpy(draws.noise) * method.adv_eps / 255).clamp(0, 1) - mean) / std


def zero_grad_after(method: Method) -> list[Tensor]:
    """Lightning's order: training step, zero_grad, backward."""
    model, (images, labels) = network(), batch()
    step = method.step(model, images, labels, draws_of(method, images))
    model.zero_grad()
    step.loss.backward()
    return gradients(model)


def scaled(method: Method) -> list[Tensor]:
    """As a GradScaler does it."""
    model, (images, labels) = network(), batch()
    (1024 * method.step(model, images, labels, draws_of(method, images)).loss).backward()
    return [gradient / 1024 for gradient in gradients(model)]


def accumulated(method: Method) -> list[Tensor]:
    """The loss over 4, four times."""
    model, (images, labels) = network(), batch()
    start = copy.deepcopy(model.state_dict())
    for _ in range(4):
        model.load_state_dict(start)
        (method.step(model, images, labels, draws_of(method, images)).loss / 4).backward()
    return gradients(model)


def clipped(method: Method) -> list[Tensor]:
    """Clipping sees the whole gradient."""
    model, (images, labels) = network(), batch()
    method.step(model, images, labels, draws_of(method, images)).loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > 1e-3
    return [gradient * norm / 1e-3 for gradient in gradients(model)]


@pytest.mark.parametrize("order", [two_passes, zero_grad_after, scaled, accumulated, clipped])
@pytest.mark.parametrize("name", CASES)
def test_every_order_of_calls_gives_the_same_gradient(name: str, order: Callable[[Method], list[Tensor]]) -> None:
    expected, got = plain(case(name)), order(case(name))
    scale = max(gradient.abs().max() for gradient in expected)
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(scale))


@pytest.mark.parametrize("name", CASES)
def test_mix_leaves_gradients_and_modes_alone(name: str) -> None:
    """A frozen batch norm stays frozen, and frozen parameters get no gradient."""
    method, model, (images, labels) = case(name), network(), batch()
    model[1].eval()
    model[0].requires_grad_(False)
    mean = model[1].running_mean.clone()  # type: ignore[operator, union-attr]
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    modes = [module.training for module in model.modules()]
    step = method.step(model, images, labels, draws_of(method, images))
    assert [module.training for module in model.modules()] == modes
    assert all((gradient == 7).all() for gradient in gradients(model))
    assert torch.equal(model[1].running_mean, mean)  # type: ignore[arg-type]
    step.loss.backward()
    assert (model[0].weight.grad == 7).all()
    assert not (model[3].weight.grad == 7).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_and_memory_format_survive(name: str, precision: torch.dtype) -> None:
    expected = plain(case(name))
    method, model, (images, labels) = case(name), network(), batch()
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", precision):
        step = method.step(model, images, labels, draws_of(method, images))
    assert step.loss.dtype == step.mixed.clean_loss.dtype == torch.float32
    assert step.mixed.images is not None
    assert step.mixed.images.is_contiguous(memory_format=torch.channels_last)
    step.loss.backward()
    for ours, theirs in zip(gradients(model), expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.1 * theirs.norm() + 1e-3


def test_float16_loses_no_small_gradients_of_the_saliency_pass() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    spy = Spy()
    spy.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    images, labels = batch(number=64)
    from mixup.saliency import saliency_pass

    for half in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=half):
            gradient, _ = saliency_pass(spy, images, lambda logits: bce_loss(logits, one_hot(labels, 10)))
        seen.append(gradient)
    assert (seen[0] != 0).float().mean() > 0.9
    assert ((seen[0] != 0) & (seen[1] == 0)).float().mean() < 1e-3


def test_another_loss() -> None:
    """``method.loss`` is used for the mixed loss and, by SAGE, for the clean one."""
    for name in ("sage", "cutmix", "puzzle clean"):
        method, model, (images, labels) = case(name), network(), batch()
        method.loss = F.cross_entropy  # type: ignore[assignment, method-assign]
        step = method.step(model, images, labels, draws_of(method, images))
        expected = step.mixed.share * F.cross_entropy(step.logits, step.mixed.targets) + step.mixed.clean_loss
        torch.testing.assert_close(step.loss, expected)
        if name == "sage":
            clean = 0.3 * F.cross_entropy(network()(images), labels)
            torch.testing.assert_close(step.mixed.clean_loss, clean)
    assert case("sage").loss is bce_loss


@pytest.mark.parametrize("name", MIXING)
def test_draws_may_be_any_object_with_their_names(name: str) -> None:
    method, (images, labels) = case(name), batch()
    draws = draws_of(method, images)
    as_tensors = SimpleNamespace(
        **{k: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k, v in vars(draws).items() if v is not None}
    )
    ours, theirs = (method.step(network(), images, labels, d).loss for d in (draws, as_tensors))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["input", "manifold", "cutmix", "puzzle", "comix"])
def test_a_batch_that_stays_unmixed_comes_back_as_given(name: str) -> None:
    method = build_method(name, "cifar10", 10, mix_schedule="delayed", mix_scheduled_epoch=5)
    images, labels = batch()
    draws = method.draw(np.random.default_rng(0), 5, 16, 16, epoch=1)
    mixed = method.step(network(), images, labels, draws).mixed
    assert mixed.images is images
    assert torch.equal(mixed.targets, one_hot(labels, 10))
    assert (mixed.share, float(mixed.clean_loss)) == (1, 0)
    assert mixed.partner is mixed.saliency is mixed.mask is None


@pytest.mark.parametrize("name", ["sage", "puzzle", "puzzle clean", "comix"])
@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_known_saliency(name: str, num_classes: int) -> None:
    """A map takes the place of the network's gradient, whatever the loss and the class."""
    settings = {**CASES[name], "prob_mix": 0.7, "blur_sigma": 1e-3}
    method, (images, _) = build_method(name.split()[0], "cifar10", num_classes, **settings), batch()
    maps = torch.rand(5, 16, 16)
    for label in range(num_classes):
        draws = draws_of(method, images, label)
        mixed = method.mix(None, images, torch.full((5,), label), draws, saliency=maps)
        assert mixed.saliency is not None
        count = 5 if name == "sage" else 3
        ratio = mixed.saliency[0][-count:] / maps[-count:]
        torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio), rtol=1e-4, atol=0)
        assert (ratio > 0).all()


# ------------------------------------------------------------------------------------------------------- mean and std


@pytest.mark.parametrize("name", METHODS)
def test_mean_and_std_of_an_unknown_data_set_are_asked_for(name: str) -> None:
    method, (images, labels) = build_method(name, "mydata", 10), batch()
    draws = draws_of(method, images)
    if name in ("saliencymix", "puzzle"):
        with pytest.raises(ValueError, match="give mean and std"):
            method.step(network(), images, labels, draws)
        method = build_method(name, "mydata", 10, mean=[0.5] * 3, std=[0.2] * 3)
    elif name == "manifold":
        method.points = []  # type: ignore[attr-defined]
        draws.mix_at = 0
    assert method.step(network(), images, labels, draws).loss.isfinite()


# ------------------------------------------------------------------------------------------- Manifold Mixup anywhere


def test_manifold_mixup_on_a_foreign_network() -> None:
    model, (images, labels) = network(), batch()
    manifold: Any = build_method("manifold", "cifar10", 10)
    with pytest.raises(ValueError, match=r"set points, e.g. manifold.points = \[model.layer1, model.layer2\]"):
        manifold.step(model, images, labels, draws_of(manifold, images))
    manifold.points = [model[2], model[4]]
    rng = np.random.default_rng(0)
    places = [manifold.draw(rng, 5, 16, 16).mix_at for _ in range(60)]
    assert set(places) == {0, 1, 2}
    for mix_at in (0, 1, 2):
        draws = SimpleNamespace(lam=0.3, permutation=[1, 2, 3, 4, 0], mix_at=mix_at)
        step = manifold.step(model, images, labels, draws)
        x = images
        for k, layer in enumerate(model):  # type: ignore[arg-type]
            x = 0.3 * x + 0.7 * x.roll(-1, 0) if k == (0, 3, 5)[mix_at] else x
            x = layer(x)
        torch.testing.assert_close(step.logits, x)
        assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="mix_at must be 0, 1 or 2: 3"):
        manifold.step(model, images, labels, SimpleNamespace(lam=0.3, permutation=[1, 2, 3, 4, 0], mix_at=3))
    with pytest.raises(ValueError, match=r"use step\(model, images, labels, draws\)"):
        manifold.mix(model, images, labels, draws_of(manifold, images))


# ------------------------------------------------------------------------------------------------ published whole steps


@pytest.mark.parametrize(
    "name", ["vanilla", "input", "manifold_a", "manifold_b", "cutmix", "puzzle", "puzzle_clean", "puzzle_adv"]
)
def test_published_steps(name: str) -> None:
    """Two optimiser steps of the published code, from the same weights and draws."""

    archive = np.load(GOLDEN / "steps.npz")
    known = {key.removeprefix(f"{name}/"): archive[key] for key in archive.files if key.startswith(f"{name}/")}
    settings = {key: float(known[key]) for key in ("adv_p", "adv_eps", "clean_lam") if key in known}
    method = build_method(name.split("_")[0], "cifar10", int(known["num_classes"]), **settings)
    model = build_model(str(known["arch"]), int(known["num_classes"]), initial_channels=int(known["initial_channels"]))
    load_fixed_weights(model).train()
    optimiser = torch.optim.SGD(
        model.parameters(), float(known["lr"]), float(known["momentum"]), 0, float(known["weight_decay"]), nesterov=True
    )
    for s, tolerance in enumerate((2e-5, 2e-4)):
        draws = SimpleNamespace(
            **{key.removesuffix(f"_{s}"): value for key, value in known.items() if key.endswith(f"_{s}")}
        )
        step = method.step(model, normalise(draws.images_u8), torch.from_numpy(draws.labels), draws)
        published = (step.loss - step.mixed.clean_loss) / step.mixed.share
        assert float(published.detach()) == pytest.approx(float(draws.loss), rel=tolerance)
        optimiser.zero_grad()
        step.loss.backward()
        optimiser.step()
    for key, value in model.state_dict().items():
        total, magnitudes = known[f"after/{key}"]
        assert float(value.double().abs().sum()) == pytest.approx(magnitudes, rel=1e-3), key
        assert float(value.double().sum()) == pytest.approx(total, abs=1e-3 * magnitudes), key


# ----------------------------------------------------------------------------------------------------- the folder alone


FOREIGN = """
import sys
sys.path.insert(0, {here!r})
import numpy as np, torch, utils, models, load_data
from sage_mixup import METHODS, build_method
from sage_mixup.sage import best_offsets
assert utils.foreign and models.foreign and load_data.foreign
assert not any("matplotlib" in name or "torchvision" in name for name in sys.modules)
torch.manual_seed(0)
layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()]
model = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
images, labels = torch.randn(6, 3, 16, 16), torch.arange(6) % 3
for name in METHODS:
    method = build_method(name, "mine", 3, mean=(0.5,) * 3, std=(0.2,) * 3)
    method.points = [layers[2]]
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for seed in range(2):
        loss = method.step(model, images, labels, method.draw(np.random.default_rng(seed), 6, 16, 16)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.isfinite(), name
print("all", len(METHODS))
"""


def test_the_folder_alone_beside_foreign_modules(tmp_path: Path) -> None:
    """Copied as ``sage_mixup`` beside other files named ``utils``, ``models`` and ``load_data``."""
    shutil.copytree(ROOT / "mixup", tmp_path / "sage_mixup", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("utils", "models", "load_data"):
        (tmp_path / f"{name}.py").write_text("foreign = True\n")
    command = [sys.executable, "-c", FOREIGN.format(here=str(tmp_path))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"all {len(METHODS)}\n", done.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_targets_are_float32_whatever_the_default_type_is(name: str, dtype: torch.dtype) -> None:
    """Trainers set it for a step of another precision."""
    method, model = build_method(name, "cifar10", 10), build_model("preactresnet18", 10, initial_channels=2)
    draws = method.draw(np.random.default_rng(0), 3, 16, 16)
    images, labels = torch.randn(3, 3, 16, 16), torch.arange(3)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        step = method.step(model, images, labels, draws)
    finally:
        torch.set_default_dtype(usual)
    assert step.mixed.targets.dtype == step.loss.dtype == torch.float32


@pytest.mark.parametrize("name", METHODS)
def test_a_network_of_bfloat16_trains(name: str) -> None:
    method, model = build_method(name, "cifar10", 10), build_model("preactresnet18", 10, initial_channels=2).bfloat16()
    draws = method.draw(np.random.default_rng(0), 3, 16, 16)
    step = method.step(model, torch.randn(3, 3, 16, 16).bfloat16(), torch.arange(3), draws)
    step.loss.backward()
    assert step.loss.isfinite()
    assert all(p.grad is not None for p in model.parameters())
