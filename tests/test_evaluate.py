"""Corruptions, attacks and calibration against hand-computed cases, and scripts/evaluate.py on a small run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import Normalize

from load_data import load
from tests.common import MEAN, SMALL, STD, main, rows, run
from utils import options, tables
from utils.errors import BadArguments
from utils.files import read_records
from utils.robustness import CORRUPTIONS, calibration, corrupt, fgsm, pgd
from utils.test_sets import CIFAR10, CLASSES_OF_ARRAYS, corrupted_sets, digest_of, open_set, refuse_unknown_arrays

CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""


def test_calibration_error_of_a_hand_computed_case() -> None:
    # two classes: confidence p is the logit log(p / (1 - p)) of the class guessed
    confidence = [0.55, 0.58, 0.95, 0.91, 0.99, 0.73]
    right = [True, False, True, True, False, True]
    logits = torch.tensor([[math.log(p / (1 - p)), 0.0] for p in confidence], dtype=torch.float64)
    labels = torch.tensor([0 if yes else 1 for yes in right])
    error, bins = calibration(logits, labels, bins=10)
    # bins (0.5, 0.6]: accuracy 1/2, confidence 0.565; (0.7, 0.8]: 1, 0.73; (0.9, 1]: 2/3, 0.95
    assert error == pytest.approx(2 / 6 * 0.065 + 1 / 6 * 0.27 + 3 / 6 * (0.95 - 2 / 3))
    assert [n for n, _, _ in bins] == [0, 0, 0, 0, 0, 2, 0, 1, 0, 3]
    assert bins[9][1:] == pytest.approx((2 / 3, 0.95))
    assert math.isnan(bins[0][1])


def test_calibration_error_of_one_bin_is_accuracy_beside_confidence() -> None:
    logits = 3 * torch.randn(200, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(200) % 5
    confidence = logits.double().softmax(1).amax(1).mean()
    accuracy = (logits.argmax(1) == labels).double().mean()
    assert calibration(logits, labels, 1)[0] == pytest.approx(float(abs(accuracy - confidence)))
    certain, bins = calibration(1e4 * F.one_hot(labels, 5).float(), labels)  # confidence 1 belongs to the last bin
    assert certain == 0
    assert bins[-1] == (200, 1.0, 1.0)
    assert [n for n, _, _ in calibration(torch.zeros(3, 2), torch.zeros(3).long(), 2)[1]] == [3, 0]  # (0, ½] has ½


@pytest.fixture(scope="module")
def colourful() -> Tensor:
    """Smooth blobs of colour under a fine texture, not square."""
    generator = torch.Generator().manual_seed(0)
    coarse, fine = (torch.randn(12, 3, *size, generator=generator) for size in ((6, 5), (48, 40)))
    pixels = 128 + 45 * F.interpolate(coarse, (48, 40), mode="bicubic") + 12 * fine
    return pixels.clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions(name: str, colourful: Tensor) -> None:
    before = colourful.clone()
    results = [corrupt(colourful, name, severity, seed=3) for severity in range(1, 6)]
    assert torch.equal(colourful, before)
    assert all(r.shape == colourful.shape and r.dtype == torch.uint8 for r in results)
    distance = [(r.float() - colourful.float()).abs().mean().item() for r in results]
    assert 0.5 < distance[0] < distance[-1] < 100
    assert distance == sorted(distance)
    assert torch.equal(results[2], corrupt(colourful, name, 3, seed=3))
    is_random = name.endswith("noise") or name == "elastic_transform"
    assert is_random != torch.equal(results[2], corrupt(colourful, name, 3, seed=4))
    assert torch.equal(results[2][:5], corrupt(colourful[:5], name, 3, seed=3)) or is_random
    twice = corrupt(colourful[:1].expand(2, -1, -1, -1), name, 3)
    assert is_random != torch.equal(twice[0], twice[1])  # each image has a draw of its own
    extremes = torch.stack([torch.zeros(3, 9, 12), torch.full((3, 9, 12), 255)]).to(torch.uint8)
    black, white = corrupt(extremes, name, 5).float().mean(dim=(1, 2, 3)).tolist()
    assert black < 20
    assert white > 235


def test_noise_has_the_size_it_names() -> None:
    grey = torch.full((8, 3, 64, 64), 128, dtype=torch.uint8)
    for severity, sigma in enumerate(CORRUPTIONS["gaussian_noise"], 1):
        assert corrupt(grey, "gaussian_noise", severity).float().std().item() == pytest.approx(255 * sigma, rel=0.02)
    for severity, photons in enumerate(CORRUPTIONS["shot_noise"], 1):
        spread = 255 * math.sqrt(128 / 255 / photons)
        assert corrupt(grey, "shot_noise", severity).float().std().item() == pytest.approx(spread, rel=0.02)
    for severity, share in enumerate(CORRUPTIONS["impulse_noise"], 1):
        noisy = corrupt(grey, "impulse_noise", severity)
        for value in (0, 255):
            assert (noisy == value).double().mean().item() == pytest.approx(share / 2, rel=0.1)


def test_corruptions_of_an_even_image_that_move_or_average() -> None:
    even = torch.full((2, 3, 32, 40), 77, dtype=torch.uint8)
    for name in ("gaussian_blur", "elastic_transform", "pixelate", "contrast", "saturation", "jpeg_compression"):
        assert (corrupt(even, name, 5).int() - 77).abs().max() <= 1
    assert corrupt(even, "brightness", 5).unique().tolist() == [round(77 * CORRUPTIONS["brightness"][4])]


@pytest.mark.parametrize(("name", "severity"), [("fog", 1), ("contrast", 0), ("contrast", 6)])
def test_corruptions_that_do_not_exist_are_refused(name: str, severity: int) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{severity}"):
        corrupt(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), name, severity)
    with pytest.raises(ValueError, match="float32"):
        corrupt(torch.zeros(1, 3, 32, 32), "contrast", 1)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A small network, in float64, that takes pixels in [0, 1]."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.SiLU(), nn.Flatten(), nn.Linear(6 * 10 * 14, 4)]
    return nn.Sequential(Normalize(MEAN.tolist(), STD.tolist()), *layers).double().eval()


@pytest.fixture(scope="module")
def batch(network: nn.Module) -> tuple[Tensor, Tensor]:
    """Pixels, some at the ends of the range, and the labels that the network gives to all but the first."""
    pixels = torch.rand(12, 3, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pixels = (1.4 * pixels - 0.2).clamp(0, 1)
    with torch.no_grad():
        labels = network(pixels).argmax(1)
    labels[0] = (labels[0] + 1) % 4
    return pixels, labels


def test_fgsm_is_a_step_along_the_gradients_sign(network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    pixels, labels = batch
    eps = 8 / 255
    changed = fgsm(network, pixels, labels, eps)
    # finite differences of each image's own cross-entropy, normalisation included
    rng = np.random.default_rng(0)
    h = 1e-6
    for _ in range(40):
        i, c, y, x = (int(rng.integers(n)) for n in pixels.shape)
        ends = pixels[i].repeat(2, 1, 1, 1)
        ends[:, c, y, x] += torch.tensor([h, -h])
        with torch.no_grad():
            up, down = F.cross_entropy(network(ends), labels[i].repeat(2), reduction="none").tolist()
        slope = (up - down) / (2 * h)
        if abs(slope) > 1e-6:
            expected = min(max(pixels[i, c, y, x].item() + math.copysign(eps, slope), 0), 1)
            assert changed[i, c, y, x].item() == pytest.approx(expected, abs=1e-12)
    assert changed.min() >= 0
    assert changed.max() <= 1
    alone = fgsm(network, pixels[2:3], labels[2:3], eps)
    assert torch.allclose(alone, changed[2:3])


def test_fgsm_finds_the_worst_corner_of_a_linear_network() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False))
    linear[1].weight.data = weight
    pixels = torch.tensor([0.5, 0.5, 0.5]).view(1, 3, 1, 1)
    changed = fgsm(linear, pixels, torch.tensor([0]), 0.1).flatten()
    assert changed.tolist() == pytest.approx([0.4, 0.6, 0.5])


def attacked(network: nn.Module, batch: tuple[Tensor, Tensor], eps: float, restarts: int, steps: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return pgd(network, *batch, eps, steps=steps, step_size=eps / 2, restarts=restarts, generator=generator)


@pytest.mark.parametrize("eps", [0.002, 8 / 255, 0.5])
def test_pgd_stays_in_the_ball_and_in_range(network: nn.Module, batch: tuple[Tensor, Tensor], eps: float) -> None:
    pixels, labels = batch
    before = pixels.clone()
    changed = attacked(network, batch, eps, 2)
    assert torch.equal(pixels, before)
    assert (changed - pixels).abs().max() <= eps + 1e-12
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert torch.equal(changed[0], pixels[0])  # misclassified as it is
    assert torch.equal(changed, attacked(network, batch, eps, 2))
    if eps == 0.5:
        assert (network(changed).argmax(1) != labels).all()


def test_restarts_and_steps_never_make_pgd_weaker(network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    labels = batch[1]
    counts = set()
    for eps in (0.0005, 0.002, 0.006, 0.02):
        previous = torch.zeros(len(labels), dtype=torch.bool)
        for restarts in (1, 2, 4):
            fooled = network(attacked(network, batch, eps, restarts)).argmax(1) != labels
            assert (fooled | ~previous).all()
            previous = fooled
            counts.add(int(fooled.sum()))
        one, many = (network(attacked(network, batch, eps, 1, steps)).argmax(1) != labels for steps in (1, 8))
        assert (many | ~one).all()
    assert len(counts) > 2  # the sizes were chosen so that some images fall and some do not


def test_pgd_raises_the_loss_of_images_it_cannot_turn(network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    pixels, labels = batch
    changed = attacked(network, batch, 1e-5, 1)
    loss = [F.cross_entropy(network(x), labels, reduction="none") for x in (pixels, changed)]
    assert (loss[1][1:] > loss[0][1:]).all()
    generator = torch.Generator().manual_seed(8)
    other = pgd(network, *batch, 1e-5, steps=1, step_size=1e-9, restarts=1, generator=generator)
    largest = (other - pixels).abs().amax(dim=(1, 2, 3))
    assert largest[1:] == pytest.approx(1e-5, rel=0.05)  # starts anywhere in the ball
    assert 4e-6 < (other - pixels)[1:].abs().mean() < 5e-6  # half of that on average, where the range does not end


def test_pgd_leaves_images_alone_that_have_fallen(network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    seen = []
    handle = network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    changed = attacked(network, batch, 0.1, 2)
    handle.remove()
    assert seen[:2] == [12, 11]
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < 11
    assert (network(changed).argmax(1) != batch[1]).all()


CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of 24 training and 24 test images, 32×32, of three classes that differ in colour."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = rng.integers(0, 200, (32, 32, 3), dtype=np.uint8)
                pixels[..., 2 - label] += 40
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def small_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs."""
    root = tmp_path_factory.mktemp("runs")
    words = ["--dataset", "folder", "--epochs", 2, "--schedule", 1, "--gammas", 1]
    main(*SMALL, *words, "--data_dir", images, "--root_dir", root)
    (folder,) = root.iterdir()
    return folder


