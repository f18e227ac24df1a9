"""Test sets other than the network's: image trees, CIFAR-10.1, corrupted images as published."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from load_data import Data, Split

from .errors import BadArguments, UserError
from .files import log
from .images import SPLITS, ImageFile, class_files, decode, split_folders, visible, what_is_left_out
from .robustness import SEVERITIES

BENCHMARK = {  # the published corruptions in the mean; speckle_noise, gaussian_blur, spatter and saturate are extra
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CLASSES_OF_ARRAYS = {"CIFAR-10-C": "66c673d653014822", "CIFAR-100-C": "77827c4c023a75b4"}  # ``digest_of`` the names
Sets = Iterator[tuple[str, int, Split]]  # name, severity, images


def open_set(path: Path, data: Data) -> Split:
    """The images of another test set, with the labels of the network's classes, at the size of ``data``.

    Args:
        path: an image tree ``<class>/``, or with ``test/`` or ``val/`` in it, which has the classes of ``data`` or some
            of them; a folder with ``…_data.npy`` (uint8 [N, H, W, 3]) and ``…_labels.npy`` (integers [N]), or that
            first file.

    Raises:
        BadArguments: there is no such set of these classes.
        UserError: a damaged file.
    """
    if is_corrupted(path):
        raise BadArguments(f"{path} holds corrupted images: name them by --corruptions_dir")
    pairs = [path] if path.name.endswith("_data.npy") else arrays_in(path, "_data.npy")
    if len(pairs) > 1:
        raise BadArguments(f"{path} holds several sets ({', '.join(pair.name for pair in pairs)}); name one file")
    if pairs:
        return read_pair(pairs[0], data)
    splits = split_folders(str(path))
    return read_tree(path / splits.get("test", splits.get("valid", "")), data)


def is_corrupted(path: Path) -> bool:
    """Whether ``path`` is laid out as CIFAR-10-C (arrays) or Tiny-ImageNet-C (a tree)."""
    return (path / "labels.npy").exists() or bool(corruptions_below(path))


def corruptions_below(path: Path) -> list[Path]:
    """The folders of a corrupted tree: those that have folders named after severities, but for splits, whose classes
    may be named after numbers."""
    folders = [Path(entry.path) for entry in visible(path) if entry.is_dir()] if path.is_dir() else []
    folders = [folder for folder in folders if folder.name.lower() not in SPLITS]
    return [folder for folder in folders if (folder / "1").is_dir() or (folder / str(SEVERITIES)).is_dir()]


def arrays_in(folder: Path, ending: str = ".npy") -> list[Path]:
    """The files of arrays in a folder, by name."""
    entries = visible(folder) if folder.is_dir() else []
    return [Path(entry.path) for entry in entries if entry.name.endswith(ending)]


def corrupted_sets(path: Path, data: Data, choose: Callable[[np.ndarray], np.ndarray]) -> Sets:
    """Name, severity and images of every corruption as published, arrays or a tree <corruption>/<severity>/<class>/.
    ``choose``: from labels [N] to the indices that are measured."""
    return (corrupted_arrays if (path / "labels.npy").exists() else corrupted_tree)(path, data, choose)


def digest_of(classes: list[str]) -> str:
    """16 hexadecimal digits that stand for the names of classes, in their order."""
    return hashlib.sha256(" ".join(classes).encode()).hexdigest()[:16]


def refuse_unknown_arrays(path: Path, classes: list[str]) -> None:
    """Raise ``BadArguments`` where there are no corrupted images, or arrays, whose labels are numbers, and the
    network's classes are not those of the published ones."""
    if not is_corrupted(path):
        raise BadArguments(f"{path} holds neither the labels.npy of arrays nor corruption/severity/class")
    if (path / "labels.npy").exists() and digest_of(classes) not in CLASSES_OF_ARRAYS.values():
        raise BadArguments(
            f"{path} holds arrays, whose labels name no classes: {' or '.join(CLASSES_OF_ARRAYS)} is meant, whose "
            f"classes are not the network's {', '.join(classes[:3])} …; use a tree"
        )


