"""The hook of all networks: where on the way through a network activations can be mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

MIXING_POINTS = 3  # before each of three parts of a network: the input, after the first stage, after the second


def through(
    parts: Sequence[Callable[[Tensor], Tensor]],
    x: Tensor,
    mix_at: int | None = None,
    mix: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``x`` through the parts of a network, one after the other; ``mix`` is applied before part ``mix_at``, from 0."""
    for point, part in enumerate(parts):
        if mix is not None and mix_at == point:
            x = mix(x)
        x = part(x)
    return x
