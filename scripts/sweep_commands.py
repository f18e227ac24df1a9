"""Called by sweep.sh: the commands of a sweep, a line each, once main.py's own parser has read every one of them.

Anything wrong in any of them, or in the variables that hold the flags of one method or architecture, is one line and
exit code 2, before the first run.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mixup import METHODS, all_settings
from mixup.settings import settings_of
from models import ARCHITECTURES
from utils import options
from utils.errors import BadArguments

OWN = {"--method": "--methods", "--arch": "--archs", "--seed": "--seeds"}  # what a sweep sets in each run
DEFAULTS = {"--methods": ["all"], "--archs": ["preactresnet18"], "--seeds": ["0"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the commands; ``argv``: methods, archs, seeds ("": not given), Python, program, flags of every run."""
    methods, archs, seeds, python, program, *flags = sys.argv[1:] if argv is None else argv
    given = {"--methods": methods.split(), "--archs": archs.split(), "--seeds": seeds.split()}
    try:
        runs = list_runs({name: value for name, value in given.items() if value}, flags, os.environ)
    except BadArguments as error:
        print(f"sweep.sh: error: {error}", file=sys.stderr)
        return 2
    for words in runs:
        print(shlex.join([python, program, *words]))
    return 0


def list_runs(given: Mapping[str, list[str]], flags: Sequence[str], environment: Mapping[str, str]) -> list[list[str]]:
    """The flags of each run, checked. ``given``: the sweep's lists; ``flags``: those behind --."""
    lists, flags = take_lists(given, flags)
    check_lists(lists)
    check_variables(environment)
    runs = []
    for arch in lists["--archs"]:
        for method in lists["--methods"]:
            own = own_flags(method, arch, environment)
            for seed in lists["--seeds"]:
                runs.append([*flags, "--arch", arch, "--method", method, "--seed", seed, *own])
                check_run(runs[-1])
    check_settings(lists["--methods"], flags)
    return runs


def take_lists(given: Mapping[str, list[str]], flags: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The sweep's lists, those of one from behind -- among them, and the flags that are left."""
    behind: dict[str, list[str]] = {}
    rest, words = [], iter(flags)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in OWN:
            rest.append(word)
            continue
        name = OWN[flag]
        value = value if equals else next(words, "")
        if not value:
            raise BadArguments(f"{flag} behind -- needs a value")
        if name in given or name in behind:
            other = f"{name} {' '.join(given[name])}" if name in given else f"{flag} {behind[name][0]}"
            raise BadArguments(f"{flag} {value} behind -- contradicts {other}: give {name} alone, with all of them")
        behind[name] = [value]
    lists = {**DEFAULTS, **given, **behind}
    return {**lists, "--methods": list(METHODS) if lists["--methods"] == ["all"] else lists["--methods"]}, rest


def check_lists(lists: Mapping[str, list[str]]) -> None:
    """Refuse unknown names, numbers that are none, and what is named twice."""
    kinds = {"--methods": options.one_of(tuple(METHODS)), "--archs": options.one_of(ARCHITECTURES)}
    for name, values in lists.items():
        read = kinds.get(name, options.number(int, low=0))
        try:
            known = [read(value) for value in values]
        except argparse.ArgumentTypeError as error:
            spaces = " (separate by spaces)" if re.search("[,;]", " ".join(values)) else ""
            raise BadArguments(f"{name}: {error}{spaces}") from None
        for value in known:
            if known.count(value) > 1:
                raise BadArguments(f"{name} has {value} twice")


def check_variables(environment: Mapping[str, str]) -> None:
    """Refuse variables that look like flags for one method or architecture, and name none."""
    known = {*(f"{method.upper()}_FLAGS" for method in METHODS), *(f"FLAGS_{arch}" for arch in ARCHITECTURES)}
    known |= {f"{method.upper()}_FLAGS_{arch}" for method in METHODS for arch in ARCHITECTURES}
    flags_of_runs = options.make_parser()._option_string_actions
    for name, value in environment.items():
        if "FLAGS" not in name.upper() or name in known or not value.strip():
            continue
        method = name.upper().split("_FLAGS")[0].lower()
        near = difflib.get_close_matches(method, METHODS) or [known for known in METHODS if known in method]
        if near or any(word.partition("=")[0] in flags_of_runs for word in value.split()):
            raise BadArguments(
                f"the variable {name} names no method or architecture: it is METHOD_FLAGS, METHOD_FLAGS_arch or "
                f"FLAGS_arch, such as {'_FLAGS, '.join(near or METHODS).upper()}_FLAGS or FLAGS_{ARCHITECTURES[0]}"
            )


def own_flags(method: str, arch: str, environment: Mapping[str, str]) -> list[str]:
    """Flags of one method and architecture alone, from the environment; where both give a flag, the method's counts."""
    flags = f"{method.upper()}_FLAGS"
    own: list[str] = []
    for name in (f"FLAGS_{arch}", f"{flags}_{arch}" if environment.get(f"{flags}_{arch}") else flags):
        try:
            words = shlex.split(environment.get(name, ""))
        except ValueError as error:
            raise BadArguments(f"{name}={environment[name]}: {error}") from None
        for flag in (word.partition("=")[0] for word in words):
            if flag in OWN:
                raise BadArguments(f"{name} has {flag}, which the sweep sets itself: {OWN[flag]}")
        if name != f"FLAGS_{arch}":
            check_settings([method], words, f"{name}: ")
        own += words
    return own


def check_settings(methods: Sequence[str], words: Sequence[str], where: str = "") -> None:
    """Refuse settings of methods that none of these methods has: main.py would not use them."""
    unused = all_settings().keys() - {name for method in methods for name in settings_of(METHODS[method])}
    for word in words:
        if word.partition("=")[0].removeprefix("--") in unused and word.startswith("--"):
            raise BadArguments(f"{where}{word} is no setting of {', '.join(methods)}")


def check_run(words: Sequence[str]) -> None:
    """Have main.py's parser read the flags of a run."""
    if any(character in word for word in words for character in "\r\n"):
        raise BadArguments("a flag or value holds a line break")
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            options.parse(list(words))
    except SystemExit as left:
        message = said.getvalue().strip().partition("error: ")[2].removesuffix(" (see --help)") if left.code else ""
        raise BadArguments(message or "--help behind -- runs nothing: python3 main.py --help lists the flags") from None


if __name__ == "__main__":
    sys.exit(main())
