"""Runs over several processes, by gloo on the CPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from utils.run import Progress, Training

from load_data import Data, Split
from mixup import METHODS, build_method
from models import build_model
from tests import forked
from tests.common import ENVIRONMENT, ROOT, SAGE, SMALL, load_fixed_weights, rows, weights
from utils import distributed, train
from utils.device import step_generator
from utils.distributed import World
from utils.errors import UserError

IMAGES = 12
UNEVEN = 11  # divides over neither 2 nor 4


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(number, 3, 32, 32, generator=generator), torch.randint(0, 10, (number,), generator=generator)


def network() -> nn.Module:
    return load_fixed_weights(build_model("preactresnet18", 10, initial_channels=4)).train()


def one_step(model: nn.Module, name: str, world: World, number: int = IMAGES) -> None:
    """Gradients of this rank's part with its own draws, in the model's ``.grad``."""
    images, labels = (tensor[world.part(number)] for tensor in batch(number))
    method = build_method(name, "cifar10", 10, **({"update_ratio": 0.7, "rand_pos": 0.01} if name == "sage" else {}))
    draws = method.draw(step_generator(3, 0, 0, world.rank), len(images), 32, 32)
    method.step(model, images, labels, draws).loss.backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def is_dead(world: World, saturated: int) -> bool:
    """Whether a run is stopped after a step in which one rank's part of the batch leaves no gradient."""
    torch.manual_seed(0)
    model, method = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), build_method("vanilla", "cifar10", 10)
    images, labels = (tensor[world.part(IMAGES)] for tensor in batch(IMAGES))
    parallel = distributed.data_parallel(model, distributed.ImageWeight())
    step = method.step(parallel, images * (1e6 if world.rank == saturated else 1), labels, None)
    step.loss.backward()
    run: Any = SimpleNamespace(
        model=model, device=torch.device("cpu"), method=method, training=Training(), progress=Progress()
    )
    try:
        train.refuse_dead_network(run, step)
    except UserError:
        return True
    return False


def sample_data() -> Data:
    generator = torch.Generator().manual_seed(1)
    split = Split(
        torch.randint(0, 256, (700, 3, 32, 32), generator=generator, dtype=torch.uint8), torch.arange(700) % 10
    )
    return Data("cifar10", "made here", [str(k) for k in range(10)], (0.5,) * 3, (0.25,) * 3, split, split, None, True)


def work(rank: int, size: int, folder: str) -> None:
    """One rank: every method's step, synchronised batch norm, evaluation; rank 0 writes what it got."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    world = World(rank, size, rank)
    found: dict[str, Any] = {}
    weight = distributed.ImageWeight()
    for name in METHODS:
        model = network()
        one_step(distributed.data_parallel(model, weight), name, world)
        found[name] = gradients(model)
    weight.value = len(range(UNEVEN)[world.part(UNEVEN)]) * size / UNEVEN
    model = network()
    one_step(distributed.data_parallel(model, weight), "vanilla", world, UNEVEN)
    found["uneven"] = gradients(model)
    model = distributed.synchronise_batch_norm(network())
    one_step(distributed.data_parallel(model, weight), "vanilla", world, UNEVEN)
    found["sync_bn"] = gradients(model)
    found["sync_bn_buffers"] = dict(model.named_buffers())
    data = sample_data()
    found["evaluation"] = train.evaluate(network(), data.test, data, torch.device("cpu"), "test", world)
    found["is_dead"] = is_dead(world, saturated=0)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("ranks")
    forked.start_server()
    torch.multiprocessing.start_processes(
        work, (request.param, str(folder)), nprocs=request.param, start_method="forkserver"
    )
    return SimpleNamespace(size=request.param, **torch.load(folder / "found.pt", weights_only=True))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm() + 1e-12, name


@pytest.mark.parametrize("name", [*METHODS, "uneven"])
def test_ranks_give_the_gradients_of_one_process(ranks: SimpleNamespace, name: str) -> None:
    """The shards one after another, with the same draws, averaged over images."""
    number = UNEVEN if name == "uneven" else IMAGES
    expected: dict[str, Tensor] = {}
    for rank in range(ranks.size):
        world = World(rank, ranks.size, rank)
        model = network()
        one_step(model, "vanilla" if name == "uneven" else name, world, number)
        share = len(range(number)[world.part(number)]) / number
        for key, value in gradients(model).items():
            expected[key] = expected.get(key, 0) + share * value
    assert_close(getattr(ranks, name), expected, 1e-5)


def test_rate_of_a_resumed_run_counts_each_image_once() -> None:
    """The first process holds the sums of all when it continues an epoch, and its own part's from there on."""
    progress = Progress(epoch=1, step=3, seconds=2.0)
    run: Any = SimpleNamespace(
        training=Training(batch_size=100), data=sample_data(), progress=progress, world=World(0, 2)
    )
    assert train.line_of_batch(run, 7, [1.0, 30.0, 90.0, 250.0]).endswith(" 150 images/s")
    progress.step = 7
    assert train.line_of_batch(run, 7, [1.0, 30.0, 90.0, 450.0]).endswith(" 350 images/s")


