"""What a checkpoint holds, and how it is written and read without loss."""

from __future__ import annotations

import hashlib
import io
import os
import pickletools
import shutil
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from .files import UserError, atomic_write
from .records import log

LAST, PREVIOUS, BEST = "checkpoint.pth.tar", "checkpoint_previous.pth.tar", "model_best.pth.tar"
_MARK = b"sha256:"
_COMMENT = len(_MARK) + 64


class DamagedCheckpoint(UserError):
    """A checkpoint whose content is not what was written."""


def save(state: dict[str, Any], folder: Path, best: bool = False) -> None:
    """Write ``state`` as the folder's last checkpoint, keeping the one before; ``best`` also names it the best one.

    The file is an ordinary ``torch.save`` archive that ``torch.load(…, weights_only=True)`` opens; its checksum is the
    archive's comment. Raises ``OSError`` with nothing half-written.

    Killed anywhere in here, the folder holds the old last checkpoint or the new one, and never a last checkpoint that
    is ahead of the best one. The best one is a file of its own: damage to one file is damage to one.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()[:-2]  # without the length of the (empty) archive comment
    comment = _MARK + hashlib.sha256(content).hexdigest().encode()
    for name in [BEST, LAST] if best else [LAST]:
        with atomic_write(folder / name) as file:
            file.write(content)
            file.write(struct.pack("<H", len(comment)) + comment)
            file.flush()
            if name == LAST and (folder / LAST).exists():
                _link(folder / LAST, folder / PREVIOUS)


def _link(source: Path, target: Path) -> None:
    """Give ``source`` a second name, atomically; where a file system has no links, it is copied."""
    temporary = target.with_name(f".{target.name}.link.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # renaming a link over another of the same file leaves both


class Inert:
    """Stands for an object of a class that only its author has, such as the meters in published checkpoints."""

    def __init__(self, *args: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _unknown_classes(content: bytes) -> set[str]:
    """Names in the archive's pickles that PyTorch's restricted loader does not know, to be made ``Inert``.

    Raises:
        UserError: a name from Python itself or PyTorch that no checkpoint needs: a pickle made to run something.
    """
    names = {name for stream in _pickles(content) for name in _global_names(stream)}
    unknown = names - set(torch._weights_only_unpickler._get_allowed_globals())
    for name in unknown:
        module = name.split(".")[0]
        if module in sys.stdlib_module_names or module in ("__builtin__", "torch"):
            raise UserError(f"refused: it asks for {name}, which a checkpoint has no use for and an attack has")
    return unknown


def _pickles(content: bytes) -> Iterator[IO[bytes]]:
    """Streams positioned at each pickle: one in today's zip archives, five in a row before PyTorch 1.6."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise UserError("refused: it is compressed, which PyTorch never does; it could unpack to anything")
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    yield io.BytesIO(archive.read(name))
    else:
        stream = io.BytesIO(content)
        for _ in range(5):
            yield stream


def _global_names(stream: IO[bytes]) -> Iterator[str]:
    """module.name of every global that the pickle at the stream's position names; nothing is built or called."""
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings.append(argument)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint, on the CPU, without executing anything in it.

    Raises:
        UserError: no such file, or not a checkpoint.
        DamagedCheckpoint: written by this project, and truncated or altered since.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"checkpoint {path}: {error.strerror}") from error
    mark = len(content) - _COMMENT
    marked = mark > 0 and content[mark:].startswith(_MARK)
    if marked:
        found = hashlib.sha256(memoryview(content)[: mark - 2]).hexdigest().encode()
        if found != content[mark + len(_MARK) :]:
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: its checksum does not match")
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in _unknown_classes(content)]):
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedCheckpoint(f"checkpoint {path} cannot be read, cut short or no checkpoint: {reason}") from error
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}, not a training state")
    if "sage" in state and not marked:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: its checksum is gone")
    return state


def load_last(folder: Path | None) -> dict[str, Any] | None:
    """The folder's last checkpoint; the one before, or the best one, if that is damaged; None where none is whole.

    A damaged one gets another name, so that it never takes the place of the one before.
    """
    if folder is None:
        return None
    for name in (LAST, PREVIOUS, BEST):
        if (folder / name).exists():
            try:
                return load(folder / name)
            except DamagedCheckpoint as error:
                aside = folder / f"{name}.damaged"
                os.replace(folder / name, aside)
                log.warning(f"warning: {error}; kept as {aside.name}, an earlier one is used")
    return None
