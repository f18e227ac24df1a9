"""SAGE: golden vectors, brute force over every offset, degenerate saliency, and what a step leaves behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur as torchvision_blur

from mixup import build_method
from mixup.base import bce_loss, one_hot
from mixup.sage import Sage, SageDraws, best_offsets, blend, gaussian_blur
from mixup.search import LEADERS, SHORT_LIST, _list_scores, approximate_scores, exact_scores
from models import build_model
from tests.common import golden, load_fixed_weights, normalise


def every_offset(height: int, width: int) -> Tensor:
    return torch.tensor([(dy, dx) for dy in range(1 - height, height) for dx in range(1 - width, width)])


def moved(image: Tensor, dy: int, dx: int) -> Tensor:
    """[…, H, W] with its content moved down by dy and right by dx, zeros entering."""
    height, width = image.shape[-2:]
    padded = F.pad(image, (width, width, height, height))
    return padded[..., height - dy : 2 * height - dy, width - dx : 2 * width - dx]


def true_scores(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """[B, K] in float64, straight from the definition."""
    a, b = a.double(), b.double()
    columns = []
    for dy, dx in offsets.tolist():
        other = moved(b, dy, dx)
        columns.append(((a**2 + other**2) / (a + other).clamp(min=1e-300)).sum(dim=(1, 2)))
    return torch.stack(columns, dim=1)


def shares(maps_a: Tensor, maps_b: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    a, b = (maps / maps.sum(dim=(1, 2), keepdim=True) for maps in (maps_a, maps_b))
    return max(lam, 1e-12) * a, max(1 - lam, 1e-12) * b


def smooth_maps(batch: int, height: int, width: int, seed: int, peaked: float = 1.0) -> Tensor:
    """Blurred random maps with a few blobs, like input gradients of a trained network."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch, height, width, generator=generator) ** 2
    y, x = torch.arange(height)[:, None], torch.arange(width)
    for _ in range(3):
        cy = torch.rand(batch, 1, 1, generator=generator) * height
        cx = torch.rand(batch, 1, 1, generator=generator) * width
        noise = noise + torch.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (0.04 * height * width))
    if min(height, width) > 2:
        noise = gaussian_blur(noise, 5, 1.0)
    return noise**peaked


def assert_best(a: Tensor, b: Tensor, chosen: Tensor, candidates: Tensor | None = None, within: float = 1e-6) -> None:
    """The chosen offsets' true scores are the best ones, within a share of those."""
    offsets = every_offset(*a.shape[1:]) if candidates is None else candidates
    scores = true_scores(a, b, offsets)
    index = (chosen[:, None] == offsets).all(dim=2).int().argmax(dim=1)
    assert torch.equal(offsets[index], chosen)
    reached = scores.gather(1, index[:, None])[:, 0]
    assert (reached >= scores.amax(dim=1) * (1 - within)).all(), (scores.amax(dim=1) - reached).max()


# --- golden vectors ------------------------------------------------------------------------------------------------


def golden_case(i: int) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
    case = golden(f"sage_{i}.npz")
    permutation = torch.from_numpy(case["permutation"])
    blurred = torch.from_numpy(case["saliency_blurred"])
    a, b = shares(blurred, blurred[permutation], float(case["lam"]))
    return case, permutation, a, b


@pytest.mark.parametrize("i", range(3))
def test_golden_search_and_blend(i: int) -> None:
    case, permutation, a, b = golden_case(i)
    raw = torch.from_numpy(case["saliency_raw"])
    np.testing.assert_allclose(gaussian_blur(raw, 5, 1.0), case["saliency_blurred"], atol=1e-8, rtol=1e-5)
    offsets = best_offsets(a, b, case.get("candidates"))
    assert offsets.dtype == torch.int64
    np.testing.assert_array_equal(offsets, case["offsets"])
    images = normalise(case["images_u8"])
    mixed, ratio = blend(images, images[permutation], a, b, offsets)
    np.testing.assert_allclose(mixed, case["mixed"], atol=1e-5)
    np.testing.assert_allclose(ratio, case["ratio"], atol=1e-5)


@pytest.mark.parametrize("i", range(3))
def test_golden_objective(i: int) -> None:
    case, _, a, b = golden_case(i)
    candidates = torch.from_numpy(case["candidates"]) if "candidates" in case else every_offset(32, 32)
    objective = case["objective"].reshape(len(a), -1)
    np.testing.assert_allclose(_list_scores(a, b, candidates.tolist()), objective, atol=1e-5)
    np.testing.assert_allclose(exact_scores(a, b, candidates.expand(len(a), -1, -1)), objective, atol=1e-5)


