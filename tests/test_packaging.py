"""The folder ``mixup/``, and only it, is the package ``sage_mixup``."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.common import ROOT

BUILD = "from setuptools.build_meta import build_wheel; build_wheel('.')"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """What ``pip install .`` installs, made from the files it needs."""
    here = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, here)
    for name in ("mixup", "models"):
        shutil.copytree(ROOT / name, here / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=here, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Deprecat" not in done.stderr
    return zipfile.ZipFile(next(here.glob("*.whl")))


def text(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [path for path in wheel.namelist() if path.endswith(name)]
    return wheel.read(path).decode()


def test_it_holds_the_methods_alone(wheel: zipfile.ZipFile) -> None:
    files = {path for path in wheel.namelist() if ".dist-info/" not in path}
    assert files == {f"sage_mixup/{path.name}" for path in [*(ROOT / "mixup").glob("*.py"), Path("py.typed")]}
    assert text(wheel, "top_level.txt").split() == ["sage_mixup"]
    assert text(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def test_it_brings_torch_and_numpy_and_with_the_extra_a_solver(wheel: zipfile.ZipFile) -> None:
    """In the versions that requirements.txt names."""
    about = message_from_string(text(wheel, "METADATA"))
    needs = [Requirement(line) for line in about.get_all("Requires-Dist")]
    brought = {need.name: str(need.specifier) for need in needs if need.marker is None}
    extra = {need.name: str(need.specifier) for need in needs if need.marker is not None}
    assert brought.keys() == {"torch", "numpy"}
    assert extra.keys() == {"ortools"}
    assert [need.marker.evaluate({"extra": "cut"}) for need in needs if need.marker is not None] == [True]
    lines = (line.split("#")[0] for line in (ROOT / "requirements.txt").read_text().splitlines())
    ours = {need.name: str(need.specifier) for need in map(Requirement, lines)}
    assert brought | extra == {name: ours[name] for name in ("torch", "numpy", "ortools")}
    page = about.get_payload()
    assert page.lstrip().startswith("```python\nfrom sage_mixup import build_method")
    assert "loss = sage.step(model, images, labels).loss\nloss.backward()" in page
    assert about["Requires-Python"] == ">=3.10"
    assert about["License-Expression"] == "MIT"


def test_its_files_name_each_other_relatively() -> None:
    """So that they work under both names."""
    for path in (ROOT / "mixup").glob("*.py"):
        code = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        assert not [line for line in code if line.startswith(("from mixup", "import mixup", "from sage_mixup"))], path
