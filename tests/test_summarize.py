"""scripts/summarize.py: tables, pictures and the table of runs, from folders as main.py leaves them."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from matplotlib.figure import Figure

from mixup import METHODS
from scripts import summarize
from tests.common import ENVIRONMENT, ROOT, SAGE, SMALL, main
from utils import records
from utils.errors import UserError
from utils.results import ROBUSTNESS, TIMES, grouped, read_roots, relative_cost, write_table

SETTINGS = {
    "dataset": "cifar10", "labels_per_class": 500, "arch": "preactresnet18", "initial_channels": 16, "epochs": 4,
    "learning_rate": 0.2, "schedule": [2, 3], "start_epoch": 0, "add_name": "",
}  # fmt: skip


def make_run(
    root: Path, method: str, seed: int, top1: float = 70.0, done: int = 4, seconds: float = 10, **settings: Any
) -> Path:
    """A run's folder, finished if it has all its epochs; its last test accuracies are ``top1``."""
    folder = root / "_".join([method, f"seed{seed}", *(f"{k}{v}" for k, v in settings.items())])
    folder.mkdir(parents=True)
    config = {
        "settings": {**SETTINGS, "method": method, "seed": seed, **settings}, "classes": ["cat", "dog"],
        "images": {"train": 100, "test": 40},
        "command": f"python3 /home/me/main.py --data_dir '/home/me/my data' --method {method} --root_dir=/home/me/runs",
        "device": "some cpu", "versions": {"torch": "2.9.0"}, "git_commit": "abcdef", "started": "2026-01-02 03:04:05",
    }  # fmt: skip
    records.write_json(folder / "config.json", config)
    rows = [dict.fromkeys(records.COLUMNS, 1.0) for _ in range(done)]
    for i, row in enumerate(rows):
        row.update(epoch=i, test_top1=top1 if i else top1 - 20, seconds=seconds)  # type: ignore[arg-type]
        row.update(valid_loss=None, valid_top1=None, valid_top5=None)  # type: ignore[arg-type]
    if rows:
        records.write_metrics(folder / "metrics.csv", rows)
    if done == config["settings"]["epochs"]:  # type: ignore[index]
        best = max(row["test_top1"] for row in rows)
        records.write_json(folder / "result.json", {"final_top1": records.final_accuracy(rows)[0], "best_top1": best})
    return folder


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


def write(root: Path, out: Path, *roots: Path) -> str:
    assert summarize.main([*map(str, (root, *roots)), "--out", str(out)]) == 0
    return (out / "summary.md").read_text(encoding="utf-8")


def shown(*roots: Path) -> str:
    """summary.md without the time that pictures take."""
    return summarize.markdown(summarize.sections(read_roots(roots)), summarize.SECTIONS)


def cells(text: str, label: str) -> list[list[str]]:
    return [
        [c.strip(" *") for c in line.split("|")[2:-1]] for line in text.splitlines() if line.startswith(f"| {label} |")
    ]


def test_means_and_deviations(runs: Path, tmp_path: Path) -> None:
    text = write(runs, tmp_path / "out")
    final, best, details = cells(text, "Vanilla")
    finals = [70.0, 71.0, 73.5]
    words = f"{statistics.mean(finals):.2f} ± {statistics.stdev(finals):.2f}"
    assert words == "71.50 ± 1.80"
    assert final == best == [f"{words} (3)"]
    assert details == ["3", words, words, "10.0 ± 0.0", "1.00", "1 ± 0", "0.01 ± 0.00", "1.0 ± 0.0"]
    # settings that differ are rows of their own, named by what differs; one run has no deviation
    assert cells(text, "SAGE (rand_pos 0.01)")[0] == ["74.00 (1)"]
    assert cells(text, "SAGE (rand_pos 1.0)")[0] == ["75.00 (1)"]
    assert cells(text, "SAGE (rand_pos 1.0)")[2][4] == "2.50"
    assert "SAGE (rand_pos 1.0): rand_pos 1.0, upper_lambda 0.6." in text
    assert "All: labels_per_class 500, initial_channels 16, epochs 4, learning_rate 0.2, schedule 2 3." in text
    assert not cells(text, "CutMix")
    assert cells(text, "cutmix_seed1") == [["unfinished", "2 of 4 epochs; best 60 %"]]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("summary.md", "summary.tex", "summary.csv", "differences.csv", "runs.csv"),
        *("curves.png", "curves.pdf", "cost.png", "cost.pdf"),
    }


