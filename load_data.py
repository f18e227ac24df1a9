"""Image sources → uint8 tensors → augmented, normalised batches on the device.

    data = load("cifar10", "data/cifar10", labels_per_class=500, seed=1).to(device)
    for images, labels in train_batches(data, batch_size=100, seed=1, epoch=0, device=device): ...
    for images, labels in test_batches(data.test, data, batch_size=100, device=device): ...

What a data set is stands in ``KINDS``, one row each. Where its images come from:

* An **image tree** in ``data_dir``, for every data set but ``digits``: ``train/<class>/``, ``test/<class>/``, perhaps
  ``val/<class>/`` (``utils/images.py`` says what is read and how). Images become 32×32 for cifar10 and cifar100, 64×64
  for tiny-imagenet-200, which is read as published. For ``folder`` they get ``image_size``; without it they keep their
  size where all have the same and neither side is above 128, else they become 64×64. An image of another size is
  cropped centrally to the wanted shape and resized (bicubic).
* **cifar10, cifar100** without a tree: torchvision's files, downloaded where missing and checked by their MD5.
* **digits**: scikit-learn's 1,797 handwritten digits, 8×8 enlarged to 32×32; a fifth of each class is the test set,
  always the same. Needs no files. Digits are not flipped in training: a mirrored digit is another thing.

A data set of another kind is another row, and a source next to those below if none of them reads it.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import io
import os
import shutil
import socket
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from mixup.base import to_device
from mixup.settings import NORMALISATION, Colour
from utils.errors import BadArguments, UserError
from utils.files import log
from utils.images import TINY_ARCHIVE, Reading, load_tree, one_line, pixel_digest, split_folders


@dataclass(frozen=True)
class Split:
    """Images [N, 3, H, W] uint8 and labels [N] int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def stride_of(height: int) -> int:
    """Stride of a network's first convolution for images of ``height`` pixels: 2 from 64 on, else 1."""
    return 2 if height >= 64 else 1


