"""Tables and pictures from runs.

    python3 scripts/summarize.py RUNS [MORE] --out paper     # run folders, at any depth, or tables of runs (runs.csv)
    python3 scripts/summarize.py --refresh RESULTS.md        # renew the tables inside a text

Runs that differ in nothing but the seed and the machine are averaged. Written are

    summary.md, summary.tex   one table for each setting: Markdown, LaTeX (booktabs)
    summary.csv               means, standard deviations and numbers of seeds
    differences.csv           every two methods compared, in everything that was measured
    runs.csv                  one row a run: settings, command, measurements, accuracy after each epoch
    dots, curves, cost        pictures (.png, .pdf) of accuracy: each seed's, by epoch, by the time of an epoch

--refresh replaces what stands between the lines <!-- summarize PATH.csv SECTION ... --> and <!-- /summarize -->. PATH
is relative to the text and may have wildcards. Sections are accuracy, evaluation, robustness and cost (columns of one
table), settings, open (runs that do not count), and front (all settings in one table).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import pictures, tables
from utils.errors import BadArguments, UserError, exit_code
from utils.files import atomic_write
from utils.options import Parser
from utils.tables import LEVEL, MEASURED, METHOD, PLAIN, must_agree, setting, words_of

SECTIONS = ("accuracy", "evaluation", "robustness", "cost", "settings", "open", "front")
NAMED = ("dataset", "arch", *METHOD, "table", "label")  # settings that the names of tables and rows say
COSTS = {"seconds_per_epoch": "s/epoch", "peak_memory_gb": "GB"}
HEADS = {"top1": "top-1", "drop": "against test", "ece": "ECE", "error": "corr. error"}
FOOTNOTE = (
    "Mean ± standard deviation of n seeds, in %; accuracy: median of the last ten epochs. Δ: points above plain "
    f"training [95% interval]. * p < {LEVEL:g} against plain training (t-test, paired over common seeds if at least 3, "
    "else Welch's; Holm over methods)."
)
MARKED = re.compile(r"^(<!-- summarize ([^\n]+) -->\n)(.*?)^(<!-- /summarize -->)$", re.DOTALL | re.MULTILINE)
LATEX = str.maketrans(
    {sign: "\\" + sign for sign in "{}_&%$#"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
    | {"|": "$|$", "±": r"$\pm$", "−": "$-$", "–": "--", "Δ": r"$\Delta$", "×": r"$\times$", "“": "``", "”": "''"}
)


def main(argv: Sequence[str] | None = None) -> int:
    """Summarise; returns the exit code: 0, 1 for a failure, 2 for bad arguments."""
    parser = Parser(description=__doc__, prog="summarize.py", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", nargs="*", type=Path, metavar="ROOT", help="run folders, their folder, or a runs.csv")
    parser.add_argument("--out", type=Path, help="folder to write the summary of the runs into (default: summary)")
    parser.add_argument("--refresh", nargs="+", type=Path, default=[], metavar="FILE", help="Markdown with markers")
    args = parser.parse_args(argv)
    return exit_code(parser, lambda: work(args))


def work(args: argparse.Namespace) -> int:
    """What the arguments ask for."""
    if not args.roots and (args.out or not args.refresh):
        raise BadArguments("name a folder of runs or a runs.csv, or a text to --refresh without --out")
    if args.roots:
        write_summary(tables.read_runs(args.roots), args.out or Path("summary"))
    for path in args.refresh:
        write_text(path, refreshed(path))
        print(path)
    return 0


def columns_of(runs: pd.DataFrame) -> dict[str, dict[str, str]]:
    """The columns that a table of these runs has: by section, column of ``runs`` → head."""
    found: dict[str, dict[str, str]] = {"accuracy": {"final": "accuracy", "best": "best"}}
    found |= {"evaluation": {}, "robustness": {}}
    found["cost"] = {name: head for name, head in COSTS.items() if runs[name].notna().any()}
    measured = [match for name in runs.columns if runs[name].notna().any() and (match := MEASURED.fullmatch(name))]
    several = len({match["set"] for match in measured}) > 1
    for match in measured:
        column, part, measure, of_set, _ = match[0], *match.groups()
        section = found["evaluation" if part in ("clean", "calibration") else "robustness"]
        head = HEADS.get(measure, f"{part.upper()} {measure}")
        if of_set != "test" and (several or measure == "top1"):
            head += f" ({of_set})"
        section[column] = head + " ′" * sum(other.rstrip(" ′") == head for other in section.values())
    return found


def table_of(runs: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """The table of one setting: cells as text, a row a method."""
    tests = tables.compare(runs, [name for name in columns if name not in COSTS])
    tests = tests[tests["against"] == PLAIN]
    rows = dict(list(runs.groupby("label", sort=False)))
    cells = {"n": {label: str(len(part)) for label, part in rows.items()}} if "final" in columns else {}
    for name, head in columns.items():
        against = tests[tests["measure"] == name].set_index("method")
        stars = against["p_holm"].lt(LEVEL).map({True: "*", False: ""})
        cells[head] = {label: in_words(part[name]) for label, part in rows.items()}
        if name == "final":
            differences = against["difference"].map("{:+.2f}".format)
            intervals = against["low"].map(" [{:+.2f}, ".format) + against["high"].map("{:+.2f}]".format)
            known = intervals.where(against["low"].notna(), "")
            cells["Δ"] = (differences + known).map(minus).add(stars).to_dict()
        else:
            cells[head] |= {label: cells[head][label] + star for label, star in stars.items()}
        if name == "seconds_per_epoch":
            cells["× Vanilla"] = {label: relative(part, rows.get(PLAIN)) for label, part in rows.items()}
    return pd.DataFrame(cells, index=pd.Index(rows, name="method"), dtype=object).fillna("–")


def front(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str], str]:
    """All settings in one table, its captions and note: what differs between the settings, accuracy in training, and
    accuracy and ECE of the last checkpoint on the largest test set."""
    varying = [name for name in must_agree(runs.columns) if name not in NAMED and runs[name].nunique() > 1]
    about = [name for name in varying if not name.endswith("_digest")]
    parts: list[pd.DataFrame] = []
    notes: dict[str, None] = {}
    for _, part in runs.groupby("table", sort=False):
        evaluated = columns_of(part)["evaluation"]
        sizes = {name: int(re.sub(r".*: \D*([\d,]+) images.*", r"\1", name).replace(",", "")) for name in evaluated}
        columns = {"final": "accuracy"}
        for measure, head in {"clean top1": "{:,} images", "calibration ece": "ECE"}.items():
            largest = max((name for name in evaluated if name.startswith(measure)), key=sizes.__getitem__, default="")
            columns |= {largest: head.format(sizes[largest])} if largest else {}
        table = table_of(part, columns)
        for name in [*about, "device"] if about else ():
            names = part.groupby("label", sort=False)[name].agg(lambda of: "; ".join(of.unique()) or "–")
            table.insert(len(table.columns) - len(columns) - 2, name, names)
        parts.append(table)
        notes |= dict.fromkeys(how_measured(columns))
    captions = [caption(runs)] if len(parts) == 1 else []
    return pd.concat(parts).rename_axis("method").fillna("–"), captions, " ".join(notes)


def in_words(numbers: pd.Series) -> str:
    """Mean ± standard deviation, and the number of seeds where these are not all."""
    known = numbers.dropna()
    if known.empty:
        return "–"
    is_drop, digits = str(numbers.name).startswith("clean drop"), 1 if numbers.name in COSTS else 2
    mean = f"{0 - known.mean():+.2f}" if is_drop else f"{known.mean():.{digits}f}"
    deviation = f" ± {known.std():.{digits}f}" if len(known) > 1 else ""
    return minus(mean + deviation) + (f" (n = {len(known)})" if len(known) < len(numbers) else "")


def minus(text: str) -> str:
    """Numbers with a typographic minus sign."""
    return text.replace("-", "−")


def relative(ours: pd.DataFrame, plain: pd.DataFrame | None) -> str:
    """Seconds an epoch over plain training's on the same devices."""
    timed = [of.dropna(subset="seconds_per_epoch") for of in (ours, plain) if of is not None]
    if len(timed) < 2 or any(of.empty for of in timed) or {*timed[0]["device"]} != {*timed[1]["device"]}:
        return "–"
    return f"{timed[0]['seconds_per_epoch'].mean() / timed[1]['seconds_per_epoch'].mean():.2f}"


