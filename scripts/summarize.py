"""From run folders to a paper's tables and pictures.

    python3 scripts/summarize.py RUNS                        # tables, pictures and runs.csv into the folder summary
    python3 scripts/summarize.py RUNS MORE_RUNS --out paper
    python3 scripts/summarize.py paper/runs.csv --out paper  # the same from the table of runs: all it needs is in there
    python3 scripts/summarize.py --refresh RESULTS.md        # tables inside a text, from the tables of runs it names

A ROOT is a run's folder, a folder of such folders at any depth, or a runs.csv. Written are

    summary.md, summary.tex (booktabs)   tables: accuracy, differences, cost, settings, what is not counted
    summary.csv                          the same numbers, a row for each data set, architecture and method: means with
                                         their standard deviations and numbers of seeds
    differences.csv                      each method against the best and against vanilla, in all that was measured
    runs.csv                             a row for each run: settings, command, measurements, test accuracy by epoch
    curves.png/.pdf, cost.png/.pdf       accuracy against the epoch, with a band over seeds, and against the cost; those
                                         of an earlier call are removed

Runs are averaged if they differ in nothing but the seed. Data set, architecture and what else trains the network make
columns; the method, its settings and --add_name make rows. Two runs of one seed count once, the one that began first;
the other is listed, as are runs that are not finished and damaged folders; what --overwrite set aside is skipped.
Deviations are of the sample (n − 1); a number in brackets says how many seeds they are of, where these are not all.
Seconds an epoch and images/s are medians over a run's epochs.

Differences are paired over common seeds where there are at least 3, else Welch's where both have at least 2; p-values
are after Holm, over the methods that are compared in one setting and measure. Bold is every method that cannot be told
from the best.

--refresh replaces what stands between a line <!-- summarize PATH.csv SECTION… --> and a line <!-- /summarize -->. PATH
is relative to the text and may have wildcards; sections are final, best, differences, details, settings, open;
without any, all stand there.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mixup import METHODS
from utils import errors
from utils.errors import BadArguments, UserError, exit_code
from utils.files import atomic_write
from utils.options import Parser
from utils.pictures import whole_numbers
from utils.results import (
    FLAGS,
    HOW,
    ROW,
    SHIFT,
    TRAINING,
    Group,
    Row,
    grouped,
    key_of,
    read_roots,
    relative_cost,
    shifts_of,
    text_of,
    words,
    write_table,
)
from utils.statistics import LEVEL, RULE, Difference, best_of, compared, leaders
from utils.tables import Table, latex, markdown

# Colour (after Okabe and Ito, told apart by colour-blind readers) and marker of each method, in the order of
# mixup.METHODS. Further methods begin again with the first colour and the next marker.
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#8C6D1F", "#0072B2", "#CC79A7", "#D55E00"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*", "h", "p", "<", ">", "d"]
PANELS, LINES = 9, 24  # columns and rows of the tables that a picture holds
COSTS = {  # title and digits; “× vanilla” stands behind the first
    "seconds_per_epoch": ("s/epoch", 1),
    "images_per_second": ("images/s", 0),
    "hours": ("hours", 2),
    "peak_memory_gb": ("GB", 1),
}
ROBUSTNESS = {
    "clean_top1": "clean",
    "corruption_error": "corr. error",
    "fgsm4_top1": "FGSM 4",
    "fgsm8_top1": "FGSM 8",
    "pgd4_top1": "PGD 4",
    "pgd8_top1": "PGD 8",
    "ece": "ECE",
}
VANILLA = METHODS["vanilla"].title
TABLES = ("summary.md", "summary.tex", "summary.csv", "differences.csv", "runs.csv")
KINDS = ("png", "pdf")
PICTURES = [f"{name}.{kind}" for name in ("curves", "cost") for kind in KINDS]
LOWEST = {"corruption_error", "ece"}  # less is better
TESTED = {"final": "final", "clean_top1": "clean"}  # differences that have tables; all are in differences.csv
SECTIONS = ["final", "best", "differences", "details", "settings", "open"]
MARKED = re.compile(r"^(<!-- summarize ([^\n]+) -->\n)(.*?)^(<!-- /summarize -->)$", re.DOTALL | re.MULTILINE)


class Comparison(NamedTuple):
    """The rows of one column of the tables against one of them, ``reference``, in one measure."""

    column: str
    measure: str
    against: str  # "best" or "vanilla"
    reference: str
    differences: dict[str, Difference]


def main(argv: Sequence[str] | None = None) -> int:
    """Summarise; returns the exit code: 0, 1 for a failure, 2 for bad arguments."""
    parser = Parser(description=__doc__, prog="summarize.py", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", nargs="*", type=Path, metavar="ROOT", help="run folders, their folder, or a runs.csv")
    parser.add_argument("--out", type=Path, default=Path("summary"), help="folder to write into (default: %(default)s)")
    parser.add_argument("--refresh", nargs="+", type=Path, default=[], metavar="FILE", help="Markdown with markers")
    args = parser.parse_args(argv)
    return exit_code(parser, lambda: work(args))


def work(args: argparse.Namespace) -> int:
    """What the arguments ask for."""
    if not args.roots and not args.refresh:
        raise BadArguments("name a folder of runs, a runs.csv, or a text to --refresh")
    if args.roots:
        rows = read_roots(args.roots)
        write_summary(rows, args.out)
        if old := sum(row["state"] == "finished" and not row["test_digest"] for row in rows):
            print(
                f"warning: {old} runs are of an older version, which kept no digest of their images; they and their "
                "evaluations are taken to be of the same images if all else agrees",
                file=sys.stderr,
            )
    for path in args.refresh:
        write_text(path, refreshed(path))
        print(path)
    return 0


# --------------------------------------------------------------------------------------------------------------- tables


def sections(rows: Sequence[Row]) -> dict[str, list[Table | str]]:
    """The tables, and the sentences that go with them."""
    groups, repeated = grouped(rows)
    of_seeds = "mean ± standard deviation over seeds"
    columns = list(dict.fromkeys(group.column for group in groups))
    content: dict[str, list[Table | str]] = {
        "final": [
            wide(groups, "final", f"Test accuracy in %, median of the last ten epochs: {of_seeds} (their number)"),
            *what_is_bold(groups, "final"),
        ],
        "best": [
            wide(groups, "best", f"Test accuracy in %, best epoch: {of_seeds} (their number)"),
            *what_is_bold(groups, "best"),
        ],
        "differences": [*differences(groups)],
        "details": [
            table
            for column in columns
            for of_column in [[group for group in groups if group.column == column]]
            for table in (details(of_column, f"{column}: {of_seeds}"), *other_sets(of_column, f"{column}: {of_seeds}"))
        ],
        "settings": [*described(groups)],
        "open": [],
    }
    left_out = [[row["run"], f"seed {row['seed']} is counted already", f"final {row['final']} %"] for row in repeated]
    for row in rows:
        if row["state"] != "finished":
            far = [f"{row['epochs_done']} of {row['epochs']} epochs"] * bool(row["epochs"])
            far += [f"best {row['best']} %"] * bool(row["best"]) + [row["note"]] * bool(row["note"])
            left_out.append([row["run"], row["state"], "; ".join(far)])
    if not groups:
        content.update(final=["No run is finished."], best=[], details=[])
    content["open"] += [f"{row['run']}: {row['note']}." for row in rows if row["state"] == "finished" and row["note"]]
    if left_out:
        content["open"].append(Table("Runs that are not counted", ["run", "why", "how far it came"], left_out))
    return content


def in_words(numbers: Sequence[float], digits: int = 2, count: bool = False) -> str:
    """Mean ± standard deviation (number of values); a dash for none."""
    if not numbers or math.isnan(numbers[0]):
        return "–"
    deviation = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    mean = round(statistics.mean(numbers), digits) + 0.0  # no −0
    return f"{mean:.{digits}f}{deviation}" + f" ({len(numbers)})" * count


def minus(text: str) -> str:
    """A number with a typographic minus sign."""
    return text.replace("-", "−")


def of_fewer(group: Group, name: str) -> str:
    """The number of runs that have a measurement, where these are some but not all."""
    count = len(group.values(name))
    return f" ({count})" if 0 < count < len(group.runs) else ""


def wide(groups: Sequence[Group], name: str, caption: str) -> Table:
    """Rows methods, columns data sets and architectures."""
    columns = list(dict.fromkeys(group.column for group in groups))
    labels = {group.label: list(METHODS).index(group.runs[0]["method"]) for group in groups}
    cells = {(group.label, group.column): group.values(name) for group in groups}
    ordered = sorted(labels, key=lambda label: labels[label])
    rows = [[label, *(in_words(cells.get((label, of), []), count=True) for of in columns)] for label in ordered]
    bold = {
        (ordered.index(label), 1 + columns.index(column))
        for column, seeds in measured(groups, name).items()
        for label in leaders(seeds, is_lowest(name))
    }
    return Table(caption, ["method", *columns], rows, bold)


def measured(groups: Iterable[Group], name: str) -> dict[str, dict[str, dict[str, float]]]:
    """Column → row → seed → number, where there is one."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for group in groups:
        if seeds := group.of_seeds(name):
            found.setdefault(group.column, {})[group.label] = seeds
    return found


