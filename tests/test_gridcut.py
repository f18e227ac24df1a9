"""Grid cuts: both solvers against brute force and against each other."""

from __future__ import annotations

import itertools
from argparse import ArgumentParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import main as program
from mixup import gridcut
from mixup.gridcut import NoSolver, scale_floats, swap, swap_each, swap_gco, swap_ortools

needs_gco = pytest.mark.skipif(gridcut._gco() is None, reason="compares with gco-wrapper, which is not installed")


def squared(labels):
    steps = np.arange(labels)
    return (steps[:, None] - steps) ** 2


def random_grids(rng, batch, height, width, labels, largest, metric="squared"):
    """Energies 0 … largest: ties everywhere where it is small."""
    if metric == "any":
        distance = rng.integers(0, largest + 1, (labels, labels))
        distance = np.triu(distance, 1) + np.triu(distance, 1).T
    else:
        distance = squared(labels) if metric == "squared" else 1 - np.eye(labels, dtype=int)
    return (
        rng.integers(-largest, largest + 1, (batch, height, width, labels)),
        distance,
        rng.integers(0, largest + 1, (batch, height - 1, width)),
        rng.integers(0, largest + 1, (batch, height, width - 1)),
    )


def energy(labels, unary, distance, vertical, horizontal):
    """[N] of N labellings of as many grids, or of one."""
    cells = np.take_along_axis(unary, labels[..., None], axis=-1).sum(axis=(1, 2, 3))
    down = (vertical * distance[labels[:, :-1], labels[:, 1:]]).sum(axis=(1, 2))
    return cells + down + (horizontal * distance[labels[:, :, :-1], labels[:, :, 1:]]).sum(axis=(1, 2))


def best_swap(labels, alpha, beta, terms):
    """Of all ways to share the cells of one grid that have α or β between the two, the cheapest with the most α."""
    cells = np.flatnonzero((labels == alpha) | (labels == beta))
    tries = np.repeat(labels.reshape(1, -1), 2 ** len(cells), axis=0)
    tries[:, cells] = list(itertools.product((alpha, beta), repeat=len(cells)))
    tries = tries.reshape(-1, *labels.shape[1:])
    energies = energy(tries, *terms)
    first = np.lexsort(((tries == beta).sum(axis=(1, 2)), energies))[0]
    return tries[first : first + 1], energies[first]


def brute_swap(*terms):
    """The swap of one grid by trying everything."""
    unary = terms[0]
    labels = np.zeros(unary.shape[:3], int)
    before, now = None, energy(labels, *terms)
    while before is None or now < before:
        for alpha in range(unary.shape[-1]):
            for beta in range(unary.shape[-1] - 1, alpha, -1):
                labels, _ = best_swap(labels, alpha, beta, terms)
        before, now = now, energy(labels, *terms)
    return labels


def grid_of(terms, index):
    """One grid of a batch, as a batch of one."""
    unary, distance, vertical, horizontal = terms
    pick = slice(index, index + 1)
    return unary[pick], distance, vertical[pick], horizontal[pick]


@pytest.mark.parametrize("metric", ["squared", "potts", "any"])
@pytest.mark.parametrize("largest", [1, 2, 5, 1000])
def test_labels_are_those_of_brute_force_ties_included(metric, largest):
    rng = np.random.default_rng(largest)
    for _ in range(12):
        height, width, labels = rng.integers(1, 4), rng.integers(1, 4), rng.integers(2, 7)
        terms = random_grids(rng, 1, height, width, labels, largest, metric)
        expected = brute_swap(*terms)
        np.testing.assert_array_equal(swap_ortools(*terms), expected)
        np.testing.assert_array_equal(swap(*terms), expected)
        alone = swap(terms[0][0], terms[1], terms[2][0], terms[3][0])
        np.testing.assert_array_equal(alone, expected[0])


@needs_gco
@pytest.mark.parametrize(
    ("labels", "largest", "metric"),
    [(2, 1, "squared"), (3, 2, "squared"), (3, 1000, "squared"), (4, 3, "any"), (4, 10**4, "any"), (7, 4, "potts")],
)
def test_both_solvers_agree_on_thousands_of_grids(labels, largest, metric):
    rng = np.random.default_rng(labels)
    for height, width in [(2, 2), (4, 4), (3, 7), (1, 6), (8, 8)]:
        terms = random_grids(rng, 200, height, width, labels, largest, metric)
        first, second = swap_gco(*terms), swap_ortools(*terms)
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(energy(first, *terms), energy(second, *terms))


