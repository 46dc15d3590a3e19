"""What the runs of a cell say: rates, phases, memory, energy and hashes, read from their run directories."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayexp.diff.changes import churn
from rayexp.errors import UserError
from rayexp.grid.comparison import Cell, Comparison
from rayexp.grid.forecast import Point
from rayexp.grid.statistics import Estimate, Floats
from rayexp.runs.records import PHASES, EpochRecord, Predictions
from rayexp.runs.run import Run

STEP_PHASES = ("data", "transfer", "compute", "reduce", "optimizer")


@dataclass(frozen=True, slots=True)
class Repeat:
    """One finished run of a cell.

    Attributes:
        run: its directory.
        records: its epochs, at least one.
        steps: float64[n] by name (`count`, `total` and the phases of a step): all but a process's first, as in records.
        startup: seconds from the command to the first step's begin.
        first_step: seconds; compilation and warm-up are in it.
        wall: seconds from the command to the end, as the grid's own clock saw it.
    """

    run: Run
    records: tuple[EpochRecord, ...]
    steps: Mapping[str, Floats]
    startup: float
    first_step: float
    wall: float

    @property
    def throughput(self) -> float:
        """Samples per second over all steps together."""
        return float(self.steps["count"].sum() / self.steps["total"].sum())

    def step_seconds(self, *phases: str) -> float:
        """Mean seconds of a step, or of some of its phases together."""
        return float(sum(self.steps[phase].mean() for phase in phases or ("total",)))

    @property
    def training(self) -> float:
        """Seconds of all epochs together."""
        return sum(record.seconds["total"] for record in self.records)

    @property
    def shutdown(self) -> float:
        """Seconds of the wall-clock that are neither start-up nor an epoch: the last write, the end of the workers."""
        return self.wall - self.startup - self.training

    def phases(self) -> dict[str, float]:
        """Seconds by phase of an ordinary epoch: the run's first step is replaced by an average one."""
        n = len(self.records)
        found = {phase: sum(r.seconds.get(phase, 0.0) for r in self.records) / n for phase in PHASES}
        size = sum(len(s["total"]) for s in self.run.steps()) / n  # steps of an epoch
        for phase in STEP_PHASES:
            found[phase] = float(self.steps[phase].mean()) * size
        return found

    def elapsed(self) -> list[float]:
        """Seconds from the command to the end of each epoch."""
        ends = np.cumsum([record.seconds["total"] for record in self.records])
        return [self.startup + float(end) for end in ends]

    def reached_by(self, moment: float) -> EpochRecord | None:
        """The last epoch that had ended so many seconds after the command; None before the first."""
        ended = [record for record, end in zip(self.records, self.elapsed(), strict=True) if end <= moment]
        return ended[-1] if ended else None

    def link_points(self, workers: int) -> list[Point]:
        """What bare all-reductions between the workers took (see launch.worker): a large and a small one."""
        link: Mapping[str, float] = self.run.meta().get("link") or {}
        pairs = (("bytes", "seconds"), ("small_bytes", "small_seconds"))
        return [(workers, float(link[size]), float(link[time])) for size, time in pairs if size in link]

    def unaccounted(self) -> float:
        """Share of the epochs' wall-clock by which their phases miss it, either way."""
        phases = sum(r.seconds.get(p, 0.0) for r in self.records for p in PHASES)
        return abs(phases / self.training - 1)


