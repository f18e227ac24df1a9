"""The folder of a run: its name, its settings, who may write into it, and whether it is finished."""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from mixup import build_method
from mixup.base import Method

from . import options, records
from .archive import remove_leftovers
from .errors import BadArguments, UserError

LOCK = ".lock"


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


def lock(folder: Path, args: argparse.Namespace) -> IO:
    """The folder, made ready and held by this process alone until the file is closed; a dead process holds nothing.

    Raises:
        UserError: another process holds it.
        BadArguments: ``--overwrite`` would move ``--resume`` away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = open(folder / LOCK, "a")  # noqa: SIM115
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        held.close()
        raise UserError(
            f"another run is writing into {folder}; wait for it, or give this one another --add_name"
        ) from None
    except OSError as error:  # some network file systems
        warn(f"{folder} cannot be locked ({error.strerror}): nothing keeps a second run from writing into it")
    restarted = any(int(os.environ.get(name, 0)) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    if args.overwrite and not restarted and os.listdir(folder) != [LOCK]:
        if args.resume and Path(args.resume).resolve().is_relative_to(folder.resolve()):
            held.close()
            raise BadArguments(f"--overwrite would move --resume {args.resume} away; copy that checkpoint elsewhere")
        aside = folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
        with held:
            folder.rename(aside)
            print(f"the old run is kept as {aside}")
            return lock(folder, argparse.Namespace(overwrite=False))
    remove_leftovers(folder)
    return held


def warn(line: str) -> None:
    """A warning before there is a log."""
    print(f"warning: {line}", file=sys.stderr)


def is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds a finished run of these settings, which is then said.

    Raises:
        BadArguments: it holds a run of other settings; the message shows the difference.
    """
    held = read(folder / "config.json", "settings")
    if held is not None:
        refuse_other_settings(folder, held, settings)
    summary = read(folder / "result.json", "summary")
    if summary is not None:
        print(f"{folder} is finished: {summary}")
    return summary is not None


def read(path: Path, key: str) -> Any:
    """One entry of a JSON file; None where there is no file, or a damaged one, which the run will write anew."""
    if not path.exists():
        return None
    try:
        return records.read_json(path)[key]
    except (ValueError, TypeError, KeyError) as error:
        warn(f"{path} is damaged ({error}); it is written anew")
        return None


def refuse_other_settings(folder: Path, held: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise ``BadArguments`` with the difference, if there is any. What a run of an older version does not hold is its
    flag's default."""
    parser = options.make_parser()
    held = {**{name: parser.get_default(name) for name in settings}, **held}
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
