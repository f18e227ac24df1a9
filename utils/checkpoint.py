"""What a checkpoint holds, how it is written without loss, all of going on from one, and a network in one call.

network, about = load_network("RUN/model_best.pth.tar")   # pixels in [0, 1] in, logits out
network, about = load_network("PUBLISHED.pth.tar", arch="wrn16_8", dataset="cifar100")
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from load_data import IMAGE_SIZES, Data, steps_per_epoch, stride_of
from mixup.settings import NORMALISATION, Colour
from models import build_model

from . import distributed, options, records, runs
from .archive import COMMENT_MARK, DamagedCheckpoint, load
from .errors import BadArguments, UserError, is_out_of_memory
from .files import atomic_write, link
from .records import log
from .runs import Progress, Run

LAST, PREVIOUS, BEST = "checkpoint.pth.tar", "checkpoint_previous.pth.tar", "model_best.pth.tar"


# -------------------------------------------------------------------------------------------------------------- writing


def save_run(run: Run) -> None:
    """Write the checkpoint, and the best one if it is not written yet; a failing disk stops the run with one line, the
    checkpoints before stay."""
    run.saved = time.monotonic()
    if run.folder is None:
        return
    if run.lock is not None and runs.lock_is_lost(run.folder, run.lock):
        raise UserError(f"{run.folder} was deleted and made again by another run; this one stops")
    try:
        save(state_of(run), run.folder, run.best if run.best_is_new else None)
    except FileNotFoundError as error:
        raise UserError(f"{run.folder} was deleted while the run was writing into it; this run stops") from error
    except OSError as error:
        raise UserError(
            f"cannot write a checkpoint into {run.folder}: {error.strerror or error}; those that "
            f"were there are untouched. Make room there and give the same command again"
        ) from error
    run.best_is_new = False


def state_of(run: Run) -> dict[str, Any]:
    """What a checkpoint of a run holds: all that going on and ``load_network`` need."""
    return {
        "sage": 1,  # version of this layout
        **asdict(run.identity),
        "classes": run.data.classes,
        "mean": run.data.mean,
        "std": run.data.std,
        "image_size": run.data.image_size,
        "images": len(run.data.train),
        "state_dict": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "progress": asdict(run.progress),
    }


def keep_best(run: Run) -> None:
    """Remember the run as it is for the best checkpoint, which is written when the next one is."""
    if run.folder is not None:
        run.best, run.best_is_new = copied(state_of(run), run.best), True


def copied(value: Any, into: Any) -> Any:
    """The same with tensors of its own, on their devices: those of an earlier copy, ``into``, where there is one."""
    if isinstance(value, Tensor):
        return into.copy_(value) if isinstance(into, Tensor) else value.detach().clone()
    if isinstance(value, Mapping):
        earlier = into if isinstance(into, Mapping) else {}
        return {name: copied(one, earlier.get(name)) for name, one in value.items()}
    return value


def save(state: dict[str, Any], folder: Path, best: dict[str, Any] | None = None) -> None:
    """Write ``state`` as the folder's last checkpoint, keeping the one before, and ``best``, if given, as the best one.

    The files are ordinary ``torch.save`` archives that ``torch.load(…, weights_only=True)`` opens; their checksum is
    the archive's comment. Raises ``OSError`` with nothing half-written.

    Killed anywhere in here, the folder holds the old last checkpoint or the new one, and never a last checkpoint that
    is ahead of the best one. The best one is a file of its own: damage to one file is damage to one.
    """
    for name, content in ((BEST, best), (LAST, state)):
        if content is None:
            continue
        buffer = io.BytesIO()
        torch.save(content, buffer)
        archive = buffer.getbuffer()[:-2]  # without the length of the (empty) archive comment
        comment = COMMENT_MARK + hashlib.sha256(archive).hexdigest().encode()
        with atomic_write(folder / name) as file:
            file.write(archive)
            file.write(struct.pack("<H", len(comment)) + comment)
            file.flush()
            if name == LAST and (folder / LAST).exists():
                link(folder / LAST, folder / PREVIOUS)


# ------------------------------------------------------------------------------------------------------------ going on


def read_resume(run: Run, path: str) -> dict[str, Any] | None:
    """What --resume names: a training state of this run, which may have been shorter, or weights to begin from, whose
    digest becomes the run's origin.

    Raises:
        BadArguments: a training state of another run.
    """
    if not path or run.world.rank > 0:
        return None
    state = load(path)
    weights = weights_of(state, path)
    if "progress" not in state:
        run.identity = replace(run.identity, origin=digest(weights))
        return state
    with well_formed(path):
        there, last = runs.identity_of(state), Progress(**state["progress"]).last_begun
        run.identity = replace(run.identity, origin=there.origin)
        cut = runs.differences(there.until(last), run.identity.until(last))
        # told as they were given, which is longer than what has been reached
        whole = {line.split(":")[0]: line for line in runs.differences(there, run.identity)}
        found = [whole.get(line.split(":")[0], line) for line in cut]
    if found:
        alone = f"torch.save(torch.load({path!r}, weights_only=True)['state_dict'], 'weights.pth')"
        raise BadArguments(
            f"--resume {path} is a training state of another run ({'; '.join(found)}). It goes on with its own "
            "settings and images; --epochs, milestones of --schedule that it has not reached, and --add_name may "
            f'differ. To begin anew from its weights, keep those alone: python3 -c "import torch; {alone}"'
        )
    return state


def digest(weights: dict[str, Tensor]) -> str:
    """32 hexadecimal digits that stand for names, shapes and values of weights."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def is_finished(run: Run) -> bool:
    """Whether the folder holds this run, finished, which is then said.

    Raises:
        BadArguments: it holds a run of other settings; the message shows the difference.
        UserError: a run of other images, or one that nothing tells which it is.
    """
    if run.folder is None:
        return False
    result = runs.read_or_set_aside(run.folder / "result.json", runs.summary_of)
    there = runs.read_or_set_aside(run.folder / "config.json", runs.identity_of)
    state = load_last(run.folder) if there is None and result is not None else None
    if state is not None:
        with well_formed(run.folder):
            there = runs.identity_of(state)
    if there is not None:
        runs.refuse_another(run.folder, there, run.identity)
    if result is None:
        return False
    if there is None:
        raise UserError(
            f"{run.folder} holds a result, and neither a config.json nor a checkpoint that says of which run. Give "
            "this run a name of its own with --add_name, or start anew with --overwrite True"
        )
    if not records.agree(run.folder, run.training.epochs - run.training.start_epoch):
        return restore_records(run, state or load_last(run.folder))
    print(f"{run.folder} is finished: {result}")
    return True


