"""Differences of means: hand-computed cases, SciPy's own results, and tables where little or nothing can be said."""

from __future__ import annotations

import math
import random

import pytest
from scipy import stats

from utils.statistics import best_of, compared, difference, holm, leaders

QUANTILE = 4.302653  # 97.5 % of Student's t with 2 degrees of freedom


def seeds(*values: float, first: int = 1) -> dict[str, float]:
    return {str(seed): value for seed, value in enumerate(values, first)}


def tail(t: float) -> float:
    """Two-sided p-value of Student's t with 2 degrees of freedom, which has a closed form."""
    return 1 - abs(t) / math.sqrt(t * t + 2)


def test_a_paired_difference_by_hand() -> None:
    # differences 1, 2, 3: mean 2, deviation 1, standard error 1/√3
    found = difference(seeds(71, 73, 72), seeds(70, 71, 69))
    assert found.value == pytest.approx(2)
    assert found.p == pytest.approx(tail(2 * math.sqrt(3)))
    assert (found.low, found.high) == pytest.approx((2 - QUANTILE / math.sqrt(3), 2 + QUANTILE / math.sqrt(3)))
    assert found.test == "paired, 3 seeds"


def test_welchs_difference_by_hand() -> None:
    # variances 2 and 2, two seeds each: standard error √2, 2 degrees of freedom
    found = difference(seeds(60, 62), seeds(64, 66, first=2))
    assert found.value == -4
    assert found.p == pytest.approx(tail(4 / math.sqrt(2)))
    assert (found.low, found.high) == pytest.approx((-4 - QUANTILE * math.sqrt(2), -4 + QUANTILE * math.sqrt(2)))
    assert found.test == "Welch, 2 and 2 seeds"


@pytest.mark.parametrize(
    ("first", "second"), [((1, 2, 3, 4, 5), (1, 2, 3)), ((1, 2, 3, 4), (3, 4, 5)), ((1, 2), (1, 2))]
)
def test_unequal_seeds_are_compared_as_scipy_does(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    rng = random.Random(0)
    ours, theirs = ({str(seed): rng.gauss(75, 1) for seed in of} for of in (first, second))
    common = sorted(ours.keys() & theirs.keys())
    found = difference(ours, theirs)
    if len(common) >= 3:
        expected = stats.ttest_rel([ours[s] for s in common], [theirs[s] for s in common])
        assert found.value == pytest.approx(sum(ours[s] - theirs[s] for s in common) / len(common))
    else:
        expected = stats.ttest_ind([*ours.values()], [*theirs.values()], equal_var=False)
        assert found.value == pytest.approx(sum(ours.values()) / len(ours) - sum(theirs.values()) / len(theirs))
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    back = difference(theirs, ours)
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low))


@pytest.mark.parametrize(("ours", "theirs"), [(seeds(70), seeds(71, 72, 73)), (seeds(70, 71), seeds(70)), ({}, {})])
def test_one_seed_says_nothing(ours: dict[str, float], theirs: dict[str, float]) -> None:
    found = difference(ours, theirs)
    assert all(map(math.isnan, (found.value, found.low, found.high, found.p)))
    assert found.test == "too few seeds"


def test_numbers_that_do_not_vary_have_no_interval() -> None:
    for of in (seeds(70.1, 71.3, 72.7), seeds(70.1, 70.1)):
        same = difference(of, of)
        assert (same.value, same.p) == (0, 1)
        above = difference({seed: value + 0.3 for seed, value in of.items()}, of)  # up to rounding, the same everywhere
        assert above.value == pytest.approx(0.3)
        assert math.isnan(above.p)
        assert math.isnan(above.low)
        assert above.test.endswith("no variance")
    one_varies = difference(seeds(70, 70), seeds(71, 72, first=5))
    assert 0 < one_varies.p < 1


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, math.nan, 0.03])[:2] == pytest.approx([0.03, 0.06])  # 3·0.01; 0.04, but not below the next
    assert holm([0.01, 0.04, math.nan, 0.03])[3] == pytest.approx(0.06)  # 2·0.03
    assert math.isnan(holm([0.01, 0.04, math.nan, 0.03])[2])
    assert holm([0.9, 0.6]) == [1, 1]
    assert holm([]) == []


def test_the_family_is_what_is_compared_with_one_row() -> None:
    rows = {"a": seeds(70, 71, 73), "b": seeds(71, 73, 74), "c": seeds(75, 75.5, 78.5), "d": seeds(90)}
    found = compared(rows, "a")
    assert [*found] == ["b", "c", "d"]
    p = [difference(rows[name], rows["a"]).p for name in ("b", "c")]
    assert [found[name].adjusted for name in ("b", "c")] == pytest.approx(holm(p))
    assert [found[name].p for name in ("b", "c")] == p
    assert math.isnan(found["d"].adjusted)


def test_leaders_are_the_best_and_what_cannot_be_told_from_it() -> None:
    rows = {"far": seeds(60, 61, 62), "near": seeds(70, 73, 71), "best": seeds(71, 72, 73), "one": seeds(71)}
    assert best_of(rows) == "best"
    assert leaders(rows) == {"near", "best"}
    assert leaders(rows, lowest=True) == {"far"}
    assert leaders({name: rows[name] for name in ("far", "best")}) == {"best"}  # two rows
    # The best mean is of seeds that the other row lacks: over the common ones the other is ahead, which keeps it bold.
    ahead = {"best": seeds(70, 71, 72, 80, 81), "ahead": seeds(71, 72.01, 73.02)}
    assert compared(ahead, "best")["ahead"].adjusted < 0.001
    assert leaders(ahead) == {"best", "ahead"}
    assert leaders({name: {seed: -value for seed, value in of.items()} for name, of in ahead.items()}, lowest=True) == {
        "best", "ahead",
    }  # fmt: skip
    tie = {"a": seeds(70, 70), "b": seeds(70, 70)}
    assert best_of(tie) == "a"
    assert leaders(tie) == {"a", "b"}
    assert leaders({**tie, "c": seeds(69, 69)}) == {"a", "b"}
    for nothing in (
        {},
        {"a": seeds(70, 71)},
        {"a": seeds(70, 71), "b": seeds(72)},
        {"a": seeds(70, 71), "b": seeds(69)},
    ):
        assert leaders(nothing) == set()
