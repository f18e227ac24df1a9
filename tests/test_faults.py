"""Runs that are killed, stopped, starved of disk and fed with rubbish, and end as if nothing had happened."""

from __future__ import annotations

import errno
import fcntl
import importlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from mixup import METHODS, build_method
from tests.common import main, rows
from utils import checkpoint, options, pictures, run, train
from utils.errors import UserError
from utils.files import remove_leftovers
from utils.run import Progress, Training

CONTEXT = multiprocessing.get_context("forkserver")  # children of a process that has imported the program once
KILLS = 3  # of each method
OF_METHOD = {"sage": ["--rand_pos", "0.05", "--update_ratio", "0.7"], "vanilla": ["--dropout", "True"]}


@pytest.fixture(autouse=True)
def _quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plotting takes most of the time of a small run: pictures are their titles alone."""
    without_pictures(monkeypatch.setattr)


def without_pictures(set_to: Callable[..., None] = setattr) -> None:
    set_to(pictures, "plot_curves", lambda path, *rest: path.write_bytes(b""))
    set_to(pictures, "plot_images", lambda path, columns, texts, title: path.write_text(title))


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
    main(*words, "--root_dir", root)
    (folder,) = root.iterdir()
    return folder


@pytest.fixture(scope="module")
def stopped_once(words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch.setattr)
        signal_at(patch, "utils.train:step_generator", signal.SIGTERM, call=6)
        main(*words, "--root_dir", root, check=143)
    (folder,) = root.iterdir()
    return folder


@dataclass
class Case:
    """A command, its folder, and the folder of the same run that nothing happened to."""

    words: list[object]
    root: Path
    whole: Path

    @property
    def folder(self) -> Path:
        return self.root / self.whole.name

    def says(self, *more: object, code: int | None = 0) -> str:
        """What the command says, which must end with this exit code (None: 1 or 2): failures in one line."""
        done = main(*self.words, "--root_dir", self.root, *more, check=code)
        said = done.stdout + done.stderr
        assert done.returncode in ((1, 2) if code is None else (code,))
        assert said.count("error: ") == (done.returncode in (1, 2)), said
        assert "Traceback" not in said, said
        return said

    def assert_same(self) -> None:
        """metrics.csv but for measurements, weights, optimiser and best checkpoint, bit by bit; nothing left over."""
        assert rows(self.folder) == rows(self.whole)
        for name in (checkpoint.LAST, checkpoint.BEST):
            ours, theirs = (checkpoint.load(folder / name) for folder in (self.folder, self.whole))
            for key, value in theirs["state_dict"].items():
                assert torch.equal(ours["state_dict"][key], value), key
            for key, value in theirs["optimizer"]["state"].items():
                assert torch.equal(ours["optimizer"]["state"][key]["momentum_buffer"], value["momentum_buffer"])
            assert ours["progress"]["epoch"] == theirs["progress"]["epoch"]
        ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (self.folder, self.whole))
        assert ours["summary"] == theirs["summary"]
        assert not list(self.folder.glob(".*.tmp"))


@pytest.fixture
def fresh(words: list[object], whole: Path, tmp_path: Path) -> Case:
    """A command that was not given yet."""
    return Case(words, tmp_path / "runs", whole)


@pytest.fixture
def stopped(fresh: Case, stopped_once: Path) -> Case:
    """One that was stopped in epoch 1."""
    shutil.copytree(stopped_once, fresh.folder)
    return fresh


def call_before(patch: pytest.MonkeyPatch, where: str, before: Callable[[], None]) -> None:
    """``before`` is called before each call of function ``module:name``."""
    module_name, name = where.split(":")
    module = importlib.import_module(module_name)
    original = getattr(module, name)

    def replacement(*args: Any, **named: Any) -> Any:
        before()
        return original(*args, **named)

    patch.setattr(module, name, replacement)


def signal_at(patch: pytest.MonkeyPatch, where: str, *numbers: int, call: int = 1) -> None:
    """This process sends itself signals when function ``module:name`` is called for the given time."""
    calls = iter(range(1, 10**6))

    def before() -> None:
        if next(calls) == call:
            for number in numbers:
                os.kill(os.getpid(), number)

    call_before(patch, where, before)


def assert_whole(folder: Path) -> None:
    """Whatever has its real name is whole, and nothing temporary is left."""
    for path in folder.iterdir():
        if path.suffix == ".tar":
            checkpoint.load(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            assert path.read_text().endswith("\n")
        assert path.suffix != ".tmp"


# ---------------------------------------------------------------------------------------------------------------- kills


def child(words: list[str]) -> None:
    without_pictures()
    with redirect_stdout(io.StringIO()):
        code = importlib.import_module("main").main(words)
    raise SystemExit(code)


def start(*words: object) -> Any:
    """main.py in a process of its own."""
    CONTEXT.set_forkserver_preload(["main"])
    process = CONTEXT.Process(target=child, args=([str(word) for word in words],), daemon=True)
    process.start()
    return process


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments_a_run_ends_the_same(words: list[object], tmp_path: Path, method: str) -> None:
    """SIGKILL after a random part of the time a run takes, the same command again and again until it ends."""
    mine = [*words, "--method", method, *OF_METHOD.get(method, [])]
    start("--help").join()  # the server is up
    began = time.monotonic()
    whole = start(*mine, "--root_dir", tmp_path / "whole")
    whole.join(120)
    assert whole.exitcode == 0
    duration = time.monotonic() - began
    (expected,) = (tmp_path / "whole").iterdir()
    delays, kills, ends = random.Random(method), 0, 0
    while kills < KILLS or ends == 0:
        process = start(*mine, "--root_dir", tmp_path / str(ends))
        process.join(delays.uniform(0, duration) if kills < KILLS else 120)
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            Case(mine, tmp_path / str(ends), expected).assert_same()
            ends += 1


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and nothing that would tidy up may run."""


