"""Checkpoints: saved without loss, resumed bitwise, and opened as a network in one call.

network, about = load_network("RUN/model_best.pth.tar")   # pixels in [0, 1] in, logits out
network, about = load_network("PUBLISHED.pth.tar", arch="wrn16_8", dataset="cifar100")
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import os
import pickle
import re
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from load_data import IMAGE_SIZES, Data, stride_of
from mixup.settings import NORMALISATION, Colour
from models import build_model

from . import distributed, options
from .errors import BadArguments, UserError
from .files import atomic_write
from .run import Identity, Progress, Run, differences, log, refuse_another

LAST, PREVIOUS, BEST = "checkpoint.pth.tar", "checkpoint_previous.pth.tar", "model_best.pth.tar"
NESTED = ("state_dict", "model_state_dict", "model", "net")  # where training loops keep weights
PREFIXES = re.compile(r"^((module|_orig_mod|model|net)\.)+")  # of DataParallel, torch.compile, and Lightning modules


# -------------------------------------------------------------------------------------------------------------- writing


class Saver:
    """Writes a run's checkpoints: the last one, the one before, and the best, whose state waits for the next save."""

    def __init__(self, run: Run) -> None:
        self.run, self.saved = run, time.monotonic()
        self.best: dict[str, Any] | None = None  # not on the disk yet

    def is_due(self) -> bool:
        """Whether --checkpoint_minutes have passed since the last save."""
        return time.monotonic() - self.saved > 60 * self.run.training.checkpoint_minutes

    def keep_best(self, is_best: bool) -> None:
        """Remember the run as it is after its best epoch so far, or where no earlier epoch's weights are at hand. They
        stay on their device."""
        folder = self.run.folder
        if folder is not None and (is_best or not (self.best or (folder / BEST).exists())):
            self.best = None  # two copies at a time may not fit into memory
            self.best = copy.deepcopy(state_of(self.run))

    def save(self) -> None:
        """Write what changed; a full disk is an ``OSError``, and the earlier checkpoints stay."""
        self.saved = time.monotonic()
        if self.run.folder is not None:
            write(state_of(self.run), self.run.folder, self.best)
            self.best = None


def write(state: dict[str, Any], folder: Path, best: dict[str, Any] | None = None) -> None:
    """Write ``state`` as the folder's last checkpoint, keeping the one before, and ``best``, if given, as the best one.
    Killed anywhere in here, or on a full disk, the last or the previous checkpoint is whole, and none is ahead of the
    best one."""
    for name, content in ((BEST, best), (LAST, state)):
        if content is not None:
            archive = io.BytesIO()  # PyTorch's own writer tells a full disk by a RuntimeError
            torch.save(content, archive)
            with atomic_write(folder / name) as file:
                file.write(archive.getbuffer())
                file.flush()
                if name == LAST and (folder / LAST).exists():
                    os.replace(folder / LAST, folder / PREVIOUS)


def state_of(run: Run) -> dict[str, Any]:
    """What a checkpoint holds: all that resuming and ``load_network`` need. ``UserError`` where a weight is not finite,
    which a finite loss, too, can lead to."""
    weights = run.model.state_dict()
    if not all(value.isfinite().all() for value in weights.values()):
        raise not_finite(run, run.progress.step)
    return {
        **asdict(run.identity),
        "classes": run.data.classes,
        "mean": run.data.mean,
        "std": run.data.std,
        "image_size": run.data.image_size,
        "images": len(run.data.train),
        "state_dict": weights,
        "optimizer": run.optimizer.state_dict(),
        "progress": asdict(run.progress),
    }


def not_finite(run: Run, step: int) -> UserError:
    """The error for numbers that went wrong, raised before anything is saved over the last good checkpoint."""
    return UserError(f"the loss is not finite in epoch {run.progress.epoch}, step {step} {cure(run)}")