def is_lowest(measure: str) -> bool:
    """Whether less of it is better."""
    return measure in LOWEST or (measure.startswith(SHIFT) and not measure.endswith(" top1"))


def what_is_bold(groups: Sequence[Group], name: str) -> Iterator[str]:
    """What bold means in a table of one accuracy, and how much of it is."""
    columns = measured(groups, name)
    bold = {column: leaders(rows) for column, rows in columns.items()}
    counted = [len(seeds) > 1 for column, rows in columns.items() if bold[column] for seeds in rows.values()]
    several = [column for column, rows in columns.items() if len(rows) > 1]
    if any(bold.values()):
        families = [compared(rows, best_of(rows)) for column, rows in columns.items() if bold[column]]
        count = sum(map(len, bold.values()))
        text = f"Bold are the highest mean and those not told to be below it, {count} of {sum(counted)} ({RULE})."
        if count > 2 and 2 * count > sum(counted):
            text += " That so many are bold says that these seeds do not tell them apart, not that they are equal."
        if any(map(was_chosen, families)):
            text += " The highest was chosen from these numbers: p-values against it are too small."
        if any(math.isnan(of.p) and of.value < 0 for family in families for of in family.values()):
            text += " A difference that is the same for every seed has no p-value; it counts as told."
        yield text
    if any(not bold[column] for column in several):
        yield "Nothing is bold where the highest mean, or every other, is of one seed: they cannot be compared."


