"""The command line: every flag once, grouped, with its range checked before anything is loaded."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from load_data import DATASETS, Data, load
from mixup import METHODS, all_settings, settings_for
from mixup.settings import Setting, settings_of
from models import ARCHITECTURES

from .errors import BadArguments

log = logging.getLogger("sage")

# What may differ between two calls that belong to one run.
# fmt: off
NOT_PART_OF_A_RUN = frozenset([
    "data_dir", "root_dir", "resume", "evaluate", "overwrite", "checkpoint_minutes", "print_freq", "ngpu", "workers",
    "mp", "log_off", "job_id",
])
# fmt: on


class Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage of sixty flags in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def boolean(text: str) -> bool:
    """true/false/yes/no/t/f/y/n/1/0 in any case."""
    value = text.lower()
    if value in ("true", "yes", "t", "y", "1"):
        return True
    if value in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not one of true, false, yes, no, t, f, 1, 0")


def number(kind: type, **bounds: Any) -> Callable[[str], Any]:
    """A parser for finite numbers within ``low``, ``high`` and ``above``, as of a method's ``setting``."""
    return value_of(Setting(kind(), "", **bounds))


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """A parser for names that suggests the nearest one."""

    def parse(text: str) -> str:
        if text in names:
            return text
        near = difflib.get_close_matches(text, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise argparse.ArgumentTypeError(f"unknown name {text!r}: {hint}choose from {', '.join(names)}")

    return parse


def make_parser() -> Parser:
    """All flags with their defaults; a method's settings default to None, meaning its preset."""
    parser = Parser(
        prog="main.py",
        usage="python3 main.py [flags]",
        description="Train and evaluate SAGE and the methods it is compared with.",
        epilog="A value given on the command line always wins over a method's preset.",
        allow_abbrev=False,
    )

    def names(known: Iterable[str]) -> str:
        return f"{', '.join(known)} (default: %(default)s)"

    path = os.path.expanduser  # a shell leaves ~ as it is in --root_dir=~/runs
    positive = number(int, low=1)
    non_negative, at_least_zero = number(int, low=0), number(float, low=0)

    # fmt: off
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--dataset", type=one_of(DATASETS), default="cifar10", help=names(DATASETS))
    add("--data_dir", type=path, default="cifar10", help="where the images are or are downloaded to (%(default)s)")
    add("--image_size", type=number(int, low=8, high=1024), help="side to bring the images of --dataset folder to "
        "(default: their own if all have one up to 128×128, else 64)")
    add("--labels_per_class", type=positive, default=5000, help="training images of each class (default: %(default)s)")
    add("--valid_labels_per_class", type=non_negative, default=0, help="others set aside for validation (default: 0)")
    add("--workers", type=non_negative, default=2, help="accepted, no effect: there are no worker processes")

    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--arch", type=one_of(ARCHITECTURES), default="wrn28_10", help=names(ARCHITECTURES))
    add("--initial_channels", type=positive, default=64, help="width of the preactresnet family (default: %(default)s)")
    add("--dropout", type=boolean, default=False, help="dropout 1/2 before the classifier (default: False)")

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--method", type=one_of(tuple(METHODS)), default="vanilla", help=names(METHODS))
    add("--epochs", type=positive, default=300, help="(default: %(default)s)")
    add("--batch_size", type=positive, default=100, help="(default: %(default)s)")
    add("--learning_rate", type=number(float, above=0), default=0.1, help="(default: %(default)s)")
    add("--momentum", type=number(float, low=0, high=1), default=0.9, help="Nesterov momentum (default: %(default)s)")
    add("--decay", type=at_least_zero, default=0.0001, help="weight decay (default: %(default)s)")
    add("--schedule", type=non_negative, nargs="+", default=[150, 225], help="epochs where the rate changes (150 225)")
    add("--gammas", type=number(float, above=0), nargs="+", default=[0.1, 0.1], help="its factors there (0.1 0.1)")
    add("--seed", type=non_negative, default=0, help="(default: %(default)s)")
    add("--start_epoch", type=non_negative, default=0, help="count epochs from here (default: 0)")

    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--ngpu", type=non_negative, default=1, help="0: the CPU; 1: a GPU, else the CPU; more: by torchrun")
    add("--sync_bn", type=boolean, default=False, help="batch norm over all processes of a run (default: False)")
    add("--fast", type=boolean, nargs="?", const=True, default=False, help="bfloat16, compiled on a GPU (False)")
    add("--deterministic", type=boolean, default=False, help="bitwise repeatable on CUDA, slower (default: False)")

    group = parser.add_argument_group("records")
    add = group.add_argument
    add("--root_dir", type=path, default="experiments", help="a folder of runs, one folder each (default: %(default)s)")
    add("--add_name", default="", help="appended to the run's name")
    add("--job_id", default="0", help="your scheduler's job, noted in config.json (default: 0)")
    add("--print_freq", type=positive, default=100, help="batches between lines, without a terminal (default: 100)")
    add("--log_off", type=boolean, default=False, help="train without writing files (default: False)")
    add("--checkpoint_minutes", type=number(float, above=0), default=5, help="between saves (default: 5)")
    add("--overwrite", type=boolean, default=False, help="start anew; the old folder stays, renamed (default: False)")
    add("--resume", type=path, default="", help="a shorter run's checkpoint, or weights to begin "
        "from or evaluate; a run's own checkpoint is found without this")
    add("--evaluate", type=boolean, nargs="?", const=True, default=False, help="print the test numbers of --resume")
    # fmt: on

    add_method_flags(parser)
    return parser


def add_method_flags(parser: Parser) -> None:
    """Flags of the methods' settings, as the methods declare them."""
    group = parser.add_argument_group("methods (defaults apply where the method has no preset)")
    for name, known in all_settings().items():
        shown = known.default if known.flag_default is None else known.flag_default
        text = known.help + (f" (default: {shown})" if shown is not None else "")
        group.add_argument(f"--{name}", type=value_of(known), help=text)
    group.add_argument("--mp", type=number(int, low=0), default=8, help="accepted, no effect: there is no process pool")


def value_of(known: Setting) -> Callable[[str], Any]:
    """A parser for the values of a setting."""
    if known.choices is not None:
        return one_of(known.choices)
    if known.kind is bool:
        return boolean

    def parse(text: str) -> Any:
        try:
            value = known.kind(text)
        except ValueError:
            kind = "a whole number" if known.kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind}") from None
        if problem := known.problem(value):
            raise argparse.ArgumentTypeError(problem)
        return value

    return parse


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, set[str]]:
    """Arguments, checked, and the names of those that were given. Leaves with exit code 2 on a bad one."""
    parser = make_parser()
    args, given = parser.parse_args(argv), given_names(make_parser(), argv)
    empty = [name for name in ("data_dir", "root_dir", "resume") if name in given and not getattr(args, name)]
    problem = f"--{empty[0]} is empty; is a shell variable not set?" if empty else find_problem(args)
    if problem:
        parser.error(problem)
    return args, given