def run_golden_step(name: str) -> tuple[dict[str, Any], nn.Module, list[SimpleNamespace]]:
    case = golden(name)
    model = load_fixed_weights(build_model(str(case["arch"]), int(case["num_classes"])))
    rates = {"momentum": float(case["momentum"]), "weight_decay": float(case["weight_decay"]), "nesterov": True}
    optimiser = torch.optim.SGD(model.parameters(), float(case["lr"]), **rates)  # type: ignore[arg-type]
    ratio = float(case["update_ratio"])
    method = Sage(int(case["num_classes"]), update_ratio=ratio, eval_mode=bool(case["eval_mode"]))
    steps = []
    for s in range(2):
        draws = SimpleNamespace(
            lam=case["lam"], permutation=case[f"permutation_{s}"], candidates=case[f"candidates_{s}"]
        )
        optimiser.zero_grad()
        step = method.step(model, normalise(case[f"images_u8_{s}"]), torch.from_numpy(case[f"labels_{s}"]), draws)
        step.loss.backward()
        optimiser.step()
        assert step.mixed.mask is not None
        loss = (step.loss - step.mixed.clean_loss).item() / ratio
        steps.append(SimpleNamespace(loss=loss, ratio=step.mixed.mask.mean(dim=(1, 2)), step=step))
    return case, model, steps


@pytest.mark.parametrize(
    ("name", "loss_tolerance", "ratio_tolerance", "after", "after_convolution"),
    [
        ("step_sage_a.npz", (1e-3, 2e-2), (2e-4, 5e-3), 2e-3, 2e-3),
        ("step_sage_b.npz", (1e-4, 1e-4), (1e-5, 2e-4), 5e-5, 3e-6),
    ],
)
def test_golden_steps(
    name: str,
    loss_tolerance: tuple[float, float],
    ratio_tolerance: tuple[float, float],
    after: float,
    after_convolution: float,
) -> None:
    case, model, steps = run_golden_step(name)
    for s, got in enumerate(steps):
        np.testing.assert_allclose(got.loss, case[f"loss_mixed_{s}"], rtol=loss_tolerance[s])
        np.testing.assert_allclose(got.ratio, case[f"ratio_{s}"], atol=ratio_tolerance[s])
        np.testing.assert_allclose(got.step.mixed.targets, case[f"targets_{s}"], atol=ratio_tolerance[s])
    for entry, value in model.state_dict().items():
        total, magnitude = case[f"after/{entry}"]
        tolerance = after_convolution if value.ndim == 4 else after
        value = value.double()
        assert abs(value.sum().item() - total) <= tolerance * magnitude + 1e-12, entry
        assert abs(value.abs().sum().item() - magnitude) <= tolerance * magnitude + 1e-12, entry


# --- the search ----------------------------------------------------------------------------------------------------

