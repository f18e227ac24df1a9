"""Bytes on the disk: files that are never half-written, checksums, and files that nobody vouches for."""

from __future__ import annotations

import hashlib
import io
import os
import pickletools
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from .errors import UserError

COMMENT_MARK = b"sha256:"
_COMMENT_LENGTH = len(COMMENT_MARK) + 64


class DamagedCheckpoint(UserError):
    """A checkpoint whose content is not what was written."""


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside ``path``; on success flush it to the disk and rename it, else remove it.

    A reader sees the old content or the whole new one. Raises the ``OSError`` of the failing call, with ``path``.
    """
    path, temporary = Path(path), ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        text = {} if "b" in mode else {"encoding": "utf-8", "newline": "", "errors": "surrogateescape"}
        with open(handle, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        if temporary:
            with suppress(OSError):
                os.unlink(temporary)


def remove_leftovers(folder: str | os.PathLike[str], name: str = "*", older_than: float = 0.0) -> None:
    """Remove temporary files for ``name`` whose writer was killed: those at least ``older_than`` seconds old."""
    for path in Path(folder).glob(f".{name}.*tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime >= older_than:
                path.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def link(source: Path, target: Path) -> None:
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
    mark = len(content) - _COMMENT_LENGTH
    marked = mark > 0 and content[mark:].startswith(COMMENT_MARK)
    if marked:
        found = hashlib.sha256(memoryview(content)[: mark - 2]).hexdigest().encode()
        if found != content[mark + len(COMMENT_MARK) :]:
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
