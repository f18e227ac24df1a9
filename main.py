"""Train and evaluate SAGE and the methods it is compared with.

    python3 main.py --dataset cifar10 --data_dir DATA --root_dir RUNS --arch preactresnet18 --learning_rate 0.2 \\
        --epochs 300 --schedule 100 200 --gammas 0.1 0.1 --method sage --seed 1 \\
        --upper_lambda 0.6 --rand_pos 0.01 --update_ratio 0.7
    python3 main.py --evaluate --resume RUNS/…/model_best.pth.tar --data_dir DATA

The same command given again continues a run that was stopped, from its last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from load_data import Data
from mixup import build_method
from mixup.base import Method
from models import build_model
from utils import checkpoint, distributed, options
from utils import run as runs
from utils import train as loop
from utils.device import pick_device, prepare, set_precision
from utils.distributed import World
from utils.errors import BadArguments, StopSignal, exit_code
from utils.run import Identity, Progress, Run, Training, log


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a failed run, 2 for bad arguments, 128 + signal when stopped."""

    def work() -> int:
        args, given = options.parse(sys.argv[1:] if argv is None else argv)
        return evaluate(args, given) if args.evaluate else train(args, given)

    return exit_code(options.make_parser(), work)


def train(args: argparse.Namespace, given: set[str]) -> int:
    """Train, from the start or from where the run's folder stands."""
    world = distributed.join(args.ngpu, args.batch_size)
    runs.start_log(quiet=world.rank > 0)
    device = pick_device(args.ngpu)
    set_precision(args.deterministic)
    stop = StopSignal().listen()
    for warning in (options.never_reached(args), options.without_effect(args, given)):
        if warning:
            log.warning(f"warning: {warning}")
    with distributed.one_first(world):  # one process of a machine decodes and caches the images
        data = options.load_images(args, given)
    folder = None if args.log_off or world.rank > 0 else Path(args.root_dir) / runs.run_name(args)
    with runs.hold(folder, args.overwrite, args.resume):
        resumed, origin = checkpoint.read_resume(args.resume)
        run = make_run(args, data, device, world, folder, origin)
        if distributed.from_first(runs.is_finished(run)):
            distributed.leave()
            return 0
        if folder is not None:
            runs.log_into(folder / "log.txt")
        checkpoint.restore(run, args.resume, resumed)
        runs.write_config(run, vars(args))
        log.info(run.describe())
        stop.training = True
        if loop.fit(run, checkpoint.Saver(run), stop):
            where = f"epoch {run.progress.epoch}, step {run.progress.step}"
            log.info(f"stopped in {where}; the same command continues there")
        else:
            log.info(runs.write_result(run))
        distributed.leave()
        return stop.exit_code


def make_run(
    args: argparse.Namespace,
    data: Data,
    device: torch.device,
    world: World | None = None,
    folder: Path | None = None,
    origin: str | None = None,
) -> Run:
    """Method, network and optimiser for the data, before the first epoch."""
    world, data = world or World(), data.to(device)
    settings = {**options.method_settings(args), "mean": data.mean, "std": data.std}
    method = build_method(args.method, args.dataset, len(data.classes), **settings)
    torch.manual_seed(args.seed)
    model = build_model(args.arch, len(data.classes), data.stride, args.initial_channels, args.dropout)
    refuse_sizes(args, data, method, model, world)
    if args.sync_bn:
        model = distributed.synchronise_batch_norm(model, device)
    model = prepare(model, device, args.fast, args.batch_size // world.size)
    optimizer = torch.optim.SGD(
        model.parameters(), args.learning_rate, args.momentum, weight_decay=args.decay, nesterov=args.momentum > 0,
        fused=True if args.fast else None,
    )  # fmt: skip
    identity = Identity(runs.run_settings(args, data.limit), data.digests, origin)
    training = Training(**{name: getattr(args, name) for name in Training.__dataclass_fields__})
    return Run(training, identity, data, method, model, optimizer, device, world, folder, Progress(args.start_epoch))


def refuse_sizes(args: argparse.Namespace, data: Data, method: Method, model: nn.Module, world: World) -> None:
    """Raise ``BadArguments`` where batches of this size cannot be made, or images of this size not be mixed."""
    images, size, (height, width) = len(data.train), args.batch_size, data.image_size
    hint = "; --image_size brings images to another size" if args.dataset == "folder" else ""
    if size > images:
        raise BadArguments(f"--batch_size {size} is above the {images} training images")
    last = images % size or size
    if last < world.size:
        raise BadArguments(
            f"--batch_size {size} leaves a last batch of {last} images for {world.size} processes; change it"
        )
    try:
        method.draw(np.random.default_rng(0), 1, height, width)
    except ValueError as error:
        raise BadArguments(f"{error}{hint}") from error
    if last // world.size == 1:
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                copy.deepcopy(model).train()(torch.zeros(1, 3, height, width))
        except ValueError as error:
            raise BadArguments(
                f"--batch_size {size} leaves a batch of one image, which {args.arch} cannot normalise at "
                f"{height}×{width} pixels; change it{hint}"
            ) from error


def evaluate(args: argparse.Namespace, given: set[str]) -> int:
    """Print the test numbers of a checkpoint; settings that are not given are the checkpoint's."""
    runs.start_log()
    device = pick_device(args.ngpu)
    network, data, _ = checkpoint.network_and_images(args, given)
    set_precision(args.deterministic)
    model, data = prepare(network.model, device, args.fast), data.to(device)
    log.info(runs.line_of_scores("Test", loop.evaluate(model, data.test, data, device, "test"), "test"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
