"""Three images, and what Mixup, CutMix, SaliencyMix, Puzzle Mix, Co-Mixup and SAGE make of them, in one row.

    python3 scripts/compare.py --image_size 224 --seed 1     # the README's figure, of the photographs named below
    python3 scripts/compare.py cat.jpg dog.jpg bird.jpg --out animals.pdf
    python3 scripts/compare.py --dataset cifar10 --data_dir DATA --seed 7 --checkpoint RUNS/…/model_best.pth.tar
    python3 scripts/compare.py --image_size 224 --seed 1 --strips figures/methods     # each method and its mask

The first two images are mixed; Co-Mixup mixes all three, and of its three outputs the one that is shared most evenly is
shown. Images keep their resolution, but for a central crop: all get the smallest height and width among them, rounded
down to a multiple of 32, which all block counts divide.

Saliency (Puzzle Mix, Co-Mixup, SAGE) is the gradient of the checkpoint's network, in eval mode, for the true label of
a data set's image and for the network's own guess elsewhere; it is taken at the resolution the network was trained at,
and enlarged. Without a checkpoint it is SaliencyMix's fine-grained map, which needs no network, blurred by 1/32 of the
shorter side: the gradient of an untrained network would be noise. The picture names which of the two it was.

The photographs that are shown when no image is named come with packages this project needs anyway: flower.jpg (by
vultilion) and china.jpg (by danielbuechele) of scikit-learn, both from flickr.com under CC BY 2.0, and
grace_hopper.jpg of Matplotlib, a portrait by the US Navy in the public domain. All are cropped and mixed here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import load_data
from mixup import METHODS
from mixup.assignment import assign
from mixup.base import bce_loss, one_hot
from mixup.comix import co_mix, compatibility
from mixup.cutmix import cut_box, paste_box
from mixup.input import mix_images
from mixup.puzzle import block_mask, puzzle_mix
from mixup.sage import best_offsets, blend, gaussian_blur
from mixup.saliency import (
    fine_grained_saliency,
    mean_magnitude,
    ones_where_zero,
    root_mean_square,
    saliency_pass,
)
from mixup.saliencymix import peak_box, saliency_peak
from models import ARCHITECTURES, build_model
from utils import archive, checkpoint, images
from utils.archive import atomic_write
from utils.errors import BadArguments, UserError, exit_code
from utils.options import Parser, number, one_of

SIDE = 32  # images are cropped to multiples of it
PUZZLE_BLOCKS = 8  # the finest of Puzzle Mix's block counts whose blocks neighbouring pixels of 4×4 divide at 224×224
CELLS = 4  # Co-Mixup's default
TILE = 224  # smaller images are enlarged to about this many pixels in the picture
SWAP = torch.tensor([1, 0])


class Sources(NamedTuple):
    """Three images [3, 3, H, W] in 0 … 1, their names, and, of a data set, their labels and its classes."""

    pixels: Tensor
    names: list[str]
    labels: Tensor | None = None
    classes: Sequence[str] = ()


class Maps(NamedTuple):
    """Saliency [3, H, W] as SAGE, and as Puzzle Mix and Co-Mixup take it, and where it comes from."""

    blurred: Tensor
    sharp: Tensor
    origin: str


class Tile(NamedTuple):
    """One image of a picture, colours [3, H, W] in 0 … 1 or a map [H, W], and the words above and below it."""

    title: str
    image: Tensor
    caption: str = ""


class Mixed(NamedTuple):
    """An image [3, H, W], the sources' shares in its target [3], and what led to it. Of Manifold Mixup, which mixes no
    images, ``image`` [H, W] is the mean size of the mixed features."""

    image: Tensor
    shares: Tensor
    steps: Sequence[Tile] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Draw; returns the exit code: 0, 1 for a failure, 2 for bad arguments."""
    parser = make_parser()
    args = parser.parse_args(argv)
    return exit_code(parser, lambda: compare(args))


