"""What the servers of forked.py and served.py import once: all that a run needs, and the fonts of its pictures."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch._dynamo  # noqa: F401  # the first optimiser imports it

import main  # noqa: F401
import tests.forked  # noqa: F401
from utils import pictures, records

row = dict.fromkeys(records.COLUMNS, 1.0)
with TemporaryDirectory() as folder:
    pictures.plot_curves(Path(folder) / "curves.png", [row], "", [])
