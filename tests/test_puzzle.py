"""Puzzle Mix: golden vectors, brute force, and whole steps."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mixup import build_method
from mixup.base import bce_loss, one_hot
from mixup.gridcut import swap
from mixup.puzzle import PuzzleMix, block_mask, block_sizes, puzzle_mix
from mixup.transport import move_blocks, transport_plan

from .common import MEAN, STD, golden, normalise

NAMES = ("n_labels", "neigh_size", "transport", "t_eps", "t_size")


@pytest.fixture(scope="module")
def vectors():
    return golden("puzzle.npz")


def case(vectors, number):
    return SimpleNamespace(**{key[2:]: value for key, value in vectors.items() if key.startswith(f"{number}/")})


def inputs(c):
    settings = {name: getattr(c, name).item() for name in NAMES}
    saliency, permutation = torch.from_numpy(c.saliency), torch.from_numpy(c.permutation)
    return (normalise(c.images_u8), saliency, permutation, c.lam.item(), c.num_blocks.item(), MEAN, STD), settings


@pytest.mark.parametrize("number", range(8))
def test_golden(vectors, number):
    c = case(vectors, number)
    args, settings = inputs(c)
    mask = block_mask(*args, **settings)
    assert torch.equal(mask, torch.from_numpy(c.mask))
    mixed, ratio = puzzle_mix(*args, **settings)
    torch.testing.assert_close(mixed, torch.from_numpy(c.mixed), atol=1e-5, rtol=0)
    torch.testing.assert_close(ratio, torch.from_numpy(c.ratio), atol=1e-5, rtol=0)
    if c.transport:
        size = block_sizes(32, 32, args[4], settings["neigh_size"], settings["t_size"]).moved[0]
        grid = F.interpolate(mask[:, None], size=(32 // size, 32 // size))[:, 0]
        unary = F.avg_pool2d(args[1][:, None], size)[:, 0]
        unary = unary / unary.sum(dim=(1, 2), keepdim=True)
        first = transport_plan(grid, unary, settings["t_eps"])
        second = transport_plan(1 - grid, unary[args[2]], settings["t_eps"])
        assert torch.equal(first, torch.from_numpy(c.plan1).long())
        assert torch.equal(second, torch.from_numpy(c.plan2).long())


# Transport


def brute_transport(mask, unary, t_eps):
    """The rounds of the text, one image and block at a time."""
    plans = []
    rows, columns = mask.shape[1:]
    side, count = max(rows, columns), rows * columns
    for shown, salient in zip(mask.flatten(1), unary.flatten(1), strict=True):
        cost = torch.empty(count, count)
        for i in range(count):
            for j in range(count):
                squared = (i // columns - j // columns) ** 2 + (i % columns - j % columns) ** 2
                cost[i, j] = t_eps * torch.tensor(float(squared)) / max(side - 1, 1) ** 2 - salient[i] * (shown[j] > 0)
        for _ in range(side):
            choice = [int(np.argmin(cost[i].numpy())) for i in range(count)]
            plan = [-1] * count
            for j in range(count):
                paid = [cost[i, j].item() if choice[i] == j else 0.0 for i in range(count)]
                winner = paid.index(min(paid))
                if choice[winner] == j:
                    plan[winner] = j
            for i in range(count):
                if plan[i] < 0:
                    cost[i, choice[i]] += 1
        plans.append(plan)
    return torch.tensor(plans)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 2), (3, 2), (2, 5), (4, 4)])
@pytest.mark.parametrize("t_eps", [0.0, 0.05, 0.5, 0.8, 5.0])
def test_transport_is_that_of_brute_force(shape, t_eps):
    """Random, tied (multiples of 1/8) and one-block saliency; masks from empty to full."""
    rng = torch.Generator().manual_seed(int(10 * t_eps) + shape[0])
    mask = (torch.rand(24, *shape, generator=rng) < torch.linspace(0, 1, 24)[:, None, None]).float()
    unary = torch.rand(24, *shape, generator=rng) ** 3
    unary[8:16] = torch.randint(0, 8, (8, *shape), generator=rng) / 8
    unary[16:] = 0
    unary.flatten(1)[torch.arange(16, 24), torch.randint(0, unary[0].numel(), (8,), generator=rng)] = 1
    assert torch.equal(transport_plan(mask, unary, t_eps), brute_transport(mask, unary, t_eps))


def test_a_salient_block_moves_to_where_the_image_shows():
    mask, unary = torch.tensor([[[0.0, 0.5]]]), torch.tensor([[[0.9, 0.1]]])
    assert transport_plan(mask, unary, 0.05).tolist() == [[1, -1]]
    assert transport_plan(mask, unary, 0.85).tolist() == [[0, 1]]  # the other wins; what stays is not shown


def test_transport_where_block_0_gives_up():
    """Its choices then decide who wins for nothing, so those images are played in full."""
    mask = torch.tensor([[[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]]).repeat(60, 1, 1)
    unary = torch.rand(60, 3, 3, generator=torch.Generator().manual_seed(0))
    unary[:, 0, 0] *= 0.1
    plan = transport_plan(mask, unary / 4, 0.25)
    assert (plan[:, 0] != 0).float().mean() > 0.5
    assert torch.equal(plan, brute_transport(mask, unary / 4, 0.25))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 6), st.integers(1, 6), st.sampled_from([0.0, 0.1, 0.8]))
def test_no_two_blocks_share_a_destination(seed, rows, columns, t_eps):
    rng = torch.Generator().manual_seed(seed)
    mask, unary = torch.rand(2, 5, rows, columns, generator=rng)
    plan = transport_plan(mask.round(), unary, t_eps)
    for row in plan:
        kept = row[row >= 0]
        assert kept.unique().numel() == kept.numel()
        assert (kept < rows * columns).all()


def test_blocks_move_where_the_plan_says():
    images = torch.randn(3, 2, 4, 9)
    plan = torch.tensor([[0, 1, 2, 3, 4, 5], [5, -1, 0, -1, -1, 1], [-1] * 6])
    moved = move_blocks(images, plan, (2, 3))
    expected = torch.zeros_like(images)
    for b, destinations in enumerate(plan.tolist()):
        for i, j in enumerate(destinations):
            if j >= 0:
                (y, x), (v, u) = divmod(i, 3), divmod(j, 3)
                expected[b, :, 2 * v : 2 * v + 2, 3 * u : 3 * u + 3] = images[
                    b, :, 2 * y : 2 * y + 2, 3 * x : 3 * x + 3
                ]
    assert torch.equal(moved, expected)


# The mask


def brute_energies(images, saliency, partner, lam, n, mean, std, n_labels, beta, gamma, eta, neigh_size, index):
    """Costs [n, n, L] and edge weights of one pair, in loops and double precision."""
    height, width = saliency.shape[1:]
    bh, bw = height // n, width // n
    mh, mw = min(neigh_size, bh), min(neigh_size, bw)
    a, b = (x.double() * std[:, None, None] + mean[:, None, None] for x in (images[index], images[partner]))
    pa, pb = (F.avg_pool2d(x, (mh, mw)) for x in (a, b))
    kh, kw = bh // mh, bw // mw
    beta = beta / n / 16

    def share(s):
        pooled = torch.stack(
            [s[y * bh : (y + 1) * bh, x * bw : (x + 1) * bw].mean() for y in range(n) for x in range(n)]
        )
        return (pooled / pooled.sum()).reshape(n, n)

    def vertical(p, q, y, x):
        columns = range(x * kw, (x + 1) * kw)
        steps = [(p[:, (y + 1) * kh - 1, c] - q[:, (y + 1) * kh, c]).abs().mean() for c in columns]
        return beta * gamma * sum(steps) / len(steps)

    def horizontal(p, q, y, x):
        rows = range(y * kh, (y + 1) * kh)
        steps = [(p[:, r, (x + 1) * kw - 1] - q[:, r, (x + 1) * kw]).abs().mean() for r in rows]
        return beta * gamma * sum(steps) / len(steps)

    u_a, u_b = share(saliency[index].double()), share(saliency[partner].double())
    weights = []
    for distance, (down, right) in ((vertical, (1, 0)), (horizontal, (0, 1))):
        weight = torch.zeros(n - down, n - right, dtype=torch.float64)
        for y in range(n - down):
            for x in range(n - right):
                bb, ba, ab, aa = (distance(p, q, y, x) for p, q in ((pb, pb), (pb, pa), (pa, pb), (pa, pa)))
                u_b[y, x] += (ab + aa) / 2
                u_a[y, x] += (ba + bb) / 2
                u_b[y + down, x + right] += (ba + aa) / 2
                u_a[y + down, x + right] += (ab + bb) / 2
                weight[y, x] = (ab + ba - aa - bb) / 2 + beta
        weights.append(weight * 1000 * n**2)
    costs = []
    for label in range(n_labels):
        tau, last = label / (n_labels - 1), n_labels - 1
        probability = math.comb(last, label) * lam ** (last - label) * (1 - lam) ** label
        costs.append((1 - tau) * u_b + tau * u_a - eta / n**2 * math.log(probability + 1e-8))
    return torch.stack(costs, dim=-1) * 1000 * n**2, *weights


@pytest.mark.parametrize(
    ("height", "width", "n", "neigh_size", "n_labels"),
    [(16, 16, 2, 4, 3), (16, 16, 4, 2, 4), (16, 24, 4, 2, 2), (24, 6, 2, 4, 4), (12, 20, 4, 8, 5), (8, 8, 1, 4, 3)],
)
def test_mask_minimises_the_energy_of_the_text(monkeypatch, height, width, n, neigh_size, n_labels):
    """The energies that reach the solver, against loops in double precision; other label counts, not only squares."""
    rng = torch.Generator().manual_seed(height)
    images = (torch.rand(3, 3, height, width, generator=rng) - MEAN[:, None, None]) / STD[:, None, None]
    saliency, permutation = torch.rand(3, height, width, generator=rng) ** 2, torch.tensor([2, 0, 1])
    seen = []

    def record(*terms):
        seen.extend(terms)
        return swap(*terms)

    monkeypatch.setattr("mixup.puzzle.swap", record)
    options = {"n_labels": n_labels, "neigh_size": neigh_size, "beta": 1.3, "gamma": 0.6, "eta": 0.3}
    mask = block_mask(images, saliency, permutation, 0.3, n, MEAN, STD, transport=False, **options)
    assert mask.shape == (3, n, n)
    torch.testing.assert_close(mask * (n_labels - 1), (mask * (n_labels - 1)).round())
    costs, distance, vertical, horizontal = seen
    steps = np.arange(n_labels)
    np.testing.assert_array_equal(distance, (steps[:, None] - steps) ** 2)
    for index, partner in enumerate(permutation):
        expected = brute_energies(
            images, saliency, partner, 0.3, n, MEAN.double(), STD.double(), index=index, **options
        )
        found = costs[index] / (n_labels - 1) ** 2, vertical[index], horizontal[index]
        for x, y in zip(found, expected, strict=True):
            assert x.shape == y.shape
            # truncation takes less than 1, float32 adds a little
            assert ((y - torch.from_numpy(x)) > -0.1).all()
            assert ((y - torch.from_numpy(x)) < 1.1).all()


def test_large_lambda_shows_image_a_and_small_image_b():
    images, saliency = torch.randn(4, 3, 16, 16), torch.ones(4, 16, 16)
    for lam, weight in ((1.0, 1.0), (0.0, 0.0)):
        _, ratio = puzzle_mix(images, saliency, torch.tensor([1, 0, 3, 2]), lam, 4, MEAN, STD, eta=5.0)
        assert torch.equal(ratio, torch.full((4,), weight))


def test_a_salient_block_is_shown():
    saliency = torch.full((2, 32, 32), 1e-3)
    saliency[0, :8, :8], saliency[1, 24:, 24:] = 1, 1
    mask = block_mask(torch.zeros(2, 3, 32, 32), saliency, torch.tensor([1, 0]), 0.5, 4, MEAN, STD)
    assert (mask[0, 0, 0], mask[0, 3, 3]) == (1, 0)
    assert (mask[1, 0, 0], mask[1, 3, 3]) == (0, 1)


def peak(height, width):
    saliency = torch.zeros(3, height, width)
    saliency[:, 5, 2] = 1
    return saliency


@pytest.mark.parametrize(
    "saliency", [torch.zeros(3, 32, 32), torch.ones(3, 32, 32), peak(32, 32), peak(32, 32) * 1e-44]
)
@pytest.mark.parametrize("n", [2, 16])
@pytest.mark.parametrize("lam", [0.0, 1e-7, 0.5, 1.0])
def test_degenerate_saliency(saliency, n, lam):
    """Zero, constant, one pixel (at n = 16 beyond 32 bits in the published code), and vanishing: always finite."""
    images = torch.ones(3, 3, 32, 32) * torch.tensor([-1.0, 0.0, 2.0])[:, None, None, None]
    mixed, ratio = puzzle_mix(images, saliency, torch.tensor([1, 2, 0]), lam, n, MEAN, STD)
    assert mixed.isfinite().all()
    assert ((ratio >= 0) & (ratio <= 1)).all()


def test_peaked_saliency_at_16_blocks_is_a_true_minimum():
    """Image a's peak must be shown whatever λ says of the rest: its cost does not wrap around."""
    images = torch.zeros(2, 3, 32, 32)
    saliency = torch.full((2, 32, 32), 1e-6)
    saliency[0, 10, 10] = saliency[1, 20, 20] = 1
    mask = block_mask(images, saliency, torch.tensor([1, 0]), 0.5, 16, MEAN, STD)
    assert (mask[0, 5, 5], mask[0, 10, 10]) == (1, 0)
    assert (mask[1, 5, 5], mask[1, 10, 10]) == (0, 1)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from([(1, 2, 2), (2, 4, 8), (4, 2, 4), (2, 8, 4), (3, 4, 4)]),
    st.sampled_from([2, 3, 4]),
    st.sampled_from([-1, 1, 2]),
    st.booleans(),
    st.floats(0, 1),
)
def test_ratio_and_inputs(seed, shape, n_labels, t_size, transport, lam):
    """Any size its blocks divide; pixels far outside of [0, 1] included."""
    batch, down, right = shape
    rng = torch.Generator().manual_seed(seed)
    images = 3 * torch.randn(batch, 3, 4 * down, 4 * right, generator=rng)
    saliency = torch.rand(batch, 4 * down, 4 * right, generator=rng)
    permutation = torch.randperm(batch, generator=rng)
    before = [x.clone() for x in (images, saliency, permutation)]
    options = {"n_labels": n_labels, "t_size": t_size, "transport": transport, "neigh_size": 2, "gamma": 2.0}
    mixed, ratio = puzzle_mix(images, saliency, permutation, lam, 2, MEAN, STD, **options)
    assert mixed.shape == images.shape
    assert mixed.isfinite().all()
    assert ((ratio >= 0) & (ratio <= 1)).all()
    mask = block_mask(images, saliency, permutation, lam, 2, MEAN, STD, **options)
    torch.testing.assert_close(ratio, mask.mean(dim=(1, 2)))
    for x, y in zip((images, saliency, permutation), before, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 32, 32)}, r"\(3, 32, 32\)"),
        ({"saliency": torch.ones(2, 32, 31)}, r"\(2, 32, 31\)"),
        ({"permutation": torch.tensor([0])}, r"\(1,\)"),
        ({"lam": 1.5}, "1.5"),
        ({"num_blocks": 3}, "3 does not divide"),
        ({"num_blocks": 0}, "0"),
        ({"neigh_size": 3}, "neigh_size 3"),
        ({"neigh_size": 0}, "neigh_size 0"),
        ({"t_size": 3}, "t_size 3"),
        ({"t_size": 0}, "t_size 0"),
        ({"n_labels": 1}, "1"),
        ({"gamma": -0.5}, "gamma -0.5 is out of range: must be at least 0"),
    ],
)
def test_bad_arguments(change, message):
    images, saliency, permutation = torch.zeros(2, 3, 32, 32), torch.ones(2, 32, 32), torch.tensor([1, 0])
    good = {"images": images, "saliency": saliency, "permutation": permutation, "lam": 0.5, "num_blocks": 4}
    good |= {"mean": MEAN, "std": STD}
    with pytest.raises(ValueError, match=message):
        puzzle_mix(**{**good, **change})


