"""Trees of image files: listing, decoding, and keeping what was decoded.

A tree has ``train/<class>/`` and ``test/<class>/``, or ``val/<class>/`` where there is no ``test/``, with PNG, JPEG or
WebP files, in subfolders too. Classes are numbered by name. Names that begin with a dot are skipped; whatever else is
no image by its suffix, or lies in no class folder, is left out with a warning.
In Tiny-ImageNet-200 as published ``val/val_annotations.txt`` gives the classes of the test images; nothing is moved.

How a pixel is read: grey is repeated, 16 bits keep the upper 8, CMYK and palettes are converted, transparency lies
over white, an animation gives its first frame, EXIF orientation is applied. What cannot be read stops with its path.

Trees are decoded once and kept in ``.sage-cache-<size>.npz`` beside ``train`` (no pickles), with the digests of their
pixels, until the name, size or time of change of a file differs; a damaged cache is noticed by its checksums and made
again.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from .errors import UserError
from .files import atomic_write, remove_leftovers

TINY_ARCHIVE = "tiny-imagenet-200.zip (http://cs231n.stanford.edu/tiny-imagenet-200.zip)"
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 2**26  # 67 megapixels: above every usual camera, below what a decompression bomb needs
MANY_PIXELS = 2**24  # decoding takes about twelve bytes a pixel: above this size, two at a time
MAX_COMMON_SIDE = 128
CACHE_VERSION = 1

_large_images = threading.BoundedSemaphore(2)


class _File(NamedTuple):
    path: str
    size: int
    changed: int  # ns


class Reading(NamedTuple):
    """How a tree is read.

    Attributes:
        size: height and width of the images; None: as they suggest.
        cache: whether decoded images are kept beside the tree.
        warn: called with one line about anything that the user should know.
    """

    size: int | None
    cache: bool
    warn: Callable[[str], None]


def load_tree(root: str, reading: Reading) -> tuple[list[str], list[tuple[Tensor, Tensor, str]]]:
    """The tree below ``root`` from its cache, else decoded (and cached).

    Returns:
        the class names; for training and test the images [N, 3, H, W] uint8, the labels [N] and ``pixel_digest``.
    """
    size, warn = reading.size, reading.warn
    classes, listings = _list_tree(root, warn)
    files = [[file for members in listing for file in members] for listing in listings]
    labels = [torch.tensor([k for k, members in enumerate(listing) for _ in members]) for listing in listings]
    key = _fingerprint(root, files, size)
    path = os.path.join(root, f".sage-cache-{size or 'auto'}.npz")
    held = _read_cache(path, key, [len(part) for part in files], warn) if reading.cache else None
    images, digests = held or (decode(files, size), [])
    if not digests:  # decoded just now, or by a version that took none
        digests = [pixel_digest(part) for part in images]
        try:
            if reading.cache:
                _write_cache(path, key, images, digests)
        except OSError as error:
            if held is None:
                warn(f"{root!r} cannot keep the decoded images ({error.strerror or error}); each start decodes anew")
    tensors = [torch.from_numpy(part) for part in images]
    return classes, list(zip(tensors, labels, digests, strict=True))


def _list_tree(root: str, warn: Callable[[str], None]) -> tuple[list[str], list[list[list[_File]]]]:
    """Class names, and for training and test the files of each class."""
    ignored: list[str] = []
    train = class_files(os.path.join(root, "train"), ignored)
    annotations = os.path.join(root, "val", "val_annotations.txt")
    if os.path.lexists(annotations):
        other, test = "val", _annotated_files(annotations, ignored)
        ignored = [path for path in ignored if not path.endswith("_boxes.txt")]  # one for each published class
    else:
        other = next((name for name in ("test", "val") if os.path.isdir(os.path.join(root, name))), "")
        if not other:
            raise UserError(f"{root!r} has a folder train but neither test nor val; add test/<class>/ with images")
        test = class_files(os.path.join(root, other), ignored)
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
        warn(what_is_left_out(ignored))
    classes = sorted(train)
    return classes, [[train[name] for name in classes], [test[name] for name in classes]]


def what_is_left_out(ignored: Sequence[str]) -> str:
    """A warning about the files that ``class_files`` left out."""
    reason = "that are not PNG, JPEG or WebP by their suffix, or in no class folder,"
    return f"{len(ignored)} files {reason} are left out, among them {min(ignored)!r}"


def class_files(folder: str, ignored: list[str]) -> dict[str, list[_File]]:
    """Image files of every class folder in ``folder``; other visible files are added to ``ignored``."""
    names = _folders_in(folder, ignored)
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


def _folders_in(folder: str, ignored: list[str]) -> list[str]:
    """Names of the folders in ``folder``; its visible files are added to ``ignored``."""
    names = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if stat.S_ISDIR(entry.stat().st_mode):
                    names.append(entry.name)
                else:
                    ignored.append(entry.path)
    except OSError as error:
        raise _unreadable(error, folder) from None
    return names


def _annotated_files(annotations: str, ignored: list[str]) -> dict[str, list[_File]]:
    """Files of Tiny-ImageNet's validation set by class: lines of ``val_annotations.txt`` begin with file and class."""
    folder = os.path.join(os.path.dirname(annotations), "images")
    _folders_in(os.path.dirname(annotations), ignored)
    ignored.remove(annotations)
    files = {os.path.relpath(file.path, folder): file for file in _files_below(folder, ignored)}
    found: dict[str, list[_File]] = {}
    try:
        with open(annotations, "rb") as lines:
            rows = [line.decode().split() for line in lines if line.strip()]
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
                    else:
                        ignored.append(entry.path)
        except OSError as error:
            raise _unreadable(error, current) from None
    return sorted(found)