def cure(run: Run) -> str:
    """What may help a training whose numbers went wrong."""
    return (
        f"({run.method.name}, learning rate {run.training.rate(run.progress.epoch):g}). Try a smaller --learning_rate, "
        "with an --add_name; the last good checkpoint is untouched"
    )


# -------------------------------------------------------------------------------------------------------------- reading


class Inert:
    """Stands for an object of a class that only its author has, such as the meters in published checkpoints."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint, on the CPU, by PyTorch's restricted loader: nothing in it is executed.

    Raises:
        OSError: no such file.
        UserError: it was truncated or altered, is no checkpoint, or asks for code.
    """
    open(path, "rb").close()
    try:
        if zipfile.is_zipfile(path) and (member := zipfile.ZipFile(path).testzip()):
            raise pickle.UnpicklingError(f"{member} is not what was written")
        state = restricted_load(path)
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"it holds a {type(state).__name__}")
        return state
    except Exception as error:  # whatever a damaged file, or one that is no checkpoint, makes of the loader
        lines = [line for line in str(error).splitlines() if line and "weights_only" not in line]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"checkpoint {path} cannot be read, damaged or no checkpoint: {reason}") from error


def restricted_load(path: str | os.PathLike[str]) -> Any:
    """``torch.load(weights_only=True)``, with objects of unknown classes as ``Inert``."""
    stand_ins: list[Any] = []
    while True:
        try:
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            unknown = re.search(r"(?:GLOBAL|Unsupported class|of type) `?([\w.]+\.\w+)", str(error))
            if unknown is None or any(name == unknown[1] for _, name in stand_ins):
                raise
            stand_ins.append((Inert, unknown[1]))


@contextmanager
def well_formed(path: str | Path) -> Iterator[None]:
    """What a checkpoint holds need not be what this program put there."""
    try:
        yield
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {path} does not hold what it should: {error}") from error


# ------------------------------------------------------------------------------------------------------------- resuming


def read_resume(path: str) -> tuple[dict[str, Any] | None, str | None]:
    """What --resume names, if anything, and the run's origin: the digest of the file of weights that it is initialised
    from, or the origin of the training state that it continues."""
    if not path:
        return None, None
    state = load(path)
    if "progress" not in state:
        return state, hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32]
    with well_formed(path):
        return state, Identity.of(state).origin


def restore(run: Run, resume: str, resumed: dict[str, Any] | None) -> None:
    """Continue from the folder's last good checkpoint if there is one, else from what --resume names; ``UserError``
    names the difference where that is another run."""
    source, state = resume, resumed
    if resumed is not None and "progress" in resumed:
        refuse_other_training(run, resume, resumed)
    if run.folder is not None and (last := load_last(run.folder)) is not None:
        source, state = str(run.folder), last
        with well_formed(source):
            refuse_another(run.folder, Identity.of(last), run.identity)
    state = distributed.from_first(state)
    if state is None:
        return
    load_weights(run.model, weights_of(state, source), source, run.identity.settings["arch"])
    if "progress" not in state:
        log.info(f"weights from {source}; the optimiser starts anew at epoch {run.progress.epoch}")
        return
    with well_formed(source):
        refuse_other_classes(state["classes"], run.data.classes, source)
        run.progress.move_to(state["progress"])
        # the momentum; rate, decay and the like stay this command's
        settings = run.optimizer.state_dict()["param_groups"]
        run.optimizer.load_state_dict({**state["optimizer"], "param_groups": settings})
        for parameter, held in run.optimizer.state.items():
            if held.get("momentum_buffer") is not None:  # laid out as the weights are, as a fused optimiser walks both
                held["momentum_buffer"] = torch.empty_like(parameter).copy_(held["momentum_buffer"])
    if run.progress.epoch > run.training.epochs:
        raise BadArguments(f"--epochs {run.training.epochs}: {source} has had {run.progress.epoch} already")
    log.info(f"continuing in epoch {run.progress.epoch}, step {run.progress.step}")