def test_a_setting_that_does_not_exist():
    arguments = torch.zeros(2, 3, 32, 32), torch.ones(2, 32, 32), torch.tensor([1, 0]), 0.5, 4, MEAN, STD
    with pytest.raises(TypeError, match="n_label"):
        puzzle_mix(*arguments, n_label=3)


def test_bad_transport():
    with pytest.raises(ValueError, match=r"\(1, 2, 3\)"):
        transport_plan(torch.zeros(1, 2, 2), torch.zeros(1, 2, 3), 0.8)


# The method


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean(dim=(2, 3)))


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return Small(), torch.randn(6, 3, 16, 16), torch.arange(6)


def puzzle(**settings):
    return PuzzleMix(num_classes=10, mean=MEAN, std=STD, **settings)


def test_presets():
    cifar, tiny = (build_method("puzzle", name, num_classes=10) for name in ("cifar100", "tiny-imagenet-200"))
    assert isinstance(cifar, PuzzleMix)
    common = {"mixup_alpha": 1, "n_labels": 3, "eta": 0.2, "beta": 1.2, "gamma": 0.5, "neigh_size": 4, "t_eps": 0.8}
    for method, t_size, clean_lam in ((cifar, 4, 0), (tiny, -1, 1)):
        expected = {**common, "transport": True, "t_size": t_size, "clean_lam": clean_lam, "adv_p": 0, "adv_eps": 10}
        assert {name: getattr(method, name) for name in expected} == expected
    assert build_method("puzzle", "cifar10", num_classes=10, t_size=-1).t_size == -1


