"""A trained network beyond its accuracy: corruptions, attacks, calibration, confusion. JSON, Markdown and pictures.

    python3 scripts/evaluate.py --checkpoint RUNS/…/model_best.pth.tar --data_dir DATA
    python3 scripts/evaluate.py --checkpoint RUNS/…/model_best.pth.tar --data_dir DATA --ngpu 0 --images 100
    python3 scripts/evaluate.py --checkpoint PUBLISHED.pth.tar --dataset cifar100 --data_dir DATA --arch wrn16_8

Settings that are not given are the checkpoint's; a published one (weights alone) takes them from the flags.

clean        top-1, top-5, cross-entropy, accuracy of each class, confusion matrix: always, of all test images
calibration  expected calibration error and reliability diagram, of the same pass
corruptions  top-1 error under each corruption at five severities, and their mean in %, not relative to another network
fgsm, pgd    top-1 accuracy under attack, of pixels in [0, 1] with the normalisation inside the network
--shift NAME=PATH (as often as you like): top-1, calibration error, and the drop from the own test set, of another:
             an image tree <class>/, or with test/ or val/ in it, of the same classes or some of them; CIFAR-10.1's
             cifar10.1_v6_data.npy (and _labels.npy) or their folder; corrupted images as published, with the mean over
             corruptions and severities. Of a set with some of the classes, the drop is against the own test images of
             these; the network may still answer with any of its classes.

--corruptions_dir is a folder with the published CIFAR-10-C or CIFAR-100-C arrays or the tree of Tiny-ImageNet-C; they
are also found as DATA/CIFAR-10-C and so on. Labels of arrays count the classes in the order of their names. The mean is
over the 15 of the benchmark; its four extra ones are listed beside it.
Without arrays, corruptions are made here: utils/robustness.py lists them. Results say so; they are not CIFAR-10-C's.

The network runs in float32 (TF32 on GPUs that have it). What an earlier call measured of the same checkpoint stays
where this one does not measure it anew; of other --images or --seed it is kept under another name. The same flags and
seed give the same corrupted images and starts on every device.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.transforms.v2 import Normalize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load_data import Data, Split, split_digest, test_batches
from utils import checkpoint, files, options, run
from utils.device import device_name, pick_device, prepare, set_precision
from utils.errors import BadArguments, UserError, exit_code
from utils.files import atomic_write
from utils.options import Parser, number, one_of
from utils.robustness import CORRUPTIONS, SEVERITIES, calibration, corrupt, fgsm, pgd
from utils.run import log
from utils.test_sets import (
    BENCHMARK,
    Sets,
    corrupted_sets,
    corruptions_below,
    is_corrupted,
    open_set,
    refuse_unknown_arrays,
)
from utils.train import hits

PARTS = ("clean", "calibration", "corruptions", "fgsm", "pgd")
FLAGS = ("dataset", "data_dir", "image_size", "arch", "initial_channels", "dropout", "ngpu")  # as main.py has them
PUBLISHED = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C", "tiny-imagenet-200": "Tiny-ImageNet-C"}
PARTS_OF = {  # heading → keys of the JSON
    "Clean": ("clean",),
    "Calibration": ("calibration",),
    "Corruptions": ("corruptions", "corruptions_dir", "corruption_errors", "corruption_error"),
    "FGSM": ("fgsm",),
    "PGD": ("pgd",),
    "Other test sets": ("shift",),
}
OF_CHECKPOINT = ("sha256", "dataset", "arch", "classes", "epochs")  # what results of one checkpoint agree in
OF_ALL = ("test_digest", "images")  # those of one test set
OF_SUBSET = ("subset", "subset_top1", "seed")  # and those under corruptions and attacks
FEW = 20  # classes that a picture and a table show by name


@dataclass
class Job:
    """A network in eval mode, its data, a subset of the test images, and where results go."""

    model: nn.Module
    data: Data
    few: Split
    device: torch.device
    args: argparse.Namespace
    result: dict[str, Any] = field(default_factory=dict)
    text: dict[str, list[str]] = field(default_factory=dict)  # heading → paragraphs

    def path(self, ending: str) -> Path:
        """A file of this evaluation, named after the checkpoint."""
        return self.args.out / (re.sub(r"(\.(pth|pt|tar|ckpt))+$", "", Path(self.args.resume).name) + ending)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; returns the exit code: 0, 1 for a failure, 2 for bad arguments."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    given = options.given_names(parser, argv) | {"seed", "batch_size", "fast"}  # not the training's
    options.make_parser().parse_args([], namespace=args)  # what is left, until the checkpoint says
    return exit_code(parser, lambda: evaluate(args, given))


def make_parser() -> Parser:
    parser = Parser(
        description=__doc__,
        prog="evaluate.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    positive = number(int, low=1)
    of_255 = number(float, above=0, high=255)
    # fmt: off
    add = parser.add_argument
    add("--checkpoint", dest="resume", metavar="PATH", required=True, help="of this project or published")
    add("--out", type=Path, help="folder for the results (default: evaluation, beside the checkpoint)")
    add("--parts", nargs="+", type=one_of(PARTS), default=PARTS, help=f"{', '.join(PARTS)} (default: all)")
    add("--images", type=positive, help="of each class for corruptions and attacks, at random (default: all)")
    add("--batch_size", type=positive, default=250, help="(default: %(default)s)")
    add("--seed", type=number(int, low=0), default=0, help="of every random choice (default: %(default)s)")
    add("--bins", type=positive, default=15, help="of confidence, for the calibration error (default: %(default)s)")
    add("--corruptions_dir", type=Path, help="the published arrays: gaussian_noise.npy …, labels.npy; or their tree")
    add("--shift", type=named_path, action="append", default=[], metavar="NAME=PATH", help="another test set")
    add("--eps", type=of_255, nargs="+", default=[4, 8], help="sizes of the attacks, of 255 (default: 4 8)")
    add("--pgd_steps", type=positive, default=10, help="(default: %(default)s)")
    add("--pgd_step_size", type=of_255, help="of 255 (default: 2.5·eps/steps)")
    add("--pgd_restarts", type=positive, default=1, help="random starts (default: %(default)s)")
    # fmt: on
    options.add_flags(parser.add_argument_group("data, model and device, where the checkpoint does not say"), FLAGS)
    return parser


def named_path(text: str) -> tuple[str, Path]:
    """NAME=PATH."""
    name, sign, path = text.partition("=")
    if not (sign and path and re.fullmatch(r"[\w.+-]{1,40}", name)):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH with a name of letters, digits, . + - _")
    return name, Path(path)


def evaluate(args: argparse.Namespace, given: set[str]) -> int:
    """Every part that was asked for."""
    run.start_log()
    device = pick_device(args.ngpu)
    set_precision(False)
    command, digest = options.command_line(), sha256(args.resume)
    network, data, about = checkpoint.network_and_images(args, given)
    model, data, epochs = prepare(network.model, device, False), data.to(device), about.epochs
    if sha256(args.resume) != digest:
        raise UserError(f"{args.resume} was written anew meanwhile; type the same command again")
    arrays = find_arrays(args, data) if "corruptions" in args.parts else None
    sets = open_sets(args, data)
    args.out = args.out or Path(args.resume).parent / "evaluation"
    args.out.mkdir(parents=True, exist_ok=True)
    model.eval()
    chosen = torch.from_numpy(choose(data.test.labels.cpu().numpy(), args.images, args.seed))
    few = Split(data.test.images.cpu()[chosen], data.test.labels.cpu()[chosen])
    job = Job(model, data, few, device, args)
    logits = predict(job, data.test)
    job.result.update(
        sha256=digest, dataset=data.name, arch=args.arch, classes=data.classes, images=len(data.test),
        test_digest=data.digests["test"], epochs=epochs,
        subset=len(few), subset_top1=top1(logits[chosen], few.labels), seed=args.seed,
        checkpoint=str(args.resume), source=data.source, command=command, date=time.strftime("%Y-%m-%d"),
        device=device_name(device), git_commit=run.git_commit(),
        versions={name: version(name) for name in ("torch", "torchvision", "numpy")},
    )  # fmt: skip
    job.text[str(args.resume)] = [
        f"{args.arch} on {data.name} ({data.source}), {len(data.test):,} test images. Corruptions "
        f"and attacks: {len(few):,} of them, with a clean top-1 of {job.result['subset_top1']:.2f} %.",
        f"`{command}`",
    ]
    set_aside(job)
    clean(job, logits)
    if "calibration" in args.parts:
        calibrate(job, logits)
    write(job)
    if "corruptions" in args.parts:
        corruptions(job, arrays)
        write(job)
    for name in ("fgsm", "pgd"):
        if name in args.parts:
            attacks(job, name)
            plot_attacks(job, write(job))
    for name, found in sets.items():
        shift(job, name, found, logits)
        write(job)
    if sets:
        plot_shifts(job, write(job)["shift"])
    log.info(f"{job.path('.md')}\n{job.path('.json')}")
    return 0


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def earlier(job: Job) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Parts that other calls measured of this checkpoint on this test set, and their paragraphs. Of other images for
    corruptions and attacks, those that are of all images."""
    try:
        old, lines = files.read_json(job.path(".json")), job.path(".md").read_text(encoding="utf-8")
        if any(old[name] != job.result[name] for name in (*OF_CHECKPOINT, *OF_ALL)):
            return {}, {}
        of_all = ["Calibration", "Other test sets"]
        names = [*PARTS_OF] if all(old[name] == job.result[name] for name in OF_SUBSET) else of_all
        written = [part.split("\n\n") for part in lines.rstrip("\n").split("\n\n## ")[1:]]
        text = {heading: paragraphs for heading, *paragraphs in written if heading in names}
        return {key: old[key] for heading in text for key in PARTS_OF[heading]}, text
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none, or not one of these
        return {}, {}