def test_synchronised_batch_norm_is_the_whole_batch(ranks: SimpleNamespace) -> None:
    model = network()
    one_step(model, "vanilla", World(), UNEVEN)
    assert_close(ranks.sync_bn, gradients(model), 1e-4)
    expected = {name: buffer.float() for name, buffer in model.named_buffers()}
    assert_close({name: buffer.float() for name, buffer in ranks.sync_bn_buffers.items()}, expected, 1e-5)


def test_evaluation_is_equal_to_the_last_bit(ranks: SimpleNamespace) -> None:
    torch.set_num_threads(1)
    data = sample_data()
    assert ranks.evaluation == train.evaluate(network(), data.test, data, torch.device("cpu"), "test")


def test_a_rank_without_gradients_goes_on_with_the_others(ranks: SimpleNamespace) -> None:
    assert is_dead(World(0, ranks.size), saturated=0)  # were it alone with its part of the batch
    assert not is_dead(World(1, ranks.size), saturated=0)
    assert not ranks.is_dead


# -------------------------------------------------------------------------------------------------------- whole runs

STEADY = ["--epochs", 12, "--schedule", 2, 4, "--checkpoint_minutes", "1e-6"]


@pytest.fixture(scope="module")
def words(tree: Path) -> list[object]:
    """A small run of SAGE that saves whenever its ranks agree."""
    return [*SMALL, *SAGE, *STEADY, "--data_dir", tree]


@pytest.fixture(scope="module")
def whole(python: Path, words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks that nothing happened to."""
    root = tmp_path_factory.mktemp("whole")
    done = finish(start(python, 2, *words, "--root_dir", root))
    assert done.code == 0, done.said
    (folder,) = root.iterdir()
    return folder


class Done(NamedTuple):
    """How a run ended, and all that its processes said."""

    code: int
    said: str


def start(python: Path, size: int, *words: object, **options: object) -> subprocess.Popen[str]:
    """main.py, by torchrun if there is more than one rank."""
    extra = [f"--{key}={value}" for key, value in options.items()]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", *extra] if size > 1 else []
    return spawn(python, *launch, "main.py", *words)


def spawn(*command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> Done:
    try:
        said, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Done(process.returncode, said)


def wait_for_an_epoch(process: subprocess.Popen[str], root: Path) -> None:
    while not list(root.glob("*/metrics.csv")):
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


def test_a_killed_rank_is_restarted_and_ends_where_it_should(
    python: Path, words: list[object], whole: Path, tmp_path: Path
) -> None:
    process = start(python, 2, *words, "--root_dir", tmp_path, max_restarts=1)
    wait_for_an_epoch(process, tmp_path)
    os.kill(ranks_below(tmp_path)[-1], signal.SIGKILL)
    done = finish(process)
    assert done.code == 0, done.said
    # torchrun tells of the failure it sees first: the killed one's, or the other's, which lost its connection
    assert re.search(r"failed \(exitcode: (-9|1)\)", done.said)
    assert "continuing in epoch" in done.said
    assert_same_end(tmp_path / whole.name, whole)


def test_a_signal_to_one_rank_stops_all_of_them(python: Path, words: list[object], whole: Path, tmp_path: Path) -> None:
    process = start(python, 2, *words, "--root_dir", tmp_path)
    wait_for_an_epoch(process, tmp_path)
    os.kill(ranks_below(tmp_path)[-1], signal.SIGTERM)
    done = finish(process)
    assert done.code != 0
    assert "stopped in epoch" in done.said
    assert f"exitcode: {128 + signal.SIGTERM}" in done.said
    done = finish(start(python, 2, *words, "--root_dir", tmp_path))
    assert done.code == 0, done.said
    assert "continuing in epoch" in done.said
    assert_same_end(tmp_path / whole.name, whole)


def test_a_dead_network_stops_every_rank_with_one_line(python: Path, words: list[object], tmp_path: Path) -> None:
    """The line is one process's to the last digit; what was saved after the epoch before stays."""
    program, codes = tmp_path / "die.py", tmp_path / "codes"
    codes.mkdir()
    program.write_text(
        "import os, sys, main\nfrom tests import forked\nforked.saturate(epoch=1)\n"
        "try:\n    code = main.main(sys.argv[1:])\nexcept SystemExit as stop:\n    code = stop.code\n"
        f"open({str(codes)!r} + '/' + os.environ.get('RANK', 'alone'), 'w').write(str(code))\nsys.exit(code)\n"
    )
    mine = [program, *words, "--method", "vanilla", "--root_dir"]
    alone = [*mine, tmp_path / "alone", "--checkpoint_minutes", 60]  # a save would find it out before the epoch ends
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *mine, tmp_path / "ranks"]
    lines = []
    for command in (alone, ranks):
        done = finish(spawn(python, *command))
        assert done.code == 1, done.said
        lines.append(re.findall("^error: .*", done.said, re.MULTILINE))
    assert len(lines[0]) == 1
    assert lines[0][0].startswith(
        "error: the network is dead in epoch 1: every gradient of the last batch is exactly 0"
    )
    assert lines[1] == lines[0]
    assert {path.name: path.read_text() for path in codes.iterdir()} == {"alone": "1", "0": "1", "1": "1"}
    (folder,) = (tmp_path / "ranks").iterdir()
    assert len(rows(folder)) == 1
    progress = torch.load(folder / "checkpoint.pth.tar", weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 0)
    assert weights(folder)["linear.bias"].abs().max() < 10