def was_chosen(family: Mapping[str, Difference]) -> bool:
    """Whether the row that these are compared with is the best of several that are tested, which favours it; of two
    rows a two-sided test asks nothing else."""
    return sum(not math.isnan(of.value) for of in family.values()) > 1


def comparisons(groups: Sequence[Group]) -> Iterator[Comparison]:
    """Each row against the best and against vanilla, in every column of the tables and every measure."""
    shifts = [name for names in shifts_of(row for group in groups for row in group.runs).values() for name in names]
    for measure in ("final", "best", *ROBUSTNESS, *shifts):
        for column, rows in measured(groups, measure).items():
            best = best_of(rows, is_lowest(measure))
            if best is not None:
                yield Comparison(column, measure, "best", best, compared(rows, best))
            if VANILLA in rows and len(rows) > 1:
                yield Comparison(column, measure, "vanilla", VANILLA, compared(rows, VANILLA))


def differences(groups: Sequence[Group]) -> Iterator[Table | str]:
    """The tables of the comparisons in ``TESTED``, and how to read them."""
    shown = [of for of in comparisons(groups) if of.measure in TESTED and any(d.test for d in of.differences.values())]
    told = [of for of in shown if any(not math.isnan(d.value) for d in of.differences.values())]
    for of in told:
        reference = f"{of.reference}, the best" if of.against == "best" else of.reference
        if of.against == "vanilla" and (of.column, of.measure, of.reference) in {
            (other.column, other.measure, other.reference) for other in told if other.against == "best"
        }:
            continue  # the same numbers
        rows = [
            [label, number(d.value), f"{number(d.low)} to {number(d.high)}", small(d.adjusted), d.test]
            if not math.isnan(d.low)
            else [label, number(d.value), "–", small(d.adjusted), d.test]
            for label, d in of.differences.items()
        ]
        caption = f"{of.column}, {TESTED[of.measure]}: difference from {reference}, in points"
        yield Table(caption, ["method", "difference", "95 % interval", "p", "test"], rows)
    if told:
        yield (
            "Each test in these tables is two-sided: a paired t-test over common seeds where there are at least 3, "
            "else Welch's where both have at least 2. Intervals are not adjusted for the number of comparisons; "
            "p-values are (Holm, over the rows of a table)."
            + " The best was chosen from the same numbers, which makes it look further ahead than it is: p-values "
            "against it are too small." * any(of.against == "best" and was_chosen(of.differences) for of in told)
        )


