"""Image sources → uint8 tensors → augmented, normalised batches on the device.

    data = load("cifar10", "data/cifar10", labels_per_class=500, seed=1).to(device)
    for images, labels in train_batches(data, batch_size=100, seed=1, epoch=0, device=device): ...
    for images, labels in test_batches(data.test, data, batch_size=100, device=device): ...

    load(dataset, data_dir, *, image_size=None, labels_per_class=None, valid_labels_per_class=0, seed=0, workers=None,
         cache=True, progress=True, warn=print to stderr) -> Data
    Data: name, source, classes, mean, std, train, test, valid, flip, digests, limit;
          properties image_size, stride, padding; to(device)
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
"""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mixup.settings import NORMALISATION, Colour
from utils.errors import UserError
from utils.images import TINY_ARCHIVE, cores, load_tree, one_line, pixel_digest, tree_root

DATASETS = ("cifar10", "cifar100", "tiny-imagenet-200", "digits", "folder")
IMAGE_SIZES = {"cifar10": 32, "cifar100": 32, "tiny-imagenet-200": 64, "digits": 32}


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
        digests: of the whole "train" and "test" split, pixels and labels in their order, before images are chosen by
            seed: equal for runs of any seed and number of labels on the same data, another if one pixel differs.
            Class names are not in it.
        limit: the number of training images a class where ``labels_per_class`` left some out, else None.
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
        pixels = [pixel_digest(part.images.numpy()) for part in (train, test)]
    elif root := tree_root(dataset, folder):
        size = image_size or IMAGE_SIZES.get(dataset)
        source = f"image tree {root}"
        classes, splits = load_tree(root, size, workers or cores(), cache, progress, warn)
        train, test = (Split(images, labels) for images, labels, _ in splits)
        pixels = [digest for _, _, digest in splits]
    elif dataset in ("cifar10", "cifar100"):
        source, (classes, train, test) = f"torchvision's files in {folder}", _torchvision_cifar(dataset, folder)
        pixels = [pixel_digest(part.images.numpy()) for part in (train, test)]
    else:
        wanted = "the folders train/<class>/ and test/<class>/ with PNG, JPEG or WebP images"
        if dataset == "tiny-imagenet-200":
            wanted = f"the unpacked {TINY_ARCHIVE} or {wanted}"
        missing = "has no folder train" if os.path.isdir(folder) else "does not exist"
        raise UserError(f"data_dir {folder!r} {missing}; {dataset} needs {wanted} there")

    digests = {"train": _digest(pixels[0], train.labels), "test": _digest(pixels[1], test.labels)}
    chosen, set_aside = _choose(train.labels, classes, labels_per_class, valid_labels_per_class, seed, warn)
    valid = Split(train.images[set_aside], train.labels[set_aside]) if len(set_aside) else None
    limit = labels_per_class if len(chosen) + len(set_aside) < len(train) else None
    if len(chosen) < len(train):
        train = Split(train.images[chosen], train.labels[chosen])
    mean, std = NORMALISATION.get(dataset) or _mean_std(train.images)
    return Data(dataset, source, classes, mean, std, train, test, valid, dataset != "digits", digests, limit)


def _digest(pixels: str, labels: Tensor) -> str:
    """Of a split: its images' ``pixel_digest`` and its labels."""
    return hashlib.sha256(pixels.encode() + labels.numpy().astype("<i8").tobytes()).hexdigest()[:32]


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
            f"{dataset} is not in {folder!r} and could not be downloaded ({one_line(error)}): put {source.filename} "
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
