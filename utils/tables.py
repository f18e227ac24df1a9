"""Tables as text: Markdown, and LaTeX with booktabs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

TEXT_WIDTH, BETWEEN = 345, 8  # of LaTeX's article class and between columns, in pt
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
SPECIAL |= {sign: "\\" + sign for sign in "{}_&%$#"} | {"×": r"$\times$", "–": "--", "“": "``", "”": "''"}
SPECIAL |= {"<": "$<$", ">": "$>$", "|": "$|$", "−": "$-$", "≥": r"$\ge$"}


class Table(NamedTuple):
    """A caption, the header, the cells of each row, which of them (row, column) are bold, and before which columns a
    table that is too wide for a page is broken first."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    bold: Collection[tuple[int, int]] = ()
    breaks: Collection[int] = ()


Content = Mapping[str, Sequence[Table | str]]  # by section: tables, and the sentences that go with them


def markdown(content: Content, wanted: Iterable[str]) -> str:
    """The wanted sections; numbers at the right."""

    def plain(text: str) -> str:
        return re.sub(r"([\\`*<>|\[\]$])", r"\\\1", " ".join(text.split()))

    blocks = []
    for part in (part for name in wanted for part in content[name]):
        if isinstance(part, str):
            blocks.append(plain(part))
            continue
        side = " --- |" if part.header[0] == "run" else " ---: |"
        lines = ["| " + " | ".join(map(plain, part.header)) + " |", "| --- |" + side * (len(part.header) - 1)]
        for i, row in enumerate(part.rows):
            cells = [f"**{plain(cell)}**" if (i, j) in part.bold else plain(cell) for j, cell in enumerate(row)]
            lines.append("| " + " | ".join(cells) + " |")
        blocks.append(f"{plain(part.caption)}.\n\n" + "\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def latex(content: Content, wanted: Iterable[str]) -> str:
    """The wanted sections. Sentences behind a table stand below it, those of a section without one are comments. A
    table that is wider than a page's text is broken into several, below each other under one caption, each with the
    first column."""

    def plain(text: str) -> str:
        return "".join(SPECIAL.get(sign, sign) for sign in " ".join(text.split()))

    def line(cells: Iterable[str]) -> str:
        return " & ".join(cells) + r" \\"

    def tabular(table: Table, columns: Sequence[int]) -> str:
        header = (r" \\ ".join(map(plain, header_lines(table.header[j]))) for j in columns)
        rows = [
            line(rf"\textbf{{{plain(row[j])}}}" if (i, j) in table.bold else plain(row[j]) for j in columns)
            for i, row in enumerate(table.rows)
        ]
        top = line(rf"\shortstack{{{cell}}}" for cell in header)
        opened = rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}"
        return "\n".join([opened, r"\toprule", top, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"])

    blocks, end = [r"% \usepackage{booktabs}"], "\n\\end{table}"
    for name in wanted:
        for before, part in zip([None, *content[name]], content[name], strict=False):
            if isinstance(part, Table):
                tabulars = "\n\n\\medskip\n".join(tabular(part, columns) for columns in broken(part))
                caption = rf"\caption{{{plain(part.caption)}.}}\smallskip"
                opened = "\n".join([r"\begin{table}", r"\centering\small\setlength{\tabcolsep}{4pt}", caption])
                blocks.append(f"{opened}\n\n{tabulars}{end}")
            elif before is None or not blocks[-1].endswith(end):
                blocks.append("% " + " ".join(part.split()))
            else:
                below = rf"\parbox{{\linewidth}}{{\footnotesize {plain(part)}}}"
                blocks[-1] = f"{blocks[-1].removesuffix(end)}\n\n\\medskip\n{below}{end}"
    return "\n\n".join(blocks) + "\n"


def header_lines(cell: str) -> list[str]:
    """A long header in several lines."""
    return re.split(r", |(?<=×) ", cell) if len(cell) > 10 else [cell]


def width(text: str) -> float:
    """About so many pt in LaTeX's \\small."""
    wide = sum(sign.isupper() or sign in "±×−–%mw" for sign in text)
    narrow = sum(sign in " .,:;()[]/ijltf" for sign in text)
    return 6.6 * wide + 2.9 * narrow + 4.75 * (len(text) - wide - narrow)


def broken(table: Table) -> list[list[int]]:
    """Columns that stand beside each other, as many as a page's text is wide, or one; the first column before each."""
    widths = [max(map(width, header_lines(cell))) + BETWEEN for cell in table.header]
    for i, row in enumerate(table.rows):
        bold = [1.12 if (i, j) in table.bold else 1 for j in range(len(row))]
        widths = [
            max(other, factor * width(cell) + BETWEEN) for other, factor, cell in zip(widths, bold, row, strict=True)
        ]
    if sum(widths) <= TEXT_WIDTH:
        return [[*range(len(widths))]]
    parts: list[list[int]] = []
    for first, end in pairwise(sorted({1, *table.breaks, len(widths)})):
        for count in range(1, end - first + 1):  # parts of about as many columns
            size = -(-(end - first) // count)
            of_size = [[0, *range(j, min(j + size, end))] for j in range(first, end, size)]
            if all(sum(widths[j] for j in columns) <= TEXT_WIDTH for columns in of_size):
                break
        parts += of_size
    return parts
