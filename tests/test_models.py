"""The networks against the golden vectors, and their hook for mixing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixup import manifold
from mixup.base import bce_loss, one_hot
from mixup.saliency import mean_magnitude, root_mean_square, saliency_pass
from models import ARCHITECTURES, build_model, mixing

from .common import ENVIRONMENT, ROOT, golden, load_fixed_weights, normalise

ONE_OF_A_FAMILY = ["preactresnet18", "preactresnet50", "wrn28_2", "resnext29_4_24"]
FILES = {name: golden(f"models_{name}.npz") for name in ("cifar", "cifar100", "tiny")}
CASES = sorted({(name, key.split("/")[0]) for name, file in FILES.items() for key in file if "/" in key})


def small(arch: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(arch, 10, initial_channels=8, **settings)


def close(actual: Tensor, expected: np.ndarray) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_manifold_mixup_knows_how_many_mixing_points_networks_have() -> None:
    """It cannot import them: the methods stand alone."""
    assert manifold.MIXING_POINTS == mixing.MIXING_POINTS
    assert {small(arch).mixing_points for arch in ONE_OF_A_FAMILY} == {mixing.MIXING_POINTS}


def near(actual: Tensor, expected: np.ndarray) -> None:
    assert np.linalg.norm(actual.numpy() - expected) <= 1.5e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_golden(name: str, arch: str) -> None:
    file = FILES[name]
    images, labels = normalise(file["images_u8"]), torch.from_numpy(file["labels"])
    classes = int(file["num_classes"])
    model = build_model(arch, classes, int(file["stride"]))
    assert sum(p.numel() for p in model.parameters()) == file[f"{arch}/parameters"]

    load_fixed_weights(model).eval()
    close(model(images), file[f"{arch}/logits_eval"])
    gradient, _ = saliency_pass(model, images, lambda logits: F.cross_entropy(logits, labels))
    near(root_mean_square(gradient), file[f"{arch}/saliency_ce_eval"])

    seen = []

    def loss_of(logits: Tensor) -> Tensor:
        seen.append(logits)
        return bce_loss(logits, one_hot(labels, classes))

    gradient, clean = saliency_pass(model.train(), images, loss_of, share=1.0)
    assert clean is not None
    close(seen[0], file[f"{arch}/logits_train"])
    close(clean.loss, file[f"{arch}/bce_train"])
    near(mean_magnitude(gradient), file[f"{arch}/saliency_bce_train"])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_state_dict_names(arch: str) -> None:
    with torch.device("meta"):
        model = build_model(arch, 10)
    entries = [[name, list(value.shape)] for name, value in model.state_dict().items()]
    assert entries == golden("state_dict_names.json")[arch]


def test_every_architecture_is_in_the_golden_list() -> None:
    assert list(ARCHITECTURES) == list(golden("state_dict_names.json"))


@pytest.mark.parametrize("arch", ONE_OF_A_FAMILY)
def test_batch_norm_momentum(arch: str) -> None:
    momenta = {name: m.momentum for name, m in small(arch).named_modules() if isinstance(m, nn.BatchNorm2d)}
    last = momenta.pop("bn1", 0.1)
    assert last == (0.9 if arch.startswith("wrn") else 0.1)
    assert set(momenta.values()) == {0.1}


@pytest.mark.parametrize("arch", ONE_OF_A_FAMILY)
def test_hook(arch: str) -> None:
    model, images = small(arch).eval(), torch.randn(3, 3, 16, 24)
    first = {"preactresnet18": 8, "preactresnet50": 32, "wrn28_2": 32, "resnext29_4_24": 256}[arch]
    shapes = [(3, 3, 16, 24), (3, first, 16, 24), (3, 2 * first, 8, 12)]
    plain = model(images)
    for mix_at, shape in enumerate(shapes):
        seen: list[Tensor] = []

        def mix(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x)
            return x

        assert torch.equal(model(images, mix_at, mix), plain)
        assert [tuple(x.shape) for x in seen] == [shape]
        assert (seen[0] is images) == (mix_at == 0)
        # and what it returns goes on: the images of the batch, swapped half way, give swapped logits
        torch.testing.assert_close(model(images, mix_at, lambda x: x.flip(0)), plain.flip(0))


@pytest.mark.parametrize("arch", ONE_OF_A_FAMILY)
@pytest.mark.parametrize("size", [(8, 8), (20, 33), (64, 48)])
def test_any_size(arch: str, size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size)
    before = images.clone()
    logits = small(arch)(images)
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    assert torch.equal(images, before)


def test_stride_halves_the_first_convolution_except_in_the_resnext() -> None:
    images = torch.randn(1, 3, 32, 32)
    for arch in ONE_OF_A_FAMILY:
        shapes = []
        small(arch, stride=2)(images, 1, lambda x, shapes=shapes: (shapes.append(x.shape[2:]), x)[1])
        assert shapes == [(32, 32) if arch.startswith("resnext") else (16, 16)]


@pytest.mark.parametrize("arch", ONE_OF_A_FAMILY)
def test_dropout(arch: str) -> None:
    with_dropout, without = small(arch, dropout=True), small(arch)
    assert list(with_dropout.state_dict()) == list(without.state_dict())
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(with_dropout.eval()(images), without.eval()(images))
    assert torch.equal(without.train()(images), without.train()(images))
    # half of the classifier's inputs become 0, the others double
    classifier = with_dropout.classifier if arch.startswith("resnext") else with_dropout.linear
    inputs: list[Tensor] = []
    classifier.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    with_dropout.eval()(images)
    with_dropout.train()(images)
    dropped = (inputs[1] == 0) & (inputs[0] != 0)
    assert 0.3 < dropped.float().mean() < 0.7


def test_initial_channels_are_those_of_the_preactresnets() -> None:
    assert build_model("preactresnet18", 10, initial_channels=16).linear.in_features == 128
    assert build_model("wrn16_8", 10, initial_channels=16).linear.in_features == 512
    assert build_model("resnext29_4_24", 10, initial_channels=16).classifier.in_features == 1024


def test_resnext_initial_weights() -> None:
    model = build_model("resnext29_4_24", 10)
    weight = model.stage_3[1].conv_conv.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 384)) ** 0.5, rel=0.02)
    assert model.classifier.weight.std().item() == pytest.approx((2 / 1024) ** 0.5, rel=0.05)
    assert not model.classifier.bias.any()


@pytest.mark.parametrize("arch", ONE_OF_A_FAMILY)
def test_channels_last_gives_the_same(arch: str) -> None:
    model, images = small(arch), torch.randn(3, 3, 16, 16)
    expected = model(images)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images.to(memory_format=torch.channels_last)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arch", ["preactresnet18", "wrn28_2", "resnext29_4_24"])
def test_compiles_in_one_graph_and_once_for_every_mix(arch: str) -> None:
    model, images = small(arch), torch.randn(4, 3, 16, 16)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for i in range(3):
        lam, permutation = torch.rand(()), torch.randperm(4)

        def mix(x: Tensor, lam: Tensor = lam, permutation: Tensor = permutation) -> Tensor:
            return torch.lerp(x[permutation], x, lam)

        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            logits = compiled(images, 1, mix)
        torch.testing.assert_close(logits, model(images, 1, mix))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "preactresnet81"}, "preactresnet18"),
        ({"arch": "WRN28_10"}, "wrn28_10"),
        ({"arch": ""}, "unknown architecture ''"),
        ({"num_classes": 0}, "num_classes .* 0"),
        ({"stride": 0}, "stride .* 0"),
        ({"initial_channels": -4}, "initial_channels .* -4"),
    ],
)
def test_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(**{"arch": "preactresnet18", "num_classes": 10, **settings})


NARROW = """
import torch
from mixup import manifold
from mixup.base import bce_loss, one_hot
from models import build_model
from utils.device import prepare
for fast in (False, True):
    for side in (32, 48, 32, 48):
        model = prepare(build_model("preactresnet18", 3, 1, 4), torch.device("cpu"), fast)
        for _ in range(3):
            bce_loss(model(torch.randn(3, 3, side, side)), one_hot(torch.zeros(3, dtype=torch.long), 3)).backward()
"""


def test_narrow_networks_do_not_crash_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", NARROW], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
