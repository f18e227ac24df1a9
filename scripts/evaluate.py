"""Measure a trained network: accuracy, calibration, corruptions, attacks, other test sets.

    python3 scripts/evaluate.py --checkpoint RUNS/…/checkpoint.pth.tar --data_dir DATA
    python3 scripts/evaluate.py --checkpoint RUNS/…/checkpoint.pth.tar --data_dir DATA --ngpu 0 --images 100
    python3 scripts/evaluate.py --checkpoint PUBLISHED.pth.tar --dataset cifar100 --data_dir DATA --arch wrn16_8

Settings that are not given are the checkpoint's; a published one (weights alone) takes them from the flags.

clean        top-1, top-5, cross-entropy, accuracy of each class, confusion matrix; always measured, on all images
calibration  expected calibration error (ECE) and reliability diagram, on all images
corruptions  top-1 error under each corruption at five severities, its mean, not relative to another network, and the
             mean ECE
fgsm, pgd    top-1 accuracy under attacks on pixels in [0, 1], with the normalisation inside the network

--shift measures the same parts on another test set, and the distance of its accuracy from that on the same classes of
the in-distribution one. PATH is an image tree <class>/ (or with test/ or val/ in it) of the network's classes or some
of them, or CIFAR-10.1's arrays cifar10.1_v6_data.npy and _labels.npy.

--corruptions_dir has the arrays of CIFAR-10-C or CIFAR-100-C or the tree of Tiny-ImageNet-C, by default DATA/CIFAR-10-C
and so on; the mean is over the benchmark's 15 corruptions. Without it they are made here (utils/robustness.py).

Each part appends a record to results.jsonl in --out: the numbers, how they were measured, the checkpoint's SHA-256 and
the digest of the test set; results.md shows the newest of each. The network runs in float32. The same flags and seed
give the same corrupted images and starts on every device.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import Normalize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load_data import Data, Split, split_digest, test_batches
from utils import checkpoint, errors, options, pictures, run, test_sets
from utils.device import device_name, pick_device, prepare, set_precision
from utils.errors import BadArguments, UserError
from utils.files import append_record, atomic_write, read_records
from utils.options import Parser, number, one_of
from utils.robustness import CORRUPTIONS, SEVERITIES, calibration, corrupt, fgsm, pgd
from utils.run import log
from utils.train import hits

ATTACKS = ("fgsm", "pgd")
PARTS = ("clean", "calibration", "corruptions", *ATTACKS)
WHAT = ("checkpoint", "sha256", "part", "set", "digest")  # together with how, what a record is of
SAID = {  # numbers in words
    "top1": "top-1 {:.2f}%", "top5": "top-5 {:.2f}%", "loss": "cross-entropy {:.4f}",
    "error": "mean top-1 error {:.2f}%", "ece": "ECE {:.2f}%", "confidence": "mean confidence {:.2f}%",
}  # fmt: skip
FLAGS = ("dataset", "data_dir", "image_size", "arch", "initial_channels", "dropout", "ngpu")  # as main.py has them
CHOSEN = {"corruptions", *ATTACKS}  # the parts of a choice of the images
USED_IN = {"images": CHOSEN, "seed": CHOSEN, "bins": {"calibration", "corruptions"}, "corruptions_dir": {"corruptions"},
           "eps": {*ATTACKS}, "pgd_steps": {"pgd"}, "pgd_step_size": {"pgd"}, "pgd_restarts": {"pgd"}}  # fmt: skip
PUBLISHED = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C", "tiny-imagenet-200": "Tiny-ImageNet-C"}
PICTURES = ("confusion", "reliability", "corruptions", "images", "attacks", "shift")
Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A network in eval mode and its data; ``about``: what all records of this call say."""

    model: nn.Module
    data: Data
    device: torch.device
    args: argparse.Namespace
    about: Record

    def picture(self, name: str, part: str) -> Path:
        """The file of a picture of one test set."""
        return self.args.out / picture_name(self.about["checkpoint"], name, part)

    def title(self, *lines: str) -> str:
        """Which run and checkpoint a picture shows, in lines that fit."""
        path = Path(self.args.resume).resolve()
        folder = textwrap.fill(path.parent.name.replace("_", "_ "), 64).replace("_ ", "_")
        return "\n".join([folder, path.name, *lines])

    def choose(self, labels: np.ndarray) -> np.ndarray:
        """Indices of --images of each label, at random."""
        order = np.random.default_rng(self.args.seed).permutation(len(labels))
        some = [order[labels[order] == label][: self.args.images] for label in np.unique(labels)]
        return np.sort(np.concatenate(some))

    def keep(self, part: str, name: str, digest: str, how: Record, numbers: Record, **detail: Any) -> None:
        """Append what was measured to results.jsonl, and say it."""
        record = {"part": part, "set": name, "digest": digest, "how": how, "numbers": numbers, "detail": detail}
        append_record(self.args.out / "results.jsonl", self.about | record)
        log.info(f"{part} [{name}]: {text_of(record)}")


