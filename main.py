"""Train and evaluate SAGE and the methods it is compared with.

    python3 main.py --dataset cifar10 --data_dir DATA --root_dir RUNS --arch preactresnet18 --learning_rate 0.2 \\
        --epochs 300 --schedule 100 200 --gammas 0.1 0.1 --method sage --seed 1 \\
        --upper_lambda 0.6 --rand_pos 0.01 --update_ratio 0.7
    python3 main.py --evaluate --resume RUNS/…/model_best.pth.tar --data_dir DATA

The same command typed again continues a run that was stopped, from its last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

from load_data import Data, load
from mixup import build_method
from models import build_model
from utils import archive, checkpoint, options, processes, records, runs, train
from utils.device import device_name, pick_device, prepare, set_precision
from utils.errors import BadArguments, StopSignal, UserError, exit_code
from utils.records import log


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a failed run, 2 for bad arguments, 128 + signal when stopped."""
    args, typed = options.parse(sys.argv[1:] if argv is None else argv)
    work = evaluate if args.evaluate else run
    return exit_code(options.make_parser(), lambda: work(args, typed))


def run(args: argparse.Namespace, typed: set[str]) -> int:
    """Train, from the start or from where the run's folder stands."""
    if args.ngpu > 1 and torch.cuda.is_available() and not processes.is_launched():
        if args.ngpu > torch.cuda.device_count():
            raise BadArguments(f"--ngpu {args.ngpu}: this box has {torch.cuda.device_count()} GPUs")
        return processes.launch(args.ngpu, sys.argv)
    world = processes.join(args.ngpu)
    if args.batch_size % world.size:
        raise BadArguments(f"--batch_size {args.batch_size} does not divide over {world.size} processes")
    device, warning = pick_device(args.ngpu)
    set_precision(args.deterministic)
    method = build_method(args.method, args.dataset, 2, **options.method_settings(args))
    settings = runs.run_settings(args, method)
    folder = None if args.log_off or world.rank > 0 else Path(args.root_dir) / runs.run_name(args, method)
    stop = StopSignal()
    with runs.lock(folder, args) if folder else nullcontext() as lock:
        finished = runs.is_finished(folder, settings) if folder else False
        if processes.from_first(finished):
            processes.leave()
            return 0
        records.start_log(folder / "log.txt" if folder else None, quiet=world.rank > 0)
        if warning:
            log.warning(f"warning: {warning}")
        job = prepare_run(args, typed, settings, folder, device, stop, world)
        job.lock = lock
        restore(job)
        if folder:
            write_config(job, folder)
        log.info(describe(job))
        stop.training = True
        train.fit(job)
        if stopped := train.stopped(job):
            where = f"epoch {job.progress.epoch}, step {job.progress.step}"
            log.info(f"stopped in {where}; the same command continues there")
        else:
            finish(job)
        processes.leave()
        return stop.exit_code if stopped else 0


def prepare_run(
    args: argparse.Namespace,
    typed: set[str],
    settings: dict[str, Any],
    folder: Path | None,
    device: torch.device,
    stop: StopSignal,
    world: processes.World,
) -> train.Run:
    """Data, method, model and optimiser, before the first epoch."""
    with processes.one_first(world):  # one process a box decodes and caches the images
        data = load_images(args, typed).to(device)
    if args.batch_size > len(data.train):
        raise BadArguments(f"--batch_size {args.batch_size} is above the {len(data.train)} training images")
    last = len(data.train) % args.batch_size
    if 0 < last < world.size:
        raise BadArguments(
            f"--batch_size {args.batch_size} leaves a last batch of {last} images for {world.size} processes; change it"
        )
    of_method = {**options.method_settings(args), "mean": data.mean, "std": data.std}
    method = build_method(args.method, args.dataset, len(data.classes), **of_method)
    try:
        options.check_size(method, *data.image_size)
    except ValueError as error:
        raise BadArguments(str(error)) from error
    torch.manual_seed(args.seed)
    model = build_model(args.arch, len(data.classes), data.stride, args.initial_channels, args.dropout)
    if args.sync_bn:
        model = processes.synchronise_batch_norm(model)
    model = prepare(model, device, args.fast)
    optimizer = torch.optim.SGD(
        model.parameters(),
        args.learning_rate,
        args.momentum,
        weight_decay=args.decay,
        nesterov=args.momentum > 0,
        fused=True if args.fast else None,
    )
    progress = train.Progress(args.start_epoch)
    return train.Run(args, settings, folder, device, data, model, method, optimizer, progress, stop, world)


