"""What the methods' settings are."""

from __future__ import annotations

Colour = tuple[float, float, float]

# mean and standard deviation of the published data sets, for pixels in [0, 1]
NORMALISATION: dict[str, tuple[Colour, Colour]] = {
    "cifar10": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    "cifar100": ((129.3 / 255, 124.1 / 255, 112.4 / 255), (68.2 / 255, 65.4 / 255, 70.4 / 255)),
    "tiny-imagenet-200": ((0.4802458, 0.44807219, 0.39754776), (0.27698641, 0.26906449, 0.28208191)),
}