def number(value: float) -> str:
    """With its sign; a dash for none."""
    if math.isnan(value):
        return "–"
    return minus(f"{value:+.2f}") if round(value, 2) else "0.00"


def small(p: float) -> str:
    """A p-value; a dash for none."""
    if LEVEL - 0.0005 <= p < LEVEL:  # not rounded to the level
        return f"{math.floor(p * 1e4) / 1e4:.4f}"
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def details(groups: Sequence[Group], caption: str) -> Table:
    """Everything that was measured in one column, a row a method; the caption says how."""
    robust = {name: title for name, title in ROBUSTNESS.items() if any(group.values(name) for group in groups)}
    found_costs = {name: shown for name, shown in COSTS.items() if any(group.values(name) for group in groups)}
    timed = "seconds_per_epoch" in found_costs
    rows = []
    for group in groups:
        costs = [
            in_words(group.values(name), digits) + of_fewer(group, name) for name, (_, digits) in found_costs.items()
        ]
        extra = [in_words(group.values(name)) + of_fewer(group, name) for name in robust]
        accuracy = [in_words(group.values(name)) for name in ("final", "best")]
        if timed:
            ratio = relative_cost(group, groups)
            costs.insert(1, "–" if math.isnan(ratio) else f"{ratio:.2f}{of_fewer(group, 'seconds_per_epoch')}")
        rows.append([group.label, str(len(group.runs)), *accuracy, *costs, *extra])
    titles = [title for title, _ in found_costs.values()]
    if timed:
        titles.insert(1, "× vanilla")
    header = ["method", "seeds", "final", "best", *titles, *robust.values()]
    labels = [group.label for group in groups]
    places = {"final": 2, "best": 3, **{name: len(header) - len(robust) + i for i, name in enumerate(robust)}}
    bold = {
        (labels.index(label), place)
        for name, place in places.items()
        for seeds in measured(groups, name).values()
        for label in leaders(seeds, is_lowest(name))
    }
    runs = [row for group in groups for row in group.runs]
    for how, names in HOW.items():
        usual = {row[how] for row in runs if row[how] and any(row[name] for name in names)}
        others = {row[how] for row in runs if row[how]} - usual
        caption += "".join(
            f"; {how}: {kind}" for kind in usual
        ) + f" (not shown: runs with {'; '.join(sorted(others))})" * bool(others)
    caption += (
        "; bold: the best of a column, chosen from these numbers, and each not told to be worse; none where the best "
        "is of one seed" * bool(bold)
    )
    return Table(caption, header, rows, bold, breaks=(4, len(header) - len(robust)))


