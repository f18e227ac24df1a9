"""The loop: draw → step → backward → optimiser → meter, for every batch; then evaluation, and what an epoch leaves."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from load_data import Data, Split, steps_per_epoch, test_batches, train_batches
from mixup.base import Step, bce_loss, to_device

from . import distributed, pictures
from .checkpoint import Saver, refuse_bad_weights
from .device import Captured, peak_memory, step_generator
from .distributed import World
from .errors import StopSignal, UserError
from .run import COLUMNS, Run, best_row, line_of_epoch, line_of_scores, log, write_metrics

EVALUATION_BATCH = {"cpu": 250, "mps": 500, "cuda": 1000}  # images of 32×32; fewer of larger ones
AGREE_STEPS = 10  # ranks agree this often on saving and stopping; each time they wait for each other
BAR_SECONDS = 0.5  # the numbers beside the bar on a terminal are read from the device this often
CURVES_SECONDS = 20  # plotting takes half a second; refreshed at most this often while running
ROUNDING = 1e-4  # of a loss, relative; float32 is far more exact


def fit(run: Run, saver: Saver, stop: StopSignal) -> None:
    """Train to the last epoch, or until a signal; everything is saved when this returns."""
    method, optimizer, training, progress, world = run.method, run.optimizer, run.training, run.progress, run.world
    model = distributed.data_parallel(run.model)
    leaves = Leaves(run)

    def step(images: Tensor, labels: Tensor, draws: Any) -> Step:
        optimizer.zero_grad(set_to_none=True)
        result = method.step(model, images, labels, draws)
        weight = weight_of(run, len(labels))
        (result.loss if weight == 1 else result.loss * weight).backward()
        optimizer.step()
        return result.detached()  # autograd's nodes must not outlive the step

    if training.fast and run.device.type == "cuda" and world.size == 1 and method.recordable:
        take_step: Callable[..., Step] = Captured(step, lambda: [g["lr"] for g in optimizer.param_groups], run.device)
    else:
        take_step = step

    with failures_named(run):
        while progress.epoch < training.epochs and not stopped(run, stop):
            for group in optimizer.param_groups:
                group["lr"] = training.rate(progress.epoch)
            log.info(line_of_epoch(progress, training))
            model.train()
            stopping = False
            with Meter(run) as meter:
                for images, labels in rest_of_epoch(run):
                    # every random choice depends on seed, epoch, step and rank alone: a stopped run continues bitwise
                    rng = step_generator(training.seed, progress.epoch, progress.step, world.rank)
                    draws = method.draw(rng, len(images), images.shape[2], images.shape[3], progress.epoch)
                    result = take_step(images, labels, draws)
                    progress.step += 1
                    meter.add(result, labels)
                    leaves.mixed.collect(progress.epoch, result.mixed, images, draws)
                    stopping = save_or_stop(run, saver, stop, meter)
                    if stopping:
                        break
                else:
                    meter.settle()
            if not stopping:
                after_epoch(run, saver, stop, leaves)
        if stopped(run, stop):
            saver.save()


def rest_of_epoch(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of the batches that are left of the epoch in progress: this process's part of each."""
    return train_batches(
        run.data, batch_size=run.training.batch_size, seed=run.training.seed, epoch=run.progress.epoch,
        device=run.device, start=run.progress.step, part_of=run.world.part,
    )  # fmt: skip


def weight_of(run: Run, images: int) -> float:
    """How many images this rank has for each one of an equal share of the batch: 1 unless a last batch does not
    divide. Every image then counts alike in the mean over ranks."""
    if run.world.size == 1:
        return 1.0
    whole = min(run.training.batch_size, len(run.data.train) - run.progress.step * run.training.batch_size)
    return images * run.world.size / whole


# ---------------------------------------------------------------------------------------- after a batch, after an epoch


def save_or_stop(run: Run, saver: Saver, stop: StopSignal, meter: Meter) -> bool:
    """Show the batch, and save where that is due. Whether a signal came, to any process: every few steps they agree."""
    meter.show()
    if run.world.size > 1 and run.progress.step % AGREE_STEPS:
        return False
    wanted = distributed.largest(stop.exit_code or int(saver.is_due()), run.device)
    if wanted:
        meter.settle()
    if wanted == 1:
        saver.save()
    stop.exit_code = max(stop.exit_code, wanted if wanted > 1 else 0)
    return wanted > 1


def stopped(run: Run, stop: StopSignal) -> bool:
    """Whether a signal came, to any rank; then every rank has its exit code."""
    agreed = distributed.largest(stop.exit_code, run.device)
    stop.exit_code = max(stop.exit_code, agreed)  # one that came while the ranks agreed counts next time
    return agreed > 0