def refuse_other_training(run: Run, path: str, state: dict[str, Any]) -> None:
    """Raise ``BadArguments`` where --resume names the training state of another run. A longer one may continue it:
    --epochs, milestones that were not reached, and the name may differ."""
    with well_formed(path):
        there, last = Identity.of(state), Progress(**state["progress"]).last_begun
        found = differences(there.until(last), run.identity.until(last))
    if found:
        raise BadArguments(
            f"--resume {path} is a training state of another run ({'; '.join(found)}); --epochs, milestones of "
            "--schedule that it has not reached, and --add_name may differ"
        )


def load_last(folder: Path) -> dict[str, Any] | None:
    """The folder's last checkpoint; the one before, or the best one, if that is damaged; None where none is whole. A
    damaged one gets another name, so that it never takes the place of the one before."""
    for name in (LAST, PREVIOUS, BEST):
        if (folder / name).exists():
            try:
                return load(folder / name)
            except UserError as error:
                aside = folder / f"{name}.damaged"
                os.replace(folder / name, aside)
                log.warning(f"warning: {error}; kept as {aside.name}, an earlier one is used")
    return None


def refuse_other_classes(theirs: list[str], ours: list[str], source: str) -> None:
    """Raise ``UserError`` where a network was trained on other classes than those of the data."""
    if theirs != ours:
        raise UserError(f"{source} was trained on other classes than those of the images at hand")


# -------------------------------------------------------------------------------------------------------------- weights


def weights_of(state: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    """A checkpoint's weights by name, wherever its training loop kept them, without the prefixes of wrappers."""
    weights: Mapping[Any, Any] = state
    while inner := [weights[key] for key in NESTED if isinstance(weights.get(key), Mapping)]:
        weights = inner[0]
    found = {PREFIXES.sub("", str(name)): value for name, value in weights.items() if isinstance(value, Tensor)}
    if not found or len(found) < len(weights):
        where, keys = ", ".join(NESTED), ", ".join(map(str, weights))[:300]
        raise UserError(f"checkpoint {path} holds no weights alone or under {where}; its keys are {keys}")
    return found


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: str | Path, arch: str) -> None:
    """Put weights into a network of the same names and shapes; ``UserError`` where they do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).split("\n\t")[-1][:200]
        raise UserError(
            f"the weights in {path} do not fit --arch {arch}: {reason} … Name the --arch, --initial_channels and "
            "--dataset of their training"
        ) from error


# ------------------------------------------------------------------------------------------------ a network in one call


@dataclass(frozen=True)
class About:
    """What a network was trained on; None where neither the file nor the caller says so."""

    arch: str  # as ``models.build_model`` takes it
    num_classes: int
    image_size: tuple[int, int]  # height and width in pixels
    mean: Colour  # per channel, of pixels in [0, 1], as std
    std: Colour
    dataset: str | None = None  # as --dataset names it
    classes: list[str] | None = None  # their names, in the order of the logits
    epochs: int | None = None
    digests: dict[str, str] | None = None  # of the images, under "train" and "test"
    settings: dict[str, Any] = field(default_factory=dict)  # of the run, by flag name


class PixelNetwork(nn.Module):
    """A network that takes pixels in [0, 1]: [B, 3, H, W] to logits [B, K]. ``model`` is the network behind the
    normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Colour, std: Colour) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model((pixels - self.mean) / self.std)


def load_network(path: str | os.PathLike[str], **given: Any) -> tuple[PixelNetwork, About]:
    """The network of a checkpoint of this project or a published one, on the CPU, in eval mode.

    Args:
        path: a checkpoint; nothing in it is executed.
        given: ``arch``, ``dataset``, ``image_size`` (a side, or height and width), ``mean``, ``std`` as in ``About``,
            where the file does not say. A published data set stands for its image size, mean and std.

    Returns:
        a module from pixels in [0, 1], [B, 3, H, W], to logits [B, K], and what it was trained on. Width and stride
        are the file's; ``image_size`` changes neither.

    Raises:
        OSError: no such file.
        UserError: no checkpoint; what neither the file nor the caller says; weights that do not fit ``arch``.
    """
    if unknown := given.keys() - {"arch", "dataset", "image_size", "mean", "std"}:
        raise TypeError(f"load_network has no argument {', '.join(sorted(unknown))}")
    return network_of(load(path), os.fspath(path), given)


