"""Runs as one pandas table, a row a run: reading and checking, grouping, and tests over seeds.

A column ``fgsm 4 [test: 500 images]`` holds what scripts/evaluate.py measured, on which test set, and how: what was
measured in two ways is in two columns, and never averaged.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from mixup import METHODS, settings_for

from .checkpoint import BEST, LAST
from .errors import UserError
from .files import atomic_write, read_json, read_records
from .run import best_row, final_accuracy

TIMES = ["seconds_per_epoch", "images_per_second", "hours"]
NUMBERS = ["seed", "epochs_done", "final", "best", "best_epoch", *TIMES, "peak_memory_gb"]
METHOD = ["method", "settings", "add_name", "origin"]  # agree in a row of a table; all other settings in a whole table
TEXTS = ["dataset", "arch", *METHOD, "train_digest", "test_digest"]  # never read as numbers
ABOUT = ["state", "device", "torch", "commit", "date", "run", "command", "note"]  # need not agree
PARTS = {"clean": ("top1", "drop"), "calibration": ("ece",), "corruptions": ("error",)}  # of others all is a column
MEASURED = re.compile(r"(?P<part>\S+) (?P<measure>\S+) \[(?P<set>[^:\]]+): (?P<how>.*)\]")
MARKS = {"config.json", "metrics.csv", "result.json"}  # any of them makes a folder the folder of a run
SET_ASIDE = re.compile(r"\.old-\d{8}-\d{6}$")  # what --overwrite renames a folder to
PLAIN = METHODS["vanilla"].title
LEVEL = 0.05
Row = dict[str, Any]


def read_runs(roots: Iterable[Path]) -> pd.DataFrame:
    """One row a run, in the order of the tables, from folders at any depth and from tables that ``write_runs`` wrote.

    Raises:
        UserError: a root without a run, or a table that is damaged.
    """
    rows: list[Row] = []
    for root in roots:
        found = read_folders(root) if root.is_dir() else read_table(root)
        if not found:
            raise UserError(f"{root} holds no run")
        rows += found
    return frame_of(rows)


def frame_of(rows: list[Row]) -> pd.DataFrame:
    """The rows as a table, in order."""
    names = list(dict.fromkeys([*TEXTS, *(name for row in rows for name in row), "epochs"]))
    agreeing, measured = must_agree(names), [*filter(MEASURED.fullmatch, names)]
    runs = pd.DataFrame(rows, columns=[*agreeing, *NUMBERS, *ABOUT, *measured, "curve"])
    runs[[*agreeing, *ABOUT]] = runs[[*agreeing, *ABOUT]].astype(object).fillna("")
    runs[[*NUMBERS, *measured]] = runs[[*NUMBERS, *measured]].astype(float)
    runs["curve"] = [curve if isinstance(curve, list) else [] for curve in runs["curve"]]
    return runs.sort_values([*agreeing, "seed", "date", "run"], key=rank, kind="stable", ignore_index=True)


def write_runs(path: Path, runs: pd.DataFrame) -> None:
    """A table that ``read_runs`` reads: CSV, numbers with seven digits."""
    texts = runs.assign(curve=[" ".join(f"{value:.7g}" for value in curve) for curve in runs["curve"]])
    with atomic_write(path, "w") as file:
        texts.to_csv(file, index=False, float_format="%.7g", lineterminator="\n")


def must_agree(names: Iterable[str]) -> list[str]:
    """The columns in which runs must agree to be averaged: all but measurements, the seed, and what is about a run."""
    return [name for name in names if name not in {*NUMBERS, *ABOUT, "curve"} and not MEASURED.fullmatch(name)]


def rank(column: pd.Series) -> pd.Series:
    """What to sort a column by: methods as the registry lists them, numbers by size."""
    if column.name == "method":
        return column.map([*METHODS, ""].index)
    numbers = pd.to_numeric(column.replace("", "0"), errors="coerce")
    return column if numbers.isna().any() else numbers


def plain(value: Any) -> str:
    """A setting as text. Spellings of one value become one, such as 1.0 and 1, TRUE and True; what is off is empty."""
    if isinstance(value, list | tuple):
        return " ".join(map(plain, value))
    text = "" if value is None else str(value).strip().strip("\"'")
    text = re.sub(r"(?i)\b(true|false)\b", lambda found: found[0].capitalize(), text)
    number = r"(?<![\w.+-])[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?(?![\w.])"
    text = re.sub(number, lambda found: f"{float(found[0]):.10g}", text)
    return "" if text in ("False", "0", "None") else text


def read_table(path: Path) -> list[Row]:
    """The rows of a runs.csv, also as a spreadsheet saves it."""
    rows: list[Row] = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            separator = max(",;\t", key=file.readline().count)
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig").fillna("")
        if missing := {"method", "dataset", "arch", "seed", "state", "epochs", "curve"} - {*table.columns}:
            raise ValueError(f"there is no column {min(missing)}")
        for line, cells in enumerate(table.to_dict("records"), 2):
            try:
                row = {name: value_of(name, cell, "," if separator == ";" else ".") for name, cell in cells.items()}
                check(row)
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(f"line {line}: {error}") from error
            rows.append(row)
    except ValueError as error:
        raise UserError(f"{path} is not a table of runs: {error}") from error
    return rows


def value_of(name: str, cell: str, decimal: str) -> Any:
    """What a cell of a table says."""
    cell = cell.strip()
    if name == "curve":
        return [float(word) for word in cell.replace(decimal, ".").split()]
    if name in NUMBERS or MEASURED.fullmatch(name):
        return float(cell.replace(decimal, ".")) if cell else math.nan
    if (name in (*TEXTS, *ABOUT) and name != "settings") or name.endswith("_digest"):
        return str(pd.Timestamp(cell)) if name == "date" and cell else cell
    return plain(cell.replace(decimal, "."))


def read_folders(root: Path) -> list[Row]:
    """The rows of the runs below a folder, at any depth and behind links, each once."""

    def fail(error: OSError) -> None:
        raise error

    seen: dict[str, Path | None] = {}
    for folder, below, files in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        below[:] = sorted(name for name in below if not SET_ASIDE.search(name)) if real not in seen else []
        seen.setdefault(real, Path(folder) if not MARKS.isdisjoint(files) else None)
    return [read_run(folder) for folder in seen.values() if folder]


def read_run(folder: Path) -> Row:
    """The row of a run's folder; of a damaged one its name and what is wrong."""
    try:
        row = {"run": folder.name} | settings_of(read_json(folder / "config.json"))
        row |= training_of(folder, row)
        row |= evaluation_of(folder, row)
        check(row)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".replace(f"{folder}/", "")
        return {"run": folder.name, "state": "damaged", "note": reason[:150]}
    return row