def after_epoch(run: Run, saver: Saver, stop: StopSignal, leaves: Leaves) -> None:
    """Evaluate, save where that is due, and write what the epoch leaves; nothing if a signal came during evaluation,
    which is then done again."""
    progress, evaluation_began = run.progress, time.monotonic()
    distributed.share_buffers(run.model)
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row.update(epoch=progress.epoch, learning_rate=run.training.rate(progress.epoch), **scores(progress.sums, "train"))
    try:
        for name, split in (("valid", run.data.valid), ("test", run.data.test)):
            if split is not None:
                row.update(evaluate(run.model, split, run.data, run.device, name, run.world, stop))
    except Stopped:
        return
    if not all(math.isfinite(value) for value in row.values() if isinstance(value, float)):
        raise not_finite(run, progress.step)
    best = best_row([*progress.rows, row])
    row.update(
        best_top1=best["test_top1"],
        seconds=round(progress.seconds + time.monotonic() - evaluation_began, 3),
        images_per_second=round(progress.sums[3] / progress.seconds, 1),
        peak_memory_gb=round(peak_memory(run.device), 1),
    )
    refuse_bad_weights(run.model)
    progress.next_epoch(row)
    if best is row or not saver.has_best():
        saver.keep_best()
    if saver.is_due() or progress.epoch >= run.training.epochs:
        saver.save()
    leaves.write()


class Leaves:
    """What an epoch leaves beside checkpoints: lines, metrics.csv, TensorBoard scalars, pictures."""

    def __init__(self, run: Run) -> None:
        self.run, self.plotted = run, -math.inf
        self.mixed = pictures.MixedImages(run.folder, run.data, run.method, run.training.epochs)
        # readers drop what a killed start wrote from this epoch on
        self.scalars = SummaryWriter(str(run.folder), purge_step=run.progress.epoch) if run.folder else None

    def write(self) -> None:
        """After the last epoch of ``run.progress.rows``."""
        rows = self.run.progress.rows
        for name in ("train", "valid", "test"):
            if rows[-1][f"{name}_top1"] is not None:
                log.info(line_of_scores(name.capitalize(), rows[-1], name))
        log.info(f"  {rows[-1]['seconds']:.1f} s, {rows[-1]['images_per_second']:.0f} images/s in training")
        self.mixed.draw()
        if self.run.folder is None:
            return
        self.mixed.draw()  # an epoch of fewer batches than the picture has rows
        without_stopping(write_metrics, self.run.folder / "metrics.csv", rows)
        without_stopping(self.write_scalars, rows[-1])
        if time.monotonic() - self.plotted > CURVES_SECONDS:
            plot_curves(self.run)
            self.plotted = time.monotonic()

    def write_scalars(self, row: dict[str, Any]) -> None:
        """The numbers of an epoch for TensorBoard, in groups by the first part of their name."""
        assert self.scalars is not None
        for name, value in row.items():
            if value is not None and name != "epoch":
                self.scalars.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
        self.scalars.flush()


def plot_curves(run: Run) -> None:
    """curves.png of the epochs so far."""
    if run.folder is not None and run.progress.rows:
        mixes = run.method.name != "vanilla"
        path, title = run.folder / "curves.png", run.folder.name
        pictures.attempt(pictures.plot_curves, path, run.progress.rows, title, run.training.schedule, mixes)


def without_stopping(write: Callable[..., object], *args: Any) -> None:
    """Do something a run can live without; say so if the disk refuses."""
    try:
        write(*args)
    except OSError as error:
        log.warning(f"warning: {error}; training continues without that file")


