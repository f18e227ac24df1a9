"""Three images, and below them what every method that mixes images makes of them.

    python3 scripts/compare.py --image_size 224 --seed 1     # the README's figure, of the photographs named below
    python3 scripts/compare.py cat.jpg dog.jpg bird.jpg --out animals.pdf
    python3 scripts/compare.py --dataset cifar10 --data_dir DATA --seed 7 --checkpoint RUNS/…/model_best.pth.tar
    python3 scripts/compare.py --image_size 224 --seed 1 --strips figures/methods     # each method and its mask

The first image is mixed with the second; Co-Mixup mixes all three, and its most evenly shared output is shown. λ is
--lam, SAGE searches all offsets, and Puzzle Mix moves whole mask blocks. Images are cropped to the smallest height and
width among them, rounded down to a multiple of 32.

Saliency (Puzzle Mix, Co-Mixup, SAGE) is SaliencyMix's fine-grained map; with a checkpoint the size of its network's
gradient, at the resolution it was trained at, for the true label of a data set's image and its guess elsewhere.

The photographs shown when no image is named: flower.jpg (by vultilion) and china.jpg (by danielbuechele) of
scikit-learn, both from flickr.com under CC BY 2.0, and grace_hopper.jpg of Matplotlib, a portrait by the US Navy in the
public domain. All are cropped and mixed here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps, rcdefaults
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import load_data
from mixup import METHODS, build_method
from mixup.base import Method, Mixed
from mixup.manifold import ManifoldMixup
from mixup.saliency import fine_grained_saliency, root_mean_square, saliency_pass
from mixup.settings import NORMALISATION
from models import ARCHITECTURES, build_model
from utils import images, pictures
from utils.checkpoint import load_network
from utils.errors import BadArguments, UserError, exit_code
from utils.options import Parser, number, one_of

SIDE = 32  # images are cropped to multiples of it; SAGE's blur is a pixel of images of this side
GAP = 6  # pixels between images
WIDTH, STRIP_TILE = 900, 112  # pixels at which the picture and an image of a strip are shown
TEXT = 12.5  # pixels


class Sources(NamedTuple):
    """Three images [3, 3, H, W] in [0, 1], their names, and, of a data set, their labels and its classes."""

    pixels: Tensor
    names: list[str]
    labels: Tensor | None = None
    classes: Sequence[str] = ()


class Tile(NamedTuple):
    """One image of a picture, colours [3, H, W] in [0, 1] or a map [H, W], and the text above and below it."""

    title: str
    image: Tensor
    caption: str = ""


class Shown(NamedTuple):
    """A mixed image [3, H, W], or the mean size of mixed features [H, W]; the sources' shares in its target [3]; and
    what led to it."""

    image: Tensor
    shares: Tensor
    steps: Sequence[Tile] = ()


class Saliency(NamedTuple):
    """Maps [3, H, W] of the sources, the pixels that SAGE's blur spans, and a note on where they come from."""

    maps: Tensor
    blur: float
    note: str


def main(argv: Sequence[str] | None = None) -> int:
    """Plot; returns the exit code: 0, 1 for a failure, 2 for bad arguments."""
    parser = make_parser()
    args = parser.parse_args(argv)
    return exit_code(parser, lambda: compare(args))


def compare(args: argparse.Namespace) -> int:
    """Read, mix and plot what the arguments say, whatever the user's matplotlibrc is."""
    rcdefaults()
    check(args)
    sources = read_sources(args)
    saliency = saliency_of(sources, args)
    shown = {name: show(name, sources, saliency, args) for name in METHODS}
    if args.strips:
        args.strips.mkdir(parents=True, exist_ok=True)
        for name, result in shown.items():
            pictures.save(strip(sources, result), args.strips / f"{name}.png")
            print(args.strips / f"{name}.png")
    else:
        mixed = {name: one for name, one in shown.items() if one.image.ndim == 3 and one.shares.max() < 1}
        pictures.save(rows(sources, saliency.note, mixed), args.out)
        print(args.out)
    return 0