def caption(runs: pd.DataFrame) -> str:
    """The setting of a table's runs."""
    return f"{runs['table'].iloc[0]}; accuracy on {int(runs['test_images'].iloc[0] or 0):,} test images"


def how_measured(columns: Mapping[str, str]) -> Iterator[str]:
    """One sentence a test set on how the columns of an evaluation were measured."""
    sets: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name, head in columns.items():
        if match := MEASURED.fullmatch(name):
            how, _, digest = match["how"].partition(", digest ")
            checkpoint = "Best" if how.startswith("model_best, ") else "Last"
            hows = sets.setdefault((checkpoint, match["set"], digest), {})
            hows.setdefault(how.removeprefix("model_best, "), []).append(head)
    for (checkpoint, name, digest), hows in sets.items():
        texts = [", ".join(heads) + (f": {how}" if how not in heads else "") for how, heads in hows.items()]
        of_set = "the test set" if name == "test" else f"test set “{name}”"
        yield f"{checkpoint} checkpoint on {of_set}{f' (digest {digest})' if digest else ''}: {'; '.join(texts)}."


def described(runs: pd.DataFrame) -> Iterator[str]:
    """Settings, and what the runs were made with."""
    for table, part in runs.groupby("table", sort=False):
        row = part.iloc[0]
        names = [name for name in must_agree(part.columns) if name not in NAMED and row[name]]
        yield f"{table}: {', '.join(setting(name, row[name]) for name in names)}."
    rows = runs.drop_duplicates(["table", "label"]).to_dict("records")
    yield from dict.fromkeys(f"{row['label']}: {', '.join(words)}." for row in rows if (words := words_of(row)))
    devices = [f"{count} on {device}" for device, count in runs["device"].value_counts(sort=False).items()]
    dates = " to ".join(dict.fromkeys([runs["date"].min()[:10], runs["date"].max()[:10]]))
    commits = ", ".join(commit[:10] + commit[40:] for commit in runs["commit"].unique() if commit)
    versions = ", ".join(sorted(runs["torch"].unique()))
    yield f"Runs: {'; '.join(devices)}. PyTorch {versions}; {dates}; commit {commits or 'unknown'}."


