"""README's and docs' commands, code, names and links are what there is."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

import main
from load_data import Data, Split, train_batches
from mixup import METHODS, build_method
from tests.common import ENVIRONMENT, ROOT
from utils import options

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README} | {
    f"docs/{path.name}": path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))
}
COMMANDS = [line for line in README.splitlines() if line.startswith("python3 main.py") and "…" not in line]
MORE = [
    line
    for page in PAGES.values()
    for line in page.splitlines()
    if line.startswith("python3 main.py") and "…" not in line
]


def words(page: str) -> int:
    """Words of a page without its code blocks, tables, comments and addresses of links."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", page, flags=re.DOTALL)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    return len(re.sub(r"\]\(.*?\)", "]", text, flags=re.DOTALL).split())


def test_the_front_page_is_short() -> None:
    assert words("one two\n| three |\n[four](five/six.md)\n```bash\nseven\n```") == 3
    assert words(README) <= 1100


@pytest.mark.parametrize("command", sorted(set(MORE)))
def test_commands_are_understood(command: str) -> None:
    filled = command.replace("[arch]", "wrn16_8").replace("[baseline_method]", "comix")
    args, given = options.parse(shlex.split(filled, comments=True)[2:])
    assert {"dataset", "data_dir"} & given
    assert args.epochs > 0


BASELINES = [command for command in COMMANDS if "[baseline_method]" in command]
FILLED = [
    command.replace("[arch]", arch).replace("[baseline_method]", method)
    for command in BASELINES
    for arch in ("preactresnet18", "resnext29_4_24", "wrn16_8")
    for method in METHODS
]
build_once = cache(main.build_model)


@pytest.mark.parametrize("command", FILLED, ids=lambda command: " ".join(command.split()[3:4] + command.split()[-1:]))
def test_baselines_start(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As typed, but for the images: method, network and optimiser are made, and two quarter images are trained on."""
    args, _ = options.parse(shlex.split(command)[2:])
    classes = [str(k) for k in range(int(args.dataset.removeprefix("cifar")))]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.batch_size, 3, 16, 16), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(len(images)) % len(classes))
    data = Data(args.dataset, "random", classes, (0.5,) * 3, (0.25,) * 3, split, split, None, flip=True)  # type: ignore[arg-type]
    monkeypatch.setattr(main, "build_model", build_once)
    run = main.make_run(args, data, torch.device("cpu"))
    batch, labels = next(train_batches(data, batch_size=args.batch_size, seed=args.seed, epoch=0, device="cpu"))
    draws = run.method.draw(np.random.default_rng(0), 2, 16, 16)
    step = run.method.step(run.model, batch[:2], labels[:2], draws)
    step.loss.backward()
    assert step.loss.isfinite()
    assert step.logits.shape == (2, len(classes))


def test_the_papers_commands_are_there() -> None:
    sage = [command for command in COMMANDS if "--method sage --blur_sigma 1.0 --seed 1 --kernel_size 5" in command]
    assert len(sage) == 4
    assert len(BASELINES) == 2


def test_your_own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three lines, and the same in full: as they stand, but on the CPU and on two batches of noise."""
    short, full = re.findall(r"```python\n(.*?)```", README.split("## In your own loop")[1], flags=re.DOTALL)[:2]
    fake = partial(torchvision.datasets.FakeData, 8, (3, 32, 32), 10)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, download, transform: fake(transform))
    for pattern, here in ((r"\.cuda\(\)", ""), ("batch_size=100", "batch_size=4")):
        full, changes = re.subn(pattern, here, full)
        assert changes
    names: dict[str, Any] = {}
    exec(full, names)
    assert names["loss"].isfinite()
    assert all(parameter.grad is not None for parameter in names["model"].parameters())
    assert names["sage"].loss is torch.nn.functional.cross_entropy
    assert len(short.splitlines()) == 3
    exec(short, names)
    assert names["loss"].isfinite()


BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
TYPED = [line for block in BLOCKS if not block.startswith("# needs ") for line in block.splitlines()]
# what a command of the page is run with instead of its words, so that it takes seconds
SHORTER = [
    (
        r"^bash scripts/quickstart.sh.*",
        "ROOT_DIR=RUNS NGPU=0 bash scripts/quickstart.sh --epochs 1 --schedule 1 --gammas 0.1",
    ),
    (r"^bash scripts/sweep.sh", "bash scripts/sweep.sh --dry_run"),
    (
        r"^python3 main.py --dataset folder .*",
        r"\g<0> --initial_channels 2 --epochs 1 --schedule 1 --gammas 1 --batch_size 8",
    ),
    (r"--images 100", "--images 1 --ngpu 0"),
    (r"--out paper", "--out RUNS/paper"),
    (r"^python3", sys.executable),
]
LEAVES = {
    "quickstart": "RUN/curves.png",
    "evaluate.py": "RUN/evaluation/results.jsonl",
    "summarize": "RUNS/paper/summary.tex",
    "--dataset folder": "RUNS/folder*/mixed.png",
}