def given_names(parser: Parser, argv: Sequence[str]) -> set[str]:
    """Names of the arguments in ``argv``; takes the parser's defaults away."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def add_flags(group: argparse._ArgumentGroup, names: Iterable[str]) -> None:
    """Flags of main.py, as main.py has them."""
    flags = {action.dest: action for action in make_parser()._actions}
    for name in names:
        group._add_action(flags[name])


def find_problem(args: argparse.Namespace) -> str | None:
    """What is wrong with a combination of arguments, or None."""
    if len(args.schedule) != len(args.gammas):
        return f"--schedule has {len(args.schedule)} epochs but --gammas {len(args.gammas)} factors"
    if args.schedule != sorted(args.schedule):
        return f"--schedule {' '.join(map(str, args.schedule))} is not in rising order"
    if args.start_epoch >= args.epochs:
        return f"--start_epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}"
    if args.evaluate and not args.resume:
        return "--evaluate needs --resume with the checkpoint to evaluate"
    if "/" in args.add_name or not args.add_name.isprintable():
        return f"--add_name {args.add_name!r} becomes part of a folder's name: printable, and no slash"
    if args.image_size and args.dataset != "folder":
        return f"--image_size is for --dataset folder; {args.dataset} images have one size"
    try:
        settings_for(args.method, args.dataset, **method_settings(args))
    except ValueError as error:
        return str(error)
    return None


def never_reached(args: argparse.Namespace) -> str | None:
    """What a schedule asks for and --epochs ends before, or None."""
    settings = settings_for(args.method, args.dataset, **method_settings(args))
    late = [milestone for milestone in args.schedule if milestone >= args.epochs]
    if late:
        return f"--epochs {args.epochs} ends before --schedule {' '.join(map(str, late))}: these are not reached"
    if settings.get("mix_schedule", "fixed") != "fixed" and settings["mix_scheduled_epoch"] >= args.epochs:
        left = "nothing is mixed" if settings["mix_schedule"] == "delayed" else "--prob_mix is not reached"
        return f"--epochs {args.epochs} ends before --mix_scheduled_epoch {settings['mix_scheduled_epoch']}: {left}"
    return None


def adopt(args: argparse.Namespace, given: set[str], held: dict[str, Any]) -> None:
    """Put the settings of a checkpoint where none were given, checked like given ones.

    Raises:
        BadArguments: a flag was given that the checkpoint overrules.
    """
    arguments = []
    free = NOT_PART_OF_A_RUN | {"dataset", "image_size", "seed", "batch_size", "fast", "deterministic", "add_name"}
    for name in sorted(held.keys() & vars(args).keys() - NOT_PART_OF_A_RUN):
        value, ours = held[name], getattr(args, name)
        if name in given:
            if name not in free and value is not None and ours != value:
                raise BadArguments(f"--{name} {ours}: {args.resume} was trained with {value}; leave --{name} out")
        elif value is not None:
            arguments += [f"--{name}", *map(str, value)] if isinstance(value, list | tuple) else [f"--{name}={value}"]
    make_parser().parse_args(arguments, namespace=args)


def load_images(args: argparse.Namespace, given: set[str], **how: Any) -> Data:
    """The images that the flags name; ``how`` goes to ``load_data.load``. The default of --labels_per_class is
    CIFAR-10's, and no limit elsewhere."""
    if "labels_per_class" in given:
        how["labels_per_class"] = args.labels_per_class
    if args.image_size is not None:
        how["image_size"] = args.image_size
    aside = args.valid_labels_per_class
    return load(args.dataset, args.data_dir, valid_labels_per_class=aside, seed=args.seed, **how)


