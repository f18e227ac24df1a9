"""Runs over several processes, by gloo on the CPU."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from load_data import Data, Split
from mixup import METHODS, build_method
from models import build_model
from tests.common import ENVIRONMENT, ROOT, SAGE, SMALL, load_fixed_weights, rows, weights
from utils import distributed, train
from utils.device import step_generator
from utils.distributed import World
from utils.errors import BadArguments, UserError
from utils.run import Progress, Training

IMAGES = dict.fromkeys(METHODS, 12) | {"uneven": 11}  # in a batch; 11 divides over neither 2 nor 4


def network() -> nn.Module:
    return load_fixed_weights(build_model("preactresnet18", 10, initial_channels=4)).train()


def batch(world: World, number: int) -> tuple[Tensor, Tensor]:
    """This rank's part of a batch."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(number, 3, 32, 32, generator=generator), torch.arange(number) * 7 % 10
    return images[world.part(number)], labels[world.part(number)]


def gradients(name: str, world: World) -> dict[str, Tensor]:
    """Of this rank's part with its own draws; averaged over the ranks where there are some."""
    settings: dict[str, Any] = {"update_ratio": 0.7, "rand_pos": 0.01} if name == "sage" else {}
    method = build_method("vanilla" if name == "uneven" else name, "cifar10", 10, **settings)
    images, labels = batch(world, IMAGES[name])
    draws = method.draw(step_generator(3, 0, 0, world.rank), len(images), 32, 32)
    training, data = Training(batch_size=IMAGES[name]), SimpleNamespace(train=range(IMAGES[name]))
    run: Any = SimpleNamespace(training=training, data=data, progress=Progress(), world=world)
    weight = train.weight_of(run, len(images)) if dist.is_initialized() else 1.0
    model = network()
    parallel = distributed.data_parallel(model)  # whose hooks must live until the backward pass
    (method.step(parallel, images, labels, draws).loss * weight).backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


def is_dead(world: World, saturated: int) -> bool:
    """Whether a run is stopped after a step in which the first ranks' parts of the batch leave no gradient."""
    torch.manual_seed(0)
    model, method = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), build_method("vanilla", "cifar10", 10)
    images, labels = batch(world, 12)
    parallel = distributed.data_parallel(model)
    step = method.step(parallel, images * (1e6 if world.rank < saturated else 1), labels, None)
    step.loss.backward()
    run: Any = SimpleNamespace(
        model=model, device=torch.device("cpu"), method=method, training=Training(), progress=Progress()
    )
    try:
        train.refuse_dead_network(run, step)
    except UserError:
        return True
    return False


