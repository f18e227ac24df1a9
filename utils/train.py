"""The loop: batches through a method's step, the optimiser, and what happens after a batch and after an epoch."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from load_data import Data, Split, steps_per_epoch, test_batches, train_batches
from mixup.base import Method, Step, bce_loss, to_device

from . import checkpoint, distributed, pictures, records
from .device import peak_memory, step_generator
from .distributed import World
from .errors import StopSignal, UserError
from .graph import Captured, Take
from .records import log
from .runs import MIXED, MIXED_LAST, Run

EVALUATION_BATCH = {"cpu": 250, "mps": 500, "cuda": 1000}  # images of 32×32; fewer of larger ones
AGREE_STEPS = 10  # ranks agree this often on saving and stopping; each time they wait for each other
BAR_SECONDS = 0.5  # the numbers beside the bar on a terminal are read from the device this often
CURVES_SECONDS = 20  # plotting takes half a second; refreshed at most this often while running
ROUNDING = 1e-4  # of a loss, relative; float32 is far more exact


# ------------------------------------------------------------------------------------------------------------- the loop


def fit(run: Run) -> None:
    """Train to the last epoch, or until a signal; everything is saved when this returns."""
    network = distributed.data_parallel(run.model, run.weight)
    record = run.training.fast and run.world.size == 1
    step = with_errors_named(run, step_taker(run.method, network, run.optimizer, run.device, record))
    kept = Records(run)
    while run.progress.epoch < run.training.epochs and not stopped(run):
        begin_epoch(run)
        network.train()
        if not (train_epoch(run, step) and after_epoch(run, kept)):
            break
    if stopped(run):
        save(run)


def train_epoch(run: Run, step: Take) -> bool:
    """The rest of the epoch in progress; whether it was finished. If not, a signal came."""
    with Meter(run) as meter:
        for number, (images, labels) in rest_of_epoch(run):
            draws = draw(run, number, images)
            result = step(images, labels, draws)
            meter.add(number, result, labels)
            if after_batch(run, meter, result, images):
                return False
        meter.settle()
    return True


def step_taker(
    method: Method, network: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, record: bool
) -> Take:
    """A whole training step, as a function of a batch and its draws. With ``record`` it is one CUDA graph, where there
    is CUDA and the method allows it."""

    def step(images: Tensor, labels: Tensor, draws: Any) -> Step:
        optimizer.zero_grad(set_to_none=True)
        result = method.step(network, images, labels, draws)
        result.loss.backward()
        optimizer.step()
        # a result somebody holds must not keep autograd's nodes alive: they cannot be recorded again
        return result.detached()

    if record and device.type == "cuda" and method.recordable:
        return Captured(step, lambda: [group["lr"] for group in optimizer.param_groups], device)
    return step


def rest_of_epoch(run: Run) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Number, images and labels of the batches that are left of the epoch in progress: this process's part of each."""
    training, progress, world = run.training, run.progress, run.world
    batches = train_batches(
        run.data, batch_size=training.batch_size, seed=training.seed, epoch=progress.epoch, device=run.device,
        start=progress.step, part_of=world.part,
    )  # fmt: skip
    for number, (images, labels) in enumerate(batches, start=progress.step):
        whole = min(training.batch_size, len(run.data.train) - number * training.batch_size)
        run.weight.value = len(labels) * world.size / whole
        yield number, (images, labels)


def draw(run: Run, number: int, images: Tensor) -> Any:
    """The method's random choices for a batch, which depend on seed, epoch, number of the batch and rank alone."""
    rng = step_generator(run.training.seed, run.progress.epoch, number, run.world.rank)
    return run.method.draw(rng, len(images), images.shape[2], images.shape[3], run.progress.epoch)


# ---------------------------------------------------------------------------------------- after a batch, after an epoch


def after_batch(run: Run, meter: Meter, result: Step, images: Tensor) -> bool:
    """Position, clock, lines and pictures; every few steps the processes agree on saving and stopping. Whether a signal
    came, to any of them."""
    run.progress.step += 1
    plot_mixed_images(run, result, images)
    meter.show(run.count_time())
    if run.world.size > 1 and run.progress.step % AGREE_STEPS:
        return False
    wanted = distributed.largest(run.stop.exit_code or int(save_is_due(run)), run.device)
    if wanted:
        meter.settle()
    if wanted == 1:
        save(run)
    run.stop.exit_code = max(run.stop.exit_code, wanted if wanted > 1 else 0)
    return wanted > 1