def compare(args: argparse.Namespace) -> int:
    """Read, mix and draw what the arguments say."""
    check(args)
    sources = read_sources(args)
    network, state = load_network(args)
    maps = network_maps(network, state, sources, args) if network else fine_grained_maps(sources.pixels)
    if args.strips:
        args.strips.mkdir(parents=True, exist_ok=True)
        for name, mixed in strips(sources, maps, network, args.lam, args.seed).items():
            save(strip(sources, mixed), args.strips / f"{name}.png")
            print(args.strips / f"{name}.png")
    else:
        save(row(sources, maps.origin, mix(sources, maps, args.lam, args.seed)), args.out)
        print(args.out)
    return 0


def make_parser() -> Parser:
    parser = Parser(
        description=__doc__, prog="compare.py", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("images", nargs="*", type=Path, help="three PNG, JPEG or WebP files")
    add("--dataset", type=one_of(load_data.DATASETS), help="instead: three random test images of different classes")
    add("--data_dir", default=".", help="where that data set is (default: %(default)s)")
    add("--image_size", type=number(int, low=SIDE), help="side to bring images to; by default they keep their own")
    add("--checkpoint", type=Path, help="of this project or published; its network gives the saliency")
    add("--arch", type=one_of(ARCHITECTURES), help="where the checkpoint does not name it (default: preactresnet18)")
    add("--lam", type=number(float, low=0, high=1), default=0.5, help="share of the first image (default: %(default)s)")
    add("--seed", type=number(int, low=0), default=0, help="of the random choices (default: %(default)s)")
    add("--out", type=Path, default=Path("figures/comparison.png"), help="PNG, PDF or SVG (default: %(default)s)")
    add("--strips", type=Path, metavar="FOLDER", help="instead of the row: a picture of each method into this folder")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    if len(args.images) not in (0, 3):
        raise BadArguments(f"name three images, not {len(args.images)}")
    if args.images and args.dataset:
        raise BadArguments("name three images or a --dataset, not both")
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
        chosen = torch.stack([images[rng.integers(len(images))] for images in of_class if len(images)][:3])
        labels = data.test.labels[chosen]
        height, width = (side - side % SIDE for side in data.image_size)
        if not height or not width:
            raise UserError(f"images of {data.image_size} are smaller than {SIDE}×{SIDE}")
        pixels = data.test.images[chosen, :, :height, :width].float() / 255
        return Sources(pixels, [data.classes[label] for label in labels], labels, data.classes)
    paths = args.images or [
        Path(str(resources.files("sklearn.datasets.images") / "china.jpg")),
        Path(str(resources.files("sklearn.datasets.images") / "flower.jpg")),
        Path(str(resources.files("matplotlib") / "mpl-data" / "sample_data" / "grace_hopper.jpg")),
    ]
    height, width = (
        args.image_size or min(sides) for sides in zip(*(images.image_shape(str(path)) for path in paths), strict=True)
    )
    height, width = height - height % SIDE, width - width % SIDE
    if not height or not width:
        raise UserError(f"the smallest height and width of these images are below {SIDE} pixels")
    files = np.stack([images.read_image(str(path), height, width) for path in paths])
    names = [path.stem.replace("_", " ") for path in paths]
    return Sources(torch.from_numpy(files).permute(0, 3, 1, 2).float() / 255, names)


def load_network(args: argparse.Namespace) -> tuple[nn.Module | None, dict[str, Any]]:
    """The checkpoint's network in eval mode and what the checkpoint holds; None and nothing without one."""
    if not args.checkpoint:
        return None, {}
    state = archive.load(args.checkpoint)
    with checkpoint.well_formed(args.checkpoint):
        settings = state.get("settings", {})
        arch = args.arch or settings.get("arch", "preactresnet18")
        values = state.get("state_dict", state).values()
        matrices = [value for value in values if isinstance(value, Tensor) and value.ndim == 2]
        if not matrices:
            raise UserError(f"{args.checkpoint} holds no classifier")
        classes = len(matrices[-1])
        stride = 2 if (trained_side(settings, classes) or 0) >= 64 else 1
        width, dropout = settings.get("initial_channels", 64), settings.get("dropout", False)
        network = build_model(arch, classes, stride, width, dropout)
        weights = checkpoint.weights_of(state, args.checkpoint)
        checkpoint.load_weights(network, weights, args.checkpoint, arch)
    return network.eval(), {"arch": arch, **state}


def trained_on(settings: dict[str, Any], classes: int) -> str:
    """The data set's name; published checkpoints are told by their number of classes."""
    return settings.get("dataset") or {100: "cifar100", 200: "tiny-imagenet-200"}.get(classes, "cifar10")


def trained_side(settings: dict[str, Any], classes: int) -> int | None:
    """Side of the images a network was trained on, where that is known."""
    return settings.get("image_size") or load_data.IMAGE_SIZES.get(trained_on(settings, classes))


# ------------------------------------------------------------------------------------------------------------- saliency


def network_maps(network: nn.Module, state: dict[str, Any], sources: Sources, args: argparse.Namespace) -> Maps:
    """The gradient in the pixels, at the resolution the network was trained at, enlarged to the images'."""
    settings = state.get("settings", {})
    classes = network(torch.zeros(1, 3, SIDE, SIDE)).shape[1]
    dataset = trained_on(settings, classes)
    usual = load_data.NORMALISATION.get(dataset, load_data.NORMALISATION["cifar10"])
    mean, std = (
        torch.tensor(state.get(key, value)).view(3, 1, 1) for key, value in zip(("mean", "std"), usual, strict=True)
    )
    height, width = sources.pixels.shape[2:]
    scale = (trained_side(settings, classes) or min(height, width)) / min(height, width)
    images = resize(sources.pixels, round(height * scale), round(width * scale)) - mean
    images /= std
    with torch.no_grad():
        guess = network(images).argmax(dim=1)
    known = args.dataset == dataset and sources.classes == state.get("classes", sources.classes)
    labels = sources.labels if sources.labels is not None and known else guess

    def clean(logits: Tensor) -> Tensor:
        return bce_loss(logits, one_hot(labels, classes))

    gradient, _ = saliency_pass(network, images, clean)
    blurred = gaussian_blur(mean_magnitude(gradient), 5, 1.0)
    gradient, _ = saliency_pass(network, images, lambda logits: F.cross_entropy(logits, labels))
    blurred, sharp = (
        ones_where_zero(resize(m[:, None], height, width)[:, 0]) for m in (blurred, root_mean_square(gradient))
    )
    return Maps(blurred, sharp, f"saliency: gradient of {state['arch']} trained on {dataset}")


def fine_grained_maps(pixels: Tensor) -> Maps:
    """SaliencyMix's map, for all."""
    sigma = min(pixels.shape[2:]) / 32
    maps = fine_grained_saliency(to_bytes(pixels)).float()
    blurred = ones_where_zero(gaussian_blur(maps, 2 * int(2 * sigma) + 1, sigma))
    return Maps(blurred, blurred, "saliency: fine-grained map")


def resize(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


def to_bytes(pixels: Tensor) -> Tensor:
    return (255 * pixels).round().to(torch.uint8)


# --------------------------------------------------------------------------------------------------------------- mixing


def mix(sources: Sources, maps: Maps, lam: float, seed: int) -> dict[str, Mixed]:
    """What the six methods make of the sources, under the methods' names."""
    rng = np.random.default_rng(seed)
    a, b = sources.pixels[:1], sources.pixels[1:2]
    pair = sources.pixels[:2]
    height, width = pair.shape[2:]
    results = {"input": Mixed(mix_images(pair, SWAP, lam)[0], shares(lam))}

    box: Any = cut_box(height, width, lam, rng.uniform(0, height), rng.uniform(0, width))
    mixed, ratio, mask = paste_box(pair, SWAP, box)
    results["cutmix"] = Mixed(mixed[0], shares(ratio), [Tile("weight of a", grey(mask))])

    fine = fine_grained_saliency(to_bytes(b))[0]
    mixed, ratio, mask = paste_box(pair, SWAP, peak_box(height, width, lam, *saliency_peak(fine)))
    results["saliencymix"] = Mixed(
        mixed[0], shares(ratio), [Tile("saliency of b", fine.float()), Tile("weight of a", grey(mask))]
    )

    # pixels are 0 … 1 here, and blocks move as a whole, as in Tiny-ImageNet's preset
    puzzle: tuple[Any, ...] = (pair, maps.sharp[:2], SWAP, lam, PUZZLE_BLOCKS, [0.0] * 3, [1.0] * 3)
    mixed, ratio = puzzle_mix(*puzzle, t_size=-1)
    seen = [Tile("saliency of a", maps.sharp[0]), Tile("saliency of b", maps.sharp[1])]
    results["puzzle"] = Mixed(
        mixed[0], shares(ratio[0]), [*seen, Tile("weight of a", grey(block_mask(*puzzle, t_size=-1)[0]))]
    )

    drawn: dict[str, Any] = {
        "prior": np.full(3, 1 / 3),
        "initial_labels": rng.integers(3, size=(3, CELLS, CELLS)),
        "compatibility": compatibility(maps.sharp, 0.001),
    }
    mixed, targets = co_mix(sources.pixels, torch.eye(3), maps.sharp, **drawn)
    output = int(torch.special.entr(targets).sum(dim=1).argmax())
    cells = assign(maps.sharp, **drawn)[output].permute(2, 0, 1)
    seen = [Tile(f"saliency of {name}", s) for name, s in zip("abc", maps.sharp, strict=True)]
    results["comix"] = Mixed(mixed[output], targets[output], [*seen, Tile("cells", cells, "a red\nb green\nc blue")])

    unit = maps.blurred / maps.blurred.sum(dim=(1, 2), keepdim=True)
    s_a, s_b = lam * unit[:1], (1 - lam) * unit[1:2]
    offsets = best_offsets(s_a, s_b)
    mixed, ratio = blend(a, b, s_a, s_b, offsets)
    none = torch.zeros_like(s_a)
    mask = blend(torch.ones_like(s_a)[:, None], none[:, None], s_a, s_b, offsets)[0][0, 0]
    moved = blend(none[:, None], s_b[:, None], none, s_b, offsets)[0][0, 0]
    seen = [Tile("saliency of a", s_a[0]), Tile("saliency of b", s_b[0]), Tile("both, b moved", s_a[0] + moved)]
    results["sage"] = Mixed(mixed[0], shares(ratio[0]), [*seen, Tile("weight of a", grey(mask))])
    return results


def grey(mask: Tensor) -> Tensor:
    """[H, W] in 0 … 1 as colours [3, H, W]."""
    return mask.expand(3, *mask.shape)


def shares(ratio: Any) -> Tensor:
    """The target's shares of three sources where ``ratio`` is that of the first."""
    return torch.tensor([float(ratio), 1 - float(ratio), 0.0])


def strips(sources: Sources, maps: Maps, network: nn.Module | None, lam: float, seed: int) -> dict[str, Mixed]:
    """``mix``, and the two methods whose mixed image is none."""
    torch.manual_seed(seed)
    network = network or build_model("preactresnet18", 10).eval()
    activations: list[Tensor] = []

    def look(features: Tensor) -> Tensor:
        for seen in (features, mix_images(features, SWAP, lam)):
            activations.append(seen.abs().mean(dim=1))
        return features

    with torch.no_grad():
        network(sources.pixels[:2], 1, look)
    (of_a, of_b), (mixed, _) = activations
    manifold = [Tile("features of a", of_a), Tile("features of b", of_b)]
    return {
        "vanilla": Mixed(sources.pixels[0], shares(1)),
        "manifold": Mixed(mixed, shares(lam), manifold),
        **mix(sources, maps, lam, seed),
    }


# -------------------------------------------------------------------------------------------------------------- drawing


def row(sources: Sources, origin: str, results: dict[str, Mixed]) -> Figure:
    """The sources at the left, then every method's image over its target."""
    tiles = [Tile(name, image) for name, image in zip(sources.names, sources.pixels, strict=True)]
    made = [Tile(METHODS[name].title, mixed.image, target(sources, mixed)) for name, mixed in results.items()]
    return draw(tiles, made, max(1, round(TILE / min(sources.pixels.shape[2:]))), origin)


def strip(sources: Sources, mixed: Mixed) -> Figure:
    """One method from its sources to its mixed image."""
    made = Tile("mixed" if mixed.shares.max() < 1 else "unmixed", mixed.image, target(sources, mixed))
    last = int(mixed.shares.nonzero().max()) + 1
    tiles = [Tile(f"{'abc'[i]}: {sources.names[i]}", sources.pixels[i]) for i in range(last)] if last > 1 else []
    return draw([*tiles, *mixed.steps], [made], TILE / 2 / min(sources.pixels.shape[2:]))


def target(sources: Sources, mixed: Mixed) -> str:
    """The target as text, a line a source."""
    percent = [round(100 * share) for share in mixed.shares.tolist()]
    return "\n".join(f"{value} % {name}" for value, name in zip(percent, sources.names, strict=True) if value)


def draw(left: Sequence[Tile], right: Sequence[Tile], scale: float, note: str = "") -> Figure:
    """Two groups of tiles in one row; a pixel of the last tile is ``scale`` × ``scale`` of the picture's."""
    height, width = (round(side * scale) for side in right[-1].image.shape[-2:])
    gap, text = max(3, width // 40), max(10.0, width / 14)  # pixels
    tiles = [*left, *right]
    starts = [gap + (width + gap) * i + 3 * gap * (0 < len(left) <= i) for i in range(len(tiles))]
    above, below = round(2 * text), round(1.5 * text + 1.35 * text * max(tile.caption.count("\n") for tile in tiles))
    across, down = starts[-1] + width + gap, above + height + below
    figure = Figure(figsize=(across / 100, down / 100), dpi=100)
    words: dict[str, Any] = {"fontsize": 0.72 * text, "linespacing": 1.25}
    for tile, start in zip(tiles, starts, strict=True):
        axes = figure.add_axes((start / across, below / down, width / across, height / down), xticks=[], yticks=[])
        axes.imshow(pixels_of(tile.image), interpolation="nearest" if scale >= 1 else "antialiased", aspect="auto")
        axes.spines[:].set(color="0.6", linewidth=0.5)
        middle = (start + width / 2) / across
        figure.text(middle, (below + height + 0.5 * text) / down, tile.title, va="bottom", ha="center", **words)
        figure.text(middle, (below - 0.3 * text) / down, tile.caption, va="top", ha="center", **words)
    figure.text(gap / across, (below - 0.3 * text) / down, note, va="top", color="0.35", **words)
    return figure


def pixels_of(image: Tensor) -> np.ndarray:
    """Colours [3, H, W] as they are, a map [H, W] from black (0) over red to white (its maximum): uint8 [H, W, 3]."""
    if image.ndim == 2:
        return colormaps["magma"]((image / image.max().clamp(min=1e-30)).numpy(), bytes=True)[..., :3]
    return to_bytes(image.clamp(0, 1)).permute(1, 2, 0).numpy()


def save(figure: Figure, path: Path) -> None:
    """Write the figure, whole or not at all."""
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower())


if __name__ == "__main__":
    sys.exit(main())