def restore_records(run: Run, state: dict[str, Any] | None) -> bool:
    """Write metrics.csv and result.json of a finished run anew, from its checkpoint, and say that it is finished. False
    where the checkpoint is not at the end: a result.json that does not belong to the run is set aside."""
    assert run.folder is not None
    if state is not None and "progress" in state:
        with well_formed(run.folder):
            progress = Progress(**state["progress"])
        if progress.epoch >= run.training.epochs and progress.rows:
            run.progress = progress
            runs.write_result(run)
            print(f"{run.folder} is finished; its metrics.csv and result.json are written anew")
            return True
    result = run.folder / "result.json"
    os.replace(result, result.with_name("result.json.damaged"))
    log.warning(f"warning: {result} is not of this run, which is not at its end; kept as result.json.damaged")
    return False


def restore(run: Run, resumed: dict[str, Any] | None) -> None:
    """Continue from the folder's last good checkpoint if there is one, else from what --resume names."""
    source, state = run.resume, resumed
    if run.world.rank == 0 and (last := load_last(run.folder)) is not None:
        source, state = str(run.folder), last
        with well_formed(source):
            there = runs.identity_of(state)
        runs.refuse_another(source, there, run.identity)
    state = distributed.from_first(state)
    if state is None:
        return
    refuse_other_classes(state.get("classes", run.data.classes), run.data.classes, source)
    weights = weights_of(state, source)
    load_weights(run.model, weights, source, run.identity.settings["arch"])
    if "progress" not in state:
        log.info(f"weights from {source}; the optimiser starts anew at epoch {run.progress.epoch}")
        return
    refuse_other_images(state, run, source)
    with well_formed(source):
        restore_optimizer(run.optimizer, state["optimizer"])
        run.progress = Progress(**state["progress"])
        if run.progress.step > steps_per_epoch(len(run.data.train), run.training.batch_size):
            raise ValueError(f"step {run.progress.step} is beyond the end of an epoch")
        if run.progress.epoch - len(run.progress.rows) != run.training.start_epoch:
            raise ValueError(f"it has {len(run.progress.rows)} epochs before epoch {run.progress.epoch}")
    if run.progress.epoch > run.training.epochs:
        raise BadArguments(f"--epochs {run.training.epochs}: {source} has had {run.progress.epoch} already")
    if run.folder and run.progress.rows:
        records.write_metrics(run.folder / "metrics.csv", run.progress.rows)
    log.info(f"continuing in epoch {run.progress.epoch}, step {run.progress.step}")


