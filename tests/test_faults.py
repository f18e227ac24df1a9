"""Runs that are killed, stopped, starved of disk and fed with rubbish, and end as if nothing had happened."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from utils.runs import Progress, Training

from mixup import METHODS, build_method
from tests import forked
from tests.common import rows
from utils import archive, checkpoint, distributed, options, runs, train
from utils.errors import UserError
from utils.files import remove_leftovers

KILLS = 7  # of each method
OF_METHOD = {"sage": ["--rand_pos", "0.05", "--update_ratio", "0.7"], "vanilla": ["--dropout", "True"]}


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    forked.start_server()


@pytest.fixture(scope="module")
def words(tree: Path) -> list[object]:
    """Two epochs of four steps, a checkpoint after each step."""
    return [
        "--data_dir", tree, "--ngpu", 0, "--arch", "preactresnet18", "--initial_channels", 2, "--batch_size", 8,
        "--epochs", 2, "--schedule", 1, "--gammas", 0.1, "--learning_rate", 0.05, "--checkpoint_minutes", 1e-9,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    root = tmp_path_factory.mktemp("whole")
    assert forked.start(*words, "--root_dir", root).end()[0] == 0
    (folder,) = root.iterdir()
    return folder


@pytest.fixture(scope="module")
def stopped_once(words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stopped")
    first = partial(forked.send_at, "utils.train:draw", signal.SIGTERM, call=6)
    code, said = forked.start(*words, "--root_dir", root, first=first).end()
    assert code == 143, said
    (folder,) = root.iterdir()
    return folder


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """The folder of a run that was stopped in epoch 1."""
    return Path(shutil.copytree(stopped_once, tmp_path / "runs" / stopped_once.name))


def finish(*words: object) -> str:
    """The same command typed again must reach the end."""
    code, said = forked.start(*words).end()
    assert code == 0, said
    return said


def assert_same(folder: Path, expected: Path) -> None:
    """metrics.csv but for measurements, weights, optimiser and best checkpoint, bit by bit; nothing left over."""
    assert rows(folder) == rows(expected)
    for name in (checkpoint.LAST, checkpoint.BEST):
        ours, theirs = (archive.load(path / name) for path in (folder, expected))
        for key in theirs["state_dict"]:
            assert torch.equal(ours["state_dict"][key], theirs["state_dict"][key]), key
        for key, value in theirs["optimizer"]["state"].items():
            assert torch.equal(ours["optimizer"]["state"][key]["momentum_buffer"], value["momentum_buffer"])
        assert ours["progress"]["epoch"] == theirs["progress"]["epoch"]
    results = [json.loads((path / "result.json").read_text()) for path in (folder, expected)]
    assert results[0]["summary"] == results[1]["summary"]
    assert not list(folder.glob(".*.tmp"))


def assert_whole(folder: Path) -> None:
    """Whatever has its real name is whole, and nothing temporary is left."""
    for path in folder.iterdir():
        if path.suffix == ".tar":
            archive.load(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".csv":
            assert path.read_text().endswith("\n")
        assert path.suffix != ".tmp"


def assert_one_line(said: str) -> None:
    """One line about the failure, and no traceback."""
    assert "Traceback" not in said, said
    assert said.count("error: ") == 1, said


# ---------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments_a_run_ends_the_same(words: list[object], tmp_path: Path, method: str) -> None:
    """SIGKILL after a random part of the time a run takes, the same command again and again until it ends."""
    mine = [*words, "--method", method, *OF_METHOD.get(method, [])]
    first = None if method == "sage" else forked.without_pictures
    finish(*words[:4], "--log_off", "True", *words[4:], "--epochs", 1)  # the server is up, the images are in the cache
    began = time.monotonic()
    assert forked.start(*mine, "--root_dir", tmp_path / "whole", first=first).end()[0] == 0
    duration = time.monotonic() - began
    (expected,) = (tmp_path / "whole").iterdir()

    delays = random.Random(method)
    kills, ends, met = 0, 0, set()
    while kills < KILLS:
        folder = tmp_path / str(ends) / expected.name
        ended = False
        while not ended:
            child = forked.start(*mine, "--root_dir", folder.parent, first=first)
            if kills < KILLS:
                delay = delays.uniform(0, duration)
                child.process.join(delay)
                with suppress(ProcessLookupError):  # it has ended just now
                    if child.process.exitcode is None:
                        child.send(signal.SIGKILL)
            code, said = child.end()
            assert code in (0, -signal.SIGKILL), said
            ended = code == 0
            kills += not ended
            if not ended:
                saved = checkpoint.load_last(folder) if folder.exists() else None
                met.add((saved["progress"]["epoch"], saved["progress"]["step"]) if saved else "nothing saved")
        ends += 1
        assert_same(folder, expected)
    print(f"{method}: {kills} kills, {ends} ends, last saved (epoch, step): {sorted(met, key=str)}")


def test_killed_at_every_file_operation_of_a_save(tmp_path: Path) -> None:
    """The last checkpoint is the old or the new one, and the best one is whole and not behind it."""
    operation, total = 0, None
    while total is None:
        operation += 1
        folder = tmp_path / str(operation)
        folder.mkdir()
        pipe, other = forked.CONTEXT.Pipe(duplex=False)
        process = forked.CONTEXT.Process(target=forked.kill_in_save, args=(str(folder), operation, other))
        process.start()
        other.close()
        process.join()
        if process.exitcode == 0:
            total = pipe.recv()
        last, best = (archive.load(folder / name)["progress"]["epoch"] for name in (checkpoint.LAST, checkpoint.BEST))
        assert (last, best) in ((1, 1), (1, 2), (2, 2))
        assert archive.load(folder / checkpoint.PREVIOUS)["progress"]["epoch"] in (0, 1)
        remove_leftovers(folder)
        checkpoint.save({"sage": 1, "state_dict": {}, "progress": {"epoch": 3}}, folder)
        assert archive.load(folder / checkpoint.PREVIOUS)["progress"]["epoch"] == last
        assert_whole(folder)
    assert last == 2
    assert operation == total + 1
    assert total >= 10


# ----------------------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize("size", [0, 300, 1500, 10_000, 40_000, None])
def test_files_that_cannot_grow(words: list[object], tmp_path: Path, whole: Path, size: int | None) -> None:
    mine = [*words, "--root_dir", tmp_path]
    size = (whole / checkpoint.LAST).stat().st_size - 1 if size is None else size
    code, said = forked.start(*mine, first=partial(forked.limit_files, size)).end()
    assert code == 1
    assert_one_line(said)
    (folder,) = tmp_path.iterdir()
    assert_whole(folder)
    finish(*mine)
    assert_same(folder, whole)


def test_files_that_cannot_grow_but_a_checkpoint_can(words: list[object], stopped: Path, whole: Path) -> None:
    """Pictures, log and events are not worth stopping for."""
    for name in ("utils.pictures:plot_curves", "utils.pictures:plot_mixed", "utils.records:scalars"):
        first = partial(forked.fail_at, name, errno.ENOSPC)
        code, said = forked.start(*words, "--root_dir", stopped.parent, first=first).end()
        assert code == 0
        assert "Traceback" not in said
    assert_same(stopped, whole)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system, or mounts it again with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting needs privileges")
        return place

    yield mount
    while place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("limit", ["size=4k", "size=64k", "size=600k", "nr_inodes=7"])
def test_full_disk(words: list[object], disk: Callable[[str], Path], whole: Path, limit: str) -> None:
    root = disk(limit)
    code, said = forked.start(*words, "--root_dir", root).end()
    assert "Traceback" not in said
    if code != 0:
        assert code == 1
        assert_one_line(said)
    for folder in root.iterdir():
        assert_whole(folder)
    disk("remount,size=100m,nr_inodes=1000")
    finish(*words, "--root_dir", root)
    assert_same(root / whole.name, whole)


def test_read_only_folder(words: list[object], disk: Callable[[str], Path], stopped: Path, whole: Path) -> None:
    root = disk("size=100m")
    disk("remount,ro")
    mine = [*words, "--root_dir", root]
    code, said = forked.start(*mine).end()
    assert code == 1
    assert "Read-only file system" in said
    assert_one_line(said)
    disk("remount,rw")
    shutil.copytree(stopped, root / whole.name)
    disk("remount,ro")
    code, said = forked.start(*mine).end()
    assert code == 1
    assert_one_line(said)
    disk("remount,rw")
    assert "continuing in epoch 1" in finish(*mine)
    assert_same(root / whole.name, whole)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(words: list[object], stopped: Path, whole: Path) -> None:
    stopped.chmod(0o500)
    code, said = forked.start(*words, "--root_dir", stopped.parent).end()
    stopped.chmod(0o700)
    assert code == 1
    assert_one_line(said)
    finish(*words, "--root_dir", stopped.parent)
    assert_same(stopped, whole)


# ------------------------------------------------------------------------------------------- one folder, and who has it


def paused(words: list[object], root: Path) -> forked.Child:
    """A run that holds its folder, and stands still in its third step."""
    first = partial(forked.send_at, "utils.train:draw", signal.SIGSTOP, call=3)
    child = forked.start(*words, "--root_dir", root, first=first)
    while not forked.is_stopped(child):
        time.sleep(0.01)
    return child


def test_two_runs_in_one_folder(words: list[object], tmp_path: Path, whole: Path) -> None:
    holder = paused(words, tmp_path)
    for more in ([], ["--overwrite", "True"]):
        code, said = forked.start(*words, "--root_dir", tmp_path, *more).end()
        assert code == 1
        assert "another run is writing into" in said
        assert_one_line(said)
    holder.send(signal.SIGKILL)
    assert holder.end()[0] == -signal.SIGKILL
    assert "continuing in epoch 0, step 2" in finish(*words, "--root_dir", tmp_path)
    assert_same(tmp_path / whole.name, whole)


def test_folder_deleted_underneath(words: list[object], tmp_path: Path, whole: Path) -> None:
    child = paused(words, tmp_path)
    shutil.rmtree(tmp_path / whole.name)
    child.send(signal.SIGCONT)
    code, said = child.end()
    assert code == 1
    assert "was deleted" in said
    assert_one_line(said)
    assert not list(tmp_path.iterdir())
    finish(*words, "--root_dir", tmp_path)
    assert_same(tmp_path / whole.name, whole)


def test_folder_deleted_and_made_again_by_another_run(words: list[object], tmp_path: Path, whole: Path) -> None:
    child = paused(words, tmp_path)
    shutil.rmtree(tmp_path / whole.name)
    finish(*words, "--root_dir", tmp_path)
    child.send(signal.SIGCONT)
    code, said = child.end()
    assert code == 1
    assert "another run" in said
    assert_same(tmp_path / whole.name, whole)


def test_file_system_without_locks(words: list[object], tmp_path: Path, whole: Path) -> None:
    first = partial(forked.fail_at, "fcntl:flock", errno.ENOLCK)
    code, said = forked.start(*words, "--root_dir", tmp_path, first=first).end()
    assert code == 0
    assert "cannot be locked" in said
    assert_same(tmp_path / whole.name, whole)


def test_overwrite_keeps_the_old_run(words: list[object], stopped: Path, whole: Path) -> None:
    before = (stopped / checkpoint.LAST).read_bytes()
    mine = [*words, "--root_dir", stopped.parent, "--overwrite", "True"]
    code, said = forked.start(*mine, "--resume", stopped / checkpoint.LAST).end()
    assert code == 2
    assert "--resume" in said
    assert "continuing" not in finish(*mine)
    assert_same(stopped, whole)
    (old,) = (path for path in stopped.parent.iterdir() if path != stopped)
    assert (old / checkpoint.LAST).read_bytes() == before


def test_overwrite_of_nothing(words: list[object], tmp_path: Path, whole: Path) -> None:
    finish(*words, "--root_dir", tmp_path, "--overwrite", "True")
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("where", "call", "numbers", "expected"),
    [
        ("utils.images:_list_tree", 1, [signal.SIGTERM], 143),
        ("utils.images:_list_tree", 1, [signal.SIGINT], 130),
        ("utils.images:_list_tree", 1, [signal.SIGUSR1], 143),
        ("utils.train:draw", 2, [signal.SIGTERM], 143),
        ("utils.train:draw", 4, [signal.SIGINT], 130),
        ("utils.train:draw", 5, [signal.SIGUSR1], 143),
        ("utils.train:draw", 5, [signal.SIGHUP], 143),
        ("utils.train:test_batches", 1, [signal.SIGTERM], 143),
        ("utils.checkpoint:link", 3, [signal.SIGINT], 130),
        ("utils.checkpoint:link", 3, [signal.SIGINT, signal.SIGINT], 130),
        ("utils.pictures:plot_mixed", 1, [signal.SIGINT, signal.SIGINT], 130),
        ("utils.records:write_metrics", 1, [signal.SIGUSR1], 143),
    ],
)
def test_signals(
    words: list[object],
    tmp_path: Path,
    whole: Path,
    where: str,
    call: int,
    numbers: list[int],
    expected: int,
) -> None:
    """Stopped in any phase: the exit code, whole files, and the same end."""
    mine = [*words, "--root_dir", tmp_path]
    first = partial(forked.send_at, where, *numbers, call=call)
    began = time.monotonic()
    code, said = forked.start(*mine, first=first).end()
    assert time.monotonic() - began < 10
    assert code == expected, said
    assert "Traceback" not in said
    assert "stopped" in said
    folder = tmp_path / whole.name
    assert_whole(folder)
    assert not (folder / "result.json").exists()
    finish(*mine)
    assert_same(folder, whole)


def test_a_signal_between_saves_loses_nothing(words: list[object], tmp_path: Path, whole: Path) -> None:
    """After an epoch was evaluated, and long before the next save is due."""
    mine = [*words, "--root_dir", tmp_path, "--checkpoint_minutes", 5]
    first = partial(forked.send_at, "utils.records:write_metrics", signal.SIGTERM)
    code, said = forked.start(*mine, first=first).end()
    assert (code, "stopped in epoch 1, step 0" in said) == (143, True), said
    assert archive.load(tmp_path / whole.name / checkpoint.LAST)["progress"]["epoch"] == 1
    assert "continuing in epoch 1, step 0" in finish(*mine)
    assert_same(tmp_path / whole.name, whole)


def test_the_time_of_the_last_save_is_kept_where_nothing_is_written() -> None:
    """On the processes that write no files: else they ask for a save at every step."""
    run: Any = SimpleNamespace(folder=None, saved=-1e9)
    checkpoint.save_run(run)
    assert run.saved > 0


# -------------------------------------------------------------------------------------------------------- damaged files


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content[: len(content) * 3 // 4])


@pytest.mark.parametrize(
    "names",
    [
        [checkpoint.LAST],
        [checkpoint.LAST, checkpoint.PREVIOUS],
        [checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST],
        ["config.json"],
        ["metrics.csv", "mixed.png", "log.txt"],
    ],
)
def test_damaged_files_of_a_stopped_run(words: list[object], stopped: Path, whole: Path, names: list[str]) -> None:
    for name in names:
        damage(stopped / name)
    (stopped / ".checkpoint.pth.tar.abcdefgh.tmp").write_bytes(b"killed while writing")
    said = finish(*words, "--root_dir", stopped.parent)
    for name in names:
        assert not name.endswith(("tar", "json")) or str(stopped / name) in said
    assert ("continuing" in said) == (len(names) < 3 or "metrics.csv" in names)
    assert_same(stopped, whole)


@pytest.mark.parametrize("name", ["result.json", "config.json", checkpoint.LAST])
def test_damaged_files_of_a_finished_run(words: list[object], tmp_path: Path, whole: Path, name: str) -> None:
    folder = tmp_path / whole.name
    shutil.copytree(whole, folder)
    damage(folder / name)
    said = finish(*words, "--root_dir", tmp_path)
    assert ("is finished" in said) == (name != "result.json")
    assert said.count("is damaged") == (name != checkpoint.LAST)
    if name != checkpoint.LAST:
        assert_same(folder, whole)


@pytest.mark.parametrize("name", ["result.json", "config.json", "metrics.csv"])
def test_a_folder_in_place_of_a_file_is_refused_at_once(words: list[object], stopped: Path, name: str) -> None:
    (stopped / name).unlink(missing_ok=True)
    (stopped / name).mkdir()
    assert refused(1, *words, "--root_dir", stopped.parent) == f"error: {stopped / name} is not a file; remove it\n"


@pytest.mark.parametrize("content", ["{", "[]", "7", "{}", '{"settings": 5, "summary": null}', "[" * 10**5])
def test_damaged_records_are_reported_once_and_kept(
    words: list[object], whole: Path, tmp_path: Path, content: str
) -> None:
    folder = shutil.copytree(whole, tmp_path / whole.name)
    for name in ("config.json", "result.json"):
        (folder / name).write_text(content)
    said = finish(*words, "--root_dir", tmp_path)
    for name in ("config.json", "result.json"):
        assert said.count(f"{folder / name} is damaged") == 1
        assert (folder / f"{name}.damaged").read_text() == content
    assert_same(folder, whole)
    assert "is finished" in finish(*words, "--root_dir", tmp_path)


def test_a_config_that_cannot_be_read_at_the_moment_stays(words: list[object], whole: Path, tmp_path: Path) -> None:
    """At the first reading of a start, and at later ones."""
    folder = shutil.copytree(whole, tmp_path / whole.name)
    before = (folder / "config.json").read_bytes()
    for reading, number in enumerate((errno.EIO, errno.EACCES, errno.ESTALE), start=1):
        first = partial(forked.unreadable, "config.json", number, reading)
        code, said = forked.start(*words, "--root_dir", tmp_path, first=first).end()
        assert (code == 1 and os.strerror(number) in said) if reading == 1 else code == 0
        assert (folder / "config.json").read_bytes() == before


def test_without_its_config_a_run_still_knows_its_settings(words: list[object], stopped: Path) -> None:
    (stopped / "config.json").unlink()
    code, said = forked.start(*words, "--root_dir", stopped.parent, "--decay", 0.5).end()
    assert code == 2
    assert "--decay: 0.0001 there, 0.5 here" in said


def test_other_images_are_not_the_same_run(words: list[object], stopped: Path, tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "tree")
    (tmp_path / "tree" / "train" / "dark" / "0.png").unlink()
    code, said = forked.start(*words, "--root_dir", stopped.parent, "--data_dir", tmp_path / "tree").end()
    assert code == 1
    assert_one_line(said)


def test_resumed_elsewhere_and_killed_it_continues_there(words: list[object], stopped: Path, whole: Path) -> None:
    other = [*words, "--root_dir", stopped.parent / "other", "--resume", stopped / checkpoint.LAST]
    child = forked.start(*other, first=partial(forked.send_at, "utils.train:draw", signal.SIGKILL, call=2))
    assert child.end()[0] == -signal.SIGKILL
    said = finish(*other)
    assert "continuing in epoch 1, step 3" in said
    shutil.copy(stopped / checkpoint.BEST, stopped.parent / "other" / whole.name)
    assert_same(stopped.parent / "other" / whole.name, whole)


# ------------------------------------------------------------------------------------- what a run is, and what goes on


def refused(code: int, *words: object) -> str:
    """What a command says that must fail with this exit code, in one line."""
    found, said = forked.start(*words).end()
    assert found == code, said
    assert_one_line(said)
    return said


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        ("--method sage", "--method: vanilla there, sage here"),
        ("--seed 3", "--seed: 0 there, 3 here"),
        ("--batch_size 6", "--batch_size: 8 there, 6 here"),
        ("--epochs 3 --gammas 0.2", "--gammas: [0.1] there, [0.2] here"),
        ("--labels_per_class 9", "--labels_per_class: None there, 9 here"),
    ],
)
def test_another_run_is_not_gone_on_with(
    words: list[object], whole: Path, stopped: Path, tmp_path: Path, more: str, difference: str
) -> None:
    for path in (whole, stopped):
        resume = ["--resume", path / checkpoint.LAST, "--root_dir", tmp_path / "new"]
        said = refused(2, *words, *resume, *more.split())
        assert difference in said
        assert "may differ" in said
    assert not list(tmp_path.glob("new/*/*.tar"))


def test_mixed_images_are_of_the_first_epoch_and_the_last(words: list[object], tmp_path: Path) -> None:
    """Of a run that is stopped in its second epoch and in its last one, and then trained longer."""
    expected = {"mixed.png": "Vanilla, epoch 0"}
    first: Callable[[], None] = forked.without_pictures

    def found(root: Path) -> dict[str, str]:
        return {path.name: path.read_text() for path in root.glob("*/mixed*")}

    mine = [*words, "--root_dir", tmp_path / "three", "--epochs", 3]
    for call, more in ((6, {}), (4, {"mixed_last.png": "Vanilla, epoch 2"})):
        stop = partial(forked.send_at, "utils.train:draw", signal.SIGTERM, call=call)
        assert forked.start(*mine, first=partial(forked.each, first, stop)).end()[0] == 143
        expected |= more
        assert found(tmp_path / "three") == expected
    (folder,) = (tmp_path / "three").iterdir()
    shutil.copytree(folder, tmp_path / "lost" / folder.name)
    (tmp_path / "lost" / folder.name / "mixed_last.png").unlink()
    (folder / "mixed_last.png").write_text("as it was")
    for root, last in (("three", "as it was"), ("lost", "Vanilla, epoch 2")):
        assert forked.start(*mine, "--root_dir", tmp_path / root, first=first).end()[0] == 0
        assert found(tmp_path / root) == {**expected, "mixed_last.png": last}

    resume = ["--resume", folder / checkpoint.LAST, "--root_dir", tmp_path / "five", "--epochs", 5]
    assert forked.start(*words, *resume, "--add_name", "longer", first=first).end()[0] == 0
    assert found(tmp_path / "five") == {"mixed.png": "Vanilla, epoch 3", "mixed_last.png": "Vanilla, epoch 4"}
    resume = ["--resume", folder / checkpoint.LAST, "--root_dir", tmp_path / "four", "--epochs", 4]
    assert forked.start(*words, *resume, "--add_name", "longer", first=first).end()[0] == 0
    assert found(tmp_path / "four") == {"mixed.png": "Vanilla, epoch 3"}  # a batch is plotted once
    assert forked.start(*words, "--root_dir", tmp_path / "one", "--epochs", 1, first=first).end()[0] == 0
    assert found(tmp_path / "one") == {"mixed.png": "Vanilla, epoch 0"}


def test_pictures_change_no_number(words: list[object], tmp_path: Path, whole: Path) -> None:
    assert forked.start(*words, "--root_dir", tmp_path, first=forked.without_pictures).end()[0] == 0
    assert_same(tmp_path / whole.name, whole)


def test_a_run_is_trained_longer(words: list[object], whole: Path, tmp_path: Path) -> None:
    """As if it had been meant to be that long; the way is named where more epochs are refused."""
    longer = ["--epochs", 3, "--schedule", 1, 2, "--gammas", 0.1, 0.5]
    said = refused(2, *words, "--root_dir", whole.parent, *longer)
    assert "--resume THAT_FOLDER/checkpoint.pth.tar --add_name longer" in said
    mine = [*words, *longer, "--root_dir", tmp_path, "--add_name", "longer"]
    resume = ["--resume", whole / checkpoint.LAST]
    first = partial(forked.send_at, "utils.train:draw", signal.SIGTERM, call=2)
    assert forked.start(*mine, *resume, first=first).end()[0] == 143
    assert "continuing in epoch 2, step 2" in finish(*mine, *resume)
    (folder,) = tmp_path.iterdir()
    finish(*words, *longer, "--root_dir", tmp_path / "at once", "--add_name", "longer")
    (expected,) = (tmp_path / "at once").iterdir()
    assert rows(folder) == rows(expected)
    ours, theirs = (archive.load(path / checkpoint.LAST) for path in (folder, expected))
    assert all(torch.equal(ours["state_dict"][key], value) for key, value in theirs["state_dict"].items())
    assert (ours["settings"], ours["digests"], ours["origin"]) == (theirs["settings"], theirs["digests"], None)
    assert (folder / checkpoint.BEST).exists()
    assert "--epochs 1: " in refused(2, *words, "--epochs", 1, "--root_dir", tmp_path / "short", *resume)
    assert "--start_epoch: 0 there, 1 here" in refused(
        2, *mine, "--start_epoch", 1, "--root_dir", tmp_path / "late", *resume
    )


def test_begun_from_weights(words: list[object], whole: Path, stopped: Path, tmp_path: Path) -> None:
    torch.save(archive.load(whole / checkpoint.LAST)["state_dict"], tmp_path / "weights.pth")
    resume = ["--resume", tmp_path / "weights.pth"]
    assert "begun from random weights there" in refused(1, *words, "--root_dir", stopped.parent, *resume)
    mine = [*words, "--root_dir", tmp_path / "new", *resume]
    first = partial(forked.send_at, "utils.train:draw", signal.SIGTERM, call=2)
    code, said = forked.start(*mine, first=first).end()
    assert code == 143
    assert "the optimiser starts anew at epoch 0" in said
    assert "continuing in epoch 0, step 2" in finish(*mine)
    (folder,) = (tmp_path / "new").iterdir()
    origin = json.loads((folder / "config.json").read_text())["origin"]
    assert origin == archive.load(folder / checkpoint.BEST)["origin"]
    assert len(origin) == 32
    assert "begun from weights" in refused(1, *mine[:-2])


@pytest.mark.parametrize(("split", "name"), [("train", "training"), ("test", "test")])
def test_one_pixel_makes_another_run(
    words: list[object], whole: Path, stopped: Path, tree: Path, tmp_path: Path, split: str, name: str
) -> None:
    path = shutil.copytree(tree, tmp_path / "tree") / split / "dark" / "0.png"
    with Image.open(path) as image:
        image.putpixel((3, 4), (1, 2, 3))
        image.save(path)
    for folder in (whole, stopped):
        more = ["--data_dir", tmp_path / "tree", "--root_dir", folder.parent]
        assert f"other {name} images: digest " in refused(1, *words, *more)
    (stopped / "config.json").unlink()
    assert f"other {name} images: digest " in refused(1, *words, *more)
    assert f"other {name} images: digest " in refused(
        2, *words, *more, "--resume", whole / checkpoint.LAST, "--add_name", "longer"
    )


def as_before_digests(folder: Path) -> None:
    """Make a folder one of the versions that kept no digests, and wrote down the flag of a limit that was none."""
    config = json.loads((folder / "config.json").read_text())
    states = {name: archive.load(folder / name) for name in (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST)}
    for content in (config, *states.values()):
        for name in ("digests", "origin", "image_size"):
            content.pop(name, None)
        content["settings"]["labels_per_class"] = 5000
    (folder / "config.json").write_text(json.dumps(config))
    for name, state in states.items():
        checkpoint.save(state, folder)
        os.replace(folder / checkpoint.LAST, folder / name) if name != checkpoint.LAST else None
    checkpoint.save(states[checkpoint.LAST], folder)


def test_a_run_of_an_older_version_goes_on(words: list[object], whole: Path, stopped: Path, tmp_path: Path) -> None:
    as_before_digests(stopped)
    said = finish(*words, "--root_dir", stopped.parent)
    assert said.count("is of an older version, which kept no digest") >= 1
    assert_same(stopped, whole)
    finished = shutil.copytree(whole, tmp_path / whole.name)
    as_before_digests(finished)
    assert "is finished" in finish(*words, "--root_dir", tmp_path)
    assert "--decay" in refused(2, *words, "--root_dir", tmp_path, "--decay", 0.5)


def test_a_result_of_another_run_does_not_finish_this_one(words: list[object], whole: Path, stopped: Path) -> None:
    shutil.copy(whole / "result.json", stopped)
    said = finish(*words, "--root_dir", stopped.parent)
    assert "is not of this run" in said
    assert "continuing in epoch 1" in said
    assert_same(stopped, whole)


@pytest.mark.parametrize("name", ["config.json", "metrics.csv"])
def test_a_finished_run_without_a_record(words: list[object], whole: Path, tmp_path: Path, name: str) -> None:
    """It hides no other settings, and what is missing is written anew."""
    folder = shutil.copytree(whole, tmp_path / whole.name)
    (folder / name).unlink()
    assert "--decay: 0.0001 there, 0.5 here" in refused(2, *words, "--root_dir", tmp_path, "--decay", 0.5)
    assert "is finished" in finish(*words, "--root_dir", tmp_path)
    assert_same(folder, whole)
    assert json.loads((folder / "config.json").read_text())["settings"]["decay"] == 0.0001
    for path in (folder / "config.json", *folder.glob("*.tar")):
        path.unlink()
    assert "neither a config.json nor a checkpoint" in refused(1, *words, "--root_dir", tmp_path)


def test_links_to_a_disk_that_is_not_mounted(words: list[object], stopped: Path, tmp_path: Path, whole: Path) -> None:
    (tmp_path / "scratch").mkdir()
    for path in stopped.glob("*.tar"):
        path.rename(tmp_path / "scratch" / path.name)
        path.symlink_to(tmp_path / "scratch" / path.name)
    (tmp_path / "scratch").rename(tmp_path / "away")
    assert "is its disk mounted" in refused(1, *words, "--root_dir", stopped.parent)
    (tmp_path / "away").rename(tmp_path / "scratch")
    finish(*words, "--root_dir", stopped.parent)
    assert_same(stopped, whole)


@pytest.mark.parametrize("name", [".lock", "result.json", "config.json", "log.txt", checkpoint.LAST])
def test_a_pipe_in_place_of_a_file(words: list[object], stopped: Path, name: str) -> None:
    """Reading it would wait for ever."""
    (stopped / name).unlink(missing_ok=True)
    os.mkfifo(stopped / name)
    _, said = forked.start(*words, "--root_dir", stopped.parent).end()
    assert "Traceback" not in said


def test_slurm_may_count_restarts_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("", False), ("0", False), ("2", True), ("many", False)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", value)
        assert runs.is_restarted() == expected


def test_a_short_run_is_saved_once(words: list[object], tmp_path: Path, whole: Path) -> None:
    finish(*words, "--root_dir", tmp_path, "--checkpoint_minutes", 5)
    folder = tmp_path / whole.name
    assert_same(folder, whole)
    assert sorted(path.name for path in folder.glob("*.tar")) == [checkpoint.LAST, checkpoint.BEST]


def test_the_best_epoch_is_the_validation_sets(words: list[object], tmp_path: Path) -> None:
    finish(*words, "--root_dir", tmp_path, "--valid_labels_per_class", 4, "--epochs", 6)
    (folder,) = tmp_path.iterdir()
    result, found = json.loads((folder / "result.json").read_text()), rows(folder)
    best = max(found, key=lambda row: float(row["valid_top1"]))
    assert (result["best_epoch"], result["best_top1"]) == (int(best["epoch"]), float(best["test_top1"]))
    assert float(found[-1]["best_top1"]) == result["best_top1"]
    assert archive.load(folder / checkpoint.BEST)["progress"]["epoch"] == result["best_epoch"] + 1


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1},
        {"epoch": True},
        {"step": 2**40},
        {"step": 5},
        {"seconds": "long"},
        {"sums": [0.0, float("nan"), 0.0, 0.0]},
        {"sums": "four"},
        {"rows": [{}]},
        {"rows": "many"},
        {"epoch": 7},
        {"test_top1": None},
        {"test_top1": [90.0] * 100},
        {"train_loss": float("inf")},
    ],
)
def test_a_training_state_with_nonsense(words: list[object], stopped: Path, tmp_path: Path, change: Any) -> None:
    state = archive.load(stopped / checkpoint.LAST)
    progress = state["progress"]
    (progress["rows"][0] if change.keys() <= progress["rows"][0].keys() - {"epoch"} else progress).update(change)
    del state["sage"]
    torch.save(state, tmp_path / "odd.pth")
    said = refused(1, *words, "--root_dir", tmp_path / "new", "--resume", tmp_path / "odd.pth")
    assert "does not hold what it should" in said


# ------------------------------------------------------------------------------------------------ numbers that go wrong


@pytest.mark.parametrize("method", METHODS)
def test_loss_that_is_not_finite(words: list[object], tmp_path: Path, method: str) -> None:
    mine = [*words, "--root_dir", tmp_path, "--method", method, "--learning_rate", 1e18, "--epochs", 20]
    code, said = forked.start(*mine).end()
    assert code == 1, said
    assert_one_line(said)
    assert "not finite in epoch 0, step" in said
    assert f"({method}, learning rate 1e+18). Try a smaller --learning_rate" in said
    for path in tmp_path.glob("*/*.tar"):
        assert all(value.isfinite().all() for value in archive.load(path)["state_dict"].values())


@pytest.mark.parametrize("method", [name for name in METHODS if name != "comix"])
def test_a_dead_network_is_stopped(words: list[object], tmp_path: Path, method: str) -> None:
    """Before anything is saved over the last good checkpoint. Co-Mixup's clean pass has the cross-entropy, whose
    gradient does not vanish where the output is saturated."""
    mine = [*words, "--root_dir", tmp_path, "--method", method]
    code, said = forked.start(*mine, first=forked.saturate).end()
    assert code == 1, said
    assert_one_line(said)
    assert "the network is dead in epoch 0: every gradient of the last batch is exactly 0, at a loss of " in said
    assert f"where equal probabilities have 0.6931 ({method}, learning rate 0.05)" in said
    assert not list(tmp_path.glob("*/*.tar"))


def is_dead(logits: Tensor, gradient: float = 0) -> bool:
    """Whether a run is stopped after a step with these logits, labels 0, and gradients of 0 but one."""
    model = nn.Linear(2, 3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.bias.grad[1] = gradient  # type: ignore[index]
    count, classes = logits.shape
    method = build_method("vanilla", "cifar10", classes)
    images, labels = torch.zeros(count, 3, 8, 8), torch.zeros(count, dtype=torch.int64)
    step = method.step(lambda _: logits, images, labels, None)  # type: ignore[arg-type]
    run: Any = SimpleNamespace(
        model=model, device=torch.device("cpu"), method=method, training=Training(), progress=Progress()
    )
    try:
        train.refuse_dead_network(run, step)
    except UserError as error:
        return str(error).startswith("the network is dead in epoch 0: ")
    return False


def logits_of(logit: float, count: int = 4, classes: int = 3) -> Tensor:
    """``logit`` for the label, 0 for the other classes."""
    logits = torch.zeros(count, classes)
    logits[:, 0] = logit
    return logits


@pytest.mark.parametrize(("gradient", "logit", "dead"), [(0, -50, True), (0, 50, False), (1e-40, -50, False)])
def test_a_perfect_fit_and_tiny_gradients_go_on(gradient: float, logit: float, dead: bool) -> None:
    assert is_dead(logits_of(logit), gradient) == dead


@pytest.mark.parametrize("classes", [2, 3, 10, 100, 200])
def test_equal_probabilities_go_on(classes: int) -> None:
    """Whichever way their loss is rounded: in a balanced batch their gradients may cancel, in the next one they need
    not."""
    for count in (1, 4, 10, 50, 64, 100):
        assert not is_dead(logits_of(0, count, classes)), count
        assert is_dead(logits_of(-0.05, count, classes)), count


def test_all_processes_decide_alike_on_a_dead_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for others, logit, dead in (([0, 1], 50, True), ([0, 0], -50, False)):
        agreed = iter(others)
        monkeypatch.setattr(distributed, "largest", lambda value, device, agreed=agreed: next(agreed))
        assert is_dead(logits_of(logit)) == dead


class Probe(nn.Module):
    """A network that sees nothing, or one pixel."""

    mixing_points = 3

    def __init__(self, pixel: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.pixel = pixel

    def forward(self, x: Tensor, mix_at: int | None = None, mix: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        if mix is not None and mix_at == 0:
            x = mix(x)
        seen = self.layer(x[:, :, 3, 5] if self.pixel else 0 * x.mean(dim=(2, 3)))
        return mix(seen) if mix is not None and mix_at else seen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pixel", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_no_saliency_one_pixel_and_batches_of_one(method: str, pixel: bool, batch: int) -> None:
    import numpy as np

    torch.manual_seed(batch)
    model, chosen = Probe(pixel), build_method(method, "cifar10", 5)
    for seed in range(4):
        draws = chosen.draw(np.random.default_rng(seed), batch, 16, 16)
        model.zero_grad()
        step = chosen.step(model, torch.randn(batch, 3, 16, 16), torch.arange(batch) % 5, draws)
        step.loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        given_back = [
            step.loss,
            step.logits,
            step.mixed.targets,
            step.mixed.images,
            step.mixed.mask,
            *(step.mixed.saliency or ()),
            *gradients,
        ]
        for value in given_back:
            assert value is None or value.isfinite().all()
        if step.mixed.targets is not None:
            torch.testing.assert_close(step.mixed.targets.sum(dim=1), torch.ones(batch))


# ----------------------------------------------------------------------------------------------- arguments, checkpoints


FLAGS = [action.option_strings[-1] for action in options.make_parser()._actions]
VALUES = st.one_of(
    st.sampled_from(["", "-1", "0", "1", "2", "0.5", "1e400", "1e308", "nan", "inf", "-inf", "9" * 400, "True", "no"]),
    st.sampled_from(
        ["sage", "puzzle", "comix", "cifar10", "folder", "fixed", "soft", "wrn28_10", "--", "-", "a/b", "é"]
    ),
    st.integers(-3, 300).map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_characters="\0"), max_size=6),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(FLAGS), VALUES), max_size=8))
def test_any_words_are_parsed_or_refused_in_one_line(words: list[str]) -> None:
    import io
    from contextlib import redirect_stderr, redirect_stdout

    said, code = io.StringIO(), None
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            options.parse(words)
    except SystemExit as stop:
        code = stop.code
    assert code in (None, 0, 2)
    assert said.getvalue().endswith("(see --help)\n") == (code == 2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--batch_size 31", "--batch_size 31 is above the 30 training images"),
        ("--method comix --m_block_num 5", "m_block_num 5 does not divide"),
        ("--method sage --kernel_size 65", "too small for kernel_size 65"),
        ("--dataset folder --image_size 30 --method puzzle", "none of"),
        ("--dataset folder --image_size 30 --method comix --m_block_num 4", "m_block_num 4 does not divide"),
        ("--dataset folder --method sage --kernel_size 65", "too small for kernel_size 65"),
        ("--image_size 48", "--image_size is for --dataset folder"),
        ("--seed 9223372036854775808", "--seed"),
        ("--valid_labels_per_class 15", "15"),
        ("--add_name a/b", "--add_name"),
    ],
)
def test_combinations_are_refused_before_training(words: list[object], tmp_path: Path, more: str, message: str) -> None:
    code, said = forked.start(*words, "--root_dir", tmp_path, *more.split()).end()
    assert code in (1, 2)
    assert message in said
    assert_one_line(said)
    assert "Epoch" not in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("settings", 3),
        ("settings", {"arch": "unheard_of"}),
        ("settings", {"initial_channels": "many"}),
        ("settings", {"dataset": ["--evaluate"]}),
        ("mean", "white"),
        ("classes", None),
        ("state_dict", [1]),
        ("state_dict", {1: 2}),
        ("state_dict", {"fc.weight": "heavy"}),
        ("optimizer", {}),
        ("progress", {"era": 3}),
        ("progress", []),
    ],
)
def test_checkpoints_with_other_content(words: list[object], whole: Path, tmp_path: Path, key: str, value: Any) -> None:
    state = archive.load(whole / checkpoint.LAST) | {key: value}
    path = tmp_path / "odd.pth"
    torch.save({name: content for name, content in state.items() if name != "sage"}, path)
    for purpose in ("--evaluate",) if key in ("settings", "mean") else ("--root_dir", "--evaluate"):
        if (key, purpose) in (("optimizer", "--evaluate"), ("progress", "--evaluate")):
            continue
        rest = [purpose, tmp_path / "runs"] if purpose == "--root_dir" else [purpose]
        code, said = forked.start(*words[:4], *words[4:] * (purpose == "--root_dir"), "--resume", path, *rest).end()
        assert code in (1, 2), said
        assert_one_line(said)
