"""Bytes on the disk: files that are never half-written, checksums, and files that nobody vouches for."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import IO, Any

from .errors import UserError, is_out_of_memory, out_of_memory
from .unpickle import Refused, unpickle

COMMENT_MARK = b"sha256:"
_COMMENT_LENGTH = len(COMMENT_MARK) + 64


class DamagedCheckpoint(UserError):
    """A checkpoint whose content is not what was written."""


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading. A pipe or a device, which could wait for ever or never end, is an ``OSError``."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return open(handle, "rb")


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint, on the CPU, without executing anything in it.

    Raises:
        UserError: no such file, or not a checkpoint.
        DamagedCheckpoint: written by this project, and truncated or altered since.
        OutOfMemory: it may be whole.
    """
    try:
        with out_of_memory(f"checkpoint {path} may be sound but does not fit into memory"):
            return _load(Path(path))
    except Refused as error:
        raise Refused(f"checkpoint {path}: {error}") from None


def _load(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            content = file.read(2)
            if content in (b"PK", b"\x80\x02"):  # nothing else is read, however large it is
                file.seek(0)
                content = file.read()
    except OSError as error:
        raise UserError(f"checkpoint {path}: {error.strerror}") from error
    mark = len(content) - _COMMENT_LENGTH
    marked = mark > 0 and content[mark:].startswith(COMMENT_MARK)
    if marked:
        found = hashlib.sha256(memoryview(content)[: mark - 2]).hexdigest().encode()
        if found != content[mark + len(COMMENT_MARK) :]:
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: its checksum does not match")
    try:
        state = unpickle(content)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # what a file that is none makes of it
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        kind = UserError if marked else DamagedCheckpoint  # its bytes are those that were written
        raise kind(f"checkpoint {path} cannot be read, cut short or no checkpoint: {reason}") from error
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}, not a training state")
    if "sage" in state and not marked:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: its checksum is gone")
    return state