ATTACKS = ["--eps", 2, 8, "--pgd_steps", 2, "--pgd_restarts", 2]


@pytest.fixture(scope="module")
def words(small_run: Path, images: Path) -> list[object]:
    """What every evaluation of the small run is asked for."""
    return ["--checkpoint", small_run / "checkpoint.pth.tar", "--data_dir", images, "--ngpu", 0]


Records = dict[tuple[str, str], dict[str, Any]]


def evaluate(*words: object, code: int = 0) -> Records:
    """Run the script; the newest record of each part and test set in the folder that is named last."""
    done = run("scripts/evaluate.py", *words)
    assert done.returncode == code, done.stdout + done.stderr
    path = Path(str(words[-1])) / "results.jsonl"
    return {(record["part"], record["set"]): record for record in read_records(path)}


def refused(*words: object, code: int) -> str:
    """The one line that the script says where it refuses something."""
    done = run("scripts/evaluate.py", *words)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def result(words: list[object], small_run: Path) -> Records:
    done = run("scripts/evaluate.py", *words, "--images", 3, *ATTACKS)
    assert (done.returncode, done.stderr) == (0, "")
    return {(of["part"], of["set"]): of for of in read_records(small_run / "evaluation" / "results.jsonl")}


def test_the_clean_numbers_agree(result: Records, small_run: Path) -> None:
    row, clean = rows(small_run)[-1], result["clean", "test"]
    numbers = clean["numbers"]
    assert numbers["top1"] == pytest.approx(float(row["test_top1"]), abs=1e-3)
    assert numbers["top5"] == pytest.approx(float(row["test_top5"]), abs=1e-3)
    assert numbers["loss"] == pytest.approx(float(row["test_loss"]), rel=1e-4)
    confusion = np.array(clean["detail"]["confusion"])
    assert confusion.sum() == clean["how"]["images"] == 24
    assert 100 * confusion.trace() / confusion.sum() == pytest.approx(numbers["top1"])
    assert list(numbers["per_class"].values()) == pytest.approx(100 * confusion.diagonal() / confusion.sum(axis=1))
    bins = result["calibration", "test"]["detail"]["bin_images_accuracy_confidence"]
    assert sum(n for n, _, _ in bins) == 24
    assert sum(n * accuracy for n, accuracy, _ in bins if n) / 24 == pytest.approx(numbers["top1"])
    gap = sum(n * abs(accuracy - sure) for n, accuracy, sure in bins if n) / 24
    assert gap == pytest.approx(result["calibration", "test"]["numbers"]["ece"])


