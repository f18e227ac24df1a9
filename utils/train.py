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
from .checkpoint import Saver, cure, not_finite
from .device import Captured, peak_memory, step_generator
from .distributed import World
from .errors import StopSignal, UserError
from .files import log
from .run import COLUMNS, Run, best_row, line_of_epoch, line_of_scores, write_metrics

EVALUATION_BATCH = {"cpu": 250, "cuda": 1000}  # images of 32×32; fewer of larger ones
AGREE_STEPS = 10  # ranks agree this often on saving and stopping; each time they wait for each other
CURVES_SECONDS = 20  # plotting takes half a second; refreshed at most this often while running
ROUNDING = 1e-4  # of a loss, relative; float32 is far more exact


def fit(run: Run, saver: Saver, stop: StopSignal) -> bool:
    """Train to the last epoch, or until a signal; everything is saved when this returns. Whether a signal came."""
    method, optimizer, training, progress, world = run.method, run.optimizer, run.training, run.progress, run.world
    model = distributed.data_parallel(run.model)
    records = Records(run)

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

    while progress.epoch < training.epochs:
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
            except FloatingPointError as error:
                raise not_finite(run, progress.step) from error
            except ValueError as error:  # settings that are too extreme for a solver
                raise UserError(f"{method.name}, epoch {progress.epoch}, step {progress.step}: {error}") from error
            progress.step += 1
            meter.add(result, labels)
            meter.show(batches)
            records.mixed.collect(progress.epoch, result.mixed, images, draws)
            if save_or_stop(run, saver, stop, meter):
                return True
        meter.settle()
        after_epoch(run, saver, records)
        if save_or_stop(run, saver, stop):
            return True
    return False


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


def save_or_stop(run: Run, saver: Saver, stop: StopSignal, meter: Meter | None = None) -> bool:
    """Save where that is due: after --checkpoint_minutes, the last epoch, or a signal to any process, on which all
    agree every few steps. Whether there was such a signal. ``meter``: of an epoch in progress."""
    if meter and run.world.size > 1 and run.progress.step % AGREE_STEPS:
        return False
    due = saver.is_due() or run.progress.epoch >= run.training.epochs
    agreed = distributed.largest(stop.exit_code or int(due), run.device)
    if agreed:
        if meter:
            meter.settle()
        saver.save()
    stop.exit_code = max(stop.exit_code, agreed if agreed > 1 else 0)  # one that came just now counts next time
    return agreed > 1


def after_epoch(run: Run, saver: Saver, records: Records) -> None:
    """Evaluate, and record the epoch."""
    progress, evaluation_began = run.progress, time.monotonic()
    distributed.share_buffers(run.model)
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row.update(epoch=progress.epoch, learning_rate=run.training.rate(progress.epoch), **scores(progress.sums, "train"))
    for name, split in (("valid", run.data.valid), ("test", run.data.test)):
        if split is not None:
            row.update(evaluate(run.model, split, run.data, run.device, name, run.world))
    if not all(math.isfinite(value) for value in row.values() if isinstance(value, float)):
        raise not_finite(run, progress.step)
    best = best_row([*progress.rows, row])
    row.update(
        best_top1=best["test_top1"],
        seconds=round(progress.seconds + time.monotonic() - evaluation_began, 3),
        images_per_second=round(progress.sums[3] / progress.seconds, 1),
        peak_memory_gb=round(peak_memory(run.device), 1),
    )
    progress.next_epoch(row)
    saver.keep_best(best is row)
    records.write()


class Records:
    """What an epoch leaves besides checkpoints: lines, metrics.csv, TensorBoard scalars, pictures."""

    def __init__(self, run: Run) -> None:
        self.run, self.plotted = run, -math.inf
        self.mixed = pictures.MixedImages(run.folder, run.data, run.method, run.training.epochs)
        # TensorBoard drops what a killed start wrote from this epoch on
        self.scalars = SummaryWriter(str(run.folder), purge_step=run.progress.epoch) if run.folder else None

    def write(self) -> None:
        """After the last epoch of ``run.progress.rows``."""
        run, rows, row = self.run, self.run.progress.rows, self.run.progress.rows[-1]
        for name in ("train", "valid", "test"):
            if row[f"{name}_top1"] is not None:
                log.info(line_of_scores(name.capitalize(), row, name))
        log.info(f"  {row['seconds']:.1f} s, {row['images_per_second']:.0f} images/s in training")
        self.mixed.draw()  # an epoch of fewer batches than the picture has rows
        if run.folder is None or self.scalars is None:
            return
        try:
            write_metrics(run.folder / "metrics.csv", rows)
            for name, value in row.items():
                if value is not None and name != "epoch":
                    self.scalars.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
            self.scalars.flush()
        except OSError as error:  # a full disk, perhaps; the next epoch writes all rows again
            log.warning(f"warning: {error}; training continues without that file")
        if run.progress.epoch >= run.training.epochs or time.monotonic() - self.plotted > CURVES_SECONDS:
            path, mixes = run.folder / "curves.png", run.method.name != "vanilla"
            pictures.attempt(pictures.plot_curves, path, rows, run.folder.name, run.training.schedule, mixes)
            self.plotted = time.monotonic()


