"""Runs as rows of a table: read from their folders, or from a table of runs, where each is a line of text."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import statistics
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from load_data import DATASETS
from mixup import METHODS, all_settings, build_method
from models import ARCHITECTURES

from . import options, records
from .errors import UserError
from .files import atomic_write
from .runs import Identity, differences

Key = tuple[str, ...]
Said = frozenset[tuple[str, str]]
Row = dict[str, str]  # numbers stay text, so that a table of runs says exactly what its folders say
FLAGS = vars(options.make_parser().parse_args([]))
NAMES = ["dataset", "arch", "method", "seed", "add_name"]
TRAINING = [name for name in FLAGS if name not in {*NAMES, *all_settings(), *options.NOT_PART_OF_A_RUN}]
RESULTS = ["final", "spread", "best", "best_epoch"]
TIMES = ["seconds_per_epoch", "images_per_second", "hours"]
COSTS = [*TIMES, "peak_memory_gb"]
HOW = {  # how → what was measured so
    "clean": ["clean_top1"],
    "corruptions": ["corruption_error"],
    "FGSM": ["fgsm4_top1", "fgsm8_top1"],
    "PGD": ["pgd4_top1", "pgd8_top1"],
    "calibration": ["ece"],
}
ROBUSTNESS = [name for names in HOW.values() for name in names]
SHIFT = "shift "  # begins the names of what was measured on another test set: "shift NAME top1" and so on
DIGESTS = ["train_digest", "test_digest", "begun_from"]  # younger than other columns; runs of older versions have none
# What the runs of one cell of a table have in common: its column and its row.
COLUMN = ["dataset", "arch", *TRAINING, "classes", "test_images", "train_digest", "test_digest"]
ROW = ["method", "settings", "add_name", "begun_from"]
COLUMNS = [
    *[*NAMES, "settings", "state", "epochs_done", *RESULTS, *COSTS, *ROBUSTNESS, *HOW, *TRAINING],
    *["classes", "test_images", "device", "torch", "commit", "date", "run", "command", "note", "curve", *DIGESTS],
]

MARKS = {"config.json", "metrics.csv", "result.json", ".lock"}  # what tells the folder of a run
SET_ASIDE = re.compile(r"\.old-\d{8}-\d{6}$")  # what --overwrite renames a folder to


class Group(NamedTuple):
    """Runs that differ in their seed alone, and the names of their column and row."""

    column: str
    label: str
    runs: list[Row]

    def values(self, name: str) -> list[float]:
        """One number of each run that has it."""
        return [*self.of_seeds(name).values()]

    def of_seeds(self, name: str) -> dict[str, float]:
        """The same by seed."""
        return {row["seed"]: float(row[name]) for row in self.runs if row.get(name)}


def read_roots(roots: Iterable[Path]) -> list[Row]:
    """A row a run, in the tables' order; a run that is named twice appears once, with times if they were given."""
    rows: dict[tuple[Said, str], Row] = {}
    for root in roots:
        if root.is_file():
            found = [("", row) for row in read_table(root)]
        else:
            folders, unreadable = folders_of(root)
            found = [(str(path), damaged(path.name, reason)) for path, reason in unreadable.items()]
            found += [(str(path), read_run(path)) for path in folders if not SET_ASIDE.search(path.name)]
        if not found:
            raise UserError(f"{root} holds no run" if root.exists() else f"there is no {root}")
        # damaged folders may look alike, and each is listed
        rows.update({(said(row), path if row["state"] == "damaged" else ""): row for path, row in found})
    timed = {said(row, TIMES) for row in rows.values() if has_times(row)}
    return sorted((row for row in rows.values() if has_times(row) or said(row, TIMES) not in timed), key=order)


def has_times(row: Row) -> bool:
    """A table may leave them out, if the machine did other work as well."""
    return any(row[name] for name in TIMES)


def said(row: Row, but: Sequence[str] = ()) -> Said:
    """All that a row says, in whatever order, but for some columns."""
    return frozenset(entry for entry in row.items() if entry[0] not in but)