def test_one_command_starts_a_process_for_each_gpu(
    python: Path, words: list[object], whole: Path, tmp_path: Path
) -> None:
    """``launch`` types the command again under torchrun; here its processes use the CPU."""
    program = tmp_path / "launch.py"
    program.write_text("import sys\nfrom utils import distributed\nsys.exit(distributed.launch(2, sys.argv[1:]))\n")
    command = [python, program, "main.py", *words, "--root_dir", tmp_path]
    process = spawn(*command)
    wait_for_an_epoch(process, tmp_path)
    process.terminate()
    done = finish(process)
    assert done.code == 128 + signal.SIGTERM, done.said
    assert "stopped in epoch" in done.said
    done = finish(spawn(*command))
    assert done.code == 0, done.said
    assert_same_end(tmp_path / whole.name, whole)


@pytest.mark.parametrize(
    ("method", "first", "second"), [(name, *((4, 1) if i % 2 else (1, 4))) for i, name in enumerate(METHODS)]
)
def test_a_run_continues_on_another_number_of_ranks(
    python: Path, tree: Path, tmp_path: Path, method: str, first: int, second: int
) -> None:
    words = [*SMALL, *STEADY, "--method", method, "--data_dir", tree, "--root_dir", tmp_path]
    process = start(python, first, *words)
    wait_for_an_epoch(process, tmp_path)
    process.terminate()
    assert finish(process).code != 0
    (folder,) = tmp_path.iterdir()
    assert not (folder / "result.json").exists()
    before = rows(folder)
    done = finish(start(python, second, *words))
    assert done.code == 0, done.said
    assert f"continuing in epoch {len(before)}" in done.said
    after = rows(folder)
    assert len(after) == 12
    assert after[: len(before)] == before
    assert json.loads((folder / "result.json").read_text())["epochs"] == 12


def test_a_batch_that_does_not_divide_is_refused(python: Path, tree: Path, tmp_path: Path) -> None:
    done = finish(start(python, 2, *SMALL, "--data_dir", tree, "--root_dir", tmp_path, "--batch_size", 7))
    assert done.code != 0
    assert "--batch_size 7 does not divide over 2 processes" in done.said


def test_several_gpus_without_one_go_on_with_a_warning(python: Path, tree: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() > 1:
        return
    words = ["--ngpu", 2, "--data_dir", tree, "--root_dir", tmp_path, "--epochs", 1, "--schedule", 1, "--gammas", 0.1]
    done = finish(start(python, 1, *SMALL, *words))
    assert done.code == 0, done.said
    assert "warning: --ngpu 2" in done.said


# ----------------------------------------------------------------------------------------------------------- meeting


def test_synchronised_batch_norm_keeps_bfloat16() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain, norm = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        x = torch.randn(25, 3, 28, 28)
        expected = plain(x)
        distributed.synchronise_batch_norm(norm)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = norm(x.bfloat16())
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.02)
        torch.testing.assert_close(norm.running_var, plain.running_var, atol=1e-3, rtol=0)
    finally:
        dist.destroy_process_group()


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
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "none"}
        for name, value in {**address, **place}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=f"process {rank} did not meet the other 1: .+"):
            distributed.join(0, 100)
    assert not dist.is_initialized()
