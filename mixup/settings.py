"""Settings of the methods: each is declared once, as a field of its method, with its default, range and presets.

Command-line flags, ``--help``, range checks, presets, names of runs and records of settings all follow from the fields.

    @dataclass
    class MyMethod(Method):
        sharpness: float = setting(2.0, "how sharp the edges of the mask are", low=0, presets={"cifar100": 1.0})
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Colour = tuple[float, float, float]

# mean and standard deviation of the published data sets, for pixels in [0, 1]
NORMALISATION: dict[str, tuple[Colour, Colour]] = {
    "cifar10": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    "cifar100": ((129.3 / 255, 124.1 / 255, 112.4 / 255), (68.2 / 255, 65.4 / 255, 70.4 / 255)),
    "tiny-imagenet-200": ((0.4802458, 0.44807219, 0.39754776), (0.27698641, 0.26906449, 0.28208191)),
}
ANY = "any other data set"  # the key of a preset for data sets without one of their own
LARGEST = 2**63  # of any number: what NumPy and PyTorch take


@dataclass(frozen=True)
class Setting:
    """What a field made by ``setting`` knows of itself; see there."""

    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    besides: float | None = None
    choices: Sequence[str] | None = None
    presets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    flag_default: Any = None
    keyword: str | None = None

    @property
    def kind(self) -> type:
        """bool, int, float or str; a setting without a default is a float."""
        return float if self.default is None else type(self.default)

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, or None."""
        if self.choices is not None:
            return None if value in self.choices else f"{value!r} is not one of {', '.join(self.choices)}"
        if self.kind is bool:
            return None if isinstance(value, bool) else f"{value!r} is neither True nor False"
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or (self.kind is int and value % 1):
            return f"{value!r} is not a {'whole ' if self.kind is int else ''}number"
        number = value if isinstance(value, int) else float(value)  # of NumPy's types, and as it is kept
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        above = -math.inf if self.above is None else self.above
        if number == self.besides or (abs(number) < LARGEST and low <= number <= high and number > above):
            return None
        return f"{value} is out of range: must be {self.range()}"

    def range(self) -> str:
        """The range in words, "above 0 and at most 1"."""
        bounds = [f"above {self.above:g}"] if self.above is not None else []
        bounds += [f"at least {self.low:g}"] if self.low is not None else []
        bounds += [f"at most {self.high:g}"] if self.high is not None else []
        text = " and ".join(bounds) or "finite"
        return text if self.besides is None else f"{text}, or {self.besides:g}"

    def preset(self, dataset: str) -> Any:
        """The value for ``dataset`` where none is given."""
        return self.presets.get(dataset, self.presets.get(ANY, self.default))


def setting(default: Any, help: str, **rest: Any) -> Any:
    """A dataclass field that is a setting.

    Args:
        default: of the field; None where every method has a preset of its own. Its type is the setting's.
        help: one line for ``--help``.
        rest: any of
            low, high, above: the range, inclusive but for ``above``;
            besides: one more value that is allowed;
            choices: the names that are allowed;
            presets: values by data set, which a user's value overrides; ``ANY`` stands for all that are not named;
            flag_default: what ``--help`` shows, where that is not ``default``;
            keyword: what the function behind the method calls it.
    """
    return dataclasses.field(default=default, metadata={"setting": Setting(default, help, **rest)})


def stands_for(values: type, keyword: str) -> Any:
    """A field that is passed on as ``keyword``, a setting of ``values``; default, range and help are that setting's."""
    known = settings_of(values)[keyword]
    return dataclasses.field(default=known.default, metadata={"setting": dataclasses.replace(known, keyword=keyword)})


def settings_of(kind: Any) -> dict[str, Setting]:
    """The settings of a dataclass, or of an instance of one, by name."""
    return {f.name: f.metadata["setting"] for f in dataclasses.fields(kind) if "setting" in f.metadata}


def check(values: Any) -> None:
    """Raise ``ValueError`` with the name and the value of the first setting that is out of range; numbers of any type,
    NumPy's too, become int or float, as their setting is."""
    for name, known in settings_of(values).items():
        value = getattr(values, name)
        if problem := known.problem(value):
            raise ValueError(f"{name} {problem}")
        if known.choices is None and known.kind in (int, float):
            setattr(values, name, known.kind(value))


def passed_on(values: Any) -> dict[str, Any]:
    """The settings that stand for keyword arguments of a function, by keyword."""
    return {known.keyword: getattr(values, n) for n, known in settings_of(values).items() if known.keyword is not None}
