"""Every method on every source of images and with every architecture: a short training whose steps are all checked."""

from __future__ import annotations

import copy
import hashlib
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

import models
from load_data import DATASETS, train_batches
from main import make_run
from mixup import METHODS, build_method, gridcut
from mixup.base import Method, Step
from utils import options, train
from utils.checkpoint import Saver
from utils.errors import StopSignal
from utils.run import Run

SOURCES = {  # the words that name each, but for its folder
    "cifar10 as published": "cifar10",
    "cifar100 as published": "cifar100",
    "tiny-imagenet-200 as published": "tiny-imagenet-200",
    "cifar10 tree": "cifar10",
    "cifar100 tree": "cifar100",
    "tiny-imagenet-200 tree": "tiny-imagenet-200",
    "digits": "digits --labels_per_class 1",
    "folder of non-square images": "folder",
    "folder of large images": "folder --image_size 48",
}
NUMBER = 7  # training images of most sources; with a batch of 3 the last batch is a single image
SOLVERS = ["gco", "ortools"]


def cuts_grids(name: str) -> bool:
    """Whether a method asks for a solver in a step."""
    method, model = build_method(name, "cifar10", 10), models.build_model("preactresnet18", 10, initial_channels=2)
    draws = method.draw(np.random.default_rng(0), 3, 16, 16)
    spies = {f"_{solver}": mock.Mock(wraps=getattr(gridcut, f"_{solver}")) for solver in SOLVERS}
    with mock.patch.multiple(gridcut, **spies):
        method.step(model, torch.randn(3, 3, 16, 16), torch.arange(3), draws)
    return any(spy.called for spy in spies.values())


NEED_SOLVER = [name for name in METHODS if cuts_grids(name)]


def picture(index: int, height: int, width: int) -> np.ndarray:
    """Every other one is of one colour."""
    if index % 2 == 0:
        return np.full((height, width, 3), index * 40 % 256, np.uint8)
    return np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_tree(root: Path, height: int, width: int) -> None:
    for split, count in (("train", NUMBER), ("test", 3)):
        for index in range(count):
            folder = root / split / "ab"[index % 3 == 0]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(index, height, width)).save(folder / f"{index}.png")


def make_tiny(root: Path) -> None:
    """Tiny-ImageNet-200 as published; its test folder has no labels."""
    for index in range(NUMBER):
        folder = root / "train" / f"n0{index % 3}" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(index, 64, 64)).save(folder / f"{index}.JPEG")
    for split in ("val", "test"):
        (root / split / "images").mkdir(parents=True)
        for index in range(3):
            Image.fromarray(picture(index, 64, 64)).save(root / split / "images" / f"{split}_{index}.JPEG")
    lines = [f"val_{index}.JPEG\tn0{index}\t0\t32\t44\t62\n" for index in range(3)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))


def make_cifar(root: Path, source: Any, label_key: str, patch: pytest.MonkeyPatch) -> None:
    """Python pickles in the published format, whose checksums are made known."""
    (root / source.base_folder).mkdir(parents=True)
    meta = {**source.meta, "md5": ""}
    contents: dict[str, dict[str, Any]] = {meta["filename"]: {meta["key"]: list("abc")}}
    for name, count in (("train", NUMBER), ("test", 3)):
        rows = np.stack([picture(index, 32, 32).transpose(2, 0, 1).ravel() for index in range(count)])
        contents[name] = {"data": rows, label_key: [index % 3 for index in range(count)]}
    sums = {}
    for name, content in contents.items():
        path = root / source.base_folder / name
        path.write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5(path.read_bytes()).hexdigest()
    patch.setattr(source, "train_list", [["train", sums["train"]]])
    patch.setattr(source, "test_list", [["test", sums["test"]]])
    patch.setattr(source, "meta", {**meta, "md5": sums[meta["filename"]]})