def after_epoch(run: Run, kept: Records) -> bool:
    """Evaluate, save where due, and write the records; False if a signal came before the epoch was evaluated."""
    progress, evaluation_began = run.progress, time.monotonic()
    distributed.share_buffers(run.model)
    row: dict[str, Any] = dict.fromkeys(records.COLUMNS)
    row.update(epoch=progress.epoch, learning_rate=run.training.rate(progress.epoch), **scores(progress.sums, "train"))
    try:
        if run.data.valid is not None:
            row.update(evaluate(run.model, run.data.valid, run.data, run.device, "valid", run.world, run.stop))
        row.update(evaluate(run.model, run.data.test, run.data, run.device, "test", run.world, run.stop))
    except Stopped:
        return False
    if not all(math.isfinite(value) for value in row.values() if isinstance(value, float)):
        raise not_finite(run, progress.step)
    row.update(
        best_top1=records.best_row([*progress.rows, row])["test_top1"],
        seconds=round(progress.seconds + time.monotonic() - evaluation_began, 3),
        images_per_second=round(progress.sums[3] / progress.seconds, 1),
        peak_memory_gb=round(peak_memory(run.device), 1),
    )
    is_best = records.best_row([*progress.rows, row]) is row
    if run.resume and run.folder is not None and not (run.best or (run.folder / checkpoint.BEST).exists()):
        is_best = True  # what was better is in the folder of the run that --resume names
    refuse_bad_weights(run)
    progress.next_epoch(row)
    if is_best:
        checkpoint.keep_best(run)
    if save_is_due(run) or progress.epoch >= run.training.epochs:
        checkpoint.save_run(run)
    kept.write()
    return True


def save_is_due(run: Run) -> bool:
    """Whether --checkpoint_minutes have passed since the last save."""
    return time.monotonic() - run.saved > 60 * run.training.checkpoint_minutes


def save(run: Run) -> None:
    """Write the checkpoint, unless the numbers went wrong."""
    refuse_bad_weights(run)
    checkpoint.save_run(run)


def stopped(run: Run) -> bool:
    """Whether a signal came, to any rank; then every rank has its exit code."""
    agreed = distributed.largest(run.stop.exit_code, run.device)
    run.stop.exit_code = max(run.stop.exit_code, agreed)  # one that came while the ranks agreed counts next time
    return agreed > 0


def begin_epoch(run: Run) -> None:
    """The learning rate of the epoch, and the line that opens it."""
    progress, epochs = run.progress, run.training.epochs
    rate = run.training.rate(progress.epoch)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    of_one = sum(row["seconds"] for row in progress.rows) / max(1, len(progress.rows))
    left = of_one * (epochs - progress.epoch)
    log.info(records.line_of_epoch(progress.epoch, epochs, rate, progress.best, left))


# ------------------------------------------------------------------------------------------------ measuring and showing


class Meter:
    """Sums over the epoch in progress, gathered on the device and read back only when somebody asks; and the bar of a
    terminal or the lines that take its place."""

    def __init__(self, run: Run) -> None:
        self.run = run
        start = run.progress.sums if run.world.rank == 0 else [0.0] * 4
        self.sums = to_device(start, run.device, sum_type(run.device))
        self.first_bad = torch.full((), math.inf, device=run.device)
        self.total = steps_per_epoch(len(run.data.train), run.training.batch_size)
        self.shown = 0.0
        self.last: Step | None = None

    def __enter__(self) -> Meter:
        run = self.run
        self.bar = tqdm(
            total=self.total, initial=run.progress.step, desc=f"epoch {run.progress.epoch}/{run.training.epochs}",
            unit="batch", disable=run.world.rank > 0 or not sys.stderr.isatty(), leave=False,
        )  # fmt: skip
        run.clock = self.shown = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def add(self, number: int, result: Step, labels: Tensor) -> None:
        """Add a batch; remembers the first one whose loss is not finite."""
        loss, self.last = result.loss, result
        count = torch.full((), len(labels), device=loss.device)
        self.sums += torch.stack([loss * count, *hits(result.logits, labels), count])
        self.first_bad = torch.where(loss.isfinite(), self.first_bad, self.first_bad.clamp(max=number))

    def read(self) -> list[float]:
        """This rank's sums; stops the run on numbers that went wrong."""
        if math.isfinite(bad := self.first_bad.item()):
            raise not_finite(self.run, int(bad))
        return self.sums.tolist()

    def settle(self) -> None:
        """Put the sums of all ranks into the run's progress; waits for the device, which takes time too."""
        self.read()
        self.run.progress.sums = distributed.total(self.sums).tolist()
        self.run.count_time()
        refuse_dead_network(self.run, self.last)

    def show(self, now: float) -> None:
        """The bar, or a line every --print_freq batches."""
        self.bar.update()
        if self.bar.disable and self.run.progress.step % self.run.training.print_freq == 0:
            log.info(line_of_batch(self.run, self.total, self.read()))
        elif not self.bar.disable and now - self.shown > BAR_SECONDS:
            self.shown = now
            current = scores(self.read(), "train")
            self.bar.set_postfix_str("loss {train_loss:.4f} acc {train_top1:.2f}".format(**current))
        elif self.run.device.type == "cpu":
            self.read()


