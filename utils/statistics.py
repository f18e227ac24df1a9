"""Whether one mean is above another: tests over seeds, their intervals, p-values after Holm."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from scipy import stats

Name = TypeVar("Name", bound=Hashable)
Seeds = Mapping[str, float]  # seed → number

LEVEL = 0.05  # p-values below it tell two rows apart
RULE = (
    f"paired t-test over common seeds, at least 3, else Welch's, at least 2 each; p ≥ {LEVEL:g} after Holm over the "
    "rows that are compared"
)


class Difference(NamedTuple):
    """One row minus another; what cannot be said is not a number.

    Attributes:
        value: difference of the means, of common seeds where the test is paired, else of all.
        low, high: its 95 % confidence interval, not adjusted for the number of comparisons.
        p: two-sided p-value.
        test: what it is of, or why there is none.
        adjusted: ``p`` after Holm; set by ``compared``.
    """

    value: float
    low: float
    high: float
    p: float
    test: str
    adjusted: float = math.nan


def difference(ours: Seeds, theirs: Seeds) -> Difference:
    """The mean of ``ours`` minus that of ``theirs``: a paired t-test over at least 3 common seeds, else Welch's t-test
    where each has at least 2, else nothing.

    Where no number varies, there is no interval: p is 1 if the means are equal, else not a number.
    """
    common = [seed for seed in ours if seed in theirs]
    if len(common) >= 3:
        a, b = [ours[seed] for seed in common], [theirs[seed] for seed in common]
        test, spread = f"paired, {len(common)} seeds", statistics.stdev(x - y for x, y in zip(a, b, strict=True))
    elif min(len(ours), len(theirs)) >= 2:
        a, b = [*ours.values()], [*theirs.values()]
        test, spread = f"Welch, {len(a)} and {len(b)} seeds", max(statistics.stdev(a), statistics.stdev(b))
    else:
        return Difference(math.nan, math.nan, math.nan, math.nan, "too few seeds")
    value = statistics.mean(a) - statistics.mean(b)
    rounding = 1e-9 * max(map(abs, [*a, *b]))
    if spread <= rounding:
        equal = abs(value) <= rounding
        return Difference(value, math.nan, math.nan, 1.0 if equal else math.nan, f"{test}; no variance")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of the two may not vary, which Welch's test can take
        found = stats.ttest_rel(a, b) if len(common) >= 3 else stats.ttest_ind(a, b, equal_var=False)
    interval = found.confidence_interval(0.95)
    return Difference(value, float(interval.low), float(interval.high), float(found.pvalue), test)


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm, "A simple sequentially rejective multiple test procedure", 1979).
    Those that are not numbers stay so and do not count."""
    adjusted = [math.nan] * len(p)
    known = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    highest = 0.0
    for rank, (value, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * value))
        adjusted[i] = highest
    return adjusted


def compared(rows: Mapping[Name, Seeds], with_row: Name) -> dict[Name, Difference]:
    """Every other row minus ``with_row``; p-values are adjusted over all of them."""
    found = {row: difference(seeds, rows[with_row]) for row, seeds in rows.items() if row != with_row}
    adjusted = holm([of.p for of in found.values()])
    return {row: of._replace(adjusted=p) for (row, of), p in zip(found.items(), adjusted, strict=True)}


def best_of(rows: Mapping[Name, Seeds], lowest: bool = False) -> Name | None:
    """The row with the highest (lowest) mean, the first on ties; None where it has one seed or no other row."""
    sign = -1 if lowest else 1
    best = max(rows, key=lambda row: sign * round(statistics.mean(rows[row].values()), 6), default=None)
    return None if best is None or len(rows) < 2 or len(rows[best]) < 2 else best


def leaders(rows: Mapping[Name, Seeds], lowest: bool = False) -> set[Name]:
    """The best row and those that are not told to be worse. Rows of one seed cannot be compared and are never among
    them; where none can be compared with the best, nobody leads. Over the common seeds another row may be ahead."""
    best = best_of(rows, lowest)
    found = {} if best is None else compared(rows, best)
    if best is None or all(math.isnan(of.value) for of in found.values()):
        return set()
    sign = -1 if lowest else 1
    return {best} | {row for row, of in found.items() if of.adjusted >= LEVEL or sign * of.value > 0}
