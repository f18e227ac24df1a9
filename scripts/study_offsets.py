"""What searching more offsets buys SAGE: the score that is kept, and how labels are mixed.

    python3 scripts/study_offsets.py --checkpoint RUNS/…/checkpoint.pth.tar --data_dir DATA --plot figures/offsets.png

Pairs are random test images under the checkpoint's network, saliency and λ as in a training step, but a λ for each
pair. They are searched among 1%, 10% and all of the offsets; a score is what both overlaid maps keep of their mass, as
a share of the best there is, which trying every offset finds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load_data import Split, test_batches
from mixup import build_method
from mixup.search import best_offsets, every_offset, exact_scores
from utils import checkpoint, options, pictures
from utils.device import pick_device, prepare
from utils.errors import UserError, exit_code

SHARES = dict(zip((0.01, 0.1, 1.0), pictures.THREE, strict=True))  # of the offsets, with their colours
BATCH, BATCHES = 100, 10


def main(argv: Sequence[str] | None = None) -> int:
    """Study, print and plot; returns the exit code."""
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="of a SAGE run, or of any other")
    parser.add_argument("--data_dir", required=True, help="as main.py takes it")
    parser.add_argument("--plot", type=Path, required=True, help="PNG to write")
    parser.add_argument("--ngpu", type=options.number(int, low=0), default=1, help="0: on the CPU")
    args = parser.parse_args(argv)
    if not args.plot.absolute().parent.is_dir():
        parser.error(f"there is no folder {args.plot.parent} for {args.plot}")
    return exit_code(parser, lambda: study(args))


def study(args: argparse.Namespace) -> int:
    """Print a row for each share of the offsets: mean and 5% quantile of the score, mean and 5%, 95% of the label."""
    pairs = search_pairs(args)
    print(f"{BATCH * BATCHES} pairs; score as a share of the best; share of the label that is image a's\n")
    print("| offsets | score, mean | 5% of pairs below | label, mean | 5% – 95% |\n| --- | ---: | ---: | ---: | ---: |")
    for share, of_share in pairs.groupby("share"):
        score, label = of_share["score"], of_share["label"]
        low, high = label.quantile([0.05, 0.95])
        cells = f"{score.mean():.4f} | {score.quantile(0.05):.4f} | {label.mean():.3f} | {low:.2f} – {high:.2f}"
        print(f"| {share:.0%} | {cells} |")
    pictures.attempt(plot, args.plot, pairs)
    return 0


def search_pairs(args: argparse.Namespace) -> pd.DataFrame:
    """A row for each pair and share of the offsets: score over the best there is, and image a's part of the label."""
    device = pick_device(args.ngpu)
    words = ["--evaluate", "--resume", args.checkpoint, "--data_dir", args.data_dir, "--ngpu", str(args.ngpu)]
    settings, given = options.parse(words)
    network, data, _ = checkpoint.network_and_images(settings, given)
    model, data = prepare(network.model, device, False).train(), data.to(device)
    if len(data.test) < BATCH * BATCHES:
        raise UserError(f"{data.source} has {len(data.test)} test images; {BATCH * BATCHES} are needed")
    of_method = options.method_settings(settings) if settings.method == "sage" else {}
    chosen = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[: BATCH * BATCHES].to(device)
    split = Split(data.test.images[chosen], data.test.labels[chosen])
    found = []
    for number, (images, labels) in enumerate(test_batches(split, data, batch_size=BATCH, device=device)):
        every = every_offset(*images.shape[2:], device).expand(BATCH, -1, -1)
        for share in SHARES:
            sage = build_method("sage", settings.dataset, len(data.classes), **{**of_method, "rand_pos": share})
            draws = sage.draw(np.random.default_rng(number), BATCH, *images.shape[2:])  # the same pairs
            each = [sage.draw(np.random.default_rng((number, i)), 1, 32, 32).lam for i in range(BATCH)]
            draws.lam = torch.tensor(each, dtype=torch.float32, device=device)[:, None, None]
            mixed = sage.mix(model, images, labels, draws)
            assert mixed.saliency is not None
            assert mixed.mask is not None
            a, b = (maps / maps.sum(dim=(1, 2), keepdim=True) for maps in mixed.saliency)
            a, b = draws.lam * a, (1 - draws.lam) * b
            kept = exact_scores(a, b, best_offsets(a, b, draws.candidates)[:, None])[:, 0]
            score = kept / exact_scores(a, b, every).amax(dim=1)
            label = mixed.mask.mean(dim=(1, 2))
            found.append(pd.DataFrame({"share": share, "score": score.cpu().numpy(), "label": label.cpu().numpy()}))
    return pd.concat(found)


def plot(path: Path, pairs: pd.DataFrame) -> None:
    """How the scores, and image a's parts of the labels, are distributed."""
    figure = Figure(figsize=(7.5, 3.2))
    score, label = figure.subplots(1, 2)
    for share, colour in SHARES.items():
        of_share, style = pairs[pairs["share"] == share], {"color": colour, "linewidth": 1.8}
        score.ecdf(of_share["score"], label=f"{share:.0%} of the offsets", **style)
        label.hist(of_share["label"], bins=np.linspace(0, 1, 26), histtype="step", density=True, **style)
    score.set(xlabel="score kept, as a share of the best", ylabel="share of the pairs")
    label.set(xlabel="share of the label that is image a's", ylabel="density", xlim=(0, 1))
    score.legend(loc="upper left")
    pictures.save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