def grids_apart(rng, grids, height, width, labels, largest):
    """Arguments of ``swap_each``: distances and labels of each grid's own, edges that all share."""
    unary, _, vertical, horizontal = random_grids(rng, grids, height, width, labels, largest)
    distance = rng.integers(0, largest + 1, (grids, labels, labels))
    distance = np.triu(distance, 1) + np.triu(distance, 1).transpose(0, 2, 1)
    allowed = [np.sort(rng.permutation(labels)[: rng.integers(1, labels + 1)]) for _ in range(grids)]
    return unary, distance, vertical[0], horizontal[0], allowed


def one_by_one(solve, unary, distance, vertical, horizontal, allowed):
    found = np.empty(unary.shape[:3], int)
    for b, labels in enumerate(allowed):
        terms = unary[b][None, :, :, labels], distance[b][np.ix_(labels, labels)], vertical[None], horizontal[None]
        found[b] = labels[solve(*terms)[0]]
    return found


@settings(max_examples=120, deadline=None)
@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from([(1, 1), (4, 1), (1, 4), (2, 2), (3, 4), (4, 4), (4, 4), (5, 3), (3, 5), (6, 6)]),
    st.integers(1, 9),
    st.sampled_from([1, 2, 5, 40, 10**4]),
)
def test_grids_side_by_side_get_what_each_gets_alone(seed, shape, labels, largest):
    """Ties everywhere where energies are small; up to 4×4 cells by rows, beyond by flows."""
    terms = grids_apart(np.random.default_rng(seed), 5, *shape, labels, largest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gridcut, "_gco", lambda: None)
        found = swap_each(*terms)
    np.testing.assert_array_equal(found, one_by_one(swap, *terms))
    np.testing.assert_array_equal(swap_each(*terms), found)


@pytest.mark.parametrize("largest", [1, 3, 1000])
def test_rows_find_what_brute_force_finds(monkeypatch, largest):
    monkeypatch.setattr(gridcut, "_gco", lambda: None)
    monkeypatch.setattr(gridcut, "_ortools", lambda: None)
    rng = np.random.default_rng(largest)
    for _ in range(12):
        terms = grids_apart(rng, 3, *rng.integers(1, 4, 2), 4, largest)
        np.testing.assert_array_equal(swap_each(*terms), one_by_one(brute_swap, *terms))


def test_side_by_side_without_a_solver_and_beyond_doubles(monkeypatch):
    monkeypatch.setattr(gridcut, "_gco", lambda: None)
    unary, distance, vertical, horizontal, allowed = grids_apart(np.random.default_rng(1), 4, 4, 4, 6, 20)
    expected = swap_each(unary, distance, vertical, horizontal, allowed)
    large = 2**36
    found = swap_each(unary * large, distance, vertical * large, horizontal * large, allowed)
    np.testing.assert_array_equal(found, expected)
    monkeypatch.setattr(gridcut, "_ortools", lambda: None)
    np.testing.assert_array_equal(swap_each(unary, distance, vertical, horizontal, allowed), expected)
    with pytest.raises(NoSolver, match="pip install ortools"):
        swap_each(unary * large, distance, vertical * large, horizontal * large, allowed)
    with pytest.raises(NoSolver, match="pip install ortools"):
        swap_each(*grids_apart(np.random.default_rng(1), 4, 5, 4, 6, 20))


def test_no_swap_of_two_labels_lowers_the_energy():
    rng = np.random.default_rng(5)
    for _ in range(20):
        terms = random_grids(rng, 1, 3, 3, 4, 6)
        labels = swap(*terms)
        for alpha, beta in itertools.combinations(range(4), 2):
            assert best_swap(labels, alpha, beta, terms)[1] == energy(labels, *terms)[0]


@pytest.mark.parametrize("solve", [swap, swap_ortools])
def test_a_batch_is_solved_like_its_grids(solve):
    terms = random_grids(np.random.default_rng(6), 60, 4, 5, 3, 10**5)
    for index, labels in enumerate(solve(*terms)):
        np.testing.assert_array_equal(solve(*grid_of(terms, index))[0], labels)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 9))
def test_never_worse_than_the_start(seed, height, width, labels, largest):
    terms = random_grids(np.random.default_rng(seed), 3, height, width, labels, largest)
    copies = [x.copy() for x in terms]
    found = swap(*terms)
    assert found.dtype == np.int64
    assert found.shape == (3, height, width)
    for x, copy in zip(terms, copies, strict=True):
        np.testing.assert_array_equal(x, copy)
    start = np.zeros_like(found)
    assert (energy(found, *terms) <= energy(start, *terms)).all()
    if labels == 2:  # one swap is the global minimum
        assert (energy(found, *terms) <= energy(1 - start, *terms)).all()


