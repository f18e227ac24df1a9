"""What mixing, whole training steps, and SAGE's search cost on this machine: tables, and a JSON file with --out.

    python3 scripts/benchmark.py                                     # all three parts; minutes on two CPU cores
    python3 scripts/benchmark.py --parts steps --methods vanilla sage --fast --device cuda --repeats 50
    python3 scripts/benchmark.py --parts search --plot figures/search_cost.png

mixing: a method's mix without the network's passes, from known saliency to the mixed batch with its targets; Manifold
Mixup, which mixes inside the network, is left out. steps: draw, saliency pass, mixing, forward, backward, optimiser.
search: SAGE's search of one pair against the pixels, for all offsets and 1%.

Repetitions are interleaved (A B C A B C …), so that a machine that slows down slows all. Times are the median over
repetitions, in milliseconds; the ratio to vanilla is the median of the ratios within each repetition. Peak memory is
what one step allocates on CUDA. Images are random crops of scikit-learn's two photographs, weights are random, and
saliency is the gradient of that network.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load_data import stride_of
from mixup import METHODS, build_method
from mixup.base import Method, Mixed, Step
from mixup.sage import gaussian_blur
from mixup.saliency import fine_grained_saliency, root_mean_square, saliency_pass
from mixup.search import best_offsets, every_offset, exact_scores
from mixup.settings import NORMALISATION
from models import ARCHITECTURES, build_model
from utils import pictures
from utils.device import Captured, prepare, set_precision
from utils.errors import exit_code
from utils.files import write_json
from utils.options import Parser, given_names, number, one_of, refuse_unused
from utils.run import git_commit

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
USED_IN = {"fast": {"steps"}, "methods": {"mixing", "steps"}, "search_sizes": {"search"}, "plot": {"search"}}
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
    refuse_unused(parser, given_names(make_parser(), sys.argv[1:] if argv is None else argv), args.parts, USED_IN)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: this PyTorch finds no CUDA device")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.methods, args.search_sizes = args.methods or tuple(METHODS), args.search_sizes or [16, 32, 64, 128, 224]
    args.repeats = args.repeats or (20 if args.device == "cuda" else 3)
    return exit_code(parser, lambda: measure(args, device))


def measure(args: argparse.Namespace, device: torch.device) -> int:
    """Run the parts that are asked for; results so far are kept when a later part fails."""
    set_precision(False)
    torch.manual_seed(0)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "plot")}
    result: dict[str, Any] = {"machine": machine(device), "settings": settings}
    print("\n".join(f"{key}: {value}" for key, value in result["machine"].items()))
    works = {"mixing": mixing, "steps": steps, "search": search}
    for part in args.parts:
        result[part] = works[part](args, device)
        if args.out:
            write_json(args.out, result)
    if args.plot:
        pictures.attempt(plot_search, args.plot, result["search"], result["machine"])
    return 0


def make_parser() -> Parser:
    parser = Parser(
        description=__doc__, prog="benchmark.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    positive, side = number(int, low=1), number(int, low=4)
    parts = ("mixing", "steps", "search")
    # fmt: off
    add("--parts", nargs="+", type=one_of(parts), default=parts, help="mixing, steps, search (default: all)")
    add("--methods", nargs="+", type=one_of(tuple(METHODS)), help="for mixing and steps (default: all)")
    add("--arch", type=one_of(ARCHITECTURES), default="preactresnet18", help="(default: %(default)s)")
    add("--initial_channels", type=positive, default=64, help="of a preactresnet (default: %(default)s)")
    add("--batch_size", type=positive, default=100, help="(default: %(default)s)")
    add("--image_size", type=number(int, low=16), default=32, help="side of the images (default: %(default)s)")
    add("--search_sizes", nargs="+", type=side, help="sides of the images searched (default: 16 32 64 128 224)")
    add("--device", type=one_of(("cpu", "cuda")), default="cpu", help="(default: %(default)s)")
    add("--threads", type=positive, help="of PyTorch on the CPU (default: its own choice)")
    add("--fast", action="store_true", help="whole steps as main.py --fast runs them")
    add("--repeats", type=positive, help="of whole steps (default: 3 on the CPU, 20 on CUDA); "
        "the search has three, mixing ten times as many")
    add("--out", type=Path, help="JSON file with all that is printed")
    add("--plot", type=Path, help="PNG of the search's cost against the pixels")
    # fmt: on
    return parser


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
        "commit": git_commit(),
    }
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


# ------------------------------------------------------------------------------------------------------------ measuring


def interleaved(works: dict[Name, Work], repeats: int, device: torch.device) -> dict[Name, list[float]]:
    """Milliseconds of each work in each of ``repeats`` rounds over all, after one round to warm up; on CUDA, where
    steps are compiled and recorded, after five."""
    times: dict[Name, list[float]] = {name: [] for name in works}
    for repetition in range(-5 if device.type == "cuda" else -1, repeats):
        for name, work in works.items():
            began = now(device)
            work(max(repetition, 0))
            if repetition >= 0:
                times[name].append(1000 * (now(device) - began))
    return times


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(work: Work, device: torch.device) -> int | None:
    """MB allocated at most during one call, on CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work(0)
    return round(torch.cuda.max_memory_allocated(device) / 1e6)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print Markdown, aligned."""
    widths = [max(len(str(row[i])) for row in (head, *rows)) for i in range(len(head))]
    print()
    for row in (head, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


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
    images = (torch.cat(crops) - mean) / std
    return images.to(device), torch.from_numpy(rng.integers(CLASSES, size=count)).to(device)


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


def mixing(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Milliseconds of each method's mixing alone, saliency being known."""
    images, labels = batch_of(args.batch_size, args.image_size, args.image_size, device)
    gradient, _ = saliency_pass(network_of(args, device, False), images, lambda out: F.cross_entropy(out, labels))
    saliency = root_mean_square(gradient)

    def mix(method: Method, draws: Any) -> Mixed:
        known = saliency if method.takes_saliency else None
        return method.mix(None, images, labels, draws, saliency=known)

    works: dict[str, Work] = {}
    for label, method in methods_of(args).items():
        for draws in mixing_draws(method, images, mix):
            blocks = getattr(draws, "num_blocks", None)
            name = f"{label}, {blocks} blocks a side" if blocks else label
            works[name] = lambda _, method=method, draws=draws: mix(method, draws)  # type: ignore[misc]
    with torch.no_grad():
        times = interleaved(works, 10 * args.repeats, device)
    rows = {name: {"median_ms": statistics.median(ms)} for name, ms in times.items()}
    shape = f"batch of {args.batch_size}, {args.image_size}×{args.image_size}"
    print(f"\nmixing alone, {shape}, {10 * args.repeats} interleaved repetitions")
    table(("mixing", "ms"), [(name, f"{row['median_ms']:.2f}") for name, row in rows.items()])
    return rows


