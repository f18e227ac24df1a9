"""Three images, their saliency, and below them what every method that mixes images makes of them.

    python3 scripts/compare.py --image_size 224 --seed 1     # the README's figure, of the photographs named below
    python3 scripts/compare.py cat.jpg dog.jpg bird.jpg --out animals.pdf
    python3 scripts/compare.py --dataset cifar10 --data_dir DATA --seed 7 --checkpoint RUNS/…/model_best.pth.tar
    python3 scripts/compare.py --image_size 224 --seed 1 --strips figures/methods     # each method and its mask

The first image is mixed with the second; Co-Mixup mixes all three, and its most evenly shared output is shown. λ is
--lam, SAGE searches all offsets, and Puzzle Mix moves whole mask blocks. Images are cropped to the smallest height and
width among them, rounded down to a multiple of 32. Saliency is the gradient of the checkpoint's network, at its
resolution, for a data set's labels where it was trained on it, else for its guesses; without a checkpoint SaliencyMix's
fine-grained map. SAGE blurs it by a pixel of that resolution, or by 1/32 of the shorter side.

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
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import load_data
from mixup import METHODS, build_method
from mixup.base import Method, Mixed
from mixup.saliency import fine_grained_saliency, mean_magnitude, saliency_pass
from mixup.settings import NORMALISATION
from models import ARCHITECTURES, build_model
from utils import images, pictures
from utils.checkpoint import load_network
from utils.errors import UserError, exit_code
from utils.options import Parser, given_names, number, one_of

SIDE = 32  # images are cropped to multiples of it; without a network, SAGE's blur is a pixel of images of this side
INCHES = 1.15  # of an image


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


def main(argv: Sequence[str] | None = None) -> int:
    """Plot; returns the exit code: 0, 1 for a failure, 2 for bad arguments."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if len(args.images) not in (0, 3) or (args.images and args.dataset):
        parser.error(f"name three images or a --dataset, not {len(args.images)} images")
    if args.out.suffix not in (".png", ".pdf"):
        parser.error(f"--out {args.out} must end in .png or .pdf")
    given = given_names(make_parser(), sys.argv[1:] if argv is None else argv)
    for names, needed in (({"data_dir"}, "dataset"), ({"arch", "trained_on"}, "checkpoint")):
        if (unused := names & given) and needed not in given:
            parser.error(f"--{min(unused)} would have no effect without --{needed}")
    if {"out", "strips"} <= given:
        parser.error("--out would have no effect with --strips")
    return exit_code(parser, lambda: compare(args))


def compare(args: argparse.Namespace) -> int:
    """Read, mix and plot what the arguments say."""
    pictures.use_style()
    sources = read_sources(args)
    maps, blur, origin = saliency_of(sources, args)
    strips = {name: strip(name, sources, maps, blur, Chosen(args.seed, args.lam)) for name in METHODS}
    if args.strips:
        for name, tiles in strips.items():
            plot(args.strips / f"{name}.png", [tiles], dpi=100)
        return 0
    above = [Tile(name, image) for name, image in zip(sources.names, sources.pixels, strict=True)]
    above += [Tile("Saliency", image, origin) for image in maps]
    mixed = [(name, tiles[-1]) for name, tiles in strips.items() if tiles[-1].title == "Mixed"]
    plot(args.out, [above, [tile._replace(title=METHODS[name].title) for name, tile in mixed]], dpi=200)
    return 0