@pytest.mark.parametrize("operation", range(10))
def test_killed_at_every_file_operation_of_a_save(
    tmp_path: Path, operation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last or the previous checkpoint is whole, and the best one is whole and not behind it."""
    states = [{"state_dict": {"weight": torch.ones(300)}, "progress": {"epoch": epoch}} for epoch in range(4)]
    for state in states[:2]:
        checkpoint.write(state, tmp_path, best=state)
    left = [None] * operation

    def before() -> None:
        if not left:  # a killed process does nothing more to its files
            raise Killed
        left.pop()

    for name in ("builtins:open", "os:fsync", "os:replace", "os:unlink"):
        call_before(monkeypatch, name, before)
    with pytest.raises(Killed) if operation < 9 else nullcontext():
        checkpoint.write(states[2], tmp_path, best=states[2])
    monkeypatch.undo()
    last = checkpoint.load_last(tmp_path)["progress"]["epoch"]  # type: ignore[index]
    best = checkpoint.load(tmp_path / checkpoint.BEST)["progress"]["epoch"]
    assert (last, best) in ((1, 1), (1, 2), (2, 2))
    remove_leftovers(tmp_path)
    checkpoint.write(states[3], tmp_path)
    assert checkpoint.load(tmp_path / checkpoint.PREVIOUS)["progress"]["epoch"] == last
    assert_whole(tmp_path)


# ----------------------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize("size", [0, 300, 1500, 10_000, 40_000, None])
def test_files_that_cannot_grow(fresh: Case, size: int | None) -> None:
    """Writing fails as on a full disk, without needing one."""
    size = (fresh.whole / checkpoint.LAST).stat().st_size - 1 if size is None else size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        fresh.says(code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_whole(fresh.folder)
    fresh.says()
    fresh.assert_same()


@pytest.mark.parametrize(
    ("name", "number", "said"),
    [
        ("utils.pictures:plot_curves", errno.ENOSPC, "No space left"),
        ("utils.pictures:plot_images", errno.ENOSPC, "No space left"),
        ("utils.train:write_metrics", errno.ENOSPC, "No space left"),
        ("fcntl:flock", errno.ENOLCK, "cannot be locked"),
    ],
)
def test_a_lost_picture_or_record_stops_nothing(
    stopped: Case, name: str, number: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor a file system without locks."""
    call_before(monkeypatch, name, Mock(side_effect=OSError(number, os.strerror(number))))
    assert said in stopped.says()
    monkeypatch.undo()
    stopped.assert_same()


# ------------------------------------------------------------------------------------------- one folder, and who has it


def test_two_runs_in_one_folder(stopped: Case) -> None:
    with open(stopped.folder / run.LOCK) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for more in ([], ["--overwrite", "True"]):
            assert "another run is writing into" in stopped.says(*more, code=1)
    assert "continuing in epoch 1" in stopped.says()
    stopped.assert_same()


def test_overwrite_keeps_the_old_run(stopped: Case, tmp_path: Path) -> None:
    last = stopped.folder / checkpoint.LAST
    before, anew = last.read_bytes(), ["--overwrite", "True"]
    assert "--resume" in stopped.says(*anew, "--resume", last, code=2)
    stopped.says(*anew, "--data_dir", tmp_path / "mistyped", code=1)  # images first: the old run is still in its place
    assert last.read_bytes() == before
    assert "continuing" not in stopped.says(*anew)
    stopped.assert_same()
    (old,) = (path for path in stopped.root.iterdir() if path != stopped.folder)
    assert (old / checkpoint.LAST).read_bytes() == before


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("where", "call", "numbers", "expected"),
    [
        ("utils.options:load", 1, [signal.SIGTERM], 143),
        ("utils.options:load", 1, [signal.SIGINT], 130),
        ("utils.options:load", 1, [signal.SIGUSR1], 143),
        ("utils.train:step_generator", 2, [signal.SIGTERM], 143),
        ("utils.train:step_generator", 4, [signal.SIGINT], 130),
        ("utils.train:step_generator", 5, [signal.SIGUSR1], 143),
        ("utils.train:step_generator", 5, [signal.SIGHUP], 143),
        ("utils.train:test_batches", 1, [signal.SIGTERM], 143),
        ("os:fsync", 5, [signal.SIGINT], 130),
        ("os:fsync", 5, [signal.SIGINT, signal.SIGINT], 130),
        ("utils.train:write_metrics", 1, [signal.SIGUSR1], 143),
    ],
)
def test_signals(fresh: Case, where: str, call: int, numbers: list[int], expected: int) -> None:
    """Stopped in any phase: the exit code, whole files, and the same end."""
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it may be ignored, as under nohup
    try:
        with pytest.MonkeyPatch.context() as patch:
            signal_at(patch, where, *numbers, call=call)
            said = fresh.says(code=expected)
    finally:
        signal.signal(signal.SIGHUP, hangup)
    assert "stopped" in said
    if fresh.folder.exists():
        assert_whole(fresh.folder)
        assert not (fresh.folder / "result.json").exists()
    fresh.says()
    fresh.assert_same()


