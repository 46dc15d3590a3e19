"""Comparisons made of known numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rayexp.config import CompareConfig, ExperimentConfig, parse
from rayexp.grid.comparison import CellResult, Comparison
from rayexp.grid.plan import plan
from rayexp.launch.placement import Node
from rayexp.runs.records import Predictions
from rayexp.runs.run import Run
from rayexp.system.disk import now

ENVIRONMENT = {
    "cpu": "a <processor> & more", "cores": 8, "cpu_capability": "AVX2", "memory_bytes": 16e9, "gpus": [],
    "system": "Linux", "python": "3.12", "versions": {"rayexp": "0"},
}  # fmt: skip


class Grids:
    """Makes comparisons whose runs have the rates that a test asks for."""

    def __init__(self, storage):
        self.storage = storage
        self.steps = 10
        self.parts = {"data": 0.1, "transfer": 0.0, "compute": 0.6, "reduce": 0.2, "optimizer": 0.1}
        self.rates = {
            "cpu-plain": 80.0, "cpu-x1-exact": 50.0, "cpu-x2-exact": 90.0, "cpu-x4-exact": 150.0,
            "cpu-x1-ddp": 60.0, "cpu-x2-ddp": 100.0, "cpu-x4-ddp": 160.0,
        }  # fmt: skip

    def planned(self, *, cpus=8, gpus=0, base=None, **grid):
        """A grid, the experiment of all its cells, and the cells."""
        experiment = parse({"name": "base", "epochs": 4, **(base or {})}, ExperimentConfig, "base")
        tree = {
            "base": "base.yaml",
            "scaling": [
                {"num_workers": n, "use_gpu": False, "cpus_per_worker": 1} for n in (1, 2, 4)
            ],
            "reduction": ["exact", "ddp"],
            "storage_path": str(self.storage),
            **grid,
        }  # fmt: skip
        config = parse(tree, CompareConfig, "grid")
        return config, experiment, plan(config, experiment, [Node("here", cpus, gpus)])

    def plan(self, **asked):
        return Comparison.create(*self.planned(**asked), {"argv": ["test"], "environment": ENVIRONMENT})

    def fill(self, comparison, rates, *, sha="a", top1=None, spread=0.0, repeats=None, parts=None, epochs=2, **more):
        """A row for every cell in `rates` (samples per second by cell id) and every repeat."""
        session = comparison.begin()
        rng = np.random.default_rng(0)
        for cell in comparison.cells():
            if cell.id not in rates:
                continue
            for repeat in range(1, (repeats or comparison.config().repeats) + 1):
                factor = 1 + spread * rng.standard_normal()
                run = self.run(comparison, cell, rates[cell.id] * factor, sha, top1, parts, epochs, **more)
                comparison.add(CellResult(cell.id, repeat, "done", None, run.id, 60.0, now()), session)
        return comparison

    def run(self, comparison, cell, rate, sha, top1, parts, epochs, losses=(2.0, 1.0), kind="images", energy=None):
        words = {"storage_path": str(comparison.cells_path), "name": cell.id}
        run = Run.create(parse({**cell.config, **words}, ExperimentConfig, "cell"), argv=[])
        link = None
        if (w := cell.workers) > 1:  # 1 GB/s
            link = {"bytes": 4e6, "seconds": 2 * (w - 1) / w * 4e-3, "small_bytes": 64, "small_seconds": 1e-6}
        words = {"startup_seconds": {"to_first_step": 13.0}, "exchange_bytes": 4e6, "link": link}
        run.update(status="done", device=cell.kind, **words)
        (run.root / "predictions").mkdir()
        records, steps = [], []
        step = 256 / rate
        mine = top1.get(cell.id, [0] * 8) if top1 else [0] * 8
        for epoch in range(1, epochs + 1):
            totals = [step] * self.steps
            if epoch == 1:
                totals[0] = 3.0  # the first step compiles
            phases = {name: [t * share for t in totals] for name, share in (parts or self.parts).items()}
            seconds = {name: sum(values) for name, values in phases.items()}
            seconds |= {"evaluate": 0.5, "checkpoint": 0.25, "other": 0.05}
            loss = losses[min(epoch, len(losses)) - 1]
            metrics = {"acc1": 10.0 * epoch, "acc5": 20.0 * epoch} if kind == "images" else {"ppl": 100.0 / epoch}
            record = {
                "epoch": epoch, "step": self.steps * epoch, "train_loss": loss, "val_loss": loss, **metrics, "lr": 0.1,
                "samples_per_second": rate, "seconds": {"total": sum(seconds.values()), **seconds},
                "weights_sha": sha if isinstance(sha, str) else sha[cell.id],
                "peak_memory": {"host": 2_000_000_000}, "energy_joules": energy,
            }  # fmt: skip
            arrays = {
                "index": np.arange(8), "label": np.zeros(8, np.int64),
                "top5": np.array([[t, 9] for t in mine], np.int32),
                "confidence": np.ones(8, np.float32), "loss": np.ones(8, np.float32),
            }  # fmt: skip
            if kind == "tokens":
                arrays = {"offset": np.arange(8), "token": np.zeros(8, np.int32), "loss": np.array(mine, np.float32)}
            # Written as a RunWriter would, but without flushing to disk and without TensorBoard.
            run.predictions_path(epoch).write_bytes(Predictions(kind, "v", arrays).to_npz())
            records.append(record)
            steps.append({"epoch": epoch, "first": epoch == 1, "count": [256] * self.steps, "total": totals, **phases})
        run.epochs_path.write_text("".join(json.dumps(record) + "\n" for record in records))
        run.steps_path.write_text("".join(json.dumps(line) + "\n" for line in steps))
        return run


@pytest.fixture
def grids(tmp_path):
    return Grids(tmp_path / "runs")


@pytest.fixture(scope="session")
def grids_in():
    """`grids_in(folder)` is a `grids` for a fixture that several tests share."""
    return Grids
