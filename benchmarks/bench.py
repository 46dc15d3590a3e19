"""What the sections of gpu.py share: the table's lines, the time that a section has, and the configurations."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from table import Line, to_json

from rayexp.config import ExperimentConfig, parse
from rayexp.system.disk import write_json

T = TypeVar("T")


@dataclass
class Bench:
    """What is measured, and what has been found.

    Attributes:
        small: everything on a CPU, and little of it.
        device: where.
        folder: for what is thrown away.
        data, text: keys of `data` for images and for text.
        examples, archive: a checkout of pytorch/examples and JPEGs, for the peers.
        json: the file with all lines so far; None: there is none.
        began: when.
        lines: the table.
        hashes: of each family's weights, the first that was found.
        section, seconds, until: the present section, its share of the time, and when it ends.
    """

    small: bool
    device: torch.device
    folder: Path
    data: Mapping[str, Any]
    text: Mapping[str, Any]
    examples: Path | None = None
    archive: Path | None = None
    json: Path | None = None
    began: float = field(default_factory=time.monotonic)
    lines: list[Line] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    section: str = ""
    seconds: float = 0.0
    until: float = 0.0

    def begin(self, section: str, seconds: float, until: float) -> None:
        """Begin a section, which has so many seconds."""
        self.section, self.seconds = section, seconds
        self.until = math.inf if self.small else until

    def say(self, what: str, value: float | str | None, unit: str = "", **more: Any) -> None:
        """Add a line, and print and write it at once."""
        self.lines.append(Line(self.section, what, value, unit, **more))
        print(self.lines[-1].row(), flush=True)
        self.write()

    def write(self, complete: bool = False) -> dict[str, Any]:
        """Write the table so far, and return it; `complete`: nothing is missing."""
        found = {
            "small": self.small,
            "seconds": round(time.monotonic() - self.began, 1),
            "complete": complete,
            "ok": all(line.ok for line in self.lines),
            **to_json(self.lines, self.device),
        }
        if self.json is not None:
            write_json(self.json, found)
        return found

    def attempt(self, what: str, work: Callable[[], T]) -> T | None:
        """What `work` returns. Whatever goes wrong in it is a line of the table, and the others are still tried."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{time.monotonic() - self.began:4.0f} s  {self.section}: {what}", file=sys.stderr, flush=True)
        try:
            if time.monotonic() > self.until:
                raise TimeoutError(f"no time was left of the section's {self.seconds:.0f} s")
            return work()
        except (Exception, SystemExit) as error:
            lines = str(error).strip().splitlines() or [""]
            self.say(what, None, ok=False, note=f"{type(error).__name__}: {lines[0][:300]}")
            return None

    # ------------------------------------------------------------------ configurations

    def families(self) -> dict[str, ExperimentConfig]:
        """A configuration of each kind of model, small enough for a few steps."""
        rows = 6 * 35 + 12  # six windows and a short one
        text = {
            "workload": "language_model",
            "data": {**self.text, "max_train_tokens": 16 * rows, "max_val_tokens": 2000, "bptt": 35},
            "batch_size": 16,
            "lr": 1.0,
            "optimizer": {"momentum": 0, "clip": 0.25},
        }
        size = {"emsize": 32, "nhid": 32} if self.small else {"emsize": 200, "nhid": 200}
        batch, shards, whole = (16, 4, 2) if self.small else (256, 8, 3)
        picture = {
            "data": {**self.data, "max_train_samples": whole * batch + batch * 5 // 8, "max_val_samples": batch},
            "model": {"name": "resnet18"},
            "batch_size": batch,
            "shards": shards,
            "lr": 0.01,
            "optimizer": {"nesterov": True},
        }
        transformer = {"name": "transformer", "nlayers": 2, "nhead": 4, "context": 35, "dropout": 0.2, **size}
        adamw = {"name": "adamw", "clip": 1.0}
        trees = {
            "resnet18 bf16": {**picture, "precision": "bf16"},
            "resnet18 tf32": {**picture, "precision": "tf32"},
            "lstm tf32": {**text, "precision": "tf32"},
            "gru bf16": {**text, "precision": "bf16"},
            "rnn_tanh fp32": {**text, "lr": 0.1},
            "transformer bf16": {**text, "precision": "bf16", "lr": 1e-3, "optimizer": adamw, "model": transformer},
        }
        for name, tree in trees.items():
            tree.setdefault("model", {"name": name.split()[0], "nlayers": 2, "dropout": 0.2, **size})
        return {name: self.parse(tree) for name, tree in trees.items()}

    def parse(self, tree: Mapping[str, Any]) -> ExperimentConfig:
        """A configuration whose runs are thrown away. On a CPU static steps are made of PyTorch's operations alone, and
        so must be what they are compared with."""
        here: dict[str, Any] = {"storage_path": str(self.folder / "runs")}
        if self.small:
            here["threads_per_shard"] = 1
        return parse({"epochs": 2, "cpu_kernels": False, **tree, **here}, ExperimentConfig, "benchmark").absolute()