def folders_of(root: Path) -> tuple[list[Path], dict[Path, str]]:
    """The folders of runs in ``root``, at any depth and behind links, each once; and what cannot be read, and why."""
    found, unreadable, seen, pending = [], {}, set(), [root] * root.exists()
    while pending:
        folder = pending.pop()
        try:
            real = folder.resolve()
            if real in seen:
                continue
            seen.add(real)
            with os.scandir(folder) as entries:
                below = {entry.name: Path(entry.path) for entry in entries}
        except OSError as error:
            unreadable[folder] = error.strerror or str(error)
            continue
        is_run = not MARKS.isdisjoint(below)
        found += [real] * is_run
        for path in below.values():
            if os.path.isdir(path):
                pending.append(path)
            elif not is_run and path.is_symlink() and not os.path.exists(path):
                unreadable[path] = f"a link to {os.readlink(path)}, which cannot be reached"
    return found, unreadable


def damaged(run: str, reason: str) -> Row:
    """The row of a folder that cannot be read."""
    return {**dict.fromkeys(COLUMNS, ""), "run": run, "state": "damaged", "note": reason[:120]}


def order(row: Row) -> Any:
    """Data sets, architectures and methods as the program lists them, numbers by size."""

    def place(name: str) -> tuple[float, str]:
        value = row[name]
        known: Any = {"dataset": DATASETS, "arch": ARCHITECTURES, "method": list(METHODS)}.get(name, ())
        if value in known:
            return known.index(value), ""
        return (float(value), "") if re.fullmatch(r"\d+(\.\d+)?", value) else (math.inf, value)

    return row["state"] == "damaged", [place(name) for name in (*COLUMN, *ROW, "seed", "date", "run", "note")]


def read_table(path: Path) -> list[Row]:
    """The rows of a runs.csv; flags that are younger than it have their defaults."""
    rows: list[Row] = []
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file, restval="")
        try:
            if missing := {*COLUMNS} - {*TRAINING, *DIGESTS} - {*(reader.fieldnames or ())}:
                raise ValueError(f"there is no column {min(missing, key=COLUMNS.index)}")
            for found in reader:
                row = {name: found.get(name, text_of(FLAGS.get(name))) for name in COLUMNS}
                shifts = sorted(name for name in found if name and name.startswith(SHIFT) and found[name])
                rows.append(row | {name: found[name] for name in shifts})
                check(rows[-1])
        except (csv.Error, ValueError) as error:
            raise UserError(f"{path}, line {reader.line_num}, is no run: {error}") from error
    return rows


def read_run(folder: Path) -> Row:
    """The row of a run's folder."""
    row = {**dict.fromkeys(COLUMNS, ""), "run": folder.name}
    try:
        if not (folder / "config.json").exists():
            raise ValueError("no config.json; the command that made the run writes it anew")
        row |= settings_of(records.read_json(folder / "config.json"))
        row |= numbers_of(folder, int(row["start_epoch"]), int(row["epochs"]))
        row |= robustness_of(folder, row)
        if row["state"] != "finished":
            log = folder / "log.txt"
            begun = re.findall(
                r"\[(\d{4}-\d\d-\d\d)-([\d:]{8})\]", log.read_text(errors="replace") if log.exists() else ""
            )
            row["note"] = f"last epoch begun {' '.join(begun[-1])}" if begun else ""
        check(row)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        return damaged(folder.name, f"{type(error).__name__}: {error}".replace(f"{folder}/", ""))
    return row


