"""The methods: one file each, readable alone; this file is the registry.

>>> sage = build_method("sage", "cifar10", num_classes=10, upper_lambda=0.6, rand_pos=0.01, update_ratio=0.7)
>>> loss = sage.step(model, images, labels).loss
>>> loss.backward()

Or by hand:

>>> draws = sage.draw(np.random.default_rng(0), batch=100, height=32, width=32)  # every random choice
>>> mixed = sage.mix(model, images, labels, draws)  # what to train on
>>> loss = mixed.loss(model(mixed.images))  # the whole objective
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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


def settings_for(name: str, dataset: str, **given: Any) -> dict[str, Any]:
    """The settings of a method for a data set, checked: given ones, else presets, else defaults. No network, and no
    number of classes, is needed.

    Args:
        name: a key of ``METHODS``.
        dataset: chooses presets.
        given: settings by flag name. Settings that only other methods have are ignored, so that one set of flags can
            serve a sweep of methods.

    Raises:
        ValueError: unknown method or setting, or a value out of range.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    if unknown := given.keys() - all_settings().keys():
        raise ValueError(f"no method has a setting named {', '.join(sorted(unknown))}")
    names = settings_of(METHODS[name])
    values = {**METHODS[name].presets(dataset), **{key: value for key, value in given.items() if key in names}}
    method = METHODS[name](num_classes=1, **values)  # checks each setting, and how they go together
    return {key: getattr(method, key) for key in names}


def build_method(
    name: str,
    dataset: str,
    num_classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    **given: Any,
) -> Method:
    """A method with its presets for ``dataset``.

    Args:
        name: a key of ``METHODS``.
        dataset: chooses presets; of cifar10, cifar100 and tiny-imagenet-200 mean and std are known as well.
        num_classes: K.
        mean, std: one number a channel, or one for all, for pixels in [0, 1].
        seed: of ``method.rng``, from which draws come that are not handed over; another one in each process.
        given: settings, as in ``settings_for``.

    Raises:
        ValueError: unknown method or setting, or a value out of range.
    """
    known = NORMALISATION.get(dataset, (None, None))
    settings = settings_for(name, dataset, **given)
    return METHODS[name](num_classes=num_classes, mean=mean or known[0], std=std or known[1], seed=seed, **settings)
