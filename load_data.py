"""Image sources → uint8 tensors → augmented, normalised batches on the device.

    data = load("cifar10", "data/cifar10", labels_per_class=500, seed=1).to(device)
    for images, labels in train_batches(data, batch_size=100, seed=1, epoch=0, device=device): ...
    for images, labels in test_batches(data.test, data, batch_size=100, device=device): ...

    load(dataset, data_dir, *, image_size=None, labels_per_class=None, valid_labels_per_class=0, seed=0, workers=None,
         cache=True, progress=True, warn=print to stderr) -> Data
    Data: name, source, classes, mean, std, train, test, valid, flip; properties image_size, stride, padding; to(device)
    train_batches(data, *, batch_size, seed, epoch, device, start=0) -> Iterator[(images, labels)]
    test_batches(split, data, *, batch_size, device) -> Iterator[(images, labels)]
    steps_per_epoch(number, batch_size) -> int

Where images come from:

* An **image tree** in ``data_dir``, for every dataset name but ``digits``: ``train/<class>/`` and ``test/<class>/``, or
  ``val/<class>/`` where there is no ``test/``, with PNG, JPEG or WebP files, in subfolders too. Names that begin with
  a dot are skipped. Classes are numbered in the order of their names. Images become 32×32 for cifar10 and cifar100,
  64×64 for tiny-imagenet-200. For ``folder`` they become ``image_size`` squared; without it they keep their size where
  all have the same and neither side is above 128, else they become 64×64. An image of another size is cropped
  centrally to the wanted shape and resized (bicubic).
* **Tiny-ImageNet-200** as published, in ``data_dir`` or its subfolder ``tiny-imagenet-200``: the same, but
  ``val/val_annotations.txt`` gives the classes of the test images. Nothing is moved.
* **cifar10, cifar100** without a tree: torchvision's files, downloaded where missing and checked by their MD5.
* **digits**: scikit-learn's 1,797 handwritten digits, 8×8 enlarged to 32×32; a fifth of each class is the test set,
  always the same. Needs no files. Digits are not flipped in training: a mirrored digit is another thing.

How a pixel is read: grey is repeated, 16 bits keep the upper 8, CMYK and palettes are converted, transparency lies
over white, an animation gives its first frame, EXIF orientation is applied. What cannot be read stops with its path.

Trees are decoded once and kept in ``.sage-cache-<size>.npz`` beside ``train`` (no pickles) until the name, size or
time of change of a file differs; a damaged cache is noticed by its checksums and made again.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import stat
import sys
import tarfile
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from utils.files import UserError, atomic_write, remove_leftovers

Colour = tuple[float, float, float]

DATASETS = ("cifar10", "cifar100", "tiny-imagenet-200", "digits", "folder")
NORMALISATION: dict[str, tuple[Colour, Colour]] = {
    "cifar10": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    "cifar100": ((129.3 / 255, 124.1 / 255, 112.4 / 255), (68.2 / 255, 65.4 / 255, 70.4 / 255)),
    "tiny-imagenet-200": ((0.4802458, 0.44807219, 0.39754776), (0.27698641, 0.26906449, 0.28208191)),
}
IMAGE_SIZES = {"cifar10": 32, "cifar100": 32, "tiny-imagenet-200": 64, "digits": 32}
TINY_ARCHIVE = "tiny-imagenet-200.zip (http://cs231n.stanford.edu/tiny-imagenet-200.zip)"

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
OTHER_SUFFIXES = (".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".heic", ".jp2", ".jxl")
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 2**26  # 67 megapixels: above every usual camera, below what a decompression bomb needs
MAX_COMMON_SIDE = 128
CACHE_VERSION = 1


@dataclass(frozen=True)
class Split:
    """Images [N, 3, H, W] uint8 and labels [N] int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """A data set in memory.

    Attributes:
        name: what ``--dataset`` said.
        source: where the images came from, for the record.
        classes: K names; label k is ``classes[k]``.
        mean, std: of 1, per channel.
        train, test, valid: ``valid`` is None where no validation images were set aside.
        flip: whether training flips images horizontally.
    """

    name: str
    source: str
    classes: list[str]
    mean: Colour
    std: Colour
    train: Split
    test: Split
    valid: Split | None
    flip: bool

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.images.shape[2], self.train.images.shape[3]

    @property
    def stride(self) -> int:
        """What ``models.build_model`` takes: 2 from 64 pixels of height on, else 1."""
        return 2 if self.image_size[0] >= 64 else 1

    @property
    def padding(self) -> int:
        """Pixels of black on each side before the random crop: 4 from 64 pixels of height on, else 2."""
        return 4 if self.image_size[0] >= 64 else 2

    def to(self, device: torch.device | str) -> Data:
        """The same data kept on ``device``; on the host still, where it would take over 60 % of free CUDA memory."""
        device = torch.device(device)
        splits = [self.train, self.test] + ([self.valid] if self.valid else [])
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if sum(split.images.nbytes for split in splits) > 0.6 * free:
                return self
        moved = [Split(split.images.to(device), split.labels.to(device)) for split in splits]
        return replace(self, train=moved[0], test=moved[1], valid=moved[2] if self.valid else None)


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


