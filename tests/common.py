"""Golden vectors and the fixed weights they were made with."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
MEAN = torch.tensor([125.3, 123.0, 113.9]) / 255
STD = torch.tensor([63.0, 62.1, 66.7]) / 255


def golden(name: str) -> dict[str, Any]:
    """Arrays of ``tests/golden/NAME`` (npz) or its JSON content."""
    path = GOLDEN / name
    return json.loads(path.read_text()) if path.suffix == ".json" else dict(np.load(path))


def normalise(images_u8: np.ndarray) -> Tensor:
    """[B, 3, H, W] bytes to normalised float32, as every golden vector does it."""
    return (torch.from_numpy(images_u8).float() / 255 - MEAN[:, None, None]) / STD[:, None, None]


def load_fixed_weights(model: nn.Module) -> nn.Module:
    """Every state-dict entry drawn from a generator seeded by its name; see tests/golden/README.md."""
    state = {}
    for name, old in model.state_dict().items():
        rng = np.random.RandomState(zlib.crc32(name.encode()))
        shape = tuple(old.shape)
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif name.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        elif len(shape) == 4:
            value = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif len(shape) == 2:
            value = rng.standard_normal(shape) / np.sqrt(shape[1])
        elif name.endswith("weight"):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = 0.1 * rng.standard_normal(shape)
        state[name] = torch.as_tensor(value).to(old.dtype)
    model.load_state_dict(state)
    return model