def text_of(value: Any) -> str:
    """A setting as on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def settings_of(config: dict[str, Any]) -> Row:
    """What config.json says of a run, without the paths of its machine."""
    settings = config["settings"]
    preset = vars(build_method(settings["method"], settings["dataset"], 2))
    changed = [f"{name}={settings[name]}" for name in preset if settings.get(name, preset[name]) != preset[name]]
    command = re.sub(r"^python3 \S*main\.py", "python3 main.py", config["command"])
    command = re.sub(r"(--(data_dir|root_dir|resume)[ =])('[^']*'|\S)+", r"\1[\2]", command)
    return {
        **{name: text_of(settings.get(name, FLAGS[name])) for name in [*NAMES, *TRAINING]},
        "settings": " ".join(changed),
        "classes": f"{len(config['classes'])}-{zlib.crc32(repr(config['classes']).encode(errors='replace')):08x}",
        "test_images": str(config.get("images", {}).get("test", "")),  # older runs do not say
        **{f"{split}_digest": config.get("digests", {}).get(split, "") for split in ("train", "test")},
        "begun_from": config.get("origin") or "",
        "device": config["device"],
        "torch": config["versions"]["torch"],
        "commit": config["git_commit"] or "",
        "date": config["started"],
        "command": command,
    }


def numbers_of(folder: Path, first: int, end: int) -> Row:
    """What metrics.csv and result.json say of a run; ``ValueError`` where they contradict each other."""
    path, final = folder / "metrics.csv", math.nan
    epochs = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))) if path.exists() else []
    if any(None in row for row in epochs):
        raise ValueError("metrics.csv has a row that is too long")
    if [row["epoch"] for row in epochs] != [str(i) for i in range(first, first + len(epochs))]:
        raise ValueError("metrics.csv skips an epoch")
    numbers: dict[str, float] = {}
    if epochs:
        names = ("test_top1", "seconds", "images_per_second", "peak_memory_gb")
        top1, seconds, rates, memory = ([float(row[name]) for row in epochs] for name in names)
        final, spread = records.final_accuracy([{"test_top1": value} for value in top1])
        valid = [float(row.get("valid_top1") or "nan") for row in epochs]
        selected = top1 if math.isnan(valid[-1]) else valid  # a validation set, where there is one, chooses the epoch
        place = selected.index(max(value for value in selected if not math.isnan(value)))
        numbers = {"final": final, "spread": spread, "best": top1[place], "best_epoch": first + place}
        median = statistics.median
        numbers |= zip(COSTS, (median(seconds), median(rates), sum(seconds) / 3600, max(memory)), strict=True)
    finished = (folder / "result.json").exists()
    if finished:
        result = records.read_json(folder / "result.json")
        said, best = result["final_top1"], result["best_top1"]
        bests = (numbers["best"], max(top1)) if epochs else ()  # older versions always took the highest on the test set
        if len(epochs) != end - first or abs(said - final) >= 1e-3 or all(abs(best - of) >= 1e-3 for of in bests):
            raise ValueError(
                f"result.json ends at {said} and has {best} for the best, metrics.csv {final:g} and "
                f"{numbers.get('best', math.nan):g} with {len(epochs)} epochs"
            )
    curve = " ".join(f"{value:.7g}" for value in top1) if epochs else ""
    state = {"state": "finished" if finished else "unfinished", "epochs_done": str(len(epochs)), "curve": curve}
    return {**state, **{name: f"{value:.7g}" for name, value in numbers.items()}}


def robustness_of(folder: Path, run: Row) -> Row:
    """What scripts/evaluate.py measured of the last checkpoint, or else of another, on the run's own test set, and
    how."""
    note = {}
    for path in sorted(folder.glob("evaluation/*.json")):
        found = records.read_json(path)
        if path.stem == "checkpoint" and str(found.get("epochs", run["epochs_done"])) != run["epochs_done"]:
            continue  # of an earlier state of the run
        if run["test_digest"] and "test_digest" not in found:
            note = {"note": f"{path.name}, of an older version, does not say whether its test set is the run's own"}
        elif run["test_digest"] and found["test_digest"] != run["test_digest"]:
            note = {"note": f"{path.name} is of another test set than the run's own, and left out"}
            continue
        return note | measured(found, "" if path.stem == "checkpoint" else f" ({path.stem})")
    return note


def measured(found: dict[str, Any], of: str) -> Row:
    """The numbers in a file of scripts/evaluate.py, and how they were measured; ``of`` names the checkpoint."""
    numbers = {name: found["summary"].get(name) for name in ROBUSTNESS}
    how = {"clean": f"{found['images']:,} images"}
    how["corruptions"] = re.sub(r"^corruptions |, seed \d+$", "", found.get("corruptions", ""))
    if "fgsm" in found:
        how["FGSM"] = f"{found['subset']:,} images"
    if "pgd" in found:
        rows = found["pgd"]
        sizes = dict.fromkeys(f"{row['step_size_of_255'] / row['eps_of_255']:.3g}" for row in rows)
        of_steps = f"{rows[0]['steps']} steps of {' and '.join(sizes)} eps"
        how["PGD"] = f"{found['subset']:,} images, {of_steps}, from {rows[0]['restarts']} random start(s)"
    if "calibration" in found:
        how["calibration"] = f"{found['images']:,} images, {found['calibration']['bins']} bins"
    for name, shift in sorted(found.get("shift", {}).items()):
        numbers |= {f"{SHIFT}{name} {key}": shift[key] for key in ("top1", "drop", "ece")}
        classes = f"{shift['classes']} classes" + f", {shift['corruptions']} corruptions" * bool(shift["corruptions"])
        how[SHIFT + name] = f"{shift['images']:,} images, {classes}, {shift['bins']} bins, digest {shift['digest'][:8]}"
    row = {name: f"{value:.7g}" for name, value in numbers.items() if value is not None}
    return {**row, **{name: text + of for name, text in how.items() if text}}


def shifts_of(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Other test sets that something was measured on: how → what was measured so."""
    names = sorted({name.removesuffix(" top1") for row in rows for name in row if re.match(f"{SHIFT}.* top1$", name)})
    return {name: [f"{name} {key}" for key in ("top1", "drop", "ece")] for name in names}