def test_the_table_of_runs_says_what_the_folders_say(runs: Path, tmp_path: Path) -> None:
    write(runs, tmp_path / "one")
    write(tmp_path / "one" / "runs.csv", tmp_path / "two", runs)  # the same runs twice are the same runs
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    with open(tmp_path / "one" / "runs.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert row["command"] == "python3 main.py --data_dir [data_dir] --method vanilla --root_dir=[root_dir]"
    assert "/home" not in (tmp_path / "one" / "runs.csv").read_text()


def test_runs_that_differ_in_training_are_columns(tmp_path: Path) -> None:
    for name, values in {"epochs": (4, 2), "labels_per_class": (500, 50), "initial_channels": (16, 64)}.items():
        for value in values:
            make_run(
                tmp_path / name,
                "vanilla",
                1,
                70.0 + value / 100,
                done=value if name == "epochs" else 4,
                **{name: value},
            )
        groups, _ = grouped(read_roots([tmp_path / name]))
        assert [(group.column, len(group.runs)) for group in groups] == [
            (f"cifar10 × preactresnet18, {name} {value}", 1) for value in sorted(values)
        ]
    # a setting of the method that goes with the architecture is one row
    make_run(tmp_path / "paper", "sage", 1, 70.0, arch="wrn16_8", upper_lambda=0.7)
    make_run(tmp_path / "paper", "sage", 2, 71.0, upper_lambda=0.5)
    text = shown(tmp_path / "paper")
    assert cells(text, "SAGE")[0] == ["71.00 (1)", "70.00 (1)"]
    assert "SAGE (cifar10 × wrn16_8): upper_lambda 0.7." in text


def test_a_seed_counts_once(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "vanilla", 1, 70.0)
    make_run(tmp_path / "b", "vanilla", 1, 80.0)
    make_run(tmp_path / "b", "vanilla", 2, 71.0)
    (tmp_path / "b" / "vanilla_seed1").rename(tmp_path / "b" / "vanilla_seed1_later")
    make_run(tmp_path / "a", "vanilla", 1, 90.0, add_name="again")
    make_run(tmp_path / "old", "vanilla", 3, 10.0).rename(tmp_path / "a" / "vanilla_seed3.old-20260102-030405")
    text = shown(tmp_path / "a", tmp_path / "b")
    assert cells(text, "Vanilla")[0] == ["70.50 ± 0.71 (2)"]
    assert cells(text, "vanilla_seed1_later") == [["seed 1 is counted already", "final 80 %"]]
    assert cells(text, "Vanilla (“again”)")[0] == ["90.00 (1)"]  # --add_name keeps runs apart
    assert "old-2026" not in text


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", "{", "JSON"),
        ("config.json", "[]", "TypeError"),
        ("config.json", '{"settings": {}}', "method"),
        ("config.json", None, "no config.json"),
        ("metrics.csv", "epoch,test_top1\n0,70\n2,71\n", "skips an epoch"),
        ("metrics.csv", "epoch\n0\n1\n2\n3\n", "test_top1"),
        ("metrics.csv", None, "0 epochs"),
        ("metrics.csv", b"\xff\x00", "decode"),
        ("result.json", '{"final_top1": 12, "best_top1": 70}', "result.json ends at 12"),
        ("result.json", '{"final_top1": "many", "best_top1": 70}', "TypeError"),
        ("result.json", '{"final_top1": 70, "best_top1": 71}', "71 for the best"),
        ("evaluation/checkpoint.json", "{}", "summary"),
    ],
)
def test_damaged_folders_are_listed(tmp_path: Path, name: str, content: str | bytes | None, reason: str) -> None:
    make_run(tmp_path / "runs", "vanilla", 1)
    path = make_run(tmp_path / "runs", "vanilla", 2) / name
    path.parent.mkdir(exist_ok=True)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    text = shown(tmp_path / "runs")
    ((state, why),) = cells(text, "vanilla_seed2")
    assert state == "damaged"
    assert reason in why
    assert cells(text, "Vanilla")[0] == ["70.00 (1)"]
    write_table(tmp_path / "runs.csv", read_roots([tmp_path / "runs"]))
    assert shown(tmp_path / "runs.csv") == text


def evaluated(folder: Path, name: str = "checkpoint", images: int = 9, **changed: Any) -> None:
    """What scripts/evaluate.py leaves in a run's folder."""
    summary = {"clean_top1": 70.0, "corruption_error": 40.0, "fgsm4_top1": 12.0, "ece": 5.0}
    summary |= {key: changed.pop(key) for key in [*changed] if key in ROBUSTNESS}
    content = {"subset": images, "images": 40, "fgsm": [{}], "calibration": {"bins": 15}, "summary": summary}
    content |= {"corruptions": f"published arrays; {images} images, seed {images}", "epochs": 4}
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / "evaluation" / f"{name}.json").write_text(json.dumps(content | changed))


def test_robustness_is_shown_where_it_was_measured(tmp_path: Path) -> None:
    for seed in (1, 2):
        evaluated(make_run(tmp_path / "runs", "vanilla", seed), corruption_error=40.0 + seed)
    make_run(tmp_path / "runs", "vanilla", 3)
    text = shown(tmp_path / "runs")
    assert "| clean | corr. error | FGSM 4 | ECE |" in text
    assert cells(text, "Vanilla")[2][-3:] == ["41.50 ± 0.71 (2)", "12.00 ± 0.00 (2)", "5.00 ± 0.00 (2)"]
    assert (
        "; clean: 40 images; corruptions: published arrays; 9 images; FGSM: 9 images; calibration: 40 images, 15 bins."
        in text
    )


