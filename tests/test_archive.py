"""What a file holds is built without trusting it, and a lack of memory is no damage."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.common import ROOT
from tests.test_checkpoint import state
from utils import archive, checkpoint, unpickle
from utils.errors import OutOfMemory, UserError


def archived(path: Path, pickled: bytes, **records: bytes) -> Path:
    """What PyTorch writes, with a pickle made by hand."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, content in {"data.pkl": pickled, "version": b"3\n", **records}.items():
            file.writestr(f"archive/{name}", content)
    return path


def refused(path: Path, *words: str) -> UserError:
    with pytest.raises(UserError) as caught:
        archive.load(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in (str(path), *words):
        assert word in message, message
    return caught.value


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_is_read(tmp_path: Path, zipped: bool) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    tied = torch.nn.Parameter(torch.ones(3))
    saved = {
        "tensors": [weight, weight.t(), weight[1:, ::2], torch.tensor(3), torch.empty(0, 2), tied, tied],
        "dtypes": [weight.to(kind) for kind in (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool)],
        "settings": {"name": "é", "numbers": (1, 2.5, None, True, -3, 2**70), 5: []},
        "state_dict": torch.nn.BatchNorm2d(3).state_dict(),
    }
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = archive.load(tmp_path / "a.pth")
    assert found["settings"] == saved["settings"]
    assert list(found["state_dict"]) == list(saved["state_dict"])  # type: ignore[call-overload]
    pairs = [*zip(found["tensors"], saved["tensors"], strict=True), *zip(found["dtypes"], saved["dtypes"], strict=True)]
    for one, other in pairs:  # type: ignore[misc]
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        assert torch.equal(one, other)


def test_an_ordered_dictionary_of_python_2_is_read(tmp_path: Path) -> None:
    pickled = b"\x80\x02ccollections\nOrderedDict\n](](U\x01aK\x07ee\x85R."
    assert archive.load(archived(tmp_path / "a.pth", pickled)) == {"a": 7}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("value", "word"),
    [
        (torch.zeros(1).expand(2**20, 2**20), "shape"),
        (
            torch.sparse_coo_tensor(
                torch.zeros((1, 1), dtype=torch.int64), torch.ones(1), (2**40,), check_invariants=True
            ),
            "sparse",
        ),
        (OrderedDict((str(k), torch.zeros(9000)[:]) for k in range(4)), ""),
        (torch.empty(2**40, device="meta"), "meta"),
    ],
)
def test_tensors_are_backed_by_the_bytes_of_the_file(tmp_path: Path, value: Any, word: str, zipped: bool) -> None:
    if not word:  # views of the same bytes
        value = OrderedDict((name, next(iter(value.values()))[:]) for name in value)
    torch.save({"state_dict": {"a": value}}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert (tmp_path / "a.pth").stat().st_size < 50_000
    refused(tmp_path / "a.pth", "refused", word)


def test_records_that_share_bytes_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(50_000)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth", "a") as file:
        for key in range(1, 9):
            again = copy.copy(file.getinfo("a/data/0"))
            again.filename = f"a/data/{key}"
            file.filelist.append(again)
        file.writestr("a/last", b"")
    assert (tmp_path / "a.pth").stat().st_size < 250_000
    refused(tmp_path / "a.pth", "claim more")


DEEP = b")" + b"q\x00h\x00\x86" * 60  # a pair of pairs of pairs
HUNGRY = {
    "storage": b"\x80\x02}U\x01actorch\nFloatStorage\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85Rs.",
    "tensor": b"\x80\x02}U\x01actorch\nFloatTensor\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85Rs.",
    "bytes": b"\x80\x02}U\x01acbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85Rs.",
    "long key": b"\x80\x02}" + DEEP + b"K\x01s.",
    "set": b"\x80\x02}U\x01ac__builtin__\nset\n]" + DEEP + b"a\x85Rs.",
    "name": b"\x80\x04}U\x01a" + b"B\x00\x00\x00\x7f" + b"x" * 9 + b"s.",
    "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "number": b"\x80\x02}U\x01a\x8b\xff\xff\xff\x7fs.",
    "dictionary": b"\x80\x02}q\x01U\x01ah\x01s.",
    "pairs": b"\x80\x02]q\x01("
    + b"](U\x01aK\x01e" * 500
    + b"e"
    + b"ccollections\nOrderedDict\nh\x01\x85R" * 999
    + b".",
}


@pytest.mark.parametrize("kind", HUNGRY)
def test_hungry_pickles_do_nothing(tmp_path: Path, kind: str) -> None:
    """They ask for terabytes or for years."""
    path = archived(tmp_path / "a.pth", HUNGRY[kind])
    if kind in ("storage", "bytes", "set"):
        assert isinstance(archive.load(path)["a"], unpickle.Inert)
    elif kind == "memo":
        assert archive.load(path) == {}
    else:
        refused(path)


def test_lists_that_hold_each_other_are_refused(tmp_path: Path) -> None:
    nested: list[Any] = [0]
    for _ in range(30):
        nested = [nested, nested]
    endless: list[Any] = []
    endless.append(endless)
    for settings in (nested, endless):
        torch.save({"settings": {"schedule": settings}}, tmp_path / "a.pth")
        refused(tmp_path / "a.pth", "lists")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        refused(path, "not a regular file")
    with open(tmp_path / "zeros", "wb") as file:
        file.truncate(2**42)  # without a byte on the disk
    refused(tmp_path / "zeros", "no checkpoint")


# ------------------------------------------------------------------------------------------------- too little memory


SHORT_OF_MEMORY = """
import sys
from pathlib import Path
from tests.common import limited_memory
from utils import checkpoint
from utils.errors import OutOfMemory
for spare in (0, 96 * 2**20):  # not enough to read it; enough for that, and not for its tensors
    try:
        with limited_memory(spare):
            checkpoint.load_last(Path(sys.argv[1]))
    except OutOfMemory as error:
        print("out of memory" if "memory" in str(error) else error)
"""


def test_too_little_memory_leaves_the_checkpoints_alone(tmp_path: Path) -> None:
    for epoch in range(3):
        checkpoint.save(state(epoch) | {"large": torch.zeros(epoch // 2 * 2**24)}, tmp_path, best=epoch == 0)
    names = sorted(os.listdir(tmp_path))
    # in a process of its own: one that has freed as much memory needs no more
    done = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "out of memory\n" * 2, done.stderr
    assert sorted(os.listdir(tmp_path)) == names
    assert checkpoint.load_last(tmp_path)["progress"]["epoch"] == 2  # type: ignore[index]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: …")])
def test_memory_errors_of_every_kind_are_no_damage(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(content: bytes) -> None:
        raise error

    checkpoint.save(state(1), tmp_path)
    monkeypatch.setattr(archive, "unpickle", fail)
    with pytest.raises(OutOfMemory):
        archive.load(tmp_path / checkpoint.LAST)


def test_a_matching_checksum_is_never_damage(tmp_path: Path) -> None:
    """It was written so, by whoever wrote it."""
    content = archived(tmp_path / "a.pth", pickle.dumps({"a": {1, 2}}, protocol=4)).read_bytes()[:-2]
    comment = archive.COMMENT_MARK + hashlib.sha256(content).hexdigest().encode()
    (tmp_path / "a.pth").write_bytes(content + struct.pack("<H", len(comment)) + comment)
    assert not isinstance(refused(tmp_path / "a.pth", "cannot be read"), archive.DamagedCheckpoint)