@dataclass(frozen=True)
class Data:
    """A data set in memory.

    Attributes:
        name: what ``--dataset`` said.
        source: where the images came from, for the record.
        classes: K names; label k is ``classes[k]``.
        mean, std: of pixels in [0, 1], per channel.
        train, test, valid: ``valid`` is None where there are no validation images.
        flip: whether training flips images horizontally.
        digests: of the whole "train" and "test" split (and "valid" of a tree), pixels and labels in their order, before
            images are chosen by seed: equal for runs of any seed and number of labels on the same data, another if one
            pixel differs. Class names are not in it.
        limit: the number of training images a class where ``labels_per_class`` left some out, else None.
        folders: where "train", "test" and "valid" lie in a tree.
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
    digests: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    folders: dict[str, str] = field(default_factory=dict)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.test.images.shape[2], self.test.images.shape[3]

    @property
    def stride(self) -> int:
        """What ``models.build_model`` takes, see ``stride_of``."""
        return stride_of(self.image_size[0])

    @property
    def padding(self) -> int:
        """Pixels of black on each side before the random crop: 2 for each pixel of ``stride``."""
        return 2 * self.stride

    def describe(self) -> str:
        """Numbers of images and classes, and which folder is what."""
        folder = {"valid": "train"} | self.folders
        source = {split: f" ({name}/)" if self.folders else "" for split, name in folder.items()}
        valid = f"{len(self.valid)} validation images{source['valid']}, " if self.valid else ""
        return (
            f"{len(self.train)} training images{source.get('train', '')} of {len(self.classes)} classes, {valid}"
            f"{len(self.test)} test images{source.get('test', '')}, {self.image_size[0]}×{self.image_size[1]}"
        )

    def to(self, device: torch.device | str) -> Data:
        """The same data kept on ``device``; on the host still, where it would take over 60% of free CUDA memory."""
        device = torch.device(device)
        splits = [self.train, self.test] + ([self.valid] if self.valid else [])
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if sum(split.images.nbytes for split in splits) > 0.6 * free:
                return self
        moved = [Split(split.images.to(device), split.labels.to(device)) for split in splits]
        return replace(self, train=moved[0], test=moved[1], valid=moved[2] if self.valid else None)


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
    number = len(data.train)
    rng = np.random.default_rng([seed, epoch, 0xDA7A])  # a stream apart from the methods' draws
    order = rng.permutation(number)
    flips = (rng.random(number) < 0.5) & data.flip
    rows, columns = rng.integers(0, 2 * data.padding + 1, (2, number))
    # everything of the epoch goes over at once, so that no batch waits for the host
    draws = to_device(np.stack([order, flips, rows, columns]), device)
    normalise = _normaliser(data, device)
    indices = draws[0] if data.train.images.device == draws.device else torch.from_numpy(order)
    for first in range(start * batch_size, number, batch_size):
        batch = slice(first, min(first + batch_size, number))
        part = part_of(batch.stop - batch.start)
        images, labels = _fetch(data.train, indices[batch][part], device)
        yield normalise(augment(images, draws[1:, batch][:, part], data.padding)), labels


def augment(images: Tensor, draws: Tensor, padding: int) -> Tensor:
    """Images [B, C, H, W] mirrored or not, and cut out of a black frame of ``padding`` pixels: whether, from which row
    and from which column is drawn for each image, [3, B]."""
    flips, rows, columns = draws
    height, width = images.shape[2:]
    images = torch.where(flips.bool()[:, None, None, None], images.flip(3), images)
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, rows, columns]


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
    return to_device(split.images[which], device), to_device(split.labels[which], device)


def _normaliser(data: Data, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    mean, std = (
        to_device(torch.tensor(colour, dtype=torch.float64).mul(255).float().view(3, 1, 1), device)
        for colour in (data.mean, data.std)
    )
    # one subtraction and one division by tensors round alike on every device; a division by the number 255 does not
    return lambda images: images.float().sub_(mean).div_(std)


# -------------------------------------------------------------------------------------------------------------- sources


class Found(NamedTuple):
    """All images of a data set: the splits "train", "test" and perhaps "valid", where each lies in a tree, and the
    ``pixel_digest`` of each where it is known."""

    source: str
    classes: list[str]
    splits: dict[str, Split]
    folders: dict[str, str]
    pixels: dict[str, str]


def image_tree(dataset: str, folder: str, reading: Reading) -> Found | None:
    """Folders of image files; None where there are none for training."""
    wanted = {"train", "test", "valid"} if reading.test_only else {"train"}
    candidates = [folder, os.path.join(folder, dataset)] if dataset == "tiny-imagenet-200" else [folder]
    root = next((root for root in candidates if wanted & split_folders(root).keys()), None)
    if root is None:
        return None
    classes, tree = load_tree(root, reading)
    splits = {name: Split(split.images, split.labels) for name, split in tree.items()}
    folders = {name: split.folder for name, split in tree.items()}
    source = f"image tree {root}"
    return Found(source, classes, splits, folders, {name: split.digest for name, split in tree.items()})


def torchvision_files(dataset: str, folder: str, reading: Reading) -> Found:
    """CIFAR as torchvision keeps it: downloaded and unpacked by one process, for which others wait."""
    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
    if os.path.basename(folder) == kind.base_folder:
        folder = os.path.dirname(folder)
    try:
        train, test = _cifar(kind, folder)
    except (OSError, RuntimeError, EOFError, tarfile.TarError, http.client.HTTPException) as error:
        raise UserError(
            f"{dataset} is not in {folder!r} and could not be downloaded ({one_line(error)}): put {kind.filename} "
            f"(md5 {kind.tgz_md5}, from {kind.url}) there, or its unpacked folder {kind.base_folder}, "
            "or an image tree train/<class>/, test/<class>/"
        ) from None
    splits = {
        name: Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for name, part in (("train", train), ("test", test))
    }
    return Found(f"torchvision's files in {folder}", list(train.classes), splits, {}, {})


def _cifar(kind: Any, folder: str) -> tuple[Any, Any]:
    """torchvision's training and test set. Where they are missing, one process downloads and unpacks them in a
    temporary folder and moves them to ``folder``, if that may be written; others wait."""

    def opened(where: str) -> tuple[Any, Any]:
        return kind(where), kind(where, train=False)

    with suppress(RuntimeError):  # not there, or not with the right checksums
        return opened(folder)
    os.makedirs(folder, exist_ok=True)
    writable, archive = os.access(folder, os.W_OK), os.path.join(folder, kind.filename)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder if writable else None) as scratch:
        with open(os.path.join(folder if writable else scratch, f".{kind.filename}.lock"), "w") as lock:
            with suppress(OSError):  # not every file system has locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            with suppress(RuntimeError):
                return opened(folder)
            if check_integrity(archive, kind.tgz_md5):
                os.symlink(archive, os.path.join(scratch, kind.filename))
            timeout = socket.getdefaulttimeout()
            socket.setdefaulttimeout(30)  # a silent firewall is no network either
            try:
                with redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):  # a bar is for terminals
                    kind(scratch, download=True)
            finally:
                socket.setdefaulttimeout(timeout)
            if writable:
                shutil.rmtree(os.path.join(folder, kind.base_folder), ignore_errors=True)
                os.rename(os.path.join(scratch, kind.base_folder), os.path.join(folder, kind.base_folder))
        return opened(folder if writable else scratch)


def scikit_digits(dataset: str, folder: str, reading: Reading) -> Found:
    """Handwritten digits that come with scikit-learn."""
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
    splits = {name: Split(images[part], labels[part]) for name, part in (("train", ~test), ("test", test))}
    return Found("scikit-learn's digits", [str(k) for k in range(10)], splits, {}, {})


class Kind(NamedTuple):
    """What a data set is.

    Attributes:
        size: height and width in pixels; None: as ``image_size`` says, or as the images are.
        normalisation: mean and std of pixels in [0, 1], per channel; None: measured on the training images.
        sources: where images may come from; the first that finds some is taken.
        flip: whether training mirrors images.
    """

    size: int | None
    normalisation: tuple[Colour, Colour] | None
    sources: tuple[Callable[[str, str, Reading], Found | None], ...]
    flip: bool = True


KINDS = {
    "cifar10": Kind(32, NORMALISATION["cifar10"], (image_tree, torchvision_files)),
    "cifar100": Kind(32, NORMALISATION["cifar100"], (image_tree, torchvision_files)),
    "tiny-imagenet-200": Kind(64, NORMALISATION["tiny-imagenet-200"], (image_tree,)),
    "digits": Kind(32, None, (scikit_digits,), flip=False),
    "folder": Kind(None, None, (image_tree,)),
}
DATASETS = tuple(KINDS)
IMAGE_SIZES = {name: kind.size for name, kind in KINDS.items() if kind.size}


# -------------------------------------------------------------------------------------------------------------- loading


def load(
    dataset: str,
    data_dir: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    labels_per_class: int | None = None,
    valid_labels_per_class: int = 0,
    seed: int = 0,
    cache: bool = True,
    test_only: bool = False,
) -> Data:
    """Load a data set into host memory; the sources are described at the top of this file.

    Args:
        dataset: one of ``DATASETS``.
        data_dir: folder with the images; ``digits`` ignores it.
        image_size: height and width, or the side of a square, for ``folder`` only.
        labels_per_class: training images of each class, a random choice by ``seed``; None is all of them.
        valid_labels_per_class: other training images of each class, set aside for validation.
        cache: whether decoded images are kept in ``data_dir``.
        test_only: a tree without training images will do; ``mean`` and ``std`` are then 0 and 1 where none are
            published.

    Raises:
        UserError: missing, empty or unreadable files and classes, with the path and what to do.

    Warnings go to the logger "sage".
    """
    if dataset not in KINDS:
        raise UserError(f"unknown dataset {dataset!r}; choose from {', '.join(DATASETS)}")
    kind = KINDS[dataset]
    if image_size is not None and kind.size is not None:
        raise UserError(f"image_size {image_size} is for the dataset folder; {dataset} has a size of its own")
    folder = os.path.abspath(data_dir)
    size = image_size or kind.size
    reading = Reading((size, size) if isinstance(size, int) else size, cache, test_only)
    found = next(filter(None, (source(dataset, folder, reading) for source in kind.sources)), None)
    if found is None:
        missing = "has no folder train" if os.path.isdir(folder) else "does not exist"
        wanted = f"the unpacked {TINY_ARCHIVE} or " if dataset == "tiny-imagenet-200" else ""
        raise UserError(
            f"data_dir {folder!r} {missing}; {dataset} needs {wanted}the folders train/<class>/ and test/<class>/ with "
            "PNG, JPEG or WebP images there"
        )
    splits, classes = found.splits, found.classes
    digests = {name: split_digest(split, found.pixels.get(name)) for name, split in splits.items()}
    _compare_splits(digests, found.folders, valid_labels_per_class)
    if "train" not in splits:
        train = Split(splits["test"].images[:0], splits["test"].labels[:0])
        mean, std = kind.normalisation or ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return Data(dataset, found.source, classes, mean, std, train, splits["test"], None, kind.flip, digests)
    train, valid = splits["train"], splits.get("valid")
    chosen, set_aside = _choose(train.labels, classes, labels_per_class, valid_labels_per_class, seed)
    limit = labels_per_class if len(chosen) + len(set_aside) < len(train) else None
    if len(set_aside):
        valid = Split(train.images[set_aside], train.labels[set_aside])
    if len(chosen) < len(train):
        train = Split(train.images[chosen], train.labels[chosen])
    mean, std = kind.normalisation or _mean_std(train.images)
    return Data(
        dataset, found.source, classes, mean, std, train, splits["test"], valid, kind.flip, digests, limit,
        found.folders,
    )  # fmt: skip


def _compare_splits(digests: dict[str, str], folders: dict[str, str], aside: int) -> None:
    """Refuse two validation sets; warn of two splits with the same images."""
    if aside and "valid" in digests:
        raise BadArguments(f"valid_labels_per_class {aside}: the tree has {folders['valid']}/ for that; leave it out")
    for a, b in (("train", "test"), ("train", "valid"), ("valid", "test")):
        if a in digests and digests[a] == digests.get(b):
            log.warning(f"warning: {folders.get(a, a)!r} and {folders.get(b, b)!r} hold the same images")


def split_digest(split: Split, pixels: str | None = None) -> str:
    """32 hexadecimal digits that stand for the pixels and labels; ``pixels`` is their ``pixel_digest`` where known."""
    pixels = pixels or pixel_digest(split.images.numpy())
    return hashlib.sha256(pixels.encode() + split.labels.numpy().astype("<i8").tobytes()).hexdigest()[:32]


def _choose(labels: Tensor, classes: Sequence[str], number: int | None, aside: int, seed: int) -> tuple[Tensor, Tensor]:
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
        few = f"{of} fewer training images ({name!r}: {least})"
        log.warning(f"warning: labels_per_class {number}: {few}; all of them are used")
    return tuple(torch.from_numpy(np.sort(np.concatenate(parts))) for parts in (chosen, set_aside))  # type: ignore[return-value]


def _mean_std(images: Tensor) -> tuple[Colour, Colour]:
    """Per channel of uint8 images [N, 3, H, W], for pixels in [0, 1]. Sums of integers are the same everywhere."""
    counts = torch.stack([torch.bincount(images[:, channel].flatten(), minlength=256) for channel in range(3)])
    total, squares = counts @ torch.arange(256), counts @ torch.arange(256) ** 2
    count = images.numel() / 3
    mean = total.numpy() / count
    variance = np.maximum(squares.numpy() / count - mean**2, 1)  # a step of a byte at least: never a division by zero
    std = np.sqrt(variance)
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())