@dataclass(frozen=True, slots=True)
class Measured:
    """All finished repeats of a cell (at least one).

    Attributes:
        cell: which one.
        unit: what a sample is: `images`, `tokens` or what else the workload counts.
        goals: the workload's metrics, the first one first, and whether each is to be `max` or `min`.
        repeats: by their number.
    """

    cell: Cell
    unit: str
    goals: Mapping[str, str]
    repeats: tuple[Repeat, ...]

    @property
    def meta(self) -> dict[str, Any]:
        """run.json of the first repeat."""
        return self.repeats[0].run.meta()

    @property
    def last(self) -> EpochRecord:
        """The last epoch of the first repeat."""
        return self.repeats[0].records[-1]

    def rate(self) -> Estimate:
        """Throughput: samples per second over all steps of a run together."""
        return Estimate.of([r.throughput for r in self.repeats])

    def spread(self) -> float:
        """By how much the fastest repeat is faster than the slowest, relative; 0 with one repeat."""
        rates = [r.throughput for r in self.repeats]
        return max(rates) / min(rates) - 1

    def step_seconds(self) -> Estimate:
        """Mean seconds of a run's step."""
        return Estimate.of([r.step_seconds() for r in self.repeats])

    def phase_seconds(self, *phases: str) -> float:
        """Mean seconds of a step's phases together."""
        return float(np.mean([r.step_seconds(*phases) for r in self.repeats]))

    def step_median(self) -> float:
        """The median of a step's seconds; far below the mean where a few steps wait for all."""
        return float(np.median(np.concatenate([r.steps["total"] for r in self.repeats])))

    def step_p95(self) -> float:
        """The 95th percentile of a step's seconds."""
        return float(np.quantile(np.concatenate([r.steps["total"] for r in self.repeats]), 0.95))

    def epoch_seconds(self) -> Estimate:
        """Seconds of an ordinary epoch, evaluation and checkpoint included."""
        return Estimate.of([sum(r.phases().values()) for r in self.repeats])

    def phases(self) -> dict[str, float]:
        """Mean seconds by phase of an ordinary epoch."""
        each = [r.phases() for r in self.repeats]
        return {phase: float(np.mean([p[phase] for p in each])) for phase in PHASES}

    def startup(self) -> float:
        """Mean seconds from the command to the first step."""
        return float(np.mean([r.startup for r in self.repeats]))

    def first_step(self) -> float:
        """Mean seconds of the first step."""
        return float(np.mean([r.first_step for r in self.repeats]))

    def shutdown(self) -> float:
        """Mean seconds of the wall-clock that are neither start-up nor an epoch."""
        return sum(r.shutdown for r in self.repeats) / len(self.repeats)

    def wall(self) -> float:
        """Mean seconds from the command to the end."""
        return sum(r.wall for r in self.repeats) / len(self.repeats)

    def peak_memory(self) -> dict[str, int]:
        """Largest peak bytes of rank 0's process over the repeats: `host`, `device`."""
        peaks = [record.peak_memory for r in self.repeats for record in r.records]
        return {name: max(p.get(name, 0) for p in peaks) for name in dict.fromkeys(n for p in peaks for n in p)}

    def energy(self) -> float | None:
        """Mean joules of the GPUs per epoch, where NVML counted them."""
        found = [record.energy_joules for r in self.repeats for record in r.records]
        known = [joules for joules in found if joules is not None]
        return float(np.mean(known)) if known and len(known) == len(found) else None

    def seconds_to(self, metric: str, goal: float) -> float | None:
        """Mean seconds from the command to the first epoch that reached the goal; None where a repeat did not.

        A metric that is to be large must rise to the goal; the others, and losses, fall to it.
        """
        times = []
        for repeat in self.repeats:
            for record, elapsed in zip(repeat.records, repeat.elapsed(), strict=True):
                value = value_of(record, metric)
                if value >= goal if self.goals.get(metric) == "max" else value <= goal:
                    times.append(elapsed)
                    break
        return float(np.mean(times)) if len(times) == len(self.repeats) else None

    def at(self, moment: float, metric: str) -> float | None:
        """Mean value of a metric after the last epoch that had ended so many seconds after the command; None where a
        repeat had none by then."""
        found = [r.reached_by(moment) for r in self.repeats]
        values = [value_of(record, metric) for record in found if record is not None]
        return float(np.mean(values)) if len(values) == len(found) else None

    def busy(self) -> tuple[float, str] | None:
        """Mean share of the time in which the devices computed, and what counted it; None where nothing did."""
        records = [record for r in self.repeats for record in r.records]
        known = [record.busy for record in records if record.busy is not None]
        if len(known) == len(records):
            return float(np.mean(known)), "NVML" if self.cell.kind == "gpu" else "CPU time"
        if self.cell.kind == "cpu":
            return None  # the phases are those of one worker, and tell nothing of its other cores
        phases = self.phases()
        return (phases["transfer"] + phases["compute"] + phases["optimizer"]) / sum(
            phases.values()
        ), "the step's clocks"

    def shas(self) -> list[str]:
        """The weights' hash after the last epoch, of every repeat."""
        return [r.records[-1].weights_sha for r in self.repeats]

    def predictions(self) -> list[Predictions]:
        """Predictions after the last epoch, of every repeat that has them."""
        found = [(r.run, r.records[-1].epoch) for r in self.repeats]
        return [run.predictions(epoch) for run, epoch in found if run.predictions_path(epoch).is_file()]


def value_of(record: EpochRecord, metric: str) -> float:
    """A metric of an epoch, or one of its losses (UserError where there is none of that name)."""
    values = {"val_loss": record.val_loss, "train_loss": record.train_loss, **record.metrics}
    if metric not in values:
        raise UserError(f"target.{metric}: no such metric; the runs have {', '.join(values)}")
    return values[metric]


def read_measured(comparison: Comparison) -> list[Measured]:
    """Every cell of which a repeat is done, in the order of the plan."""
    rows = comparison.rows()
    found = []
    for cell in comparison.cells():
        done = [row for row in rows if row.cell == cell.id and row.status == "done"]
        runs = [(comparison.run(row), row.wall_seconds) for row in sorted(done, key=lambda r: r.repeat)]
        repeats = tuple(read_repeat(run, wall) for run, wall in runs if run is not None)
        if repeats:
            run = repeats[0].run
            found.append(Measured(cell, run.unit(), run.goals(), repeats))
    return found


def read_repeat(run: Run, wall: float) -> Repeat:
    """Read one finished run.

    Raises:
        UserError: its records are missing or damaged.
    """
    records, lines = tuple(run.records()), run.steps()
    if not records or not lines:
        raise UserError(f"{run.root}: epochs.jsonl or steps.jsonl is missing; the cell must be measured again")
    firsts = [line["total"][0] for line in lines if line["first"]]
    first = float(firsts[-1] if firsts else lines[0]["total"][0])  # of the process that startup_seconds is of
    try:
        to_first_step = float(run.meta()["startup_seconds"]["to_first_step"])
    except (KeyError, TypeError, ValueError):
        to_first_step = math.nan
    counts = np.concatenate([np.arange(len(line["total"])) > (0 if line["first"] else -1) for line in lines])
    counts = counts if counts.any() else ~counts  # no other step in the whole run: it is all there is
    steps = {
        name: np.concatenate([np.asarray(line.get(name, [0.0] * len(line["total"]))) for line in lines])[counts]
        for name in ("count", "total", *STEP_PHASES)
    }
    return Repeat(run, records, steps, to_first_step - first, first, wall)


def differing(a: Predictions, b: Predictions) -> int | None:
    """How many validation samples two models predict differently; None where these are of other data.

    As `diff` counts it: images, another top-1 class; tokens, a probability more than twice or less than half; samples,
    a loss that moved by more than a tenth of the median. What is not finite differs from everything.
    """
    if a.kind != b.kind or a.data_sha != b.data_sha or len(a) != len(b):
        return None
    return churn(a, b)
