"""How much would another seed have changed? The noise floor of one configuration, and a comparison set beside it.

Runs that differ by their seed alone are compared pair by pair on the same validation data. The mean share D of changed
judgements over all pairs is a U-statistic of the seeds (W. Hoeffding, Ann. Math. Statist. 19 (1948) 293): pairs that
share a seed are not independent, so the unit of inference is the seed, never the pair and never the sample. Validation
data are held fixed: what is said holds for these samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayexp.diff.changes import churn
from rayexp.diff.pair import Checkpoint, top1
from rayexp.diff.statistics import LEVEL
from rayexp.display import counted, plain
from rayexp.runs.records import Predictions

Interval = tuple[float, float]
ENOUGH = 3  # seeds: two make one pair, which has no spread


def pair_variances(d: NDArray[np.float64]) -> tuple[float, float, float]:
    """The mean of a symmetric function of two seeds, its variance, and that of one further pair of new seeds beside it.

    With U the mean over all pairs of m seeds and U_k the mean without seed k, the jackknife's variance of U is
    J = (m - 1) / m * sum((U_k - U)^2) (J. N. Arvesen, Ann. Math. Statist. 40 (1969) 2076), which on average is not
    below the true one (B. Efron, C. Stein, Ann. Statist. 9 (1981) 586). The mean over pairs of (D - U)^2 has the
    expectation Var(D) - Var(U), so adding J gives the variance of a pair, and adding J once more that of the
    difference between a new pair and U.

    Args:
        d: float64[m, m], symmetric, of m >= 3 seeds; the diagonal is not read.
    """
    m = len(d)
    upper = d[np.triu_indices(m, 1)]
    u = float(upper.mean())
    rows = d.sum(1) - np.diag(d)
    without = (upper.sum() - rows) / math.comb(m - 1, 2)
    jackknife = (m - 1) / m * float(((without - u) ** 2).sum())
    return u, jackknife, float(((upper - u) ** 2).mean()) + 2 * jackknife


def pair_intervals(d: NDArray[np.float64], level: float = LEVEL) -> tuple[float, Interval, Interval]:
    """The mean of a symmetric function of two seeds, its interval, and the interval for one further pair of new seeds.

    Both are Student's with the variances of `pair_variances` and m - 1 degrees of freedom. Where D is a sum of effects
    of the two seeds, those of three seeds are exact for normal effects; where the pairs have effects of their own, they
    cover more (the tests simulate both).

    Args:
        d: as there.
        level: of both intervals.
    """
    from scipy.special import stdtrit

    m = len(d)
    u, jackknife, further = pair_variances(d)
    t = float(stdtrit(m - 1, (1 + level) / 2))
    mean, pair = t * math.sqrt(jackknife), t * math.sqrt(further)
    return u, (u - mean, u + mean), (u - pair, u + pair)


def difference_reach(values: NDArray[np.float64], level: float = LEVEL) -> float:
    """How far apart one measure of two new seeds lies, with that probability, for normal values: t * s * sqrt(2), with
    the standard deviation s of m >= 2 seeds and m - 1 degrees of freedom."""
    from scipy.special import stdtrit

    t = float(stdtrit(len(values) - 1, (1 + level) / 2))
    return t * math.sqrt(2) * float(values.std(ddof=1))


def measure_of(p: Predictions) -> float:
    """What noise is measured of besides churn: acc1 in percent (images), else the mean loss."""
    if p.kind == "images":
        return 100 * float((top1(p) == p["label"]).mean())
    return float(p["loss"].mean(dtype=np.float64))


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """Seeds of one configuration, compared pair by pair after the same epoch.

    Attributes:
        kind, data_sha, n: of the predictions; floors are for comparisons on the same data.
        epochs: that the configuration trains for.
        epoch: after which the seeds are compared.
        tolerance: by how much a loss must move to count; 0 for images.
        seeds, runs: of each of the m runs.
        changed: int64[m, m], judgements that differ between two of them, symmetric.
        values: float64[m], acc1 in percent, or the mean loss (see `measure_of`).
        source: where the floor is from, as a phrase.
    """

    kind: str
    data_sha: str
    n: int
    epochs: int
    epoch: int
    tolerance: float
    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    changed: NDArray[np.int64]
    values: NDArray[np.float64]
    source: str = "named with --baseline"

    def intervals(self) -> tuple[float, Interval | None, Interval | None]:
        """The mean share of changed judgements, its interval, and that of a further pair, all within 0 and 1; no
        interval with fewer than three seeds."""
        share = self.changed / self.n
        if len(self.seeds) < ENOUGH:
            return float(share[0, 1]), None, None
        mean, *both = pair_intervals(share)
        of_mean, of_pair = ((max(0.0, low), min(1.0, high)) for low, high in both)
        return mean, of_mean, of_pair

    def p_of(self, share: float) -> float | None:
        """The two-sided p of a share of changed judgements, were it that of a further pair of seeds: below 5 % where it
        lies outside the pair's 95 % interval. None with fewer than three seeds."""
        if len(self.seeds) < ENOUGH:
            return None
        from scipy.special import stdtr

        mean, _, further = pair_variances(self.changed / self.n)
        if further == 0:
            return 1.0 if math.isclose(share, mean) else 0.0
        return float(2 * stdtr(len(self.seeds) - 1, -abs(share - mean) / math.sqrt(further)))

    def reach(self) -> float | None:
        """`difference_reach` of the values; None with fewer than three seeds, or where one is not finite."""
        if len(self.seeds) < ENOUGH or not np.isfinite(self.values).all():
            return None
        return difference_reach(self.values)

    def pairs(self) -> list[tuple[int, int, int]]:
        """Seed, other seed, and judgements that differ between them."""
        m = range(len(self.seeds))
        return [(self.seeds[i], self.seeds[j], int(self.changed[i, j])) for i, j in itertools.combinations(m, 2)]

    def to_json(self) -> dict[str, Any]:
        """The floor; shares are of the n samples."""
        mean, of_mean, of_pair = self.intervals()
        return dict(
            plain(
                {
                    "source": self.source,
                    "kind": self.kind,
                    "n": self.n,
                    "epoch": self.epoch,
                    "epochs": self.epochs,
                    "tolerance": self.tolerance,
                    "seeds": self.seeds,
                    "runs": self.runs,
                    "values": self.values,
                    "pairs": [{"a": i, "b": j, "changed": count} for i, j, count in self.pairs()],
                    "churn_rate": mean,
                    "churn_rate_interval": of_mean,
                    "pair_interval": of_pair,
                    "difference_reach": self.reach(),
                    "level": LEVEL,
                }
            )
        )


