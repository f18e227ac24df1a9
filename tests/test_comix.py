"""Co-Mixup: golden vectors, a plain loop over unpruned grid cuts, and what its pieces promise."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mixup import assignment, build_method, gridcut
from mixup.assignment import assign
from mixup.base import bce_loss, one_hot
from mixup.comix import CoMixup, co_mix, compatibility

from .common import golden, normalise

GCO = pytest.param("gco", marks=pytest.mark.skipif(gridcut._gco() is None, reason="no gco-wrapper"))
ORTOOLS = pytest.param("ortools", marks=pytest.mark.skipif(gridcut._ortools() is None, reason="no OR-Tools"))
SOLVERS = [GCO, ORTOOLS, "rows"]


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    file = golden("comix.npz")
    return [{key.split("/")[1]: file[key] for key in file if key.startswith(f"{i}/")} for i in range(5)]


def use_solver(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name != "gco":
        monkeypatch.setattr(gridcut, "_gco", lambda: None)
    if name == "ortools":
        monkeypatch.setattr(gridcut, "_cut_narrow", gridcut._cut_flow)


def maps(*shape: int, seed: int = 0) -> Tensor:
    """Peaked saliency, as networks have it."""
    return torch.from_numpy(np.random.default_rng(seed).gamma(0.3, size=shape).astype(np.float32))


def draws_for(saliency: Tensor, blocks: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    *parts, n, _, _ = saliency.shape
    return {
        "prior": rng.dirichlet([2.0] * n, size=parts or None),
        "initial_labels": rng.integers(n, size=(*parts, n, blocks, blocks)),
        "compatibility": compatibility(saliency, 0.001),
        "num_blocks": blocks,
    }


def expand(cells: Tensor, height: int, width: int) -> Tensor:
    """[n, g, g, n] to [n, H, W, n]."""
    g = cells.shape[1]
    return cells.repeat_interleave(height // g, 1).repeat_interleave(width // g, 2)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", range(5))
def test_golden(cases: list[dict[str, Any]], case: int, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_solver(monkeypatch, solver)
    want = cases[case]
    saliency = torch.from_numpy(want["saliency"])
    matrix = compatibility(saliency, float(want["omega"]))
    assert np.array_equal(matrix.numpy(), want["compatibility"])
    # with ω = 1 the matrix is the distances up to a factor
    distance = compatibility(saliency, 1.0) * want["distance"].sum() / len(saliency)
    np.testing.assert_allclose(distance.numpy(), want["distance"], atol=1e-4)
    arguments = {
        "prior": want["prior"],
        "initial_labels": want["initial_labels"],
        "compatibility": matrix,
        "num_blocks": int(want["num_blocks"]),
        "threshold_type": str(want["threshold_type"]),
    }
    assert np.array_equal(assign(saliency, **arguments).numpy(), want["assignment"])
    rows = one_hot(torch.from_numpy(want["labels"]), int(want["num_classes"]))
    mixed, targets = co_mix(normalise(want["images_u8"]), rows, saliency, **arguments)
    np.testing.assert_allclose(mixed.numpy(), want["mixed"], atol=1e-5)
    np.testing.assert_allclose(targets.numpy(), want["targets"], atol=1e-5)


def plain_assign(saliency: Tensor, prior: Any, initial_labels: Any, compatibility: Tensor, num_blocks: int) -> Any:
    """``assign`` with its defaults as the formulas have it: one cut after the other, over all labels."""
    n, g, cells = len(saliency), num_blocks, num_blocks**2
    pooled = F.avg_pool2d(saliency[:, None], (saliency.shape[1] // g, saliency.shape[2] // g))[:, 0]
    pooled = (pooled / pooled.sum((1, 2), keepdim=True)).numpy()
    cost = (-pooled - (0.05 / cells * np.log(prior.astype(np.float32) + 1e-8))[:, None, None]).transpose(1, 2, 0)
    matrix, mask, extra = compatibility.numpy(), np.eye(n, dtype=np.float32)[initial_labels], np.zeros((n, n))
    before = np.inf
    for index, o in itertools.product(range(4), range(n)):
        counts = mask.sum((1, 2))
        total = counts.sum(0) - counts[o]
        over = matrix @ total > 0.83 * cells
        unary = cost + (2 / cells * (matrix @ (total * over)) + extra[o] / cells).astype(np.float32)
        pairs: list[Any] = []
        if index and (counts[o] > 0).sum() == 2:
            pairs = [np.flatnonzero(counts[o])]
        elif index and (counts[o] > 0).sum() > 2:
            top = torch.topk(torch.from_numpy(counts[o]), 3).indices.sort().values.tolist()
            pairs = list(itertools.combinations(top, 2))
        distance = 1 - np.eye(n + len(pairs))
        rows = [*np.eye(n)]
        for label, pair in enumerate(pairs, start=n):
            unary = np.concatenate([unary, unary[:, :, pair].mean(axis=2, keepdims=True) - np.float32(5e-4)], axis=2)
            distance[label, pair] = distance[pair, label] = 0.25
            rows.append(np.eye(n)[list(pair)].mean(axis=0))
        edges = np.full((g - 1, g), 0.32 / cells, np.float32)
        labels = gridcut.swap(*gridcut.scale_floats(unary, distance, edges, edges.T))
        mask[o] = np.array(rows, np.float32)[labels]
        if o < n - 1:
            continue
        counts = mask.sum((1, 2))
        seams = sum((np.diff(mask, axis=axis) ** 2).sum() for axis in (1, 2))
        value = (cost * mask).sum() + 0.16 / cells * seams + ((counts.sum(0) ** 2).sum() - (counts**2).sum()) / cells
        if index == 2:
            for a, b in itertools.combinations(range(n), 2):
                used = np.flatnonzero(counts[a])
                if len(used) > 1 and np.array_equal(used, np.flatnonzero(counts[b])):
                    extra[a, used[0]] = extra[b, used[1]] = 1
        if abs(before - value) < 1e-6 * abs(before):
            break
        before = value
    return mask


@pytest.mark.parametrize(("n", "blocks"), [(2, 4), (3, 4), (5, 2), (7, 4), (12, 4), (20, 4), (6, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_plain_loop_over_all_labels(n: int, blocks: int, seed: int) -> None:
    saliency = maps(n, 16, 24, seed=seed)
    arguments = draws_for(saliency, blocks, seed)
    assert np.array_equal(assign(saliency, **arguments).numpy(), plain_assign(saliency, **arguments))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 8), st.integers(1, 4), st.sampled_from([5, 50, 500]))
def test_labels_out_of_reach_change_nothing(seed: int, count: int, side: int, spread: int) -> None:
    rng = np.random.default_rng(seed)
    weight, scale = 3, 2
    # a level per label and noise: some labels beat others everywhere
    unary = rng.integers(0, spread, count) + rng.integers(0, 20, (side, side, count))
    distance = scale * (1 - np.eye(count, dtype=int))
    if count > 3:
        distance[-1, :2] = distance[:2, -1] = 1
    down, across = np.full((side - 1, side), weight), np.full((side, side - 1), weight)
    # four edges a cell: at least what there are
    beats = (unary[..., None, :] > (unary + 4 * weight * scale)[..., None]).all((0, 1))[None]
    keep = assignment._reachable(assignment._bits(beats)[0], assignment._bits(beats.transpose(0, 2, 1))[0])
    fewer = keep[gridcut.swap(unary[:, :, keep], distance[np.ix_(keep, keep)], down, across)]
    assert np.array_equal(fewer, gridcut.swap(unary, distance, down, across))


def test_labels_out_of_reach_are_found() -> None:
    # 2 beats all: it has all cells in the end. 3 and 4 beat 0, 1 and 2: from 4 neither 1 nor 2 can be entered
    for best, reachable in (([2], [2]), ([3, 4], [0, 3, 4])):
        beats = np.zeros((1, 5, 5), bool)
        beats[0, best] = ~np.isin(np.arange(5), best)
        wins, loses = assignment._bits(beats)[0], assignment._bits(beats.transpose(0, 2, 1))[0]
        assert assignment._reachable(wins, loses).tolist() == reachable
    assert assignment._reachable([0] * 70, [0] * 70).tolist() == list(range(70))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("threshold_type", ["hard", "soft"])
def test_solvers_agree(solver: str, threshold_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saliency = maps(3, 9, 16, 16, seed=3)
    arguments = draws_for(saliency, 4)
    expected = assign(saliency, **arguments, threshold_type=threshold_type)
    use_solver(monkeypatch, solver)
    assert torch.equal(assign(saliency, **arguments, threshold_type=threshold_type), expected)


@pytest.mark.parametrize(("height", "width", "blocks"), [(32, 32, 4), (24, 40, 4), (6, 4, 2), (5, 7, 1)])
@pytest.mark.parametrize("n", [1, 2, 3, 11])
def test_mixed_images_and_targets_follow_the_shares(n: int, height: int, width: int, blocks: int) -> None:
    saliency, images = maps(n, height, width), torch.randn(n, 3, height, width)
    targets = torch.softmax(torch.randn(n, 4), 1)
    arguments = draws_for(saliency, blocks)
    copies = copy.deepcopy((images, targets, saliency, arguments))
    shares = assign(saliency, **arguments)
    mixed, mixed_targets = co_mix(images, targets, saliency, **arguments)
    for after, before in zip((images, targets, saliency), copies, strict=False):
        assert torch.equal(after, before)
    for key, value in arguments.items():
        assert np.array_equal(value, copies[3][key])

    assert shares.shape == (n, blocks, blocks, n)
    assert set(shares.unique().tolist()) <= {0.0, 0.5, 1.0}
    assert torch.equal(shares.sum(-1), torch.ones(n, blocks, blocks))
    expected = torch.einsum("oyxi,icyx->ocyx", expand(shares, height, width), images)
    torch.testing.assert_close(mixed, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mixed_targets, shares.mean((1, 2)) @ targets, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mixed_targets.sum(1), torch.ones(n))
    if n == 1:
        assert torch.equal(mixed, images)
        torch.testing.assert_close(mixed_targets, targets, atol=1e-7, rtol=1e-6)


def test_soft_labels_are_used(cases: list[dict[str, Any]]) -> None:
    halves = cases[0]["assignment"] == 0.5
    assert halves.any()
    assert set(halves.sum(-1).ravel()) == {0, 2}


@pytest.mark.parametrize("threshold_type", ["hard", "soft"])
def test_parts_do_not_see_each_other(threshold_type: str) -> None:
    saliency = maps(4, 10, 16, 16)
    arguments = draws_for(saliency, 4)
    images, targets = torch.randn(4, 10, 3, 16, 16), torch.eye(10).repeat(4, 1, 1)
    together = co_mix(images, targets, saliency, **arguments, threshold_type=threshold_type)
    for part in range(4):
        own = {key: value if key == "num_blocks" else value[part] for key, value in arguments.items()}
        alone = co_mix(images[part], targets[part], saliency[part], **own, threshold_type=threshold_type)
        assert torch.equal(together[0][part], alone[0])
        assert torch.equal(together[1][part], alone[1])


def test_the_same_image_over_and_over_is_told_apart() -> None:
    """Where outputs use one set of images, the last round gives them extra costs."""
    counts = np.array([[8, 8, 0, 0], [8, 8, 0, 0], [0, 0, 16, 0], [0, 0, 16, 0], [4, 12, 0, 0]], np.float32)
    extra = assignment._resolve(counts)
    assert extra.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]


def test_topk_of_rows_breaks_ties_as_of_single_vectors() -> None:
    rng = np.random.default_rng(0)
    for n in (3, 4, 17, 20, 40, 300):
        counts = rng.integers(0, 3, (50, n)).astype(np.float32) / 2
        together = torch.topk(torch.from_numpy(counts), 3).indices
        assert together.tolist() == [torch.topk(torch.from_numpy(row), 3).indices.tolist() for row in counts]


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), float("inf")])
def test_flat_or_broken_saliency(value: float) -> None:
    saliency = torch.full((6, 16, 16), value)
    arguments = draws_for(saliency, 4)
    # all peaks coincide
    torch.testing.assert_close(arguments["compatibility"], 0.999 * torch.eye(6))
    mixed, targets = co_mix(torch.randn(6, 3, 16, 16), torch.eye(6), saliency, **arguments)
    assert mixed.isfinite().all()
    torch.testing.assert_close(targets.sum(1), torch.ones(6))


def test_one_map_without_saliency_is_constant() -> None:
    saliency = maps(4, 8, 8)
    arguments = draws_for(saliency, 2)
    saliency[1], other = 0.0, saliency.clone()
    other[1] = 3.0
    assert torch.equal(assign(saliency, **arguments), assign(other, **arguments))


def test_gamma_spreads_inputs_and_prior_draws_to_them() -> None:
    saliency = maps(8, 16, 16)
    arguments = draws_for(saliency, 4)
    arguments["prior"] = np.array([0.93] + [0.01] * 7)
    greedy = assign(saliency, **arguments, gamma=0.0, eta=50.0).sum((0, 1, 2))
    spread = assign(saliency, **arguments, gamma=1.0).sum((0, 1, 2))
    assert greedy[0] > 0.9 * greedy.sum()
    assert spread.max() < 0.5 * spread.sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": 3}, "num_blocks 3 does not divide"),
        ({"num_blocks": 0}, "num_blocks 0"),
        ({"prior": np.ones(5)}, "prior must be"),
        ({"initial_labels": np.full((4, 4, 4), 4)}, "must lie in 0 … 3"),
        ({"initial_labels": np.zeros((4, 2, 2), int)}, "initial_labels must be"),
        ({"compatibility": torch.eye(3)}, "compatibility must be"),
        ({"threshold_type": "firm"}, "'firm'"),
        ({"beta": -0.1}, "beta -0.1 is out of range: must be at least 0"),
        ({"iterations": 0}, "iterations 0"),
    ],
)
def test_wrong_values(change: dict[str, Any], message: str) -> None:
    saliency = maps(4, 16, 16)
    with pytest.raises(ValueError, match=message):
        assign(saliency, **{**draws_for(saliency, 4), **change})


def test_a_setting_that_does_not_exist() -> None:
    saliency = maps(4, 16, 16)
    with pytest.raises(TypeError, match="tresh"):
        assign(saliency, **draws_for(saliency, 4), treshold=0.5)


def test_wrong_shapes() -> None:
    saliency = maps(4, 16, 16)
    arguments = draws_for(saliency, 4)
    with pytest.raises(ValueError, match="do not go with saliency"):
        co_mix(torch.zeros(4, 3, 16, 15), torch.eye(4), saliency, **arguments)
    with pytest.raises(ValueError, match="do not go with images"):
        co_mix(torch.zeros(4, 3, 16, 16), torch.eye(5), saliency, **arguments)
    with pytest.raises(ValueError, match=r"\(16, 16\)"):
        compatibility(saliency[0], 0.001)


# the method


class Tiny(nn.Module):
    """A layer with batch norm; it keeps the mode of its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 10)
        self.modes: list[tuple[bool, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append((self.training, len(x)))
        return self.head(self.body(x).mean((2, 3)))


def setting(size: int, height: int = 16, width: int = 16, **changes: Any) -> tuple[CoMixup, Tiny, Tensor, Tensor, Any]:
    torch.manual_seed(0)
    method = build_method("comix", "cifar10", 10, **changes)
    assert isinstance(method, CoMixup)
    draws = method.draw(np.random.default_rng(0), size, height, width)
    return method, Tiny(), torch.randn(size, 3, height, width), torch.arange(size) % 10, draws


def test_presets() -> None:
    method = build_method("comix", "tiny-imagenet-200", 200)
    assert isinstance(method, CoMixup)
    assert (method.mixup_alpha, method.clean_lam, method.m_part, method.m_thres_type) == (2.0, 1.0, 20, "hard")
    assert CoMixup(10).mixup_alpha == 2.0


@pytest.mark.parametrize(
    "change",
    [{"mixup_alpha": 0}, {"m_part": 0}, {"m_niter": 0}, {"m_block_num": 0}, {"m_thres_type": "x"}, {"m_beta": -1}],
)
def test_wrong_settings(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        CoMixup(10, **change)


@pytest.mark.parametrize("size", [1, 2, 20, 25, 41])
def test_draws(size: int) -> None:
    draws = setting(size)[4]
    assert draws.prior.shape == (size,)
    assert draws.initial_labels.shape == (size, 4, 4)
    for start in range(0, size, 20):
        part = slice(start, min(start + 20, size))
        assert draws.prior[part].sum() == pytest.approx(1)
        assert draws.initial_labels[part].max() < part.stop - start


def test_random_blocks_divide_the_image() -> None:
    method = CoMixup(10, m_block_num=-1)
    rng = np.random.default_rng(0)
    assert {method.draw(rng, 3, 24, 40).num_blocks for _ in range(60)} == {2, 4, 8}
    with pytest.raises(ValueError, match="15×15"):
        method.draw(rng, 3, 15, 15)


@pytest.mark.parametrize("size", [1, 2, 20, 25, 41])
def test_step_is_co_mix_part_by_part(size: int) -> None:
    method, model, images, labels, draws = setting(size)
    twin, before = copy.deepcopy(model), images.clone()
    step = method.step(model, images, labels, draws)
    assert torch.equal(images, before)
    assert model.modes == [(True, size), (True, size)]

    # the clean pass: its loss, and the saliency
    pixels = images.clone().requires_grad_()
    clean_loss = 2 / 10 * F.cross_entropy(twin(pixels), labels)
    clean_loss.backward()
    torch.testing.assert_close(step.mixed.clean_loss, clean_loss.detach())
    saliency = pixels.grad.square().mean(1).sqrt()
    assert step.mixed.saliency is not None
    torch.testing.assert_close(step.mixed.saliency[0], saliency)

    for start in range(0, size, 20):
        part = slice(start, start + 20)
        arguments = {
            "prior": draws.prior[part],
            "initial_labels": draws.initial_labels[part],
            "compatibility": compatibility(saliency[part], 0.001),
        }
        mixed, targets = co_mix(images[part], one_hot(labels, 10)[part], saliency[part], **arguments)
        assert torch.equal(step.mixed.images[part], mixed)
        torch.testing.assert_close(step.mixed.targets[part], targets)
        own = assign(saliency[part], **arguments).diagonal(dim1=0, dim2=3).permute(2, 0, 1)
        assert torch.equal(step.mixed.mask[part, ::4, ::4], own)
    mixed_loss = bce_loss(twin(step.mixed.images), step.mixed.targets)
    mixed_loss.backward()
    torch.testing.assert_close(step.loss, (mixed_loss + clean_loss).detach())
    assert all(parameter.grad is None for parameter in model.parameters())
    step.loss.backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_only_the_end_of_the_batch_is_mixed() -> None:
    method, model, images, labels, draws = setting(10, prob_mix=0.5, m_part=3)
    step = method.step(model, images, labels, draws)
    assert model.modes == [(True, 5), (True, 10)]
    assert torch.equal(step.mixed.images[:5], images[:5])
    assert torch.equal(step.mixed.targets[:5], one_hot(labels, 10)[:5])
    assert not torch.equal(step.mixed.images[5:], images[5:])
    # parts of 3 and 2 images
    assert step.mixed.targets[5:8, labels[8:]].sum() == 0
    assert step.mixed.targets[8:, labels[5:8]].sum() == 0
    torch.testing.assert_close(step.mixed.targets.sum(1), torch.ones(10))
    assert torch.equal(step.mixed.mask[:5], torch.ones(5, 16, 16))
