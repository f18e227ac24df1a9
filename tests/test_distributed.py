"""Runs over several processes, by gloo on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
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
from tests.common import ENVIRONMENT, ROOT, SMALL, load_fixed_weights, main
from utils import distributed, train
from utils.distributed import World
from utils.runtime import step_generator

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
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (request.param, str(folder)), nprocs=request.param)
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


def torchrun(size: int, *words: object, **options: object) -> list[str]:
    extra = [f"--{key}={value}" for key, value in options.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    return [*command, *extra, "main.py", *map(str, words)]


@pytest.mark.parametrize(("first", "second"), [(4, 1), (1, 4)])
def test_a_run_continues_on_another_number_of_ranks(tree: Path, tmp_path: Path, first: int, second: int) -> None:
    words = [*SMALL, "--data_dir", tree, "--root_dir", tmp_path, "--epochs", 2, "--schedule", 1, "--gammas", 0.1]
    words += ["--checkpoint_minutes", "1e-6"]

    def command(size: int) -> list[str]:
        return torchrun(size, *words) if size > 1 else [sys.executable, "main.py", *map(str, words)]

    process = subprocess.Popen(
        command(first), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list(tmp_path.glob("*/metrics.csv")):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    process.wait(60)
    (folder,) = tmp_path.iterdir()
    assert not (folder / "result.json").exists()
    done = subprocess.run(command(second), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing in epoch 1" in done.stdout
    assert json.loads((folder / "result.json").read_text())["epochs"] == 2


def test_a_batch_that_does_not_divide_is_refused(tree: Path, tmp_path: Path) -> None:
    command = torchrun(2, *SMALL, "--data_dir", tree, "--root_dir", tmp_path, "--batch_size", 7)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "--batch_size 7 does not divide over 2 processes" in done.stderr


def test_several_gpus_without_one_go_on_with_a_warning(tree: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() > 1:
        return
    words = ["--ngpu", 2, "--data_dir", tree, "--root_dir", tmp_path, "--epochs", 1, "--schedule", 1, "--gammas", 0.1]
    assert "warning: --ngpu 2" in main(*SMALL, *words).stdout