def load_last(folder: Path | None) -> dict[str, Any] | None:
    """The folder's last checkpoint; the one before, or the best one, if that is damaged; None where none is whole.

    A damaged one gets another name, so that it never takes the place of the one before.

    Raises:
        UserError: the file that should be read is a link to nothing, as where another disk is not mounted.
    """
    if folder is None:
        return None
    for name in (LAST, PREVIOUS, BEST):
        if (folder / name).is_symlink() and not (folder / name).exists():
            raise UserError(
                f"{folder / name} is a link to {os.readlink(folder / name)}, which is not there; is its disk mounted? "
                "Remove the link to go on without it"
            )
        if (folder / name).exists():
            try:
                return load(folder / name)
            except DamagedCheckpoint as error:
                aside = folder / f"{name}.damaged"
                os.replace(folder / name, aside)
                log.warning(f"warning: {error}; kept as {aside.name}, an earlier one is used")
    return None


def restore_optimizer(optimizer: torch.optim.Optimizer, held: dict[str, Any]) -> None:
    """The momentum of a checkpoint; rate, decay and the like stay this command's."""
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(held)
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)
    for parameter, of_parameter in optimizer.state.items():
        if (momentum := of_parameter.get("momentum_buffer")) is not None:
            if momentum.shape != parameter.shape:
                raise ValueError("its momentum does not fit the weights")
            # laid out as the weights are: the fused optimiser walks through both as they lie in memory
            of_parameter["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)


def refuse_other_images(state: dict[str, Any], run: Run, source: str) -> None:
    """Raise ``UserError`` where a run was begun with other images than those at hand."""
    ours = {"images": len(run.data.train), "mean": run.data.mean, "std": run.data.std}
    if any(state.get(name, value) != value for name, value in ours.items()):
        raise UserError(f"the images of {run.data.source} are others than those that {source} was begun with")


def refuse_other_classes(theirs: Any, ours: list[str], source: str) -> None:
    """Raise ``UserError`` where a network was trained on other classes than those of the data."""
    if theirs != ours:
        raise UserError(f"{source} was trained on other classes than those of the images at hand")


@contextmanager
def well_formed(path: str | Path) -> Iterator[None]:
    """What a checkpoint holds need not be what this program put there."""
    try:
        yield
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"checkpoint {path} does not hold what it should: {error}") from error


# -------------------------------------------------------------------------------------------------------------- weights


def weights_of(state: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    """A checkpoint's weights by name, without DataParallel's prefix; a bare dictionary of weights is one, too."""
    weights = state.get("state_dict", state)
    if not isinstance(weights, Mapping):
        raise UserError(f"checkpoint {path} holds a {type(weights).__name__} in place of weights")
    if wrong := [name for name, value in weights.items() if not (isinstance(name, str) and isinstance(value, Tensor))]:
        raise UserError(f"checkpoint {path} does not hold weights: {wrong[0]!r} is none")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: str | Path, arch: str) -> None:
    """Put weights into a network of the same names and shapes."""
    refuse_other_shapes(model, weights, path, arch)
    with well_formed(path):
        model.load_state_dict(weights)