def check(row: Row) -> None:
    """Raise ``ValueError`` where a row is none of a run."""
    if not all(isinstance(value, str) for value in row.values()):
        raise ValueError("a value is not a text")
    if row["state"] == "damaged":
        if row["curve"]:
            raise ValueError("a damaged run has a curve")
        return
    if row["state"] not in ("finished", "unfinished") or row["method"] not in METHODS:
        raise ValueError(f"state {row['state']!r}, method {row['method']!r}")
    finished = row["state"] == "finished"
    needed = ["seed", "epochs", "start_epoch", "epochs_done"]
    needed += [*RESULTS, *(COSTS if has_times(row) else {*COSTS} - {*TIMES})] if finished else []
    texts = [row[name] for name in [*RESULTS, *COSTS, *ROBUSTNESS] if row[name]] + row["curve"].split()
    shifts = shifts_of([row])
    texts += [row.get(name, "") for names in shifts.values() for name in names]
    if not all(math.isfinite(float(text)) for text in [*texts, *(row[name] for name in needed)]):
        raise ValueError("a number is not finite")
    if row["seed"] != str(int(row["seed"])):  # 1 and 01 would count as two
        raise ValueError(f"seed {row['seed']!r}")
    percents = [row["final"], row["best"], row["clean_top1"], *row["curve"].split()]
    percents += [row[f"{name} top1"] for name in shifts]
    if not all(0 <= float(text) <= 100 for text in percents if text):
        raise ValueError("an accuracy is not within 0 and 100 %")
    done, whole = int(row["epochs_done"]), int(row["epochs"]) - int(row["start_epoch"])
    if len(row["curve"].split()) != done or (finished and done != whole):
        raise ValueError(f"{len(row['curve'].split())} accuracies of {done} epochs, where {whole} make the run")
    no_time = finished and has_times(row) and not float(row["seconds_per_epoch"]) > 0
    if not re.match(r"\d{4}-\d\d-\d\d", row["date"]) or no_time:
        raise ValueError(f"date {row['date']!r}, {row['seconds_per_epoch']} s an epoch")


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """A runs.csv."""
    with atomic_write(path, "w") as file:
        rows = list(rows)
        shifts = sorted({name for row in rows for name in row if name.startswith(SHIFT)})
        writer = csv.DictWriter(file, [*COLUMNS, *shifts], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def key_of(row: Row, names: Sequence[str]) -> Key:
    return tuple(row[name] for name in names)


def column_names(rows: Iterable[Row]) -> dict[Key, str]:
    """Data set and architecture, and the flags without which two columns would have one name."""
    keys = list(dict.fromkeys(key_of(row, COLUMN) for row in rows))
    names = {}
    for key in keys:
        alike = [other for other in keys if other[:2] == key[:2]]
        differing = [i for i in range(2, len(key)) if len({other[i] for other in alike}) > 1]
        told = [f"{COLUMN[i]} {key[i][: 8 if COLUMN[i] in DIGESTS else None] or '–'}" for i in differing]
        names[key] = ", ".join([f"{key[0]} × {key[1]}", *told])
    return names


def row_names(rows: Iterable[Row]) -> dict[Key, str]:
    """The method, and what tells one of its rows from the others. A method that has one row in every column keeps one
    even if its settings are not the same in all of them."""
    found: dict[str, dict[Key, set[Key]]] = {}  # method → column → rows
    for row in rows:
        found.setdefault(row["method"], {}).setdefault(key_of(row, COLUMN), set()).add(key_of(row, ROW))
    names = {}
    for method, columns in found.items():
        keys = set().union(*columns.values())
        shared = set.intersection(*(set(words(key)) for key in keys))
        many = any(len(rows) > 1 for rows in columns.values())
        for key in keys:
            told = [word for word in words(key) if many and word not in shared]
            names[key] = METHODS[method].title + (f" ({', '.join(told)})" if told else "")
    return names


def words(key: Key) -> list[str]:
    """What tells a row of the tables from its method's preset."""
    _, settings, add_name, begun_from = key
    named = [f"“{add_name}”"] * bool(add_name) + [f"begun from {begun_from[:8]}"] * bool(begun_from)
    return [word.replace("=", " ") for word in settings.split()] + named


def grouped(rows: Sequence[Row], state: str = "finished") -> tuple[list[Group], list[Row]]:
    """Runs that are averaged, in the tables' order, and the runs of a seed that another run has."""
    rows = comparable(completed([row for row in rows if row["state"] != "damaged"]))
    columns, labels = column_names(rows), row_names(rows)
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    repeated = []
    for row in rows:
        if row["state"] == state:
            seeds = groups.setdefault((columns[key_of(row, COLUMN)], labels[key_of(row, ROW)]), {})
            if seeds.setdefault(row["seed"], row) is not row:
                repeated.append(row)
    return [Group(*names, list(seeds.values())) for names, seeds in groups.items()], repeated


def completed(rows: Sequence[Row]) -> list[Row]:
    """The rows; those of older versions, which lack digests, take them from the runs that they agree with in all else,
    if these are all of the same images and origin."""
    missing = [*DIGESTS, "labels_per_class"]  # older versions wrote the flag, also where it limited nothing
    others = [name for name in (*COLUMN, *ROW) if name not in missing]
    known: dict[Key, dict[Key, Row]] = {}
    for row in rows:
        if row["test_digest"]:
            known.setdefault(key_of(row, others), {}).setdefault(key_of(row, missing), row)
    full = []
    for row in rows:
        like = [] if row["test_digest"] else [*known.get(key_of(row, others), {}).values()]
        like = [other for other in like if not differences(identity(other), identity(row))]
        full.append(row | {name: like[0][name] for name in missing} if len(like) == 1 else row)
    return full


def identity(row: Row) -> Identity:
    """What a run is; settings as text."""
    digests = {split: row[f"{split}_digest"] for split in ("train", "test") if row[f"{split}_digest"]}
    settings = {name: row[name] for name in ("dataset", "arch", "method", *TRAINING, "settings", "add_name")}
    return Identity(settings, digests, row["begun_from"] or None)


def comparable(rows: Sequence[Row]) -> list[Row]:
    """The rows, without what was measured otherwise than for most of their column."""
    kinds = HOW | shifts_of(rows)
    counts: dict[tuple[Key, str], Counter[str]] = {}
    for row in rows:
        for how in kinds:
            counts.setdefault((key_of(row, COLUMN), how), Counter())[row.get(how, "")] += bool(row.get(how))
    usual = {key: counter.most_common(1)[0][0] for key, counter in counts.items()}
    return [
        row
        | {
            name: ""
            for how, names in kinds.items()
            if row.get(how, "") != usual[key_of(row, COLUMN), how]
            for name in names
        }
        for row in rows
    ]


def relative_cost(group: Group, groups: Sequence[Group]) -> float:
    """Seconds an epoch over vanilla's in the same column; not a number where they were not measured, or that ran on
    another device."""
    for other in groups:
        if (other.column, other.label) == (group.column, METHODS["vanilla"].title):
            ours, vanillas = (of.values("seconds_per_epoch") for of in (group, other))
            same_device = {row["device"] for row in other.runs} == {row["device"] for row in group.runs}
            if same_device and ours and vanillas:
                return statistics.mean(ours) / statistics.mean(vanillas)
    return math.nan