def test_robustness_of_another_kind_is_neither_averaged_nor_compared(tmp_path: Path) -> None:
    for seed in (1, 2):
        evaluated(make_run(tmp_path / "runs", "vanilla", seed))
    evaluated(make_run(tmp_path / "runs", "vanilla", 3), images=2, corruption_error=90.0, fgsm4_top1=90.0, ece=6.5)
    evaluated(make_run(tmp_path / "runs", "cutmix", 1), "model_best", ece=90.0)
    own = "corruptions made here (utils/robustness.py; not CIFAR-10-C); 9 images, seed 0"
    evaluated(make_run(tmp_path / "runs", "sage", 1), corruptions=own)
    text = write(tmp_path / "runs", tmp_path / "out")
    assert cells(text, "Vanilla")[2][-4:] == ["70.00 ± 0.00", "40.00 ± 0.00 (2)", "12.00 ± 0.00 (2)", "5.50 ± 0.87"]
    assert cells(text, "CutMix")[2][-4:] == ["–", "–", "–", "–"]
    assert cells(text, "SAGE")[2][-4:] == ["70.00", "–", "12.00", "5.00"]
    assert "(not shown: runs with made here (utils/robustness.py; not CIFAR-10-C); 9 images; published" in text
    with open(tmp_path / "out" / "summary.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    means = {name: row["corruption_error_mean"] for name, row in rows.items()}
    assert means == {"Vanilla": "40.0000", "CutMix": "", "SAGE": ""}
    of = ("seeds", "final_seeds", "corruption_error_seeds", "ece_seeds", "pgd4_top1_seeds")
    assert [rows["Vanilla"][name] for name in of] == ["3", "3", "2", "3", "0"]
    assert [rows["CutMix"][name] for name in of] == ["1", "1", "0", "0", "0"]


def test_fgsm_counts_whether_or_not_pgd_was_measured_too(tmp_path: Path) -> None:
    steps = {"steps": 10, "eps_of_255": 4, "step_size_of_255": 1, "restarts": 1}
    evaluated(make_run(tmp_path / "runs", "vanilla", 1), pgd=[steps], pgd4_top1=1.0, fgsm4_top1=10.0)
    evaluated(make_run(tmp_path / "runs", "vanilla", 2), fgsm4_top1=14.0)
    text = shown(tmp_path / "runs")
    assert cells(text, "Vanilla")[2][-3:] == ["12.00 ± 2.83", "1.00 (1)", "5.00 ± 0.00"]
    assert "FGSM: 9 images; PGD: 9 images, 10 steps of 0.25 eps, from 1 random start(s); calibration" in text


def test_what_was_measured_in_another_way_is_not_averaged(tmp_path: Path) -> None:
    """Of another test set, another checkpoint, fewer corruptions, another step."""
    steps = [{"steps": 10, "eps_of_255": eps, "step_size_of_255": eps / 4, "restarts": 1} for eps in (4, 8)]
    for seed in (1, 2):
        evaluated(make_run(tmp_path / "runs", "vanilla", seed), pgd=steps, pgd8_top1=1.0)
    small = make_run(tmp_path / "runs", "vanilla", 3)
    few = "published arrays, 3 of the benchmark's 15; 9 images, seed 0"
    other = [steps[0], steps[1] | {"step_size_of_255": 1}]
    evaluated(small, images=9, clean_top1=1.0, ece=90.0, corruptions=few, corruption_error=5.0, pgd=other, pgd8_top1=30)
    evaluation = small / "evaluation" / "checkpoint.json"
    evaluation.write_text(json.dumps(json.loads(evaluation.read_text()) | {"images": 20}))
    row = cells(shown(tmp_path / "runs"), "Vanilla")[2]
    assert row[-5:] == [f"{n} ± 0.00{of}" for n, of in zip(
        ("70.00", "40.00", "12.00", "1.00", "5.00"), (" (2)", " (2)", "", " (2)", " (2)"), strict=True
    )]  # fmt: skip


SHIFTED = {"images": 50, "classes": 2, "corruptions": 0, "bins": 15, "top1": 60.0, "drop": 10.0, "ece": 7.0}


def test_other_test_sets_are_a_table(tmp_path: Path) -> None:
    for method, top1 in (("vanilla", 60.0), ("sage", 65.0)):
        for seed in (1, 2):
            mine = SHIFTED | {"top1": top1 + seed, "digest": "abcdef0123", "drop": -1e-9}
            sets = {"mine": mine, "b": SHIFTED | {"drop": -10.0, "digest": "0"}}
            evaluated(make_run(tmp_path / "runs", method, seed), shift=sets)
    evaluated(make_run(tmp_path / "runs", "sage", 3), shift={"mine": SHIFTED | {"top1": 1.0, "digest": "another"}})
    text = write(tmp_path / "runs", tmp_path / "out")
    assert "| method | b | drop | ECE | mine | drop | ECE |" in text
    assert "; mine: 50 images, 2 classes, 15 bins, digest abcdef01; drop: from the own test set's images of the" in text
    vanilla, sage = (line for line in text.splitlines() if line.startswith(("| Vanilla | **60", "| SAGE | **60")))
    assert vanilla.count("**") == 10  # all but the accuracy on "mine"
    assert "| **−10.00 ± 0.00** |" in vanilla
    assert r"$-$10.00" in (tmp_path / "out" / "summary.tex").read_text()
    assert "**66.50 ± 0.71 (2)** | **0.00 ± 0.00 (2)** | **7.00 ± 0.00 (2)** |" in sage  # the other images do not count
    write(tmp_path / "out" / "runs.csv", tmp_path / "again", tmp_path / "runs")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    with open(tmp_path / "out" / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["shift mine top1_mean"] for row in rows] == ["61.5000", "66.5000"]
    assert [row["shift b drop_mean"] for row in rows] == ["-10.0000", "-10.0000"]  # CSV keeps the ASCII sign


def told(folder: Path, **content: Any) -> Path:
    """More in a run's config.json."""
    records.write_json(folder / "config.json", records.read_json(folder / "config.json") | content)
    return folder


def test_runs_on_other_images_or_from_other_weights_are_not_averaged(tmp_path: Path) -> None:
    digests = {"train": "1" * 32, "test": "2" * 32}
    for seed in (1, 2):
        told(make_run(tmp_path / "runs", "vanilla", seed, 70.0 + seed), digests=digests, origin=None)
    told(make_run(tmp_path / "runs", "vanilla", 3, 80.0), digests=digests | {"train": "3" * 32}, origin=None)
    told(make_run(tmp_path / "runs", "vanilla", 4, 90.0), digests=digests, origin="4" * 32)
    text = shown(tmp_path / "runs")
    assert "train_digest 11111111 | cifar10 × preactresnet18, train_digest 33333333 |" in text
    assert cells(text, "Vanilla")[0] == ["71.50 ± 0.71 (2)", "80.00 (1)"]
    assert cells(text, "Vanilla (begun from 44444444)")[0] == ["90.00 (1)", "–"]


def test_runs_of_older_versions_are_averaged_with_those_they_may_be_of(tmp_path: Path) -> None:
    digests = {"train": "1" * 32, "test": "2" * 32}
    folder = make_run(tmp_path / "runs", "vanilla", 1, 70.0, labels_per_class=None)
    told(folder, digests=digests)  # today's: no image was left out
    make_run(tmp_path / "runs", "vanilla", 2, 71.0, labels_per_class=5000)
    make_run(tmp_path / "runs", "vanilla", 3, 60.0, learning_rate=0.1)
    text = shown(tmp_path / "runs")
    assert cells(text, "Vanilla")[0] == ["60.00 (1)", "70.50 ± 0.71 (2)"]
    # it could be of either of two sets of images: then of neither
    told(make_run(tmp_path / "runs", "vanilla", 4, 80.0, labels_per_class=None), digests=digests | {"train": "3" * 32})
    assert sorted(cells(shown(tmp_path / "runs"), "Vanilla")[0]) == ["60.00 (1)", "70.00 (1)", "71.00 (1)", "80.00 (1)"]


def test_an_evaluation_of_another_test_set_does_not_count(tmp_path: Path) -> None:
    digests = {"train": "1" * 32, "test": "2" * 32}
    for seed, test in ((1, {"test_digest": "2" * 32}), (2, {"test_digest": "5" * 32}), (3, {})):
        evaluated(told(make_run(tmp_path / "runs", "vanilla", seed), digests=digests), ece=5.0 + seed, **test)
    text = write(tmp_path / "runs", tmp_path / "out")
    assert cells(text, "Vanilla")[2][-1] == "7.00 ± 1.41 (2)"
    assert "vanilla_seed2: checkpoint.json is of another test set than the run's own, and left out." in text
    assert "vanilla_seed3: checkpoint.json, of an older version, does not say whether its test set is the run's" in text


def test_runs_without_digests_count_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "runs", "vanilla", 1)
    assert "\n1 run on " in write(tmp_path / "runs", tmp_path / "out")
    assert "warning: 1 runs are of an older version" in capsys.readouterr().err
    table = (tmp_path / "out" / "runs.csv").read_text()
    old = table.replace(",train_digest,test_digest,begun_from", "", 1).replace(" 70,,,", " 70")
    assert old != table
    (tmp_path / "old.csv").write_text(old)
    assert read_roots([tmp_path / "old.csv"]) == read_roots([tmp_path / "runs"])