def refuse_other_shapes(model: nn.Module, weights: dict[str, Tensor], path: str | Path, arch: str) -> None:
    """Raise ``UserError`` where names or shapes of the weights are not the network's."""
    own = model.state_dict()
    wrong = sorted(
        name
        for name in own.keys() | weights.keys()
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    )
    if wrong:
        raise UserError(
            f"the weights in {path} do not fit --arch {arch}: {len(wrong)} of {len(own)} are missing, unknown or of "
            f"another shape, among them {wrong[0]}. Name the --arch, --initial_channels and --dataset they were "
            "trained with"
        )


# ------------------------------------------------------------------------------------------------ a network in one call


@dataclass(frozen=True)
class About:
    """What a network was trained on; None where neither the file nor the caller says so.

    Attributes:
        arch: as ``models.build_model`` takes it.
        num_classes: K.
        classes: their K names, in the order of the logits.
        dataset: as --dataset names it.
        image_size: height and width in pixels.
        mean, std: per channel, of pixels in [0, 1].
        settings: of the run, by flag name; empty for a published file.
        epochs: how many it was trained.
        digests: of the training and test images, under "train" and "test".
    """

    arch: str
    num_classes: int
    classes: list[str] | None
    dataset: str | None
    image_size: tuple[int, int]
    mean: Colour
    std: Colour
    settings: dict[str, Any]
    epochs: int | None
    digests: dict[str, str] | None


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


def load_network(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    dataset: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    mean: Colour | None = None,
    std: Colour | None = None,
) -> tuple[PixelNetwork, About]:
    """The network of a checkpoint of this project or a published one, on the CPU, in eval mode.

    Args:
        path: a checkpoint; nothing in it is executed.
        arch, dataset, image_size, mean, std: as in ``About``, where the file does not say; they win over what it says.
            ``image_size`` is a side, or height and width. A published data set stands for its image size, mean and
            standard deviation.

    Returns:
        a module from pixels in [0, 1], [B, 3, H, W], to logits [B, K], and what it was trained on.

    Raises:
        UserError: no such file, or not a checkpoint; something that neither the file nor the caller says, by its name;
            weights that do not fit the architecture.
    """
    given = {"arch": arch, "dataset": dataset, "image_size": image_size, "mean": mean, "std": std}
    return network_of(load(path), os.fspath(path), {name: value for name, value in given.items() if value is not None})


def network_of(state: dict[str, Any], path: str, given: dict[str, Any]) -> tuple[PixelNetwork, About]:
    """``load_network`` of a checkpoint that was read already, with the keywords that were given."""
    weights = weights_of(state, path)
    with well_formed(path):
        about = about_of(state, weights, path, given)
        model = empty_network(weights, about.arch, path, stride_of(about.image_size[0]))()
    load_weights(model, weights, path, about.arch)
    return PixelNetwork(model, about.mean, about.std).eval(), about


