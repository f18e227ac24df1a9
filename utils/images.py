"""Trees of image files: listing, decoding, and a cache of what was decoded.

A tree has ``train/<class>/`` and ``test/<class>/`` with PNG, JPEG or WebP files, in subfolders too. ``val/<class>/``
(or ``valid``, ``validation``) is the validation set where there is a ``test/``, else the test set. Classes are numbered
by name. In Tiny-ImageNet-200 as published ``val/val_annotations.txt`` gives the classes of the test images. What
machines leave in folders is skipped (``is_clutter``); other files that are no images, or in no class folder, are left
out with a warning.

Grey is repeated, 16 bits keep the upper 8, CMYK and palettes are converted, transparency lies over white, an animation
gives its first frame, EXIF orientation is applied.

Trees are decoded once and kept, with digests, in ``.sage-cache-<size>.npz`` next to ``train`` until a file changes.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from .errors import UserError
from .files import atomic_write, log, remove_leftovers

TINY_ARCHIVE = "tiny-imagenet-200.zip (http://cs231n.stanford.edu/tiny-imagenet-200.zip)"
SPLITS = {"train": "train", "val": "valid", "valid": "valid", "validation": "valid", "test": "test"}  # by folder name
TINY_EXTRAS = ("_boxes.txt", "val_annotations.txt")  # next to the published images
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
CLUTTER = {"__macosx", "lost+found", "$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db",
           "desktop.ini", "icon\r"}  # fmt: skip
MAX_PIXELS = 2**26  # 67 megapixels: above every usual camera, below what a decompression bomb needs
MAX_COMMON_SIDE = 128
MAX_NAMED = 10  # damaged images in one message
CACHE_VERSION = 2


class ImageFile(NamedTuple):
    """A path, and what tells the file from another one in its place; times in nanoseconds."""

    path: str
    size: int
    modified: int
    changed: int
    inode: int


class Reading(NamedTuple):
    """How a tree is read."""

    size: tuple[int, int] | None  # height and width of the images; None: as they suggest
    cache: bool  # whether decoded images are kept in the tree
    test_only: bool = False  # whether a tree without training images will do


class TreeSplit(NamedTuple):
    """The folder's name, images [N, 3, H, W] uint8, labels [N] int64, and the images' ``pixel_digest``."""

    folder: str
    images: Tensor
    labels: Tensor
    digest: str


def load_tree(root: str, reading: Reading) -> tuple[list[str], dict[str, TreeSplit]]:
    """The class names, and "train", "test" and "valid" as far as the tree has them; from its cache, else decoded."""
    try:
        folders, found = _list_tree(root, reading)
    except OSError as error:
        raise UserError(f"cannot read {error.filename!r}: {error.strerror}; mend or remove it") from None
    classes = sorted(found["test"])
    files = {split: [file for name in classes for file in members[name]] for split, members in found.items()}
    key, size = _fingerprint(root, files, reading.size), "x".join(map(str, reading.size or ["auto"]))
    path = os.path.join(root, f".sage-cache-{size}.npz")
    images = _read_cache(path, key, files) if reading.cache else None
    if images is None:
        images = dict(zip(files, decode([*files.values()], reading.size), strict=True))
        images["digests"] = np.array([pixel_digest(part) for part in images.values()])
        if reading.cache:
            _write_cache(path, key, images)
    splits = {}
    for (split, members), digest in zip(found.items(), images["digests"].tolist(), strict=True):
        labels = torch.tensor([label for label, name in enumerate(classes) for _ in members[name]])
        splits[split] = TreeSplit(folders[split], torch.from_numpy(images[split]), labels, digest)
    return classes, splits


# -------------------------------------------------------------------------------------------------------------- listing


def is_clutter(name: str) -> bool:
    """Whether a file or folder is never an image, an array or a class: thumbnails of a NAS, halves of macOS files,
    hidden files, recycle bins and the like."""
    return name.startswith((".", "@", "#recycle", "#snapshot", "~snapshot")) or name.lower() in CLUTTER


def visible(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What a folder holds without clutter, by name."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not is_clutter(entry.name)), key=lambda entry: entry.name)


def split_folders(root: str) -> dict[str, str]:
    """The names of the folders of "train", "valid" and "test" in ``root``, as far as they are there."""
    folders: dict[str, str] = {}
    for entry in visible(root) if os.path.isdir(root) else []:
        split = SPLITS.get(entry.name.lower())
        if split and entry.is_dir():
            if split in folders:
                raise UserError(f"{root!r} has {folders[split]!r} and {entry.name!r} for one split; keep one of them")
            folders[split] = entry.name
    return folders


def _list_tree(root: str, reading: Reading) -> tuple[dict[str, str], dict[str, dict[str, list[ImageFile]]]]:
    """The name of each split's folder, and each split's files by class."""
    folders = split_folders(root)
    ignored: list[str] = []
    found = {}
    if "train" in folders:
        found["train"] = class_files(os.path.join(root, folders["train"]), ignored)
    if not {"test", "valid"} & folders.keys():
        raise UserError(f"{root!r} has a folder train but neither test nor val; add test/<class>/ with images")
    val = os.path.join(root, folders.get("valid", ""))
    tiny = os.path.exists(os.path.join(val, "val_annotations.txt"))
    if tiny or "test" not in folders:
        folders["test"] = folders.pop("valid")
    test = os.path.join(root, folders["test"])
    if {"train", "valid"} <= folders.keys():
        found["valid"] = class_files(val, ignored)
        _compare_classes(root, folders, found, "valid")
    try:
        found["test"] = (_tiny_files if tiny else class_files)(test, ignored)
        if "train" in found:
            _compare_classes(root, folders, found, "test")
    except UserError as error:
        if "valid" not in found:
            raise
        raise UserError(f"{error}; if {test!r} has no labels, move it away, and {val!r} is the test set") from None
    if len(found.get("train", (1, 2))) < 2:
        raise UserError(f"{os.path.join(root, folders['train'])!r} holds one class folder; training needs two or more")
    if ignored := [path for path in ignored if not (tiny and path.endswith(TINY_EXTRAS))]:
        log.warning(f"warning: {what_is_left_out(ignored)}")
    return folders, found


def _compare_classes(root: str, folders: dict[str, str], found: dict, split: str) -> None:
    """Raise ``UserError`` where a split has other classes than the training images."""
    lacking = [(name, split) for name in sorted(found["train"].keys() - found[split].keys())]
    lacking += [(name, "train") for name in sorted(found[split].keys() - found["train"].keys())]
    if lacking:
        (name, where), *more = lacking
        rest = f" (and {len(more)} more)" if more else ""
        path = os.path.join(root, folders[where])
        raise UserError(f"class {name!r}{rest} is missing in {path!r}; every split needs the same classes")


def what_is_left_out(ignored: Sequence[str]) -> str:
    """A warning about the files that ``class_files`` left out."""
    reason = "not PNG, JPEG or WebP by their suffix, or in no class folder"
    return f"{len(ignored)} files are left out ({reason}), among them {min(ignored)!r}"


def class_files(folder: str, ignored: list[str], skip: str = "") -> dict[str, list[ImageFile]]:
    """Image files by class: a folder in ``folder``, its name in Unicode's composed form, which macOS does not write.
    Other files are added to ``ignored``."""
    found: dict[str, list[ImageFile]] = {}
    for entry in visible(folder):
        name = unicodedata.normalize("NFC", entry.name)
        if not entry.is_dir():
            ignored.append(entry.path)
        elif name != skip:
            if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
                raise UserError(f"the name of class folder {entry.path!r} is not a line of text; rename it")
            found[name] = sorted(found.get(name, []) + files_below(entry.path, ignored))
            if not found[name]:
                raise UserError(f"class folder {entry.path!r} holds no PNG, JPEG or WebP image; fill it or remove it")
    if not found:
        raise UserError(f"{folder!r} holds no class folders; put the images into {os.path.join(folder, '<class>')!r}")
    return found


def files_below(folder: str, ignored: list[str]) -> list[ImageFile]:
    """Image files in ``folder`` and below, by path. Links are followed; a loop of them is refused."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    found, seen = [], set()
    for current, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(current)) in seen:
            raise UserError(f"{current!r} leads to a folder already seen, perhaps by a loop of links; remove it")
        seen.add(real)
        folders[:] = [name for name in folders if not is_clutter(name)]
        for path in (os.path.join(current, name) for name in names if not is_clutter(name)):
            if path.lower().endswith(SUFFIXES):
                info = os.stat(path)
                found.append(ImageFile(path, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino))
            else:
                ignored.append(path)
    return sorted(found)