def settings_of(config: dict[str, Any]) -> Row:
    """What config.json says of a run, without the paths of its machine."""
    settings = dict(config["settings"])
    preset = settings_for(settings["method"], settings["dataset"])
    own = {name: settings.pop(name) for name in preset if name in settings}
    changed = sorted(f"{name}={plain(value) or value}" for name, value in own.items() if value != preset[name])
    command = re.sub(r"^python3? \S*main\.py", "python3 main.py", config["command"])
    command = re.sub(r"(--(data_dir|root_dir|resume)[ =])('[^']*'|\S)+", r"\1[\2]", command)
    return {
        **{name: str(value) if name in TEXTS else plain(value) for name, value in settings.items()},
        "settings": " ".join(changed), "origin": config.get("origin") or "", "seed": float(settings["seed"]),
        "classes": str(len(config["classes"])), "test_images": str(config["images"]["test"]),
        **{f"{split}_digest": digest for split, digest in config["digests"].items()},
        "device": str(config["device"]), "torch": str(config["versions"]["torch"]),
        "commit": config["git_commit"] or "", "command": command,
        "date": str(datetime.fromisoformat(config["started"])),
    }  # fmt: skip


def training_of(folder: Path, row: Row) -> Row:
    """What metrics.csv and result.json say of a run; ``ValueError`` where they contradict each other."""
    path = folder / "metrics.csv"
    metrics = pd.read_csv(path) if path.exists() else pd.DataFrame({"epoch": []})
    first, done = int(row["start_epoch"] or 0), len(metrics)
    if metrics["epoch"].tolist() != list(range(first, first + done)):
        raise ValueError("metrics.csv skips an epoch")
    found: Row = {"state": "unfinished", "epochs_done": float(done), "curve": []}
    if done:
        epochs = metrics.astype(object).where(metrics.notna(), None).to_dict("records")
        best = best_row(epochs)
        found["curve"] = metrics["test_top1"].tolist()
        found["best_on"] = "" if best["valid_top1"] is None else "validation"
        numbers = {"final": final_accuracy(epochs)[0], "best": best["test_top1"], "best_epoch": best["epoch"]}
        numbers |= metrics[["seconds", "images_per_second"]].median().set_axis(TIMES[:2]).to_dict()
        numbers |= {"hours": metrics["seconds"].sum() / 3600, "peak_memory_gb": metrics["peak_memory_gb"].max()}
        found |= {name: float(f"{value:.7g}") for name, value in numbers.items()}
    if (folder / "result.json").exists():
        result, found["state"] = read_json(folder / "result.json"), "finished"
        for name in ("final", "best"):
            if abs(result[f"{name}_top1"] - found.get(name, math.nan)) >= 1e-3 or not done:
                raise ValueError(f"{name} is {result[f'{name}_top1']} in result.json, {found.get(name)} by metrics.csv")
    return found