def network_and_images(args: argparse.Namespace, given: set[str]) -> tuple[PixelNetwork, Data, About]:
    """The network in ``args.resume``, the images that the flags name, normalised as the network's were, and what it was
    trained on. Settings that are not ``given`` become the checkpoint's."""
    path = args.resume
    state = load(path)
    with well_formed(path):
        options.adopt(args, given, settings_of(state))
        if missing := [name for name in ("arch", "dataset") if name not in {*given, *settings_of(state)}]:
            raise UserError(
                f"checkpoint {path} does not say what it was trained with; give --{' and --'.join(missing)}"
            )
        # before images are decoded to the size that the file asks for
        empty_network(weights_of(state, path), args.arch, path)
    data = options.load_images(args, given)
    of_network = {name: getattr(data, name) for name in ("image_size", "mean", "std") if state.get(name) is None}
    network, about = network_of(state, path, {**of_network, "arch": args.arch, "dataset": args.dataset})
    refuse_other_classes(about.classes or data.classes, data.classes, path)
    if data.image_size != about.image_size and "image_size" not in given:
        sizes = ["{}×{}".format(*size) for size in (about.image_size, data.image_size)]
        raise UserError(
            f"{path} was trained on images of {sizes[0]}; those of {data.source} are {sizes[1]}. Give --image_size "
            f"{about.image_size[0]}, or their own size to evaluate at that"
        )
    if (about.digests or {}).get("test", data.digests["test"]) != data.digests["test"]:
        log.warning(
            f"warning: the test set of {data.source} is not the one {path} was tested on in training; summarize.py "
            "leaves its results out (evaluate.py --shift NAME=PATH measures another set beside the own one)"
        )
    return network, replace(data, mean=about.mean, std=about.std), about


def empty_network(weights: dict[str, Tensor], arch: str, path: str, stride: int = 1) -> Callable[[], nn.Module]:
    """Raise ``UserError`` where weights do not fit an architecture, before any memory is taken; returns what builds
    the network."""
    classes = number_of_classes(weights)
    width = next((len(value) for value in weights.values() if value.ndim == 4), 1)  # of the first convolution
    build = partial(build_model, arch, classes, stride, width)
    with torch.device("meta"):
        refuse_other_shapes(build(), weights, path, arch)
    return build


def about_of(state: dict[str, Any], weights: dict[str, Tensor], path: str, given: dict[str, Any]) -> About:
    """What the file and the caller say of a network; ``UserError`` names what neither does."""
    settings = settings_of(state)
    dataset = given.get("dataset", settings.get("dataset"))
    usual: dict[str, Any] = {"arch": None, "image_size": settings.get("image_size"), "mean": None, "std": None}
    if dataset in NORMALISATION:
        usual["mean"], usual["std"] = NORMALISATION[dataset]
    usual["image_size"] = usual["image_size"] or IMAGE_SIZES.get(str(dataset))
    said = {"arch": settings.get("arch"), **{name: state.get(name) for name in ("image_size", "mean", "std")}}
    found = {name: given.get(name) or said[name] or usual[name] for name in usual}
    if missing := [name for name, value in found.items() if value is None]:
        raise UserError(
            f"checkpoint {path} does not say its network's {', '.join(missing)}; name what is missing (a published "
            "data set's name stands for its image size, mean and std)"
        )
    number, classes = number_of_classes(weights), state.get("classes")
    if "classes" in state and not isinstance(classes, list):
        raise ValueError("its classes are not names")
    if classes is not None and (len(classes) != number or not all(isinstance(name, str) for name in classes)):
        raise ValueError("its classes are not those of its weights")
    size = found["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return About(
        arch=found["arch"],
        num_classes=number,
        classes=classes,
        dataset=dataset,
        image_size=(int(height), int(width)),
        mean=colour(found["mean"]),
        std=colour(found["std"]),
        settings=settings,
        epochs=len(state["progress"]["rows"]) if "progress" in state else None,
        digests=state.get("digests") or None,
    )


def number_of_classes(weights: dict[str, Tensor]) -> int:
    """Rows of the last matrix, which is the classifier."""
    matrices = [value for value in weights.values() if value.ndim == 2]
    if not matrices:
        raise ValueError("it holds no classifier")
    return len(matrices[-1])


def settings_of(state: dict[str, Any]) -> dict[str, Any]:
    """A run's settings, checked; none in a published checkpoint."""
    return runs.identity_of(state).settings if "settings" in state else {}


def colour(values: Any) -> Colour:
    """Three finite numbers."""
    red, green, blue = (float(value) for value in values)
    if not all(abs(value) < 1e6 for value in (red, green, blue)):
        raise ValueError(f"{values} is no mean or standard deviation of pixels in [0, 1]")
    return red, green, blue
