"""Folders of runs as main.py and scripts/evaluate.py leave them, made in a moment."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

from utils.files import read_json, write_json
from utils.run import COLUMNS, final_accuracy

SETTINGS = {
    "dataset": "cifar10", "labels_per_class": 500, "arch": "preactresnet18", "initial_channels": 16, "epochs": 4,
    "learning_rate": 0.2, "schedule": [2, 3], "start_epoch": 0, "fast": True, "add_name": "",
}  # fmt: skip
DIGESTS = {"train": "1" * 32, "test": "2" * 32}


def make_run(
    root: Path, method: str, seed: int, top1: float = 70.0, done: int = 4, seconds: float = 10, **settings: Any
) -> Path:
    """A run's folder, finished if it has all its epochs; its last test accuracies are ``top1``."""
    folder = root / "_".join([method, f"seed{seed}", *(f"{name}{value}" for name, value in settings.items())])
    folder.mkdir(parents=True)
    config = {
        "settings": {**SETTINGS, "method": method, "seed": seed, **settings}, "classes": ["cat", "dog"],
        "images": {"train": 100, "test": 40}, "digests": DIGESTS, "origin": None,
        "command": f"python3 /home/me/main.py --data_dir '/home/me/my data' --method {method} --root_dir=/home/me/runs",
        "device": "some cpu", "versions": {"torch": "2.10"}, "git_commit": "abcdef", "started": "2026-01-02 03:04:05",
    }  # fmt: skip
    write_json(folder / "config.json", config)
    write_metrics(folder, [top1 - 20, *[top1] * (done - 1)][:done], seconds=seconds)
    if done < config["settings"]["epochs"]:  # type: ignore[index]
        (folder / "result.json").unlink(missing_ok=True)
    return folder


def write_metrics(folder: Path, test: list[float], valid: list[float] | None = None, seconds: float = 10) -> None:
    """metrics.csv and result.json of these accuracies."""
    rows: list[dict[str, Any]] = []
    for epoch, top1 in enumerate(test):
        row = dict.fromkeys(COLUMNS, 1.0) | {"epoch": epoch, "test_top1": top1, "seconds": seconds}
        rows.append(row | dict.fromkeys(("valid_loss", "valid_top1", "valid_top5"), valid[epoch] if valid else ""))
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    if rows:
        best = test[valid.index(max(valid))] if valid else max(test)
        write_json(folder / "result.json", {"final_top1": final_accuracy(rows)[0], "best_top1": best})


def change(folder: Path, **content: Any) -> Path:
    """Other content in a run's config.json."""
    write_json(folder / "config.json", read_json(folder / "config.json") | content)
    return folder


def evaluated(folder: Path, part: str, numbers: dict[str, float], name: str = "test", **changed: Any) -> None:
    """A record of scripts/evaluate.py on the last checkpoint; ``how`` and all else may be changed."""
    checkpoint = folder / changed.pop("checkpoint", "checkpoint.pth.tar")
    if not checkpoint.exists():
        checkpoint.write_bytes(f"{folder} {checkpoint}".encode())
    record = {
        "part": part, "set": name, "checkpoint": checkpoint.name, "epoch": 4, "digest": DIGESTS["test"],
        "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(), "numbers": numbers,
        "how": {"images": 40} | changed.pop("how", {}),
    }  # fmt: skip
    (folder / "evaluation").mkdir(exist_ok=True)
    with open(folder / "evaluation" / "results.jsonl", "a") as file:
        file.write(json.dumps(record | changed) + "\n")
