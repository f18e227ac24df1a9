"""The same numbers on every device: golden vectors, whole steps of every method, --fast beside the default.

CUDA's half of each test is skipped where there is no GPU; ``scripts/gpu_check.sh`` runs this file on one.
"""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixup import METHODS, build_method
from mixup.assignment import assign
from mixup.base import Method, Step, bce_loss, one_hot
from mixup.comix import co_mix, compatibility
from mixup.cutmix import paste_box
from mixup.puzzle import block_mask, puzzle_mix
from mixup.sage import Sage, best_offsets, blend, gaussian_blur
from mixup.saliency import fine_grained_saliency, mean_magnitude, saliency_pass
from models import build_model
from utils.device import Captured, emulates_bfloat16, prepare

from .common import ENVIRONMENT, MEAN, ROOT, SAGE, STD, golden, load_fixed_weights, main, normalise, rows, weights
from .test_models import CASES, ONE_OF_A_FAMILY
from .test_sage import smooth_maps

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=needs_cuda)]
NEEDS_SOLVER = ("puzzle", "comix")
ON_DEVICE = [name for name in METHODS if name not in (*NEEDS_SOLVER, "saliencymix")]  # nothing goes to the host


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device, in full float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield torch.device(request.param)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def solver_or_skip() -> None:
    if not find_spec("gco") and not find_spec("ortools"):
        pytest.skip("needs a grid cut solver: pip install ortools")


def close(actual: Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(actual.detach().cpu().numpy(), np.asarray(expected), rtol=0, atol=tolerance)


# --- golden vectors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(3))
def test_golden_search_and_blend(i: int, device: torch.device) -> None:
    case = golden(f"sage_{i}.npz")
    blurred = gaussian_blur(torch.from_numpy(case["saliency_raw"]).to(device), 5, 1.0)
    close(blurred, case["saliency_blurred"])
    unit = blurred / blurred.sum(dim=(1, 2), keepdim=True)
    permutation, lam = torch.from_numpy(case["permutation"]).to(device), float(case["lam"])
    a, b = lam * unit, (1 - lam) * unit[permutation]
    offsets = best_offsets(a, b, case.get("candidates"))
    assert offsets.device == a.device
    np.testing.assert_array_equal(offsets.cpu(), case["offsets"])
    images = normalise(case["images_u8"]).to(device)
    mixed, ratio = blend(images, images[permutation], a, b, offsets)
    close(mixed, case["mixed"])
    close(ratio, case["ratio"])


@pytest.mark.parametrize(
    ("name", "steps", "loss_tolerance", "ratio_tolerance"),
    [("step_sage_a.npz", 1, 1e-3, 2e-4), ("step_sage_b.npz", 2, 1e-4, 2e-4)],
)
def test_golden_sage_steps(
    name: str, steps: int, loss_tolerance: float, ratio_tolerance: float, device: torch.device
) -> None:
    case = golden(name)
    model = load_fixed_weights(build_model(str(case["arch"]), int(case["num_classes"]))).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), float(case["lr"]), float(case["momentum"]),
        weight_decay=float(case["weight_decay"]), nesterov=True,
    )  # fmt: skip
    method = Sage(int(case["num_classes"]), update_ratio=float(case["update_ratio"]), eval_mode=bool(case["eval_mode"]))
    for s in range(steps):
        draws = SimpleNamespace(
            lam=case["lam"], permutation=case[f"permutation_{s}"], candidates=case[f"candidates_{s}"]
        )
        optimizer.zero_grad()
        images, labels = normalise(case[f"images_u8_{s}"]).to(device), torch.from_numpy(case[f"labels_{s}"]).to(device)
        step = method.step(model, images, labels, draws)
        step.loss.backward()
        optimizer.step()
        loss = (step.loss - step.mixed.clean_loss).item() / float(case["update_ratio"])
        np.testing.assert_allclose(loss, case[f"loss_mixed_{s}"], rtol=loss_tolerance)
        assert step.mixed.targets is not None
        close(step.mixed.targets, case[f"targets_{s}"], ratio_tolerance)