def make_parser() -> Parser:
    parser = Parser(
        description=__doc__, prog="compare.py", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("images", nargs="*", type=Path, help="three PNG, JPEG or WebP files")
    add("--dataset", type=one_of(load_data.DATASETS), help="instead: three random test images of different classes")
    add("--data_dir", help="where that data set is (default: .)")
    add("--image_size", type=number(int, low=SIDE), help="side to bring images to (default: their own)")
    add("--checkpoint", type=Path, help="of this project or published; its network gives the saliency")
    add("--arch", type=one_of(ARCHITECTURES), help="network of a --checkpoint that does not name it")
    add("--trained_on", type=one_of(tuple(NORMALISATION)), help="data set of a checkpoint that does not name it")
    add("--lam", type=number(float, low=0, high=1), default=0.5, help="share of the first image (default: %(default)s)")
    add("--seed", type=number(int, low=0), default=0, help="of the random choices (default: %(default)s)")
    add("--out", type=Path, help="PNG, PDF or SVG (default: figures/comparison.png)")
    add("--strips", type=Path, metavar="FOLDER", help="instead: a picture of each method into this folder")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    if len(args.images) not in (0, 3):
        raise BadArguments(f"name three images, not {len(args.images)}")
    if args.images and args.dataset:
        raise BadArguments("name three images or a --dataset, not both")
    unused = {"--data_dir": args.data_dir and not args.dataset, "--out": args.out and args.strips}
    unused |= {"--image_size": args.image_size and args.dataset not in (None, "folder")}
    unused |= {f"--{name}": getattr(args, name) and not args.checkpoint for name in ("arch", "trained_on")}
    if dropped := [flag for flag, is_unused in unused.items() if is_unused]:
        raise BadArguments(f"{' and '.join(dropped)} would have no effect here: see --help")
    args.data_dir, args.out = args.data_dir or ".", args.out or Path("figures/comparison.png")
    if args.out.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise BadArguments(f"--out {args.out} must end in .png, .pdf or .svg")
    if not args.strips and not args.out.absolute().parent.is_dir():
        raise BadArguments(f"--out {args.out}: there is no folder {args.out.parent}")


# -------------------------------------------------------------------------------------------------------------- sources


def read_sources(args: argparse.Namespace) -> Sources:
    """The images the user named, random ones of a data set, or the photographs."""
    if args.dataset:
        size = args.image_size if args.dataset == "folder" else None
        data = load_data.load(args.dataset, args.data_dir, image_size=size, labels_per_class=1)
        rng = np.random.default_rng(args.seed)
        if len(data.classes) < 3:
            raise UserError(f"{args.data_dir} has {len(data.classes)} classes; three are needed")
        of_class = [torch.nonzero(data.test.labels == k)[:, 0] for k in rng.permutation(len(data.classes))]
        chosen = torch.stack([members[rng.integers(len(members))] for members in of_class if len(members)][:3])
        labels = data.test.labels[chosen]
        height, width = cropped(data.image_size)
        pixels = data.test.images[chosen, :, :height, :width].float() / 255
        return Sources(pixels, [data.classes[label].capitalize() for label in labels], labels, data.classes)
    paths = args.images or [
        Path(str(resources.files("sklearn.datasets.images") / "china.jpg")),
        Path(str(resources.files("sklearn.datasets.images") / "flower.jpg")),
        Path(str(resources.files("matplotlib") / "mpl-data" / "sample_data" / "grace_hopper.jpg")),
    ]
    shapes = [images.image_shape(str(path)) for path in paths]
    height, width = cropped([args.image_size or min(sides) for sides in zip(*shapes, strict=True)])
    files = np.stack([images.read_image(str(path), height, width) for path in paths])
    names = [path.stem.replace("_", " ").title() for path in paths]
    return Sources(torch.from_numpy(files).permute(0, 3, 1, 2).float() / 255, names)


def cropped(sides: Sequence[int]) -> list[int]:
    """Height and width, rounded down to what all block counts divide."""
    if min(sides) < SIDE:
        raise UserError(
            f"the smallest height and width of these images, {sides[0]}×{sides[1]}, are below {SIDE} pixels"
        )
    return [side - side % SIDE for side in sides]


# ------------------------------------------------------------------------------------------------------------- saliency


def saliency_of(sources: Sources, args: argparse.Namespace) -> Saliency:
    """The sources' saliency: fine-grained maps, or gradients of the checkpoint's network."""
    shorter = min(sources.pixels.shape[2:])
    if args.checkpoint is None:
        maps = fine_grained_saliency(to_bytes(sources.pixels)).clamp(min=1).float()  # no pixel has no weight at all
        return Saliency(maps, shorter / SIDE, "Saliency:\nfine-grained map")
    network, about = load_network(args.checkpoint, arch=args.arch, dataset=args.trained_on)
    scale = min(about.image_size) / shorter

    def logits(pixels: Tensor) -> Tensor:
        small = F.interpolate(pixels, scale_factor=scale, mode="bilinear", antialias=True)
        return network(small if scale != 1 else pixels)

    labels = sources.labels
    if labels is None or args.dataset != about.dataset or sources.classes != (about.classes or sources.classes):
        with torch.no_grad():
            labels = logits(sources.pixels).argmax(dim=1)
    gradient, _ = saliency_pass(logits, sources.pixels, lambda out: F.cross_entropy(out, labels, reduction="sum"))
    note = f"Saliency:\ngradient of {about.arch},\ntrained on {about.dataset or 'unnamed images'}"
    return Saliency(root_mean_square(gradient), 1 / scale, note)


def to_bytes(pixels: Tensor) -> Tensor:
    return (255 * pixels).round().to(torch.uint8)


# --------------------------------------------------------------------------------------------------------------- mixing


class Chosen(np.random.Generator):
    """Random numbers, but for λ, which is given, the shares of several images, which are equal, and the pairs: every
    image is mixed with the next one."""

    def __init__(self, seed: int, lam: float) -> None:
        super().__init__(np.random.PCG64(seed))
        self.lam = lam

    def beta(self, a: Any, b: Any, size: Any = None) -> Any:
        return self.lam

    def dirichlet(self, alpha: Any, size: Any = None) -> Any:
        return np.full(len(alpha), 1 / len(alpha))

    def permutation(self, x: Any, axis: int = 0) -> Any:
        return np.roll(np.arange(x), -1)


def show(name: str, sources: Sources, saliency: Saliency, args: argparse.Namespace) -> Shown:
    """What a method makes of the sources."""
    blur = max(1.0, saliency.blur)
    method = build_method(
        name, "", 3, mean=(0, 0, 0), std=(1, 1, 1), clean_lam=0.0,
        rand_pos=1.0, blur_sigma=blur, kernel_size=2 * int(2 * blur) + 1, t_size=-1,
    )  # fmt: skip
    rng, pixels = Chosen(args.seed, args.lam), sources.pixels
    if isinstance(method, ManifoldMixup):
        return features(method, pixels, rng)
    for _ in range(20):  # the first draws that do not leave the batch as it is, if any do
        draws = method.draw(rng, 3, *pixels.shape[2:])
        known = saliency.maps if method.takes_saliency else None
        mixed = method.mix(None, pixels, torch.arange(3), draws, saliency=known)
        if mixed.images is not pixels:
            break
    assert mixed.images is not None
    if mixed.partner is not None:
        return Shown(mixed.images[0], mixed.targets[0], list(tiles_of_pair(method, sources, mixed, args.lam)))
    output = int(torch.special.entr(mixed.targets).sum(dim=1).argmax())
    return Shown(mixed.images[output], mixed.targets[output], list(tiles_of_all(method, mixed, draws, output)))


def features(method: ManifoldMixup, pixels: Tensor, rng: np.random.Generator) -> Shown:
    """Manifold Mixup after the first stage of an untrained network, whose features still look like images."""
    torch.manual_seed(0)
    network: Any = build_model("preactresnet18", 3).eval()
    seen: list[Tensor] = []
    network.layer1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    network.layer2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    method.points = [network.layer1]  # type: ignore[assignment]
    draws = method.draw(rng, 3, *pixels.shape[2:])
    draws.mix_at = 1
    with torch.no_grad():
        mixed = method.step(network, pixels, torch.arange(3), draws).mixed
    a, b, made = seen[0][0], seen[0][1], seen[1][0]
    tiles = [Tile("Features of a", a.abs().mean(dim=0)), Tile("Features of b", b.abs().mean(dim=0))]
    return Shown(made.abs().mean(dim=0), mixed.targets[0], tiles)


def tiles_of_pair(method: Method, sources: Sources, mixed: Mixed, lam: float) -> Iterator[Tile]:
    """From the first two images to the first mixed one."""
    if mixed.saliency is not None:
        a, b = (maps[0] for maps in mixed.saliency)
        yield Tile("Saliency of a", a)
        yield Tile("Saliency of b", b)
    if method.name == "saliencymix":
        yield Tile("Saliency of b", fine_grained_saliency(to_bytes(sources.pixels[1:2]))[0].float())
    if mixed.mask is None or mixed.mask[0].min() == mixed.mask[0].max():
        return
    mask = mixed.mask[0]
    if method.name == "sage":  # A/(A + B') is its mask, so that both maps together are A over the mask
        yield Tile("Both, b moved", torch.where(mask > 0, lam * a / a.sum() / mask, 0))
    yield Tile("Weight of a", mask.expand(3, *mask.shape))


def tiles_of_all(method: Method, mixed: Mixed, draws: Any, output: int) -> Iterator[Tile]:
    """From three images to a mixed one, which may show any of them in any place."""
    if mixed.saliency is None:
        return
    maps = mixed.saliency[0]
    yield from (Tile(f"Saliency of {name}", of) for name, of in zip("abc", maps, strict=True))
    # the same assignment once more, of images of one colour
    colours = torch.tensor([to_rgb(colour) for colour in pictures.THREE])
    colours = colours[:, :, None, None].repeat(1, 1, *maps.shape[1:])
    of_colours = method.mix(None, colours, torch.arange(3), draws, saliency=maps)
    if of_colours.images is not None and torch.equal(of_colours.targets, mixed.targets):
        yield Tile("Cells", of_colours.images[output], "a blue\nb orange\nc green")


# ------------------------------------------------------------------------------------------------------------- plotting


def rows(sources: Sources, origin: str, results: dict[str, Shown]) -> Figure:
    """The sources, and below them every method's image over its target; twice as fine as it is shown."""
    above = [Tile(name, image) for name, image in zip(sources.names, sources.pixels, strict=True)]
    below = [Tile(METHODS[name].title, mixed.image, target(sources, mixed)) for name, mixed in results.items()]
    return plot([above, below], (WIDTH - GAP) / max(3, len(below)) - GAP, dpi=200, note=origin)


def strip(sources: Sources, mixed: Shown) -> Figure:
    """One method from its sources to its mixed image."""
    made = Tile("Mixed" if mixed.shares.max() < 1 else "Unmixed", mixed.image, target(sources, mixed))
    last = int(mixed.shares.nonzero().max()) + 1
    tiles = [Tile(f"{'abc'[i]}: {sources.names[i]}", sources.pixels[i]) for i in range(last)] if last > 1 else []
    return plot([[*tiles, *mixed.steps, made]], STRIP_TILE, dpi=100)


def target(sources: Sources, mixed: Shown) -> str:
    """The target as text, a line a source."""
    percent = [round(100 * share) for share in mixed.shares.tolist()]
    return "\n".join(f"{value}% {name}" for value, name in zip(percent, sources.names, strict=True) if value)


def plot(tiles: Sequence[Sequence[Tile]], width: float, dpi: int, note: str = "") -> Figure:
    """Rows of tiles, each row in the middle. ``width`` of a tile: pixels at 100 dpi; ``note``: at the top left."""
    height = width * tiles[0][0].image.shape[-2] / tiles[0][0].image.shape[-1]
    lines = [max(tile.caption.count("\n") + bool(tile.caption) for tile in row) for row in tiles]
    heights = [1.8 * TEXT + height + (0.5 + 1.3 * count) * TEXT for count in lines]
    across, down = max(map(len, tiles)) * (width + GAP) + GAP, sum(heights)
    figure = Figure(figsize=(across / 100, down / 100), dpi=dpi)
    style: dict[str, Any] = {"fontsize": 0.72 * TEXT, "linespacing": 1.25}
    figure.text(GAP / across, 1 - 0.4 * TEXT / down, note, va="top", color="0.35", **style)
    for i, row in enumerate(tiles):
        top = down - sum(heights[:i]) - 1.8 * TEXT
        for j, tile in enumerate(row):
            left = (across - len(row) * (width + GAP) + GAP) / 2 + j * (width + GAP)
            axes = figure.add_axes((left / across, (top - height) / down, width / across, height / down))
            axes.set(xticks=[], yticks=[])
            axes.imshow(pixels_of(tile.image), aspect="auto")
            axes.spines[:].set(color="0.6", linewidth=0.5)
            middle = (left + width / 2) / across
            figure.text(middle, (top + 0.6 * TEXT) / down, tile.title, va="baseline", ha="center", **style)
            figure.text(middle, (top - height - 0.4 * TEXT) / down, tile.caption, va="top", ha="center", **style)
    return figure


def pixels_of(image: Tensor) -> np.ndarray:
    """Colours [3, H, W] as they are, a map [H, W] from black (0) over red to white (its maximum): uint8 [H, W, 3]."""
    if image.ndim == 2:
        return colormaps["magma"]((image / image.max().clamp(min=1e-30)).numpy(), bytes=True)[..., :3]
    return to_bytes(image.clamp(0, 1)).permute(1, 2, 0).numpy()


if __name__ == "__main__":
    sys.exit(main())