def test_commands_of_the_page_are_run_or_say_what_they_need(tree: Path, tmp_path: Path) -> None:
    """As typed, in their order, but for their size: quickstart, sweep, tables, evaluation, a tree of images."""
    assert len(TYPED) >= 6
    left = dict(LEAVES)
    for line in TYPED:
        if line.startswith("bash scripts/test.sh"):
            continue  # is running
        command = line
        for pattern, words in SHORTER:
            command = re.sub(pattern, words, command)
        run = next(iter(tmp_path.glob("digits*")), tmp_path / "none")
        for word, path in (("RUNS", tmp_path), ("RUN", run), ("PATH", tree)):
            command = re.sub(rf"\b{word}\b", shlex.quote(str(path)), command)
        environment = ENVIRONMENT | {"PYTHON": sys.executable}
        done = subprocess.run(
            command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        for name in [name for name in left if name in line]:
            pattern = left.pop(name).replace("RUNS/", "").replace("RUN/", "digits*/")
            assert list(tmp_path.glob(pattern)), f"{line} leaves no {pattern}"
    assert not left


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        path, _, heading = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        if "://" not in link:
            assert target.exists(), link
            assert not heading or heading in anchors(target.read_text(encoding="utf-8")), link


def anchors(page: str) -> set[str]:
    """The headings of a page as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_names_are_those_of_the_tree(name: str) -> None:
    """Scripts, tests, and Python code."""
    page = PAGES[name]
    assert [path for path in re.findall(r"bash (scripts/\S+\.sh)", page) if not (ROOT / path).exists()] == []
    tests = set(re.findall(r"def (test_\w+)", "".join(path.read_text("utf-8") for path in ROOT.glob("tests/*.py"))))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert named - tests == set()
    assert named or name != "docs/differences.md"
    for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        compile(code, name, "exec")


def test_every_file_has_its_place_on_the_map() -> None:
    map_of_files = README.split("## Files")[1].split("```")[1]
    named = set(re.findall(r"[\w.]+\.py", map_of_files))
    known = {path.name for path in ROOT.glob("*.py")} | {path.name for path in ROOT.glob("mixup/*.py")}
    methods = {f"{method.__module__.split('.')[1]}.py" for method in METHODS.values()}  # one file each, as it says
    assert known - named - methods == {"__init__.py"}
    assert named <= known | {path.name for path in ROOT.glob("*/*.py")}
    folders = set(re.findall(r"(\w+)/(?= |,)", map_of_files))
    assert folders == {"mixup", "models", "utils", "scripts", "docs", "figures", "results", "tests"}


@pytest.mark.parametrize("flag", ["--train", "--box", "--graph", "--in_batch"])
def test_flags_that_do_not_exist_here(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        options.parse(["--method", "puzzle", flag, "True"])
    assert flag in capsys.readouterr().err


def test_given_values_win_over_presets() -> None:
    args, _ = options.parse(["--method", "comix", "--mixup_alpha", "0.7", "--clean_lam", "0.5", "--m_beta", "0.1"])
    method: Any = build_method("comix", "cifar10", 10, **options.method_settings(args))
    assert (method.mixup_alpha, method.clean_lam, method.m_beta) == (0.7, 0.5, 0.1)
    preset: Any = build_method("comix", "cifar10", 10)
    assert (preset.mixup_alpha, preset.clean_lam) == (2, 1)


def test_process_counts_are_accepted() -> None:
    """And are no part of what a run is."""
    assert {"mp", "workers"} <= options.parse(["--mp", "3", "--workers", "5"])[1] & options.NOT_PART_OF_A_RUN


def test_messages_of_the_troubleshooting_page_are_those_of_the_program() -> None:
    messages = re.findall(r"^\| `(.*?)` \|", PAGES["docs/troubleshooting.md"], flags=re.MULTILINE)
    files = [ROOT / "main.py", ROOT / "load_data.py", *ROOT.glob("utils/*.py"), *ROOT.glob("mixup/*.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a string over several lines
    assert len(messages) > 24
    assert [part for message in messages for part in message.split(" … ") if part not in source] == []