@pytest.mark.parametrize(("name", "arch"), [case for case in CASES if case[0] == "cifar100"])
def test_golden_models(name: str, arch: str, device: torch.device) -> None:
    file = golden(f"models_{name}.npz")
    images, labels = normalise(file["images_u8"]).to(device), torch.from_numpy(file["labels"]).to(device)
    classes = int(file["num_classes"])
    model = load_fixed_weights(build_model(arch, classes, int(file["stride"]))).to(device).eval()
    expected = file[f"{arch}/logits_eval"]
    close(model(images), expected, 1e-4 * np.abs(expected).max())
    rows = one_hot(labels, classes)
    gradient, clean = saliency_pass(model.train(), images, lambda logits: bce_loss(logits, rows), share=1.0)
    assert clean is not None
    close(clean.loss, file[f"{arch}/bce_train"], 1e-4 * float(file[f"{arch}/bce_train"]))
    expected = file[f"{arch}/saliency_bce_train"]
    assert np.linalg.norm(mean_magnitude(gradient).cpu().numpy() - expected) <= 1.5e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("number", range(8))
def test_golden_puzzle(number: int, device: torch.device) -> None:
    solver_or_skip()
    file = golden("puzzle.npz")
    c = {key[2:]: value for key, value in file.items() if key.startswith(f"{number}/")}
    settings = {name: c[name].item() for name in ("t_size", "t_eps", "neigh_size", "n_labels", "transport")}
    tensors = (normalise(c["images_u8"]), torch.from_numpy(c["saliency"]), torch.from_numpy(c["permutation"]))
    arguments = (*(t.to(device) for t in tensors), c["lam"].item(), c["num_blocks"].item(), MEAN, STD)
    close(block_mask(*arguments, **settings), c["mask"], 0)
    mixed, ratio = puzzle_mix(*arguments, **settings)
    assert mixed.device == ratio.device == arguments[0].device
    close(mixed, c["mixed"])
    close(ratio, c["ratio"])


@pytest.mark.parametrize("number", range(5))
def test_golden_comix(number: int, device: torch.device) -> None:
    solver_or_skip()
    file = golden("comix.npz")
    c = {key[2:]: value for key, value in file.items() if key.startswith(f"{number}/")}
    saliency = torch.from_numpy(c["saliency"]).to(device)
    close(compatibility(saliency, float(c["omega"])), c["compatibility"])
    arguments: dict[str, Any] = {
        "prior": c["prior"],
        "initial_labels": c["initial_labels"],
        "compatibility": torch.from_numpy(c["compatibility"]).to(device),
        "num_blocks": int(c["num_blocks"]),
        "threshold_type": str(c["threshold_type"]),
    }
    close(assign(saliency, **arguments), c["assignment"], 0)
    labels = torch.from_numpy(c["labels"]).to(device)
    mixed, targets = co_mix(
        normalise(c["images_u8"]).to(device), one_hot(labels, int(c["num_classes"])), saliency, **arguments
    )
    assert mixed.device == saliency.device
    close(mixed, c["mixed"])
    close(targets, c["targets"])


def test_golden_boxes_and_saliency(device: torch.device) -> None:
    file = golden("saliencymix.npz")
    maps = fine_grained_saliency(torch.from_numpy(file["images_u8"]).to(device))
    np.testing.assert_array_equal(maps.cpu(), file["saliency"])
    for height, width, _, _, _, *box, ratio in golden("cutmix.npz")[
        "height_width_lam_cy_cx_top_bottom_left_right_ratio"
    ]:
        images = torch.zeros(2, 3, int(height), int(width), device=device)
        top, bottom, left, right = map(int, box)
        assert paste_box(images, [1, 0], (top, bottom, left, right))[1] == pytest.approx(ratio, abs=1e-6)


# --- whole steps ---------------------------------------------------------------------------------------------------


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("preactresnet18", 10, initial_channels=8)