def _tiny_files(val: str, ignored: list[str]) -> dict[str, list[ImageFile]]:
    """Tiny-ImageNet's validation images by class: ``val_annotations.txt`` gives the class of each file in ``images``,
    unless these were sorted into class folders."""
    folder, annotations = os.path.join(val, "images"), os.path.join(val, "val_annotations.txt")
    listed = files_below(folder, ignored) if os.path.isdir(folder) else []
    if not listed:
        return class_files(val, ignored, skip="images")
    ignored += [entry.path for entry in visible(val) if not entry.is_dir()]
    files = {os.path.relpath(file.path, folder): file for file in listed}
    found: dict[str, list[ImageFile]] = {}
    fault = ""
    for name, *rest in map(str.split, filter(str.strip, Path(annotations).read_text("utf-8", "replace").splitlines())):
        if not rest or name not in files:
            fault = f"names {name!r}, which is not in {folder!r} or has no class"
            break
        found.setdefault(rest[0], []).append(files.pop(name))
    if fault or files:
        fault = fault or f"has no line for {min(files.values()).path!r}"
        raise UserError(f"{annotations!r} {fault}; unpack {TINY_ARCHIVE} again")
    return found


def one_line(error: BaseException) -> str:
    """The error as text in a line."""
    return " ".join(str(error).split()) or type(error).__name__