@dataclass(frozen=True)
class TestSet:
    """A test set with its logits, and the images chosen for corruptions and attacks with their clean accuracy."""

    name: str
    split: Split
    digest: str
    logits: Tensor
    chosen: Split
    chosen_top1: float


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; returns the exit code: 0, 1 for a failure, 2 for bad arguments."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    options.refuse_unused(parser, options.given_names(make_parser(), argv), args.parts, USED_IN)
    given = options.given_names(parser, argv) | {"seed", "batch_size", "fast"}  # not the training's
    options.make_parser().parse_args([], namespace=args)  # what is left, until the checkpoint says
    return errors.exit_code(parser, lambda: evaluate(args, given))


def make_parser() -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, prog="evaluate.py", formatter_class=raw, allow_abbrev=False)
    positive = number(int, low=1)
    of_255 = number(float, above=0, high=255)
    # fmt: off
    add = parser.add_argument
    add("--checkpoint", dest="resume", metavar="PATH", required=True, help="network of this project or published")
    add("--out", type=Path, help="folder for the results (default: evaluation/ next to the checkpoint)")
    add("--parts", nargs="+", type=one_of(PARTS), default=PARTS, help=f"any of {', '.join(PARTS)} (default: all)")
    add("--images", type=positive, help="images of each class for corruptions and attacks, at random (default: all)")
    add("--batch_size", type=positive, default=250, help="images in a batch (default: %(default)s)")
    add("--seed", type=number(int, low=0), default=0, help="seed of every random choice (default: %(default)s)")
    add("--bins", type=positive, default=15, help="bins of confidence for the ECE (default: %(default)s)")
    add("--corruptions_dir", type=Path, help="published arrays (gaussian_noise.npy …, labels.npy) or their tree")
    add("--shift", type=named_path, action="append", default=[], metavar="NAME=PATH", help="another test set")
    add("--eps", type=of_255, nargs="+", default=[4, 8], help="sizes of the attacks, of 255 (default: 4 8)")
    add("--pgd_steps", type=positive, default=10, help="steps of PGD (default: %(default)s)")
    add("--pgd_step_size", type=of_255, help="size of a step, of 255 (default: 2.5·eps/steps)")
    add("--pgd_restarts", type=positive, default=1, help="random starts of PGD (default: %(default)s)")
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
    """Every part that was asked for, on every test set."""
    run.start_log()
    device = pick_device(args.ngpu)
    set_precision(False)
    command, path = options.command_line(), Path(args.resume)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    network, data, about = checkpoint.network_and_images(args, given)
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise UserError(f"{path} was written anew meanwhile; type the same command again")
    args.out = args.out or path.parent / "evaluation"
    shared = {
        "checkpoint": path.name, "sha256": sha256, "epoch": about.epochs, "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "commit": run.git_commit(), "device": device_name(device), "torch": torch.__version__, "command": command,
    }  # fmt: skip
    job = Job(prepare(network.model, device, False).eval(), data.to(device), device, args, shared)
    arrays = find_arrays(args, data) if "corruptions" in args.parts else None
    others = open_sets(args, data)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        own = predicted(job, "test", data.test, data.digests["test"])
        measure(job, own, arrays=arrays)
        for name, split in others.items():
            measure(job, predicted(job, name, split, split_digest(split)), own=own)
    finally:
        if results := newest(read_records(args.out / "results.jsonl")):
            plot_results(job, [record for record in results if record["sha256"] == sha256])
            write_markdown(args.out, results)
    log.info(f"{args.out / 'results.md'}")
    return 0


def find_arrays(args: argparse.Namespace, data: Data) -> Path | None:
    """The folder of published images of these classes, where one was named or lies next to the images."""
    usual = Path(args.data_dir) / PUBLISHED.get(args.dataset, "")
    folder = args.corruptions_dir or (usual if args.dataset in PUBLISHED and usual.is_dir() else None)
    if folder is not None:
        test_sets.refuse_unknown_arrays(folder, data.classes)
    return folder


