"""Checkpoints and files: whole or not at all, and never trusted blindly."""

from __future__ import annotations

import argparse
import os
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixup.settings import NORMALISATION
from models import ARCHITECTURES, build_model
from utils import checkpoint
from utils.errors import UserError
from utils.files import write_json


def state(epoch: int) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.full((300,), float(epoch))}, "progress": {"epoch": epoch}}


def test_last_previous_and_best_are_kept(tmp_path: Path) -> None:
    for epoch in range(3):
        checkpoint.write(state(epoch), tmp_path, best=state(epoch) if epoch == 1 else None)
    found = {name: torch.load(tmp_path / name, weights_only=True)["progress"] for name in os.listdir(tmp_path)}
    assert found == {checkpoint.LAST: {"epoch": 2}, checkpoint.PREVIOUS: {"epoch": 1}, checkpoint.BEST: {"epoch": 1}}


def test_every_damage_is_found_and_the_one_before_is_used(tmp_path: Path) -> None:
    """A bit that nobody reads, such as the time of an entry of the archive, changes nothing."""
    checkpoint.write(state(1), tmp_path)
    checkpoint.write(state(2), tmp_path)
    path, noticed = tmp_path / checkpoint.LAST, 0
    whole = path.read_bytes()
    for place in np.unique(np.linspace(0, len(whole) - 1, 250).astype(int)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        for damaged in (bytes(flipped), whole[:place]):
            path.write_bytes(damaged)
            found = checkpoint.load_last(tmp_path)
            assert found is not None
            if found["progress"]["epoch"] == 2:
                assert len(damaged) == len(whole)
                assert torch.equal(found["state_dict"]["weight"], state(2)["state_dict"]["weight"])
            else:
                assert found["progress"]["epoch"] == 1
                noticed += 1
    assert noticed > 400
    path.write_bytes(whole)
    assert checkpoint.load_last(tmp_path)["progress"]["epoch"] == 2  # type: ignore[index]


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    assert checkpoint.load_last(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.load(tmp_path / "nowhere")


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "name"
    path.write_text("old")
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"half": 1, "whole": object()})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["name"]


class AverageMeter:
    """What published training code pickles next to the weights."""

    def __init__(self) -> None:
        self.values = np.arange(3.0)


@pytest.mark.parametrize("zipped", [True, False])
def test_published_checkpoints_open_without_their_classes(
    tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AverageMeter, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "AverageMeter", AverageMeter, raising=False)
    weights = {str(kind): torch.arange(12).reshape(3, 4).t().to(kind) for kind in (torch.bfloat16, torch.int64)}
    published = {"recorder": AverageMeter(), "args": argparse.Namespace(lr=0.1), "é": (1, None), "state_dict": weights}
    torch.save(published, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=zipped)
    monkeypatch.delattr(sys.modules["__main__"], "AverageMeter")
    found = checkpoint.load(tmp_path / "old.pth.tar")
    assert isinstance(found["recorder"], checkpoint.Inert)
    assert found["é"] == (1, None)
    assert [(value.dtype, value.tolist()) for value in found["state_dict"].values()] == [
        (value.dtype, value.tolist()) for value in weights.values()
    ]


HOSTILE = {
    "REDUCE": b"\x80\x02cos\nsystem\nX\x0d\x00\x00\x00touch PWNED_00\x85R.",
    "INST": b"(X\x0d\x00\x00\x00touch PWNED_00ios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nX\x0d\x00\x00\x00touch PWNED_00o.",
    "NEWOBJ": b"\x80\x02csubprocess\nPopen\n]X\x05\x00\x00\x00touchaX\x08\x00\x00\x00PWNED_00a\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\n]X\x05\x00\x00\x00touchaX\x08\x00\x00\x00PWNED_00a\x85}\x92.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0etouch PWNED_00\x85R.",
    "MEMOIZED_NAMES": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93\x8c\x0etouch PWNED_00\x85R.",
    "BUILTIN": b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.",
    "BUILD": b"\x80\x02cos\nenviron\n}X\x01\x00\x00\x00aX\x01\x00\x00\x00bsb.",
    "EXT1": b"\x80\x02\x82\x01.",
    "TORCH": b"\x80\x02ctorch.hub\nload\nX\x01\x00\x00\x00x\x85R.",
    "NESTED_NAME": b"\x80\x04\x8c\x05torch\x8c\x0fos.path.os.system\x93.",
    "PERSID": b"Pevil\n.",
}