def test_draw():
    method = puzzle(t_size=4)
    first, second = (method.draw(np.random.default_rng(3), 8, 32, 32) for _ in range(2))
    assert (first.lam, first.num_blocks) == (second.lam, second.num_blocks)
    assert sorted(first.permutation) == list(range(8))
    rng = np.random.default_rng(0)
    draws = [method.draw(rng, 4, 32, 32) for _ in range(400)]
    counts = np.unique([d.num_blocks for d in draws], return_counts=True)
    np.testing.assert_array_equal(counts[0], [2, 4, 8, 16])
    assert counts[1].min() > 60
    assert 0.4 < np.mean([d.lam for d in draws]) < 0.6
    assert {method.draw(rng, 4, 48, 32).num_blocks for _ in range(60)} == {2, 4, 16}  # 8: blocks of 6×4
    with pytest.raises(ValueError, match="31×32"):
        method.draw(rng, 4, 31, 32)
    assert len(puzzle(prob_mix=0.5).draw(rng, 7, 32, 32).permutation) == 3


@pytest.mark.parametrize("clean_lam", [0.0, 0.5])
def test_step(batch, clean_lam):
    model, images, labels = batch
    reference = Small()
    reference.load_state_dict(model.state_dict())
    before = images.clone()
    draws = SimpleNamespace(lam=0.4, permutation=np.array([1, 2, 3, 4, 5, 0]), num_blocks=4)
    step = puzzle(clean_lam=clean_lam, t_size=2).step(model, images, labels, draws)
    assert torch.equal(images, before)
    assert model.training

    reference.train(clean_lam > 0)
    pixels = images.clone().requires_grad_(True)
    loss = F.cross_entropy(reference(pixels), labels) * (2 * clean_lam / 10 if clean_lam else 1)
    loss.backward()
    saliency = pixels.grad.square().mean(dim=1).sqrt()
    permutation = torch.from_numpy(draws.permutation)
    mixed, ratio = puzzle_mix(images, saliency, permutation, 0.4, 4, MEAN, STD, t_size=2)
    targets = ratio[:, None] * one_hot(labels, 10) + (1 - ratio[:, None]) * one_hot(labels[permutation], 10)
    torch.testing.assert_close(step.mixed.images, mixed)
    torch.testing.assert_close(step.mixed.targets, targets)
    torch.testing.assert_close(step.mixed.saliency[1], saliency[permutation])
    torch.testing.assert_close(step.mixed.mask.mean(dim=(1, 2)), ratio)
    assert torch.equal(step.mixed.partner, images[permutation])
    reference.train()
    torch.testing.assert_close(step.mixed.clean_loss, (loss if clean_lam else 0 * loss).detach())
    if not clean_lam:
        reference.zero_grad()
    mixed_loss = bce_loss(reference(mixed), targets)
    mixed_loss.backward()
    torch.testing.assert_close(step.loss - step.mixed.clean_loss, mixed_loss.detach())
    assert all(parameter.grad is None for parameter in model.parameters())
    step.loss.backward()
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    for mine, other in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(mine, other)  # the pass in eval mode left no trace