def evaluate(args: argparse.Namespace, typed: set[str]) -> int:
    """Print the test numbers of a checkpoint; settings that were not typed are the checkpoint's."""
    device, warning = pick_device(args.ngpu)
    records.start_log(None)
    if warning:
        log.warning(f"warning: {warning}")
    set_precision(args.deterministic)
    model, data, _ = open_checkpoint(args, typed, device)
    log.info(records.line_of_scores("Test", train.evaluate(model, data.test, data, device, "test"), "test"))
    return 0


def open_checkpoint(
    args: argparse.Namespace, typed: set[str], device: torch.device
) -> tuple[torch.nn.Module, Data, int | None]:
    """The network in ``args.resume`` and the data it is for, on ``device``; settings not typed are the checkpoint's.
    Then, of a checkpoint of this project, the epochs it was trained."""
    state = archive.load(args.resume)
    with well_formed(args.resume):
        options.adopt(args, typed, state.get("settings", {}))
    data = load_images(args, typed).to(device)
    if state.get("classes", data.classes) != data.classes:
        raise UserError(f"{args.resume} was trained on other classes than those of {data.source}")
    with well_formed(args.resume):
        colours: Any = {name: tuple(map(float, state.get(name, getattr(data, name)))) for name in ("mean", "std")}
        data = dataclasses.replace(data, **colours)
        epochs = len(state["progress"]["rows"]) if "progress" in state else None
    model = build_model(args.arch, len(data.classes), data.stride, args.initial_channels, args.dropout)
    load_weights(model, state, args)
    return prepare(model, device, args.fast), data, epochs


def load_images(args: argparse.Namespace, typed: set[str]) -> Data:
    """The dataset; the default of --labels_per_class belongs to CIFAR-10 and is no limit elsewhere."""
    limit = args.labels_per_class if "labels_per_class" in typed or args.dataset == "cifar10" else None
    return load(
        args.dataset, args.data_dir, image_size=args.image_size, labels_per_class=limit,
        valid_labels_per_class=args.valid_labels_per_class, seed=args.seed,
        warn=lambda line: log.warning(f"warning: {line}"),
    )  # fmt: skip