def test_records_say_what_was_measured_and_how(result: Records, small_run: Path) -> None:
    digests = json.loads((small_run / "config.json").read_text())["digests"]
    sha256 = hashlib.sha256((small_run / "checkpoint.pth.tar").read_bytes()).hexdigest()
    for record in result.values():
        about = ("checkpoint.pth.tar", 2, sha256, digests["test"])
        assert tuple(record[name] for name in ("checkpoint", "epoch", "sha256", "digest")) == about
        assert {"date", "commit", "device", "torch", "command"} <= record.keys()
    chosen = {"images": 9, "classes": 3, "seed": 0}
    assert result["calibration", "test"]["how"] == {"images": 24, "classes": 3, "bins": 15}
    assert result["corruptions", "test"]["how"] == chosen | {"source": "made here"}
    assert result["fgsm", "test"]["how"] == chosen | {"eps": [2, 8]}
    assert result["pgd", "test"]["how"] == chosen | {"eps": [2, 8], "steps": 2, "step_size": None, "restarts": 2}
    errors = result["corruptions", "test"]["numbers"]["errors"]
    assert set(errors) == set(CORRUPTIONS)
    assert all(len(row) == 5 and all(0 <= e <= 100 for e in row) for row in errors.values())
    assert result["corruptions", "test"]["numbers"]["error"] == pytest.approx(np.mean(list(errors.values())))
    weak, strong = (result[part, "test"]["numbers"] for part in ("fgsm", "pgd"))
    assert weak.keys() == strong.keys() == {"2", "8"}
    assert all(strong[size] <= weak[size] for size in weak)  # here; not a law