SIZES = [(8, 8), (7, 12), (13, 5), (1, 9), (9, 1), (1, 1), (2, 3), (16, 16)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("lam", [0.05, 0.4, 0.9])
def test_every_offset_against_brute_force(height: int, width: int, lam: float) -> None:
    maps = smooth_maps(6, height, width, seed=height * 100 + width, peaked=2.0)
    a, b = shares(maps, maps.roll(1, dims=0), lam)
    assert_best(a, b, best_offsets(a, b))


@pytest.mark.parametrize("peaked", [1.0, 4.0])
def test_approximate_scores_are_close(peaked: float) -> None:
    maps = smooth_maps(8, 20, 15, seed=3, peaked=peaked)
    a, b = shares(maps, maps.flip(0), 0.35)
    np.testing.assert_allclose(approximate_scores(a, b), true_scores(a, b, every_offset(20, 15)), atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    lam=st.sampled_from([1e-12, 1e-6, 0.01, 0.3, 0.5, 0.8, 1 - 1e-6, 1.0]),
    power=st.sampled_from([0.5, 1, 3, 10]),
    zeros=st.sampled_from([0.0, 0.5, 0.9]),
    seed=st.integers(0, 10**6),
)
def test_any_saliency_against_brute_force(
    height: int, width: int, lam: float, power: float, zeros: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    maps = rng.random((4, height, width)) ** power * (rng.random((4, height, width)) >= zeros)
    maps[:, rng.integers(height), rng.integers(width)] += 1e-3
    a, b = shares(*torch.from_numpy(maps).float().split(2), lam)
    assert_best(a, b, best_offsets(a, b))
    offsets = every_offset(height, width)
    candidates = offsets[torch.from_numpy(rng.permutation(len(offsets))[: rng.integers(1, len(offsets) + 1)])]
    assert_best(a, b, best_offsets(a, b, candidates), candidates)


def one_pixel(y: int, x: int) -> Tensor:
    maps = torch.zeros(1, 12, 10)
    maps[:, y, x] = 1
    return maps


@pytest.mark.parametrize("lam", [1e-12, 0.02, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(
    ("maps_a", "maps_b"),
    [
        (one_pixel(3, 4), one_pixel(5, 5)),
        (one_pixel(0, 0), one_pixel(0, 0)),
        (one_pixel(0, 0), torch.ones(1, 12, 10)),
        (torch.ones(1, 12, 10), one_pixel(11, 9)),
        (torch.ones(1, 12, 10), torch.ones(1, 12, 10)),
        (smooth_maps(1, 12, 10, seed=1), smooth_maps(1, 12, 10, seed=1)),
        (smooth_maps(1, 12, 10, seed=1, peaked=20.0), smooth_maps(1, 12, 10, seed=2)),
    ],
    ids=["pixels", "same pixel", "pixel on constant", "constant on pixel", "constant", "equal", "peak"],
)
def test_degenerate_saliency(maps_a: Tensor, maps_b: Tensor, lam: float) -> None:
    a, b = shares(maps_a, maps_b, lam)
    offsets = best_offsets(a, b)
    assert_best(a, b, offsets)
    mixed, ratio = blend(torch.ones(1, 3, 12, 10), torch.ones(1, 3, 12, 10), a, b, offsets)
    assert mixed.isfinite().all()
    assert ((ratio >= 0) & (ratio <= 1)).all()


@pytest.mark.parametrize("contrast", [1e-4, 1e-3, 1e-2])
def test_almost_constant_saliency(contrast: float) -> None:
    """All offsets score almost the same in proportion to the overlap; an approximation then tells them apart."""
    maps = 1 + contrast * torch.rand(6, 16, 16, generator=torch.Generator().manual_seed(0))
    a, b = shares(maps, maps.flip(0), 0.5)
    assert_best(a, b, best_offsets(a, b), within=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("candidates", [None, [[1, 2], [-3, 0]]])
def test_any_floating_type_is_searched(dtype: torch.dtype, candidates: Any) -> None:
    maps = smooth_maps(4, 9, 11, seed=5)
    a, b = (x.to(dtype) for x in shares(maps, maps.flip(0), 0.4))
    assert torch.equal(best_offsets(a, b, candidates), best_offsets(a.float(), b.float(), candidates))


def test_first_of_many_equal_offsets_wins() -> None:
    # image b's pixel (5, 5) may go anywhere but onto image a's: offsets from (−5, −5) on score the same
    a, b = shares(one_pixel(3, 4), one_pixel(5, 5), 0.4)
    assert best_offsets(a, b).tolist() == [[-5, -5]]
    # … and here the first place is taken
    a, b = shares(one_pixel(0, 0), one_pixel(5, 5), 0.4)
    assert best_offsets(a, b).tolist() == [[-5, -4]]


@pytest.mark.parametrize("repeats", [1, SHORT_LIST])
def test_ties_go_to_the_first_candidate(repeats: int) -> None:
    """Also on the way that long lists take."""
    a, b = shares(one_pixel(3, 4), one_pixel(5, 5), 0.4)
    candidates = [[11, 9], [-2, -1], [2, 3], [1, 1], [-5, 0]] * repeats
    assert best_offsets(a, b, candidates).tolist() == [[2, 3]]
    assert best_offsets(a, b, candidates[::-1]).tolist() == [[-5, 0]]


def test_mass_in_frame_is_exact() -> None:
    b = smooth_maps(3, 9, 14, seed=4)
    mass = torch.stack([moved(b, dy, dx).sum(dim=(1, 2)) for dy, dx in every_offset(9, 14).tolist()], dim=1)
    torch.testing.assert_close(approximate_scores(torch.zeros_like(b), b), mass, rtol=1e-6, atol=1e-5)


def test_long_lists_are_searched_as_short_ones() -> None:
    maps = smooth_maps(10, 24, 18, seed=8)
    a, b = shares(maps, maps.roll(3, dims=0), 0.3)
    offsets = every_offset(24, 18)
    generator = torch.Generator().manual_seed(0)
    candidates = offsets[torch.randperm(len(offsets), generator=generator)[: SHORT_LIST + 200]]
    assert_best(a, b, best_offsets(a, b, candidates), candidates)
    exact = _list_scores(a, b, candidates.tolist())
    np.testing.assert_array_equal(best_offsets(a, b, candidates.numpy()), candidates[exact.argmax(dim=1)])


def test_the_best_offset_is_always_among_the_leaders() -> None:
    """On 100 pairs of 32×32, at any λ, with room to spare: a quarter of the leaders would have done."""
    maps = smooth_maps(100, 32, 32, seed=11, peaked=1.5)
    lam = torch.linspace(0.01, 0.99, 100)[:, None, None]
    unit = maps / maps.sum(dim=(1, 2), keepdim=True)
    a, b = lam * unit, (1 - lam) * unit.roll(1, dims=0)
    exact = _list_scores(a.double(), b.double(), every_offset(32, 32).tolist())
    good = exact >= exact.amax(dim=1, keepdim=True) * (1 - 1e-6)
    approximate = approximate_scores(a, b)
    level = torch.where(good, approximate, -1.0).amax(dim=1, keepdim=True)
    assert ((approximate > level).sum(dim=1) < LEADERS // 4).all()


def test_search_and_blend_leave_their_inputs_alone() -> None:
    maps = smooth_maps(4, 9, 11, seed=0)
    images = torch.randn(4, 3, 9, 11)
    a, b = shares(maps, maps.flip(0), 0.4)
    before = [x.clone() for x in (images, a, b)]
    offsets = best_offsets(a, b)
    best_offsets(a, b, [[0, 0], [1, 1]])
    blend(images, images, a, b, offsets)
    assert all(torch.equal(x, y) for x, y in zip((images, a, b), before, strict=True))


@pytest.mark.parametrize(("height", "width"), [(6, 6), (5, 9), (1, 4)])
def test_blend_by_definition(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(2)
    maps = torch.rand(5, height, width, generator=generator)
    maps[0] = 0
    images = torch.randn(10, 3, height, width, generator=generator)
    a, b = 0.3 * maps, 0.7 * maps.flip(0)
    offsets = torch.stack(
        [torch.randint(1 - n, n, (5,), generator=generator) for n in (height, width)], dim=1
    )  # not the best ones: any offset must do
    mixed, ratio = blend(images[:5], images[5:], a, b, offsets)
    for i, (dy, dx) in enumerate(offsets.tolist()):
        mask = a[i] / (a[i] + moved(b[i], dy, dx)).clamp(min=1e-16)
        expected = mask * images[i] + (1 - mask) * moved(images[5 + i], dy, dx)
        torch.testing.assert_close(mixed[i], expected)
        torch.testing.assert_close(ratio[i], mask.mean())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((torch.ones(2, 4, 4), torch.ones(2, 4, 5)), r"\(2, 4, 5\)"),
        ((torch.ones(4, 4), torch.ones(4, 4)), r"\(4, 4\)"),
        ((torch.ones(2, 0, 4), torch.ones(2, 0, 4)), r"\(2, 0, 4\)"),
        ((torch.ones(2, 4, 4).int(), torch.ones(2, 4, 4).int()), "int32"),
        ((torch.ones(2, 4, 4), torch.ones(2, 4, 4), [[0, 4]]), r"\(0, 4\)"),
        ((torch.ones(2, 4, 4), torch.ones(2, 4, 4), [[-4, 0]] * 300), r"\(-4, 0\)"),
        ((torch.ones(2, 4, 4), torch.ones(2, 4, 4), [0, 0]), r"\(2,\)"),
        ((torch.ones(2, 4, 4), torch.ones(2, 4, 4), np.zeros((0, 2))), r"\(0, 2\)"),
    ],
)
def test_search_names_bad_arguments(arguments: tuple[Any, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        best_offsets(*arguments)


def test_blend_names_bad_arguments() -> None:
    maps, images, offsets = torch.ones(2, 4, 4), torch.ones(2, 3, 4, 4), torch.zeros(2, 2).long()
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 5\)"):
        blend(images, torch.ones(2, 3, 4, 5), maps, maps, offsets)
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        blend(images, images, maps, maps, torch.zeros(3, 2).long())


# --- the method ----------------------------------------------------------------------------------------------------


def tiny_network(num_classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(6, num_classes))


def tiny_batch(batch: int = 4, height: int = 12, width: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width, generator=generator), torch.arange(batch) % 10


def draws_for(method: Sage, images: Tensor, seed: int = 0) -> SimpleNamespace:
    return method.draw(np.random.default_rng(seed), len(images), *images.shape[2:])


@pytest.mark.parametrize(("kernel_size", "sigma"), [(5, 1.0), (3, 0.5), (1, 1.0), (9, 2.5)])
def test_blur_equals_torchvision(kernel_size: int, sigma: float) -> None:
    maps = torch.rand(3, 11, 17)
    torch.testing.assert_close(
        gaussian_blur(maps, kernel_size, sigma), torchvision_blur(maps, [kernel_size] * 2, [sigma] * 2)
    )


def test_draw() -> None:
    method = build_method("sage", "cifar10", 10, upper_lambda=0.6, rand_pos=0.01)
    assert isinstance(method, Sage)
    rng = np.random.default_rng(0)
    lams, counts = [], np.zeros((63, 63))
    for _ in range(2000):
        draws = method.draw(rng, 5, 32, 32)
        lams.append(draws.lam)
        assert draws.candidates.shape == (39, 2)
        assert len(np.unique(draws.candidates, axis=0)) == 39
        assert sorted(draws.permutation) == list(range(5))
        counts[tuple((draws.candidates + 31).T)] += 1
    # α = 1: uniform on [0, 0.6]
    assert 0 <= min(lams) < 0.01
    assert 0.59 < max(lams) <= 0.6
    assert abs(np.mean(lams) - 0.3) < 0.015
    # every offset equally often, 19.7 times; four standard deviations over all, and evenly over the first place
    assert counts.min() >= 3
    assert counts.max() <= 45
    assert abs(counts[:31].mean() - counts[32:].mean()) < 0.6
    again = method.draw(np.random.default_rng(7), 5, 32, 32), method.draw(np.random.default_rng(7), 5, 32, 32)
    np.testing.assert_array_equal(again[0].candidates, again[1].candidates)
    assert again[0].lam == again[1].lam


@pytest.mark.parametrize(
    ("rand_pos", "height", "width", "count"),
    [(0.5, 32, 32, 1984), (1e-9, 32, 32, 1), (1e-6, 4, 5, 1), (0.1, 4, 7, 9), (1.0, 8, 8, None)],
)
def test_number_of_candidates(rand_pos: float, height: int, width: int, count: int | None) -> None:
    candidates = Sage(10, rand_pos=rand_pos).draw(np.random.default_rng(0), 3, height, width).candidates
    assert (None if candidates is None else len(candidates)) == count
    if candidates is not None:
        assert (np.abs(candidates) < [height, width]).all()


def test_alpha_zero_is_half_of_the_upper_lambda() -> None:
    assert Sage(10, mixup_alpha=0, upper_lambda=0.7).draw(np.random.default_rng(0), 2, 4, 4).lam == 0.35


@pytest.mark.parametrize(
    ("name", "value"),
    [("upper_lambda", 2), ("mixup_alpha", -1), ("blur_sigma", 0), ("kernel_size", 4), ("kernel_size", 0),
     ("rand_pos", 1.1), ("update_ratio", -1)],
)  # fmt: skip
def test_settings_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        Sage(10, **{name: value})  # type: ignore[arg-type]


def test_settings_are_numbers_of_any_type() -> None:
    """A whole float is a whole number, NumPy's numbers are numbers; what is kept is int or float."""
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4)
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    mixed = []
    for kernel_size, share in ((5, 0.5), (5.0, np.float32(0.5)), (np.int64(5), np.float64(0.5)), (np.float32(5), 0.5)):
        sage = build_method("sage", "cifar10", 10, kernel_size=kernel_size, rand_pos=share, upper_lambda=np.int8(1))
        kept = sage.kernel_size, sage.rand_pos, sage.upper_lambda  # type: ignore[attr-defined]
        assert repr(kept) == "(5, 0.5, 1.0)"
        draws = sage.draw(np.random.default_rng(0), 4, 16, 16)
        mixed.append(sage.mix(network, images, labels, draws).images)
    assert all(torch.equal(images, mixed[0]) for images in mixed)  # type: ignore[arg-type]
    for wrong in (5.5, np.float32(5.5), np.nan, np.inf, "5", True, np.True_, None, 1j):
        with pytest.raises(ValueError, match="kernel_size"):
            build_method("sage", "cifar10", 10, kernel_size=wrong)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 1.0])
def test_clean_gradient_has_its_share(ratio: float) -> None:
    model, (images, labels) = tiny_network(), tiny_batch()
    expected = torch.autograd.grad((1 - ratio) * bce_loss(model(images), one_hot(labels, 10)), model.parameters())
    method = Sage(10, update_ratio=ratio)
    step = method.step(model, images, labels, draws_for(method, images))
    mixed_loss = ratio * bce_loss(step.logits, step.mixed.targets)
    torch.testing.assert_close(step.loss, mixed_loss + step.mixed.clean_loss)
    of_mixed = torch.autograd.grad(mixed_loss, list(model.parameters()), retain_graph=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    step.loss.backward()
    for parameter, clean, mixed in zip(model.parameters(), expected, of_mixed, strict=True):
        torch.testing.assert_close(parameter.grad, clean + mixed)


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_eval_mode_updates_no_statistics_in_the_clean_pass(ratio: float) -> None:
    images, labels = tiny_batch()
    for eval_mode in (False, True):
        model = tiny_network().train()
        method = Sage(10, eval_mode=eval_mode, update_ratio=ratio)
        step = method.step(model, images, labels, draws_for(method, images))
        expected = tiny_network()
        with torch.no_grad():
            for batch in (step.mixed.images,) if eval_mode else (images, step.mixed.images):
                expected(batch)
        torch.testing.assert_close(model.state_dict(), expected.state_dict())
        assert model.training
        assert all(module.training for module in model.modules())


@pytest.mark.parametrize("lam", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("rand_pos", [0.01, 1.0])
def test_step_fills_in_the_picture(lam: float, rand_pos: float) -> None:
    model, (images, labels) = tiny_network(), tiny_batch()
    before = images.clone(), labels.clone()
    method = Sage(10, rand_pos=rand_pos)
    draws = draws_for(method, images)
    draws.lam = lam
    step = method.step(model, images, labels, draws)
    step.loss.backward()
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    assert not images.requires_grad
    assert step.loss.isfinite()
    assert step.logits.shape == (4, 10)
    permutation = torch.as_tensor(draws.permutation)
    assert step.mixed.partner is not None
    assert step.mixed.saliency is not None
    assert step.mixed.mask is not None
    assert step.mixed.targets is not None
    assert torch.equal(step.mixed.partner, images[permutation])
    assert torch.equal(step.mixed.saliency[1], step.mixed.saliency[0][permutation])
    assert step.mixed.mask.shape == (4, 12, 9)
    ratio = step.mixed.mask.mean(dim=(1, 2))[:, None]
    torch.testing.assert_close(
        step.mixed.targets, ratio * one_hot(labels, 10) + (1 - ratio) * one_hot(labels, 10)[permutation]
    )


def test_images_too_small_for_the_blur() -> None:
    method = Sage(10, kernel_size=5)
    with pytest.raises(ValueError, match="2×9"):
        method.step(tiny_network(), torch.zeros(2, 3, 2, 9), torch.zeros(2).long(), SimpleNamespace())


def test_lam_may_be_of_another_type() -> None:
    maps, images, labels = torch.rand(4, 8, 8), torch.randn(4, 3, 8, 8), torch.arange(4)
    sage, mixed = build_method("sage", "cifar10", 10), []
    for dtype in (torch.float32, torch.float64):
        lam = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=dtype)[:, None, None]
        draws = SageDraws(lam, np.array([1, 0, 3, 2]), None)  # type: ignore[arg-type]
        mixed.append(sage.mix(None, images, labels, draws, saliency=maps).images)
    assert torch.equal(*mixed)


def test_half_precision_maps_without_saliency_give_no_nan() -> None:
    images = torch.rand(2, 3, 8, 8, dtype=torch.float16)
    maps = torch.zeros(2, 8, 8, dtype=torch.float16)
    maps[:, 2:4, 2:4] = 0.25
    mixed, ratio = blend(images, images.flip(0), maps, maps, torch.tensor([[1, 0], [0, 7]]))
    assert mixed.isfinite().all()
    assert ratio.isfinite().all()