def other_sets(groups: Sequence[Group], caption: str) -> Iterator[Table]:
    """Accuracy on other test sets, a row a method; the caption says which."""
    runs = [row for group in groups for row in group.runs]
    labels = [group.label for group in groups]
    header, rows, bold = ["method"], [[label] for label in labels], set()
    for how, names in shifts_of(runs).items():
        title = how.removeprefix(SHIFT)
        for name, of in zip(names, (title, "drop", "ECE"), strict=True):
            for row, group in zip(rows, groups, strict=True):
                row.append(minus(in_words(group.values(name))) + of_fewer(group, name))
            for seeds in measured(groups, name).values():
                bold |= {(labels.index(label), len(header)) for label in leaders(seeds, is_lowest(name))}
            header.append(of)
        kinds = dict.fromkeys(row[how] for row in runs if row.get(how) and row.get(names[0]))
        caption += "".join(f"; {title}: {kind}" for kind in kinds)
    if len(header) > 1:
        caption += "; drop: from the own test set's images of the same classes, in points"
        yield Table(caption, header, rows, bold, breaks=range(1, len(header), 3))


def described(groups: Sequence[Group]) -> Iterator[str]:
    """Settings other than the defaults, and what the runs were made with."""
    told: dict[str, dict[str, list[str]]] = {}  # who → settings → columns
    for group in groups:
        row = group.runs[0]
        training = [f"{n} {row[n]}" for n in TRAINING if row[n] and (row[n] != text_of(FLAGS[n]) or n == "epochs")]
        told.setdefault("All", {}).setdefault(", ".join(training), []).append(group.column)
        told.setdefault(group.label, {}).setdefault(", ".join(words(key_of(row, ROW))), []).append(group.column)
    for who, settings in told.items():
        for text, columns in settings.items():
            where = f" ({'; '.join(dict.fromkeys(columns))})" if len(settings) > 1 else ""
            if text:
                yield f"{who}{where}: {text}."
    rows = [row for group in groups for row in group.runs]
    used = {name: sorted({row[name] for row in rows if row[name]}) for name in ("device", "torch", "commit", "date")}
    commits = dict.fromkeys(commit[:10] + "+" * commit.endswith("+") for commit in used["commit"])
    if rows:
        dates = " to ".join(dict.fromkeys(date[:10] for date in (used["date"][0], used["date"][-1])))
        with_commit = f"; commit {', '.join(commits)}" if commits else ""
        runs = f"{len(rows)} run{'s' * (len(rows) > 1)}"
        made = f"{runs} on {'; '.join(used['device'])}; PyTorch {', '.join(used['torch'])}"
        yield f"{made}; {dates}{with_commit}."


# -------------------------------------------------------------------------------------------------------------- writing


def write_summary(rows: list[Row], out: Path) -> None:
    """Every file, into ``out``; its pictures of an earlier call, which may be of other runs, are removed first."""
    groups, content = grouped(rows)[0], sections(rows)
    text = markdown(content, SECTIONS)
    out.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        (out / name).unlink(missing_ok=True)
    write_text(out / "summary.md", text)
    write_text(out / "summary.tex", latex(content, [name for name in SECTIONS if name != "open"]))
    write_numbers(out / "summary.csv", groups)
    write_differences(out / "differences.csv", groups)
    write_table(out / "runs.csv", rows)
    if trained := [group for group in [*groups, *grouped(rows, "unfinished")[0]] if has_curve(group)]:
        plot_curves(trained, out / "curves")
    if timed := [group for group in groups if group.values("seconds_per_epoch")]:
        plot_cost(timed, out / "cost")
    print(text)
    print(*sorted(out / name for name in (*TABLES, *PICTURES) if (out / name).exists()), sep="\n")


def write_text(path: Path, text: str) -> None:
    with atomic_write(path, "w") as file:
        file.write(text)


def write_numbers(path: Path, groups: Sequence[Group]) -> None:
    """The tables' numbers, a row a group."""
    shifts = [name for names in shifts_of(row for group in groups for row in group.runs).values() for name in names]
    names = ["final", "best", *COSTS, *ROBUSTNESS, *shifts]
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        of_names = [f"{name}_{kind}" for name in names for kind in ("mean", "std", "seeds")]
        writer.writerow(["data", "method", "seeds", *of_names, "times_vanilla"])
        for group in groups:
            cells: list[Any] = [group.column, group.label, len(group.runs)]
            for values in (group.values(name) for name in names):
                cells += [*in_words(values, 4).replace("–", "").partition(" ± ")[::2], len(values)]
            writer.writerow([*cells, in_words([relative_cost(group, groups)], 4).replace("–", "")])


