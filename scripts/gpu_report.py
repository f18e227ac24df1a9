"""What gpu_check.sh measured, as Markdown; or the seconds that runs still need for so many epochs.

python3 scripts/gpu_report.py experiments/gpu_check
python3 scripts/gpu_report.py experiments/gpu_check 300
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd


def main(argv: Sequence[str] | None = None) -> int:
    """Print; 1 where there are too few epochs to say anything from."""
    folder, *epochs = sys.argv[1:] if argv is None else argv
    runs = {path.parent.name: pd.read_csv(path) for path in sorted(Path(folder).glob("runs/*/metrics.csv"))}
    # the first epoch compiles
    seconds = {name: rows["seconds"][1 if len(rows) > 1 else 0 :].median() for name, rows in runs.items()}
    if epochs:
        needs = [(int(epochs[0]) - len(rows)) * seconds[name] for name, rows in runs.items()]
        if len(runs) < 2 or min(map(len, runs.values())) < 3:
            return 1
        # between runs that do not slow each other and runs that share one device, where the longer one speeds up later
        print(round(1.05 * (max(needs) + sum(needs) / 2) / 2))  # saving and pictures are not in an epoch's seconds
        return 0
    print(benchmarks(Path(folder)))
    for name, rows in runs.items():
        top1 = rows["test_top1"]
        print(
            f"- {name}: {len(rows)} epochs, {seconds[name]:.2f} s an epoch; test accuracy {top1.iloc[-1]:.2f}%, "
            f"median of the last ten epochs {top1[-10:].median():.2f}%, best {top1.max():.2f}%"
        )
    for log in Path(folder).glob("tests.log"):
        print(f"- tests: {log.read_text().splitlines()[-1].strip('= ')}")
    return 0


def benchmarks(folder: Path) -> str:
    """The machine, and a line for each step and search that was timed."""
    found = {name: folder / f"{name}.json" for name in ("search", "steps", "steps_fast")}
    read = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    lines = [f"- {key}: {value}" for content in list(read.values())[:1] for key, value in content["machine"].items()]
    for name, content in read.items():
        for label, row in content.get("steps", {}).items():
            mode = " --fast" if name == "steps_fast" else ""
            lines.append(f"- step of {label}{mode}: {row['median_ms']:.2f} ms, {row['ratio']:.2f} × vanilla")
        for label, line in content.get("search", {}).get("pixels", {}).items():
            times = ", ".join(f"{1000 * ms:.1f} µs at {pixels} pixels" for pixels, ms in line["ms_per_pair"].items())
            lines.append(f"- search of one pair, {label}: {times}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