def evaluation(world: World) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (700, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split, classes = Split(images, torch.arange(700) % 10), [str(k) for k in range(10)]
    data = Data("cifar10", "made here", classes, (0.5,) * 3, (0.25,) * 3, split, split, None, True)
    return train.evaluate(network(), split, data, torch.device("cpu"), "test", world)


def work(rank: int, size: int, folder: str) -> None:
    """One rank; rank 0 writes what it got."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    world = World(rank, size, rank)
    found: dict[str, Any] = {name: gradients(name, world) for name in IMAGES}
    found |= {"evaluation": evaluation(world), "is_dead": [is_dead(world, number) for number in (1, size)]}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(
        work, (request.param, str(folder)), nprocs=request.param, start_method="forkserver"
    )
    return SimpleNamespace(size=request.param, **torch.load(folder / "found.pt", weights_only=True))


@pytest.mark.parametrize("name", IMAGES)
def test_ranks_give_the_gradients_of_one_process(ranks: SimpleNamespace, name: str) -> None:
    """The shards one after another, with the same draws, averaged over images."""
    worlds = [World(rank, ranks.size, rank) for rank in range(ranks.size)]
    shares = [len(range(IMAGES[name])[world.part(IMAGES[name])]) / IMAGES[name] for world in worlds]
    parts, found = [gradients(name, world) for world in worlds], getattr(ranks, name)
    assert found.keys() == parts[0].keys()
    for key, value in found.items():
        expected = torch.stack([share * part[key] for share, part in zip(shares, parts, strict=True)]).sum(dim=0)
        assert (value - expected).norm() <= 1e-5 * expected.norm() + 1e-12, key


def test_evaluation_is_equal_to_the_last_bit(ranks: SimpleNamespace) -> None:
    torch.set_num_threads(1)
    assert ranks.evaluation == evaluation(World())


def test_a_rank_without_gradients_goes_on_with_the_others(ranks: SimpleNamespace) -> None:
    assert is_dead(World(0, ranks.size), 1)  # were it alone with its part of the batch
    assert not is_dead(World(1, ranks.size), 1)
    assert ranks.is_dead == [False, True]


# -------------------------------------------------------------------------------------------------------- whole runs

STEADY = ["--epochs", 12, "--schedule", 2, 4, "--checkpoint_minutes", "1e-6"]


@pytest.fixture(scope="module")
def words(tree: Path) -> list[object]:
    """A small run of SAGE that saves whenever its ranks agree."""
    return [*SMALL, *SAGE, *STEADY, "--data_dir", tree]


@pytest.fixture(scope="module")
def whole(words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks that nothing happened to."""
    root = tmp_path_factory.mktemp("whole")
    finish(torchrun(*words, "--root_dir", root), 0)
    (folder,) = root.iterdir()
    return folder


def torchrun(*words: object, restarts: int = 0) -> subprocess.Popen[str]:
    """main.py on two ranks."""
    how = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max_restarts={restarts}"]
    return subprocess.Popen(
        [sys.executable, *how, "main.py", *map(str, words)],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int) -> str:
    """What a process said that must end with this code."""
    try:
        said, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, said
    return said


def wait_for_a_checkpoint(process: subprocess.Popen[str], root: Path) -> None:
    while not list(root.glob("*/checkpoint.pth.tar")):
        assert process.poll() is None
        time.sleep(0.02)


def ranks_below(root: Path) -> list[int]:
    """The processes of a run, in the order in which torchrun started them; not torchrun itself."""
    listed = subprocess.run(["pgrep", "-af", f"root_dir {root}"], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "torch.distributed.run" not in line]


def assert_same_end(folder: Path, other: Path) -> None:
    assert rows(folder) == rows(other)
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_killed_rank_is_restarted_and_ends_where_it_should(words: list[object], whole: Path, tmp_path: Path) -> None:
    process = torchrun(*words, "--root_dir", tmp_path, restarts=1)
    wait_for_a_checkpoint(process, tmp_path)
    os.kill(ranks_below(tmp_path)[-1], signal.SIGKILL)
    said = finish(process, 0)
    # torchrun tells of the failure it sees first: the killed one's, or the other's, which lost its connection
    assert re.search(r"failed \(exitcode: (-9|1)\)", said)
    assert "continuing in epoch" in said
    assert_same_end(tmp_path / whole.name, whole)


def test_a_signal_to_one_rank_stops_all_of_them(words: list[object], whole: Path, tmp_path: Path) -> None:
    process = torchrun(*words, "--root_dir", tmp_path)
    wait_for_a_checkpoint(process, tmp_path)
    os.kill(ranks_below(tmp_path)[-1], signal.SIGTERM)
    said = finish(process, 1)
    assert "stopped in epoch" in said
    assert f"exitcode: {128 + signal.SIGTERM}" in said
    assert "continuing in epoch" in finish(torchrun(*words, "--root_dir", tmp_path), 0)
    assert_same_end(tmp_path / whole.name, whole)


def test_several_gpus_are_torchruns_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(BadArguments, match="torchrun --nproc_per_node=4 main"):
        distributed.join(4, 100)


def test_a_batch_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_place(monkeypatch, 0)
    with pytest.raises(BadArguments, match="--batch_size 7 does not divide over 2 processes"):
        distributed.join(0, 7)


def set_place(monkeypatch: pytest.MonkeyPatch, rank: int, **more: object) -> None:
    """This process is one of two that torchrun started."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "none"}
    for name, value in (place | more).items():
        monkeypatch.setenv(name, str(value))


def test_a_meeting_ignores_the_words_of_dead_processes() -> None:
    """Three attempts in one store, as torchrun keeps it; once rank 0 comes last, once first."""
    store, size = dist.HashStore(), 3
    store.set("present/1", "of a killed process")
    names = []
    for late in (0, 0, 2):
        with ThreadPoolExecutor(size) as pool:

            def meet(rank: int, late: int = late) -> str:
                time.sleep(0.1 * (rank == late))
                return distributed.agreed_name(store, World(rank, size, rank))

            names.append(set(pool.map(meet, range(size))))
    assert [len(found) for found in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3


def test_processes_that_do_not_meet_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    server = dist.TCPStore("localhost", 0, is_master=True)
    monkeypatch.setattr(distributed, "MEETING", timedelta(seconds=0.2))
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": server.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    for rank in (0, 1):
        set_place(monkeypatch, rank, **address)
        with pytest.raises(UserError, match=f"process {rank} did not meet the other 1: .+"):
            distributed.join(0, 100)
    assert not dist.is_initialized()