def write_differences(path: Path, groups: Sequence[Group]) -> None:
    """Every comparison, a row each; numbers that cannot be given are empty."""
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = ["data", "measure", "against", "reference", "method"]
        writer.writerow([*names, "difference", "low_95", "high_95", "p", "p_holm", "test"])
        for of in comparisons(groups):
            for label, d in of.differences.items():
                numbers = (d.value, d.low, d.high, d.p, d.adjusted)
                cells = ["" if math.isnan(value) else f"{value:.6g}" for value in numbers]
                writer.writerow([of.column, of.measure, of.against, of.reference, label, *cells, d.test])


def refreshed(path: Path) -> str:
    """The text of ``path`` with every marked part written anew."""
    text = path.read_text(encoding="utf-8")
    if text.count("<!-- summarize ") != len(MARKED.findall(text)) or not MARKED.search(text):
        raise UserError(f"{path} needs lines <!-- summarize PATH.csv --> … <!-- /summarize -->, each closed")

    def part(found: re.Match[str]) -> str:
        words = found[2].split()
        wanted = [word for word in words if word in SECTIONS]
        roots = [sorted(path.parent.glob(word)) or [path.parent / word] for word in words if word not in SECTIONS]
        content = sections(read_roots(root for named in roots for root in named))
        return found[1] + "\n" + markdown(content, wanted or SECTIONS) + "\n" + found[4]

    return MARKED.sub(part, text)


# ------------------------------------------------------------------------------------------------------------- pictures


def has_curve(group: Group) -> bool:
    """Whether one of its runs has finished an epoch."""
    return any(row["curve"] for row in group.runs)