def method_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The methods' settings that were given, by flag name."""
    names = all_settings().keys() & vars(args).keys()
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def command_line() -> str:
    """The command as it can be pasted again."""
    return shlex.join(["python3", *sys.argv])


def refuse_unused(parser: Parser, given: set[str], parts: Iterable[str], used_in: Mapping[str, set[str]]) -> None:
    """Refuse flags that were given for parts of a program which were not asked for."""
    for flag in sorted(given & used_in.keys()):
        if not used_in[flag] & set(parts):
            parser.error(f"--{flag} is for {', '.join(sorted(used_in[flag]))}: add one to --parts")


def without_effect(args: argparse.Namespace, given: set[str]) -> str | None:
    """The flags that were given and change nothing in this run, or None."""
    unused = all_settings().keys() - settings_of(METHODS[args.method]).keys()
    unused |= {"data_dir"} if args.dataset == "digits" else set()
    unused |= set() if args.arch.startswith("preactresnet") else {"initial_channels"}
    unused |= {"mix_scheduled_epoch"} if args.mix_schedule in (None, "fixed") else set()
    flags = ", ".join(f"--{name}" for name in sorted(unused & given))
    return (
        f"{flags}: no effect with --method {args.method} --arch {args.arch} --dataset {args.dataset}" if flags else None
    )