# ------------------------------------------------------------------------------------------------------------- decoding


class DamagedImages(UserError):
    """Images that cannot be read, each as "'path': reason"."""

    def __init__(self, *faults: str) -> None:
        what, them = ("image", "it") if len(faults) == 1 else (f"{len(faults)} images:", "them")
        more = f"; and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
        super().__init__(f"cannot read {what} {'; '.join(faults[:MAX_NAMED])}{more}; replace or remove {them}")
        self.faults = faults


def decode(
    files: Sequence[Sequence[ImageFile]], size: tuple[int, int] | None, progress: bool = True
) -> list[np.ndarray]:
    """uint8 [N, 3, H, W] for every list of files, decoded by threads: Pillow lets them run in parallel. Those that
    cannot be read are named in one ``DamagedImages``."""
    total = sum(len(part) for part in files)
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor() as pool,
        tqdm(total=total, desc="decoding images", unit=" images", disable=None if progress else True) as bar,
    ):
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata, without a path
        height, width = size or _common_size(files)
        images = [np.empty((len(part), 3, height, width), np.uint8) for part in files]
        damaged: list[str] = []

        def read(row: np.ndarray, file: ImageFile) -> None:
            try:
                row[:] = read_image(file.path, height, width).transpose(2, 0, 1)
            except DamagedImages as error:
                damaged.extend(error.faults)

        try:
            for _ in pool.map(read, chain(*images), chain(*files)):
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if damaged:
        raise DamagedImages(*sorted(damaged))
    return images


def _common_size(files: Sequence[Sequence[ImageFile]]) -> tuple[int, int]:
    """Height and width of all images where they agree and neither is above 128, else 64×64."""
    shapes: set[tuple[int, int]] = set()
    for file in chain(*files):
        with suppress(DamagedImages):  # decoding names them all
            shapes.add(image_shape(file.path))
        if len(shapes) > 1 or max(map(max, shapes), default=0) > MAX_COMMON_SIDE:
            return 64, 64
    return shapes.pop() if shapes else (64, 64)


