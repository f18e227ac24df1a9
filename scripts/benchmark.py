"""What mixing, whole training steps, and SAGE's search cost on this machine: tables, and a JSON file with --out.

    python3 scripts/benchmark.py                                     # all three parts; minutes on two CPU cores
    python3 scripts/benchmark.py --parts steps --methods vanilla sage --fast --device cuda --repeats 50
    python3 scripts/benchmark.py --parts search --plot figures/search_cost.png

mixing: a method's ``mix`` without the network, in whose place saliency is known beforehand; what that pass costs is
measured in between and taken off. What is left lies between the gradient in the pixels, if there is one,
and the mixed batch with its targets. Manifold Mixup mixes the features after the first stage, and its time includes the
loss. steps: draw, saliency pass, mixing, forward, backward and optimiser. search: time of SAGE's search of one pair
against the pixels, and of a batch against the candidates.

Repetitions are interleaved (A B C A B C …), so that a machine that slows down slows all. Times are in milliseconds, the
median over repetitions; the least stands beside it. The ratio to vanilla is the median of the ratios within each
repetition. Peak memory is that of one step alone: allocated on CUDA; on Linux the process' resident memory.
The share of the peak compares a step's multiplications and additions per second with those that a large matrix product
or convolution reaches in the step's precision on the same device. Images are random crops of scikit-learn's two
photographs, weights are random, and saliency is the gradient of that network.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load_data import stride_of
from mixup import METHODS, build_method
from mixup.base import Method, Step
from mixup.saliency import KnownSaliency, fine_grained_saliency, root_mean_square, saliency_pass
from mixup.search import SHORT_LIST, best_offsets, exact_scores
from mixup.settings import NORMALISATION
from models import ARCHITECTURES, build_model
from models.mixing import MIXING_POINTS
from utils import files, run
from utils.device import Captured, emulates_bfloat16, prepare, set_precision
from utils.errors import exit_code
from utils.files import atomic_write
from utils.options import Parser, number, one_of

CLASSES = 10
SHARE = 0.01  # of all offsets: the paper's --rand_pos
PAPER = {"upper_lambda": 0.6, "update_ratio": 0.7}  # SAGE on CIFAR-10
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {  # labels and settings of methods that are measured more than once
    "sage": {
        f"sage, {SHARE:.0%} of the offsets": {"rand_pos": SHARE, **PAPER},
        "sage, all offsets": {"rand_pos": 1.0, **PAPER},
    }
}
MEAN, STD = NORMALISATION["cifar10"]
BRUTE_FORCE_PIXELS = 64 * 64  # beyond, trying every offset takes longer than all the rest
Work = Callable[[int], object]  # takes the number of the repetition
Name = TypeVar("Name", bound=Hashable)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    for path in (args.out, args.plot):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"there is no folder {path.parent} for {path}")
    if args.plot and "search" not in args.parts:
        parser.error("--plot shows the search: add search to --parts")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: this PyTorch finds no CUDA device")
    if args.threads:
        torch.set_num_threads(args.threads)
    return exit_code(parser, lambda: measure(args, device))


def measure(args: argparse.Namespace, device: torch.device) -> int:
    """Run the parts that are asked for; results so far are kept when a later part fails."""
    set_precision(False)
    torch.manual_seed(0)
    result: dict[str, Any] = {"machine": machine(device), "settings": settings(args)}
    print("\n".join(f"{key}: {value}" for key, value in result["machine"].items()))
    works = {"mixing": mixing, "steps": steps, "search": search}
    for part in args.parts:
        result[part] = works[part](args, device)
        if args.out:
            files.write_json(args.out, result)
    if args.plot:
        plot_search(args.plot, result["search"], result["machine"])
    return 0


def make_parser() -> Parser:
    parser = Parser(
        description=__doc__,
        prog="benchmark.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    positive, side = number(int, low=1), number(int, low=4)
    parts = ("mixing", "steps", "search")
    # fmt: off
    add("--parts", nargs="+", type=one_of(parts), default=parts, help="mixing, steps, search (default: all)")
    add("--methods", nargs="+", type=one_of(tuple(METHODS)), default=tuple(METHODS), help="which (default: all)")
    add("--arch", type=one_of(ARCHITECTURES), default="preactresnet18", help="(default: %(default)s)")
    add("--initial_channels", type=positive, default=64, help="of a preactresnet (default: %(default)s)")
    add("--batch_size", type=positive, default=100, help="(default: %(default)s)")
    add("--image_size", type=number(int, low=16), default=32, help="side of the images (default: %(default)s)")
    add("--search_sizes", nargs="+", type=side, default=[16, 32, 64, 128, 224], help="sides of the images searched")
    add("--device", type=one_of(("cpu", "cuda")), default="cpu", help="(default: %(default)s)")
    add("--threads", type=positive, help="of PyTorch on the CPU (default: its own choice)")
    add("--fast", action="store_true", help="whole steps as main.py --fast runs them")
    add("--repeats", type=positive,
        help="of whole steps (default: 3 on the CPU, 20 on CUDA); the others take ten times as many")
    add("--out", type=Path, help="JSON file with all that is printed")
    add("--plot", type=Path, help="PNG of the search's cost against the pixels")
    # fmt: on
    return parser


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(args).items() if key not in ("out", "plot")}


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader has to know about where this ran."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    found = {
        "cpu": f"{name}, {os.cpu_count()} logical cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": run.git_commit(),
    }
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


# ------------------------------------------------------------------------------------------------------------ measuring


def interleaved(works: dict[Name, Work], repeats: int, device: torch.device) -> dict[Name, list[float]]:
    """Milliseconds of each work in each of ``repeats`` rounds over all, after one round to warm up; on CUDA, where
    steps are compiled and recorded, after five."""
    times: dict[Name, list[float]] = {name: [] for name in works}
    for repetition in range(-5 if device.type == "cuda" else -1, repeats):
        for name, work in works.items():
            synchronise(device)
            start = time.perf_counter()
            work(max(repetition, 0))
            synchronise(device)
            if repetition >= 0:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(work: Work, device: torch.device) -> tuple[float, float] | None:
    """MB in use before one call, and at most during it; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) / 1e6
        work(0)
        return before, torch.cuda.max_memory_allocated(device) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that earlier calls freed is not in use
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
        before = of_process("VmRSS")
        work(0)
        return before, of_process("VmHWM")
    except (OSError, AttributeError):
        return None


