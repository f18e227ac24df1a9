"""The loop: draw → step → backward → optimiser → meter, for every batch; then evaluation, and what an epoch leaves."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from load_data import Data, Split, steps_per_epoch, test_batches, train_batches
from mixup.base import Step, bce_loss, to_device

from . import distributed, pictures
from .checkpoint import Saver, cure, not_finite, refuse_bad_weights
from .device import Captured, peak_memory, step_generator
from .distributed import World
from .errors import StopSignal, UserError
from .run import COLUMNS, Run, best_row, line_of_epoch, line_of_scores, log, write_metrics

EVALUATION_BATCH = {"cpu": 250, "mps": 500, "cuda": 1000}  # images of 32×32; fewer of larger ones
AGREE_STEPS = 10  # ranks agree this often on saving and stopping; each time they wait for each other
CURVES_SECONDS = 20  # plotting takes half a second; refreshed at most this often while running
ROUNDING = 1e-4  # of a loss, relative; float32 is far more exact


def fit(run: Run, saver: Saver, stop: StopSignal) -> None:
    """Train to the last epoch, or until a signal; everything is saved when this returns."""
    method, optimizer, training, progress, world = run.method, run.optimizer, run.training, run.progress, run.world
    model = distributed.data_parallel(run.model)
    leaves = Leaves(run)

    def step(images: Tensor, labels: Tensor, draws: Any) -> Step:
        optimizer.zero_grad(set_to_none=True)
        result = method.step(model, images, labels, draws)  # mixes, then runs the network on what was mixed
        weight = weight_of(run, len(labels))
        (result.loss if weight == 1 else result.loss * weight).backward()
        optimizer.step()
        return result.detached()  # autograd's nodes must not outlive the step

    take_step: Callable[..., Step] = step
    if training.fast and run.device.type == "cuda" and world.size == 1 and method.recordable:
        # the same step as one CUDA graph; it is recorded anew when the learning rate changes
        take_step = Captured(step, lambda: [group["lr"] for group in optimizer.param_groups], run.device)

    while progress.epoch < training.epochs and not stopped(run, stop):
        for group in optimizer.param_groups:
            group["lr"] = training.rate(progress.epoch)
        log.info(line_of_epoch(progress, training))
        model.train()
        meter, batches = Meter(run), rest_of_epoch(run)
        for images, labels in batches:
            # every random choice depends on seed, epoch, step and rank alone: a stopped run continues to the same bits
            rng = step_generator(training.seed, progress.epoch, progress.step, world.rank)
            draws = method.draw(rng, len(images), images.shape[2], images.shape[3], progress.epoch)
            try:
                result = take_step(images, labels, draws)  # go!
            except (FloatingPointError, ValueError) as error:
                raise failed(run, error) from error
            progress.step += 1
            meter.add(result, labels)
            meter.show(batches)
            leaves.mixed.collect(progress.epoch, result.mixed, images, draws)
            if save_or_stop(run, saver, stop, meter):
                break
        else:  # the epoch is over
            meter.settle()
            after_epoch(run, saver, stop, leaves)
    if stopped(run, stop):
        saver.save()


def rest_of_epoch(run: Run) -> tqdm:
    """Images and labels of the batches that are left of the epoch in progress, this process's part of each; with a bar
    on a terminal."""
    training, progress = run.training, run.progress
    batches = train_batches(
        run.data, batch_size=training.batch_size, seed=training.seed, epoch=progress.epoch, device=run.device,
        start=progress.step, part_of=run.world.part,
    )  # fmt: skip
    return tqdm(
        batches, desc=f"epoch {progress.epoch}/{training.epochs}", unit="batch", initial=progress.step,
        total=steps_per_epoch(len(run.data.train), training.batch_size), leave=False,
        disable=run.world.rank > 0 or not sys.stderr.isatty(),
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
    """Save where that is due. Whether a signal came, to any process: every few steps they agree."""
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
    refuse_bad_weights(run)
    best = best_row([*progress.rows, row])
    row.update(
        best_top1=best["test_top1"],
        seconds=round(progress.seconds + time.monotonic() - evaluation_began, 3),
        images_per_second=round(progress.sums[3] / progress.seconds, 1),
        peak_memory_gb=round(peak_memory(run.device), 1),
    )
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
        self.mixed.draw()  # an epoch of fewer batches than the picture has rows
        if self.run.folder is None or self.scalars is None:
            return
        try:
            write_metrics(self.run.folder / "metrics.csv", rows)
            for name, value in rows[-1].items():
                if value is not None and name != "epoch":
                    self.scalars.add_scalar(name.replace("_", "/", 1), value, rows[-1]["epoch"])
            self.scalars.flush()
        except OSError as error:  # a full disk, perhaps; the next epoch writes all rows again
            log.warning(f"warning: {error}; training continues without that file")
        if time.monotonic() - self.plotted > CURVES_SECONDS:
            plot_curves(self.run)
            self.plotted = time.monotonic()


def plot_curves(run: Run) -> None:
    """curves.png of the epochs so far."""
    if run.folder is not None and run.progress.rows:
        mixes = run.method.name != "vanilla"
        path, title = run.folder / "curves.png", run.folder.name
        pictures.attempt(pictures.plot_curves, path, run.progress.rows, title, run.training.schedule, mixes)


class Meter:
    """Sums over the epoch in progress, gathered on the device and read back only when somebody asks."""

    def __init__(self, run: Run) -> None:
        self.run, self.began = run, time.monotonic() - run.progress.seconds
        start = run.progress.sums if run.world.rank == 0 else [0.0] * 4
        self.sums = to_device(start, run.device, sum_type(run.device))
        self.last: Step | None = None

    def add(self, result: Step, labels: Tensor) -> None:
        """Add a batch."""
        self.last = result
        count = torch.full((), len(labels), device=labels.device)
        self.sums += torch.stack([result.loss * count, *hits(result.logits, labels), count])

    def read(self) -> list[float]:
        """This rank's sums; stops the run on a loss that was not finite, for then their sum never is again."""
        sums = self.sums.tolist()
        if not math.isfinite(sums[0]):
            raise not_finite(self.run, self.run.progress.step - 1)
        return sums

    def settle(self) -> None:
        """Put the sums of all ranks and the time into the run's progress; waits for the device first."""
        self.read()
        self.run.progress.sums = distributed.total(self.sums).tolist()
        self.run.progress.seconds = time.monotonic() - self.began
        refuse_dead_network(self.run, self.last)

    def show(self, bar: tqdm) -> None:
        """Loss and accuracy every --print_freq batches: beside the bar, or in a line where there is none."""
        if self.run.progress.step % self.run.training.print_freq == 0:
            if bar.disable:
                log.info(self.line())
            else:
                bar.set_postfix_str("loss {train_loss:.4f} acc {train_top1:.2f}".format(**scores(self.read(), "train")))
        elif self.run.device.type == "cpu":  # nothing to wait for: a bad loss ends the run at once
            self.read()

    def line(self) -> str:
        """The published line within an epoch; loss and accuracy of many processes are the first one's."""
        current, progress, size = scores(self.read(), "train"), self.run.progress, self.run.training.batch_size
        number = len(self.run.data.train)
        rate = min(progress.step * size, number) / (time.monotonic() - self.began)
        return (
            f"  Epoch: [{progress.epoch:03d}][{progress.step:03d}/{steps_per_epoch(number, size):03d}]   "
            f"Loss {current['train_loss']:.4f}   Prec@1 {current['train_top1']:.3f}   "
            f"Prec@5 {current['train_top5']:.3f}   {rate:.0f} images/s"
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


def failed(run: Run, error: Exception) -> UserError:
    """The error for a step that a method could not take, with the place where it happened."""
    if isinstance(error, FloatingPointError):
        return not_finite(run, run.progress.step)
    where = f"epoch {run.progress.epoch}, step {run.progress.step}"
    return UserError(f"{run.method.name} stops in {where}: {error}. Try less extreme settings")


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
        raise distributed.common_error(
            f"the network is dead in epoch {run.progress.epoch}: every gradient of the last batch is exactly 0, at a "
            f"loss of {loss:.4g}, where equal probabilities have {equal:.4g} {cure(run)}"
        )
