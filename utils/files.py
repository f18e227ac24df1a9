"""Files that are never half-written."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

log = logging.getLogger("sage")


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file next to ``path``; on success flush it to the disk and rename it, else remove it.

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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """``content`` as readable JSON, whole or not at all."""
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path) -> dict[str, Any]:
    """What ``write_json`` wrote; ``ValueError`` with the path where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__}")
    return content


def append_record(path: Path, record: dict[str, Any]) -> None:
    """``record`` as one more line of JSON, on the disk when this returns. Earlier lines stay as they are."""
    with open(path, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        start = "" if file.read(1) in (b"", b"\n") else "\n"  # a call that was killed left half a line
        file.write(f"{start}{json.dumps(record)}\n".encode())
        os.fsync(file.fileno())


def read_records(path: Path) -> list[dict[str, Any]]:
    """What ``append_record`` wrote, oldest first; half a line that a killed call left is ignored, with a warning."""
    records = []
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            log.warning(f"warning: line {number} of {path} is cut off; it is ignored")
    return records
