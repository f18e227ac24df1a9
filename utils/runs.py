"""The folder of a run: its name, its settings, who may write into it, and whether it is finished."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import filelock

from mixup import build_method
from mixup.base import Method

from . import options, records
from .files import BadArguments, UserError


def run_name(args: argparse.Namespace, method: Method) -> str:
    """Dataset, architecture, method, seed, the settings that differ from the method's preset, and --add_name."""
    preset = build_method(args.method, args.dataset, 2)
    changed = [
        f"{field.name}{getattr(method, field.name)}"
        for field in dataclasses.fields(method)
        if getattr(method, field.name) != getattr(preset, field.name)
    ]
    return "_".join(
        [args.dataset, args.arch, args.method, f"seed{args.seed}", *changed, *filter(None, [args.add_name])]
    )


def run_settings(args: argparse.Namespace, method: Method) -> dict[str, Any]:
    """Everything that determines a run's numbers, by flag name."""
    own = {
        name: value for name, value in vars(args).items() if name not in options.NOT_PART_OF_A_RUN and value is not None
    }
    of_method = dataclasses.asdict(method)
    for name in ("num_classes", "mean", "std"):  # follow from the data
        of_method.pop(name, None)
    unused = options.method_settings(args).keys() - of_method.keys()
    return {**{name: value for name, value in own.items() if name not in unused}, **of_method}


def lock(folder: Path, args: argparse.Namespace) -> filelock.BaseFileLock:
    """The folder, made ready and held by this process alone; a dead process holds nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(folder / ".lock")
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(
            f"another run is writing into {folder}; wait for it, or give this one another --add_name"
        ) from None
    if args.overwrite and any(folder.iterdir()):
        held.release()
        aside = folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        print(f"the old run is kept as {aside}")
        return lock(folder, argparse.Namespace(overwrite=False))
    return held


def is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds a finished run of these settings, which is then said.

    Raises:
        BadArguments: it holds a run of other settings; the message shows the difference.
    """
    if (folder / "config.json").exists():
        held = records.read_json(folder / "config.json")["settings"]
        different = [
            f"--{name}: {held.get(name)} there, {settings.get(name)} here"
            for name in sorted(held.keys() | settings.keys())
            if held.get(name) != settings.get(name)
        ]
        if different:
            raise BadArguments(
                f"{folder} holds a run with other settings ({'; '.join(different)}). Give this run a name of its own "
                "with --add_name, or start anew with --overwrite True"
            )
    if (folder / "result.json").exists():
        print(f"{folder} is finished: {records.read_json(folder / 'result.json')['summary']}")
        return True
    return False