def corrupted_arrays(folder: Path, data: Data, choose: Callable[[np.ndarray], np.ndarray]) -> Sets:
    """Of arrays uint8 [5·N, H, W, 3], the severities one after the other, and labels [5·N], five times the same."""
    labels = read_labels(folder / "labels.npy", len(data.classes))
    paths = [path for path in arrays_in(folder) if path.name != "labels.npy"]
    size, rest = divmod(len(labels), SEVERITIES)
    if rest or (labels.reshape(SEVERITIES, size) != labels[:size]).any():
        raise UserError(
            f"{folder / 'labels.npy'}: its {len(labels)} labels are not those of the same images {SEVERITIES} times, "
            f"for the severities 1 to {SEVERITIES}; images of one severity are a tree or NAME_data.npy, NAME_labels.npy"
        )
    if not paths:
        raise UserError(f"{folder} holds labels.npy but no array of a corruption; unpack it again")
    chosen = choose(labels[:size])
    for path in paths:
        images = read_images(path, len(labels), data)
        for severity in range(1, SEVERITIES + 1):
            rows = chosen + (severity - 1) * size
            yield path.stem, severity, split_of(images[rows], labels[rows])


def corrupted_tree(path: Path, data: Data, choose: Callable[[np.ndarray], np.ndarray]) -> Sets:
    """Of folders ``<corruption>/<severity>/<class>/``; each must have the same classes."""
    known: set[int] = set()
    for corruption in corruptions_below(path):
        for severity in range(1, SEVERITIES + 1):
            folder = corruption / str(severity)
            if not folder.is_dir():
                raise UserError(f"{folder} is missing; a corruption needs the severities 1 to {SEVERITIES}")
            files, labels, _ = known_files(folder, data, [])
            known = known or {*labels.tolist()}
            if known != {*labels.tolist()}:
                raise UserError(f"{folder} has other classes than {path} elsewhere; unpack it again")
            chosen = choose(labels)
            (images,) = decode([[files[i] for i in chosen]], data.image_size, progress=False)
            yield corruption.name, severity, Split(torch.from_numpy(images), torch.from_numpy(labels[chosen]))


def read_tree(folder: Path, data: Data) -> Split:
    """The images of the class folders that the network knows."""
    if not folder.is_dir():
        raise BadArguments(f"there is no folder {folder}")
    ignored: list[str] = []
    files, labels, others = known_files(folder, data, ignored)
    if others:
        log.warning(f"warning: {len(others)} folders in {folder} are no class of the network, among them {others[0]!r}")
    if ignored:
        log.warning(f"warning: {what_is_left_out(ignored)}")
    (images,) = decode([files], data.image_size)
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def known_files(folder: Path, data: Data, ignored: list[str]) -> tuple[list[ImageFile], np.ndarray, list[str]]:
    """Image files of the network's classes, in its order, their labels, and the names of other folders."""
    found = class_files(str(folder), ignored)
    known = [(label, name) for label, name in enumerate(data.classes) if name in found]
    if not known:
        raise BadArguments(
            f"{folder} holds {', '.join(sorted(found)[:3])} …, none of the network's classes "
            f"({', '.join(data.classes[:3])} …); name the folders after them"
        )
    files = [file for _, name in known for file in found[name]]
    labels = np.array([label for label, name in known for _ in found[name]])
    return files, labels, sorted(found.keys() - {*data.classes})


def read_pair(path: Path, data: Data) -> Split:
    """The arrays ``…_data.npy`` and ``…_labels.npy``; labels count the classes in the order of their names."""
    if path.name.startswith("cifar10") and data.classes != CIFAR10:
        raise BadArguments(f"{path} is of CIFAR-10's classes, the network of {', '.join(data.classes[:3])} …")
    labels = read_labels(path.with_name(path.name.replace("_data.npy", "_labels.npy")), len(data.classes))
    return split_of(read_images(path, len(labels), data), labels)


def read_labels(path: Path, classes: int) -> np.ndarray:
    """Integers [N] of so many classes, each of which is there."""
    labels = read_array(path)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or [*np.unique(labels)] != [*range(classes)]:
        raise UserError(f"{path}: its labels are not those of {classes} classes, 0 to {classes - 1}")
    return np.asarray(labels)


def read_images(path: Path, number: int, data: Data) -> np.ndarray:
    """uint8 [number, H, W, 3] of the network's height and width."""
    images, shape = read_array(path), (number, *data.image_size, 3)
    if images.shape != shape or images.dtype != np.uint8:
        raise UserError(f"{path} holds {images.dtype} {images.shape} instead of uint8 {shape}")
    return images


def split_of(images: np.ndarray, labels: np.ndarray) -> Split:
    """Of uint8 [N, H, W, 3] and integers [N]."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous()
    return Split(pixels, torch.from_numpy(labels.astype(np.int64)))


def read_array(path: Path) -> np.ndarray:
    """An array that stays on the disk until it is used; nothing in it is executed."""
    if not path.is_file():
        raise BadArguments(f"there is no file {path}")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as an array: {error}") from error