def open_sets(args: argparse.Namespace, data: Data) -> dict[str, Split]:
    """The test sets of --shift by name."""
    names = ["test", *(name for name, _ in args.shift)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadArguments(f"--shift names two sets {twice[0]!r} (test is that of --data_dir); choose another name")
    return {name: test_sets.open_set(path, data) for name, path in args.shift}


@torch.inference_mode()
def predict(job: Job, split: Split, what: str) -> Tensor:
    """Logits [N, K] float32 on the CPU."""
    batches = test_batches(split, job.data, batch_size=job.args.batch_size, device=job.device)
    bar = tqdm(batches, what, -(-len(split) // job.args.batch_size), unit="batch", leave=False, disable=None)
    logits = torch.cat([job.model(images).float() for images, _ in bar]).cpu()
    if not logits.isfinite().all():
        raise UserError(f"the network in {job.args.resume} gives numbers that are not finite")
    return logits


def top1(logits: Tensor, labels: Tensor) -> float:
    """In %."""
    return 100 * (logits.argmax(dim=1) == labels.cpu()).double().mean().item()


def predicted(job: Job, name: str, split: Split, digest: str) -> TestSet:
    """A test set after the clean pass."""
    split = Split(split.images.cpu(), split.labels.cpu())
    logits = predict(job, split, name)
    chosen = torch.from_numpy(job.choose(split.labels.numpy()))
    few = Split(split.images[chosen], split.labels[chosen])
    return TestSet(name, split, digest, logits, few, top1(logits[chosen], few.labels))


def size_of(split: Split) -> Record:
    """How many images of how many classes."""
    return {"images": len(split), "classes": len(split.labels.unique())}


def measure(job: Job, on: TestSet, own: TestSet | None = None, arrays: Path | None = None) -> None:
    """The parts that were asked for on one test set; ``own``: the in-distribution one, where this is another."""
    clean(job, on, own)
    if "calibration" in job.args.parts:
        calibrate(job, on)
    if "corruptions" in job.args.parts:
        corruptions(job, on, arrays)
    for part in ATTACKS:
        if part in job.args.parts:
            attack(job, on, part)


def clean(job: Job, on: TestSet, own: TestSet | None) -> None:
    """Top-1, top-5, loss, accuracy of each class, confusion matrix; and the drop from ``own``."""
    labels, classes = on.split.labels, job.data.classes
    first, five = (100 * count.item() / len(labels) for count in hits(on.logits, labels))
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    confusion.index_put_((labels, on.logits.argmax(dim=1)), torch.ones_like(labels), accumulate=True)
    shares = (100 * confusion.diagonal().double() / confusion.sum(dim=1)).tolist()
    per_class = {name: share for name, share in zip(classes, shares, strict=True) if not math.isnan(share)}
    numbers: Record = {"top1": first, "top5": five, "loss": F.cross_entropy(on.logits.double(), labels).item()}
    if own:
        numbers["drop"] = round(own_top1(own, labels) - first, 9)
    numbers["per_class"] = per_class
    job.keep("clean", on.name, on.digest, size_of(on.split), numbers, confusion=confusion.tolist())
    path = job.picture(on.name, "confusion")
    pictures.attempt(pictures.plot_confusion, path, confusion.numpy(), classes, job.title(), first)


def own_top1(own: TestSet, labels: Tensor) -> float:
    """Accuracy on the in-distribution test set, on those of its images whose class is among ``labels``."""
    same = torch.isin(own.split.labels, labels)
    return top1(own.logits[same], own.split.labels[same])


def calibrate(job: Job, on: TestSet) -> None:
    """Expected calibration error in %, and the reliability diagram."""
    error, bins = calibration(on.logits, on.split.labels, job.args.bins)
    confidence = 100 * on.logits.double().softmax(dim=1).amax(dim=1).mean().item()
    rows = [(n, 100 * accuracy, 100 * sure) if n else (0, None, None) for n, accuracy, sure in bins]
    how, numbers = size_of(on.split) | {"bins": job.args.bins}, {"ece": 100 * error, "confidence": confidence}
    job.keep("calibration", on.name, on.digest, how, numbers, bin_images_accuracy_confidence=rows)
    path, accuracy = job.picture(on.name, "reliability"), top1(on.logits, on.split.labels)
    pictures.attempt(pictures.plot_reliability, path, bins, 100 * error, confidence, accuracy, job.title())


def corruptions(job: Job, on: TestSet, arrays: Path | None) -> None:
    """Top-1 error in % under every corruption and severity; its mean over both, and that of the calibration error."""
    sets = test_sets.corrupted_sets(arrays, job.data, job.choose) if arrays else made_here(job, on.chosen)
    errors: dict[str, list[float]] = defaultdict(list)
    calibrations: dict[str, list[float]] = defaultdict(list)
    shown: dict[str, list[Tensor]] = defaultdict(list if arrays else lambda: [on.chosen.images[0]])
    hashed = hashlib.sha256()
    for name, severity, split in sets:
        logits = predict(job, split, f"{on.name} {name} {severity}")
        errors[name].append(100 - top1(logits, split.labels))
        calibrations[name].append(100 * calibration(logits, split.labels, job.args.bins)[0])
        shown[name].append(split.images[0])
        hashed.update(f"{name} {severity} {split_digest(split)}".encode())
    counted, source = list(errors), "made here"
    if arrays:
        known = [name for name in errors if name in test_sets.BENCHMARK]
        counted, source = known or counted, "published images"
        if len(known) < len(test_sets.BENCHMARK):
            source += f", {len(known)} of the benchmark's {len(test_sets.BENCHMARK)} corruptions"
    mean, ece = (float(np.mean([rows[name] for name in counted])) for rows in (errors, calibrations))
    how = size_of(split) | {"seed": job.args.seed, "source": source}
    how |= {"source_digest": hashed.hexdigest()[:8]} if arrays else {}  # images made here follow from those of the set
    numbers = {"error": mean, "ece": ece, "errors": dict(errors)}
    job.keep("corruptions", on.name, on.digest, how, numbers, folder=str(arrays or ""))
    title = job.title(f"top-1 error [%] ({source}), mean of {len(counted)} corruptions {mean:.1f}")
    pictures.attempt(pictures.plot_corruptions, job.picture(on.name, "corruptions"), errors, title)
    pictures.attempt(pictures.plot_corrupted_images, job.picture(on.name, "images"), shown, f"corruptions {source}")


def made_here(job: Job, few: Split) -> test_sets.Sets:
    """Name, severity and images of every corruption of utils/robustness.py."""
    for name in CORRUPTIONS:
        for severity in range(1, SEVERITIES + 1):
            yield name, severity, Split(corrupt(few.images, name, severity, job.args.seed), few.labels)


def attack(job: Job, on: TestSet, part: str) -> None:
    """Top-1 accuracy in % under an attack of each size."""
    args, numbers = job.args, {}
    how = size_of(on.chosen) | {"seed": args.seed, "eps": args.eps}
    if part == "pgd":
        how |= {"steps": args.pgd_steps, "step_size": args.pgd_step_size, "restarts": args.pgd_restarts}
    network = nn.Sequential(Normalize(job.data.mean, job.data.std), job.model)
    for size in args.eps:
        right, step_size = 0, args.pgd_step_size or 2.5 * size / args.pgd_steps
        starts = range(0, len(on.chosen), args.batch_size)
        for start in tqdm(starts, f"{on.name} {part} {size:g}/255", unit="batch", leave=False, disable=None):
            pixels = on.chosen.images[start : start + args.batch_size].to(job.device).float() / 255
            labels = on.chosen.labels[start : start + args.batch_size].to(job.device)
            if part == "fgsm":
                changed = fgsm(network, pixels, labels, size / 255)
            else:
                changed = pgd(
                    network, pixels, labels, size / 255, steps=args.pgd_steps, step_size=step_size / 255,
                    restarts=args.pgd_restarts, generator=torch.Generator().manual_seed(args.seed + start),
                )  # fmt: skip
            with torch.inference_mode():
                right += int((network(changed).argmax(dim=1) == labels).sum())
        numbers[f"{size:g}"] = 100 * right / len(on.chosen)
    job.keep(part, on.name, on.digest, how, numbers, clean_top1=on.chosen_top1)


def picture_name(checkpoint_name: str, name: str, part: str) -> str:
    """Such as checkpoint_confusion.png, or checkpoint_C_confusion.png for the test set C."""
    stem = re.sub(r"(\.(pth|pt|tar|ckpt))+$", "", checkpoint_name)
    return f"{stem}_{part}.png" if name == "test" else f"{stem}_{name}_{part}.png"


def newest(records: Iterable[Record]) -> list[Record]:
    """The newest record of each part, test set and way to measure, of the newest checkpoint of each name. An attack's
    other sizes are kept."""
    found: dict[str, Record] = {}
    for record in records:
        how = {name: value for name, value in record["how"].items() if name != "eps"}
        key = json.dumps([how, *(record[name] for name in WHAT)], sort_keys=True)
        if (earlier := found.pop(key, None)) and record["part"] in ATTACKS:
            record = record | {"numbers": earlier["numbers"] | record["numbers"]}
        found[key] = record
    last = {record["checkpoint"]: record["sha256"] for record in found.values()}
    return [record for record in found.values() if last[record["checkpoint"]] == record["sha256"]]


def text_of(record: Record) -> str:
    """What a record says, and how it was measured, in a line."""
    numbers, how = dict(record["numbers"]), record["how"]
    words = [text.format(numbers[name]) for name, text in SAID.items() if name in numbers]
    if "drop" in numbers:
        side = "below" if numbers["drop"] > -0.005 else "above"
        words.append(f"{abs(numbers['drop']):.2f} points {side} the in-distribution test set")
    if record["part"] in ATTACKS:
        sizes = [f"{numbers[size]:.2f}% at {size}/255" for size in sorted(numbers, key=float)]
        words = [f"top-1 {', '.join(sizes)}, {record['detail']['clean_top1']:.2f}% without attack"]
    others = {name: value for name, value in how.items() if name not in ("images", "eps") and value is not None}
    measured = [f"{how['images']:,} images", *(f"{name.replace('_', ' ')} {value}" for name, value in others.items())]
    return f"{', '.join(words)} ({', '.join(measured)})"


def write_markdown(folder: Path, records: Sequence[Record]) -> None:
    """results.md: a chapter a checkpoint, the newest first, and in it a section a test set."""
    paragraphs = []
    for name in dict.fromkeys(record["checkpoint"] for record in reversed(records)):
        chapter = sorted((of for of in records if of["checkpoint"] == name), key=lambda of: PARTS.index(of["part"]))
        first = chapter[0]
        paragraphs.append(f"# {name}\n\nEpochs: {first['epoch'] or 'unknown'}. SHA-256: `{first['sha256']}`")
        for other in sorted({record["set"] for record in chapter}, key=lambda other: (other != "test", other)):
            paragraphs.append(f"## {other}")
            for record in [record for record in chapter if record["set"] == other]:
                paragraphs.append(f"**{record['part']}**, {record['date'][:10]}: {text_of(record)}")
                if "errors" in record["numbers"]:
                    paragraphs.append(table_of(record["numbers"]["errors"]))
            files = [folder / picture_name(name, other, part) for part in PICTURES]
            paragraphs += [f"![{file.stem}]({file.name.replace(' ', '%20')})" for file in files if file.exists()]
    with atomic_write(folder / "results.md", "w") as file:
        file.write("\n\n".join(paragraphs) + "\n")


def table_of(errors: dict[str, list[float]]) -> str:
    """Errors of each corruption by severity, and their mean."""
    lines = ["| corruption | 1 | 2 | 3 | 4 | 5 | mean |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name, row in errors.items():
        lines.append(f"| {name} | {' | '.join(f'{error:.2f}' for error in (*row, np.mean(row)))} |")
    return "\n".join(lines)


def plot_results(job: Job, records: Sequence[Record]) -> None:
    """Pictures of several records: attacks on each test set, and accuracy on all of them."""
    for name in {record["set"] for record in records}:
        attacks = [record for record in records if record["set"] == name and record["part"] in ATTACKS]
        shown: dict[str, dict[float, float]] = {}
        for record in attacks:
            how = record["how"]
            if how["images"] == attacks[-1]["how"]["images"] and how["seed"] == attacks[-1]["how"]["seed"]:
                label = f"PGD, {how['steps']} steps × {how['restarts']}" if record["part"] == "pgd" else "FGSM"
                shown[label] = {float(size): value for size, value in record["numbers"].items()}
        if shown:
            title = job.title(f"{attacks[-1]['how']['images']:,} images")
            sizes = sorted({size for found in shown.values() for size in found})
            bars = {label: [found.get(size, math.nan) for size in sizes] for label, found in shown.items()}
            bars = {"no attack": [attacks[-1]["detail"]["clean_top1"]] * len(sizes), **bars}
            groups = [f"ε = {size:g}/255" for size in sizes]
            pictures.attempt(pictures.plot_bars, job.picture(name, "attacks"), groups, bars, title)
    shifts = {record["set"]: record for record in records if record["part"] == "clean" and record["set"] != "test"}
    scored = [record for record in records if record["part"] == "calibration"]
    ece = {record["set"]: f"\nECE {record['numbers']['ece']:.1f}%" for record in scored}
    if shifts:
        groups = [f"{name}\n{one['how']['images']:,} images{ece.get(name, '')}" for name, one in shifts.items()]
        numbers = [record["numbers"] for record in shifts.values()]
        bars = {"in-distribution test set": [each["top1"] + each["drop"] for each in numbers]}
        bars["this test set"] = [each["top1"] for each in numbers]
        pictures.attempt(pictures.plot_bars, job.picture("test", "shift"), groups, bars, job.title())


if __name__ == "__main__":
    sys.exit(main())