def plot_curves(groups: Sequence[Group], path: Path) -> None:
    """Test accuracy against the epoch: mean ± deviation over seeds, the last quarter of the epochs enlarged; runs that
    are not finished as thin lines."""
    groups, left_out = pictured(groups)
    figure, panels = make_panels(groups, "epoch", "test accuracy [%]")
    for panel in panels.values():
        panel.xaxis.set_major_locator(whole_numbers())
    styles = variants(groups)
    insets: dict[str, Any] = {}
    for group in groups:
        first = group.runs[0]
        curves = [np.array(row["curve"].split(), float) for row in group.runs if row["curve"]]
        done, panel = first["state"] == "finished", panels[group.column]
        line: dict[str, Any] = {"color": look(first["method"])[0], "linewidth": 1.6 if done else 0.7}
        line |= {"linestyle": ("-", "--", ":", "-.")[styles[group.label] % 4]}
        seeds = f"{len(curves)} seed{'s' * (len(curves) > 1)}" if done else "unfinished"
        for curve in [np.mean(curves, axis=0)] if done else curves:
            epochs = int(first["start_epoch"]) + np.arange(len(curve))
            marker = "." if len(curve) < 3 else None
            panel.plot(epochs, curve, marker=marker, label=f"{group.label}, {seeds}", **line)
            last = slice(-(len(curve) // 4), None)
            if done and len(curve) >= 20:
                if group.column not in insets:
                    insets[group.column] = panel.inset_axes((0.5, 0.1, 0.48, 0.48))
                    insets[group.column].tick_params(labelsize=8)
                    insets[group.column].xaxis.set_major_locator(whole_numbers())
                    insets[group.column].grid(alpha=0.25)
                insets[group.column].plot(epochs[last], curve[last], **line)
            if done and len(curves) > 1:
                deviation = np.std(curves, axis=0, ddof=1)
                band: dict[str, Any] = {"color": line["color"], "alpha": 0.18, "linewidth": 0}
                panel.fill_between(epochs, curve - deviation, curve + deviation, **band)
                if group.column in insets:
                    low, high = (curve - deviation)[last], (curve + deviation)[last]
                    insets[group.column].fill_between(epochs[last], low, high, **band)
    save(figure, path, left_out)


def plot_cost(groups: Sequence[Group], path: Path) -> None:
    """Final accuracy against the seconds of an epoch, over vanilla's where all can be compared with it; the legend says
    where not every seed has times."""
    groups, left_out = pictured(groups)
    relative = {id(group): relative_cost(group, groups) for group in groups}
    against_vanilla = not any(map(math.isnan, relative.values()))
    label = "time of an epoch, vanilla = 1" if against_vanilla else "time of an epoch [s]"
    figure, panels = make_panels(groups, label, "final test accuracy [%] ± deviation over seeds")
    styles = variants(groups)
    for group in groups:
        times, accuracies = group.values("seconds_per_epoch"), group.values("final")
        cost = relative[id(group)] if against_vanilla else statistics.mean(times)
        seeds = f", times of {len(times)} of {len(group.runs)} seeds" * (len(times) < len(group.runs))
        colour, marker = look(group.runs[0]["method"])
        panels[group.column].errorbar(
            cost, statistics.mean(accuracies), yerr=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            fmt=marker, color=colour, markersize=11 if marker == "*" else 7, capsize=3, label=group.label + seeds,
            fillstyle=("full", "none", "left", "top")[styles[group.label] % 4],
        )  # fmt: skip
    save(figure, path, left_out)


def look(method: str) -> tuple[str, str]:
    """Colour and marker of a method."""
    place = list(METHODS).index(method)
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]


def pictured(groups: Sequence[Group]) -> tuple[list[Group], str]:
    """What a picture can show, of a hundred settings no more than one can look at, and a line on the rest."""

    def height(group: Group) -> float:
        return statistics.mean(float(row["final"] or 0) for row in group.runs)

    columns = Counter(group.column for group in groups)
    shown = {column for column, _ in columns.most_common(PANELS)}
    kept = [group for group in groups if group.column in shown]
    ranked = sorted(kept, key=lambda group: (group.label != VANILLA, -height(group)))
    labels = list(dict.fromkeys(group.label for group in ranked))
    kept = [group for group in kept if group.label in labels[:LINES]]
    words = []
    if len(columns) > PANELS:
        words.append(f"{PANELS} of {len(columns)} settings, those with the most methods")
    if len(labels) > LINES:
        words.append(f"{LINES} of {len(labels)} methods, those with the highest accuracy")
    return kept, "; ".join(words)


def variants(groups: Iterable[Group]) -> dict[str, int]:
    """A number for each row's name: its place among those of its method."""
    places: dict[str, dict[str, int]] = {}
    for group in groups:
        of_method = places.setdefault(group.runs[0]["method"], {})
        of_method.setdefault(group.label, len(of_method))
    return {label: place for of_method in places.values() for label, place in of_method.items()}


def make_panels(groups: Iterable[Group], across: str, up: str) -> tuple[Figure, dict[str, Any]]:
    """A picture with a panel for each column of the tables, at most three side by side."""
    columns = list(dict.fromkeys(group.column for group in groups))
    high, wide = math.ceil(len(columns) / 3), min(3, len(columns))
    figure = Figure(figsize=(max(6.4, 4.2 * wide), 4.4 * high), layout="constrained", dpi=150)
    panels = dict(zip(columns, figure.subplots(high, wide, squeeze=False).flat, strict=False))
    for column, panel in panels.items():
        panel.set_title(column.replace(", ", "\n"), fontsize=10, parse_math=False)
        panel.set_xlabel(across)
        panel.set_ylabel(up)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(0.08)
    for panel in figure.axes[len(columns) :]:
        panel.set_visible(False)
    return figure, panels


def save(figure: Figure, path: Path, left_out: str) -> None:
    """As PNG and PDF, with a legend of each name once."""
    named = {
        label: line for panel in figure.axes for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    if left_out:
        figure.suptitle(left_out, fontsize=9)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # once is enough: it is most of the work
    for kind in KINDS:
        with atomic_write(path.with_suffix(f".{kind}")) as file:
            undated = {"CreationDate": None} if kind == "pdf" else {}
            figure.savefig(file, format=kind, metadata=undated)


if __name__ == "__main__":
    errors.run(main)