def test_pictures_and_tables_are_there(result: Records, small_run: Path) -> None:
    folder = small_run / "evaluation"
    text = (folder / "results.md").read_text()
    names = {"results.md", "results.jsonl"}
    for ending in ("confusion", "reliability", "corruptions", "images", "attacks"):
        name = f"checkpoint_{ending}.png"
        names.add(name)
        assert f"]({name})" in text
        with Image.open(folder / name) as image:
            assert min(image.size) > 200
            assert np.asarray(image.convert("L")).std() > 5
    assert {path.name for path in folder.iterdir()} == names
    assert f"mean top-1 error {result['corruptions', 'test']['numbers']['error']:.2f}%, ECE " in text
    assert "source made here" in text
    assert all(f"\n| {name} | " in text for name in CORRUPTIONS)
    assert " %" not in text


def test_one_seed_gives_one_result(result: Records, words: list[object], tmp_path: Path) -> None:
    again = evaluate(*words, "--images", 3, *ATTACKS, "--parts", "corruptions", "pgd", "--out", tmp_path)
    assert {part for part, _ in again} == {"clean", "corruptions", "pgd"}
    assert all(record["numbers"] == result[key]["numbers"] for key, record in again.items())


def test_a_later_call_only_adds(result: Records, words: list[object], small_run: Path, tmp_path: Path) -> None:
    """Other sizes of an attack, other images and other parts leave what an earlier call measured as it was."""
    before = (small_run / "evaluation" / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(before)
    evaluate(*words, "--parts", "fgsm", "--images", 3, "--eps", 4, "--out", tmp_path)
    evaluate(*words, "--parts", "fgsm", "--eps", 4, "--out", tmp_path)  # of all images
    after = (tmp_path / "results.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == before.count(b"\n") + 4
    text = (tmp_path / "results.md").read_text()
    fgsm, pgd = (re.findall(rf"\*\*{part}\*\*.*", text) for part in ("fgsm", "pgd"))
    assert len(pgd) == 1
    assert ["(9 images" in line for line in fgsm] == [True, False]
    assert re.findall(r"at (\d)/255", fgsm[0]) == ["2", "4", "8"]
    assert f"{result['fgsm', 'test']['numbers']['8']:.2f}% at 8/255" in fgsm[0]
    assert text.count("**calibration**") == text.count("**clean**") == 1


def test_evaluations_of_other_checkpoints_are_told_apart(
    words: list[object], small_run: Path, images: Path, tmp_path: Path
) -> None:
    """model_best, another run's checkpoint and a checkpoint that was trained further, in one folder."""
    state = torch.load(small_run / "checkpoint.pth.tar", weights_only=True)
    state["progress"]["rows"] = state["progress"]["rows"][:1]
    for folder in ("early", "other"):
        (tmp_path / folder).mkdir()
    torch.save(state, tmp_path / "early" / "checkpoint.pth.tar")
    state["state_dict"]["linear.bias"] += 1
    torch.save(state, tmp_path / "other" / "checkpoint.pth.tar")
    out = tmp_path / "out"
    for path in (tmp_path / "other" / "checkpoint.pth.tar", tmp_path / "early" / "checkpoint.pth.tar",
                 small_run / "model_best.pth.tar", small_run / "checkpoint.pth.tar"):  # fmt: skip
        evaluate(*words[2:], "--checkpoint", path, "--parts", "clean", "--out", out)
    records = read_records(out / "results.jsonl")
    names = ["checkpoint.pth.tar", "checkpoint.pth.tar", "model_best.pth.tar", "checkpoint.pth.tar"]
    assert [record["checkpoint"] for record in records] == names
    assert [record["epoch"] for record in records[:2]] == [1, 1]
    assert records[3]["epoch"] == 2
    assert len({record["sha256"] for record in records if record["checkpoint"] == names[0]}) == 3
    text = (out / "results.md").read_text()
    assert re.findall("^# (.*)", text, re.MULTILINE) == ["checkpoint.pth.tar", "model_best.pth.tar"]
    assert records[3]["sha256"] in text
    assert records[1]["sha256"] not in text


def test_half_a_record_of_a_killed_call_is_ignored(words: list[object], tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"part": "clean", "set": "te')
    done = run("scripts/evaluate.py", *words, "--parts", "calibration", "--out", tmp_path)
    assert done.returncode == 0
    assert (done.stdout + done.stderr).count("is cut off") == 1
    assert [record["part"] for record in read_records(tmp_path / "results.jsonl")] == ["clean", "calibration"]


def test_records_on_other_images_have_another_digest(words: list[object], images: Path, tmp_path: Path) -> None:
    """One pixel of one image is enough."""
    other = tmp_path / "other"
    shutil.copytree(images, other)
    path = other / "test" / "blue" / "0.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    out = ["--parts", "clean", "--out", tmp_path / "out"]
    first = evaluate(*words, *out)["clean", "test"]
    second = evaluate(*words, "--data_dir", other, *out)["clean", "test"]
    assert first["digest"] != second["digest"]
    assert (tmp_path / "out" / "results.md").read_text().count("**clean**") == 2


def test_published_weights_take_their_settings_from_the_flags(
    result: Records, small_run: Path, images: Path, tmp_path: Path
) -> None:
    state = torch.load(small_run / "checkpoint.pth.tar", weights_only=True)
    weights = state["state_dict"]
    published = {"state_dict": {f"module.{name}": value for name, value in weights.items()}, "epoch": 3}
    flags = ["--dataset", "folder", "--data_dir", images, "--arch", "preactresnet18", "--initial_channels", 4]
    for name, content in (("bare.pt", weights), ("parallel.v2.pth.tar", published)):
        torch.save(content, tmp_path / name)
        out = tmp_path / name.split(".")[0]
        found = evaluate("--checkpoint", tmp_path / name, *flags, "--ngpu", 0, "--parts", "clean", "--out", out)
        # mean and deviation are measured, of the same training images
        assert found["clean", "test"]["numbers"] == result["clean", "test"]["numbers"]
    assert (tmp_path / "parallel" / "parallel.v2_confusion.png").exists()


def published_arrays(folder: Path, names: list[str], labels: np.ndarray) -> None:
    """Arrays in the published layout whose severities are grey levels 0 … 4."""
    folder.mkdir()
    levels = np.repeat(np.arange(5, dtype=np.uint8), len(labels))
    for name in names:
        np.save(folder / f"{name}.npy", np.ones((len(levels), 32, 32, 3), np.uint8) * levels[:, None, None, None])
    np.save(folder / "labels.npy", np.tile(labels, 5))


def test_published_arrays_are_read_where_they_are(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts import evaluate as script

    monkeypatch.setitem(CLASSES_OF_ARRAYS, "ours", digest_of([*CLASSES]))
    published_arrays(tmp_path / "arrays", ["fog", "snow", "saturate"], np.arange(40, dtype=np.uint8) % 3)
    seen: list[tuple[str, float, list[int]]] = []

    def predict(job: Any, split: Any, what: str) -> Tensor:
        """A network that is right about severities 1 to 3, and wrong about saturate."""
        if what != "test":
            assert split.images.shape == (6, 3, 32, 32)
            seen.append((what, split.images.float().mean().item(), split.labels.tolist()))
        right = what == "test" or ("saturate" not in what and split.images.max() <= 2)
        return 5 * F.one_hot((split.labels + (not right)) % 3, 3).float()

    monkeypatch.setattr(script, "predict", predict)
    words = [*words, "--images", 2, "--parts", "corruptions", "--corruptions_dir", tmp_path / "arrays"]
    found = evaluate(*words, "--out", tmp_path / "out")["corruptions", "test"]
    assert [(what, mean) for what, mean, _ in seen[:5]] == [(f"test fog {s}", s - 1) for s in range(1, 6)]
    assert all(sorted(of) == [0, 0, 1, 1, 2, 2] for _, _, of in seen)
    assert found["numbers"]["errors"]["fog"] == [0, 0, 0, 100, 100]
    assert found["numbers"]["error"] == pytest.approx(40)  # saturate is none of the benchmark's
    assert found["how"]["source"] == "published images, 2 of the benchmark's 15 corruptions"
    assert found["how"]["images"] == 6
    assert found["detail"]["folder"] == str(tmp_path / "arrays")
    for name in ("fog", "snow"):
        (tmp_path / "arrays" / f"{name}.npy").unlink()
    found = evaluate(*words, "--out", tmp_path / "extra")["corruptions", "test"]
    assert "0 of the benchmark's 15" in found["how"]["source"]
    again = evaluate(*words, "--out", tmp_path / "again")["corruptions", "test"]
    assert tables.columns_of(again, "") == tables.columns_of(found, "")
    np.save(tmp_path / "arrays" / "saturate.npy", np.zeros((200, 32, 32, 3), np.uint8))
    other = evaluate(*words, "--out", tmp_path / "other")["corruptions", "test"]
    assert tables.columns_of(other, "").keys().isdisjoint(tables.columns_of(found, ""))


def test_arrays_of_other_classes_are_refused(words: list[object], tmp_path: Path) -> None:
    """Their labels name no classes: before anything is measured."""
    published_arrays(tmp_path / "arrays", ["fog"], np.arange(12, dtype=np.uint8) % 3)
    flags = ["--parts", "corruptions", "--corruptions_dir", tmp_path / "arrays", "--out", tmp_path / "out"]
    error = refused(*words, *flags, code=2)
    assert "name no classes" in error
    assert "blue, green, red" in error
    assert not (tmp_path / "out").exists()


def test_arrays_go_with_the_classes_of_cifar_alone(tmp_path: Path) -> None:
    published_arrays(tmp_path / "arrays", ["fog"], np.arange(20, dtype=np.uint8) % 10)
    digits = load("digits", tmp_path)
    cifar = replace(digits, classes=CIFAR10)
    found = corrupted_sets(tmp_path / "arrays", cifar, lambda labels: np.arange(10))
    assert [name for name, _, _ in found] == ["fog"] * 5
    for classes in (digits.classes, CIFAR10[::-1], CIFAR10[:9]):
        with pytest.raises(BadArguments, match="CIFAR-10-C or CIFAR-100-C"):
            refuse_unknown_arrays(tmp_path / "arrays", classes)
    assert digest_of(sorted(CIFAR100.split())) == CLASSES_OF_ARRAYS["CIFAR-100-C"]  # as its labels count them


def test_damaged_arrays_are_refused(words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLASSES_OF_ARRAYS, "ours", digest_of([*CLASSES]))
    folder = tmp_path / "arrays"
    words = [*words, "--parts", "corruptions", "--corruptions_dir", folder, "--out", tmp_path / "out"]

    assert "labels.npy" in refused(*words, code=2)
    labels = np.arange(10, dtype=np.uint8) % 3
    published_arrays(folder, ["fog"], labels)
    whole = (folder / "fog.npy").read_bytes()
    (folder / "fog.npy").write_bytes(whole[:-100])
    assert "fog.npy" in refused(*words, code=1)
    np.save(folder / "fog.npy", np.zeros((50, 16, 16, 3), np.uint8))
    assert "(50, 16, 16, 3)" in refused(*words, code=1)
    np.save(folder / "fog.npy", np.array([{}] * 50, dtype=object), allow_pickle=True)
    assert "fog.npy" in refused(*words, code=1)
    for other in (labels + 1, labels % 2):
        np.save(folder / "labels.npy", np.tile(other, 5))
        assert "3 classes" in refused(*words, code=1)


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (2, "", "--checkpoint"),
        (2, "--checkpoint a.pth --parts pdg", "did you mean pgd"),
        (2, "--checkpoint a.pth --eps 0", "--eps"),
        (2, "--checkpoint a.pth --arch resnet", "--arch"),
        (2, "--checkpoint a.pth --images 0", "--images"),
        (2, "--checkpoint a.pth --parts clean fgsm --pgd_steps 3", "--pgd_steps is for pgd"),
        (2, "--checkpoint a.pth --parts calibration --images 3", "--images is for corruptions, fgsm, pgd"),
        (1, "--checkpoint nowhere/a.pth", "nowhere/a.pth"),
        (1, "--checkpoint README.md", "README.md"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(code: int, words: str, message: str) -> None:
    assert message in refused("--ngpu", 0, *words.split(), code=code)


def test_damaged_checkpoints_are_refused(small_run: Path, images: Path, tmp_path: Path) -> None:
    content = (small_run / "checkpoint.pth.tar").read_bytes()
    (tmp_path / "cut.pth.tar").write_bytes(content[: len(content) // 2])
    state = torch.load(small_run / "checkpoint.pth.tar", weights_only=True)
    weights = dict(state["state_dict"])
    for file, left_out in (("part.pt", "layer2"), ("body.pt", "linear")):
        torch.save({name: value for name, value in weights.items() if left_out not in name}, tmp_path / file)
    weights["linear.bias"] = weights["linear.bias"] * math.nan
    torch.save(weights, tmp_path / "nan.pt")
    flags = ["--dataset", "folder", "--data_dir", images, "--arch", "preactresnet18", "--initial_channels", 4]
    for name, message in (
        ("cut.pth.tar", "cannot be read"),
        ("part.pt", "do not fit"),
        ("body.pt", "no classifier"),
        ("nan.pt", "not finite"),
    ):
        error = refused("--checkpoint", tmp_path / name, *flags, "--ngpu", 0, "--out", tmp_path / "out", code=1)
        assert name in error
        assert message in error


def arrays_of(folder: Path, name: str, tree: Path) -> None:
    """The images of a tree as the two arrays of CIFAR-10.1's layout."""
    folder.mkdir(exist_ok=True)
    files = [(label, path) for label, of in enumerate(CLASSES) for path in sorted((tree / of).iterdir())]
    np.save(folder / f"{name}_data.npy", np.stack([np.asarray(Image.open(path)) for _, path in files]))
    np.save(folder / f"{name}_labels.npy", np.array([label for label, _ in files], dtype=np.int32))


@pytest.fixture(scope="module")
def other_sets(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test images again in several layouts: two classes of three and a strange one; arrays; a corrupted tree, whose
    images are black from severity 3 on."""
    root = tmp_path_factory.mktemp("sets")
    for name in ("blue", "red", "zebra"):
        shutil.copytree(images / "test" / name.replace("zebra", "red"), root / "some" / "val" / name)
    shutil.copytree(images / "test", root / "none", copy_function=shutil.copy)
    for name in CLASSES:
        (root / "none" / name).rename(root / "none" / f"{name}ish")
    arrays_of(root / "arrays", "shifted", images / "test")
    for severity in range(1, 6):
        for corruption in ("fog", "saturate"):
            shutil.copytree(images / "test", root / "corrupted" / corruption / str(severity))
            for path in (root / "corrupted" / corruption / str(severity)).rglob("*.png") if severity > 2 else ():
                Image.new("RGB", (32, 32)).save(path)
    return root


def test_a_corrupted_tree_is_measured(words: list[object], result: Records, other_sets: Path, tmp_path: Path) -> None:
    """Black images are all one class; the benchmark has fog alone."""
    more = ["--parts", "corruptions", "--corruptions_dir", other_sets / "corrupted", "--out", tmp_path]
    found = evaluate(*words, *more)["corruptions", "test"]
    error = 100 - result["clean", "test"]["numbers"]["top1"]
    row = pytest.approx([error] * 2 + [100 - 100 / 3] * 3)
    assert found["numbers"]["errors"] == {"fog": row, "saturate": row}
    assert found["numbers"]["error"] == pytest.approx((2 * error + 200) / 5)
    assert found["how"]["images"] == 24
    assert (tmp_path / "results.md").read_text().count("ECE") == 1


def test_other_test_sets(words: list[object], images: Path, other_sets: Path, tmp_path: Path) -> None:
    named = {name: other_sets / name for name in ("some", "arrays")} | {"all": images}
    shifts = [word for name, path in named.items() for word in ("--shift", f"{name}={path}")]
    found = evaluate(*words, *shifts, "--parts", "calibration", "fgsm", "--eps", 2, "--out", tmp_path)
    clean = found["clean", "test"]
    for name in ("all", "arrays"):
        for part in ("clean", "calibration", "fgsm"):
            other, own = found[part, name], found[part, "test"]
            assert other["how"] == own["how"]
            assert other["numbers"] | {"drop": 0} == own["numbers"] | {"drop": 0}
    assert found["clean", "all"]["digest"] == found["clean", "arrays"]["digest"] == clean["digest"]
    # some: of the network's answers, those on 16 images; a class that it does not know is left out
    right = np.array(clean["detail"]["confusion"]).diagonal()[[0, 2]].sum()
    some = found["clean", "some"]
    assert some["how"] == {"images": 16, "classes": 2}
    assert some["numbers"]["top1"] == pytest.approx(100 * right / 16)
    assert some["numbers"]["drop"] == pytest.approx(0)
    text = (tmp_path / "results.md").read_text()
    assert re.findall("^## (.*)", text, re.MULTILINE) == ["test", "all", "arrays", "some"]
    assert "0.00 points below the in-distribution test set" in text
    with Image.open(tmp_path / "checkpoint_shift.png") as picture:
        assert min(picture.size) > 200


@pytest.mark.parametrize(("drop", "words"), [(15.0, "15.00 points below"), (-15.0, "15.00 points above")])
def test_a_drop_is_said_without_a_sign(drop: float, words: str) -> None:
    from scripts.evaluate import text_of

    text = text_of({"part": "clean", "numbers": {"top1": 50.0, "drop": drop}, "how": {"images": 1000}})
    assert text == f"top-1 50.00%, {words} the in-distribution test set (1,000 images)"


def test_classes_may_be_named_after_numbers(tmp_path: Path) -> None:
    """A tree test/1/ is not corrupted images of severity 1; nor does what lies beside the severities matter."""
    data: Any = SimpleNamespace(classes=["0", "1", "3", "5"], image_size=(32, 32))
    for name in data.classes:
        for folder in (tmp_path / "digits" / "test" / name, tmp_path / "digits" / "train" / name):
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(folder / "0.png")
    assert open_set(tmp_path / "digits", data).labels.tolist() == [0, 1, 2, 3]
    for severity in range(1, 6):
        shutil.copytree(tmp_path / "digits" / "test", tmp_path / "corrupted" / "fog" / str(severity))
    (tmp_path / "corrupted" / "fog" / ".DS_Store").write_bytes(b"")
    (tmp_path / "corrupted" / "fog" / ".cache").mkdir()
    found = list(corrupted_sets(tmp_path / "corrupted", data, lambda labels: np.arange(len(labels))))
    assert [(name, severity) for name, severity, _ in found] == [("fog", severity) for severity in range(1, 6)]


def test_published_arrays_are_cut_by_severity(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(10), 10).astype(np.uint8)  # 20 images, five severities
    images = rng.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    for name, array in (("labels", labels), ("fog", images), ("snow", images[::-1])):
        np.save(tmp_path / f"{name}.npy", array)
    data: Any = SimpleNamespace(classes=CIFAR10, image_size=(32, 32))
    found = list(corrupted_sets(tmp_path, data, lambda labels: np.flatnonzero(labels < 2)))
    assert [(name, severity) for name, severity, _ in found] == [(n, s) for n in ("fog", "snow") for s in range(1, 6)]
    for i, (_, _, split) in enumerate(found[:5]):
        assert split.labels.tolist() == [0, 1, 0, 1]
        rows = 20 * i + np.array([0, 1, 10, 11])
        assert np.array_equal(split.images.permute(0, 2, 3, 1), images[rows])


def test_other_test_sets_that_do_not_fit_are_refused(words: list[object], other_sets: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    np.save(tmp_path / "broken" / "x_data.npy", np.zeros((4, 32, 32, 3), np.uint8))
    np.save(tmp_path / "broken" / "x_labels.npy", np.array([{}] * 4, dtype=object), allow_pickle=True)
    np.save(tmp_path / "few_data.npy", np.zeros((4, 32, 32, 3), np.uint8))
    np.save(tmp_path / "few_labels.npy", np.array([0, 1, 1, 0]))
    arrays_of(tmp_path / "ten", "cifar10.1_v6", other_sets / "corrupted" / "fog" / "1")
    arrays_of(tmp_path / "two", "v4", other_sets / "corrupted" / "fog" / "1")
    arrays_of(tmp_path / "two", "v6", other_sets / "corrupted" / "fog" / "1")
    shutil.copytree(other_sets / "corrupted" / "fog" / "1", tmp_path / "partial" / "fog" / "1")
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "y_data.npy")
    none, strange = other_sets / "none", "blueish, greenish, redish …"
    for code, shift, message in (
        (2, f"x={none}", f"{none} holds {strange}, none of the network's classes (blue, green, red …)"),
        (2, f"x={tmp_path / 'nowhere'}", "there is no folder"),
        (2, "x", "not NAME=PATH"),
        (2, "a|b=x", "not NAME=PATH"),
        (2, "a top1=x", "not NAME=PATH"),
        (2, f"x={tmp_path / 'ten'}", "is of CIFAR-10's classes"),
        (2, f"x={tmp_path / 'two'}", "v4_data.npy, v6_data.npy"),
        (2, f"x={tmp_path / 'fifo'}", "there is no file"),
        (1, f"x={tmp_path / 'broken'}", "x_labels.npy cannot be read"),
        (1, f"x={tmp_path / 'few_data.npy'}", "not those of 3 classes"),
        (2, f"x={tmp_path / 'partial'}", "name them by --corruptions_dir"),
    ):
        out = ["--parts", "clean", "--shift", shift, "--out", tmp_path / "out"]
        assert message in refused(*words, *out, code=code), shift
    for name in ("a", "test"):
        assert f"two sets '{name}'" in refused(*words, "--shift", f"{name}=x", "--shift", f"{name}=y", code=2)


def test_main_and_this_script_have_the_same_flags() -> None:
    from scripts import evaluate as script

    ours = {action.dest: action for action in script.make_parser()._actions}
    theirs = {action.dest: action for action in options.make_parser()._actions}
    for name in script.FLAGS:
        assert (ours[name].default, ours[name].help) == (theirs[name].default, theirs[name].help)
