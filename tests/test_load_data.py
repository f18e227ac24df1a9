"""Sources, reading of images, cache, choice of images, batches."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import pickle
import shutil
import struct
import tarfile
import tempfile
import threading
import time
import unicodedata
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import load_data
from load_data import NORMALISATION, Data, Split, load
from tests.common import main, warned
from utils import images as image_files
from utils.errors import UserError
from utils.images import read_image


def pixels(height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_tree(
    root: Path,
    classes: tuple[str, ...] = ("cat", "dog"),
    train: int = 4,
    test: int = 2,
    size: tuple[int, int] = (32, 32),
) -> Path:
    """PNG images of noise, each with a seed of its own."""
    for split, number in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                seed = 1000 * label + i + (500 if split == "test" else 0)
                Image.fromarray(pixels(*size, seed)).save(folder / f"{i}.png")
    return root


def quiet(dataset: str, folder: Path, **arguments: Any) -> Data:
    """``load``; a warning is a failure."""
    with warned() as lines:
        data = load(dataset, folder, **arguments)
    assert lines == []
    return data


def array(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def refused(folder: Path, *words: str, dataset: str = "folder", **arguments: Any) -> None:
    """Loading raises one line that holds all ``words``."""
    with pytest.raises(UserError) as caught:
        load(dataset, folder, **arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message, message


# -------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "tiny-imagenet-200", "folder"])
def test_image_tree(tmp_path: Path, dataset: str) -> None:
    size = 64 if dataset == "tiny-imagenet-200" else 32
    data = quiet(dataset, make_tree(tmp_path, size=(size, size)))
    assert data.classes == ["cat", "dog"]
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4
    assert data.test.labels.tolist() == [0] * 2 + [1] * 2
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert data.valid is None
    assert data.image_size == (size, size)
    assert (data.stride, data.padding) == ((2, 4) if size == 64 else (1, 2))
    assert np.array_equal(array(data.train.images[5]), pixels(size, size, 1001))
    assert np.array_equal(array(data.test.images[0]), pixels(size, size, 500))
    if dataset in NORMALISATION:
        assert (data.mean, data.std) == NORMALISATION[dataset]


def test_published_means() -> None:
    assert np.allclose(np.array(NORMALISATION["cifar10"]) * 255, [[125.3, 123.0, 113.9], [63.0, 62.1, 66.7]])
    assert np.allclose(np.array(NORMALISATION["cifar100"]) * 255, [[129.3, 124.1, 112.4], [68.2, 65.4, 70.4]])
    assert NORMALISATION["tiny-imagenet-200"][1] == (0.27698641, 0.26906449, 0.28208191)


def test_every_suffix_in_any_case_and_subfolders(tmp_path: Path) -> None:
    make_tree(tmp_path, train=1, test=1)
    cat = tmp_path / "train" / "cat"
    grey = np.full((32, 32, 3), 90, np.uint8)
    (cat / "more").mkdir()
    for name, kind in (("more/A.JPEG", "JPEG"), ("b.webp", "WEBP"), ("c.jfif", "JPEG"), ("d.jpe", "JPEG")):
        Image.fromarray(grey).save(cat / name, kind)
    data = quiet("folder", tmp_path)
    assert data.train.labels.tolist() == [0] * 5 + [1]
    assert (data.train.images[1:5].int() - 90).abs().max() <= 2


def warnings_of(dataset: str, folder: Path) -> list[str]:
    with warned() as lines:
        load(dataset, folder)
    return lines


@pytest.mark.parametrize(
    "name",
    ["@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "cat/@eaDir/0.png/THUMB.jpg", "cat/._0.png", "__MACOSX/cat/1.png",
     "lost+found/1.png", "#recycle/1.png", "cat/more/.ipynb_checkpoints/1.png", "@Recycle/cat/1.png", "cat/Thumbs.db",
     ".AppleDouble/1.png", "$RECYCLE.BIN/1.png"],
)  # fmt: skip
def test_what_machines_leave_in_folders_is_nobodys_image(tmp_path: Path, name: str) -> None:
    digests = quiet("folder", make_tree(tmp_path)).digests
    for split in ("train", "test"):
        (tmp_path / split / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels()).save(tmp_path / split / name, "PNG")
    data = quiet("folder", tmp_path)
    assert (data.classes, data.digests) == (["cat", "dog"], digests)


def copy_of(root: Path, source: str, target: str) -> Path:
    shutil.copytree(root / source, root / target)
    return root / target


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_val_is_the_validation_set_where_there_is_a_test(tmp_path: Path, name: str) -> None:
    digests = quiet("folder", make_tree(tmp_path)).digests
    Image.fromarray(pixels(seed=9)).save(copy_of(tmp_path, "test", name) / "dog" / "0.png")
    for _ in range(2):  # decoded, and from the cache
        data = quiet("folder", tmp_path, labels_per_class=3)
        assert data.valid is not None
        assert np.array_equal(array(data.valid.images[2]), pixels(seed=9))
        assert data.valid.labels.tolist() == [0, 0, 1, 1]
        assert {split: data.digests[split] for split in digests} == digests
        assert data.describe() == (
            f"6 training images (train/) of 2 classes, 4 validation images ({name}/), 4 test images (test/), 32×32"
        )
    refused(tmp_path, "valid_labels_per_class 1", f"{name}/", valid_labels_per_class=1)
    (tmp_path / name / "dog").rename(tmp_path / name / "cow")
    refused(tmp_path, "'dog' (and 1 more) is missing", repr(str(tmp_path / name)))


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    make_tree(tmp_path)
    copy_of(tmp_path, "test", "val")
    copy_of(tmp_path, "test", "valid")
    refused(tmp_path, "'val' and 'valid'")


@pytest.mark.parametrize("splits", [("train", "test"), ("train", "val"), ("val", "test")])
def test_splits_with_the_same_images_are_a_warning(tmp_path: Path, splits: tuple[str, str]) -> None:
    make_tree(tmp_path)
    if splits[1] == "test":
        shutil.rmtree(tmp_path / "test")
    if "val" in splits and "train" not in splits:
        make_tree(tmp_path / "other")
        (tmp_path / "other" / "test").rename(tmp_path / "val")
    copy_of(tmp_path, *splits)
    (line,) = warnings_of("folder", tmp_path)
    assert f"'{splits[0]}' and '{splits[1]}' hold the same images" in line


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_tree_without_training_images_can_be_tested(tmp_path: Path, name: str) -> None:
    digest = quiet("cifar10", make_tree(tmp_path)).digests["test"]
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "test").rename(tmp_path / name)
    refused(tmp_path, "no folder train")
    data = quiet("cifar10", tmp_path, test_only=True)
    assert (data.digests, len(data.train), data.classes) == ({"test": digest}, 0, ["cat", "dog"])
    assert data.to("cpu").image_size == (32, 32)
    assert quiet("folder", tmp_path, test_only=True, image_size=(16, 24)).image_size == (16, 24)


@pytest.mark.parametrize("inside", [".", "images"])
def test_test_images_without_labels_beside_a_labelled_val(tmp_path: Path, inside: str) -> None:
    make_tree(tmp_path)
    (tmp_path / "test").rename(tmp_path / "val")
    folder = tmp_path / "test" / inside
    folder.mkdir(parents=True)
    Image.fromarray(pixels()).save(folder / "0.png")
    refused(tmp_path, f"if '{tmp_path / 'test'}' has no labels, move it away")
    shutil.rmtree(tmp_path / "test")
    assert len(quiet("folder", tmp_path).test) == 4


def test_a_class_in_two_spellings_is_one_class(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    make_tree(tmp_path, classes=(composed, "tea"))
    (tmp_path / "test" / composed).rename(tmp_path / "test" / decomposed)
    assert quiet("folder", tmp_path).classes == [composed, "tea"]
    (tmp_path / "train" / decomposed).mkdir()
    Image.fromarray(pixels()).save(tmp_path / "train" / decomposed / "9.png")
    assert quiet("folder", tmp_path).train.labels.tolist() == [0] * 5 + [1] * 4


def test_no_visible_file_is_dropped_in_silence(tmp_path: Path) -> None:
    content = (make_tree(tmp_path) / "train" / "cat" / "0.png").read_bytes()
    for name in ("train/stray.png", "train/cat/without_suffix", "train/cat/a.bmp", "test/notes.txt"):
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "test" / "dog" / "pipe")
    with warned() as lines:
        assert len(load("folder", tmp_path).train) == 8
    (line,) = lines
    assert "5 files" in line
    assert "test/dog/pipe" in line


def test_published_files_beside_tiny_imagenets_images_are_no_news(tmp_path: Path) -> None:
    root = make_tiny(tmp_path)
    assert not warnings_of("tiny-imagenet-200", tmp_path)
    (root / "val" / "stray.JPEG").write_bytes((root / "val" / "images" / "val_0.JPEG").read_bytes())
    (line,) = warnings_of("tiny-imagenet-200", tmp_path)
    assert "1 files" in line
    assert "stray.JPEG" in line


def make_tiny(root: Path) -> Path:
    """Tiny-ImageNet-200 as published, with three classes; its test folder has no labels."""
    lines = []
    for label, name in enumerate(("n01", "n02", "n03")):
        (root / "train" / name / "images").mkdir(parents=True)
        (root / "train" / name / f"{name}_boxes.txt").write_text("0 0 1 1\n")
        for i in range(2):
            Image.fromarray(pixels(64, 64, label)).save(root / "train" / name / "images" / f"{name}_{i}.JPEG")
    for folder in ("val", "test"):
        (root / folder / "images").mkdir(parents=True)
    for i, name in enumerate(("n03", "n01", "n02", "n01")):
        Image.fromarray(np.full((64, 64), 10 * i, np.uint8)).save(root / "val" / "images" / f"val_{i}.JPEG")
        Image.fromarray(pixels(64, 64)).save(root / "test" / "images" / f"test_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{name}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def listing(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.name.startswith(".sage-cache")}


@pytest.mark.parametrize("below", ["", "tiny-imagenet-200"])
def test_tiny_imagenet_is_read_in_place(tmp_path: Path, below: str) -> None:
    root = make_tiny(tmp_path / below)
    before = listing(root)
    data = quiet("tiny-imagenet-200", tmp_path)
    assert listing(root) == before
    assert data.classes == ["n01", "n02", "n03"]
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    shown = sorted(zip(data.test.labels.tolist(), data.test.images[:, 0, 0, 0].tolist(), strict=True))
    assert shown == [(0, 10), (0, 30), (1, 20), (2, 0)]
    assert (data.stride, data.padding, data.image_size) == (2, 4, (64, 64))


@pytest.mark.parametrize("below", ["", "images"])
@pytest.mark.parametrize("empty_left", [True, False])
def test_tiny_imagenet_sorted_into_class_folders(tmp_path: Path, below: str, empty_left: bool) -> None:
    val = make_tiny(tmp_path) / "val"
    before = quiet("tiny-imagenet-200", tmp_path)
    for line in (val / "val_annotations.txt").read_text().splitlines():
        name, label = line.split()[:2]
        (val / label / below).mkdir(parents=True, exist_ok=True)
        (val / "images" / name).rename(val / label / below / name)
    if not empty_left:
        (val / "images").rmdir()
    after = quiet("tiny-imagenet-200", tmp_path)
    assert after.classes == before.classes
    assert sorted(after.test.images[:, 0, 0, 0].tolist()) == [0, 10, 20, 30]
    assert after.test.labels.tolist() == [0, 0, 1, 2]


def test_tiny_imagenet_faults(tmp_path: Path) -> None:
    refused(tmp_path, "no folder train", "tiny-imagenet-200.zip", dataset="tiny-imagenet-200")
    annotations = make_tiny(tmp_path) / "val" / "val_annotations.txt"
    good = annotations.read_text()
    for text, words in (
        (good + "val_9.JPEG\tn01\n", ["'val_9.JPEG'", "not in"]),
        (good + "../../train/n01/images/n01_0.JPEG\tn01\n", ["'../../train/n01/images/n01_0.JPEG'"]),
        (good.replace("val_0.JPEG\tn03", "val_0.JPEG\t"), ["missing"]),
        (good.replace("n03", "n09"), ["'n03'", "missing"]),
        ("\n".join(good.splitlines()[:-1]), ["val_3.JPEG", "has no line"]),
        (good + "lonely\n", ["'lonely'"]),
    ):
        annotations.write_text(text)
        refused(tmp_path, *words, dataset="tiny-imagenet-200")
    annotations.write_bytes(b"\xff\xfe\x00")
    refused(tmp_path, "which is not in", dataset="tiny-imagenet-200")


@pytest.fixture
def fabricated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive in CIFAR-100's format with 20 + 10 images, with its checksums made known, and no network."""
    source = torchvision.datasets.CIFAR100
    unpacked = tmp_path / source.base_folder
    unpacked.mkdir()
    sums = {}
    for seed, (name, number) in enumerate((("train", 20), ("test", 10))):
        rows = np.random.default_rng(seed).integers(0, 256, (number, 3072), dtype=np.uint8)
        (unpacked / name).write_bytes(pickle.dumps({"data": rows, "fine_labels": [i % 2 for i in range(number)]}))
    (unpacked / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "bear"]}))
    for file in unpacked.iterdir():
        sums[file.name] = hashlib.md5(file.read_bytes()).hexdigest()
    with tarfile.open(tmp_path / source.filename, "w:gz") as archive:
        archive.add(unpacked, source.base_folder)
    shutil.rmtree(unpacked)
    monkeypatch.setattr(source, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(source, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(source, "meta", {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]})
    monkeypatch.setattr(source, "tgz_md5", hashlib.md5((tmp_path / source.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(source, "url", "http://127.0.0.1:9/" + source.filename)
    return tmp_path


def test_torchvision_files(fabricated: Path) -> None:
    for _ in range(2):  # from the archive, then from the unpacked folder
        data = quiet("cifar100", fabricated)
        assert data.classes == ["apple", "bear"]
        assert data.train.images.shape == (20, 3, 32, 32)
        assert data.train.images.is_contiguous()
        assert data.test.labels.tolist() == [0, 1] * 5
        rows = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
        assert np.array_equal(data.train.images.flatten(1).numpy(), rows)
        (fabricated / "cifar-100-python.tar.gz").unlink(missing_ok=True)


@pytest.fixture
def served(fabricated: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The archive is on a server instead; what was asked of it."""
    source, asked = torchvision.datasets.CIFAR100, []
    folder = tmp_path_factory.mktemp("server")
    shutil.move(fabricated / source.filename, folder)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given, directory=str(folder))

        def log_request(self, *_: object) -> None:
            asked.append(self.command)
            time.sleep(0.2)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(source, "url", f"http://127.0.0.1:{server.server_port}/{source.filename}")
    return asked


def test_one_job_downloads_and_the_others_wait(
    fabricated: Path, served: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        digests = [data.digests for data in pool.map(lambda _: quiet("cifar100", fabricated / "new"), range(8))]
    assert all(one == digests[0] for one in digests)
    assert len(served) == 2  # torchvision first asks where the file was moved to
    assert capfd.readouterr() == ("", "")  # no bar in a log file
    names = {path.name for path in (fabricated / "new").iterdir()}
    assert names == {".cifar-100-python.tar.gz.lock", "cifar-100-python"}


def test_the_unpacked_folder_itself_may_be_named(fabricated: Path) -> None:
    digests = quiet("cifar100", fabricated).digests
    assert quiet("cifar100", fabricated / "cifar-100-python").digests == digests


def test_an_archive_in_a_folder_that_may_only_be_read(fabricated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_data.os, "access", lambda *_: False)
    before = set(fabricated.iterdir())
    assert len(quiet("cifar100", fabricated).train) == 20
    assert set(fabricated.iterdir()) == before


def test_altered_torchvision_files_are_not_opened(fabricated: Path) -> None:
    quiet("cifar100", fabricated)
    archive, unpacked = fabricated / "cifar-100-python.tar.gz", fabricated / "cifar-100-python" / "train"
    content = archive.read_bytes()
    archive.write_bytes(content[:100] + b"x" + content[101:])
    unpacked.write_bytes(b"cos\nabort\n(tR.")  # would end the process
    refused(fabricated, archive.name, torchvision.datasets.CIFAR100.tgz_md5, str(fabricated), dataset="cifar100")
    assert archive.exists()


def test_without_network_the_message_names_what_to_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torchvision.datasets.CIFAR10.url
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    folder = tmp_path / "data"
    refused(
        folder,
        "cifar10 is not in",
        repr(str(folder)),
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        "127.0.0.1",
        "cifar-10-batches-py",
        "train/<class>/",
        dataset="cifar10",
    )
    assert original.startswith("https://")


def test_digits() -> None:
    data = quiet("digits", Path("nowhere"))
    assert data.image_size == (32, 32)
    assert len(data.train) + len(data.test) == 1797
    assert data.classes == list("0123456789")
    for label in range(10):
        share = (data.test.labels == label).sum() / (torch.cat([data.train.labels, data.test.labels]) == label).sum()
        assert 0.19 < share < 0.21
    assert not data.flip
    again = quiet("digits", Path("nowhere"), seed=5)
    assert torch.equal(again.test.images, data.test.images)


def test_mean_and_std_are_measured_on_the_training_images(tmp_path: Path) -> None:
    data = quiet("folder", make_tree(tmp_path), labels_per_class=2, seed=3)
    values = data.train.images.double() / 255
    assert torch.allclose(torch.tensor(data.mean).double(), values.mean(dim=(0, 2, 3)))
    assert torch.allclose(torch.tensor(data.std).double(), values.std(dim=(0, 2, 3), correction=0))


@pytest.mark.parametrize("shape", [(2500, 3, 16, 12), (5, 3, 600, 700), (1, 3, 3, 2**20 + 5)])
def test_pieces_change_nothing_of_mean_and_std(shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values = images.transpose(0, 1).flatten(1).to(torch.int64)
    mean = values.sum(dim=1).numpy() / values.shape[1]
    std = np.sqrt(values.square().sum(dim=1).numpy() / values.shape[1] - mean**2)
    assert load_data._mean_std(images) == (tuple((mean / 255).tolist()), tuple((std / 255).tolist()))


def test_images_of_one_colour_have_a_positive_std(tmp_path: Path) -> None:
    make_tree(tmp_path)
    for path in tmp_path.rglob("*.png"):
        Image.new("RGB", (32, 32), (7, 8, 9)).save(path)
    data = quiet("folder", tmp_path)
    assert min(data.std) > 0
    for images, _ in load_data.train_batches(data, batch_size=3, seed=0, epoch=0, device="cpu"):
        assert images.isfinite().all()


# ---------------------------------------------------------------------------------------------------------- image sizes


@pytest.mark.parametrize(
    ("size", "image_size", "expected"),
    [((20, 28), None, (20, 28)), ((20, 28), 16, (16, 16)), ((40, 130), None, (64, 64)), ((128, 96), None, (128, 96))],
)
def test_sizes_of_own_images(
    tmp_path: Path, size: tuple[int, int], image_size: int | None, expected: tuple[int, int]
) -> None:
    make_tree(tmp_path, size=size, train=1, test=1)
    assert quiet("folder", tmp_path, image_size=image_size).image_size == expected


def test_different_sizes_become_64(tmp_path: Path) -> None:
    make_tree(tmp_path, size=(32, 32))
    Image.fromarray(pixels(33, 32)).save(tmp_path / "test" / "dog" / "odd.png")
    assert quiet("folder", tmp_path).image_size == (64, 64)
    assert quiet("cifar10", tmp_path).image_size == (32, 32)


def test_the_centre_is_kept_and_proportions_too(tmp_path: Path) -> None:
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = pixels(40, 40)
    wide[:, :40], wide[:, 80:] = 255, 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert np.array_equal(read_image(str(tmp_path / "wide.png"), 40, 40), wide[:, 40:80])
    small = read_image(str(tmp_path / "wide.png"), 20, 20)
    expected = np.asarray(Image.fromarray(wide[:, 40:80]).resize((20, 20), Image.Resampling.BICUBIC))
    assert np.array_equal(small[:, 2:-2], expected[:, 2:-2])  # the filter sees what lies beside the square


def test_large_photographs_look_the_same_when_decoded_small(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:600, :900] / 900
    smooth = (np.stack([rows, columns, 1 - columns], axis=2) * 255).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    whole = Image.fromarray(smooth).resize((32, 32), Image.Resampling.BICUBIC, box=(150, 0, 750, 600))
    assert np.abs(read_image(str(tmp_path / "a.jpg"), 32, 32).astype(int) - np.asarray(whole)).max() <= 3


def test_a_line_of_pixels_does_not_explode(tmp_path: Path) -> None:
    Image.new("RGB", (60000, 1), "red").save(tmp_path / "line.png")
    assert (read_image(str(tmp_path / "line.png"), 64, 64) == [255, 0, 0]).all()


# ---------------------------------------------------------------------------------------------------------- pixel kinds


def saved(tmp_path: Path, image: Image.Image, name: str = "a.png", **options: Any) -> np.ndarray:
    image.save(tmp_path / name, **options)
    return read_image(str(tmp_path / name), image.height, image.width)


def test_grey_bilevel_and_16_bit(tmp_path: Path) -> None:
    grey = pixels()[:, :, 0]
    assert np.array_equal(saved(tmp_path, Image.fromarray(grey)), grey[:, :, None].repeat(3, axis=2))
    two = saved(tmp_path, Image.fromarray(grey > 127))
    assert np.array_equal(two[:, :, 1], np.where(grey > 127, 255, 0))
    deep = np.random.default_rng(1).integers(0, 2**16, (32, 32)).astype(np.uint16)
    assert np.array_equal(saved(tmp_path, Image.fromarray(deep)), (deep >> 8)[:, :, None].repeat(3, axis=2))


def test_16_bit_colour(tmp_path: Path) -> None:
    deep = np.random.default_rng(1).integers(0, 2**16, (8, 8, 3)).astype(">u2")

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in deep)))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b""))
    assert np.array_equal(read_image(str(tmp_path / "a.png"), 8, 8), deep >> 8)


def test_palette_and_cmyk(tmp_path: Path) -> None:
    palette = Image.fromarray(pixels()).quantize(16)
    assert np.array_equal(saved(tmp_path, palette), np.asarray(palette.convert("RGB")))
    cmyk = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    assert np.abs(saved(tmp_path, cmyk, "a.jpg").astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_transparency_lies_over_white(tmp_path: Path, name: str) -> None:
    colours = np.zeros((32, 32, 4), np.uint8)
    colours[:, :, 0] = 200
    colours[:16, :, 3] = 255
    colours[16:24, :, 3] = 51
    got = saved(tmp_path, Image.fromarray(colours), name, **({"lossless": True} if name == "a.webp" else {}))
    assert (got[:16] == [200, 0, 0]).all()
    assert (got[16:24] == [244, 204, 204]).all()
    assert (got[24:] == 255).all()


def test_transparent_values_of_grey_palette_and_16_bit(tmp_path: Path) -> None:
    grey = Image.new("L", (8, 8), 10)
    assert (saved(tmp_path, grey, transparency=10) == 255).all()
    assert (saved(tmp_path, grey, transparency=11) == 10).all()
    assert (saved(tmp_path, grey.convert("LA"), "b.png") == 10).all()
    palette = Image.fromarray(pixels()).quantize(4)
    got = saved(tmp_path, palette, transparency=2)
    assert (got[np.asarray(palette) == 2] == 255).all()
    deep = np.full((8, 8), 5000, np.uint16)
    assert (saved(tmp_path, Image.fromarray(deep), transparency=5000) == 255).all()


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_first_frame_of_an_animation(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    got = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], lossless=True)
    assert (got == [255, 0, 0]).all()


@pytest.mark.parametrize("where", ["PNG", "JPEG", "WEBP", "late eXIf", "text", "XMP", "XMP of JPEG"])
def test_orientation_is_applied_wherever_it_stands(tmp_path: Path, where: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image, path = Image.fromarray(pixels()), tmp_path / "a"
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    if where == "XMP of JPEG":
        image.save(path, "JPEG", xmp=xmp)
    elif where in ("PNG", "JPEG", "WEBP"):
        image.save(path, where, exif=exif)
    else:
        info = PngInfo()
        if where == "XMP":
            info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        if where == "text":
            content = exif.tobytes()
            info.add_text("Raw profile type exif", f"\nexif\n{len(content):8}\n{content.hex()}\n")
        image.save(path, "PNG", pnginfo=info)
        if where == "late eXIf":
            content, body = path.read_bytes(), b"eXIf" + exif.tobytes()[6:]
            chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
            path.write_bytes(content[:-12] + chunk + content[-12:])
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
        assert not np.array_equal(expected, np.asarray(stored))
    assert np.array_equal(read_image(str(path), 32, 32), expected)


# ------------------------------------------------------------------------------------------------------ untrusted files


def bmp(path: Path) -> None:
    Image.fromarray(pixels()).save(path, format="BMP")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        *(
            (content, [])
            for content in (b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"GIF89a")
        ),
        (bmp, ["not a PNG, JPEG or WebP"]),
        (truncated, ["replace or remove"]),
        (Image.new("1", (9000, 9000)).save, ["9000×9000"]),
        (Image.new("1", (20000, 20000)).save, []),
    ],
)
def test_what_is_no_sound_image_is_refused(tmp_path: Path, spoil: Any, words: list[str]) -> None:
    path = make_tree(tmp_path, train=2, test=1) / "train" / "dog" / "1.png"
    (path.write_bytes if isinstance(spoil, bytes) else lambda how: how(path))(spoil)
    for size in (None, 16):
        refused(tmp_path, repr(str(path)), *words, image_size=size)


def test_all_damaged_images_are_named_at_once(tmp_path: Path) -> None:
    make_tree(tmp_path, train=20)
    paths = sorted((tmp_path / "train" / "cat").iterdir())
    paths[0].write_bytes(b"")
    paths[1].write_bytes(paths[1].read_bytes()[:-200])
    for size in (None, 16):
        refused(tmp_path, "cannot read 2 images", repr(str(paths[0])), repr(str(paths[1])), image_size=size)
    for path in paths[2:12]:
        path.write_bytes(b"hello")
    refused(tmp_path, "cannot read 12 images", repr(str(paths[9])), "and 2 more")


def test_links_are_followed_and_broken_ones_named(tmp_path: Path) -> None:
    path = make_tree(tmp_path, train=2, test=1) / "train" / "dog" / "1.png"
    for name, target in (("lost.png", "nowhere"), ("lost.png", "lost.png"), ("again", path.parent.parent)):
        (path.parent / name).symlink_to(target)
        refused(tmp_path, name)
        (path.parent / name).unlink()
    moved = tmp_path / "elsewhere.png"
    path.rename(moved)
    path.symlink_to(moved)
    assert len(quiet("folder", tmp_path).train) == 4


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("which", ["1.png", "."])
def test_unreadable(tmp_path: Path, which: str) -> None:
    path = make_tree(tmp_path, train=2, test=1) / "train" / "dog" / which
    path.chmod(0)
    refused(tmp_path, str(path))
    path.chmod(0o700)


@pytest.mark.parametrize(
    "name", ["猫", "кошка", "قطة", "γάτα", "a\u200cb", "e\u0301", "with space", "it's", '"', "%s{}"]
)
def test_names_in_any_script(tmp_path: Path, name: str) -> None:
    make_tree(tmp_path, classes=(name, "zz"), train=1, test=1)
    path = tmp_path / "train" / name / f"{name}.png"
    Image.fromarray(pixels()).save(path)
    for _ in range(2):
        data = quiet("folder", tmp_path)
        assert sorted(data.classes) == sorted([unicodedata.normalize("NFC", name), "zz"])
        assert len(data.train) == 3
    path.write_bytes(b"")
    refused(tmp_path, repr(str(path)))


@pytest.mark.parametrize("name", [b"\xff\xfe", b"two\nlines", b"\x1b[31m"])
def test_names_that_are_no_text(tmp_path: Path, name: bytes) -> None:
    """Of files they do not matter, of classes they are refused."""
    path = make_tree(tmp_path) / "train" / "dog"
    try:
        os.rename(path / "1.png", os.fsencode(path) + b"/" + name + b".png")
    except OSError:
        pytest.skip("the file system does not take such names")
    for _ in range(2):
        assert len(quiet("folder", tmp_path).train) == 8
    os.mkdir(os.fsencode(path.parent) + b"/" + name)
    refused(tmp_path, "not a line of text")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels(16, 16))
    if kind == "palette":
        image.quantize(8).save(buffer, "PNG", transparency=1)
    elif kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 3
        image.save(buffer, "JPEG", exif=exif)
    elif kind == "animation":
        image.save(buffer, "WEBP", save_all=True, append_images=[image.rotate(90)])
    else:
        image.save(buffer, kind)
    return buffer.getvalue()


GOOD = {kind: encoded(kind) for kind in ("PNG", "JPEG", "WEBP", "palette", "exif", "animation")}


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from(sorted(GOOD)),
    cut=st.none() | st.integers(0, 3000),
    changes=st.lists(st.tuples(st.integers(0, 3000) | st.integers(0, 120), st.integers(0, 255)), max_size=4),
)
def test_damaged_images_load_or_are_refused_with_their_path(
    kind: str, cut: int | None, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(GOOD[kind])
    for position, value in changes:
        content[position % len(content)] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spoilt.png"
        path.write_bytes(content[:cut])
        message = ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = read_image(str(path), 16, 16)
            assert image.shape == (16, 16, 3)
            assert image.dtype == np.uint8
        except UserError as error:
            message = str(error)
    assert not message or (repr(str(path)) in message and len(message.splitlines()) == 1)


# ------------------------------------------------------------------------------------------------------ faults of trees


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    refused(tmp_path / "no", "does not exist", repr(str(tmp_path / "no")), "train/<class>/")
    refused(tmp_path, "no folder train")
    (tmp_path / "train").mkdir()
    refused(tmp_path, "no class folders")
    refused(tmp_path, "cifar11", "cifar10", dataset="cifar11")
    tree = make_tree(tmp_path / "tree", classes=("ant", "bee", "cat", "dog"))
    refused(tree, "image_size 16", "cifar10", dataset="cifar10", image_size=16)
    (tree / "test" / "dog").rename(tree / "test" / "Dog")
    refused(tree, "'dog'", repr(str(tree / "test")), "1 more")
    shutil.rmtree(tree / "test")
    refused(tree, "neither test nor val")
    refused(make_tree(tmp_path / "one", classes=("cat",)), "one class")


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_class(tmp_path: Path, split: str) -> None:
    make_tree(tmp_path)
    (tmp_path / split / "cow").mkdir()
    (tmp_path / split / "cow" / "a.txt").write_text("no image")
    refused(tmp_path, repr(str(tmp_path / split / "cow")), "no PNG")


# ---------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the images that were decoded."""
    paths: list[str] = []

    def spy(path: str, height: int, width: int) -> np.ndarray:
        paths.append(path)
        return read_image(path, height, width)

    monkeypatch.setattr(image_files, "read_image", spy)
    return paths


def same(a: Data, b: Data) -> bool:
    parts = ((a.train, b.train), (a.test, b.test))
    return all(torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) for x, y in parts)


@pytest.mark.parametrize("dataset", ["cifar10", "folder"])
def test_decoded_once(tmp_path: Path, reads: list[str], dataset: str) -> None:
    before = set(make_tree(tmp_path / "a").iterdir())
    first = quiet(dataset, tmp_path / "a", cache=False)
    assert set((tmp_path / "a").iterdir()) == before
    for _ in range(2):
        assert same(first, quiet(dataset, tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert same(first, quiet(dataset, tmp_path / "b"))
    assert len(reads) == 24


def test_changes_of_files_are_seen(tmp_path: Path, reads: list[str]) -> None:
    make_tree(tmp_path)
    quiet("folder", tmp_path)
    dog = tmp_path / "train" / "dog"

    def changed() -> Data:
        reads.clear()
        data = quiet("folder", tmp_path)
        assert reads
        return data

    Image.fromarray(pixels(seed=77)).save(dog / "9.png")
    assert len(changed().train) == 9
    (dog / "9.png").rename(dog / "8.png")
    changed()
    (dog / "8.png").unlink()
    assert len(changed().train) == 8
    info = (dog / "1.png").stat()
    os.utime(dog / "1.png", ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    changed()
    (tmp_path / "train" / "dog" / "0.png").rename(tmp_path / "test" / "dog" / "7.png")
    assert len(changed().test) == 5
    reads.clear()
    quiet("folder", tmp_path)
    assert not reads


def test_replaced_files_of_the_same_size_and_time_are_seen(tmp_path: Path) -> None:
    digests = quiet("folder", make_tree(tmp_path)).digests
    cat, dog = (tmp_path / "train" / name / "0.png" for name in ("cat", "dog"))
    for path in (cat, dog):
        Image.new("RGB", (32, 32), (9, 9, 9) if path is cat else (8, 8, 8)).save(path)
        os.utime(path, ns=(10**18, 10**18))
    assert cat.stat().st_size == dog.stat().st_size
    before = quiet("folder", tmp_path).digests
    assert before != digests
    cat.rename(tmp_path / "kept")
    dog.rename(cat)
    (tmp_path / "kept").rename(dog)
    swapped = quiet("folder", tmp_path).digests
    assert swapped["train"] != before["train"]
    content = cat.read_bytes()
    cat.write_bytes(dog.read_bytes())  # in place
    dog.write_bytes(content)
    for path in (cat, dog):
        os.utime(path, ns=(10**18, 10**18))
    assert quiet("folder", tmp_path).digests == before


def test_sizes_have_caches_of_their_own(tmp_path: Path, reads: list[str]) -> None:
    make_tree(tmp_path)
    for size in (16, 24, 16, 24):
        assert quiet("folder", tmp_path, image_size=size).image_size == (size, size)
    assert len(reads) == 24


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Data, bytes]:
    root = make_tree(tmp_path_factory.mktemp("cached"), train=1, test=1, size=(16, 16))
    data = quiet("folder", root)
    return root, data, (root / ".sage-cache-auto.npz").read_bytes()


@settings(max_examples=150, deadline=None)
@given(cut=st.none() | st.integers(0, 6000), position=st.integers(0, 6000), value=st.integers(1, 255))
def test_damaged_cache_is_made_again(
    cached: tuple[Path, Data, bytes], cut: int | None, position: int, value: int
) -> None:
    root, data, good = cached
    path = root / ".sage-cache-auto.npz"
    content = bytearray(good)
    content[position % len(content)] ^= value
    path.write_bytes(content[:cut])
    with warned() as lines:
        assert same(load("folder", root), data)
    assert len(lines) <= 1  # a byte that nobody reads may differ
    assert same(quiet("folder", root), data)


def test_foreign_caches_are_not_trusted(tmp_path: Path) -> None:
    data = quiet("folder", make_tree(tmp_path))
    path = tmp_path / ".sage-cache-auto.npz"
    with np.load(path) as archive:
        key, train, test, digests = (archive[name] for name in ("key", "train", "test", "digests"))
    for write in (
        lambda file: np.savez(file, key=key, digests=digests, train=train[:3], test=test),
        lambda file: np.savez(file, key=key, digests=digests, train=train.astype(float), test=test),
        lambda file: np.savez(file, key=key, digests=digests, train=train),
        lambda file: np.savez(file, key=key, train=train, test=test),
        lambda file: np.savez(file, key=key, digests=digests, train=np.array([print], dtype=object), test=test),
        lambda file: np.savez(file, key=key, digests=digests, train=np.array(3), test=test),
        lambda file: np.save(file, train),
        lambda file: pickle.dump({"key": key}, file),
    ):
        with path.open("wb") as file:
            write(file)
        with warned() as lines:
            assert same(load("folder", tmp_path), data)
        assert len(lines) == 1
        assert "decoded again" in lines[0]


def test_data_dir_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path)

    def refuse(path: str) -> None:
        raise OSError(30, "Read-only file system", path)

    monkeypatch.setattr(image_files, "atomic_write", refuse)
    with warned() as lines:
        assert len(load("folder", tmp_path).train) == 8
    assert len(lines) == 1
    assert "Read-only" in lines[0]


# -------------------------------------------------------------------------------------------------------------- digests


def test_digests_are_of_the_whole_data_whatever_is_chosen(tmp_path: Path, reads: list[str]) -> None:
    make_tree(tmp_path)
    digests = quiet("folder", tmp_path).digests
    assert digests.keys() == {"train", "test"}
    assert digests["train"] != digests["test"]
    assert all(len(digest) == 32 for digest in digests.values())
    for chosen in ({"labels_per_class": 2, "seed": 3}, {"valid_labels_per_class": 1, "seed": 4}, {"cache": False}):
        assert quiet("folder", tmp_path, **chosen).digests == digests
    assert quiet("cifar10", tmp_path).digests == digests  # the same pixels
    assert quiet("folder", tmp_path, image_size=16).digests["test"] != digests["test"]


def test_one_pixel_of_one_image_makes_other_data(tmp_path: Path) -> None:
    digests = quiet("folder", make_tree(tmp_path / "a")).digests
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # with its cache and times
    assert quiet("folder", tmp_path / "b").digests == digests
    path = tmp_path / "b" / "test" / "dog" / "1.png"
    image = np.asarray(Image.open(path)).copy()
    image[31, 31, 2] ^= 1
    Image.fromarray(image).save(path)
    other = quiet("folder", tmp_path / "b").digests
    assert other["train"] == digests["train"]
    assert other["test"] != digests["test"]


def test_digests_are_kept_with_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = quiet("folder", make_tree(tmp_path)).digests
    taken: list[int] = []
    monkeypatch.setattr(image_files, "pixel_digest", lambda images: taken.append(len(images)) or f"{len(images):032}")
    assert quiet("folder", tmp_path).digests == digests
    assert not taken


def test_digests_without_a_tree(fabricated: Path) -> None:
    digests = quiet("cifar100", fabricated).digests
    assert quiet("cifar100", fabricated, labels_per_class=3).digests == digests
    digits = [quiet("digits", fabricated, seed=seed).digests for seed in (0, 1)]
    assert digits[0] == digits[1] != digests


@pytest.mark.parametrize("changed", [(0, 0, 0, 0), (63, 2, 159, 127)])
def test_the_digest_sees_every_piece(changed: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (64, 3, 160, 160), dtype=np.uint8)  # more than one piece
    digest = image_files.pixel_digest(images)
    assert digest == image_files.pixel_digest(images.copy())
    assert digest != image_files.pixel_digest(images[:, :, :, ::-1])
    assert digest != image_files.pixel_digest(images.reshape(64, 3, 320, 80))
    assert digest != image_files.pixel_digest(np.roll(images, 1, axis=0))
    images[tuple(part % size for part, size in zip(changed, images.shape, strict=True))] ^= 1
    assert digest != image_files.pixel_digest(images)


@pytest.mark.parametrize(
    ("given", "aside", "limit"), [(None, 0, None), (12, 0, None), (13, 0, None), (11, 0, 11), (10, 2, None), (9, 2, 9)]
)
def test_the_limit_is_the_one_that_acted(
    tmp_path_factory: pytest.TempPathFactory, given: int | None, aside: int, limit: int | None
) -> None:
    root = tmp_path_factory.getbasetemp() / "twelve"
    if not root.exists():
        make_tree(root, train=12, test=1, size=(8, 8))
    chosen = {"labels_per_class": given, "valid_labels_per_class": aside}
    assert load("folder", root, **chosen).limit == limit


# ----------------------------------------------------------------------------------------------------- choice of images


def test_labels_per_class(tmp_path: Path) -> None:
    make_tree(tmp_path, train=12)
    whole = quiet("folder", tmp_path)
    few = quiet("folder", tmp_path, labels_per_class=5, seed=1)
    assert few.train.labels.tolist() == [0] * 5 + [1] * 5
    assert torch.equal(few.test.images, whole.test.images)
    assert same(few, quiet("folder", tmp_path, labels_per_class=5, seed=1))
    assert not same(few, quiet("folder", tmp_path, labels_per_class=5, seed=2))
    assert same(whole, quiet("folder", tmp_path, labels_per_class=12, seed=3))


def test_validation_images_are_others(tmp_path: Path) -> None:
    make_tree(tmp_path, train=12)
    few = quiet("folder", tmp_path, labels_per_class=5, seed=1)
    both = quiet("folder", tmp_path, labels_per_class=5, valid_labels_per_class=4, seed=1)
    assert both.valid is not None
    assert same(few, both)
    assert both.valid.labels.tolist() == [0] * 4 + [1] * 4
    keys = [{image.numpy().tobytes() for image in part.images} for part in (both.train, both.valid)]
    assert len(keys[0] | keys[1]) == 18
    rest = quiet("folder", tmp_path, valid_labels_per_class=4, seed=1)
    assert len(rest.train) == 16
    refused(tmp_path, "valid_labels_per_class 12", "'cat'", valid_labels_per_class=12)


def test_more_labels_than_images_is_one_line(tmp_path: Path) -> None:
    make_tree(tmp_path, train=4)
    (tmp_path / "train" / "dog" / "0.png").unlink()
    with warned() as lines:
        data = load("folder", tmp_path, labels_per_class=4)
        assert data.train.labels.tolist() == [0] * 4 + [1] * 3
        data = load("folder", tmp_path, labels_per_class=5000, valid_labels_per_class=1)
    assert len(data.train) == 5
    assert len(lines) == 2
    assert "labels_per_class 4: class 'dog'" in lines[0]
    assert "3" in lines[0]
    assert "2 of 2 classes" in lines[1]


# -------------------------------------------------------------------------------------------------------------- batches


def numbered(number: int, height: int = 8, width: int = 10, **changes: Any) -> Data:
    """Images whose every pixel tells image, row and column, and is never 0."""
    index, row, column = np.ogrid[:number, :height, :width]
    planes = [np.broadcast_to(part + 1, (number, height, width)) for part in (index, row, column)]
    images = torch.from_numpy(np.stack(planes, axis=1).astype(np.uint8))
    split = Split(images, torch.arange(number))
    names = [str(k) for k in range(number)]
    values = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "flip": True, **changes}
    return Data("folder", "test", names, train=split, test=split, valid=None, **values)


def epoch(data: Data, **arguments: Any) -> tuple[Tensor, Tensor]:
    settings = {"batch_size": 7, "seed": 1, "epoch": 0, "device": "cpu", **arguments}
    images, labels = zip(*load_data.train_batches(data, **settings), strict=True)
    return torch.cat(images), torch.cat(labels)


def original(images: Tensor, data: Data) -> np.ndarray:
    """Bytes again."""
    mean, std = (torch.tensor(colour)[:, None, None] for colour in (data.mean, data.std))
    return ((images * std + mean) * 255).round().to(torch.uint8).numpy()


@pytest.mark.parametrize("height", [8, 64])
@pytest.mark.parametrize("flip", [True, False])
def test_flip_then_crop_with_black_around(height: int, flip: bool) -> None:
    data = numbered(200, height, height + 2, flip=flip)
    padding, width = data.padding, height + 2
    images, labels = epoch(data)
    assert sorted(labels.tolist()) == list(range(200))
    seen = set()
    for image, label in zip(original(images, data), labels.tolist(), strict=True):
        source = data.train.images[label].numpy()
        matches = []
        for mirrored in (False, True):
            padded = np.pad(source[:, :, ::-1] if mirrored else source, [(0, 0), (padding,) * 2, (padding,) * 2])
            for dy in range(2 * padding + 1):
                for dx in range(2 * padding + 1):
                    if np.array_equal(padded[:, dy : dy + height, dx : dx + width], image):
                        matches.append((mirrored, dy, dx))
        assert len(matches) == 1
        seen.update(matches)
    assert {mirrored for mirrored, _, _ in seen} == ({True, False} if flip else {False})
    every = set(range(2 * padding + 1))
    assert {dy for _, dy, _ in seen} == every
    assert {dx for _, _, dx in seen} == every


def test_half_of_the_images_are_flipped() -> None:
    images, _ = epoch(numbered(2000, 8, 8))
    columns = images[:, 2, 4, 3] > images[:, 2, 4, 4]
    assert 0.46 < columns.float().mean() < 0.54


def test_every_image_once_and_the_last_batch_is_smaller() -> None:
    data = numbered(23)
    sizes = [len(labels) for _, labels in load_data.train_batches(data, batch_size=10, seed=0, epoch=0, device="cpu")]
    assert sizes == [10, 10, 3]
    assert load_data.steps_per_epoch(23, 10) == 3
    assert load_data.steps_per_epoch(20, 10) == 2
    assert load_data.steps_per_epoch(5, 10) == 1


def test_epoch_depends_on_seed_epoch_and_position_alone() -> None:
    data = numbered(50)
    images, labels = epoch(data, seed=3, epoch=5)
    torch.manual_seed(99)
    np.random.seed(99)
    again, same_labels = epoch(data, seed=3, epoch=5, batch_size=11)  # the batch size is no part of it
    assert torch.equal(images, again)
    assert torch.equal(labels, same_labels)
    for other in ({"seed": 4, "epoch": 5}, {"seed": 3, "epoch": 6}, {"seed": 5, "epoch": 3}):
        assert not torch.equal(labels, epoch(data, **other)[1])
    state = torch.get_rng_state()
    epoch(data)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("start", [0, 1, 3, 7])
def test_start_equals_skipping(start: int) -> None:
    data = numbered(50)
    images, labels = epoch(data)
    rest, rest_labels = epoch(data, start=start)
    assert torch.equal(images[7 * start :], rest)
    assert torch.equal(labels[7 * start :], rest_labels)


def test_test_batches_are_plain() -> None:
    data = numbered(23)
    images, labels = zip(*load_data.test_batches(data.test, data, batch_size=10, device="cpu"), strict=True)
    assert [len(part) for part in labels] == [10, 10, 3]
    assert torch.cat(labels).tolist() == list(range(23))
    mean, std = (torch.tensor(colour)[:, None, None] for colour in (data.mean, data.std))
    assert torch.allclose(torch.cat(images), (data.test.images.float() / 255 - mean) / std, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kept_on_host", [False, True])
def test_the_device_changes_nothing(kept_on_host: bool) -> None:
    data = numbered(50)
    images, labels = epoch(data)
    on_device = data if kept_on_host else data.to("cuda")
    moved, moved_labels = epoch(on_device, device="cuda")
    assert torch.equal(moved.cpu(), images)
    assert torch.equal(moved_labels.cpu(), labels)


# ------------------------------------------------------------------------------------------------------------- commands

TRAIN = ("--arch", "preactresnet18", "--initial_channels", 2, "--epochs", 1, "--batch_size", 4, "--ngpu", 0)


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, list[object]]:
    """Images of 16×24 and the flags of a run on them."""
    root = make_tree(tmp_path / "images", size=(16, 24))
    return root, ["--dataset", "folder", "--data_dir", root, "--root_dir", tmp_path / "runs", *TRAIN]


def test_val_chooses_the_best_and_the_first_line_says_so(tmp_path: Path, small: tuple[Path, list[object]]) -> None:
    root, words = small
    make_tree(tmp_path / "other", train=3, size=(16, 24))
    (tmp_path / "other" / "train").rename(root / "val")
    done = main(*words)
    assert "8 training images (train/) of 2 classes, 6 validation images (val/), 4 test images (test/)" in done.stdout
    assert "valid_top1" in next((tmp_path / "runs").glob("*/metrics.csv")).read_text().splitlines()[0]


def test_a_network_reads_images_of_its_own_size_and_needs_no_training_images(
    tmp_path: Path, small: tuple[Path, list[object]]
) -> None:
    root, words = small
    main(*words)
    (path,) = (tmp_path / "runs").glob("*/checkpoint.pth.tar")
    flags = ["--evaluate", "--resume", path, "--ngpu", 0, "--data_dir"]
    expected = main(*flags, root).stdout
    shutil.rmtree(root / "train")
    assert main(*flags, root).stdout == expected
    larger = make_tree(tmp_path / "larger", size=(32, 48))
    assert "image_size" not in main(*flags, larger).stderr


@pytest.mark.parametrize("method", ["puzzle", "comix"])
def test_sizes_that_cannot_be_cut_name_image_size(tmp_path: Path, method: str) -> None:
    root = make_tree(tmp_path / "images", size=(30, 30))
    done = main("--dataset", "folder", "--data_dir", root, "--log_off", 1, *TRAIN, "--method", method, check=2)
    assert "--image_size" in done.stderr
    assert done.stderr.count("\n") == 1