def markdown(table: pd.DataFrame) -> str:
    """A table, numbers at the right."""
    side = "---" if table.index.name == "run" else "---:"
    rows = [[table.index.name, *table.columns], ["---", *[side] * len(table.columns)], *table.reset_index().to_numpy()]
    return "\n".join("| " + " | ".join(map(escaped, row)) + " |" for row in rows)


def escaped(text: str) -> str:
    return re.sub(r"([\\`|$]|<(?! ))", r"\\\1", " ".join(text.split()))


def in_markdown(runs: pd.DataFrame, wanted: Sequence[str]) -> str:
    """The wanted sections as Markdown."""
    whole, left_out = tables.counted(runs)
    blocks = [] if len(whole) else ["No run is finished."]
    if len(whole) and "front" in wanted:
        table, captions, note = front(whole)
        blocks += [*(f"{escaped(text)}:" for text in captions), markdown(table), escaped(note)]
    for _, part in whole.groupby("table", sort=False):
        sections = columns_of(part)
        columns = {key: head for section in wanted for key, head in sections.get(section, {}).items()}
        if columns:
            notes = escaped(" ".join(how_measured(columns)))
            blocks += [f"{escaped(caption(part))}:", markdown(table_of(part, columns)), *([notes] if notes else [])]
    if any("Δ" in block or "*" in block for block in blocks):
        blocks.append(escaped(FOOTNOTE))
    if len(whole) and "settings" in wanted:
        blocks += map(escaped, described(whole))
    if len(left_out) and "open" in wanted:
        far = left_out["epochs_done"].map("{:.0f}".format) + " of " + left_out["epochs"] + " epochs"
        far = far.where(left_out["state"] != "damaged", left_out["note"])
        blocks.append(markdown(pd.DataFrame({"why": left_out["why"], "how far": far}).set_index(left_out["run"])))
    return "\n\n".join(blocks) + "\n"