def mixing_draws(method: Method, images: Tensor, mix: Callable[[Method, Any], Mixed]) -> list[Any]:
    """Draws that mix the images, one for each number of blocks that the method draws: half of SaliencyMix's leave them
    as they are, and all of Vanilla's. None for a method that mixes inside the network."""
    found: dict[int, Any] = {}
    for seed in range(40):
        draws = method.draw(np.random.default_rng(seed), len(images), *images.shape[2:])
        with suppress(ValueError):
            mixed = mix(method, draws).images
            if mixed is not None and mixed is not images:
                found.setdefault(getattr(draws, "num_blocks", 0), draws)
    return [draws for _, draws in sorted(found.items())]


def steps(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Whole training steps of each method beside vanilla's."""
    methods = {"vanilla": build_method("vanilla", "cifar10", CLASSES), **methods_of(args)}
    images, labels = batch_of(args.batch_size, args.image_size, args.image_size, device)
    network = network_of(args, device, args.fast)
    optimizer = torch.optim.SGD(
        network.parameters(), 0.001, 0.9, weight_decay=1e-4, nesterov=True, fused=True if args.fast else None
    )

    def step_of(method: Method, record: bool = args.fast) -> Work:
        def step(images: Tensor, labels: Tensor, draws: Any) -> Step:
            optimizer.zero_grad(set_to_none=True)
            result = method.step(network, images, labels, draws)
            result.loss.backward()
            optimizer.step()
            return result.detached()

        recorded = record and device.type == "cuda" and method.recordable
        take = Captured(step, lambda: None, device) if recorded else step

        def work(repetition: int) -> None:
            draws = method.draw(np.random.default_rng(repetition), len(images), *images.shape[2:])
            take(images, labels, draws)

        return work

    works = {label: step_of(method) for label, method in methods.items()}
    times = interleaved(works, args.repeats, device)
    mode = " --fast" if args.fast else ""
    print(
        f"\nwhole steps, {args.arch}{mode}, {args.initial_channels} channels, batch of {args.batch_size}, "
        f"{args.image_size}×{args.image_size}, {args.repeats} interleaved repetitions"
    )
    rows = {}
    for label, method in methods.items():
        median = statistics.median(times[label])
        rows[label] = {
            "median_ms": median,
            "ratio": statistics.median(t / v for t, v in zip(times[label], times["vanilla"], strict=True)),
            "images_per_second": 1000 * args.batch_size / median,
            "peak_memory_mb": peak_memory(step_of(method, record=False), device),  # a replayed step allocates nothing
        }
    cells = []
    for label, row in rows.items():
        speed, memory = row["images_per_second"], row["peak_memory_mb"]
        cells.append((label, f"{row['median_ms']:.2f}", f"{row['ratio']:.2f}", f"{speed:.0f}", memory or "–"))
    table(("step", "ms", "× vanilla", "images/s", "peak MB"), cells)
    return rows


def search(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """SAGE's search alone: one pair against the pixels, a batch against the candidates."""
    count = 3 * args.repeats
    result: dict[str, Any] = {"pixels": {}}
    pairs = {side: max(1, args.batch_size * 32**2 // side**2) for side in args.search_sizes}
    works: dict[tuple[str, int], Work] = {}
    brute: dict[tuple[str, int], Work] = {}
    one_in_hundred = build_method("sage", "cifar10", CLASSES, rand_pos=SHARE)
    for side in args.search_sizes:
        a, b = maps_of(pairs[side], side, device)
        every = every_offset(side, side, device)
        some = torch.from_numpy(one_in_hundred.draw(np.random.default_rng(0), 1, side, side).candidates).to(device)
        works["all offsets", side] = lambda _, a=a, b=b: best_offsets(a, b)  # type: ignore[misc]
        works[f"{SHARE:.0%} of the offsets", side] = lambda _, a=a, b=b, c=some: best_offsets(a, b, c)  # type: ignore[misc]
        if side**2 <= BRUTE_FORCE_PIXELS:
            brute["all, one by one", side] = lambda _, a=a, b=b, c=every: exact_scores(  # type: ignore[misc]
                a, b, c.expand(len(a), -1, -1)
            )
    times = interleaved(works, count, device) | interleaved(brute, 3, device)
    rows = []
    for label in dict.fromkeys(label for label, _ in times):
        per_pair = {s: statistics.median(ms) / pairs[s] for (name, s), ms in times.items() if name == label}
        # few candidates are scored one by one, many are looked up among all: two algorithms, no single power
        power = None if label.startswith(f"{SHARE:.0%}") else growth({s: ms for s, ms in per_pair.items() if s >= 32})
        result["pixels"][label] = {"ms_per_pair": {s**2: ms for s, ms in per_pair.items()}, "exponent": power}
        cells = [f"{per_pair[side]:.3f}" if side in per_pair else "–" for side in args.search_sizes]
        rows.append((label, *cells, "–" if power is None else f"n^{power:.2f}"))
    print(f"\nsearch of one pair, {count} interleaved repetitions (3 of one by one); n: pixels")
    table(("ms a pair", *(f"{side}×{side}" for side in args.search_sizes), "growth from 32²"), rows)
    return result


def growth(milliseconds: dict[int, float]) -> float | None:
    """The exponent p of time ~ pixels^p, by least squares in logarithms, of times by the side; None of a single one."""
    if len(milliseconds) < 2:
        return None
    return float(np.polyfit(2 * np.log(list(milliseconds)), np.log(list(milliseconds.values())), 1)[0])


def maps_of(count: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Saliency [B, side, side] of pairs with mass 0.4 and 0.6: fine-grained maps of the crops, as SAGE blurs them."""
    images, _ = batch_of(2 * count, side, side, torch.device("cpu"))
    known = fine_grained_saliency((images * 60 + 120).clamp(0, 255).to(torch.uint8)).float()
    maps = gaussian_blur(known, 5, 1.0).to(device)
    unit = maps / maps.sum(dim=(1, 2), keepdim=True)
    return 0.4 * unit[:count], 0.6 * unit[count:]


def plot_search(path: Path, result: dict[str, Any], about: dict[str, Any]) -> None:
    """Cost of one pair's search against its pixels, both axes logarithmic."""
    machine = f"{about.get('gpu') or about['cpu']}, {about['threads']} threads"
    figure, axes = pictures.one_panel(6, 4, machine)
    for (label, line), marker, colour in zip(result["pixels"].items(), "os^", pictures.THREE, strict=False):
        points = line["ms_per_pair"]
        grows = f": n^{line['exponent']:.2f}" if line["exponent"] else ""
        axes.loglog(list(points), list(points.values()), marker=marker, color=colour, label=label + grows)
    sizes = sorted({pixels for line in result["pixels"].values() for pixels in line["ms_per_pair"]})
    axes.set_xticks(sizes, [f"{math.isqrt(n)}×{math.isqrt(n)}" for n in sizes])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("image [pixels]")
    axes.set_ylabel("search of one pair [ms]")
    axes.grid()
    axes.legend()
    pictures.save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
