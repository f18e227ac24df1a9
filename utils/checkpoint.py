"""What a checkpoint holds, and how it is written and read without loss."""

from __future__ import annotations

import hashlib
import io
import os
import struct
from pathlib import Path
from typing import Any

import torch

from .archive import COMMENT_MARK, DamagedCheckpoint, atomic_write, link, load
from .records import log

LAST, PREVIOUS, BEST = "checkpoint.pth.tar", "checkpoint_previous.pth.tar", "model_best.pth.tar"


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
    comment = COMMENT_MARK + hashlib.sha256(content).hexdigest().encode()
    for name in [BEST, LAST] if best else [LAST]:
        with atomic_write(folder / name) as file:
            file.write(content)
            file.write(struct.pack("<H", len(comment)) + comment)
            file.flush()
            if name == LAST and (folder / LAST).exists():
                link(folder / LAST, folder / PREVIOUS)


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
