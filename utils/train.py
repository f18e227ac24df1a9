"""The loop: batches through a method's step, the optimiser, evaluation, checkpoints and records."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from load_data import Data, Split, steps_per_epoch, test_batches, train_batches
from mixup.base import Method, Step

from . import checkpoint, pictures, processes, records
from .device import peak_memory, step_generator
from .errors import StopSignal, UserError
from .graph import Captured, Take
from .processes import World
from .records import log
from .runs import LOCK

EVALUATION_BATCH = {"cpu": 250, "mps": 500, "cuda": 1000}  # images of 32×32; fewer of larger ones
MIXED = "mixed.png"
AGREE_STEPS = 10  # ranks agree this often on saving and stopping; each time they wait for each other
CURVES_SECONDS = 20  # drawing takes half a second; refreshed at most this often while running


@dataclass
class Progress:
    """Where a run stands: everything a checkpoint holds beside weights and optimiser.

    Attributes:
        epoch: the epoch in progress, or the next one, from 0.
        step: batches of it that are done.
        sums: of the epoch so far: loss × images, top-1 hits, top-5 hits, images.
        seconds: spent on the epoch before the last restart.
        rows: a row of records.COLUMNS for every finished epoch.
    """

    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        whole = isinstance(self.epoch, int) and isinstance(self.step, int) and isinstance(self.seconds, float)
        if not whole or len(self.sums) != 4 or any(row.keys() != set(records.COLUMNS) for row in self.rows):
            raise ValueError("its progress is not one")

    @property
    def best(self) -> float:
        return max((row["test_top1"] for row in self.rows), default=0.0)


@dataclass
class Run:
    """What training works on. ``folder`` is None where nothing is written: with --log_off, and on all ranks but the
    first."""

    args: argparse.Namespace
    settings: dict[str, Any]
    folder: Path | None
    device: torch.device
    data: Data
    model: nn.Module
    method: Method
    optimizer: torch.optim.Optimizer
    progress: Progress
    stop: StopSignal
    world: World = field(default_factory=World)
    lock: IO | None = None

    def save(self, best: bool = False) -> None:
        """Write the checkpoint; a failing disk stops the run with one line, the one before stays."""
        if self.folder is None:
            return
        if self.lock is not None and self.lock_is_lost():
            raise UserError(f"{self.folder} was deleted and made again by another run; this one stops")
        state = {
            "sage": 1,  # version of this layout
            "settings": self.settings,
            "classes": self.data.classes,
            "mean": self.data.mean,
            "std": self.data.std,
            "images": len(self.data.train),
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        try:
            checkpoint.save(state, self.folder, best)
        except FileNotFoundError as error:
            raise UserError(f"{self.folder} was deleted while the run was writing into it; this run stops") from error
        except OSError as error:
            raise UserError(
                f"cannot write a checkpoint into {self.folder}: {error.strerror or error}; the one before is "
                f"untouched. Make room there and type the same command again"
            ) from error

    def lock_is_lost(self) -> bool:
        """Whether the folder's lock is another file than the one this run holds."""
        assert self.folder is not None
        assert self.lock is not None
        try:
            return not os.path.samestat(os.stat(self.folder / LOCK), os.fstat(self.lock.fileno()))
        except OSError:
            return False


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """The base rate times the factors of the milestones that have been reached."""
    reached = [gamma for milestone, gamma in zip(args.schedule, args.gammas, strict=True) if epoch >= milestone]
    return args.learning_rate * math.prod(reached)


def hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Number of rows whose label is the largest logit, and among the five largest."""
    leaders = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return leaders[:, 0].sum(), leaders.sum()


class Stopped(Exception):
    """A signal came during evaluation, which can be done again."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    data: Data,
    device: torch.device,
    prefix: str,
    world: World | None = None,
    stop: StopSignal | None = None,
) -> dict[str, float]:
    """Top-1, top-5 (in %) and mean cross-entropy of a split, without augmentation.

    A single process gives up with ``Stopped`` when ``stop`` has seen a signal.

    Ranks take the batches in turn; their sums are added in the order of the batches, so that the numbers are those of
    a single process to the last bit.
    """
    world = world or World()
    was_training = model.training
    model.eval()
    size = max(1, EVALUATION_BATCH[device.type] * 32**2 // max(32**2, math.prod(data.image_size)))
    sums = torch.zeros(steps_per_epoch(len(split), size), 3, device=device, dtype=sum_type(device))
    for number, (images, labels) in enumerate(test_batches(split, data, batch_size=size, device=device)):
        if stop is not None and stop.exit_code and world.size == 1:
            raise Stopped
        if number % world.size == world.rank:
            logits = model(images).float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums[number] = torch.stack([loss, *hits(logits, labels)])
    model.train(was_training)
    return scores([*processes.total(sums).sum(dim=0).tolist(), len(split)], prefix)


def sum_type(device: torch.device) -> torch.dtype:
    """Sums are float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


class Meter:
    """Sums over an epoch, gathered on the device and read back only when somebody asks."""

    def __init__(self, sums: list[float], device: torch.device) -> None:
        self.sums = torch.tensor(sums, device=device, dtype=sum_type(device))
        self.first_bad = torch.full((), math.inf, device=device)

    def add(self, step: int, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch; remembers the first step whose loss is not finite."""
        count = torch.full((), len(labels), device=loss.device)
        self.sums += torch.stack([loss * count, *hits(logits, labels), count])
        self.first_bad = torch.where(loss.isfinite(), self.first_bad, self.first_bad.clamp(max=step))

    def read(self, run: Run) -> list[float]:
        """This rank's sums; stops the run on numbers that went wrong."""
        if math.isfinite(bad := self.first_bad.item()):
            raise not_finite(run, int(bad))
        return self.sums.tolist()

    def settle(self, run: Run) -> None:
        """Put the sums of all ranks into the run's progress."""
        self.read(run)
        run.progress.sums = processes.total(self.sums).tolist()


def step_taker(
    method: Method, network: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, record: bool
) -> Take:
    """Takes a whole training step: gradients to zero, the method's step, backward, optimiser.

    With ``record`` it is one CUDA graph, where there is CUDA and the method allows it.
    """

    def take(images: Tensor, labels: Tensor, draws: Any) -> Step:
        optimizer.zero_grad(set_to_none=True)
        result = method.step(network, images, labels, draws)
        result.loss.backward()
        optimizer.step()
        # a result somebody holds must not keep autograd's nodes alive: they cannot be recorded again
        return replace(result, loss=result.loss.detach(), logits=result.logits.detach())

    if record and device.type == "cuda" and method.recordable:
        return Captured(take, lambda: [group["lr"] for group in optimizer.param_groups], device)
    return take


def train_epoch(run: Run, network: nn.Module, take: Take, weight: processes.ImageWeight) -> bool:
    """The rest of the epoch in progress. Leaves sums, position and seconds in ``run.progress``.

    Returns whether it was finished; False if a signal came and everything was saved.
    """
    args, device, progress, world = run.args, run.device, run.progress, run.world
    network.train()
    number = len(run.data.train)
    total = steps_per_epoch(number, args.batch_size)
    batches = train_batches(
        run.data,
        batch_size=args.batch_size,
        seed=args.seed,
        epoch=progress.epoch,
        device=device,
        start=progress.step,
        part_of=world.part,
    )
    meter = Meter(progress.sums if world.rank == 0 else [0.0] * 4, device)
    no_picture = run.folder is not None and not (run.folder / MIXED).exists()
    saved = shown = last = time.monotonic()
    with progress_bar(total, run) as bar:
        for step, (images, labels) in enumerate(batches, start=progress.step):
            weight.value = len(labels) * world.size / min(args.batch_size, number - step * args.batch_size)
            rng = step_generator(args.seed, progress.epoch, step, world.rank)
            draws = run.method.draw(rng, len(images), images.shape[2], images.shape[3], progress.epoch)
            try:
                result = take(images, labels, draws)
            except FloatingPointError as error:
                raise not_finite(run, step) from error
            except ValueError as error:
                where = f"epoch {progress.epoch}, step {step}"
                raise UserError(f"{args.method} stops in {where}: {error}. Try less extreme settings") from error
            meter.add(step, result.loss, result.logits, labels)
            progress.step = step + 1
            if no_picture and run.folder is not None:
                no_picture = False
                keep_going(partial(pictures.plot_mixed, run.folder / MIXED, result, images, run.data))

            bar.update()
            now = time.monotonic()
            progress.seconds += now - last
            last = now
            if bar.disable and progress.step % args.print_freq == 0:
                log.info(line_of_batch(run, total, meter.read(run)))
            elif not bar.disable and now - shown > 0.5:
                shown = now
                bar.set_postfix_str(
                    "loss {train_loss:.4f} acc {train_top1:.2f}".format(**scores(meter.read(run), "train"))
                )
            elif device.type == "cpu":
                meter.read(run)
            if world.size > 1 and progress.step % AGREE_STEPS:
                continue
            wanted = run.stop.exit_code or int(now - saved > 60 * args.checkpoint_minutes)
            wanted = processes.largest(wanted, device)
            if wanted:
                meter.settle(run)
                refuse_bad_weights(run)
                run.save()
                saved = time.monotonic()
            if wanted > 1:
                run.stop.exit_code = max(run.stop.exit_code, wanted)
                return False
    meter.settle(run)  # waits for the device
    progress.seconds += time.monotonic() - last
    return True


@contextmanager
def progress_bar(total: int, run: Run) -> Iterator[tqdm]:
    """Shown on a terminal only; elsewhere plain lines take its place."""
    name = f"epoch {run.progress.epoch}/{run.args.epochs}"
    hidden = run.world.rank > 0 or not sys.stderr.isatty()
    with tqdm(total=total, initial=run.progress.step, desc=name, unit="batch", disable=hidden, leave=False) as bar:
        yield bar


def line_of_batch(run: Run, total: int, sums: list[float]) -> str:
    """The published line within an epoch; loss and accuracy of many processes are the first one's."""
    current, progress = scores(sums, "train"), run.progress
    rate = min(progress.step * run.args.batch_size, len(run.data.train)) / progress.seconds
    return (
        f"  Epoch: [{progress.epoch:03d}][{progress.step:03d}/{total:03d}]   Loss {current['train_loss']:.4f}   "
        f"Prec@1 {current['train_top1']:.3f}   Prec@5 {current['train_top5']:.3f}   {rate:.0f} images/s"
    )


def scores(sums: list[float], prefix: str) -> dict[str, float]:
    """Means from the sums of loss, top-1 and top-5 hits over images."""
    loss, top1, top5, count = sums
    return {f"{prefix}_loss": loss / count, f"{prefix}_top1": 100 * top1 / count, f"{prefix}_top5": 100 * top5 / count}


def not_finite(run: Run, step: int) -> UserError:
    """The error for a loss that is not a number, raised before anything is saved over the last good checkpoint."""
    epoch, args = run.progress.epoch, run.args
    return UserError(
        f"the loss is not finite in epoch {epoch}, step {step} ({args.method}, learning rate "
        f"{learning_rate(args, epoch):g}). Try a smaller --learning_rate; the last good checkpoint is untouched"
    )


def refuse_bad_weights(run: Run) -> None:
    """A finite loss can still lead to weights that are not; they must not reach a checkpoint."""
    if not all(value.isfinite().all() for value in run.model.state_dict().values() if value.is_floating_point()):
        raise not_finite(run, run.progress.step)


def keep_going(write: Any) -> None:
    """Do something a run can live without; say so if the disk refuses."""
    try:
        write()
    except OSError as error:
        log.warning(f"warning: {error}; training goes on without that file")


def fit(run: Run) -> None:
    """Train to the last epoch, or until a signal; everything is saved when this returns."""
    args, progress = run.args, run.progress
    weight = processes.ImageWeight()
    network = processes.data_parallel(run.model, weight)
    take = step_taker(run.method, network, run.optimizer, run.device, args.fast and run.world.size == 1)
    events = records.Events(run.folder, len(progress.rows)) if run.folder else None
    drawn = -math.inf
    while progress.epoch < args.epochs and not stopped(run):
        rate = learning_rate(args, progress.epoch)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        done = sum(row["seconds"] for row in progress.rows) / max(1, len(progress.rows))
        left = done * (args.epochs - progress.epoch)
        log.info(records.line_of_epoch(progress.epoch, args.epochs, rate, progress.best, left))
        if not train_epoch(run, network, take, weight):
            break
        try:
            row = finish_epoch(run, rate)
        except Stopped:
            refuse_bad_weights(run)
            run.save()
            break
        report_epoch(run, row, events)
        if time.monotonic() - drawn > CURVES_SECONDS:
            draw_curves(run)
            drawn = time.monotonic()


def stopped(run: Run) -> bool:
    """Whether a signal came, to any rank; then every rank has its exit code."""
    agreed = processes.largest(run.stop.exit_code, run.device)
    run.stop.exit_code = max(run.stop.exit_code, agreed)  # one that came while the ranks agreed counts next time
    return agreed > 0


def finish_epoch(run: Run, rate: float) -> dict[str, Any]:
    """Evaluate, save, and return the epoch's row."""
    progress = run.progress
    started = time.monotonic()
    processes.share_buffers(run.model)
    row: dict[str, Any] = dict.fromkeys(records.COLUMNS)
    row.update(epoch=progress.epoch, learning_rate=rate, **scores(progress.sums, "train"))
    if run.data.valid is not None:
        row.update(evaluate(run.model, run.data.valid, run.data, run.device, "valid", run.world, run.stop))
    row.update(evaluate(run.model, run.data.test, run.data, run.device, "test", run.world, run.stop))
    if not all(math.isfinite(value) for value in row.values() if isinstance(value, float)):
        raise not_finite(run, progress.step)
    refuse_bad_weights(run)
    row.update(
        best_top1=max(progress.best, row["test_top1"]),
        seconds=round(progress.seconds + time.monotonic() - started, 3),
        images_per_second=round(progress.sums[3] / progress.seconds, 1),
        peak_memory_gb=round(peak_memory(run.device), 1),
    )
    is_best = row["test_top1"] > progress.best or not progress.rows
    if run.args.resume and run.folder is not None and not (run.folder / checkpoint.BEST).exists():
        is_best = True  # what was better is in the folder of the run that --resume names
    progress.rows.append(row)
    progress.epoch, progress.step, progress.sums, progress.seconds = progress.epoch + 1, 0, [0.0] * 4, 0.0
    run.save(is_best)
    return row


def report_epoch(run: Run, row: dict[str, Any], events: records.Events | None) -> None:
    """The epoch's lines, metrics.csv and TensorBoard scalars."""
    log.info(records.line_of_scores("Train", row, "train"))
    if run.data.valid is not None:
        log.info(records.line_of_scores("Valid", row, "valid"))
    log.info(records.line_of_scores("Test", row, "test"))
    log.info(f"  {row['seconds']:.1f} s, {row['images_per_second']:.0f} images/s in training")
    if run.folder is not None:
        keep_going(partial(records.write_metrics, run.folder / "metrics.csv", run.progress.rows))
    if events is not None:
        keep_going(partial(events.write, run.progress.rows))


def draw_curves(run: Run) -> None:
    """curves.png of the epochs so far."""
    if run.folder is not None and run.progress.rows:
        title, path = run.folder.name, run.folder / "curves.png"
        keep_going(partial(pictures.plot_curves, path, run.progress.rows, title, run.args.schedule))