def in_latex(runs: pd.DataFrame) -> str:
    """The table of each setting for LaTeX, split by its sections: all columns side by side are wider than a page."""
    blocks = [r"% \usepackage{booktabs}"]
    for _, part in tables.counted(runs)[0].groupby("table", sort=False):
        lines = [r"\begin{table}", r"\centering\footnotesize\setlength{\tabcolsep}{4pt}"]
        lines.append(rf"\caption{{{tex(caption(part))}.}}")
        notes: list[str] = []
        for columns in columns_of(part).values():
            if columns:
                table = table_of(part, columns).reset_index().map(tex).rename(columns=tex)
                lines += ["", r"\medskip", table.to_latex(index=False, column_format="l" + "r" * (table.shape[1] - 1))]
                notes += how_measured(columns)
        note = tex(" ".join([*dict.fromkeys(notes), FOOTNOTE]))
        blocks.append("\n".join([*lines, rf"\medskip\parbox{{\linewidth}}{{{note}}}", r"\end{table}"]))
    return "\n\n".join(blocks) + "\n"


def tex(text: str) -> str:
    """A text with LaTeX's own characters escaped."""
    return " ".join(text.split()).translate(LATEX)


def write_summary(runs: pd.DataFrame, out: Path) -> None:
    """Every file, into ``out``."""
    whole, _ = tables.counted(runs)
    out.mkdir(parents=True, exist_ok=True)
    measures = [name for columns in columns_of(whole).values() for name in columns]
    numbers = whole.groupby(["table", "label"], sort=False)[measures].agg(["mean", "std", "count"])
    numbers.columns = [f"{name} {kind}" for name, kind in numbers.columns]
    texts = {"summary.md": in_markdown(runs, SECTIONS[:-1]), "summary.tex": in_latex(runs)}
    texts["summary.csv"] = numbers.to_csv(float_format="%.7g", lineterminator="\n")
    differences = tables.compare(whole, measures)
    texts["differences.csv"] = differences.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    for name, text in texts.items():
        write_text(out / name, text)
    tables.write_runs(out / "runs.csv", runs)
    for number, (_, part) in enumerate(whole.groupby("table", sort=False), 1):
        write_pictures(out, part, f"_{number}" if number > 1 else "")
    print(f"{texts['summary.md']}\nwritten into {out}")


def write_pictures(out: Path, runs: pd.DataFrame, suffix: str) -> None:
    """The pictures of one table."""
    frame = runs[["label", "method", "seed", "final", "curve", "seconds_per_epoch"]]
    for kind in ("png", "pdf"):
        pictures.attempt(pictures.plot_dots, out / f"dots{suffix}.{kind}", frame)
        pictures.attempt(pictures.plot_learning_curves, out / f"curves{suffix}.{kind}", frame)
        if frame["seconds_per_epoch"].notna().any():
            pictures.attempt(pictures.plot_cost, out / f"cost{suffix}.{kind}", frame)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path, "w") as file:
        file.write(text)


def refreshed(path: Path) -> str:
    """The text of ``path`` with every marked part written anew."""
    text = path.read_text(encoding="utf-8")
    if text.count("<!-- summarize ") != len(MARKED.findall(text)) or not MARKED.search(text):
        raise UserError(f"{path} needs lines <!-- summarize PATH.csv --> … <!-- /summarize -->, each closed")

    def part(marked: re.Match[str]) -> str:
        words = marked[2].split()
        wanted = [word for word in words if word in SECTIONS] or SECTIONS[:-1]
        named = [str(path.parent / word) for word in words if word not in SECTIONS]
        runs = tables.read_runs(Path(root) for name in named for root in sorted(glob(name)) or [name])
        return f"{marked[1]}\n{in_markdown(runs, wanted)}\n{marked[4]}"

    return MARKED.sub(part, text)


if __name__ == "__main__":
    sys.exit(main())
