"""What searching more offsets buys SAGE: the score that is kept, how labels are mixed, and the accuracy of runs.

    python3 scripts/study_offsets.py --checkpoint RUNS/…/checkpoint.pth.tar --data_dir DATA --runs RUNS --plot P.png

Pairs are random test images under the checkpoint's network, saliency and λ as in a training step, but a λ for each
pair. They are searched among 1 %, 10 % and all of the offsets; a score is what both maps, laid over each other, keep of
their mass, here as a share of the best there is, which trying every offset finds. Accuracies are the finished SAGE runs
below --runs (folders, or tables of scripts/summarize.py) whose settings differ in --rand_pos and seed alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load_data import Split, test_batches
from mixup import build_method
from mixup.base import Method, Mixed
from mixup.search import best_offsets, every_offset, exact_scores
from utils import checkpoint, options, tables
from utils.device import pick_device, prepare, set_precision
from utils.errors import BadArguments, UserError, exit_code
from utils.files import atomic_write
from utils.options import Parser, number

SHARES = (0.01, 0.1, 1.0)
COLOURS = dict(zip(SHARES, ("#999999", "#56b4e9", "#d55e00"), strict=True))
BATCH = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Study, print and plot; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", required=True, help="of a SAGE run, or of any other")
    add("--data_dir", required=True, help="as main.py takes it")
    add("--runs", nargs="*", type=Path, default=[], help="where finished runs are")
    add("--plot", type=Path, required=True, help="PNG to write")
    add("--pairs", type=number(int, low=BATCH), default=1000, help="how many pairs, in hundreds (default: %(default)s)")
    add("--ngpu", type=number(int, low=0), default=1, help="0: on the CPU")
    args = parser.parse_args(argv)
    return exit_code(parser, lambda: study(args))


def study(args: argparse.Namespace) -> int:
    if not args.plot.absolute().parent.is_dir():
        raise BadArguments(f"there is no folder {args.plot.parent} for {args.plot}")
    kept, shares, milliseconds = search_pairs(args)
    accuracy = accuracies(args.runs)
    print(f"\n{len(kept[1.0])} pairs; score as a share of the best; share of the label that is image a's")
    print("| offsets | ms a batch of 100 | score, mean | 5 % of pairs below | label, mean | 5 % – 95 % | accuracy, % |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for share in SHARES:
        low, high = np.quantile(shares[share], [0.05, 0.95])
        of_runs, worst = ", ".join(f"{value:.2f}" for value in accuracy[share]), np.quantile(kept[share], 0.05)
        print(
            f"| {share:.0%} | {milliseconds[share]:.1f} | {kept[share].mean():.4f} | {worst:.4f} "
            f"| {shares[share].mean():.3f} | {low:.2f} – {high:.2f} | {of_runs or '–'} |"
        )
    print(f"\nscore of the search of all offsets below the best there is: at most {1 - kept[1.0].min():.1e} of it")
    plot(args.plot, kept, shares, accuracy)
    print(f"\n{args.plot}")
    return 0


def search_pairs(args: argparse.Namespace) -> tuple[dict[float, Any], dict[float, Any], dict[float, float]]:
    """For each share of the offsets: scores over the best ones, ratios of the labels, and ms a batch."""
    device = pick_device(args.ngpu)
    set_precision(False)
    command = ["--evaluate", "--resume", args.checkpoint, "--data_dir", args.data_dir, "--ngpu", str(args.ngpu)]
    settings, given = options.parse(command)
    network, data, _ = checkpoint.network_and_images(settings, given)
    model, data = prepare(network.model, device, False), data.to(device)
    if len(data.test) < BATCH:
        raise UserError(f"{data.source} has {len(data.test)} test images; {BATCH} are needed")
    of_method = options.method_settings(settings) if settings.method == "sage" else {}
    of_method |= {"update_ratio": 1.0}  # saliency is the same, and no gradients in the weights are computed
    methods = {
        share: build_method("sage", settings.dataset, len(data.classes), **{**of_method, "rand_pos": share})
        for share in SHARES
    }
    model.train()
    chosen = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0)).to(device)  # not class by class
    pairs = Split(data.test.images[chosen], data.test.labels[chosen])
    kept, shares, times = defaultdict(list), defaultdict(list), defaultdict(list)
    for number_of_batch, (images, labels) in enumerate(test_batches(pairs, data, batch_size=BATCH, device=device)):
        if len(images) < BATCH or number_of_batch * BATCH >= args.pairs:
            break
        best = None
        lam = lam_of_each(number_of_batch, methods[1.0], device)
        for share, method in methods.items():
            draws = method.draw(np.random.default_rng(number_of_batch), BATCH, *images.shape[2:])  # the same pairs
            draws.lam = lam
            mixed = method.mix(model, images, labels, draws)
            assert mixed.mask is not None
            a, b = laid_out(mixed, lam)
            started = now(device)
            offsets = best_offsets(a, b, draws.candidates)
            times[share].append(1000 * (now(device) - started))
            best = best_score(a, b) if best is None else best
            kept[share].append((exact_scores(a, b, offsets[:, None])[:, 0] / best).cpu().numpy())
            shares[share].append(mixed.mask.mean(dim=(1, 2)).cpu().numpy())
    return (
        {share: np.concatenate(values) for share, values in kept.items()},
        {share: np.concatenate(values) for share, values in shares.items()},
        {share: float(np.median(values)) for share, values in times.items()},
    )


def best_score(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The highest score [B] there is for each pair, by trying every offset."""
    _, height, width = a.shape
    offsets = every_offset(height, width, a.device)
    return exact_scores(a, b, offsets.expand(len(a), -1, -1)).amax(dim=1)


