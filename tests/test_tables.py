"""utils/tables.py: reading runs from folders and tables, what is averaged, and tests over seeds."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy import stats

from tests.made_runs import DIGESTS, change, evaluated, make_run, write_metrics
from utils.errors import UserError
from utils.tables import PLAIN, compare, counted, difference, holm, read_runs, write_runs

QUANTILE = 4.302653  # 97.5% of Student's t with 2 degrees of freedom


def labels(*roots: Path) -> list[tuple[str, str, int]]:
    """Table, row and number of runs that are averaged."""
    whole, _ = counted(read_runs(roots))
    return [(*names, len(runs)) for names, runs in whole.groupby(["table", "label"], sort=False)]  # type: ignore[misc]


def measured(*roots: Path) -> dict[str, list[float]]:
    """The measurements of evaluations, by column."""
    runs = read_runs(roots)
    return {name: runs[name].dropna().tolist() for name in runs.columns if " [" in name}


def test_a_run_is_a_row(tmp_path: Path) -> None:
    make_run(tmp_path, "sage", 3, 74.5, seconds=15, rand_pos=0.01, upper_lambda=0.6)
    (row,) = read_runs([tmp_path]).to_dict("records")
    expected = {
        "dataset": "cifar10", "method": "sage", "seed": 3, "settings": "rand_pos=0.01 upper_lambda=0.6",
        "schedule": "2 3", "fast": "True", "start_epoch": "", "test_images": "40", "classes": "2",
        "train_digest": "1" * 32, "state": "finished", "epochs_done": 4, "final": 74.5, "best": 74.5, "best_epoch": 1,
        "seconds_per_epoch": 15, "images_per_second": 1, "peak_memory_gb": 1, "curve": [54.5, 74.5, 74.5, 74.5],
        "command": "python3 main.py --data_dir [data_dir] --method sage --root_dir=[root_dir]",
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected
    assert row["hours"] == pytest.approx(60 / 3600)


def test_a_table_of_runs_says_what_the_folders_say(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs", "vanilla", 1)
    evaluated(folder, "calibration", {"ece": 9.7330335661714}, how={"bins": 15})
    make_run(tmp_path / "runs", "cutmix", 1, done=2)
    make_run(tmp_path / "runs", "sage", 1) and change(tmp_path / "runs" / "sage_seed1", settings={})
    runs = read_runs([tmp_path / "runs"])
    write_runs(tmp_path / "runs.csv", runs)
    pd.testing.assert_frame_equal(read_runs([tmp_path / "runs.csv"]), runs)
    assert len(counted(read_runs([tmp_path / "runs.csv", tmp_path / "runs"]))[0]) == 1  # named twice
    runs.loc[:, ["seconds_per_epoch", "images_per_second", "hours"]] = math.nan
    write_runs(tmp_path / "untimed.csv", runs)
    for roots in (["untimed.csv", "runs"], ["runs", "untimed.csv"]):
        whole, _ = counted(read_runs([tmp_path / root for root in roots]))
        assert whole["seconds_per_epoch"].tolist() == [10]  # of one run the row with times


@pytest.mark.parametrize(
    ("name", "values"), [("labels_per_class", (50, 500)), ("schedule", ([1, 2], [2, 3])), ("fast", (False, True))]
)
def test_runs_that_differ_in_training_are_tables_of_their_own(tmp_path: Path, name: str, values: Any) -> None:
    for value in values:
        make_run(tmp_path, "vanilla", 1, **{name: value})
    texts = {"schedule": ("1 2", "2 3"), "fast": ("–", "True")}.get(name, values)
    assert labels(tmp_path) == [(f"cifar10, preactresnet18, {name} {text}", "Vanilla", 1) for text in texts]


def test_rows_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_run(tmp_path, "sage", seed, rand_pos=0.01, upper_lambda=0.6)
    assert labels(tmp_path) == [("cifar10, preactresnet18", "SAGE", 2)]
    make_run(tmp_path, "sage", 1, rand_pos=1.0, upper_lambda=0.6)
    make_run(tmp_path, "vanilla", 1)
    make_run(tmp_path, "vanilla", 1, 90.0, add_name="again")
    change(make_run(tmp_path, "vanilla", 3), origin="4" * 32)
    names = [(label, count) for _, label, count in labels(tmp_path)]
    assert sorted(names) == sorted([
        ("Vanilla", 1), ("Vanilla (“again”)", 1), ("Vanilla (initialised from 44444444)", 1),
        ("SAGE (rand_pos 0.01)", 2), ("SAGE (rand_pos 1)", 1),
    ])  # fmt: skip


def test_runs_on_other_images_are_not_averaged(tmp_path: Path) -> None:
    make_run(tmp_path, "vanilla", 1)
    for seed, split in ((2, "train"), (3, "test")):
        change(make_run(tmp_path, "vanilla", seed), digests=DIGESTS | {split: "3" * 32})
    change(make_run(tmp_path, "vanilla", 4), images={"train": 100, "test": 20})
    assert [count for *_, count in labels(tmp_path)] == [1] * 4


def test_of_two_runs_of_a_seed_the_first_counts(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "vanilla", 1, 80.0)
    change(make_run(tmp_path / "b", "vanilla", 1, 70.0), started="2026-01-01 00:00:00")
    make_run(tmp_path / "b", "vanilla", 2, 71.0)
    make_run(tmp_path / "old", "vanilla", 3).rename(tmp_path / "a" / "vanilla_seed3.old-20260102-030405")
    whole, left_out = counted(read_runs([tmp_path / "a", tmp_path / "b"]))
    assert whole["final"].tolist() == [70, 71]
    assert left_out[["final", "why"]].to_numpy().tolist() == [[80, "its seed is counted already"]]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", "{", "config.json"),
        ("config.json", '{"settings": {}}', "method"),
        ("config.json", None, "config.json"),
        ("config.json", '{"settings": {"method": "sagee", "dataset": "cifar10"}}', "sagee"),
        ("metrics.csv", "epoch,test_top1\n0,70\n2,71\n", "skips an epoch"),
        ("metrics.csv", "epoch\n0\n1\n2\n3\n", "top1"),
        ("metrics.csv", None, "final is 70"),
        ("metrics.csv", b"\xff\x00", "decode"),
        ("result.json", '{"final_top1": 12, "best_top1": 70}', "final is 12"),
        ("result.json", '{"final_top1": "many", "best_top1": 70}', "TypeError"),
        ("result.json", '{"final_top1": 70, "best_top1": 71}', "best is 71"),
        ("evaluation/results.jsonl", "{}\n", "set"),
    ],
)
def test_damaged_folders_are_named(tmp_path: Path, name: str, content: str | bytes | None, reason: str) -> None:
    make_run(tmp_path, "vanilla", 1)
    path = make_run(tmp_path, "vanilla", 2) / name
    path.parent.mkdir(exist_ok=True)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    whole, left_out = counted(read_runs([tmp_path]))
    assert whole["run"].tolist() == ["vanilla_seed1"]
    assert left_out[["run", "why"]].to_numpy().tolist() == [["vanilla_seed2", "damaged"]]
    assert reason in left_out["note"].item()


def test_links_are_followed_once(tmp_path: Path) -> None:
    make_run(tmp_path / "store", "vanilla", 1)
    (tmp_path / "runs").mkdir()
    for name, target in {"one": "store/vanilla_seed1", "all": "store", "loop": "runs"}.items():
        (tmp_path / "runs" / name).symlink_to(tmp_path / target)
    assert len(read_runs([tmp_path / "runs"])) == 1


def test_with_a_validation_set_the_best_epoch_is_its_choice(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs", "vanilla", 1)
    write_metrics(folder, [50, 69, 70, 72], valid=[50, 72, 71, 70])
    runs = read_runs([tmp_path / "runs"])
    assert runs[["state", "best", "best_epoch", "best_on"]].to_numpy().tolist() == [["finished", 69, 1, "validation"]]
    write_runs(tmp_path / "runs.csv", runs)
    assert len(read_runs([tmp_path / "runs.csv"])) == 1


def test_each_way_of_measuring_is_a_column(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "vanilla", 1)
    evaluated(folder, "clean", {"top1": 69.0, "top5": 90.0, "loss": 1.0})
    evaluated(folder, "clean", {"top1": 70.0, "top5": 90.0, "loss": 1.0})  # the newest counts
    evaluated(folder, "clean", {"top1": 60.0, "drop": 10.0}, "other", digest="3" * 32, how={"images": 1000})
    evaluated(folder, "corruptions", {"error": 40.0}, how={"seed": 0, "source": "made here"})
    evaluated(folder, "fgsm", {"4": 10.0, "8": 5.0}, how={"eps": [4, 8], "seed": 0})
    evaluated(folder, "fgsm", {"2": 20.0}, how={"eps": [2], "seed": 0})
    evaluated(folder, "fgsm", {"4": 11.0}, how={"images": 20, "eps": [4], "seed": 0})
    assert measured(tmp_path) == {
        "clean top1 [test: 40 images, digest 22222222]": [70],
        "corruptions error [test: 40 images, seed 0, source made here, digest 22222222]": [40],
        "fgsm 2 [test: 40 images, seed 0, digest 22222222]": [20],
        "fgsm 4 [test: 40 images, seed 0, digest 22222222]": [10],
        "fgsm 4 [test: 20 images, seed 0, digest 22222222]": [11],
        "fgsm 8 [test: 40 images, seed 0, digest 22222222]": [5],
        "clean top1 [other: 1,000 images, digest 33333333]": [60],
        "clean drop [other: 1,000 images, digest 33333333]": [10],
    }


def test_an_evaluation_counts_for_the_last_checkpoint_and_the_test_set_of_its_run(tmp_path: Path) -> None:
    mine, other = make_run(tmp_path, "vanilla", 1), make_run(tmp_path, "vanilla", 2)
    evaluated(mine, "clean", {"top1": 1.0}, sha256="of another run")
    evaluated(mine, "clean", {"top1": 2.0}, digest="3" * 32)
    evaluated(mine, "clean", {"top1": 3.0}, checkpoint="model_best.pth.tar", epoch=1)
    column = "clean top1 [test: 40 images, digest 22222222]"
    best = "clean top1 [test: model_best, 40 images, digest 22222222]"
    assert measured(tmp_path) == {best: [3]}  # the best one where the last was not evaluated, and it says so
    evaluated(mine, "clean", {"top1": 70.0})
    evaluated(other, "clean", {"top1": 4.0}, epoch=2, sha256="of an epoch before")
    assert measured(tmp_path) == {column: [70]}
    evaluated(other, "clean", {"top1": 71.0})
    for folder in (mine, other):
        (folder / "checkpoint.pth.tar").unlink()
    (mine / "model_best.pth.tar").unlink()
    evaluated(other, "clean", {"top1": 5.0}, checkpoint="model_best.pth.tar", sha256="deleted")
    (other / "model_best.pth.tar").unlink()
    assert measured(tmp_path)[column][-1] == 71  # deleted: the last epoch's


def rewritten(text: str) -> dict[str, str]:
    """A table of runs as spreadsheets save it: the same values in other spellings."""
    header, row = text.splitlines()
    semicolons = "\n".join(re.sub(r",(?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", ";", line) for line in (header, row))
    return {
        "mark and line ends": "\ufeff" + text.replace("\n", "\r\n"),
        "logical values": text.replace(",True,", ",TRUE,"),
        "numbers": text.replace(",0.2,", ",0.20,").replace(",vanilla,", ",vanilla,").replace(",500,", ",5E+02,"),
        "quotes": "\n".join(re.sub(r"(?<=,)([\w.]+)(?=,)", r'"\1"', line) for line in (header, row)) + "\n",
        "seed": text.replace(",1,4,77.5,", ",1.0,4.00,77.50,"),
        "dates": text.replace("2026-01-02 03:04:05", "2026-01-02T03:04:05"),
        "semicolons": semicolons.replace(";0.2;", ";0,2;").replace("7.5", "7,5") + "\n",
        "tabs": semicolons.replace(";", "\t") + "\n",
    }


def test_spellings_of_a_spreadsheet_are_the_same_values(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "vanilla", 1, 77.5)
    runs = read_runs([tmp_path / "runs"])
    write_runs(tmp_path / "runs.csv", runs)
    text = (tmp_path / "runs.csv").read_text()
    for kind, content in rewritten(text).items():
        assert content != text, kind
        (tmp_path / "rewritten.csv").write_text(content, encoding="utf-8", newline="")
        pd.testing.assert_frame_equal(read_runs([tmp_path / "rewritten.csv"]), runs, obj=kind)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"final": 71.0}, "final is 71, but 70 by"),
        ({"best": 75.0}, "best is 75, but 70 by"),
        ({"curve": [50.0, 70.0, 70.0]}, "3 accuracies of 4 epochs"),
        ({"curve": [50.0, 70.0, 70.0], "epochs_done": 3.0}, "where 4 make the run"),
        ({"start_epoch": "1"}, "where 3 make the run"),
        ({"date": "yesterday evening"}, "yesterday"),
        ({"method": "sagee"}, "sagee"),
        ({"state": "done"}, "done"),
    ],
    ids=str,
)
def test_tables_that_contradict_themselves_are_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    make_run(tmp_path / "runs", "vanilla", 1)
    runs = read_runs([tmp_path / "runs"])
    for name, value in values.items():
        runs[name] = [value]
    write_runs(tmp_path / "runs.csv", runs)
    with pytest.raises(UserError, match=r"runs\.csv is not a table of runs: line 2: .*" + re.escape(message)):
        read_runs([tmp_path / "runs.csv"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("method,seed\nvanilla,1\n", "no column arch"),
        ("", "No columns"),
        ("a\n1,2,3\n", "no column arch"),
        ("\udcff", "decode"),
    ],
)
def test_other_files_are_not_tables_of_runs(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "runs.csv").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        read_runs([tmp_path / "runs.csv"])


def seeds(*values: float, first: int = 1) -> pd.Series:
    return pd.Series(values, range(first, first + len(values)), dtype=float)


def tail(t: float) -> float:
    """Two-sided p-value of Student's t with 2 degrees of freedom, which has a closed form."""
    return 1 - abs(t) / math.sqrt(t * t + 2)