def of_process(name: str) -> float:
    """MB that the system tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(name))


def reachable_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a large matrix product or a 3×3 convolution, whichever is quicker, at its best."""
    side, batch, repeats = (8192, 512, 20) if device.type == "cuda" else (2048, 32, 5)
    if device.type == "cpu" and dtype is torch.bfloat16 and emulates_bfloat16(device):
        side, batch = 512, torch.get_num_threads()  # the large ones would take many minutes
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    images = torch.randn(batch, 256, 16, 16, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    kernel = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    works: dict[int, Work] = {
        2 * side**3: lambda _: matrix @ matrix,
        2 * batch * 16**2 * 256**2 * 9: lambda _: F.conv2d(images, kernel, padding=1),
    }
    return max(count / (min(times) / 1000) for count, times in interleaved(works, repeats, device).items())


def growth(sizes: Sequence[float], milliseconds: Sequence[float]) -> float | None:
    """The exponent p of time ~ size^p, by least squares in logarithms; None of a single size."""
    if len(sizes) < 2:
        return None
    return float(np.polyfit(np.log(sizes), np.log(milliseconds), 1)[0])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print Markdown, aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    print()
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [
            f"{cell:{'<' if i == 0 else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


# ------------------------------------------------------------------------------------------------------------ the parts


def batch_of(count: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random crops [B, 3, H, W] of the photographs, normalised, and random labels [B]."""
    rng = np.random.default_rng(0)
    photographs = [torch.from_numpy(image.copy()) for image in load_sample_images().images]
    crops = []
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        side = int(rng.integers(64, 321))  # objects and not only texture
        top, left = (int(rng.integers(0, length - side + 1)) for length in photograph.shape[:2])
        crop = photograph[top : top + side, left : left + side].permute(2, 0, 1)[None].float() / 255
        crops.append(F.interpolate(crop, (height, width), mode="bilinear", antialias=True))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    labels = torch.from_numpy(rng.integers(CLASSES, size=count))
    return ((torch.cat(crops) - mean) / std).to(device), labels.to(device)


def network_of(args: argparse.Namespace, device: torch.device, fast: bool) -> nn.Module:
    return prepare(build_model(args.arch, CLASSES, stride_of(args.image_size), args.initial_channels), device, fast)


def methods_of(args: argparse.Namespace) -> dict[str, Method]:
    """The methods that were asked for, by label, but for those that do not fit the images."""
    found: dict[str, Method] = {}
    for name in args.methods:
        for label, of_variant in VARIANTS.get(name, {name: {}}).items():
            method = build_method(name, "cifar10", CLASSES, **of_variant)
            try:
                method.draw(np.random.default_rng(0), args.batch_size, args.image_size, args.image_size)
            except ValueError as problem:
                print(f"{label} is left out: {problem}")
            else:
                found[label] = method
    return found


class StandIn(KnownSaliency):
    """In place of the network: known saliency, and features [B, C, H, W] for methods that mix inside the network."""

    mixing_points = MIXING_POINTS

    def __init__(self, maps: Tensor, features: Tensor) -> None:
        super().__init__(maps, CLASSES)
        self.features, self.passes = features, 0
        self.logits = torch.zeros(len(maps), CLASSES, device=maps.device)

    def forward(self, images: Tensor, mix_at: int = 0, mix: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        if mix is not None:
            mix(self.features)
        if not images.requires_grad:
            return self.logits
        self.passes += 1
        return super().forward(images)


def mixing(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Milliseconds of each method's mixing alone, saliency being known."""
    images, labels = batch_of(args.batch_size, args.image_size, args.image_size, device)
    stand_in = stand_in_for(network_of(args, device, False), images, labels)

    def loss_of(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    works: dict[str, Work] = {"pass": lambda _: saliency_pass(stand_in, images, loss_of)}
    passes = {}
    for label, method in methods_of(args).items():
        # a method with a step of its own mixes inside the network
        mix = method.mix if type(method).step is Method.step else method.step
        found = mixing_draws(method, images, lambda draws, mix=mix: mix(stand_in, images, labels, draws))  # type: ignore[misc]
        for blocks, draws in found.items():
            name = f"{label}, {blocks} blocks a side" if len(found) > 1 else label
            before = stand_in.passes
            mix(stand_in, images, labels, draws)
            passes[name] = stand_in.passes - before
            works[name] = lambda _, mix=mix, draws=draws: mix(stand_in, images, labels, draws)  # type: ignore[misc]
    with torch.no_grad():
        times = interleaved(works, 10 * repeats(args), device)
    of_pass = times["pass"]
    rows = {
        name: {
            "median_ms": statistics.median(times[name]) - count * statistics.median(of_pass),
            "min_ms": min(times[name]) - count * min(of_pass),
        }
        for name, count in passes.items()
    }
    size = args.image_size
    print(
        f"\nmixing alone, batch of {args.batch_size}, {size}×{size}, {10 * repeats(args)} interleaved repetitions; "
        f"taken off where saliency is a gradient: {statistics.median(of_pass):.2f} ms"
    )
    cells = [(name, f"{row['median_ms']:.2f}", f"{row['min_ms']:.2f}") for name, row in rows.items()]
    table(("mixing", "median ms", "least ms"), cells)
    return rows


def stand_in_for(network: nn.Module, images: Tensor, labels: Tensor) -> StandIn:
    """The network's saliency and its features after the first stage."""
    gradient, _ = saliency_pass(network, images, lambda logits: F.cross_entropy(logits, labels))
    features: list[Tensor] = []
    with torch.no_grad():
        network(images, 1, lambda x: features.append(x) or x)  # type: ignore[func-returns-value]
    return StandIn(root_mean_square(gradient), features[0])


def mixing_draws(method: Method, images: Tensor, mix: Callable[[Any], Any]) -> dict[int | None, Any]:
    """Draws that mix the images, one for each number of blocks that the method draws: at half of its draws SaliencyMix
    leaves them as they are, and Vanilla always."""
    found: dict[int | None, Any] = {}
    for seed in range(40):
        draws = method.draw(np.random.default_rng(seed), len(images), *images.shape[2:])
        blocks = getattr(draws, "num_blocks", None)
        if blocks not in found and getattr(mix(draws), "images", None) is not images:
            found[blocks] = draws
    return dict(sorted(found.items()) if len(found) > 1 else found)


def repeats(args: argparse.Namespace) -> int:
    return args.repeats or (20 if args.device == "cuda" else 3)


def candidates_of(height: int, width: int, share: float, rng: np.random.Generator) -> Tensor:
    """Random offsets as SAGE draws them."""
    method = build_method("sage", "cifar10", CLASSES, rand_pos=share)
    return torch.from_numpy(method.draw(rng, 1, height, width).candidates)


def steps(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Whole training steps of each method beside vanilla's."""
    methods = {"vanilla": build_method("vanilla", "cifar10", CLASSES), **methods_of(args)}
    images, labels = batch_of(args.batch_size, args.image_size, args.image_size, device)
    network = network_of(args, device, args.fast)
    optimizer = torch.optim.SGD(
        network.parameters(), 0.001, 0.9, weight_decay=1e-4, nesterov=True, fused=True if args.fast else None
    )

    def step_of(method: Method, record: bool = args.fast) -> Work:
        def take(images: Tensor, labels: Tensor, draws: Any) -> Step:
            optimizer.zero_grad(set_to_none=True)
            step = method.step(network, images, labels, draws)
            step.loss.backward()
            optimizer.step()
            return step.detached()

        if record and device.type == "cuda" and method.recordable:
            take = Captured(take, lambda: None, device)

        def work(repetition: int) -> None:
            draws = method.draw(np.random.default_rng(repetition), len(images), *images.shape[2:])
            take(images, labels, draws)

        return work

    works = {label: step_of(method) for label, method in methods.items()}
    times = interleaved(works, repeats(args), device)
    peak = reachable_speed(torch.bfloat16 if args.fast else torch.float32, device)
    mode = " --fast" if args.fast else ""
    print(
        f"\nwhole steps, {args.arch}{mode}, {args.initial_channels} channels, batch of {args.batch_size}, "
        f"{args.image_size}×{args.image_size}, {repeats(args)} interleaved repetitions; "
        f"100% of peak is {peak / 1e12:.3g} TFLOP/s"
    )
    rows = {}
    for label, method in methods.items():
        median = statistics.median(times[label])
        used = memory(step_of(method, record=False), device)  # a replayed step allocates nothing
        rows[label] = {
            "median_ms": median,
            "min_ms": min(times[label]),
            "ratio": statistics.median(t / v for t, v in zip(times[label], times["vanilla"], strict=True)),
            "images_per_second": 1000 * args.batch_size / median,
            "peak_memory_mb": used and used[1],
            "share_of_peak": operations(args, method) * args.batch_size / (median / 1000) / peak,
        }
    # fmt: off
    cells = [(label, f"{row['median_ms']:.1f}", f"{row['min_ms']:.1f}", f"{row['ratio']:.2f}",
              f"{row['images_per_second']:.0f}",
              "–" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:.0f}",
              f"{row['share_of_peak']:.0%}") for label, row in rows.items()]
    # fmt: on
    table(("step", "median ms", "least ms", "× vanilla", "images/s", "peak MB", "of peak"), cells)
    return rows


def operations(args: argparse.Namespace, method: Method) -> float:
    """Multiplications and additions of a step's convolutions and matrix products, an image."""
    cpu = torch.device("cpu")
    images, labels = batch_of(4, args.image_size, args.image_size, cpu)
    network = network_of(args, cpu, False)
    draws = method.draw(np.random.default_rng(0), 4, *images.shape[2:])
    with Counter() as counter:
        method.step(network, images, labels, draws).loss.backward()
    return counter.total / 4


class Counter(TorchDispatchMode):
    """Counts multiplications and additions, like ``FlopCounterMode``, which fails where ``autograd.grad`` is asked for
    gradients in parameters."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def search(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """SAGE's search alone: one pair against the pixels, a batch against the candidates."""
    rng, count = np.random.default_rng(0), 3 * repeats(args)
    some_label, brute_label = f"{SHARE:.0%} of the offsets", "all, one by one"
    pairs = {side: max(1, args.batch_size * 32**2 // side**2) for side in args.search_sizes}
    works: dict[tuple[str, int], Work] = {}
    brute: dict[tuple[str, int], Work] = {}
    for side in args.search_sizes:
        a, b = maps_of(pairs[side], side, device)
        some = candidates_of(side, side, SHARE, rng).to(device)
        works["all offsets", side] = partial(call, best_offsets, a, b)
        works[some_label, side] = partial(call, best_offsets, a, b, some)
        if side**2 <= BRUTE_FORCE_PIXELS:
            every = candidates_of(side, side, 1 - 1e-9, rng).to(device)
            brute[brute_label, side] = partial(call, brute_force, a, b, every)
    times = interleaved(works, count, device) | interleaved(brute, 3, device)
    print(f"\nsearch of one pair, {count} interleaved repetitions (3 of one by one); n: pixels")
    result: dict[str, Any] = {"pixels": {}, "candidates": {}}
    rows = []
    for label in ("all offsets", some_label, brute_label):
        per_pair = {side: statistics.median(t) / pairs[side] for (of, side), t in times.items() if of == label}
        large = [side for side in per_pair if side >= 32]
        # few candidates are scored one by one, many are looked up among all: two algorithms, no single power
        exponent = None
        if label != some_label:
            exponent = growth([side**2 for side in large], [per_pair[side] for side in large])
        result["pixels"][label] = {"ms_per_pair": {side**2: t for side, t in per_pair.items()}, "exponent": exponent}
        cells = [f"{per_pair[side]:.3f}" if side in per_pair else "–" for side in args.search_sizes]
        rows.append((label, *cells, power("n", exponent)))
    table(("ms a pair", *(f"{side}×{side}" for side in args.search_sizes), "growth from 32²"), rows)

    size = args.image_size
    a, b = maps_of(args.batch_size, size, device)
    used = memory(partial(call, best_offsets, a, b), device)
    result["extra_memory_mb"] = used and used[1] - used[0]
    total = (2 * size - 1) ** 2
    counts = sorted(k for k in {10, total // 100, 100, 300, 1000, total // 3} if k < total)
    by_count: dict[int, Work] = {
        k: partial(call, best_offsets, a, b, candidates_of(size, size, (k + 0.5) / total, rng)) for k in counts
    }
    by_count[total] = partial(call, best_offsets, a, b)
    medians = {k: statistics.median(t) for k, t in interleaved(by_count, count, device).items()}
    short = [k for k in counts if k <= SHORT_LIST]
    result["candidates"] = medians
    result["candidates_exponent"] = growth(short, [medians[k] for k in short])
    print(f"\nsearch of {args.batch_size} pairs, {size}×{size}, {count} interleaved repetitions; k: candidates")
    head = ("candidates", *map(str, medians), f"growth to {SHORT_LIST}")
    table(head, [("median ms", *(f"{t:.2f}" for t in medians.values()), power("k", result["candidates_exponent"]))])
    if used:
        print(f"\nsearch of all offsets: {result['extra_memory_mb']:.1f} MB more than before it at its peak")
    return result


def call(function: Callable[..., object], *rest: Any) -> None:
    """A ``Work`` by ``partial``: the last argument, the repetition, is not the function's."""
    function(*rest[:-1])


def power(name: str, exponent: float | None) -> str:
    return "–" if exponent is None else f"{name}^{exponent:.2f}"


def maps_of(count: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Saliency [B, side, side] of pairs with mass 0.4 and 0.6: fine-grained maps of the crops, as SAGE blurs them."""
    images, labels = batch_of(2 * count, side, side, torch.device("cpu"))
    known = fine_grained_saliency((images * 60 + 120).clamp(0, 255).to(torch.uint8)).float()
    sage = build_method("sage", "cifar10", CLASSES, rand_pos=1e-9)  # a single offset
    draws = sage.draw(np.random.default_rng(0), 2 * count, side, side)
    blurred = sage.mix(KnownSaliency(known, CLASSES), images, labels, draws).saliency
    assert blurred is not None
    maps = blurred[0].to(device)
    unit = maps / maps.sum(dim=(1, 2), keepdim=True)
    return 0.4 * unit[:count], 0.6 * unit[count:]


def brute_force(a: Tensor, b: Tensor, candidates: Tensor) -> Tensor:
    """The best of all offsets by scoring each pixel by pixel."""
    return candidates[exact_scores(a, b, candidates.expand(len(a), -1, -1)).argmax(dim=1)]


def plot_search(path: Path, result: dict[str, Any], about: dict[str, Any]) -> None:
    """Cost of one pair's search against its pixels, both axes logarithmic."""
    figure = Figure(figsize=(6, 4), layout="constrained", dpi=120)
    axes = figure.subplots()
    for (label, line), marker in zip(result["pixels"].items(), "os^", strict=True):
        points = line["ms_per_pair"]
        grows = f": {power('n', line['exponent'])}" if line["exponent"] else ""
        axes.loglog(list(points), list(points.values()), marker=marker, label=label + grows)
    sizes = sorted({pixels for line in result["pixels"].values() for pixels in line["ms_per_pair"]})
    axes.set_xticks(sizes, [f"{math.isqrt(n)}×{math.isqrt(n)}" for n in sizes])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("image [pixels]")
    axes.set_ylabel("search of one pair [ms]")
    axes.set_title(f"{about.get('gpu') or about['cpu']}, {about['threads']} threads", fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    sys.exit(main())