@pytest.mark.parametrize("family", HOSTILE)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_hostile_pickles_run_no_code(
    tmp_path: Path, family: str, zipped: bool, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone they are refused; as an entry of a dictionary they may also be inert."""
    monkeypatch.chdir(tmp_path)
    path, content = tmp_path / "hostile.pth", HOSTILE[family]
    if inside:
        content = b"}X\x01\x00\x00\x00a" + content[:-1] + b"s."
    if zipped:
        torch.save({"a": 1}, path)
        with zipfile.ZipFile(path) as source:
            members = {name: source.read(name) for name in source.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
            for name, member in members.items():
                target.writestr(name, content if name.endswith("data.pkl") else member)
    else:
        path.write_bytes(content)
    with suppress(UserError):
        found = checkpoint.load(path)
        assert inside
        assert isinstance(found["a"], checkpoint.Inert)
    assert os.listdir(tmp_path) == ["hostile.pth"]


@pytest.mark.parametrize(
    "nest", [[], ["state_dict"], ["model_state_dict"], ["model"], ["net"], ["model", "state_dict"]]
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model.", "net._orig_mod."])
def test_weights_of_other_loops_open(nest: list[str], prefix: str) -> None:
    weights: dict[str, Any] = {f"{prefix}fc.weight": torch.ones(2, 3), f"{prefix}fc.bias": torch.ones(2)}
    for name in nest:
        weights = {"epoch": 3, name: weights}
    assert checkpoint.weights_of(weights, "a.pth").keys() == {"fc.weight", "fc.bias"}


def test_a_file_without_weights_names_its_keys() -> None:
    with pytest.raises(UserError, match=r"holds no weights alone or under state_dict, .*; its keys are encoder, step"):
        checkpoint.weights_of({"encoder": {"a": torch.ones(1)}, "step": 3}, "a.pth")


# ------------------------------------------------------------------------------------------------------- load_network

MEAN, STD = NORMALISATION["cifar100"]
SIZES = [(32, 32), (64, 64), (24, 40), (70, 50)]


def published(arch: str = "preactresnet18", size: tuple[int, int] = (32, 32)) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A network in eval mode for images of a size, and its checkpoint as other code writes it."""
    torch.manual_seed(0)
    model = build_model(arch, 7, 2 if size[0] >= 64 else 1, 4).eval()
    return model, {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}


def written_by_a_run(model: torch.nn.Module, size: tuple[int, int] = (32, 32), **settings: Any) -> dict[str, Any]:
    """What load_network uses of a run's checkpoint."""
    return {
        "settings": {"dataset": "folder", "arch": "preactresnet18", **settings},
        "classes": [f"class {k}" for k in range(7)],
        "mean": MEAN,
        "std": STD,
        "image_size": size,
        "digests": {"train": "1", "test": "2"},
        "state_dict": model.state_dict(),
        "progress": {"epoch": 2, "rows": [{}, {}]},
    }


def assert_same_logits(network: torch.nn.Module, model: torch.nn.Module, height: int, width: int) -> None:
    """Pixels in [0, 1] give what normalised images give the network inside."""
    assert not any(module.training for module in network.modules())
    pixels = torch.rand(2, 3, height, width)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        torch.testing.assert_close(network(pixels), model((pixels - mean) / std))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_published_network_of_every_architecture_opens(arch: str) -> None:
    """Whose other keys are not taken for those of a run: they may mean anything."""
    size = SIZES[ARCHITECTURES.index(arch) % len(SIZES)]
    model, state = published(arch, size)
    state |= {"classes": None, "settings": checkpoint.Inert(), "image_size": "large", "mean": 3}
    given = {"arch": arch, "dataset": "cifar100", "image_size": size}
    network, about = checkpoint.network_of(state, "published.pth", given)
    assert_same_logits(network, model, *size)
    assert about == checkpoint.About(arch, 7, size, MEAN, STD, dataset="cifar100")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("asked", [None, 32, 64])
def test_width_and_stride_are_those_of_the_run(tmp_path: Path, size: tuple[int, int], asked: int | None) -> None:
    """Whatever size the caller's images have."""
    model, _ = published(size=size)
    state = written_by_a_run(model, size)
    checkpoint.write(state, tmp_path)
    network, about = checkpoint.load_network(tmp_path / checkpoint.LAST, image_size=asked)
    expected = (asked, asked) if asked else size
    assert_same_logits(network, model, *expected)
    assert (about.image_size, about.dataset, about.epochs) == (expected, "folder", 2)
    assert [about.classes, about.digests, about.settings] == [state[k] for k in ("classes", "digests", "settings")]


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, "arch, image_size, mean, std;"),
        ({"dataset": "cifar10"}, "arch;"),
        ({"arch": "preactresnet18", "dataset": "folder"}, "image_size, mean, std;"),
    ],
)
def test_what_a_checkpoint_does_not_say_is_asked_for_by_name(given: dict[str, Any], missing: str) -> None:
    with pytest.raises(UserError, match=f"a.pth does not say its network's {missing}"):
        checkpoint.network_of(published()[1], "a.pth", given)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("preactresnet34", "do not fit --arch preactresnet34"),
        ("resnext29_4_24", "do not fit --arch resnext29_4_24"),
        ("unheard_of", "unknown architecture"),
    ],
)
def test_settings_that_do_not_go_with_the_weights_are_refused(arch: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checkpoint.network_of(written_by_a_run(published()[0], arch=arch), "odd.pth", {})
