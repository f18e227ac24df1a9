"""Other test sets: what counts as an array, and what fits a network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.common import warned
from utils.errors import UserError
from utils.test_sets import CIFAR10, corrupted_sets, open_set

CIFAR: Any = SimpleNamespace(classes=CIFAR10, image_size=(32, 32))


def opened(path: Path) -> list[tuple[str, int, int]]:
    with warned() as lines:
        sets = corrupted_sets(path, CIFAR, lambda labels: np.arange(len(labels)))
        found = [(name, severity, len(split)) for name, severity, split in sets]
    assert lines == []
    return found


def save_arrays(folder: Path, labels: np.ndarray, *names: str) -> None:
    np.save(folder / names[0], labels)
    for name in names[1:]:
        np.save(folder / name, np.zeros((len(labels), 32, 32, 3), np.uint8))


def test_halves_of_macos_files_are_no_arrays(tmp_path: Path) -> None:
    save_arrays(tmp_path, np.tile(np.arange(10), 5), "labels.npy", "fog.npy")
    for name in ("._fog.npy", "._labels.npy", ".DS_Store", "@eaDir"):
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    assert opened(tmp_path) == [("fog", severity, 10) for severity in range(1, 6)]
    pair = tmp_path / "pair"
    pair.mkdir()
    save_arrays(pair, np.arange(10), "cifar10.1_v6_labels.npy", "cifar10.1_v6_data.npy")
    (pair / "._cifar10.1_v6_data.npy").write_bytes(b"\0\5\26\7")
    assert len(open_set(pair, CIFAR)) == 10


@pytest.mark.parametrize(
    "labels",
    [np.repeat(np.arange(10), 5), np.tile(np.arange(10), 4), np.random.default_rng(0).permutation(np.arange(100) % 10)],
)
def test_arrays_of_one_severity_are_not_cut_into_five(tmp_path: Path, labels: np.ndarray) -> None:
    save_arrays(tmp_path, labels, "labels.npy", "fog.npy")
    with pytest.raises(UserError, match="not those of the same images 5 times"):
        opened(tmp_path)


@pytest.mark.parametrize("labels", [np.tile(np.arange(10), 5) / 1.0, np.tile(np.arange(9), 5), np.arange(10)[:, None]])
def test_labels_are_numbers_of_all_classes(tmp_path: Path, labels: np.ndarray) -> None:
    save_arrays(tmp_path, labels, "labels.npy", "fog.npy")
    with pytest.raises(UserError, match="not those of 10 classes"):
        opened(tmp_path)