def restore(job: train.Run) -> None:
    """Continue from the folder's last good checkpoint if there is one, else from --resume."""
    resume, state, data = job.args.resume, None, job.data
    if job.world.rank == 0:
        state = checkpoint.load_last(job.folder)
        if state is not None and job.folder:
            resume = job.folder
            runs.refuse_other_settings(job.folder, state.get("settings", {}), job.settings)
            ours = {"images": len(data.train), "mean": data.mean, "std": data.std}
            if any(state.get(name, value) != value for name, value in ours.items()):
                raise UserError(f"the images of {data.source} are others than those that {resume} was begun with")
        elif resume:
            state = archive.load(resume)
    state = processes.from_first(state)
    if state is None:
        return
    if state.get("classes", data.classes) != data.classes:
        raise UserError(f"{resume} was trained on other classes than those of {data.source}")
    load_weights(job.model, state, job.args)
    if "progress" not in state:
        log.info(f"weights from {resume}; the optimiser starts anew at epoch {job.progress.epoch}")
        return
    with well_formed(resume):
        typed = [{**group, "params": None} for group in job.optimizer.param_groups]
        job.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(job.optimizer.param_groups, typed, strict=True):  # this command's, not the checkpoint's
            group.update({name: value for name, value in own.items() if name != "params"})
        for parameter, held in job.optimizer.state.items():
            if (momentum := held.get("momentum_buffer")) is not None:
                if momentum.shape != parameter.shape:
                    raise ValueError("its momentum does not fit the weights")
                # laid out as the weights are: the fused optimiser walks through both as they lie in memory
                held["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
        job.progress = train.Progress(**state["progress"])
    refuse_other_epochs(resume, job.progress, job.args)
    if job.folder and job.progress.rows:
        records.write_metrics(job.folder / "metrics.csv", job.progress.rows)
    log.info(f"continuing in epoch {job.progress.epoch}, step {job.progress.step}")


def refuse_other_epochs(resume: str | Path, progress: train.Progress, args: argparse.Namespace) -> None:
    """Raise ``BadArguments`` where --start_epoch and --epochs do not go with the epochs that a checkpoint holds."""
    first = progress.rows[0]["epoch"] if progress.rows else progress.epoch
    if args.start_epoch != first:
        raise BadArguments(
            f"--start_epoch {args.start_epoch}: {resume} was trained from epoch {first} on and continues in epoch "
            f"{progress.epoch} by itself; give --start_epoch {first}"
        )
    if progress.epoch > args.epochs:
        raise BadArguments(f"--epochs {args.epochs}: {resume} has had {progress.epoch} already")


@contextmanager
def well_formed(path: str | Path) -> Iterator[None]:
    """What a checkpoint holds need not be what this program put there."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {path} does not hold what it should: {error}") from error


def load_weights(model: torch.nn.Module, state: dict[str, Any], args: argparse.Namespace) -> None:
    """Weights by name, with or without DataParallel's prefix."""
    weights, own = state.get("state_dict", state), model.state_dict()
    try:
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
        wrong = sorted(
            name
            for name in own.keys() | weights.keys()
            if name not in own or name not in weights or own[name].shape != weights[name].shape
        )
        if not wrong:
            model.load_state_dict(weights)
            return
    except (RuntimeError, AttributeError, TypeError) as error:
        wrong = [str(error).splitlines()[-1].strip()]
    raise UserError(
        f"the weights in {args.resume or 'the checkpoint'} do not fit --arch {args.arch}: {len(wrong)} of {len(own)} "
        f"are missing, unknown or of another shape, among them {wrong[0]}. Name the --arch, --initial_channels and "
        "--dataset they were trained with"
    )


def describe(job: train.Run) -> str:
    """One line: method, data, model, device."""
    data, args = job.data, job.args
    return (
        f"{args.method} on {data.name} ({data.source}): {len(data.train)} training images of {len(data.classes)} "
        f"classes, {len(data.test)} test images, {data.image_size[0]}×{data.image_size[1]}; {args.arch}; "
        f"{device_name(job.device)}"
    )


def write_config(job: train.Run, folder: Path) -> None:
    """Settings, when the run was started, and versions, device, commit and command as it was last continued."""
    versions = {name: version(name) for name in ("torch", "torchvision", "numpy")}
    started = now = time.strftime("%Y-%m-%d %H:%M:%S")
    with suppress(OSError, ValueError, LookupError, TypeError):  # none yet, or damaged
        started = records.read_json(folder / "config.json")["started"]
    content = {
        "settings": job.settings,
        "arguments": vars(job.args),
        "command": options.command_line(),
        "classes": job.data.classes,
        "images": {"train": len(job.data.train), "test": len(job.data.test)},
        "mean": job.data.mean,
        "std": job.data.std,
        "device": device_name(job.device),
        "versions": {"python": platform.python_version(), **versions},
        "git_commit": records.git_commit(),
        "started": started,
        "continued": now if now != started else None,
    }
    records.write_json(folder / "config.json", content)


def finish(job: train.Run) -> None:
    """The closing lines, and result.json, which marks the run as finished."""
    rows = job.progress.rows
    median, spread = records.final_accuracy(rows)
    best = max(rows, key=lambda row: row["test_top1"])
    log.info(f"\nfinal 10 epoch acc (median) : {median:.2f} (+- {spread:.2f})")
    log.info(f"best acc : {best['test_top1']:.2f} in epoch {best['epoch']}")
    train.draw_curves(job)
    if job.folder:
        records.write_metrics(job.folder / "metrics.csv", rows)
        result = {
            "summary": f"final {median:.2f} % (+- {spread:.2f}), best {best['test_top1']:.2f} %",
            "final_top1": median,
            "spread": spread,
            "best_top1": best["test_top1"],
            "best_epoch": best["epoch"],
            "epochs": len(rows),
            "seconds": round(sum(row["seconds"] for row in rows), 1),
        }
        records.write_json(job.folder / "result.json", result)
        log.info(f"curves: {job.folder / 'curves.png'}\nmixed images: {job.folder / 'mixed.png'}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