def test_a_signal_between_saves_loses_nothing(fresh: Case) -> None:
    """After an epoch was evaluated, and long before the next save is due."""
    fresh.words = [*fresh.words, "--checkpoint_minutes", 5]
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, "utils.train:write_metrics", signal.SIGTERM)
        assert "stopped in epoch 1, step 0" in fresh.says(code=143)
    assert checkpoint.load(fresh.folder / checkpoint.LAST)["progress"]["epoch"] == 1
    assert "continuing in epoch 1, step 0" in fresh.says()
    fresh.assert_same()


# -------------------------------------------------------------------------------------------------------- damaged files


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content[: len(content) * 3 // 4])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_damaged_checkpoints_of_a_stopped_run(stopped: Case, count: int) -> None:
    for name in (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST)[:count]:
        damage(stopped.folder / name)
    (stopped.folder / ".checkpoint.pth.tar.abcdefgh.tmp").write_bytes(b"killed while writing")
    said = stopped.says()
    assert said.count("an earlier one is used") == count
    assert ("continuing" in said) == (count < 3)
    stopped.assert_same()


@pytest.mark.parametrize("name", ["config.json", "result.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_record_is_named(fresh: Case, name: str, content: str) -> None:
    shutil.copytree(fresh.whole, fresh.folder)
    (fresh.folder / name).write_text(content)
    said = fresh.says(code=1)
    assert "is damaged" in said
    assert str(fresh.folder) in said
    (fresh.folder / name).unlink()
    if name == "result.json":
        fresh.says()
        fresh.assert_same()


def test_without_its_config_a_run_still_knows_its_settings(stopped: Case) -> None:
    (stopped.folder / "config.json").unlink()
    assert "--decay: 0.0001 there, 0.5 here" in stopped.says("--decay", 0.5, code=2)


# --------------------------------------------------------------------------------- what a run is, and what continues it


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
def test_another_run_is_not_gone_on_with(fresh: Case, stopped_once: Path, more: str, difference: str) -> None:
    for path in (fresh.whole, stopped_once):
        said = fresh.says("--resume", path / checkpoint.LAST, *more.split(), code=2)
        assert difference in said
        assert "may differ" in said
    assert not list(fresh.root.glob("*/*.tar"))


def test_a_run_is_trained_longer(fresh: Case, tmp_path: Path) -> None:
    """It ends as if it had been meant to be that long."""
    longer = ["--epochs", 3, "--schedule", 1, 2, "--gammas", 0.1, 0.5, "--add_name", "longer"]
    resume = ["--resume", fresh.whole / checkpoint.LAST]
    fresh.says(*longer, "--root_dir", tmp_path / "whole")
    fresh.says(*longer, *resume)
    (expected,), (folder,) = (list(root.iterdir()) for root in (tmp_path / "whole", fresh.root))
    assert rows(folder) == rows(expected)
    ours, theirs = (checkpoint.load(path / checkpoint.LAST)["state_dict"] for path in (folder, expected))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (folder / checkpoint.BEST).exists()
    assert "has had 2 already" in fresh.says("--epochs", 1, *resume, code=2)


def test_initialised_from_weights(fresh: Case, tmp_path: Path) -> None:
    """Weights alone start a run, and are a part of what it is."""
    torch.save(checkpoint.load(fresh.whole / checkpoint.LAST)["state_dict"], tmp_path / "weights.pth")
    assert "the optimiser starts anew at epoch 0" in fresh.says("--resume", tmp_path / "weights.pth")
    said = fresh.says(code=1)
    assert "initialised from weights " in said
    assert "random weights here" in said


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_pixel_makes_another_run(stopped: Case, tree: Path, tmp_path: Path, split: str) -> None:
    shutil.copytree(tree, tmp_path / "tree")
    path = tmp_path / "tree" / split / "dark" / "0.png"
    pixels = np.array(Image.open(path))
    pixels[3, 4, 1] ^= 1
    Image.fromarray(pixels).save(path)
    name = {"train": "training", "test": "test"}[split]
    for root in (stopped.whole.parent, stopped.root):
        said = stopped.says("--data_dir", tmp_path / "tree", "--root_dir", root, code=1)
        assert f"other {name} images: digest " in said


def test_a_short_run_is_saved_once(fresh: Case) -> None:
    fresh.says("--checkpoint_minutes", 5)
    fresh.assert_same()
    assert sorted(path.name for path in fresh.folder.glob("*.tar")) == [checkpoint.LAST, checkpoint.BEST]


def test_the_best_epoch_is_the_validation_sets(fresh: Case) -> None:
    fresh.says("--valid_labels_per_class", 4, "--epochs", 6)
    result, found = json.loads((fresh.folder / "result.json").read_text()), rows(fresh.folder)
    best = max(found, key=lambda row: float(row["valid_top1"]))
    assert (result["best_epoch"], result["best_top1"]) == (int(best["epoch"]), float(best["test_top1"]))
    assert float(found[-1]["best_top1"]) == result["best_top1"]
    assert checkpoint.load(fresh.folder / checkpoint.BEST)["progress"]["epoch"] == result["best_epoch"] + 1


def test_pictures_change_no_number(fresh: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    fresh.says()
    fresh.assert_same()
    with Image.open(fresh.folder / "mixed.png") as image:
        image.load()


@pytest.mark.parametrize("value", ["", "0", "2", "many"])
def test_slurm_may_count_restarts_in_vain(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", value)
    assert run.is_restarted() == (value == "2")


# ------------------------------------------------------------------------------------------------ numbers that go wrong


@pytest.mark.parametrize("method", METHODS)
def test_loss_that_is_not_finite(fresh: Case, method: str) -> None:
    said = fresh.says("--method", method, "--learning_rate", 1e18, "--epochs", 20, code=1)
    assert "not finite in epoch 0, step" in said
    assert f"({method}, learning rate 1e+18). Try a smaller --learning_rate" in said
    for path in fresh.root.glob("*/*.tar"):
        assert all(value.isfinite().all() for value in checkpoint.load(path)["state_dict"].values())


@pytest.mark.parametrize("method", [name for name in METHODS if name != "comix"])
def test_a_dead_network_is_stopped(fresh: Case, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is saved over the last good checkpoint. Co-Mixup's clean pass has the cross-entropy, whose
    gradient does not vanish where the output is saturated."""
    saturate(monkeypatch)
    said = fresh.says("--method", method, code=1)
    assert "the network is dead in epoch 0: every gradient of the last batch is exactly 0, at a loss of " in said
    assert f"where equal probabilities have 0.6931 ({method}, learning rate 0.05)" in said
    assert not list(fresh.root.glob("*/*.tar"))


def saturate(patch: pytest.MonkeyPatch) -> None:
    """The network gets so large a bias that no gradient is left."""
    rest = train.rest_of_epoch

    def saturated(one: Any) -> Iterator[Any]:
        with torch.no_grad():
            one.model.linear.bias[0] = 1e4
        return rest(one)

    patch.setattr(train, "rest_of_epoch", saturated)


@pytest.mark.parametrize(
    ("logit", "gradient", "dead"),
    [(-50, 0, True), (-50, 1e-40, False), (-0.05, 0, True), (0, 0, False), (50, 0, False)],
)
@pytest.mark.parametrize("classes", [2, 3, 10, 100, 200])
def test_perfect_fits_equal_probabilities_and_tiny_gradients_are_no_death(
    logit: float, gradient: float, dead: bool, classes: int
) -> None:
    """``logit`` is the label's, the others' is 0. At equal probabilities gradients may cancel in a balanced batch, but
    not in the next one, whichever way their loss is rounded."""
    model, method = nn.Linear(2, 3), build_method("vanilla", "cifar10", classes)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.bias.grad[1] = gradient  # type: ignore[index]
    one: Any = SimpleNamespace(
        model=model, device=torch.device("cpu"), method=method, training=Training(), progress=Progress()
    )
    for count in (1, 4, 10, 50, 64, 100):
        images, labels = torch.zeros(count, 3, 8, 8), torch.zeros(count, dtype=torch.int64)
        logits = logit * torch.eye(classes)[labels]
        step = method.step(lambda _, logits=logits: logits, images, labels, None)
        with pytest.raises(UserError, match="the network is dead in epoch 0: ") if dead else nullcontext():
            train.refuse_dead_network(one, step)


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
        ("--sync_bn True", "--sync_bn True needs GPUs"),
    ],
)
def test_combinations_are_refused_before_training(fresh: Case, more: str, message: str) -> None:
    said = fresh.says(*more.split(), code=None)
    assert message in said
    assert "Epoch" not in said


@pytest.mark.parametrize("flag", ["--resume", "--data_dir", "--root_dir"])
def test_an_empty_path_is_refused(words: list[object], flag: str) -> None:
    """An unset variable of a shell would train from random weights, on other images, or into another folder."""
    assert f"{flag} is empty" in main(*words, flag, "", check=2).stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--schedule 2 9 --gammas 0.1 0.1", "--epochs 2 ends before --schedule 2 9"),
        ("--method cutmix --mix_schedule delayed", "2 ends before --mix_scheduled_epoch 300: nothing is mixed"),
        ("--method cutmix --rand_pos 0.5 --mix_scheduled_epoch 1", "--mix_scheduled_epoch, --rand_pos: no effect with"),
    ],
)
def test_what_changes_nothing_is_a_warning(fresh: Case, more: str, message: str) -> None:
    said = fresh.says(*more.split())
    assert said.count("warning: ") == 1
    assert message in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("settings", 3),
        ("settings", {"arch": "unheard_of"}),
        ("settings", {"initial_channels": "many"}),
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
def test_checkpoints_with_other_content(fresh: Case, tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "odd.pth"
    torch.save(checkpoint.load(fresh.whole / checkpoint.LAST) | {key: value}, path)
    if key in ("classes", "state_dict", "optimizer", "progress"):
        fresh.says("--resume", path, code=None)
    if key in ("settings", "mean", "classes", "state_dict"):
        fresh.words = fresh.words[:4]  # where the images are, and the device
        fresh.says("--evaluate", "--resume", path, code=None)
