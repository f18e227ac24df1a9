"""Files that are never half-written."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
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
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "", "errors": "surrogateescape"}
    try:
        with open(temporary, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def remove_leftovers(folder: str | os.PathLike[str], name: str = "*", older_than: float = 0.0) -> None:
    """Remove temporary files for ``name`` whose writer was killed: those at least ``older_than`` seconds old."""
    for path in Path(folder).glob(f".{name}.*tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime >= older_than:
                path.unlink()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """``content`` as readable JSON, whole or not at all."""
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path) -> dict[str, Any]:
    """What ``write_json`` wrote; ``ValueError`` with the path where it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8", errors="surrogateescape")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def append_record(path: Path, record: dict[str, Any]) -> None:
    """``record`` as one more line of JSON, on the disk when this returns. Earlier lines stay as they are."""
    with open(path, "a+b", buffering=0) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        start = "" if file.read(1) in (b"", b"\n") else "\n"  # a call that was killed left half a line
        file.write(f"{start}{json.dumps(record)}\n".encode())
        os.fsync(file.fileno())


def read_records(path: Path) -> list[dict[str, Any]]:
    """What ``append_record`` wrote, oldest first; half a line that a killed call left is ignored, with a warning."""
    records = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            log.warning(f"warning: line {number} of {path} is cut off; it is ignored")
    return records
