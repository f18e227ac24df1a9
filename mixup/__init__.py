"""The methods: one file each, readable alone; this file is the registry.

>>> sage = build_method("sage", "cifar10", num_classes=10, upper_lambda=0.6, rand_pos=0.01, update_ratio=0.7)
>>> draws = sage.draw(np.random.default_rng(0), batch=100, height=32, width=32)  # every random choice
>>> mixed = sage.mix(model, images, labels, draws)  # what to train on
>>> loss = mixed.loss(model(mixed.images))  # the whole objective
>>> loss.backward()
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from .base import Method
from .comix import CoMixup
from .cutmix import CutMix
from .input import InputMixup
from .manifold import ManifoldMixup
from .puzzle import PuzzleMix
from .sage import Sage
from .saliencymix import SaliencyMix
from .settings import NORMALISATION, Setting, settings_of
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


def all_settings() -> dict[str, Setting]:
    """Every setting of every method by name, once, with the methods that have it named in its help."""
    found: dict[str, Setting] = {}
    users: dict[str, list[str]] = {}
    for method in METHODS.values():
        for name, known in settings_of(method).items():
            found.setdefault(name, known)
            users.setdefault(name, []).append(method.name)
    return {name: replace(known, help=f"{', '.join(users[name])}: {known.help}") for name, known in found.items()}


def build_method(name: str, dataset: str, num_classes: int, **given: Any) -> Method:
    """A method with its presets for ``dataset``.

    Args:
        name: a key of ``METHODS``.
        dataset: chooses presets; of cifar10, cifar100 and tiny-imagenet-200 mean and std are known as well.
        num_classes: K.
        given: settings by flag name, which win over presets, and ``mean`` and ``std``, [3] for pixels in [0, 1].
            Settings that only other methods have are ignored, so that one set of flags can serve a sweep of methods.

    Raises:
        ValueError: unknown method or setting, or a value out of range.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    if unknown := given.keys() - all_settings().keys() - {"mean", "std"}:
        raise ValueError(f"no method has a setting named {', '.join(sorted(unknown))}")
    method = METHODS[name]
    mean, std = NORMALISATION.get(dataset, (None, None))
    values = {"mean": mean, "std": std, **method.presets(dataset), **given}
    names = {f.name for f in fields(method)}
    return method(num_classes=num_classes, **{key: value for key, value in values.items() if key in names})