def set_aside(job: Job) -> None:
    """Keep what was measured of this checkpoint on another test set, or on other images of it, under another name."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        old = files.read_json(job.path(".json"))
        checkpoint, whole, subset = (
            all(old.get(name) == job.result[name] for name in names) for names in (OF_CHECKPOINT, OF_ALL, OF_SUBSET)
        )
        if not whole:
            what = "results of another test set" if old.get("test_digest") else "results of a test set it does not name"
        else:
            what = f"corruptions or attacks of {old['subset']:,} other images"
        if checkpoint and (not whole or (not subset and {"corruption_errors", "fgsm", "pgd"} & old.keys())):
            suffix = time.strftime(".old-%Y%m%d-%H%M%S")
            for ending in (".json", ".md"):
                job.path(ending).with_suffix(ending + suffix).write_bytes(job.path(ending).read_bytes())
            log.warning(f"warning: {job.path('.json')} holds {what}; it is kept as {job.path('.json').name}{suffix}")


def write(job: Job) -> dict[str, Any]:
    """What is there so far, this call's and earlier ones'; returns the content of the JSON."""
    before, text = earlier(job)
    result, text = {**before, **job.result}, {**text, **job.text}
    summary = {"clean_top1": result["clean"]["top1"], "clean_top5": result["clean"]["top5"]}
    if "calibration" in result:
        summary["ece"] = result["calibration"]["ece"]
    if "corruption_error" in result:
        summary["corruption_error"] = result["corruption_error"]
    for name in ("fgsm", "pgd"):
        summary.update({f"{name}{row['eps_of_255']:g}_top1": row["top1"] for row in result.get(name, [])})
    if "shift" in result:
        result["shift"] = {**before.get("shift", {}), **result["shift"]}
        text["Other test sets"] = shift_text(job, result["shift"])
    result["summary"] = summary
    title = str(job.args.resume)
    headings = [title, *(name for name in PARTS_OF if name in text)]
    parts = ["\n\n".join([f"#{'#' * (heading != title)} {heading}", *text[heading]]) for heading in headings]
    with atomic_write(job.path(".md"), "w") as file:
        file.write("\n\n".join(parts) + "\n")
    files.write_json(job.path(".json"), result)
    return result


def choose(labels: np.ndarray, number_of_each: int | None, seed: int) -> np.ndarray:
    """Indices of so many of each label."""
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.sort(np.concatenate([order[labels[order] == label][:number_of_each] for label in np.unique(labels)]))


@torch.inference_mode()
def predict(job: Job, split: Split, what: str = "clean") -> Tensor:
    """Logits [N, K] float32 on the CPU."""
    batches = test_batches(split, job.data, batch_size=job.args.batch_size, device=job.device)
    total = -(-len(split) // job.args.batch_size)
    parts = [job.model(images).float() for images, _ in progress(batches, total, what)]
    logits = torch.cat(parts).cpu()
    if not logits.isfinite().all():
        raise UserError(f"the network in {job.args.resume} gives numbers that are not finite")
    return logits


def progress(items: Iterable[Any], total: int, what: str) -> tqdm:
    """A bar, on a terminal."""
    return tqdm(items, desc=what, total=total, unit="batch", leave=False, disable=not sys.stderr.isatty())


def top1(logits: Tensor, labels: Tensor) -> float:
    """In %."""
    return 100 * (logits.argmax(dim=1) == labels.cpu()).double().mean().item()


# ------------------------------------------------------------------------------------------------ clean and calibration


def clean(job: Job, logits: Tensor) -> None:
    """Top-1, top-5, loss, classes and confusion."""
    labels, classes = job.data.test.labels.cpu(), job.data.classes
    first, five = (100 * count.item() / len(labels) for count in hits(logits, labels))
    loss = F.cross_entropy(logits.double(), labels).item()
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    confusion.index_put_((labels, logits.argmax(dim=1)), torch.ones_like(labels), accumulate=True)
    of_class = (100 * confusion.diagonal().double() / confusion.sum(dim=1)).tolist()
    per_class = {name: None if math.isnan(value) else value for name, value in zip(classes, of_class, strict=True)}
    job.result["clean"] = {
        "top1": first, "top5": five, "loss": loss, "per_class": per_class, "confusion": confusion.tolist()
    }  # fmt: skip
    ranked = sorted(((value, name) for name, value in per_class.items() if value is not None))
    title = "class" if len(classes) <= FEW else f"class (the {FEW} lowest)"
    plot_confusion(job, confusion, first)
    job.text["Clean"] = [
        f"top-1 {first:.2f} %, top-5 {five:.2f} %, cross-entropy {loss:.4f}",
        table((title, "accuracy [%]"), [(name, f"{value:.2f}") for value, name in ranked[:FEW]]),
        picture(job, "_confusion.png", "Confusion matrix"),
    ]
    log.info(f"clean: top-1 {first:.2f} %, top-5 {five:.2f} %")


def calibrate(job: Job, logits: Tensor) -> None:
    """Expected calibration error, in %, and the reliability diagram."""
    error, rows = calibration(logits, job.data.test.labels.cpu(), job.args.bins)
    confidence = 100 * logits.double().softmax(dim=1).amax(dim=1).mean().item()
    columns = [(n, None, None) if n == 0 else (n, 100 * accuracy, 100 * sure) for n, accuracy, sure in rows]
    job.result["calibration"] = {
        "ece": 100 * error, "bins": job.args.bins, "mean_confidence": confidence,
        "bin_images_accuracy_confidence": columns,
    }  # fmt: skip
    plot_reliability(job, rows, 100 * error, confidence)
    line = f"expected calibration error {100 * error:.2f} % ({job.args.bins} equal bins), "
    line += f"mean confidence {confidence:.2f} %, accuracy {job.result['clean']['top1']:.2f} %"
    job.text["Calibration"] = [line, picture(job, "_reliability.png", "Reliability diagram")]
    log.info(f"calibration: {line}")


# ---------------------------------------------------------------------------------------------------------- corruptions


def find_arrays(args: argparse.Namespace, data: Data) -> Path | None:
    """The folder of published images of these classes, where one was named or lies beside the images."""
    usual = Path(args.data_dir) / PUBLISHED.get(args.dataset, "")
    folder = args.corruptions_dir or (usual if args.dataset in PUBLISHED and usual.is_dir() else None)
    if folder is not None and not is_corrupted(folder):
        raise BadArguments(
            f"{folder} holds no labels.npy, which published arrays have, and no corruption/severity/class"
        )
    if folder is not None:
        refuse_unknown_arrays(folder, data.classes)
    return folder


def corruptions(job: Job, arrays: Path | None) -> None:
    """Top-1 error in % under every corruption and severity, and the mean over both."""
    sets = corrupted_sets(arrays, job.data, chooser(job.args)) if arrays else own_sets(job)
    place = best_seen(job.few.images)
    errors: dict[str, list[float]] = {}
    shown: dict[str, list[Tensor]] = {}
    for name, severity, split in sets:
        error = 100 - top1(predict(job, split, f"{name} {severity}"), split.labels)
        errors.setdefault(name, []).append(error)
        shown.setdefault(name, [] if arrays else [job.few.images[place]]).append(split.images[place % len(split)])
        if severity == SEVERITIES:
            log.info(f"{name}: top-1 error {np.mean(errors[name]):.2f} %")
    counted = {name: row for name, row in errors.items() if not arrays or name in BENCHMARK}
    known, counted = len(counted), counted or errors
    mean, count = float(np.mean(list(counted.values()))), len(split)
    published = "published arrays" if arrays and not corruptions_below(arrays) else "published images"
    what = published if arrays else "corruptions made here (utils/robustness.py; not CIFAR-10-C)"
    if arrays and known < len(BENCHMARK):
        what += f", {known} of the benchmark's {len(BENCHMARK)}"
    job.result["corruptions"] = f"{what}; {count:,} images, seed {job.args.seed}"
    job.result["corruptions_dir"] = str(arrays) if arrays else None
    job.result["corruption_errors"], job.result["corruption_error"] = errors, mean
    plot_corruptions(job, errors, f"Top-1 error [%], mean of {len(counted)} corruptions {mean:.1f}\n{what}")
    plot_images(job, shown, what)
    head = ("corruption", *map(str, range(1, SEVERITIES + 1)), "mean")
    rows = [(name, *(f"{e:.2f}" for e in row), f"{np.mean(row):.2f}") for name, row in errors.items()]
    line = f"mean corruption error {mean:.2f} %: top-1 error, mean over {len(counted)} corruptions and their severities"
    job.text["Corruptions"] = [
        f"Images: {job.result['corruptions']}{f' ({arrays})' if arrays else ''}.", line, table(head, rows),
        picture(job, "_corruptions.png", "Errors"), picture(job, "_images.png", "A corrupted image"),
    ]  # fmt: skip
    log.info(f"corruptions: {line}")


def best_seen(images: Tensor) -> int:
    """The image that shows most of what a corruption does: colourful, neither dark nor bright."""
    pixels = images.float()
    colour = (pixels.amax(dim=1) - pixels.amin(dim=1)).mean(dim=(1, 2))
    return int((colour - 2 * (pixels.mean(dim=(1, 2, 3)) - 127.5).abs()).argmax())


def own_sets(job: Job) -> Iterator[tuple[str, int, Split]]:
    """Name, severity and images of every corruption made here."""
    for name in CORRUPTIONS:
        for severity in range(1, SEVERITIES + 1):
            yield name, severity, Split(corrupt(job.few.images, name, severity, job.args.seed), job.few.labels)


def chooser(args: argparse.Namespace) -> Callable[[np.ndarray], np.ndarray]:
    """What --images chooses by labels."""
    return lambda labels: choose(labels, args.images, args.seed)


# ------------------------------------------------------------------------------------------------------ other test sets


def open_sets(args: argparse.Namespace, data: Data) -> dict[str, Sets]:
    """The test sets of --shift by name."""
    names = [name for name, _ in args.shift]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadArguments(f"--shift names two sets {twice[0]!r}; give each a name of its own")
    warn = lambda line: log.warning(f"warning: {line}")  # noqa: E731
    return {name: open_set(path, data, chooser(args), warn) for name, path in args.shift}


def shift(job: Job, name: str, parts: Sets, own: Tensor) -> None:
    """Top-1 accuracy and calibration error in % on another test set, and the drop from the own one, whose logits are
    ``own``, on the same classes; of a corrupted set, means over corruptions and severities."""
    found: dict[str, list[tuple[float, float]]] = {}
    digest, images, classes = hashlib.sha256(), 0, set[int]()
    for corruption, severity, split in parts:
        logits = predict(job, split, f"{name} {corruption} {severity}" if corruption else name)
        error, _ = calibration(logits, split.labels, job.args.bins)
        found.setdefault(corruption, []).append((top1(logits, split.labels), 100 * error))
        digest.update(f"{corruption} {severity} {split_digest(split)}".encode())
        images, classes = images + len(split), classes | set(split.labels.tolist())
    counted = {key: rows for key, rows in found.items() if key in BENCHMARK} or found
    accuracy, ece = np.mean([row for rows in counted.values() for row in rows], axis=0).tolist()
    labels = job.data.test.labels.cpu()
    same = torch.isin(labels, torch.tensor(sorted(classes)))
    before = top1(own[same], labels[same])
    job.result.setdefault("shift", {})[name] = {
        "path": str(dict(job.args.shift)[name]), "digest": digest.hexdigest()[:32], "images": images,
        "classes": len(classes), "corruptions": len(counted) if "" not in found else 0, "bins": job.args.bins,
        "top1": accuracy, "ece": ece, "own_top1": before, "drop": before - accuracy,
    }  # fmt: skip
    if "" not in found:
        job.result["shift"][name]["top1_of_each"] = {key: [of for of, _ in rows] for key, rows in found.items()}
    log.info(f"{name}: top-1 {accuracy:.2f} %, {before - accuracy:.2f} below the own test set; ECE {ece:.2f} %")


def shift_text(job: Job, sets: dict[str, dict[str, Any]]) -> list[str]:
    """The paragraphs on other test sets."""
    rows = [
        [
            name + f" ({of['corruptions']} corruptions)" * bool(of["corruptions"]), f"{of['images']:,}",
            f"{of['classes']} of {len(job.data.classes)}",
            *(f"{of[key]:.2f}" for key in ("top1", "own_top1", "drop", "ece")),
        ]
        for name, of in sets.items()
    ]  # fmt: skip
    head = ["test set", "images", "classes", "top-1 [%]", "own test set [%]", "drop", "ECE [%]"]
    note = "Own test set: its images of the same classes. The network may answer with any of its classes."
    return [note, table(head, rows), picture(job, "_shift.png", "Accuracy on other test sets")]


# -------------------------------------------------------------------------------------------------------------- attacks


def attacks(job: Job, name: str) -> None:
    """Top-1 accuracy in % under attacks of each size."""
    rows = [attack(job, name, size) for size in job.args.eps]
    job.result[name] = rows
    head = [key.replace("_", " ").replace(" of 255", " [/255]").replace("top1", "top-1 [%]") for key in rows[0]]
    cells = [[f"{value:.4g}" for value in row.values()] for row in rows]
    job.text[name.upper()] = [table(head, cells), picture(job, "_attacks.png", "Accuracy under attack")]


def attack(job: Job, name: str, size: float) -> dict[str, float]:
    """Accuracy under one attack, and what it was; ``size`` is of 255."""
    args = job.args
    network = nn.Sequential(Normalize(job.data.mean, job.data.std), job.model)
    step_size = args.pgd_step_size or 2.5 * size / args.pgd_steps
    right = unmoved = 0
    starts = range(0, len(job.few), args.batch_size)
    for start in progress(starts, len(starts), f"{name} {size:g}/255"):
        batch = slice(start, start + args.batch_size)
        pixels = job.few.images[batch].to(job.device).float() / 255
        labels = job.few.labels[batch].to(job.device)
        if name == "fgsm":
            changed = fgsm(network, pixels, labels, size / 255)
            unmoved += int((changed == pixels).flatten(1).all(dim=1).sum())
        else:
            changed = pgd(
                network, pixels, labels, size / 255, steps=args.pgd_steps, step_size=step_size / 255,
                restarts=args.pgd_restarts, generator=torch.Generator().manual_seed(args.seed + start),
            )  # fmt: skip
        with torch.inference_mode():
            right += int((network(changed).argmax(dim=1) == labels).sum())
    row = {"eps_of_255": size, "top1": 100 * right / len(job.few)}
    log.info(f"{name} {size:g}/255: top-1 {row['top1']:.2f} %")
    if name == "fgsm":
        return {**row, "images_without_gradient": unmoved}
    return {**row, "steps": args.pgd_steps, "step_size_of_255": step_size, "restarts": args.pgd_restarts}


# ------------------------------------------------------------------------------------------------ Markdown and pictures


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def picture(job: Job, ending: str, title: str) -> str:
    return f"![{title}]({job.path(ending).name.replace(' ', '%20')})"


def save(job: Job, figure: Figure, ending: str) -> None:
    with atomic_write(job.path(ending)) as file:
        figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.1)


def title_of(job: Job) -> str:
    """Where the numbers of a picture come from, in lines that fit."""
    path = Path(job.args.resume).resolve()
    words = textwrap.wrap(path.parent.name.replace("_", "_ "), 64)
    return "\n".join([*(line.replace("_ ", "_") for line in words), path.name])


def plot_confusion(job: Job, confusion: Tensor, accuracy: float) -> None:
    """Shares of each true class, in %, with numbers and names where they fit."""
    classes = job.data.classes
    shares = (100 * confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    figure = Figure(figsize=(7, 6.2), layout="constrained", dpi=120)
    axes = figure.subplots()
    scale = PowerNorm(1 if len(classes) <= FEW else 0.4, 0, 100)  # of many classes, confusions would not be seen
    image = axes.imshow(shares, cmap="Blues", norm=scale)
    if len(classes) <= FEW:
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(len(classes)), classes, parse_math=False)
        write_numbers(axes, shares, 50, 9 if len(classes) <= 12 else 6)
    axes.set_xlabel("network's class")
    axes.set_ylabel("true class")
    axes.set_title(f"{title_of(job)}\ntop-1 {accuracy:.2f} %", fontsize=9, parse_math=False)
    figure.colorbar(image, label="share of the true class [%]", shrink=0.8)
    save(job, figure, "_confusion.png")


def write_numbers(axes: Any, values: np.ndarray, dark: float, size: float) -> None:
    """Whole numbers into the cells of a picture; white where the cell is dark. Zero stays empty."""
    for (row, column), value in np.ndenumerate(values):
        if value > 0.5:
            colour = "white" if value > dark else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=size, color=colour)


def plot_reliability(job: Job, rows: Sequence[tuple[int, float, float]], error: float, confidence: float) -> None:
    """Accuracy of each bin beside its confidence, over the number of images in it."""
    count, accuracy, sure = np.nan_to_num(np.array(rows)).T
    edges = np.linspace(0, 1, len(rows) + 1)
    bars: dict[str, Any] = {"width": 1 / len(rows), "align": "edge", "edgecolor": "white", "linewidth": 0.5}
    figure = Figure(figsize=(5, 5.6), layout="constrained", dpi=120)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.bar(edges[:-1], accuracy, color="tab:blue", label="accuracy", **bars)
    gap = sure - accuracy
    above.bar(
        edges[:-1], gap.clip(0), bottom=accuracy, color="lightcoral", alpha=0.6, label="confidence above it", **bars
    )
    above.bar(edges[:-1], (-gap).clip(0), bottom=sure, color="lightskyblue", label="confidence below it", **bars)
    above.plot([0, 1], [0, 1], "--", color="0.4", linewidth=1)
    above.set_ylabel("accuracy")
    above.set_title(f"{title_of(job)}\ncalibration error {error:.2f} %", fontsize=9, parse_math=False)
    above.legend(frameon=False, loc="upper left")
    below.bar(edges[:-1], 100 * count / count.sum(), color="0.6", **bars)
    top = job.result["clean"]["top1"]
    below.axvline(confidence / 100, color="tab:red", linewidth=1.2, label=f"mean confidence {confidence:.1f} %")
    below.axvline(top / 100, color="tab:blue", linewidth=1.2, linestyle="--", label=f"accuracy {top:.1f} %")
    below.set_xlabel("confidence")
    below.set_ylabel("images [%]")
    below.set_xlim(0, 1)
    below.legend(frameon=False, loc="upper left", fontsize=8)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    save(job, figure, "_reliability.png")


def plot_corruptions(job: Job, errors: dict[str, list[float]], title: str) -> None:
    """Errors as a table in colours: a row a corruption, a column a severity, and their mean."""
    values = np.array([[*row, np.mean(row)] for row in errors.values()])
    figure = Figure(figsize=(5.6, 1.4 + 0.32 * len(values)), layout="constrained", dpi=120)
    axes = figure.subplots()
    axes.imshow(values, cmap="Reds", vmin=0, vmax=100, aspect="auto")
    write_numbers(axes, values, 60, 9)
    axes.axvline(SEVERITIES - 0.5, color="white", linewidth=4)
    axes.set_xticks(range(SEVERITIES + 1), [*map(str, range(1, SEVERITIES + 1)), "mean"])
    axes.set_yticks(range(len(values)), [name.replace("_", " ") for name in errors], parse_math=False)
    axes.set_xlabel("severity")
    axes.set_title(f"{title_of(job)}\n{title}", fontsize=8, parse_math=False)
    save(job, figure, "_corruptions.png")


def plot_images(job: Job, shown: dict[str, list[Tensor]], title: str) -> None:
    """One image under every corruption, severities downwards, below the image itself where it is known."""
    gap = max(1, min(job.data.image_size) // 32)
    tiles = [F.pad(torch.stack(column), (gap,) * 4, value=255) for column in shown.values()]
    mosaic = torch.cat([torch.cat(list(column), dim=1) for column in tiles], dim=2).permute(1, 2, 0).numpy()
    count, _, height, width = tiles[0].shape
    figure = Figure(figsize=(0.8 * len(shown), 0.8 * count * height / width), dpi=120)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(mosaic, interpolation="nearest", aspect="auto")
    names = [name.replace("_", "\n") for name in shown]
    axes.set_xticks(width * (np.arange(len(shown)) + 0.5) - 0.5, names, fontsize=7, parse_math=False)
    severities = ["clean", *map(str, range(1, SEVERITIES + 1))][-count:]
    axes.set_yticks(height * (np.arange(count) + 0.5) - 0.5, severities, fontsize=8)
    axes.set_ylabel("severity", fontsize=8)
    axes.set_title(title, fontsize=8, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save(job, figure, "_images.png")


def plot_shifts(job: Job, sets: dict[str, dict[str, Any]]) -> None:
    """Accuracy on other test sets, each beside the own one's images of the same classes."""
    figure = Figure(figsize=(2.4 + 1.3 * len(sets), 3.8), layout="constrained", dpi=120)
    axes = figure.subplots()
    places = np.arange(len(sets))
    for offset, key, colour, label in (
        (-0.2, "own_top1", "0.6", "own test set"),
        (0.2, "top1", "tab:blue", "this set"),
    ):
        bars = axes.bar(places + offset, [of[key] for of in sets.values()], 0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    names = [f"{name}\n{of['images']:,} images\nECE {of['ece']:.1f} %" for name, of in sets.items()]
    axes.set_xticks(places, names, fontsize=8, parse_math=False)
    axes.set_ylim(0, 108)
    axes.set_ylabel("top-1 accuracy [%]")
    axes.set_title(title_of(job), fontsize=8, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    save(job, figure, "_shift.png")


def plot_attacks(job: Job, result: dict[str, Any]) -> None:
    """Accuracy under attacks of each size, beside that of the same images unattacked."""
    found = {name: {row["eps_of_255"]: row for row in result[name]} for name in ("fgsm", "pgd") if name in result}
    sizes = sorted({size for rows in found.values() for size in rows})
    figure = Figure(figsize=(2.2 + 1.1 * len(sizes), 3.6), layout="constrained", dpi=120)
    axes = figure.subplots()
    width = 0.8 / len(found)
    bars = [axes.bar(0, result["subset_top1"], 0.4, color="0.6")]
    for i, (name, rows) in enumerate(found.items()):
        row = next(iter(rows.values()))
        label = name.upper() + (f", {row['steps']} steps × {row['restarts']}" if name == "pgd" else "")
        places = [1 + sizes.index(size) + (i - (len(found) - 1) / 2) * width for size in rows]
        bars.append(axes.bar(places, [row["top1"] for row in rows.values()], 0.9 * width, label=label))
    for group in bars:
        axes.bar_label(group, fmt="%.1f", fontsize=8, padding=2)
    axes.set_xticks(range(len(sizes) + 1), ["clean", *(f"{size:g}/255" for size in sizes)])
    axes.set_ylim(0, 100)
    axes.set_xlabel("largest change of a pixel")
    axes.set_ylabel("top-1 accuracy [%]")
    axes.set_title(f"{title_of(job)}\n{len(job.few):,} test images", fontsize=8, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(found), frameon=False, fontsize=8)
    save(job, figure, "_attacks.png")


if __name__ == "__main__":
    sys.exit(main())