def test_strides_and_integer_types_do_not_matter():
    unary, distance, vertical, horizontal = random_grids(np.random.default_rng(8), 4, 5, 6, 3, 50)
    expected = swap(unary, distance, vertical, horizontal)
    strided = np.asfortranarray(np.repeat(unary, 2, axis=2))[:, :, ::2].astype(np.int32, order="K")
    found = swap(strided, distance.T.astype(np.uint8), vertical.astype(np.int16), horizontal[:, ::-1][:, ::-1])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("scale", [10**7, 2**31, 2**40])
def test_energies_beyond_gco_are_solved_exactly(scale):
    """Weights above 10⁷ would abort the process in gco, sums above 2³¹ wrap around."""
    terms = random_grids(np.random.default_rng(9), 30, 4, 4, 3, 20)
    expected = swap_ortools(*terms)
    unary, distance, vertical, horizontal = terms
    np.testing.assert_array_equal(swap(unary * scale, distance, vertical * scale, horizontal * scale), expected)


def test_one_label_and_one_cell():
    np.testing.assert_array_equal(swap([[[4], [5]]], [[0]], np.zeros((0, 2), int), [[3]]), [[0, 0]])
    np.testing.assert_array_equal(swap([[[4, 3, 5]]], squared(3), np.zeros((0, 1), int), np.zeros((1, 0), int)), [[1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unary": np.zeros((2, 2))}, "unary"),
        ({"unary": np.zeros((2, 2, 2))}, "float64"),
        ({"unary": np.zeros((0, 2, 2), int)}, r"\(0, 2, 2\)"),
        ({"unary": np.full((2, 2, 2), 2**61)}, "64 bits"),
        ({"distance": np.zeros((3, 3), int)}, r"\(3, 3\)"),
        ({"distance": np.array([[0, -1], [-1, 0]])}, "-1"),
        ({"distance": np.array([[0, 1], [2, 0]])}, "symmetric"),
        ({"distance": np.array([[1, 1], [1, 0]])}, "diagonal"),
        ({"vertical": np.array([[0, -7]])}, "-7"),
        ({"vertical": np.zeros((2, 2), int)}, "vertical"),
        ({"horizontal": np.array([[1.5], [0.0]])}, "float64"),
    ],
)
def test_bad_input_is_refused(change, message):
    good = {
        "unary": np.zeros((2, 2, 2), int),
        "distance": squared(2),
        "vertical": np.zeros((1, 2), int),
        "horizontal": np.zeros((2, 1), int),
    }
    change = {k: v.astype(int) if k == "unary" and v.ndim == 2 else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        swap(**{**good, **change})


def test_a_missing_solver_names_the_package(monkeypatch):
    terms = random_grids(np.random.default_rng(0), 1, 2, 2, 2, 5)
    monkeypatch.setattr(gridcut, "_ortools", lambda: None)
    with pytest.raises(NoSolver, match="ortools"):
        swap(terms[0] * 2**40, *terms[1:])
    monkeypatch.setattr(gridcut, "_gco", lambda: None)
    with pytest.raises(NoSolver, match="pip install ortools") as caught:
        swap(*terms)
    assert "\n" not in str(caught.value)


def test_a_missing_solver_costs_one_line(monkeypatch, capsys):
    monkeypatch.setattr(gridcut, "_ortools", lambda: None)
    monkeypatch.setattr(gridcut, "_gco", lambda: None)
    terms = random_grids(np.random.default_rng(0), 1, 2, 2, 2, 5)
    assert program.exit_code(ArgumentParser(), lambda: int(swap(*terms).sum())) == 1
    assert capsys.readouterr().err.startswith("error: this method needs a grid cut solver")


def test_floats_become_the_integers_of_gco():
    rng = np.random.default_rng(3)
    unary = rng.normal(size=(4, 4, 5)).astype(np.float32)
    distance = (1 - np.eye(5) * np.float32(1)).astype(np.float32) * np.float32(0.25)
    vertical, horizontal = np.full((3, 4), 0.02, np.float32), np.full((4, 3), 0.02, np.float32)
    scaled = scale_floats(unary, distance, vertical, horizontal)
    assert [x.dtype for x in scaled] == [np.int64] * 4
    assert scaled[1][0, 1] == 25
    assert scaled[2][0, 0] == int(np.float32(0.02) * np.float32(1000))
    np.testing.assert_array_equal(scaled[0], np.trunc(unary * np.float32(100_000)))
    if gridcut._gco() is None:
        return
    import gco

    labels = gco.cut_grid_graph(unary, distance, vertical, horizontal, n_iter=-1, algorithm="swap")
    np.testing.assert_array_equal(swap(*scaled).ravel(), labels)