def laid_out(mixed: Mixed, lam: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Saliency [B, H, W] of images a and b with mass λ and 1 − λ, as it is searched."""
    assert mixed.saliency is not None
    a, b = (maps / maps.sum(dim=(1, 2), keepdim=True) for maps in mixed.saliency)
    return lam * a, (1 - lam) * b


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def lam_of_each(number_of_batch: int, method: Method, device: torch.device) -> torch.Tensor:
    """λ of each pair, [BATCH, 1, 1]; a training step draws one for the whole batch."""
    values = [method.draw(np.random.default_rng((number_of_batch, i)), 1, 32, 32).lam for i in range(BATCH)]
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def accuracies(roots: Sequence[Path]) -> dict[float, list[float]]:
    """Final accuracies of the finished SAGE runs, a list for each share of the offsets."""
    found: dict[float, list[float]] = {share: [] for share in SHARES}
    if roots:
        runs, _ = tables.counted(tables.read_runs(roots))
        runs = runs[runs["method"] == "sage"]
        shares = runs["settings"].str.extract(r"rand_pos=(\S+)", expand=False).astype(float)
        others = runs[tables.must_agree(runs.columns)].drop(columns=["table", "label"])
        others["settings"] = others["settings"].str.replace(r"rand_pos=\S+ ?", "", regex=True)
        if len(others.drop_duplicates()) > 1:
            raise UserError("--runs holds SAGE runs that differ in more than --rand_pos and seed")
        for share in SHARES:
            found[share] = runs["final"][shares == share].tolist()
    return found


def plot(path: Path, kept: dict[float, Any], shares: dict[float, Any], accuracy: dict[float, list[float]]) -> None:
    """Score, share of the label and, if there are runs, accuracy."""
    panels = 3 if any(accuracy.values()) else 2
    figure = Figure(figsize=(3.4 * panels, 3), layout="constrained", dpi=130)
    score, label, *rest = figure.subplots(1, panels)
    for share in SHARES:
        style: dict[str, Any] = {"color": COLOURS[share], "label": f"{share:.0%} of the offsets", "linewidth": 1.8}
        if share < 1:
            values = np.sort(kept[share])
            score.plot(values, np.arange(1, len(values) + 1) / len(values), **style)
        label.hist(shares[share], bins=np.linspace(0, 1, 26), histtype="step", density=True, **style)
    score.axvline(1, color=COLOURS[1.0], linewidth=1.8)
    score.set(xlabel="score kept, as a share of the best", ylabel="share of the pairs", ylim=(0, 1))
    label.set(xlabel="share of the label that is image a's", ylabel="density", xlim=(0, 1))
    score.legend(*label.get_legend_handles_labels(), frameon=False, fontsize=8, loc="upper left")
    for runs in rest:
        for place, share in enumerate(SHARES):
            points = accuracy[share]
            runs.plot([place] * len(points), points, "o", color=COLOURS[share], alpha=0.8)
            if points:
                runs.plot([place - 0.2, place + 0.2], [np.mean(points)] * 2, color=COLOURS[share], linewidth=2)
        runs.set_xticks(range(len(SHARES)), [f"{share:.0%}" for share in SHARES])
        runs.set(xlabel="offsets searched", ylabel="test accuracy, %", xlim=(-0.6, len(SHARES) - 0.4))
    for axes in (score, label, *rest):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    sys.exit(main())