# -------------------------------------------------------------------------------------------------------------- batches


def steps_per_epoch(number: int, batch_size: int) -> int:
    """Batches in an epoch over ``number`` images; the last, smaller one counts."""
    return -(-number // batch_size)


def train_batches(
    data: Data,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    device: torch.device | str,
    start: int = 0,
    part_of: Callable[[int], slice] = slice,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch over ``data.train``: shuffled, flipped with probability ½, cropped at random, normalised.

    Order, flips and crops depend on ``seed``, ``epoch`` and the position in the epoch alone.

    Args:
        seed, epoch: not negative.
        start: number of the first batch, for a run that continues within an epoch.
        part_of: from the size of a batch to the part of it to make, for a run of many processes; all of it by default.

    Yields:
        images [B, 3, H, W] float32 and labels [B] int64, on ``device``.
    """
    number, padding, (height, width) = len(data.train), data.padding, data.image_size
    rng = np.random.default_rng([seed, epoch, 0xDA7A])  # a stream of its own beside the methods' draws
    order = rng.permutation(number)
    flips = rng.random(number) < 0.5
    rows, columns = rng.integers(0, 2 * padding + 1, (2, number))
    # everything of the epoch goes over at once, so that no batch waits for the host
    draws = torch.from_numpy(np.stack([order, flips, rows, columns])).to(device)
    normalise = _normaliser(data, device)
    indices = draws[0].to(data.train.images.device)
    for first in range(start * batch_size, number, batch_size):
        batch = slice(first, min(first + batch_size, number))
        part = part_of(batch.stop - batch.start)
        images, labels = _fetch(data.train, indices[batch][part], device)
        _, flip, row, column = draws[:, batch][:, part]
        if data.flip:
            images = torch.where(flip.bool()[:, None, None, None], images.flip(3), images)
        windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        yield normalise(windows[torch.arange(len(labels), device=device), :, row, column]), labels


def test_batches(
    split: Split, data: Data, *, batch_size: int, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of ``split`` in its order, normalised, without augmentation; shapes as ``train_batches``."""
    normalise = _normaliser(data, device)
    for first in range(0, len(split), batch_size):
        images, labels = _fetch(split, slice(first, first + batch_size), device)
        yield normalise(images), labels


def _fetch(split: Split, which: Tensor | slice, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Rows of a split on ``device``; pinned copies where the split lies on the host and the device is a GPU."""
    images, labels = split.images[which], split.labels[which]
    if torch.device(device).type == "cuda" and not images.is_cuda:
        images, labels = images.pin_memory(), labels.pin_memory()
    return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _normaliser(data: Data, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    mean, std = (
        torch.tensor(colour, dtype=torch.float64).mul(255).float().view(3, 1, 1).to(device)
        for colour in (data.mean, data.std)
    )
    # one subtraction and one division by tensors round alike on every device; a division by the number 255 does not
    return lambda images: images.float().sub_(mean).div_(std)


# -------------------------------------------------------------------------------------------------------------- loading


def load(
    dataset: str,
    data_dir: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    labels_per_class: int | None = None,
    valid_labels_per_class: int = 0,
    seed: int = 0,
    workers: int | None = None,
    cache: bool = True,
    progress: bool = True,
    warn: Callable[[str], None] = _warn,
) -> Data:
    """Load a data set into host memory; the sources are described at the top of this file.

    Args:
        dataset: one of ``DATASETS``.
        data_dir: folder with the images; ``digits`` ignores it.
        image_size: height and width, for ``folder`` only.
        labels_per_class: training images of each class, a random choice by ``seed``; None is all of them.
        valid_labels_per_class: other training images of each class, set aside for validation.
        workers: threads that decode; None is one a core.
        cache: whether decoded images are kept in ``data_dir``.
        progress: whether a bar shows the decoding (on a terminal).
        warn: called with one line about anything that the user should know.

    Raises:
        UserError: missing, empty or unreadable files and classes, with the path and what to do.
    """
    if dataset not in DATASETS:
        raise UserError(f"unknown dataset {dataset!r}; choose from {', '.join(DATASETS)}")
    if image_size is not None and dataset != "folder":
        raise UserError(f"image_size {image_size} is for the dataset folder; {dataset} has a size of its own")
    folder = os.path.abspath(data_dir)
    if dataset == "digits":
        source, (classes, train, test) = "scikit-learn's digits", _digits()
    elif root := _tree_root(dataset, folder):
        size = image_size or IMAGE_SIZES.get(dataset)
        source = f"image tree {root}"
        classes, train, test = _image_tree(root, size, workers or _cores(), cache, progress, warn)
    elif dataset in ("cifar10", "cifar100"):
        source, (classes, train, test) = f"torchvision's files in {folder}", _torchvision_cifar(dataset, folder)
    else:
        wanted = "the folders train/<class>/ and test/<class>/ with PNG, JPEG or WebP images"
        if dataset == "tiny-imagenet-200":
            wanted = f"the unpacked {TINY_ARCHIVE} or {wanted}"
        missing = "has no folder train" if os.path.isdir(folder) else "does not exist"
        raise UserError(f"data_dir {folder!r} {missing}; {dataset} needs {wanted} there")

    chosen, set_aside = _choose(train.labels, classes, labels_per_class, valid_labels_per_class, seed, warn)
    valid = Split(train.images[set_aside], train.labels[set_aside]) if len(set_aside) else None
    if len(chosen) < len(train):
        train = Split(train.images[chosen], train.labels[chosen])
    mean, std = NORMALISATION.get(dataset) or _mean_std(train.images)
    return Data(dataset, source, classes, mean, std, train, test, valid, flip=dataset != "digits")


def _choose(
    labels: Tensor, classes: Sequence[str], number: int | None, aside: int, seed: int, warn: Callable[[str], None]
) -> tuple[Tensor, Tensor]:
    """Indices of the training and validation images: a random choice of each class, in the order of the files."""
    chosen, set_aside, short = [], [], []
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels.numpy() == label)
        left = len(members) - aside
        if left < 1:
            raise UserError(
                f"valid_labels_per_class {aside} leaves no training image of class {name!r}, which has {len(members)}; "
                "choose a smaller number"
            )
        if number is not None and number > left:
            short.append((left, name))
        # the same training images whatever number is set aside, as long as there are enough
        members = np.random.default_rng([seed, label, 0xC1A5]).permutation(members)
        chosen.append(members[:left][:number])
        set_aside.append(members[left:])
    if short:
        least, name = min(short)
        of = f"{len(short)} of {len(classes)} classes have" if len(short) > 1 else f"class {name!r} has"
        warn(f"labels_per_class {number}: {of} fewer training images ({name!r}: {least}); all of them are used")
    return tuple(torch.from_numpy(np.sort(np.concatenate(parts))) for parts in (chosen, set_aside))  # type: ignore[return-value]


def _mean_std(images: Tensor) -> tuple[Colour, Colour]:
    """Per channel, of 1, of uint8 images [N, 3, H, W]. Sums are of integers, so they are the same everywhere."""
    total, squares = np.zeros(3), np.zeros(3)
    for part in images.split(1024):
        values = part.to(torch.int64)
        total += values.sum(dim=(0, 2, 3)).numpy()
        squares += values.square().sum(dim=(0, 2, 3)).numpy()
    count = images.numel() / 3
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1))  # at least one step of a byte: never a division by zero
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -------------------------------------------------------------------------------------------------- digits, torchvision


def _digits() -> tuple[list[str], Split, Split]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = (digits.images * (255 / 16)).round().astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in small])
    images = torch.from_numpy(large)[:, None].repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    in_test = np.zeros(len(labels), bool)
    rng = np.random.default_rng(0)
    for label in range(10):
        members = rng.permutation(np.flatnonzero(digits.target == label))
        in_test[members[: round(len(members) / 5)]] = True
    test = torch.from_numpy(in_test)
    return [str(k) for k in range(10)], Split(images[~test], labels[~test]), Split(images[test], labels[test])


def _torchvision_cifar(dataset: str, folder: str) -> tuple[list[str], Split, Split]:
    from torchvision.datasets import CIFAR10, CIFAR100

    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # a silent firewall is no network either
    try:
        try:
            train = source(folder, train=True)
        except RuntimeError:  # not there, or not with the right checksums
            train = source(folder, train=True, download=True)
        test = source(folder, train=False)
    except (OSError, RuntimeError, EOFError, tarfile.TarError, http.client.HTTPException) as error:
        raise UserError(
            f"{dataset} is not in {folder!r} and could not be downloaded ({_one_line(error)}): put {source.filename} "
            f"(md5 {source.tgz_md5}, from {source.url}) there, or its unpacked folder {source.base_folder}, "
            "or an image tree train/<class>/, test/<class>/"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    splits = [
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (train, test)
    ]
    return list(train.classes), splits[0], splits[1]


# ---------------------------------------------------------------------------------------------------------- image trees


class _File(NamedTuple):
    path: str
    size: int
    changed: int  # ns


def _tree_root(dataset: str, folder: str) -> str | None:
    candidates = [folder, os.path.join(folder, dataset)] if dataset == "tiny-imagenet-200" else [folder]
    return next((root for root in candidates if os.path.isdir(os.path.join(root, "train"))), None)


def _image_tree(
    root: str, size: int | None, workers: int, cache: bool, progress: bool, warn: Callable[[str], None]
) -> tuple[list[str], Split, Split]:
    """The tree below ``root`` from its cache, else decoded (and cached). ``size`` None: as the images suggest."""
    classes, listings = _list_tree(root, warn)
    files = [[file for members in listing for file in members] for listing in listings]
    labels = [torch.tensor([k for k, members in enumerate(listing) for _ in members]) for listing in listings]
    key = _fingerprint(root, files, size)
    path = os.path.join(root, f".sage-cache-{size or 'auto'}.npz")
    images = _read_cache(path, key, [len(part) for part in files], warn) if cache else None
    if images is None:
        images = _decode(files, size, workers, progress)
        if cache:
            remove_leftovers(root, os.path.basename(path), older_than=3600)  # a younger one may still be written
            try:
                with atomic_write(path) as file:
                    np.savez(file, key=np.array(key), train=images[0], test=images[1])
            except OSError as error:
                warn(f"{root!r} cannot keep the decoded images ({error.strerror or error}); each start decodes anew")
    train, test = (Split(torch.from_numpy(part), label) for part, label in zip(images, labels, strict=True))
    return classes, train, test


def _list_tree(root: str, warn: Callable[[str], None]) -> tuple[list[str], list[list[list[_File]]]]:
    """Class names, and for training and test the files of each class."""
    ignored: list[str] = []
    train = _class_files(os.path.join(root, "train"), ignored)
    annotations = os.path.join(root, "val", "val_annotations.txt")
    if os.path.isfile(annotations):
        other, test = "val", _annotated_files(annotations, ignored)
    else:
        other = next((name for name in ("test", "val") if os.path.isdir(os.path.join(root, name))), "")
        if not other:
            raise UserError(f"{root!r} has a folder train but neither test nor val; add test/<class>/ with images")
        test = _class_files(os.path.join(root, other), ignored)
    if train.keys() != test.keys():
        (name, lacking), *more = [(name, other) for name in sorted(train.keys() - test.keys())] + [
            (name, "train") for name in sorted(test.keys() - train.keys())
        ]
        rest = f" (and {len(more)} more such classes)" if more else ""
        raise UserError(
            f"class {name!r} is missing in {os.path.join(root, lacking)!r}{rest}; both need the same classes"
        )
    if len(train) < 2:
        raise UserError(f"{os.path.join(root, 'train')!r} holds one class folder; training needs two or more")
    if ignored:
        warn(f"{len(ignored)} files that are not PNG, JPEG or WebP are left out, among them {min(ignored)!r}")
    classes = sorted(train)
    return classes, [[train[name] for name in classes], [test[name] for name in classes]]


def _class_files(folder: str, ignored: list[str]) -> dict[str, list[_File]]:
    """Image files of every class folder in ``folder``; other pictures are added to ``ignored``."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
            names = [entry.name for entry in visible if stat.S_ISDIR(entry.stat().st_mode)]
    except OSError as error:
        raise _unreadable(error, folder) from None
    if not names:
        raise UserError(f"{folder!r} holds no class folders; put the images into {os.path.join(folder, '<class>')!r}")
    found = {}
    for name in sorted(names):
        path = os.path.join(folder, name)
        if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
            raise UserError(f"the name of class folder {path!r} is not a line of text; rename it")
        found[name] = _files_below(path, ignored)
        if not found[name]:
            raise UserError(f"class folder {path!r} holds no PNG, JPEG or WebP image; fill it or remove it")
    return found


def _annotated_files(annotations: str, ignored: list[str]) -> dict[str, list[_File]]:
    """Files of Tiny-ImageNet's validation set by class: lines of ``val_annotations.txt`` begin with file and class."""
    folder = os.path.join(os.path.dirname(annotations), "images")
    files = {os.path.relpath(file.path, folder): file for file in _files_below(folder, ignored)}
    found: dict[str, list[_File]] = {}
    try:
        with open(annotations, encoding="utf-8") as lines:
            rows = [line.split() for line in lines if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{annotations!r} is not text; unpack {TINY_ARCHIVE} again") from None
    except OSError as error:
        raise _unreadable(error, annotations) from None
    again = f"unpack {TINY_ARCHIVE} again"
    for name, label, *_ in (row if len(row) > 1 else [*row, ""] for row in rows):
        if not label or name not in files:
            raise UserError(f"{annotations!r} names {name!r}, which is not in {folder!r} or has no class; {again}")
        found.setdefault(label, []).append(files.pop(name))
    if files:
        raise UserError(f"image {min(files.values()).path!r} has no line in {annotations!r}; {again}")
    return found


def _files_below(folder: str, ignored: list[str]) -> list[_File]:
    """Image files in ``folder`` and below, by name. Links are followed; a folder met twice is a loop and refused."""
    found, pending, seen = [], [folder], set()
    while pending:
        current = pending.pop()
        try:
            info = os.stat(current)
            if (info.st_dev, info.st_ino) in seen:
                raise UserError(f"{current!r} leads to a folder already seen, perhaps by a loop of links; remove it")
            seen.add((info.st_dev, info.st_ino))
            with os.scandir(current) as entries:
                for entry in entries:
                    name = entry.name.lower()
                    if name.startswith("."):
                        continue
                    if entry.is_symlink():
                        entry.stat()  # a broken link is no reason to train on less
                    if entry.is_dir():
                        pending.append(entry.path)
                    elif name.endswith(SUFFIXES):
                        info = entry.stat()
                        if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for ever
                            raise UserError(f"{entry.path!r} is not a file; remove it")
                        found.append(_File(entry.path, info.st_size, info.st_mtime_ns))
                    elif name.endswith(OTHER_SUFFIXES):
                        ignored.append(entry.path)
        except OSError as error:
            raise _unreadable(error, current) from None
    return sorted(found)


def _unreadable(error: OSError, path: str) -> UserError:
    return UserError(f"cannot read {error.filename or path!r}: {error.strerror}; mend or remove it")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --------------------------------------------------------------------------------------------------- decoding and cache


def _decode(files: Sequence[Sequence[_File]], size: int | None, workers: int, progress: bool) -> list[np.ndarray]:
    """uint8 [N, 3, H, W] for every list of files, decoded by threads: Pillow lets them run beside each other."""
    total = sum(len(part) for part in files)
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=total, desc="decoding images", unit=" images", disable=None if progress else True) as bar,
    ):
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata, without a path
        try:
            height, width = (size, size) if size else _common_size(files)
            images = [np.empty((len(part), 3, height, width), np.uint8) for part in files]

            def decode(job: tuple[int, int]) -> int:
                part, first = job
                chunk = files[part][first : first + 64]
                for i, file in enumerate(chunk, first):
                    images[part][i] = read_image(file.path, height, width).transpose(2, 0, 1)
                return len(chunk)

            jobs = [(part, first) for part in range(len(files)) for first in range(0, len(files[part]), 64)]
            for done in pool.map(decode, jobs):
                bar.update(done)
        except MemoryError:
            raise UserError(f"{total} images do not fit into memory; choose a smaller image_size") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return images


def _common_size(files: Sequence[Sequence[_File]]) -> tuple[int, int]:
    """Height and width of all images where they agree and neither is above 128, else 64×64."""
    shapes = (image_shape(file.path) for part in files for file in part)
    first = next(shapes)
    return first if max(first) <= MAX_COMMON_SIDE and all(shape == first for shape in shapes) else (64, 64)


def image_shape(path: str) -> tuple[int, int]:
    """Height and width in pixels, as stored; errors as ``read_image``."""
    with _opened(path) as image:
        return image.height, image.width


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """A PNG, JPEG or WebP file; whatever goes wrong with it becomes a ``UserError`` with its path."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels are too many")
            yield image
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not a PNG, JPEG or WebP image" if unknown else getattr(error, "strerror", None) or _one_line(error)
        raise UserError(f"cannot read image {path!r}: {reason}; replace or remove it") from None


def read_image(path: str, height: int, width: int) -> np.ndarray:
    """An image file as uint8 [height, width, 3], cropped centrally to that shape and resized where it has another.

    Raises:
        UserError: with the path, for anything that is not a sound PNG, JPEG or WebP image of at most 67 megapixels.
    """
    with _opened(path) as opened:
        opened.draft(opened.mode, (2 * width, 2 * height))  # spares most of the work on a large photograph
        image: Image.Image = opened
        if "exif" in image.info:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = _from_16_bit(image)
        elif "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if image.size != (width, height):
            scale = min(image.width / width, image.height / height)
            left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
            box = (left, top, left + scale * width, top + scale * height)
            image = image.resize((width, height), Image.Resampling.BICUBIC, box)
        return np.asarray(image)


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    grey = (values >> 8).clip(0, 255)
    grey[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey.astype(np.uint8))


def _fingerprint(root: str, files: Sequence[Sequence[_File]], size: int | None) -> str:
    """What the decoded images depend on: names, sizes and times of change of all files, and how they are decoded."""
    lines = [repr((CACHE_VERSION, size, [len(part) for part in files]))]
    lines += [f"{file.path[len(root) :]}\0{file.size}\0{file.changed}" for part in files for file in part]
    return hashlib.blake2b(os.fsencode("\0\0".join(lines)), digest_size=16).hexdigest()


def _read_cache(path: str, key: str, lengths: Sequence[int], warn: Callable[[str], None]) -> list[np.ndarray] | None:
    """Training and test images, or None where the cache is missing, belongs to other files or is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.zip.infolist()):
                raise ValueError("compressed")  # never written so: it could unpack to anything
            if archive["key"] != key:
                return None
            images = [archive[name] for name in ("train", "test")]  # reading to the end compares the checksums
        height, width = images[0].shape[2:]
        if [(part.shape, part.dtype) for part in images] != [((n, 3, height, width), np.uint8) for n in lengths]:
            raise ValueError("of another shape")
        return images
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged archives, too, raise nearly anything
        warn(f"the cache {path!r} cannot be used ({_one_line(error)}); the images are decoded again")
        return None