def evaluation_of(folder: Path, row: Row) -> Row:
    """The newest of each measurement in evaluation/results.jsonl that counts for the run: of its last checkpoint, else
    of its best, and for the set "test" on the images that it was tested on in training."""
    records = read_records(folder / "evaluation" / "results.jsonl")
    records = [record for record in records if record["set"] != "test" or record["digest"] == row["test_digest"]]
    last = int(row["start_epoch"] or 0) + row["epochs_done"]
    for name in (LAST, BEST) if records else ():
        if (folder / name).exists():
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            found = [record for record in records if record["sha256"] == digest]
        else:  # the checkpoint was deleted
            found = [of for of in records if of["checkpoint"] == LAST == name and of["epoch"] == last]
        if found:
            checkpoint = "" if name == LAST else "model_best, "
            return {column: value for record in found for column, value in columns_of(record, checkpoint).items()}
    return {}


def columns_of(record: dict[str, Any], checkpoint: str) -> Row:
    """The columns of a record of results.jsonl."""
    numbers, how = record["numbers"], record["how"]
    said = ("images", "classes", "eps")  # classes: the digest stands for them
    words = [f"{name} {how[name]}" for name in sorted(how) if name not in said and how[name] is not None]
    text = ", ".join([f"{checkpoint}{how['images']:,} images", *words, f"digest {record['digest'][:8]}"])
    names = [name for name in PARTS.get(record["part"], numbers) if numbers.get(name) is not None]
    return {f"{record['part']} {name} [{record['set']}: {text}]": float(f"{numbers[name]:.7g}") for name in names}


def check(row: Row) -> None:
    """Raise ``ValueError`` where what a row says cannot be."""
    state, curve = row["state"], row.get("curve", [])
    if state == "damaged":
        return
    if state not in ("finished", "unfinished") or row["method"] not in METHODS:
        raise ValueError(f"state {state!r}, method {row['method']!r}")
    first, done = int(row.get("start_epoch") or 0), len(curve)
    whole = int(row["epochs"]) - first
    if done != row["epochs_done"] or (state == "finished" and done != whole):
        raise ValueError(f"{done} accuracies of {row['epochs_done']:g} epochs, where {whole} make the run")
    if curve:
        best = curve[int(row["best_epoch"]) - first] if row.get("best_on") else max(curve)
        numbers = {"final": final_accuracy([{"test_top1": value} for value in curve])[0], "best": best}
        for name, value in numbers.items():
            if not abs(row[name] - value) < 1e-3:
                raise ValueError(f"{name} is {row[name]:g}, but {value:g} by the accuracies of its epochs")