def network_of(state: dict[str, Any], path: str | Path, given: dict[str, Any]) -> tuple[PixelNetwork, About]:
    """``load_network`` of a checkpoint that was read already; ``initial_channels`` may be given, too."""
    weights = weights_of(state, path)
    width = next((len(value) for value in weights.values() if value.ndim == 4), 1)  # of the first convolution
    width = given.pop("initial_channels", width)
    with well_formed(path):
        about = about_of(state, weights, path, given)
        height, _ = state["image_size"] if "progress" in state else about.image_size
        model = build_model(about.arch, about.num_classes, stride_of(height), width)
        network = PixelNetwork(model, about.mean, about.std)
    load_weights(model, weights, path, about.arch)
    return network.eval(), about


def about_of(state: dict[str, Any], weights: dict[str, Tensor], path: str | Path, given: dict[str, Any]) -> About:
    """What the file and the caller say of a network; ``UserError`` names what neither does."""
    said: dict[str, Any] = {}
    if "progress" in state:  # in another program's file the same keys may mean anything
        said = {name: state[name] for name in ("classes", "digests", "image_size", "mean", "settings", "std")}
        said |= {name: said["settings"][name] for name in ("arch", "dataset")}
        said["epochs"] = len(state["progress"]["rows"])
    said |= {name: value for name, value in given.items() if value is not None}
    dataset = said.get("dataset")
    if dataset in NORMALISATION:
        said = dict(zip(("mean", "std"), NORMALISATION[dataset], strict=True)) | said
    if dataset in IMAGE_SIZES:
        said = {"image_size": IMAGE_SIZES[dataset]} | said
    if missing := [name for name in ("arch", "image_size", "mean", "std") if name not in said]:
        raise UserError(
            f"checkpoint {path} does not say its network's {', '.join(missing)}; name what is missing (a published "
            "data set's name stands for its image size, mean and std)"
        )
    classifier = next((value for value in reversed(weights.values()) if value.ndim == 2), None)
    if classifier is None or len(said.get("classes", classifier)) != len(classifier):
        raise ValueError("its weights hold no classifier of its classes")
    if isinstance(said["image_size"], int):
        said["image_size"] = (said["image_size"],) * 2
    return About(num_classes=len(classifier), **said)


def network_and_images(args: argparse.Namespace, given: set[str]) -> tuple[PixelNetwork, Data, About]:
    """The network in ``args.resume``, the images that the flags name, normalised as the network's were, and what it was
    trained on. Settings that are not ``given`` become the checkpoint's."""
    path, state, size = args.resume, load(args.resume), None
    of_a_run = "progress" in state
    if of_a_run:
        with well_formed(path):
            options.adopt(args, given, state["settings"])
            size = state["image_size"] if args.dataset == "folder" else None
    elif missing := sorted({"arch", "dataset"} - given):
        raise UserError(f"checkpoint {path} does not say what it was trained with; give --{' and --'.join(missing)}")
    data = options.load_images(args, given, image_size=size, test_only=True)
    wanted: dict[str, Any] = {}
    if not of_a_run:
        names = ("arch", "dataset", *given & {"initial_channels"})
        wanted = {name: getattr(args, name) for name in names} | {"image_size": data.image_size}
        wanted |= {"mean": data.mean, "std": data.std} if len(data.train) else {}
    network, about = network_of(state, path, wanted)
    refuse_other_classes(about.classes or data.classes, data.classes, path)
    if about.digests and about.digests["test"] != data.digests["test"]:
        log.warning(f"warning: the test images of {data.source} are others than those of the run that {path} is of")
    return network, replace(data, mean=about.mean, std=about.std), about