def floor_of(checkpoints: Sequence[Checkpoint], epochs: int, tolerance: float) -> NoiseFloor:
    """Compare checkpoints of the same data that differ by their seed (two or more), each with each."""
    m = len(checkpoints)
    changed = np.zeros((m, m), np.int64)
    for i, j in itertools.combinations(range(m), 2):
        pair = checkpoints[i].predictions, checkpoints[j].predictions
        changed[i, j] = changed[j, i] = churn(*pair, tolerance)
    first = checkpoints[0]
    return NoiseFloor(
        kind=first.predictions.kind,
        data_sha=first.predictions.data_sha,
        n=len(first.predictions),
        epochs=epochs,
        epoch=first.epoch,
        tolerance=tolerance,
        seeds=tuple(c.run.config().seed for c in checkpoints),
        runs=tuple(c.run.id for c in checkpoints),
        changed=changed,
        values=np.array([measure_of(c.predictions) for c in checkpoints]),
    )


@dataclass(frozen=True, slots=True)
class NoiseComparison:
    """A comparison of A with B beside a noise floor.

    Attributes:
        floor: what seeds change.
        churn: judgements that changed from A to B.
        difference: of `measure_of`, B minus A.
        epochs: that A's configuration trains for.
        adjusted_p: `p` among all comparisons of one table (Benjamini-Hochberg); None where this is the only one.
    """

    floor: NoiseFloor
    churn: int
    difference: float
    epochs: int
    adjusted_p: float | None = None

    @property
    def share(self) -> float:
        """Judgements that changed, from 0 to 1."""
        return self.churn / self.floor.n

    @property
    def p(self) -> float | None:
        """See `NoiseFloor.p_of`."""
        return self.floor.p_of(self.share)

    @property
    def verdict(self) -> str | None:
        """`more` than reseeding changes: above the interval of a further pair of seeds; `less`: below it; `alike`:
        within, or where `adjusted_p` does not hold it outside. None where there is no interval."""
        pair = self.floor.intervals()[2]
        if pair is None:
            return None
        if self.adjusted_p is not None and self.adjusted_p >= 1 - LEVEL:
            return "alike"
        return "more" if self.share > pair[1] else "less" if self.share < pair[0] else "alike"

    @property
    def difference_verdict(self) -> str | None:
        """The same of the difference in acc1 or loss: `more` or `alike`."""
        reach = self.floor.reach()
        if reach is None or not math.isfinite(self.difference):
            return None
        return "more" if abs(self.difference) > reach else "alike"

    @property
    def headline(self) -> str:
        """The answer in a few words."""
        words = {
            "more": "more than reseeding changes",
            "alike": "no more than reseeding changes",
            "less": "less than reseeding changes",
        }
        return words.get(self.verdict or "", "two seeds alone tell nothing of their spread; a third would")

    def sentence(self) -> str:
        """The churn beside the floor, with the interval that decides."""
        mean, _, pair = self.floor.intervals()
        of = f"{counted(len(self.floor.seeds), 'seed')} at epoch {self.floor.epoch}{self.shorter}"
        said = f"{100 * self.share:.1f} % changed; another seed changes {100 * mean:.1f} % on average ({of})"
        if pair is None:
            return said
        return f"{said}, and a further pair of seeds {100 * pair[0]:.1f} to {100 * pair[1]:.1f} % (95 % interval)"

    @property
    def shorter(self) -> str:
        """` of 2, in shorter runs than A's 20 epochs`; empty where the seeds trained as long as A."""
        if self.floor.epochs == self.epochs:
            return ""
        than = "shorter" if self.floor.epochs < self.epochs else "longer"
        return f" of {self.floor.epochs}, in {than} runs than A's {counted(self.epochs, 'epoch')}"

    def difference_sentence(self) -> str:
        """The difference in acc1 or loss beside that of two seeds; empty where nothing can be said."""
        reach = self.floor.reach()
        if reach is None or self.difference_verdict is None:
            return ""
        unit = " points" if self.floor.kind == "images" else " nats" if self.floor.kind == "tokens" else ""
        what = "acc1" if self.floor.kind == "images" else "mean loss"
        form = "+.2f" if self.floor.kind == "images" else "+.4g"
        verb = "more than" if self.difference_verdict == "more" else "no more than"
        return (
            f"{what} {self.difference:{form}}{unit}: {verb} another seed brings about, "
            f"up to {reach:{form[1:]}} either way (95 %)"
        )

    def to_json(self) -> dict[str, Any]:
        """The floor, and what the comparison is beside it."""
        return {
            "verdict": self.verdict,
            "p": self.p,
            "adjusted_p": self.adjusted_p,
            "churn_rate": self.share,
            "difference": plain(self.difference),
            "difference_verdict": self.difference_verdict,
            "floor": self.floor.to_json(),
        }
