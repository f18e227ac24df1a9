"""scripts/summarize.py: tables and pictures, from folders as main.py leaves them."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from scripts import evaluate, summarize
from tests.common import ROOT, SAGE, SMALL, main
from tests.made_runs import DIGESTS, change, evaluated, make_run
from utils import pictures
from utils.tables import read_runs, write_runs

SECTIONS = summarize.SECTIONS[:-1]


def write(root: Path, out: Path, *roots: Path) -> str:
    assert summarize.main([*map(str, (root, *roots)), "--out", str(out)]) == 0
    return (out / "summary.md").read_text(encoding="utf-8")


def shown(*roots: Path) -> str:
    """summary.md without the time that pictures take."""
    return summarize.in_markdown(read_runs(roots), SECTIONS)


def cells(text: str, label: str) -> list[dict[str, str]]:
    """The rows of that name: head → cell."""
    found, head = [], [""]
    for line in text.splitlines():
        row = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        head = row if row[:1] in (["method"], ["run"]) else head
        if row[:1] == [label]:
            found.append(dict(zip(head, row, strict=True)))
    return found


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three seeds of vanilla, two settings of SAGE, an unfinished run."""
    root = tmp_path / "runs"
    for seed, top1 in ((1, 70.0), (2, 71.0), (10, 73.5)):
        make_run(root, "vanilla", seed, top1)
    make_run(root, "sage", 1, 74.0, seconds=15, rand_pos=0.01, upper_lambda=0.6)
    make_run(root, "sage", 1, 75.0, seconds=25, rand_pos=1.0, upper_lambda=0.6)
    make_run(root, "cutmix", 1, 60.0, done=2)
    return root