def make(name: str, **settings: Any) -> Method:
    of_method = {field.name for field in dataclasses.fields(METHODS[name])}
    colours = {key: value for key, value in (("mean", MEAN.tolist()), ("std", STD.tolist())) if key in of_method}
    return build_method(name, "cifar10", 10, **colours, **settings)


def batch(device: torch.device, count: int = 12) -> tuple[Tensor, Tensor]:
    """Images with objects, normalised, and labels."""
    images = torch.stack([smooth_maps(count, 32, 32, seed) for seed in range(3)], dim=1)
    images = (images / images.amax(dim=(1, 2, 3), keepdim=True) * 255).round() / 255
    images = (images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    return images.to(device), (torch.arange(count) % 10).to(device)


def one_step(name: str, model: nn.Module, device: torch.device) -> tuple[Step, Tensor]:
    """A step with fixed draws and the weight gradients it leaves, in one row."""
    if name in NEEDS_SOLVER:
        solver_or_skip()
    method = make(name, **({"update_ratio": 0.7, "upper_lambda": 0.6, "rand_pos": 1.0} if name == "sage" else {}))
    images, labels = batch(device)
    draws = method.draw(np.random.default_rng(3), len(images), 32, 32, 0)
    step = method.step(model.train(), images, labels, draws)
    step.loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return step, torch.cat(gradients).detach().float()


@needs_cuda
@pytest.mark.parametrize("name", METHODS)
def test_a_step_on_cuda_is_the_one_on_the_cpu(name: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    (here, expected), (there, found) = (
        one_step(name, network().to(kind), torch.device(kind)) for kind in ("cpu", "cuda")
    )
    torch.testing.assert_close(there.loss.cpu(), here.loss, rtol=1e-3, atol=1e-6)
    assert here.mixed.targets is not None
    assert there.mixed.targets is not None
    assert (there.mixed.targets.cpu() - here.mixed.targets).abs().max() < 5e-3
    assert F.cosine_similarity(found.cpu(), expected, dim=0) > 0.995


@pytest.mark.parametrize("name", METHODS)
def test_fast_is_the_same_step_in_lower_precision(name: str, device: torch.device) -> None:
    plain = network()
    fast = prepare(copy.deepcopy(plain), device, True)
    (slow_step, expected), (fast_step, found) = (one_step(name, m, device) for m in (plain.to(device), fast))
    assert fast_step.loss.dtype == torch.float32
    assert fast_step.loss.device.type == device.type
    torch.testing.assert_close(fast_step.loss, slow_step.loss, rtol=3e-2, atol=1e-4)
    assert F.cosine_similarity(found, expected, dim=0) > 0.8  # an untrained network magnifies rounding


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("fast", [True, False])
def test_fast_where_it_would_be_slow_is_told(
    native: bool, fast: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    prepare(nn.Identity(), torch.device("cpu"), fast)
    told = ["warning: PyTorch emulates bfloat16 here: without --fast it is likely to be faster"]
    assert caplog.messages == told * (fast and not native)


@pytest.mark.parametrize("native", [True, False])
def test_gpus_without_bfloat16_emulate_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert emulates_bfloat16(torch.device("cuda")) == (not native)


@needs_cuda
@pytest.mark.parametrize("name", ON_DEVICE)
def test_no_step_waits_for_the_gpu(name: str) -> None:
    device = torch.device("cuda")
    model = network().to(device)
    one_step(name, model, device)  # plans and workspaces
    try:
        torch.cuda.set_sync_debug_mode("error")
        method = make(name)
        images, labels = batch(torch.device("cpu"))
        torch.cuda.set_sync_debug_mode("default")
        images, labels = images.to(device), labels.to(device)
        torch.cuda.set_sync_debug_mode("error")
        for seed in range(3):
            draws = method.draw(np.random.default_rng(seed), len(images), 32, 32, 0)
            method.step(model, images, labels, draws).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("arch", ONE_OF_A_FAMILY)
def test_fast_compiles_every_architecture(arch: str) -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = build_model(arch, 10)
    fast = prepare(copy.deepcopy(model), device, True)
    (slow_step, _), (fast_step, _) = (one_step("sage", m, device) for m in (model.to(device), fast))
    torch.testing.assert_close(fast_step.loss, slow_step.loss, rtol=3e-2, atol=1e-4)


def step_of(method: Method, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """The training step of ``utils.train.fit``."""

    def step(images: Tensor, labels: Tensor, draws: Any) -> Step:
        optimizer.zero_grad(set_to_none=True)
        result = method.step(model, images, labels, draws)
        result.loss.backward()
        optimizer.step()
        return result.detached()

    return step


@needs_cuda
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.recordable])
def test_steps_are_recorded_and_do_what_they_do(name: str) -> None:
    device = torch.device("cuda")
    images, labels = batch(device)
    ends = []
    for record in (False, True):
        torch._dynamo.reset()
        model = prepare(network(), device, True).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, nesterov=True, fused=True)
        method = make(name)
        take = step_of(method, model, optimizer)
        if record:
            take = Captured(take, lambda: optimizer.param_groups[0]["lr"], device)  # noqa: B023
        for seed in range(12):
            count = 8 if seed == 5 else len(images)  # as the last batch of an epoch may be smaller
            draws = method.draw(np.random.default_rng(seed), count, 32, 32, 0)
            held = take(images[:count], labels[:count], draws)
            if seed == 8:
                end = held.loss.item(), torch.cat([p.detach().flatten() for p in model.parameters()])
                optimizer.param_groups[0]["lr"] = 0.0  # a recording that kept the rate would go on training
        if record:
            assert take.kept is not None
        assert torch.equal(end[1], torch.cat([p.detach().flatten() for p in model.parameters()]))
        ends.append(end)
    assert ends[1][0] == pytest.approx(ends[0][0], rel=2e-2)
    torch.testing.assert_close(ends[1][1], ends[0][1], atol=1e-2, rtol=1e-2)


# --- runs ----------------------------------------------------------------------------------------------------------

RUN = ["--dataset", "folder", "--arch", "preactresnet18", "--initial_channels", "4", "--batch_size", "8"]


@needs_cuda
@pytest.mark.parametrize("fast", [[], ["--fast"]])
def test_a_stopped_run_on_cuda_goes_on_bitwise(fast: list[str], tree: Path, tmp_path: Path) -> None:
    stopped_and_whole([*RUN, *SAGE, "--data_dir", tree, "--ngpu", 1, "--deterministic", "True", *fast], tmp_path)


def stopped_and_whole(command: list[Any], tmp_path: Path) -> None:
    """A run that SIGTERM stops after its first epoch ends like one that is not stopped."""
    command = [*command, "--epochs", 8, "--schedule", 4, "--gammas", 0.1, "--root_dir"]
    words = [sys.executable, "main.py", *map(str, [*command, tmp_path / "a"])]
    process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "a").glob("*/metrics.csv")):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(120) == 143
    for end in ("a", "b"):
        main(*command, tmp_path / end)
    first, second = (next((tmp_path / end).iterdir()) for end in ("a", "b"))
    assert rows(first) == rows(second)
    mine, other = weights(first), weights(second)
    assert all(torch.equal(mine[key], other[key]) for key in mine)


@needs_cuda
@pytest.mark.parametrize("fast", [[], ["--fast"]])
def test_a_run_on_cuda_repeats_bitwise(fast: list[str], tree: Path, tmp_path: Path) -> None:
    command = [*RUN, *SAGE, "--data_dir", tree, "--ngpu", 1, "--deterministic", "True", *fast]
    for end in ("a", "b"):
        main(*command, "--epochs", 3, "--schedule", 2, "--gammas", 0.1, "--root_dir", tmp_path / end)
    first, second = (next((tmp_path / end).iterdir()) for end in ("a", "b"))
    assert rows(first) == rows(second)
    mine, other = weights(first), weights(second)
    assert all(torch.equal(mine[key], other[key]) for key in mine)