class Records:
    """What an epoch leaves beside the checkpoint: lines, metrics.csv, TensorBoard scalars, curves.png."""

    def __init__(self, run: Run) -> None:
        self.run, self.plotted = run, -math.inf
        self.events = records.Events(run.folder, len(run.progress.rows)) if run.folder is not None else None

    def write(self) -> None:
        """After the last epoch of ``run.progress.rows``."""
        run, rows = self.run, self.run.progress.rows
        for name in ("train", "valid", "test"):
            if rows[-1][f"{name}_top1"] is not None:
                log.info(records.line_of_scores(name.capitalize(), rows[-1], name))
        log.info(f"  {rows[-1]['seconds']:.1f} s, {rows[-1]['images_per_second']:.0f} images/s in training")
        if run.folder is None or self.events is None:
            return
        keep_going(partial(records.write_metrics, run.folder / "metrics.csv", rows))
        keep_going(partial(self.events.write, rows))
        if time.monotonic() - self.plotted > CURVES_SECONDS:
            plot_curves(run)
            self.plotted = time.monotonic()


def plot_curves(run: Run) -> None:
    """curves.png of the epochs so far."""
    if run.folder is not None and run.progress.rows:
        title, path, mixes = run.folder.name, run.folder / "curves.png", run.method.name != "vanilla"
        keep_going(partial(pictures.plot_curves, path, run.progress.rows, title, run.training.schedule, mixes))


def plot_mixed_images(run: Run, result: Step, images: Tensor) -> None:
    """mixed.png of the first batch, and mixed_last.png of the last epoch's first one, if that is not the only epoch.
    What the folder lacks is plotted from the first batch of this start; a batch is plotted once."""
    is_first, run.is_first_batch = run.is_first_batch, False
    if run.folder is None:
        return
    epoch, training = run.progress.epoch, run.training
    is_last_epoch = training.epochs - training.start_epoch > 1 and epoch == training.epochs - 1
    if is_first and not (run.folder / MIXED).exists():
        name = MIXED
    elif is_last_epoch and (is_first or run.progress.step == 1) and not (run.folder / MIXED_LAST).exists():
        name = MIXED_LAST
    else:
        return
    title = f"{run.method.title}, epoch {epoch}"
    keep_going(partial(pictures.plot_mixed, run.folder / name, result.mixed, images, run.data, title))


def keep_going(write: Callable[[], object]) -> None:
    """Do something a run can live without; say so if the disk refuses."""
    try:
        write()
    except OSError as error:
        log.warning(f"warning: {error}; training goes on without that file")


def line_of_batch(run: Run, total: int, sums: list[float]) -> str:
    """The published line within an epoch; loss and accuracy of many processes are the first one's."""
    current, progress = scores(sums, "train"), run.progress
    rate = min(progress.step * run.training.batch_size, len(run.data.train)) / progress.seconds
    return (
        f"  Epoch: [{progress.epoch:03d}][{progress.step:03d}/{total:03d}]   Loss {current['train_loss']:.4f}   "
        f"Prec@1 {current['train_top1']:.3f}   Prec@5 {current['train_top5']:.3f}   {rate:.0f} images/s"
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
    return scores([*distributed.total(sums).sum(dim=0).tolist(), len(split)], prefix)


def sum_type(device: torch.device) -> torch.dtype:
    """Sums are float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


# ---------------------------------------------------------------------------------------------- numbers that went wrong


def with_errors_named(run: Run, step: Take) -> Take:
    """``step``, whose failures say where in the run they happened."""

    def named(images: Tensor, labels: Tensor, draws: Any) -> Step:
        try:
            return step(images, labels, draws)
        except FloatingPointError as error:
            raise not_finite(run, run.progress.step) from error
        except ValueError as error:
            where = f"epoch {run.progress.epoch}, step {run.progress.step}"
            raise UserError(f"{run.method.name} stops in {where}: {error}. Try less extreme settings") from error

    return named


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
    gradients may cancel by chance, as in a balanced batch: such a network goes on."""
    if last is None:
        return
    gradients = (parameter.grad for parameter in run.model.parameters() if parameter.grad is not None)
    if distributed.largest(int(any(bool(gradient.any()) for gradient in gradients)), run.device):
        return
    count, classes = last.logits.shape
    part = to_device(
        [count * bce_loss(last.logits, last.mixed.targets).item(), count], run.device, sum_type(run.device)
    )
    total, images = distributed.total(part).tolist()
    loss, equal = total / images, (math.log(classes) - (classes - 1) * math.log1p(-1 / classes)) / classes
    if distributed.largest(int(loss > equal * (1 + ROUNDING)), run.device):
        epoch = run.progress.epoch
        raise distributed.common_error(
            f"the network is dead in epoch {epoch}: every gradient of the last batch is exactly 0, at a loss of "
            f"{loss:.4g}, where equal probabilities have {equal:.4g} ({run.method.name}, learning rate "
            f"{run.training.rate(epoch):g}). Try a smaller --learning_rate, with an --add_name; the last good "
            "checkpoint is untouched"
        )


def refuse_bad_weights(run: Run) -> None:
    """A finite loss can still lead to weights that are not; they must not reach a checkpoint."""
    values = [value for value in run.model.state_dict().values() if value.is_floating_point()]
    if torch.stack([value.sum() for value in values]).isfinite().all():  # which none is where a value is not
        return
    if not all(value.isfinite().all() for value in values):  # finite ones, too, may have a sum that is not
        raise not_finite(run, run.progress.step)