@pytest.fixture(scope="module", autouse=True)
def _narrow() -> Iterator[None]:
    """All depths, few channels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "_WIDE", {name: (depth, 1) for name, (depth, _) in models._WIDE.items()})
        patch.setattr(models, "_RESNEXT", {name: (depth, 2, 4) for name, (depth, _, _) in models._RESNEXT.items()})
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    found = {name: tmp_path_factory.mktemp("data") for name in SOURCES}
    with pytest.MonkeyPatch.context() as patch:
        make_cifar(found["cifar10 as published"], torchvision.datasets.CIFAR10, "labels", patch)
        make_cifar(found["cifar100 as published"], torchvision.datasets.CIFAR100, "fine_labels", patch)
        make_tiny(found["tiny-imagenet-200 as published"])
        make_tree(found["cifar10 tree"], 32, 32)
        make_tree(found["cifar100 tree"], 32, 32)
        make_tree(found["tiny-imagenet-200 tree"], 64, 64)
        make_tree(found["folder of non-square images"], 24, 40)
        make_tree(found["folder of large images"], 140, 150)
        yield found


def start(name: str, source: str, folder: Path, arch: str = "preactresnet18", extra: str = "") -> Run:
    """A run of main.py that writes no files, before its first epoch; every step of its method is checked."""
    words = f"--dataset {SOURCES[source]} --method {name} --arch {arch} --initial_channels 16 --batch_size 3"
    args, given = options.parse([*words.split(), "--data_dir", str(folder), *extra.split()])
    run = make_run(args, options.load_images(args, given), torch.device("cpu"))
    check_steps(run.method)
    return run


def check_steps(method: Method) -> list[Step]:
    """From now on a step of ``method`` fails where it promises too much; returns the list that they are added to."""
    original, taken = method.step, []

    def step(model: nn.Module, images: Tensor, labels: Tensor, draws: Any, saliency: Tensor | None = None) -> Step:
        images_before, labels_before, draws_before = images.clone(), labels.clone(), copy.deepcopy(vars(draws))
        result = original(model, images, labels, draws, saliency=saliency)
        assert torch.equal(images, images_before)
        assert torch.equal(labels, labels_before)
        np.testing.assert_equal(vars(draws), draws_before)
        check(result, images, labels, method.num_classes)
        taken.append(result)
        return result

    method.step = step  # type: ignore[method-assign]
    return taken


def check(step: Step, images: Tensor, labels: Tensor, num_classes: int) -> None:
    batch, _, height, width = images.shape
    assert step.loss.shape == ()
    assert step.loss.isfinite()
    assert step.logits.isfinite().all()
    assert step.mixed.targets is not None
    assert step.logits.shape == step.mixed.targets.shape == (batch, num_classes)
    assert (step.mixed.targets >= 0).all()
    torch.testing.assert_close(step.mixed.targets.sum(dim=1), torch.ones(batch))
    for mixed in (step.mixed.images, step.mixed.partner):
        if mixed is not None:
            assert mixed.shape == images.shape
            assert mixed.isfinite().all()
    if step.mixed.mask is not None:
        assert step.mixed.mask.shape == (batch, height, width)
        assert ((step.mixed.mask >= 0) & (step.mixed.mask <= 1)).all()
        # image a has at least the share in the target that it has in the picture
        share = step.mixed.targets[torch.arange(batch), labels] - step.mixed.mask.mean(dim=(1, 2))
        assert (share > -1e-5).all()
    for saliency in step.mixed.saliency or ():
        assert saliency.shape == (batch, height, width)
        assert (saliency >= 0).all()
        assert (saliency.sum(dim=(1, 2)) > 0).all()
        assert saliency.isfinite().all()


def train_shortly(run: Run) -> None:
    """Two epochs."""
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    train.fit(run, Saver(run), StopSignal())
    assert len(run.progress.rows) == 2
    assert all(math.isfinite(row["train_loss"]) and math.isfinite(row["test_loss"]) for row in run.progress.rows)
    assert all(value.isfinite().all() for value in run.model.state_dict().values())
    assert not torch.equal(run.model.state_dict()["linear.weight"], weights["linear.weight"])


def hide(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave ``solver`` alone; skips where it is not installed."""
    if getattr(gridcut, f"_{solver}")() is None:
        pytest.skip(f"{solver} is not installed")
    for other in SOLVERS:
        if other != solver:
            monkeypatch.setattr(gridcut, f"_{other}", lambda: None)


SHORT = "--epochs 2 --schedule 1 --gammas 0.1 --learning_rate 0.05"


def test_two_methods_cut_grids() -> None:
    assert {"puzzle", "comix"} == set(NEED_SOLVER)


def test_no_source_is_left_out() -> None:
    assert {words.split()[0] for words in SOURCES.values()} == set(DATASETS)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", METHODS)
def test_trains_on_every_source(name: str, source: str, folders: dict[str, Path]) -> None:
    run = start(name, source, folders[source], extra=SHORT)
    assert len(run.data.train) % 3 == 1
    train_shortly(run)


@pytest.mark.parametrize("name", NEED_SOLVER)
@pytest.mark.parametrize("solver", SOLVERS)
def test_trains_with_either_solver(
    name: str, solver: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(solver, monkeypatch)
    train_shortly(start(name, "cifar10 tree", folders["cifar10 tree"], extra=SHORT))


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize("name", METHODS)
def test_one_step_of_every_architecture(name: str, arch: str, folders: dict[str, Path]) -> None:
    """Each method meets each architecture and each source, each architecture nearly each source."""
    index = [*METHODS].index(name) + models.ARCHITECTURES.index(arch)
    source = [*SOURCES][index % len(SOURCES)]
    run = start(name, source, folders[source], arch)
    size = 1 + index % 3
    batches = train_batches(run.data, batch_size=size, seed=0, epoch=0, device="cpu")
    images, labels = next(batches)
    run.model.train()
    draws = run.method.draw(np.random.default_rng(index), size, *images.shape[2:])
    run.method.step(run.model, images, labels, draws).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in run.model.parameters())
    assert sum(p.grad.abs().sum() for p in run.model.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("flat", ["images", "network", "both", "all but a pixel"])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", METHODS)
def test_small_batches_of_one_colour_and_no_saliency(
    name: str, solver: str, size: int, flat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of one colour, and a network whose gradient in the pixels is zero everywhere, or but in a pixel."""
    if name in NEED_SOLVER:
        hide(solver, monkeypatch)
    elif solver != SOLVERS[0]:
        pytest.skip("cuts no grid")
    torch.manual_seed(0)
    model = models.build_model("preactresnet18", 10, initial_channels=2)
    images, labels = torch.randn(size, 3, 16, 24), torch.arange(size)
    if flat != "network":
        images = torch.linspace(-1, 1, size)[:, None, None, None].expand_as(images).clone()
    if flat in ("network", "both"):
        nn.init.zeros_(model.linear.weight)  # type: ignore[arg-type]
    method, saliency = build_method(name, "cifar10", 10), None
    if flat == "all but a pixel" and method.takes_saliency:
        saliency = torch.zeros(size, 16, 24)
        saliency[:, 3, 5] = 1
    taken = check_steps(method)
    for seed in range(3):
        draws = method.draw(np.random.default_rng(seed), size, 16, 24)
        method.step(model, images, labels, draws, saliency=saliency).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    if flat in ("network", "both"):
        assert all((step.mixed.saliency[0] == 1).all() for step in taken if step.mixed.saliency)
