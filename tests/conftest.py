"""Fixtures of several test files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 training and 10 test images, 32×32, of two classes that differ in brightness."""
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for split, count in (("train", 15), ("test", 5)):
        for name, level in (("dark", 60), ("light", 180)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(level - 50, level + 50, (32, 32, 3), dtype=np.uint8)).save(
                    folder / f"{i}.png"
                )
    return root
