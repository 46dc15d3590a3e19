"""What do two checkpoints of any other workload lose on the same samples? Predictions of kind `samples`.

Nothing is known of a sample but its loss. `lost` are the samples whose loss rose by more than a tolerance, `gained`
those whose loss fell by more, `not_finite` those to which A, B or both give no finite loss (the rule: `changes`), and
churn = lost + gained + not_finite. The tolerance is a tenth of the median absolute loss of both, unless it is given.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayexp.diff.changes import KINDS, Judgements, default_tolerance, tally, worst_first
from rayexp.diff.pair import Checkpoint, check, equal
from rayexp.diff.pair_report import PairReport
from rayexp.diff.statistics import LEVEL
from rayexp.display import csv_cell, plain
from rayexp.errors import UserError

LISTED = 1000  # samples in the report's `flips`


@dataclass(frozen=True, slots=True)
class SampleFlip:
    """One sample whose loss moved by more than the tolerance, or that has none."""

    index: int
    name: str
    kind: str
    loss_a: float
    loss_b: float


@dataclass(frozen=True, slots=True)
class SamplesReport(PairReport):
    """What changed from A to B on n samples.

    Attributes:
        loss: mean loss of A and of B.
        difference: B - A, of the mean losses; NaN where a loss is not finite.
        interval: 95 % interval of the difference (`paired`); None where a loss is not finite or n is below 2.
        wilcoxon_p: of the signed-rank test that a sample's loss rises as often and as far as it falls; None likewise.
        tolerance: by how much a loss must move to count.
        gained, lost: see the module.
        broken: samples without a finite loss in A or in B.
        metrics: of epochs.jsonl, of A and of B, by name, in the order of the workload's goals.
        goal: the metric that `max_drop` is of, and which way is better.
        names: of all samples, where data.json has them.
        flips: worst first, the LISTED ones that moved most.
    """

    unit: str
    loss: tuple[float, float]
    difference: float
    interval: tuple[float, float] | None
    wilcoxon_p: float | None
    tolerance: float
    gained: int
    lost: int
    broken: int
    metrics: Mapping[str, tuple[float, float]]
    goal: tuple[str, str]
    names: tuple[str, ...] | None
    flips: tuple[SampleFlip, ...]

    @property
    def churn(self) -> int:
        """Samples whose loss moved by more than the tolerance, or that have none."""
        return self.gained + self.lost + self.broken

    def held(self, max_drop: float) -> tuple[tuple[float, float] | None, float]:
        """In the goal's unit, of which `max_drop` percent of A's mean are allowed.

        Decided by the t interval of d + (max_drop / 100) |a|, where d is what B is better by on a sample: the whole of
        it lies above 0, or below. So the uncertainty of A's mean, which the percent are of, counts too.
        """
        interval = None
        if not self.broken:
            name, way = self.goal
            a, b = (_values(side, name) for side in (self.a, self.b))
            better = a - b if way == "min" else b - a
            interval = paired(better + max_drop / 100 * math.copysign(1, a.mean()) * a, self.level)[0]
        return interval, 0.0

    def within(self, max_drop: float | None, level: float = LEVEL, letter: str = "B") -> SamplesReport:
        """The same report with a verdict.

        Raises:
            UserError: the predictions hold no value of the goal for each sample.
        """
        if max_drop is not None:
            for side in (self.a, self.b):
                _values(side, self.goal[0])
        return replace(self, max_drop=max_drop, level=level, letter=letter)

    def to_json(self) -> dict[str, Any]:
        """The keys that scripts may rely on: n, loss, churn, gained, lost, wilcoxon_p, flips (the largest 1,000)."""
        report = {
            "kind": "samples",
            "unit": self.unit,
            **self.sides(),
            "equal": self.equal,
            "n": self.n,
            "loss": _two(self.loss),
            "metrics": {name: _two(pair) for name, pair in self.metrics.items()},
            "difference": self.difference,
            "interval": self.interval,
            "level": LEVEL,
            "wilcoxon_p": self.wilcoxon_p,
            "tolerance": self.tolerance,
            "churn": self.churn,
            "churn_rate": self.churn / self.n,
            "gained": self.gained,
            "lost": self.lost,
            "not_finite": {**_two(self.not_finite), "either": self.broken},
            "goal": {"metric": self.goal[0], "better": self.goal[1]},
            **self.decision(),
            "flips": [{name: getattr(f, name) for name in f.__slots__} for f in self.flips],
        }
        return dict(plain(report))

    def to_csv(self) -> str:
        """Every sample that moved by more than the tolerance or is not finite, the worst first."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("index", "name", "kind", "a_loss", "b_loss"))
        for f in _flips(self.a, self.b, self.tolerance, self.names, None):
            writer.writerow((f.index, csv_cell(f.name), f.kind, f"{f.loss_a:.9g}", f"{f.loss_b:.9g}"))
        return out.getvalue()