def counted(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The finished runs that count, with the names of their table and row in the columns ``table`` and ``label``; and
    the others, with the reason in the column ``why``. Of two runs of one seed the one that began first counts."""
    agreeing = must_agree(runs.columns)
    finished = runs[runs["state"] == "finished"].sort_values(["date", "hours"])
    again = finished.index[finished.duplicated([*agreeing, "seed"])]
    why = runs["state"].mask(runs.index.isin(again), "its seed is counted already")
    whole, left_out = runs[why == "finished"], runs.assign(why=why)[why != "finished"]
    settings = [name for name in agreeing if name not in ("dataset", "arch", *METHOD) and whole[name].nunique() > 1]
    texts = [whole["dataset"], whole["arch"], *(whole[name].map(partial(setting, name)) for name in settings)]
    whole = whole.assign(table=pd.concat(texts, axis=1).agg(", ".join, axis=1) if len(whole) else "", label="")
    for (_, method), part in whole.groupby(["table", "method"]):
        words = [words_of(row) for row in part.to_dict("records")]
        shared = set.intersection(*map(set, words))
        told = [", ".join(word for word in of if word not in shared) for of in words]
        whole.loc[part.index, "label"] = [METHODS[method].title + (f" ({text})" if text else "") for text in told]
    return whole, left_out


def setting(name: str, value: str) -> str:
    """A setting in words."""
    return f"{name} {value[:8] if name.endswith('_digest') else value or '–'}"


def words_of(row: Mapping[str, str]) -> list[str]:
    """What makes a run other than its method's preset."""
    words = [word.replace("=", " ") for word in row["settings"].split()]
    words += [f"“{row['add_name']}”"] if row["add_name"] else []
    return words + ([f"initialised from {row['origin'][:8]}"] if row["origin"] else [])


def difference(ours: pd.Series, theirs: pd.Series) -> dict[str, Any]:
    """The mean of ``ours`` minus that of ``theirs``, both by seed, with its 95% interval and two-sided p-value: a
    paired t-test over at least 3 common seeds, else Welch's where both have at least 2. Where no number varies there is
    no interval, and p is 1 if the means are equal."""
    pairs = pd.concat([ours, theirs], axis=1, join="inner").to_numpy()
    paired = len(pairs) >= 3
    a, b = pairs.T if paired else (ours.to_numpy(), theirs.to_numpy())
    found = {"difference": a.mean() - b.mean(), "low": math.nan, "high": math.nan, "p": math.nan}
    if not paired and min(len(a), len(b)) < 2:
        return found | {"test": "too few seeds"}
    test = f"paired, {len(a)} seeds" if paired else f"Welch, {len(a)} and {len(b)} seeds"
    rounding = 1e-9 * np.abs([*a, *b]).max()
    if (np.ptp(a - b) if paired else max(np.ptp(a), np.ptp(b))) <= rounding:
        return found | {"p": 1.0 if abs(found["difference"]) <= rounding else math.nan, "test": f"{test}; no variance"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of the two may not vary, which Welch's test can take
        result = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    interval = result.confidence_interval(0.95)
    return found | {"low": interval.low, "high": interval.high, "p": result.pvalue, "test": test}


def holm(p: pd.Series) -> pd.Series:
    """p-values adjusted for their number (Holm, "A simple sequentially rejective multiple test procedure", 1979);
    missing ones stay missing and do not count."""
    known = p.dropna().sort_values()
    return (known * np.arange(len(known), 0, -1)).cummax().clip(upper=1.0).reindex(p.index)


def compare(runs: pd.DataFrame, measures: Iterable[str]) -> pd.DataFrame:
    """Every two rows of every table in every measure, later minus earlier. p-values are adjusted (``p_holm``) over the
    differences from plain training, and over all others, of one table and measure."""
    rows: list[Row] = []
    for measure in measures:
        for table, part in runs.dropna(subset=measure).groupby("table", sort=False):
            seeds = {label: of.set_index("seed")[measure] for label, of in part.groupby("label", sort=False)}
            for first, second in combinations(sorted(seeds, key=lambda label: label != PLAIN), 2):
                names = {"table": table, "measure": measure, "method": second, "against": first}
                rows.append(names | difference(seeds[second], seeds[first]))
    columns = ["table", "measure", "method", "against", "difference", "low", "high", "p", "test"]
    found = pd.DataFrame(rows, columns=columns)
    families = found.groupby(["table", "measure", found["against"] == PLAIN], sort=False)["p"]
    found.insert(8, "p_holm", families.transform(holm))
    return found