def _unreadable(error: OSError, path: str) -> UserError:
    return UserError(f"cannot read {error.filename or path!r}: {error.strerror}; mend or remove it")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --------------------------------------------------------------------------------------------------- decoding and cache


def decode(
    files: Sequence[Sequence[_File]], size: int | tuple[int, int] | None, progress: bool = True
) -> list[np.ndarray]:
    """uint8 [N, 3, H, W] for every list of files, decoded by threads: Pillow lets them run beside each other."""
    total = sum(len(part) for part in files)
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(_cores()) as pool,
        tqdm(total=total, desc="decoding images", unit=" images", disable=None if progress else True) as bar,
    ):
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata, without a path
        height, width = (size, size) if isinstance(size, int) else size or _common_size(files)
        images = [np.empty((len(part), 3, height, width), np.uint8) for part in files]

        def decode_some(job: tuple[int, int]) -> int:
            part, first = job
            chunk = files[part][first : first + 64]
            for i, file in enumerate(chunk, first):
                images[part][i] = read_image(file.path, height, width).transpose(2, 0, 1)
            return len(chunk)

        jobs = [(part, first) for part in range(len(files)) for first in range(0, len(files[part]), 64)]
        try:
            for done in pool.map(decode_some, jobs):
                bar.update(done)
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
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels are too many")
            yield image
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not a PNG, JPEG or WebP image" if unknown else getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"cannot read image {path!r}: {reason}; replace or remove it") from None


def read_image(path: str, height: int, width: int) -> np.ndarray:
    """An image file as uint8 [height, width, 3], cropped centrally to that shape and resized where it has another.

    Raises:
        UserError: with the path, for anything that is not a sound PNG, JPEG or WebP image of at most 67 megapixels.
    """
    with _opened(path) as opened:
        opened.draft(opened.mode, (2 * width, 2 * height))  # spares most of the work on a large photograph
        with _large_images if opened.width * opened.height > MANY_PIXELS else nullcontext():
            image: Image.Image = opened
            if "exif" in image.info:
                image = ImageOps.exif_transpose(image)
            if image.mode != "RGB" or "transparency" in image.info:
                image = _in_colour(image)
            if image.size != (width, height):
                scale = min(image.width / width, image.height / height)
                left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
                box = (left, top, left + scale * width, top + scale * height)
                image = image.resize((width, height), Image.Resampling.BICUBIC, box)
            return np.asarray(image)


def _in_colour(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: a band of rows after the other, so that what lies between takes no memory."""
    coloured = Image.new("RGB", image.size)
    rows = max(1, 2**18 // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        if band.mode.startswith("I"):
            values = np.asarray(band)
            grey = (values >> 8).clip(0, 255).astype(np.uint8)
            grey[values == image.info.get("transparency", -1)] = 255
            band = Image.fromarray(grey)
        elif "A" in band.getbands() or "transparency" in image.info:
            band = band.convert("RGBA")
            band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band)
        coloured.paste(band.convert("RGB"), (0, top))
    return coloured


def _fingerprint(root: str, files: Sequence[Sequence[_File]], size: int | None) -> str:
    """What the decoded images depend on: names, sizes and times of change of all files, and how they are decoded."""
    lines = [repr((CACHE_VERSION, size, [len(part) for part in files]))]
    lines += [f"{file.path[len(root) :]}\0{file.size}\0{file.changed}" for part in files for file in part]
    return hashlib.blake2b(os.fsencode("\0\0".join(lines)), digest_size=16).hexdigest()


def pixel_digest(images: np.ndarray) -> str:
    """32 hexadecimal digits that stand for the pixels of uint8 images [N, 3, H, W], their order and their shape."""
    content = np.ascontiguousarray(images).reshape(-1).data
    pieces = [content[first : first + 2**22] for first in range(0, len(content), 2**22)]
    with ThreadPoolExecutor(_cores()) as pool:  # SHA-256 of pieces, which the cores share
        digests = b"".join(pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces))
    return hashlib.sha256(repr(images.shape).encode() + digests).hexdigest()[:32]


def _write_cache(path: str, key: str, images: Sequence[np.ndarray], digests: Sequence[str]) -> None:
    folder, name = os.path.split(path)
    remove_leftovers(folder, name, older_than=3600)  # a younger one may still be written
    with atomic_write(path) as file:
        np.savez(file, key=np.array(key), train=images[0], test=images[1], digests=np.array(digests))


def _read_cache(
    path: str, key: str, lengths: Sequence[int], warn: Callable[[str], None]
) -> tuple[list[np.ndarray], list[str]] | None:
    """Training and test images and their ``pixel_digest`` (none in a cache of an older version), or None where the
    cache is missing, belongs to other files or is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if archive["key"] != key:
                return None
            images = [archive[name] for name in ("train", "test")]  # reading to the end compares the checksums
            digests = archive["digests"].tolist() if "digests" in archive else []
        height, width = images[0].shape[2:]
        if [(part.shape, part.dtype) for part in images] != [((n, 3, height, width), np.uint8) for n in lengths]:
            raise ValueError("of another shape")
        if digests and [(type(digest), len(digest)) for digest in digests] != [(str, 32)] * 2:
            raise ValueError("of another shape")
        return images, digests
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged archives, too, raise nearly anything
        warn(f"the cache {path!r} cannot be used ({one_line(error)}); the images are decoded again")
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
