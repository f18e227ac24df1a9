"""The methods: one file each, readable alone; this file is the registry.

>>> method = build_method("sage", "cifar10", num_classes=10, upper_lambda=0.6, rand_pos=0.01, update_ratio=0.7)
>>> draws = method.draw(np.random.default_rng(0), batch=100, height=32, width=32)
>>> method.step(model, images, labels, draws).loss.backward()
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from .base import Method
from .comix import CoMixup
from .cutmix import CutMix
from .input import InputMixup
from .manifold import ManifoldMixup
from .puzzle import PuzzleMix
from .sage import Sage
from .saliencymix import SaliencyMix
from .settings import NORMALISATION
from .vanilla import Vanilla

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Vanilla,
        InputMixup,
        ManifoldMixup,
        CutMix,
        SaliencyMix,
        PuzzleMix,
        CoMixup,
        Sage,
    )
}


def setting_defaults() -> dict[str, Any]:
    """Every method's settings by flag name, with the default a flag has where no preset sets it."""
    return {f.name: f.default for method in METHODS.values() for f in fields(method) if f.default is not MISSING}


def build_method(name: str, dataset: str, num_classes: int, **settings: Any) -> Method:
    """A method with its presets for ``dataset``.

    Args:
        name: a key of ``METHODS``.
        dataset: chooses presets, mean and std: cifar10, cifar100, tiny-imagenet-200; any other counts as CIFAR-10.
        num_classes: K.
        settings: by flag name; they win over presets. Settings that only other methods have are ignored, so that one
            set of flags can serve a sweep of methods.

    Raises:
        ValueError: unknown method or setting, or a value out of range.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    unknown = settings.keys() - setting_defaults().keys() - {"mean", "std"}
    if unknown:
        raise ValueError(f"no method has a setting named {', '.join(sorted(unknown))}")
    method = METHODS[name]
    names = {f.name for f in fields(method)}
    mean, std = NORMALISATION.get(dataset, NORMALISATION["cifar10"])
    values = {"mean": mean, "std": std, **method.presets(dataset), **settings}
    return method(num_classes=num_classes, **{key: value for key, value in values.items() if key in names})