def test_one_table_a_setting(runs: Path, tmp_path: Path) -> None:
    text = write(runs, tmp_path / "out")
    finals = [70.0, 71.0, 73.5]
    words = f"{statistics.mean(finals):.2f} ± {statistics.stdev(finals):.2f}"
    assert words == "71.50 ± 1.80"
    costs = {"s/epoch": "10.0 ± 0.0", "× Vanilla": "1.00", "GB": "1.0 ± 0.0"}
    head = {"method": "Vanilla", "n": "3", "accuracy": words, "Δ": "–", "best": words}
    assert cells(text, "Vanilla") == [head | costs]
    (sage,) = cells(text, "SAGE (rand_pos 1)")
    assert [sage[name] for name in ("n", "accuracy", "Δ", "× Vanilla")] == ["1", "75.00", "+3.50", "2.50"]
    assert "SAGE (rand_pos 1): rand_pos 1, upper_lambda 0.6." in text
    assert "labels_per_class 500, initial_channels 16, epochs 4, learning_rate 0.2, schedule 2 3, fast True" in text
    assert "on 40 test images" in text
    assert not cells(text, "CutMix")
    assert cells(text, "cutmix_seed1") == [{"run": "cutmix_seed1", "why": "unfinished", "how far": "2 of 4 epochs"}]
    assert "**" not in text
    names = {"summary.md", "summary.tex", "summary.csv", "differences.csv", "runs.csv"}
    kinds = {f"{name}.{kind}" for name in ("dots", "curves", "cost") for kind in ("png", "pdf")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | kinds


def test_the_table_of_runs_gives_the_same_files(runs: Path, tmp_path: Path) -> None:
    evaluated(runs / "vanilla_seed1", "calibration", {"ece": 100 / 3}, how={"bins": 15})
    write(runs, tmp_path / "one")
    write(tmp_path / "one" / "runs.csv", tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert "/home" not in (tmp_path / "one" / "runs.csv").read_text()


def test_a_star_is_a_significant_difference_from_plain_training(tmp_path: Path) -> None:
    for seed, top1 in enumerate((70.0, 71.0, 73.5), 1):
        evaluated(make_run(tmp_path / "runs", "vanilla", seed, top1), "clean", {"top1": top1})
        # ahead for every seed by nearly the same; on average as far, but not for every seed
        evaluated(make_run(tmp_path / "runs", "input", seed, top1 + 2 + seed / 100), "clean", {"top1": top1 - seed})
        make_run(tmp_path / "runs", "cutmix", seed, 74.0 + (seed == 2))
    make_run(tmp_path / "runs", "puzzle", 1, 60.0)
    text = write(tmp_path / "runs", tmp_path / "out")
    # paired: 2.01, 2.02, 2.03, whose interval is 2.02 ± 4.3027·0.01/√3
    assert cells(text, "Mixup")[0]["Δ"] == "+2.02 [+2.00, +2.04]*"
    assert cells(text, "Mixup")[0]["top-1"] == "69.50 ± 0.87"
    assert cells(text, "CutMix")[0]["Δ"] == "+2.83 [−2.19, +7.85]"
    assert cells(text, "Puzzle Mix")[0]["Δ"] == "−11.50"
    assert text.count("Holm") == 1
    rows = pd.read_csv(tmp_path / "out" / "differences.csv").set_index(["measure", "method", "against"])
    row = rows.loc["final", "Mixup", "Vanilla"]
    assert row["p_holm"] == pytest.approx(2 * row["p"], rel=1e-4)
    assert row["test"] == "paired, 3 seeds"
    assert ("final", "Puzzle Mix", "CutMix") in rows.index
    latex = (tmp_path / "out" / "summary.tex").read_text()
    assert r"Mixup & 3 & 73.52 $\pm$ 1.81 & +2.02 [+2.00, +2.04]* &" in latex
    means = pd.read_csv(tmp_path / "out" / "summary.csv").set_index("label")
    assert means.loc["Mixup", ["final mean", "final count"]].tolist() == [73.52, 3]


def test_what_was_measured_in_two_ways_has_two_columns(tmp_path: Path) -> None:
    for seed, images in ((1, 20), (2, 20), (3, 10)):
        folder = make_run(tmp_path / "runs", "vanilla", seed)
        evaluated(folder, "fgsm", {"4": 10.0 + seed}, how={"images": images, "seed": 0})
        evaluated(folder, "clean", {"top1": 70.0}, digest=DIGESTS["test"] if seed < 3 else "another")
    text = shown(tmp_path / "runs")
    (row,) = cells(text, "Vanilla")
    assert (row["FGSM 4"], row["FGSM 4 ′"]) == ("11.50 ± 0.71 (n = 2)", "13.00 (n = 1)")
    assert row["top-1"] == "70.00 ± 0.00 (n = 2)"  # of other images than the run's it does not count
    assert "FGSM 4: 20 images, seed 0; FGSM 4 ′: 10 images, seed 0." in text


def test_another_test_set_is_named(tmp_path: Path) -> None:
    for seed, drop in ((1, 15.0), (2, -15.0)):
        folder = make_run(tmp_path / "runs", "vanilla" if seed == 1 else "sage", seed)
        evaluated(folder, "clean", {"top1": 70.0})
        evaluated(folder, "clean", {"top1": 60.0, "drop": drop}, "all", digest="7" * 32, how={"images": 10000})
        evaluated(folder, "calibration", {"ece": 5.0}, "all", digest="7" * 32, how={"images": 10000, "bins": 15})
    text = shown(tmp_path / "runs")
    columns = ["top-1", "top-1 (all)", "against test (all)", "ECE (all)"]
    assert [cells(text, "Vanilla")[0][name] for name in columns] == ["70.00", "60.00", "−15.00", "5.00"]
    assert cells(text, "SAGE")[0]["against test (all)"] == "+15.00"
    assert "Last checkpoint on test set “all” (digest 77777777): top-1 (all), against test (all): 10,000 images" in text
    front = summarize.in_markdown(read_runs([tmp_path / "runs"]), ["front"])
    assert [*cells(front, "SAGE")[0]] == ["method", "n", "accuracy", "Δ", "10,000 images", "ECE"]


def test_the_front_table_has_all_settings(tmp_path: Path) -> None:
    for epochs in (2, 4):
        for method in ("vanilla", "sage"):
            folder = make_run(tmp_path / "runs", method, 1, 70.0 + epochs, done=epochs, epochs=epochs)
            change(folder, device=f"device {epochs}")
    front = summarize.in_markdown(read_runs([tmp_path / "runs"]), ["front"])
    first = {"method": "Vanilla", "epochs": "2", "device": "device 2", "n": "1", "accuracy": "62.00", "Δ": "–"}
    assert cells(front, "Vanilla")[0] == first
    assert cells(front, "SAGE")[1]["Δ"] == "+0.00"


def test_times_are_compared_on_one_device(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_run(tmp_path / "runs", "vanilla", seed)
        make_run(tmp_path / "runs", "cutmix", seed, seconds=15)
    runs = read_runs([tmp_path / "runs"])
    runs.loc[(runs["method"] == "cutmix") & (runs["seed"] == 2), "seconds_per_epoch"] = float("nan")
    write_runs(tmp_path / "runs.csv", runs)
    row = cells(shown(tmp_path / "runs.csv"), "CutMix")[0]
    assert (row["s/epoch"], row["× Vanilla"]) == ("15.0 (n = 1)", "1.50")
    runs["device"] = runs["method"]
    write_runs(tmp_path / "runs.csv", runs)
    assert cells(shown(tmp_path / "runs.csv"), "CutMix")[0]["× Vanilla"] == "–"


def test_latex_and_markdown_are_escaped_and_wide_tables_split(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs", "vanilla", 1, add_name="a_b|50%&$x<!-- {~^#\\")
    evaluated(folder, "fgsm", dict.fromkeys("12345", 1.0))
    evaluated(folder, "clean", {"top1": 1.0})
    make_run(tmp_path / "runs", "vanilla", 1)
    assert r"| Vanilla (“a\_b\|50%&\$x\<!-- {~^#\\”) |".replace(r"\_", "_") in shown(tmp_path / "runs")
    latex = summarize.in_latex(read_runs([tmp_path / "runs"]))
    tabulars = re.findall(r"\\begin{tabular}{(lr*)}\n\\toprule\n(.*) \\\\\n\\midrule", latex)
    assert [columns for columns, _ in tabulars] == ["lrrrr", "lr", "lrrrrr", "lrrr"]
    assert all(head.startswith("method & ") for _, head in tabulars)
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == latex.count(r"\caption") == 1
    expected = r"a\_b$|$50\%\&\$x$<$!-- \{\textasciitilde{}\textasciicircum{}\#\textbackslash{}"
    assert expected in latex
    assert latex.isascii()


def test_dots_stand_in_the_order_of_the_means(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: dict[str, Any] = {}
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.update({path.name: figure}))
    write(runs, tmp_path / "out")
    names = [tick.get_text() for tick in figures["dots.png"].axes[0].get_yticklabels()]
    assert names == ["Vanilla, n = 3", "SAGE (rand_pos 0.01), n = 1", "SAGE (rand_pos 1), n = 1"]
    legend = [text.get_text() for text in figures["curves.pdf"].axes[0].get_legend().get_texts()]
    assert legend == names[::-1]
    assert figures["cost.png"].axes[0].get_xlabel() == "time of an epoch, plain training = 1"


def test_each_setting_has_pictures_and_one_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no LaTeX")

    for rate in (0.1, 0.2):
        make_run(tmp_path / "runs", "vanilla", 1, learning_rate=rate)
    monkeypatch.setattr(pictures, "plot_cost", fail)
    write(tmp_path / "runs", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir() if path.suffix in (".png", ".pdf")}
    assert names == {f"{name}.{kind}" for name in ("dots", "dots_2", "curves", "curves_2") for kind in ("png", "pdf")}


def test_nothing_finished_makes_no_tables(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "vanilla", 1, done=0)
    text = write(tmp_path / "runs", tmp_path / "out")
    assert text.startswith("No run is finished.\n")
    assert cells(text, "vanilla_seed1")[0]["how far"] == "0 of 4 epochs"


def test_texts_are_refreshed(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    write_runs(tmp_path / "results" / "runs.csv", read_runs([runs]))
    text = tmp_path / "RESULTS.md"
    text.write_text(
        "Prose.\n\n<!-- summarize results/runs.csv accuracy settings -->\nold\n<!-- /summarize -->\n\nMore.\n\n"
        f"<!-- summarize {tmp_path}/res*/runs.csv -->\n<!-- /summarize -->\n"
    )
    assert summarize.main(["--refresh", str(text)]) == 0
    first = text.read_text()
    assert first.startswith("Prose.\n\n<!-- summarize results/runs.csv accuracy settings -->\n\ncifar10, ")
    assert "\n\nMore.\n\n" in first
    assert "\nold\n" not in first
    assert ["× Vanilla" in row for row in cells(first, "Vanilla")] == [False, True]
    assert len(cells(first, "cutmix_seed1")) == 1
    assert summarize.main(["--refresh", str(text)]) == 0
    assert text.read_text() == first


@pytest.mark.parametrize("name", ["RESULTS.md", "README.md"])
def test_committed_tables_are_what_their_runs_say(name: str) -> None:
    path = ROOT / name
    if "<!-- summarize " not in path.read_text(encoding="utf-8"):
        pytest.skip(f"no tables in {name}")
    assert summarize.refreshed(path) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (2, "", "name a folder"),
        (2, "--refresh OPEN.md --out paper", "without --out"),
        (2, "--unknown 1", "--unknown"),
        (1, "nowhere", "nowhere"),
        (1, "EMPTY", "holds no run"),
        (1, "BAD.csv", "no column"),
        (1, "RUNS --out BAD.csv", "BAD.csv"),
        (1, "--refresh nowhere.md", "nowhere.md"),
        (1, "--refresh OPEN.md", "each closed"),
        (1, "--refresh TYPO.md", "acuracy"),
    ],
)
def test_errors_cost_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, words: str, message: str
) -> None:
    make_run(tmp_path / "RUNS", "vanilla", 1)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BAD.csv").write_text("method,seed,state\nvanilla,one,unfinished\n")
    (tmp_path / "OPEN.md").write_text("<!-- summarize a.csv -->\n")
    (tmp_path / "TYPO.md").write_text("<!-- summarize a.csv acuracy -->\n<!-- /summarize -->\n")
    write_runs(tmp_path / "a.csv", read_runs([tmp_path / "RUNS"]))
    known = {path.name for path in tmp_path.iterdir()}
    try:
        left = summarize.main([str(tmp_path / word) if word in known else word for word in words.split()])
    except SystemExit as stopped:
        left = stopped.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert left == code, error
    assert message in error
    assert error.count("\n") == 1


def test_runs_and_evaluations_of_the_programs(tree: Path, tmp_path: Path) -> None:
    words = [*SMALL, "--data_dir", tree, "--root_dir", tmp_path / "runs", "--epochs", 2, "--schedule", 1]
    main(*words, "--gammas", 0.1)
    main(*words, "--gammas", 0.1, *SAGE)
    for checkpoint in (tmp_path / "runs").glob("*/checkpoint.pth.tar"):
        parts = ["--parts", "clean", "calibration", "corruptions", "fgsm", "--images", 1, "--shift", f"all={tree}"]
        call = ["--checkpoint", checkpoint, "--data_dir", tree, "--ngpu", 0, *parts]
        assert evaluate.main([*map(str, call)]) == 0
    (left,) = (tmp_path / "runs").glob("*sage*")
    finals = [json.loads(path.read_text())["final_top1"] for path in (tmp_path / "runs").glob("*/result.json")]
    text = write(tmp_path / "runs", tmp_path / "out")
    assert {cells(text, label)[0]["accuracy"] for label in ("Vanilla", "SAGE")} == {f"{final:.2f}" for final in finals}
    assert "SAGE: rand_pos 0.01, update_ratio 0.7, upper_lambda 0.6." in text
    runs = read_runs([tmp_path / "out" / "runs.csv"])
    row = runs.iloc[0]
    images, few, digest = row["test_images"], row["classes"], f"digest {row['test_digest'][:8]}"
    for name in ("test", "all"):  # the names of the columns in results/*/runs.csv
        columns = [
            f"clean top1 [{name}: {images} images, {digest}]",
            f"calibration ece [{name}: {images} images, bins 15, {digest}]",
            f"corruptions error [{name}: {few} images, seed 0, source made here, {digest}]",
            f"fgsm 4 [{name}: {few} images, seed 0, {digest}]",
            f"fgsm 8 [{name}: {few} images, seed 0, {digest}]",
        ]
        assert runs[columns].notna().all(axis=None)
        records = [json.loads(line) for line in (left / "evaluation" / "results.jsonl").read_text().splitlines()]
        (sage,) = [of["numbers"] for of in records if (of["part"], of["set"]) == ("fgsm", name)]
        assert runs.loc[runs["method"] == "sage", columns[3:]].to_numpy().tolist() == [[sage["4"], sage["8"]]]
    assert cells(text, "SAGE")[0]["against test (all)"] == "+0.00"
    (left / "result.json").unlink()
    assert cells(shown(tmp_path / "runs"), left.name)[0]["why"] == "unfinished"
    assert str(tmp_path) not in (tmp_path / "out" / "runs.csv").read_text()