def make_parser() -> Parser:
    parser = Parser(
        description=__doc__, prog="compare.py", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("images", nargs="*", type=Path, help="three PNG, JPEG or WebP files")
    add("--dataset", type=one_of(load_data.DATASETS), help="instead: three random test images of different classes")
    add("--data_dir", default=".", help="where that data set is (default: .)")
    add("--image_size", type=number(int, low=SIDE), help="side to bring images to (default: their own)")
    add("--checkpoint", type=Path, help="of this project or published; its network gives the saliency")
    add("--arch", type=one_of(ARCHITECTURES), help="network of a --checkpoint that does not name it")
    add("--trained_on", type=one_of(tuple(NORMALISATION)), help="data set of a checkpoint that does not name it")
    add("--lam", type=number(float, low=0, high=1), default=0.5, help="share of the first image (default: %(default)s)")
    add("--seed", type=number(int, low=0), default=0, help="of the random choices (default: %(default)s)")
    add("--out", type=Path, default=Path("figures/comparison.png"), help="PNG or PDF (default: %(default)s)")
    add("--strips", type=Path, metavar="FOLDER", help="instead: a picture of each method into this folder")
    return parser


def read_sources(args: argparse.Namespace) -> Sources:
    """The images the user named, random ones of a data set, or the photographs."""
    if args.dataset:
        data = load_data.load(args.dataset, args.data_dir, image_size=args.image_size, labels_per_class=1)
        rng = np.random.default_rng(args.seed)
        if len(data.classes) < 3:
            raise UserError(f"{args.data_dir} has {len(data.classes)} classes; three are needed")
        height, width = cropped(data.image_size)
        of_class = [torch.nonzero(data.test.labels == k)[:, 0] for k in rng.permutation(len(data.classes))]
        chosen = torch.stack([members[rng.integers(len(members))] for members in of_class if len(members)][:3])
        labels = data.test.labels[chosen]
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


def saliency_of(sources: Sources, args: argparse.Namespace) -> tuple[Tensor, float, str]:
    """Maps [3, H, W]: gradients of the checkpoint's network, which sees images at its resolution; without one,
    fine-grained maps. And SAGE's blur, in pixels, and where the maps come from."""
    short = min(sources.pixels.shape[2:])
    if args.checkpoint is None:
        maps = fine_grained_saliency((255 * sources.pixels).round().byte())
        return maps.clamp(min=1).float(), short / SIDE, "fine-grained map"  # no pixel has no weight at all
    network, about = load_network(args.checkpoint, arch=args.arch, dataset=args.trained_on)
    scale = min(about.image_size) / short
    size = [round(scale * side) for side in sources.pixels.shape[2:]]
    same = args.dataset == about.dataset and sources.classes == (about.classes or sources.classes)
    labels = sources.labels if same else None

    def logits_of(pixels: Tensor) -> Tensor:
        return network(F.interpolate(pixels, size, mode="bilinear", antialias=True))

    def loss_of(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, logits.argmax(dim=1) if labels is None else labels)

    gradient, _ = saliency_pass(logits_of, sources.pixels, loss_of)
    return mean_magnitude(gradient), max(1, 1 / scale), f"{about.arch},\n{about.dataset or 'unnamed images'}"


class Chosen(np.random.Generator):
    """Random numbers, except that λ is given, several images have equal shares, every image is mixed with the next, and
    a batch that may be left alone is mixed."""

    def __init__(self, seed: int, lam: float) -> None:
        super().__init__(np.random.PCG64(seed))
        self.lam = lam

    def beta(self, a: Any, b: Any, size: Any = None) -> Any:
        return self.lam

    def dirichlet(self, alpha: Any, size: Any = None) -> Any:
        return np.full(len(alpha), 1 / len(alpha))

    def permutation(self, x: Any, axis: int = 0) -> Any:
        return np.roll(np.arange(x), -1)

    def random(self, *args: Any, **kwargs: Any) -> Any:
        return 0.0


def strip(name: str, sources: Sources, maps: Tensor, blur: float, rng: Chosen) -> list[Tile]:
    """A method from its sources to its mixed image; Manifold Mixup to its mixed features."""
    inside = name == "manifold"  # it is Mixup of features
    inputs = features_of(sources.pixels) if inside else sources.pixels
    method = build_method(
        "input" if inside else name, "", 3, mean=(0, 0, 0), std=(1, 1, 1),
        rand_pos=1.0, blur_sigma=blur, kernel_size=2 * int(2 * blur) + 1, t_size=-1,
    )  # fmt: skip
    draws = method.draw(rng, 3, *sources.pixels.shape[2:])
    mixed = method.mix(None, inputs, torch.arange(3), draws, saliency=maps if method.takes_saliency else None)
    assert mixed.images is not None
    output = int(torch.special.entr(mixed.targets).sum(dim=1).argmax()) if mixed.partner is None else 0
    image, shares = mixed.images[output], mixed.targets[output].tolist()
    texts = [f"{100 * share:.0f}% {source}" for share, source in zip(shares, sources.names, strict=True) if share]
    caption = "\n".join(texts)
    if max(shares) == 1:
        return [Tile("Unmixed", image, caption)]
    count = 3 if shares[2] else 2
    tiles = [Tile(f"{letter}: {sources.names[i]}", sources.pixels[i]) for i, letter in enumerate("abc"[:count])]
    if inside:
        a, b, image = (features.abs().mean(dim=0) for features in (inputs[0], inputs[1], image))
        return [*tiles, Tile("Features of a", a), Tile("Features of b", b), Tile("Mixed features", image, caption)]
    return [*tiles, *steps_of(method, sources, mixed, draws, output), Tile("Mixed", image, caption)]


def features_of(pixels: Tensor) -> Tensor:
    """Features behind the first stage of a network with random weights: they still look like images."""
    torch.manual_seed(1)
    network = build_model("preactresnet18", 3).eval()
    with torch.no_grad():
        return network.get_submodule("layer1")(network.get_submodule("conv1")(pixels))


def steps_of(method: Method, sources: Sources, mixed: Mixed, draws: Any, output: int) -> Iterator[Tile]:
    """What leads to a mixed image: saliency, and what shows where."""
    if method.name == "saliencymix":
        yield Tile("Saliency of b", fine_grained_saliency((255 * sources.pixels[1:2]).round().byte())[0].float())
    if mixed.partner is None and mixed.saliency is not None:  # of all three images
        maps = mixed.saliency[0]
        yield from (Tile(f"Saliency of {letter}", of) for letter, of in zip("abc", maps, strict=True))
        # the same assignment once more, of images of one colour
        colours = torch.tensor([to_rgb(colour) for colour in pictures.THREE])[:, :, None, None]
        again = method.mix(None, colours.expand_as(sources.pixels), torch.arange(3), draws, saliency=maps).images
        assert again is not None
        yield Tile("Cells", again[output], "a blue\nb orange\nc green")
        return
    if mixed.saliency is not None:
        a, b = (maps[0] for maps in mixed.saliency)
        yield from (Tile("Saliency of a", a), Tile("Saliency of b", b))
    if mixed.mask is not None and mixed.mask[0].min() < mixed.mask[0].max():
        mask = mixed.mask[0]
        if method.name == "sage":  # A/(A + B') is its mask, so that both maps together are A over the mask
            yield Tile("Both, b moved", torch.where(mask > 0, a / mask, 0))
        yield Tile("Weight of a", mask.expand(3, *mask.shape))


def plot(path: Path, rows: Sequence[Sequence[Tile]], dpi: int) -> None:
    """Rows of tiles, each with its title and caption."""
    across, (height, width) = max(map(len, rows)), rows[0][0].image.shape[-2:]
    figure = Figure(figsize=(INCHES * across, INCHES * (1.5 * len(rows) - 0.5) * height / width))
    # tiles fill the figure: a layout engine would make them smaller for long captions
    around = {"left": 0, "right": 1, "bottom": 0, "top": 1, "wspace": 0.05, "hspace": 0.5}
    panels = figure.subplots(len(rows), across, squeeze=False, gridspec_kw=around)
    for of_row, tiles in zip(panels, rows, strict=True):
        for panel, tile in zip(of_row, tiles, strict=False):
            panel.imshow(pictures.colours_of(tile.image))
            panel.set(title=tile.title, xlabel=tile.caption, xticks=[], yticks=[])
            panel.spines[:].set(visible=True, color="0.6", linewidth=0.5)
        for panel in of_row[len(tiles) :]:
            panel.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.save(figure, path, bbox_inches="tight", dpi=dpi)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