def image_shape(path: str) -> tuple[int, int]:
    """Height and width in pixels, as stored; errors as ``read_image``."""
    with _opened(path) as image:
        return image.height, image.width


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """A PNG, JPEG or WebP file; whatever goes wrong with it becomes ``DamagedImages``."""
    try:
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels are too many")
            yield image
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not a PNG, JPEG or WebP image" if unknown else getattr(error, "strerror", None) or one_line(error)
        raise DamagedImages(f"{path!r}: {reason}") from None


def read_image(path: str, height: int, width: int) -> np.ndarray:
    """An image file as uint8 [height, width, 3], cropped centrally to that shape and resized where it has another.

    Raises:
        DamagedImages: anything that is not a sound PNG, JPEG or WebP image of at most 67 megapixels.
    """
    with _opened(path) as image:
        image.draft(image.mode, (2 * width, 2 * height))  # spares most of the work on a large photograph
        ImageOps.exif_transpose(image, in_place=True)
        image = _in_colour(image)
        if image.size != (width, height):
            scale = min(image.width / width, image.height / height)
            left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
            box = (left, top, left + scale * width, top + scale * height)
            image = image.resize((width, height), Image.Resampling.BICUBIC, box)
        return np.asarray(image)


def _in_colour(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB."""
    if image.mode.startswith("I"):  # 16 bits
        values = np.asarray(image)
        grey = (values >> 8).clip(0, 255).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(grey)
    elif "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def pixel_digest(images: np.ndarray) -> str:
    """32 hexadecimal digits that stand for the pixels of uint8 images [N, 3, H, W], their order and their shape."""
    content = np.ascontiguousarray(images).reshape(-1).data
    pieces = [content[first : first + 2**22] for first in range(0, len(content), 2**22)]
    with ThreadPoolExecutor() as pool:  # SHA-256 of pieces, which the cores share
        digests = b"".join(pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces))
    return hashlib.sha256(repr(images.shape).encode() + digests).hexdigest()[:32]


# ---------------------------------------------------------------------------------------------------------------- cache


def _fingerprint(root: str, files: dict[str, list[ImageFile]], size: tuple[int, int] | None) -> str:
    """What the decoded images depend on: all there is to know of the files without reading them, and the size."""
    lines = [repr((CACHE_VERSION, size))]
    lines += [f"{split}\0{file.path[len(root) :]}\0{file[1:]}" for split, part in files.items() for file in part]
    return hashlib.blake2b(os.fsencode("\0\0".join(lines)), digest_size=16).hexdigest()


def _write_cache(path: str, key: str, images: dict[str, np.ndarray]) -> None:
    try:
        remove_leftovers(*os.path.split(path), older_than=3600)  # a younger one may still be written
        with atomic_write(path) as file:
            np.savez(file, key=np.array(key), **images)  # type: ignore[arg-type]
    except OSError as error:
        why = error.strerror or error
        log.warning(f"warning: {path!r} cannot keep the decoded images ({why}); each start decodes anew")


def _read_cache(path: str, key: str, files: dict[str, list[ImageFile]]) -> dict[str, np.ndarray] | None:
    """Images of each split and their "digests", or None where the cache is missing, of other files or damaged."""
    if not os.path.exists(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            if archive["key"] != key:
                return None
            images = {name: archive[name] for name in (*files, "digests")}  # reading to the end compares the checksums
        shapes = {
            split: (np.dtype(np.uint8), (len(part), 3, *images["test"].shape[2:])) for split, part in files.items()
        }
        if len(images["digests"]) != len(files) or any((images[s].dtype, images[s].shape) != shapes[s] for s in files):
            raise ValueError("of another shape")
        return images
    except Exception as error:  # damaged archives, too, raise nearly anything
        log.warning(f"warning: the cache {path!r} cannot be used ({one_line(error)}); the images are decoded again")
        return None