class Meter:
    """Sums over the epoch in progress, gathered on the device and read back only when somebody asks; and the bar of a
    terminal or the lines that take its place."""

    def __init__(self, run: Run) -> None:
        self.run = run
        start = run.progress.sums if run.world.rank == 0 else [0.0] * 4
        self.sums = to_device(start, run.device, sum_type(run.device))
        self.first_bad = torch.full((), math.inf, device=run.device)
        self.total = steps_per_epoch(len(run.data.train), run.training.batch_size)
        self.last: Step | None = None

    def __enter__(self) -> Meter:
        progress = self.run.progress
        self.bar = tqdm(
            total=self.total, initial=progress.step, desc=f"epoch {progress.epoch}/{self.run.training.epochs}",
            unit="batch", disable=self.run.world.rank > 0 or not sys.stderr.isatty(), leave=False,
        )  # fmt: skip
        self.shown = time.monotonic()
        self.began = self.shown - progress.seconds
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def add(self, result: Step, labels: Tensor) -> None:
        """Add the batch before ``progress.step``; remembers the first one whose loss is not finite."""
        loss, self.last = result.loss, result
        count = torch.full((), len(labels), device=loss.device)
        self.sums += torch.stack([loss * count, *hits(result.logits, labels), count])
        number = self.run.progress.step - 1
        self.first_bad = torch.where(loss.isfinite(), self.first_bad, self.first_bad.clamp(max=number))

    def read(self) -> list[float]:
        """This rank's sums; stops the run on numbers that went wrong."""
        if math.isfinite(bad := self.first_bad.item()):
            raise not_finite(self.run, int(bad))
        return self.sums.tolist()

    def settle(self) -> None:
        """Put the sums of all ranks and the time into the run's progress; waits for the device first."""
        self.read()
        self.run.progress.sums = distributed.total(self.sums).tolist()
        self.run.progress.seconds = time.monotonic() - self.began
        refuse_dead_network(self.run, self.last)

    def show(self) -> None:
        """The bar, or a line every --print_freq batches."""
        self.bar.update()
        if self.bar.disable and self.run.progress.step % self.run.training.print_freq == 0:
            log.info(self.line())
        elif not self.bar.disable and time.monotonic() - self.shown > BAR_SECONDS:
            self.shown = time.monotonic()
            self.bar.set_postfix_str(
                "loss {train_loss:.4f} acc {train_top1:.2f}".format(**scores(self.read(), "train"))
            )
        elif self.run.device.type == "cpu":
            self.read()

    def line(self) -> str:
        """The published line within an epoch; loss and accuracy of many processes are the first one's."""
        current, progress = scores(self.read(), "train"), self.run.progress
        images = min(progress.step * self.run.training.batch_size, len(self.run.data.train))
        return (
            f"  Epoch: [{progress.epoch:03d}][{progress.step:03d}/{self.total:03d}]   "
            f"Loss {current['train_loss']:.4f}   Prec@1 {current['train_top1']:.3f}   "
            f"Prec@5 {current['train_top5']:.3f}   {images / (time.monotonic() - self.began):.0f} images/s"
        )


def scores(sums: list[float], prefix: str) -> dict[str, float]:
    """Means from the sums of loss, top-1 and top-5 hits over images."""
    loss, top1, top5, count = sums
    return {f"{prefix}_loss": loss / count, f"{prefix}_top1": 100 * top1 / count, f"{prefix}_top5": 100 * top5 / count}


# ----------------------------------------------------------------------------------------------------------- evaluation


class Stopped(Exception):
    """A signal came during evaluation, which can be done again."""


def hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Number of rows whose label is the largest logit, and among the five largest."""
    leaders = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return leaders[:, 0].sum(), leaders.sum()


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

    A single process gives up with ``Stopped`` when ``stop`` has seen a signal. Ranks take the batches in turn; their
    sums are added in the order of the batches, so that the numbers are those of a single process to the last bit.
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
    return scores([*distributed.total(sums).sum(dim=0).tolist(), len(split)], prefix)


def sum_type(device: torch.device) -> torch.dtype:
    """Sums are float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


# ---------------------------------------------------------------------------------------------- numbers that went wrong


@contextmanager
def failures_named(run: Run) -> Iterator[None]:
    """What goes wrong within says where in the run it did."""
    try:
        yield
    except FloatingPointError as error:
        raise not_finite(run, run.progress.step) from error
    except ValueError as error:
        where = f"epoch {run.progress.epoch}, step {run.progress.step}"
        raise UserError(f"{run.method.name} stops in {where}: {error}. Try less extreme settings") from error


def not_finite(run: Run, step: int) -> UserError:
    """The error for a loss that is not a number, raised before anything is saved over the last good checkpoint."""
    epoch = run.progress.epoch
    return UserError(
        f"the loss is not finite in epoch {epoch}, step {step} ({run.method.name}, learning rate "
        f"{run.training.rate(epoch):g}). Try a smaller --learning_rate; the last good checkpoint is untouched"
    )


def refuse_dead_network(run: Run, last: Step | None) -> None:
    """Stop a network that will never learn again: every gradient of the last batch is exactly 0, on every process, and
    the batch's loss is above that of equal probabilities, so that it is not a perfect fit. At equal probabilities
    gradients may cancel by chance, as in a balanced batch: such a network continues."""
    if last is None:
        return
    gradients = (parameter.grad for parameter in run.model.parameters() if parameter.grad is not None)
    if distributed.largest(int(any(bool(gradient.any()) for gradient in gradients)), run.device):
        return
    count, classes = last.logits.shape
    part = [count * bce_loss(last.logits, last.mixed.targets).item(), count]
    total, images = distributed.total(to_device(part, run.device, sum_type(run.device))).tolist()
    loss, equal = total / images, (math.log(classes) - (classes - 1) * math.log1p(-1 / classes)) / classes
    if distributed.largest(int(loss > equal * (1 + ROUNDING)), run.device):
        epoch = run.progress.epoch
        raise distributed.common_error(
            f"the network is dead in epoch {epoch}: every gradient of the last batch is exactly 0, at a loss of "
            f"{loss:.4g}, where equal probabilities have {equal:.4g} ({run.method.name}, learning rate "
            f"{run.training.rate(epoch):g}). Try a smaller --learning_rate, with an --add_name; the last good "
            "checkpoint is untouched"
        )