class Meter:
    """Sums over the epoch in progress, gathered on the device and read back only when somebody asks."""

    def __init__(self, run: Run) -> None:
        self.run, self.began = run, time.monotonic() - run.progress.seconds
        self.sums = to_device(run.progress.sums if run.world.rank == 0 else [0.0] * 4, run.device, torch.float64)
        self.last: Step | None = None

    def add(self, result: Step, labels: Tensor) -> None:
        """Add a batch."""
        self.last = result
        count = torch.full((), len(labels), device=labels.device)
        self.sums += torch.stack([result.loss * count, *hits(result.logits, labels), count])

    def read(self, sums: Tensor) -> list[float]:
        """``sums`` on the host, once the device has finished; ends the run if a loss was not finite, as their sum then
        is."""
        values = sums.tolist()
        if not math.isfinite(values[0]):
            raise not_finite(self.run, self.run.progress.step - 1)
        return values

    def settle(self) -> None:
        """Put the sums of all ranks and the time into the run's progress."""
        self.run.progress.sums = self.read(distributed.total(self.sums))
        self.run.progress.seconds = time.monotonic() - self.began
        refuse_dead_network(self.run, self.last)

    def show(self, bar: tqdm) -> None:
        """This process's loss and accuracy every --print_freq batches: alongside the bar, or in the published line."""
        progress, training, images = self.run.progress, self.run.training, len(self.run.data.train)
        if progress.step % training.print_freq:
            return
        steps, seconds = steps_per_epoch(images, training.batch_size), time.monotonic() - self.began
        loss, top1, top5 = scores(self.read(self.sums), "train").values()
        if not bar.disable:
            bar.set_postfix_str(f"loss {loss:.4f} acc {top1:.2f}")
            return
        log.info(
            f"  Epoch: [{progress.epoch:03d}][{progress.step:03d}/{steps:03d}]   Loss {loss:.4f}   Prec@1 {top1:.3f}   "
            f"Prec@5 {top5:.3f}   {min(progress.step * training.batch_size, images) / seconds:.0f} images/s"
        )


def scores(sums: list[float], prefix: str) -> dict[str, float]:
    """Means from the sums of loss, top-1 and top-5 hits over images."""
    loss, top1, top5, count = sums
    return {f"{prefix}_loss": loss / count, f"{prefix}_top1": 100 * top1 / count, f"{prefix}_top5": 100 * top5 / count}


def hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Number of rows whose label is the largest logit, and among the five largest."""
    leaders = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return leaders[:, 0].sum(), leaders.sum()


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, data: Data, device: torch.device, prefix: str, world: World | None = None
) -> dict[str, float]:
    """Top-1, top-5 (in %) and mean cross-entropy of a split, without augmentation.

    Ranks take the batches in turn; their sums are added in the order of the batches, so that the numbers are those of
    a single process to the last bit.
    """
    world = world or World()
    was_training = model.training
    model.eval()
    size = max(1, EVALUATION_BATCH[device.type] * 32**2 // max(32**2, math.prod(data.image_size)))
    sums = torch.zeros(steps_per_epoch(len(split), size), 3, device=device, dtype=torch.float64)
    for number, (images, labels) in enumerate(test_batches(split, data, batch_size=size, device=device)):
        if number % world.size == world.rank:
            logits = model(images).float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums[number] = torch.stack([loss, *hits(logits, labels)])
    model.train(was_training)
    return scores([*distributed.total(sums).sum(dim=0).tolist(), len(split)], prefix)


def refuse_dead_network(run: Run, last: Step | None) -> None:
    """Stop a network that will never learn again: every gradient of the last batch is exactly 0, on every process, and
    the batch's loss is above that of equal probabilities, so that it is not a perfect fit. At equal probabilities
    gradients may cancel by chance, as in a balanced batch: such a network continues."""
    if last is None:
        return
    alive = any(bool(parameter.grad.any()) for parameter in run.model.parameters() if parameter.grad is not None)
    if distributed.largest(int(alive), run.device):
        return
    count, classes = last.logits.shape
    part = [count * bce_loss(last.logits, last.mixed.targets).item(), count]
    total, images = distributed.total(to_device(part, run.device, torch.float64)).tolist()
    loss, equal = total / images, (math.log(classes) - (classes - 1) * math.log1p(-1 / classes)) / classes
    if distributed.largest(int(loss > equal * (1 + ROUNDING)), run.device):
        raise UserError(
            f"the network is dead in epoch {run.progress.epoch}: every gradient of the last batch is exactly 0, at a "
            f"loss of {loss:.4g}, where equal probabilities have {equal:.4g} {cure(run)}"
        )