def test_with_a_validation_set_the_best_epoch_is_its_choice(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs", "vanilla", 1)
    rows = [dict.fromkeys(records.COLUMNS, 1.0) for _ in range(4)]
    for i, (row, valid, test) in enumerate(zip(rows, (50, 72, 71, 70), (50, 69, 70, 72), strict=True)):
        row.update(epoch=i, valid_top1=float(valid), test_top1=float(test))  # type: ignore[arg-type]
    records.write_metrics(folder / "metrics.csv", rows)
    final = records.final_accuracy(rows)[0]
    for best in (69, 72):  # a run of an older version took the highest
        records.write_json(folder / "result.json", {"final_top1": final, "best_top1": best})
        (row,) = read_roots([tmp_path / "runs"])
        assert (row["state"], row["best"], row["best_epoch"]) == ("finished", "69", "1")


def test_runs_on_other_test_images_are_not_averaged(tmp_path: Path) -> None:
    for seed, images in ((1, 40), (2, 20)):
        folder = make_run(tmp_path / "runs", "vanilla", seed)
        config = records.read_json(folder / "config.json")
        records.write_json(folder / "config.json", config | {"images": {"train": 100, "test": images}})
    text = shown(tmp_path / "runs")
    assert "| cifar10 × preactresnet18, test_images 20 | cifar10 × preactresnet18, test_images 40 |" in text
    assert cells(text, "Vanilla")[0] == ["70.00 (1)", "70.00 (1)"]


def test_an_evaluation_before_the_end_of_the_run_does_not_count(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs", "vanilla", 1)
    evaluated(folder, epochs=2)
    assert "corr. error" not in shown(tmp_path / "runs")
    evaluated(folder, "model_best", epochs=2)  # is of an epoch before the last by its nature
    assert "FGSM: 9 images (model_best)" in shown(tmp_path / "runs")


def test_the_best_is_bold_where_it_is_of_as_many_seeds(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_run(tmp_path / "runs", "vanilla", seed, 70.0)
        make_run(tmp_path / "runs", "input", seed, 70.0)
    assert shown(tmp_path / "runs").count("**70.00 ± 0.00 (2)**") == 4  # final and best of both
    make_run(tmp_path / "runs", "sage", 1, 72.0)
    assert "**" not in shown(tmp_path / "runs")


def three_methods(root: Path) -> Path:
    """Vanilla, a method that is ahead of it for every seed by nearly the same, and one that is not, and one of one
    seed."""
    for seed, top1 in enumerate((70.0, 71.0, 73.5), 1):
        make_run(root, "vanilla", seed, top1)
        make_run(root, "input", seed, top1 + 2 + seed / 100)
        make_run(root, "cutmix", seed, 74.0 + (seed == 2))
    make_run(root, "puzzle", 1, 60.0)
    return root


@pytest.mark.parametrize(
    ("p", "shown"),
    [
        (0.0004, "< 0.001"),
        (0.02, "0.020"),
        (0.0497, "0.0497"),
        (0.04999, "0.0499"),
        (0.05, "0.050"),
        (0.9, "0.900"),
        (math.nan, "–"),
    ],
)
def test_a_p_value_is_not_rounded_across_the_level(p: float, shown: str) -> None:
    assert summarize.small(p) == shown


def test_a_difference_that_does_not_vary_is_explained(tmp_path: Path) -> None:
    for seed, top1 in enumerate((70.0, 71.0, 73.5), 1):
        make_run(tmp_path / "runs", "vanilla", seed, top1)
        make_run(tmp_path / "runs", "input", seed, top1 + 0.05)
    text = write(tmp_path / "runs", tmp_path / "out")
    assert "**71.55" in text
    assert "**71.50" not in text
    assert "A difference that is the same for every seed has no p-value; it counts as told." in text
    assert "p-values against it" not in text  # of two rows: a two-sided test asks for nothing else


def test_only_what_is_compared_with_the_best_speaks_of_it(tmp_path: Path) -> None:
    """The best is of one seed, so that the only differences are from vanilla."""
    for seed in (1, 2):
        make_run(tmp_path / "runs", "vanilla", seed, 70.0 + seed)
        make_run(tmp_path / "runs", "input", seed, 69.0 + seed * 2)
    make_run(tmp_path / "runs", "cutmix", 1, 80.0)
    text = write(tmp_path / "runs", tmp_path / "out")
    assert "difference from Vanilla" in text
    assert "p-values against it" not in text


def test_differences_from_the_best_and_from_vanilla(tmp_path: Path) -> None:
    text = write(three_methods(tmp_path / "runs"), tmp_path / "out")
    section = text[text.index(", final: difference from") : text.index("Each test in these tables is two-sided")]
    against_best, against_vanilla = section.split("difference from")[1:]
    assert against_best.startswith(" CutMix, the best, in points")
    assert against_vanilla.startswith(" Vanilla, in points")
    # paired: differences −4, −4, −0.5 and 2.01, 2.02, 2.03, whose interval is 2.02 ± 4.3027·0.01/√3
    assert cells(against_best, "Vanilla")[0] == ["−2.83", "−7.85 to +2.19", "0.272", "paired, 3 seeds"]
    assert cells(against_vanilla, "Mixup")[0] == ["+2.02", "+2.00 to +2.04", "\\< 0.001", "paired, 3 seeds"]
    assert cells(against_vanilla, "Puzzle Mix")[0] == ["–", "–", "–", "too few seeds"]
    assert "best was chosen from the same numbers" in text
    with open(tmp_path / "out" / "differences.csv", newline="") as file:
        rows = {(row["measure"], row["against"], row["method"]): row for row in csv.DictReader(file)}
    row = rows["final", "vanilla", "Mixup"]
    assert float(row["p_holm"]) == pytest.approx(2 * float(row["p"]), rel=1e-4)
    assert (row["reference"], row["difference"], row["test"]) == ("Vanilla", "2.02", "paired, 3 seeds")
    assert rows["final", "best", "Vanilla"]["reference"] == "CutMix"
    assert rows["best", "vanilla", "Puzzle Mix"]["p"] == ""
    latex = (tmp_path / "out" / "summary.tex").read_text()
    assert r"CutMix & $-$2.83" not in latex
    below = latex[latex.index(r"\parbox{\linewidth}{\footnotesize Each test in these tables is two-sided") :]
    assert below[: below.index("\n")].endswith("}")
    assert below.splitlines()[1] == r"\end{table}"  # in the float, not as a comment
    assert r"Vanilla & $-$2.83 & $-$7.85 to +2.19 & 0.272 & paired, 3 seeds \\" in latex


def test_bold_is_what_cannot_be_told_from_the_best(tmp_path: Path) -> None:
    text = shown(three_methods(tmp_path / "runs"))
    final = text[: text.index("Test accuracy in %, best epoch")]
    bold = [line.split("|")[1].strip() for line in final.splitlines() if "**" in line]
    assert bold == ["Vanilla", "Mixup", "CutMix"]
    assert "3 of 3 (paired" in final
    assert "not that they are equal" in final
    for seed in (4, 5, 6, 7, 8):  # more seeds tell it from the others
        make_run(tmp_path / "runs", "cutmix", seed, 74.0)
        make_run(tmp_path / "runs", "vanilla", seed, 70.0 + seed / 10)
    assert cells(shown(tmp_path / "runs"), "Vanilla")[0] == ["70.94 ± 1.08 (8)"]
    assert "**70.94" not in shown(tmp_path / "runs")


def test_one_seed_each_is_neither_bold_nor_compared(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "vanilla", 1, 70.0)
    make_run(tmp_path / "runs", "sage", 1, 72.0)
    text = write(tmp_path / "runs", tmp_path / "out")
    assert "**" not in text
    assert "difference from" not in text
    assert "Nothing is bold where the highest mean, or every other, is of one seed" in text


def test_less_is_better_for_errors(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        evaluated(make_run(tmp_path / "runs", "vanilla", seed), corruption_error=40.0 + seed / 10, ece=20 + seed / 10)
        evaluated(make_run(tmp_path / "runs", "sage", seed), corruption_error=30.0 + seed / 9, ece=30 - seed / 10)
    text = write(tmp_path / "runs", tmp_path / "out")
    vanilla, sage = (line for line in text.splitlines() if line.startswith(("| Vanilla | 3", "| SAGE | 3")))
    assert "**30.22 ± 0.11**" in sage
    assert "**40." not in vanilla
    assert "**20.20 ± 0.10**" in vanilla
    with open(tmp_path / "out" / "differences.csv", newline="") as file:
        best = {row["measure"]: row["reference"] for row in csv.DictReader(file) if row["against"] == "best"}
    assert (best["corruption_error"], best["ece"]) == ("SAGE", "Vanilla")


def test_wide_tables_are_broken_for_latex(tmp_path: Path) -> None:
    for arch in ("preactresnet18", "wrn16_8", "resnext29_4_24", "preactresnet34", "preactresnet50"):
        for seed in (1, 2):
            make_run(tmp_path / "runs", "sage", seed, rand_pos=0.5, upper_lambda=0.25, arch=arch)
    latex = summarize.latex(summarize.sections(read_roots([tmp_path / "runs"])), ["final"])
    tabulars = re.findall(
        r"\\begin{tabular}{(l r*)}.*?\\midrule\n(.*?)\n\\bottomrule".replace(" ", ""), latex, re.DOTALL
    )
    assert sum(len(columns) - 1 for columns, _ in tabulars) == 5
    assert len(tabulars) > 1
    assert all(rows.startswith("SAGE & ") for _, rows in tabulars)
    assert latex.count(r"\caption") == 1
    assert "resizebox" not in latex


def test_a_ninth_method_needs_no_line_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Ninth(METHODS["input"]):  # type: ignore[misc]
        name: ClassVar[str] = "ninth"
        title: ClassVar[str] = "Ninth Mix"

    monkeypatch.setitem(METHODS, "ninth", Ninth)
    make_run(tmp_path / "runs", "vanilla", 1)
    make_run(tmp_path / "runs", "ninth", 1, 75.0)
    assert cells(write(tmp_path / "runs", tmp_path / "out"), "Ninth Mix")[0] == ["75.00 (1)"]
    looks = [summarize.look(name) for name in METHODS]
    assert len(set(looks)) == len(METHODS)


def test_linked_folders_count_and_what_cannot_be_read_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, store = tmp_path / "runs", tmp_path / "store"
    root.mkdir()
    for seed, top1 in ((1, 70.0), (2, 71.0)):
        make_run(store, "vanilla", seed, top1)
    (root / "linked").symlink_to(store / "vanilla_seed1")
    (root / "all").symlink_to(store)
    (root / "loop").symlink_to(root)
    (root / "gone").symlink_to(tmp_path / "nowhere")
    closed = root / "closed"
    closed.mkdir()
    scandir = os.scandir

    def refuse(path: Any) -> Any:  # root may read everything
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    text = shown(root)
    assert cells(text, "Vanilla")[0] == ["70.50 ± 0.71 (2)"]
    assert cells(text, "closed") == [["damaged", "Permission denied"]]
    assert cells(text, "gone") == [["damaged", f"a link to {tmp_path / 'nowhere'}, which cannot be reached"[:120]]]
    assert not cells(text, "loop")


def test_damaged_folders_of_one_name_are_all_listed(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        make_run(tmp_path / folder, "vanilla", 1)
        (tmp_path / folder / "vanilla_seed1" / "config.json").write_text("{")
    assert len(cells(shown(tmp_path), "vanilla_seed1")) == 2


def test_pictures_of_many_settings_show_what_one_can_look_at(tmp_path: Path) -> None:
    (row,) = read_roots([make_run(tmp_path / "runs", "vanilla", 1)])
    rows = [row | {"learning_rate": str(i), "method": method} for i in range(20) for method in ("vanilla", "sage")]
    kept, line = summarize.pictured(grouped(rows)[0])
    assert (len(kept), line) == (18, "9 of 20 settings, those with the most methods")
    sages = [row | {"method": "sage", "settings": f"rand_pos={i}", "final": str(i)} for i in range(50)]
    kept, line = summarize.pictured(grouped([row, *sages])[0])
    assert line == "24 of 51 methods, those with the highest accuracy"
    assert [group.label for group in kept] == ["Vanilla", *(f"SAGE (rand_pos {i})" for i in range(27, 50))]


@pytest.mark.parametrize(
    "values",
    [
        {"curve": "50 70 70"},
        {"epochs_done": "3", "curve": "50 70 70"},
        {"start_epoch": "x"},
        {"start_epoch": "1"},
        {"final": "71 72"},
        {"final": "170"},
        {"best": "-1"},
        {"date": ""},
        {"seconds_per_epoch": "0"},
        {"state": "damaged"},
    ],
    ids=str,
)
def test_tables_that_were_edited_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, str]
) -> None:
    make_run(tmp_path / "runs", "vanilla", 1)
    (row,) = read_roots([tmp_path / "runs"])
    write_table(tmp_path / "runs.csv", [row | values])
    assert summarize.main([str(tmp_path / "runs.csv"), "--out", str(tmp_path / "out")]) == 1
    assert "line 2, is no run" in capsys.readouterr().err


UNTIMED = dict.fromkeys(TIMES, "")


def test_a_table_may_leave_out_times(tmp_path: Path) -> None:
    for method in ("vanilla", "cutmix"):
        make_run(tmp_path / "runs", method, 1)
    vanilla, cutmix = read_roots([tmp_path / "runs"])
    write_table(tmp_path / "runs.csv", [vanilla, cutmix | UNTIMED])
    assert summarize.main([str(tmp_path / "runs.csv"), "--out", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "summary.md").read_text().splitlines()
    costs = {cells[1]: cells[5:9] for line in lines if len(cells := [c.strip() for c in line.split("|")]) > 10}
    assert costs["CutMix"] == ["–"] * 4
    assert "–" not in costs["Vanilla"]
    groups, _ = grouped([vanilla | UNTIMED, cutmix])
    assert all(math.isnan(relative_cost(group, groups)) for group in groups)
    assert (tmp_path / "out" / "cost.png").exists()
    write_table(tmp_path / "runs.csv", [cutmix | UNTIMED])
    assert summarize.main([str(tmp_path / "runs.csv"), "--out", str(tmp_path / "none")]) == 0
    assert not (tmp_path / "none" / "cost.png").exists()
    header = "| method | seeds | final | best | GB |"
    assert header in (tmp_path / "none" / "summary.md").read_text()
    write_table(tmp_path / "runs.csv", [cutmix | {"hours": ""}])  # one of them alone
    assert summarize.main([str(tmp_path / "runs.csv"), "--out", str(tmp_path / "out")]) == 1


def test_of_two_rows_of_one_run_the_one_with_times_counts(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "vanilla", 1)
    (row,) = read_roots([tmp_path / "runs"])
    write_table(tmp_path / "runs.csv", [row | UNTIMED])
    for roots in (["runs.csv", "runs"], ["runs", "runs.csv"]):
        assert read_roots([tmp_path / root for root in roots]) == [row]
    write_table(tmp_path / "runs.csv", [row | UNTIMED | {"commit": "another"}])  # then it is another run
    assert len(read_roots([tmp_path / "runs.csv", tmp_path / "runs"])) == 2


def test_costs_are_plotted_of_runs_that_count(tmp_path: Path) -> None:
    """The one run that has times is a second one of its seed."""
    make_run(tmp_path / "runs", "vanilla", 1)
    (row,) = read_roots([tmp_path / "runs"])
    write_table(tmp_path / "runs.csv", [row | UNTIMED, row | {"date": "2026-02-03 04:05:06"}])
    assert "| seeds | final | best | GB |" in write(tmp_path / "runs.csv", tmp_path / "out")
    assert not list((tmp_path / "out").glob("cost.*"))


def test_pictures_of_an_earlier_call_do_not_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "runs", "vanilla", 1)
    make_run(tmp_path / "empty", "vanilla", 1, done=0)
    (row,) = read_roots([tmp_path / "runs"])
    write_table(tmp_path / "runs.csv", [row | UNTIMED])
    out = tmp_path / "out"
    tables = {"summary.md", "summary.tex", "summary.csv", "differences.csv", "runs.csv"}
    curves, mine = {"curves.png", "curves.pdf"}, {"cost.svg", "curves.txt", "costs.png", "summary.docx"}
    out.mkdir()
    for name in mine:
        (out / name).write_text("of somebody else")
    for root, pictures in (("runs", curves | {"cost.png", "cost.pdf"}), ("runs.csv", curves), ("empty", set())):
        capsys.readouterr()
        write(tmp_path / root, out)
        assert {path.name for path in out.iterdir()} == mine | tables | pictures
        listed = capsys.readouterr().out.splitlines()
        assert {Path(line).name for line in listed if line.startswith(str(out))} == tables | pictures


def test_times_of_fewer_seeds_say_of_how_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(summarize, "save", lambda figure, path, left_out: figures.update({path.name: figure}))
    for seed in (1, 2, 3):
        make_run(tmp_path / "runs", "vanilla", seed)
        make_run(tmp_path / "runs", "cutmix", seed, seconds=15)
    rows = read_roots([tmp_path / "runs"])
    for row in rows:
        row |= UNTIMED if (row["method"], row["seed"]) in {("cutmix", "2"), ("cutmix", "3")} else {}
    write_table(tmp_path / "runs.csv", rows)
    text = write(tmp_path / "runs.csv", tmp_path / "out")
    assert cells(text, "CutMix")[-1][3:] == ["15.0 (1)", "1.50 (1)", "1 (1)", "0.02 (1)", "1.0 ± 0.0"]
    assert cells(text, "Vanilla")[-1][3:5] == ["10.0 ± 0.0", "1.00"]
    (panel,) = figures["cost"].axes
    assert panel.get_legend_handles_labels()[1] == ["Vanilla", "CutMix, times of 1 of 3 seeds"]
    # on another device there is no ratio to count
    for row in rows:
        row |= {"device": row["method"]}
    write_table(tmp_path / "runs.csv", rows)
    assert cells(write(tmp_path / "runs.csv", tmp_path / "out"), "CutMix")[-1][3:5] == ["15.0 (1)", "–"]


def test_tables_of_a_spreadsheet_are_read(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "vanilla", 1, dataset="digits")
    write_table(tmp_path / "runs.csv", read_roots([tmp_path / "runs"]))
    content = (tmp_path / "runs.csv").read_bytes()
    (tmp_path / "marked.csv").write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert read_roots([tmp_path / "marked.csv"]) == read_roots([tmp_path / "runs"])
    (tmp_path / "short.csv").write_bytes(content.replace(b"dataset,", b"data,", 1))
    with pytest.raises(UserError, match="no column dataset"):
        read_roots([tmp_path / "short.csv"])


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "vanilla", 1)
    make_run(tmp_path / "runs", "vanilla", 2, add_name="a_b|50%&$x<!-- {~^#\\")
    text = shown(tmp_path / "runs")
    assert "a_b\\|50%&\\$x\\<!-- {~^#\\\\" in text
    latex = summarize.latex(summarize.sections(read_roots([tmp_path / "runs"])), summarize.SECTIONS)
    expected = r"a\_b$|$50\%\&\$x$<$!-- \{\textasciitilde{}\textasciicircum{}\#\textbackslash{}"
    assert expected in latex
    for line in latex.splitlines():
        assert line.startswith("%") or not re.search(r"(?<!\\)[_&%#](?! )", line), line
        assert line.startswith("%") or line.isascii(), line
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == 3
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == latex.count(r"\end{tabular}") == 4


def test_folders_that_say_nonsense_are_listed(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "vanilla", 1)
    for seed, (name, value) in enumerate([("started", ""), ("started", 5), ("device", ["a"])], start=2):
        path = make_run(tmp_path / "runs", "vanilla", seed) / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    slow = make_run(tmp_path / "runs", "vanilla", 5, seconds=0)
    (slow / "metrics.csv").touch()
    high = make_run(tmp_path / "runs", "vanilla", 6, top1=170)
    long = make_run(tmp_path / "runs", "vanilla", 7)
    (long / "metrics.csv").write_text((long / "metrics.csv").read_text().replace("\n3,", "\n3,0,0,"))
    assert high.exists()
    text = shown(tmp_path / "runs")
    assert [cells(text, f"vanilla_seed{seed}")[0][0] for seed in range(2, 8)] == ["damaged"] * 6
    assert cells(text, "Vanilla")[0] == ["70.00 (1)"]


def test_nothing_finished_makes_no_tables(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "vanilla", 1, done=2)
    text = write(tmp_path / "runs", tmp_path / "out")
    assert text.startswith("No run is finished")
    assert "| method |" not in text
    assert cells(text, "vanilla_seed1")[0][0] == "unfinished"


def test_texts_are_refreshed(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    write_table(tmp_path / "results" / "runs.csv", read_roots([runs]))
    text = tmp_path / "RESULTS.md"
    text.write_text(
        "Prose.\n\n<!-- summarize results/runs.csv final settings -->\nold\n<!-- /summarize -->\n\nMore.\n\n"
        "<!-- summarize results/*.csv best -->\n<!-- /summarize -->\n"
    )
    assert summarize.main(["--refresh", str(text)]) == 0
    first = text.read_text()
    assert first.startswith("Prose.\n\n<!-- summarize results/runs.csv final settings -->\n\nTest accuracy")
    assert "\n\nMore.\n\n" in first
    assert "\nold\n" not in first
    assert len(cells(first, "Vanilla")) == 2
    assert "All: labels_per_class 500" in first
    assert summarize.main(["--refresh", str(text)]) == 0
    assert text.read_text() == first


def test_settings_without_a_value_are_left_out(tmp_path: Path) -> None:
    make_run(tmp_path, "vanilla", 1, labels_per_class=None)
    assert "\nAll: initial_channels 16, epochs 4, learning_rate 0.2, schedule 2 3.\n" in shown(tmp_path)


@pytest.mark.parametrize("epochs", [1, 4, 21])
def test_curves_have_ticks_at_whole_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(summarize, "save", lambda figure, path, left_out: figures.append(figure))
    make_run(tmp_path, "vanilla", 1, done=epochs, epochs=epochs)
    summarize.plot_curves(grouped(read_roots([tmp_path]))[0], tmp_path / "curves")
    (panel,) = figures[0].axes
    for axes in (panel, *panel.child_axes):
        assert all(tick == round(tick) for tick in axes.get_xticks())


@pytest.mark.parametrize("name", ["RESULTS.md", "README.md"])
def test_committed_results_are_what_their_tables_say(name: str) -> None:
    path = ROOT / name
    if not path.exists() or "<!-- summarize " not in path.read_text(encoding="utf-8"):
        pytest.skip(f"no tables in {name}")
    assert summarize.refreshed(path) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (2, "", "name a folder"),
        (2, "--unknown 1", "--unknown"),
        (1, "nowhere", "there is no nowhere"),
        (1, "EMPTY", "holds no run"),
        (1, "BAD.csv", "no column dataset"),
        (1, "RUNS --out BAD.csv", "BAD.csv"),
        (1, "--refresh nowhere.md", "nowhere.md"),
        (1, "--refresh OPEN.md", "each closed"),
    ],
)
def test_errors_cost_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, words: str, message: str
) -> None:
    make_run(tmp_path / "RUNS", "vanilla", 1)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BAD.csv").write_text("method,seed,state\nvanilla,one,unfinished\n")
    (tmp_path / "OPEN.md").write_text("<!-- summarize a.csv -->\n")
    known = {path.name for path in tmp_path.iterdir()}
    try:
        left = summarize.main([str(tmp_path / word) if word in known else word for word in words.split()])
    except SystemExit as stopped:
        left = stopped.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert left == code, error
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("seed", ["01", "1.0", " 1"])
def test_one_seed_cannot_be_written_in_two_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: str) -> None:
    make_run(tmp_path / "runs", "vanilla", 1)
    write_table(tmp_path / "runs.csv", read_roots([tmp_path / "runs"]))
    text = (tmp_path / "runs.csv").read_text()
    (tmp_path / "runs.csv").write_text(text.replace(",vanilla,1,", f",vanilla,{seed},"))
    assert summarize.main([str(tmp_path / "runs.csv"), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "runs.csv" in error
    assert error.count("\n") == 1


def test_runs_of_the_program(tree: Path, tmp_path: Path) -> None:
    words = [
        *SMALL,
        "--data_dir",
        tree,
        "--root_dir",
        tmp_path / "runs",
        "--epochs",
        2,
        "--schedule",
        1,
        "--gammas",
        0.1,
    ]
    main(*words)
    main(*words, *SAGE)
    (left,) = (tmp_path / "runs").glob("*sage*")
    finals = [json.loads(path.read_text())["final_top1"] for path in (tmp_path / "runs").glob("*/result.json")]
    text = write(tmp_path / "runs", tmp_path / "out")
    assert {cells(text, label)[0][0] for label in ("Vanilla", "SAGE")} == {f"{final:.2f} (1)" for final in finals}
    assert "SAGE: rand_pos 0.01, update_ratio 0.7, upper_lambda 0.6." in text
    (left / "result.json").unlink()
    assert cells(shown(tmp_path / "runs"), left.name)[0][0] == "unfinished"
    assert str(tmp_path) not in (tmp_path / "out" / "runs.csv").read_text()


def test_a_terminal_without_the_signs_gets_a_table(runs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "scripts/summarize.py", str(runs), "--out", str(tmp_path / "out")]
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| Vanilla |" in done.stdout