def test_a_paired_difference_by_hand() -> None:
    # differences 1, 2, 3: mean 2, deviation 1, standard error 1/√3
    found = difference(seeds(71, 73, 72), seeds(70, 71, 69))
    assert found["difference"] == pytest.approx(2)
    assert found["p"] == pytest.approx(tail(2 * math.sqrt(3)))
    half = QUANTILE / math.sqrt(3)
    assert (found["low"], found["high"]) == pytest.approx((2 - half, 2 + half))
    assert found["test"] == "paired, 3 seeds"


def test_welchs_difference_by_hand() -> None:
    # variances 2 and 2, two seeds each: standard error √2, 2 degrees of freedom
    found = difference(seeds(60, 62), seeds(64, 66, first=2))
    assert found["difference"] == -4
    assert found["p"] == pytest.approx(tail(4 / math.sqrt(2)))
    half = QUANTILE * math.sqrt(2)
    assert (found["low"], found["high"]) == pytest.approx((-4 - half, -4 + half))
    assert found["test"] == "Welch, 2 and 2 seeds"


@pytest.mark.parametrize(
    ("first", "second"), [((1, 2, 3, 4, 5), (1, 2, 3)), ((1, 2, 3, 4), (3, 4, 5)), ((1, 2), (1, 2))]
)
def test_unequal_seeds_are_compared_as_scipy_does(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    rng = random.Random(0)
    ours, theirs = (pd.Series({seed: rng.gauss(75, 1) for seed in of}) for of in (first, second))
    common = sorted({*first} & {*second})
    found = difference(ours, theirs)
    if len(common) >= 3:
        expected = stats.ttest_rel(ours[common], theirs[common])
        assert found["difference"] == pytest.approx((ours[common] - theirs[common]).mean())
    else:
        expected = stats.ttest_ind(ours, theirs, equal_var=False)
        assert found["difference"] == pytest.approx(ours.mean() - theirs.mean())
    assert found["p"] == pytest.approx(expected.pvalue)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    back = difference(theirs, ours)
    assert (back["difference"], back["low"], back["high"]) == pytest.approx(
        (-found["difference"], -found["high"], -found["low"])
    )


@pytest.mark.parametrize(("ours", "theirs"), [(seeds(70), seeds(71, 72, 73)), (seeds(70, 71), seeds(70))])
def test_one_seed_has_no_interval(ours: pd.Series, theirs: pd.Series) -> None:
    found = difference(ours, theirs)
    assert found["difference"] == ours.mean() - theirs.mean()
    assert all(map(math.isnan, (found["low"], found["high"], found["p"])))
    assert found["test"] == "too few seeds"


def test_numbers_that_do_not_vary_have_no_interval() -> None:
    for of in (seeds(70.1, 71.3, 72.7), seeds(70.1, 70.1)):
        same = difference(of, of)
        assert (same["difference"], same["p"]) == (0, 1)
        above = difference(of + 0.3, of)  # up to rounding, the same everywhere
        assert above["difference"] == pytest.approx(0.3)
        assert math.isnan(above["p"])
        assert math.isnan(above["low"])
        assert above["test"].endswith("no variance")
    one_varies = difference(seeds(70, 70), seeds(71, 72, first=5))
    assert 0 < one_varies["p"] < 1


def test_holm_by_hand() -> None:
    found = holm(pd.Series([0.01, 0.04, math.nan, 0.03])).tolist()
    assert found[:2] == pytest.approx([0.03, 0.06])  # 3·0.01; 0.04, but not below the next
    assert found[3] == pytest.approx(0.06)  # 2·0.03
    assert math.isnan(found[2])
    assert holm(pd.Series([0.9, 0.6])).tolist() == [1, 1]
    assert holm(pd.Series([], dtype=float)).empty


def test_p_values_are_adjusted_over_the_differences_from_plain_training(tmp_path: Path) -> None:
    tops = {"vanilla": (70, 71, 73.5), "input": (71, 73, 74), "cutmix": (75, 75.5, 78.5), "puzzle": (90,)}
    for method, of in tops.items():
        for seed, top1 in enumerate(of, 1):
            make_run(tmp_path, method, seed, top1)
    found = compare(counted(read_runs([tmp_path]))[0], ["final"])
    pairs = [*zip(found["method"], found["against"], strict=True)]
    assert pairs[:3] == [("Mixup", PLAIN), ("CutMix", PLAIN), ("Puzzle Mix", PLAIN)]
    assert len(pairs) == 6
    for of in (found[:3], found[3:]):
        pd.testing.assert_series_equal(of["p_holm"], holm(of["p"]), check_names=False)
    assert found["p_holm"][:2].tolist() != found["p"][:2].tolist()
    assert found["test"].tolist()[2] == "too few seeds"