def _two(pair: tuple[float, float]) -> dict[str, float]:
    return {"a": pair[0], "b": pair[1]}


def _values(side: Checkpoint, goal: str) -> NDArray[np.float64]:
    """float64[n]: the goal's value for each sample (UserError where the predictions hold none)."""
    array = side.predictions.arrays.get("loss" if goal == "val_loss" else goal)
    if array is None or np.shape(array) != (len(side.predictions),):
        have = ", ".join(name for name in side.predictions.arrays if name != "index")
        raise UserError(
            f"--max-drop: {side.name} predicts no {goal!r} for each sample, and that is the first metric of its "
            f"workload; its arrays are: {have}"
        )
    return np.asarray(array, dtype=np.float64)


def paired(change: NDArray[np.float64], level: float = LEVEL) -> tuple[tuple[float, float] | None, float | None]:
    """The interval of the mean of paired differences, and the p of a paired test.

    Student's t interval, mean -+ t s / sqrt(n) (Student, Biometrika 6 (1908) 1), which with hundreds of samples needs
    no normal differences (the tests simulate skewed ones), and Wilcoxon's signed-rank test (F. Wilcoxon, Biometrics
    Bulletin 1 (1945) 80; samples that did not move are left out), which a few large losses cannot decide. The one asks
    for the mean, the other for what most samples do: of skewed losses the answers may differ.

    Args:
        change: float64[n], finite.

    Returns:
        Interval and p; None and None with fewer than two samples.
    """
    from scipy.special import stdtrit
    from scipy.stats import wilcoxon

    n = len(change)
    if n < 2:
        return None, None
    mean, reach = float(change.mean()), float(stdtrit(n - 1, (1 + level) / 2) * change.std(ddof=1) / math.sqrt(n))
    p = float(wilcoxon(change).pvalue) if change.any() else 1.0
    return (mean - reach, mean + reach), p


def diff_samples(a: Checkpoint, b: Checkpoint, tolerance: float | None = None) -> SamplesReport:
    """Compare two checkpoints' losses on the same samples.

    Args:
        tolerance: by how much a loss must move to count; None: a tenth of the median absolute loss of both.

    Raises:
        UserError: the samples are not the same.
    """
    check(a, b)
    p, q = a.predictions, b.predictions
    tolerance = default_tolerance(p, q) if tolerance is None else tolerance
    first, second = Judgements.of(p, tolerance), Judgements.of(q, tolerance)
    changes, rise = first.changes(second), first.rise(second)
    counts = tally(changes)
    interval, p_value = (None, None) if counts["not_finite"] else paired(rise)
    names = sample_names(a)
    goals = dict(a.run.goals())
    return SamplesReport(
        a=a,
        b=b,
        unit=a.run.unit(),
        n=len(p),
        loss=(float(p["loss"].mean(dtype=np.float64)), float(q["loss"].mean(dtype=np.float64))),
        difference=float(rise.mean()),
        interval=interval,
        wilcoxon_p=p_value,
        tolerance=tolerance,
        gained=counts["gained"],
        lost=counts["lost"],
        not_finite=(int((~p.finite).sum()), int((~q.finite).sum())),
        broken=counts["not_finite"],
        equal=equal(a, b, sum(counts.values())),
        metrics=_metrics(a, b, [*goals]),
        goal=next(iter(goals.items()), ("val_loss", "min")),
        names=names,
        flips=_flips(a, b, tolerance, names, LISTED),
    )


def sample_names(side: Checkpoint) -> tuple[str, ...] | None:
    """`val_names` of data.json, where it names every sample that was judged."""
    names = side.run.data().get("val_names")
    if not isinstance(names, list) or len(names) <= int(side.predictions["index"][-1]):
        return None
    return tuple(map(str, names))


def _metrics(a: Checkpoint, b: Checkpoint, order: list[str]) -> dict[str, tuple[float, float]]:
    """The metrics that both sides recorded, those of the goals first."""
    found = []
    for side in (a, b):
        records = [r for r in side.run.records() if r.epoch == side.epoch]
        found.append(dict(records[0].metrics) if records else {})
    names = [name for name in (*order, *found[0]) if name in found[0] and name in found[1]]
    return {name: (found[0][name], found[1][name]) for name in dict.fromkeys(names)}


def _flips(
    a: Checkpoint, b: Checkpoint, tolerance: float, names: tuple[str, ...] | None, limit: int | None
) -> tuple[SampleFlip, ...]:
    p, q = a.predictions, b.predictions
    moved, kinds = worst_first(Judgements.of(p, tolerance), Judgements.of(q, tolerance), limit)
    columns = (p["index"][moved], kinds, p["loss"][moved], q["loss"][moved])
    return tuple(
        SampleFlip(index, names[index] if names else str(index), KINDS[kind], x, y)
        for index, kind, x, y in zip(*(c.tolist() for c in columns), strict=True)
    )