@pytest.mark.parametrize("clean", [6, 5, 4, 2])
def test_part_of_a_batch(batch, clean):
    """The first images stay as they are; the rest is mixed as if it were alone."""
    model, images, labels = batch
    size = 6 - clean
    draws = SimpleNamespace(lam=0.4, permutation=np.arange(size)[::-1].copy(), num_blocks=2)
    method = puzzle(t_size=4, prob_mix=size / 6)
    step = method.step(model, images, labels, draws)
    assert step.loss.isfinite()
    torch.testing.assert_close(step.mixed.targets.sum(dim=1), torch.ones(6))
    assert torch.equal(step.mixed.images[:clean], images[:clean])
    assert torch.equal(step.mixed.targets[:clean], one_hot(labels[:clean], 10))
    if size:
        alone = puzzle(t_size=4).step(model, images[clean:], labels[clean:], draws)
        torch.testing.assert_close(step.mixed.images[clean:], alone.mixed.images)
        torch.testing.assert_close(step.mixed.targets[clean:], alone.mixed.targets)
        assert torch.equal(step.mixed.partner[:clean], images[:clean])
        assert (step.mixed.mask[:clean] == 1).all()


@pytest.mark.parametrize("perturbed", [(True, False), (False, True), (True, True), (False, False)])
def test_adversarial_perturbation(batch, perturbed):
    model, images, labels = batch
    images = ((images.sigmoid() - MEAN[:, None, None]) / STD[:, None, None]).float()
    rng = np.random.default_rng(0)
    permutation = np.array([1, 2, 3, 4, 5, 0])
    draws = SimpleNamespace(lam=0.5, permutation=permutation, num_blocks=2, perturbed=perturbed, strength=0.5)
    draws.noise = rng.uniform(-1, 1, images.shape).astype(np.float32)
    reference = Small()
    reference.load_state_dict(model.state_dict())
    step = puzzle(adv_p=0.5, transport=False).step(model, images, labels, draws)

    reference.eval()
    std = STD[:, None, None]
    noise = torch.from_numpy(draws.noise) * 10 / 255
    noise = (images * std + MEAN[:, None, None] + noise).clamp(0, 1) - (images * std + MEAN[:, None, None])
    probe = (images + noise / std if any(perturbed) else images).requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(reference(probe), labels), probe)
    noise = 0.5 * (noise + 12 / 255 * gradient.sign()).clamp(-10 / 255, 10 / 255)
    mean = MEAN[:, None, None]
    attacked = ((images * std + mean + noise).clamp(0, 1) - mean) / std
    a = attacked if perturbed[0] else images
    b = (attacked if perturbed[1] else images)[permutation]
    pixels = step.mixed.images * std + mean
    assert pixels.min() > -1e-6
    assert pixels.max() < 1 + 1e-6
    weight = step.mixed.mask[:, None]
    torch.testing.assert_close(step.mixed.images, weight * a + (1 - weight) * b)
    torch.testing.assert_close(step.mixed.saliency[0], gradient.square().mean(dim=1).sqrt())


def test_adversarial_draws():
    rng = np.random.default_rng(0)
    draws = [puzzle(adv_p=0.25).draw(rng, 2, 8, 16) for _ in range(300)]
    share = np.mean([d.perturbed for d in draws], axis=0)
    assert (abs(share - 0.25) < 0.08).all()
    for d in draws:
        if any(d.perturbed):
            assert d.noise.shape == (2, 3, 8, 16)
            assert d.noise.dtype == np.float32
            assert -1 <= d.noise.min() < -0.5 < 0.5 < d.noise.max() <= 1
            assert 0 <= d.strength <= 1
    assert puzzle().draw(rng, 2, 8, 8).noise is None


@pytest.mark.parametrize(
    "setting",
    [
        {"n_labels": 1},
        {"beta": -1},
        {"eta": math.nan},
        {"adv_p": 1.5},
        {"neigh_size": 0},
        {"t_size": 0},
        {"std": [1, 1]},
    ],
)
def test_bad_settings(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        PuzzleMix(num_classes=10, **{"mean": MEAN, "std": STD, **setting})
