"""Weights & Biases: the run under its own id, so that a resume goes on with it. WANDB_MODE=offline keeps all of it in
trackers/wandb/ of the run directory, for `wandb sync`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from rayexp.runs.metrics_csv import FILE
from rayexp.runs.run import Run
from rayexp.runs.trackers.tracker import Axis, environment, parameters, remember

PROJECT = "rayexp"


class Wandb:
    """Tells Weights & Biases of one run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.board: Any = None
        self._folder = run.root / "trackers" / "wandb"

    def begin(self) -> None:
        """See Service."""
        place = environment(self.run, "wandb")
        self._folder.mkdir(parents=True, exist_ok=True)
        server: dict[str, Any] = {"base_url": place["WANDB_BASE_URL"]} if "WANDB_BASE_URL" in place else {}
        self.board = wandb.init(
            id=self.run.id,
            name=self.run.id,
            project=place.get("WANDB_PROJECT", PROJECT),
            entity=place.get("WANDB_ENTITY"),
            mode=place.get("WANDB_MODE"),
            dir=str(self._folder),
            config=parameters(self.run),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", **server),
        )
        self.board.define_metric("epoch")
        self.board.define_metric("step")
        for curves in ("loss/*", "lr", "metric/*", "seconds/*", "throughput/*"):
            self.board.define_metric(curves, step_metric="epoch")
        self.board.define_metric("step/*", step_metric="step")
        remember(self.run, "wandb", run_id=self.run.id, project=self.board.project, under_way=True)

    def log(self, rows: Sequence[tuple[int, Mapping[str, float]]], axis: Axis) -> None:
        """See Service."""
        for number, values in rows:
            self.board.log({axis: number, **values})

    def end(self, status: str) -> None:
        """See Service; the configuration and metrics.csv become files of it."""
        for path in (self.run.config_path, self.run.root / FILE):
            if path.is_file():
                # Files in there are sent with the run; `save` would leave links.
                shutil.copyfile(path, Path(self.board.dir) / f"rayexp_{path.name}")
        self.board.summary["status"] = status
        self.board.finish(exit_code=0 if status == "done" else 1)
        for path in self._folder.rglob("*"):
            if path.is_symlink():  # to the newest attempt; a copy of the run would hold that twice
                path.unlink()
        remember(self.run, "wandb", under_way=False)
