"""Which judgements changed: `rayexp.diff`, and what the command asks likewise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from rayexp.errors import UserError
from rayexp.library.checkpoints import Ref, evaluate, find
from rayexp.runs.records import reference
from rayexp.runs.run import Run
from rayexp.system.disk import NEWEST

if TYPE_CHECKING:
    from rayexp.diff.pairs import PairsReport
    from rayexp.diff.report import Report


def diff(
    a: Ref,
    b: Ref,
    *more: Ref,
    max_drop: float | None = None,
    baseline: Sequence[Ref] = (),
    slices: str | PathLike[str] | None = None,
    tolerance: float | None = None,
    weights: bool = False,
    runs: str | PathLike[str] = "runs",
) -> Report | PairsReport:
    """Compare what checkpoints say of the same validation data, sample by sample, as `rayexp diff` does.

    Args:
        a, b: the checkpoints; `b` may be `@18` alone, of the run of `a`.
        more: further ones: every two are then compared.
        max_drop: asks for a `verdict`: may `b`, and each of the others, be worse than `a` by so many points of acc1
            (texts: percent of perplexity; others: percent of the workload's first metric)?
        baseline: two or more runs of one configuration with other seeds, to say whether a change is more than reseeding
            brings about; without, what `rayexp noise` has stored for the configuration.
        slices: a CSV file of attributes, a row for each sample: what changed is also said by attribute.
        tolerance: by how much a loss must move to count, where samples have neither classes nor tokens.
        weights: also say which tensors moved.
        runs: the folder of run directories.

    Returns:
        The report that `rayexp diff --json` prints, with `to_dict()`. Of images: `n`, `churn`, `gained`, `lost`,
        `acc1` and `acc5` of both (percent), `difference` with its 95 % `interval` (percentage points), `mcnemar_p`,
        and the `flips`; `noise`, `slices` and `weights` where there are. Of three checkpoints or more: `pairs`, each
        with its `outcome`, `noise`, `slices` and `weights`.

    Raises:
        UserError: no such checkpoint or file, the checkpoints judged different data, or the runs of `baseline` differ
            by more than their seeds.

    Example:
        >>> report = rayexp.diff("quickstart@1", "@best", runs=tmp)
        >>> report.churn == report.gained + report.lost + report.other_wrong
        True
    """

    def need(run: Run, epoch: int) -> None:
        if not run.predictions_path(epoch).exists():
            evaluate(f"{run.root}@{epoch}")

    wanted = Wanted(tolerance, max_drop, tuple(baseline), None if slices is None else Path(slices), weights)
    return compared([a, b, *more], wanted, Path(runs), need, lambda text: None)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a user asks of a comparison; see `diff`."""

    tolerance: float | None = None
    max_drop: float | None = None
    baseline: tuple[Ref, ...] = ()
    slices: Path | None = None
    weights: bool = False


def compared(
    refs: Sequence[Ref], wanted: Wanted, runs: Path, need: Callable[[Run, int], None], note: Callable[[str], None]
) -> Report | PairsReport:
    """Compare two checkpoints, or every two of more.

    Args:
        refs: `@18` alone is of the run of the reference before it.
        runs: the folder of run directories.
        need: makes sure that an epoch of a run has predictions.
        note: is told what was left out, and why.

    Raises:
        UserError: see `diff`.
    """
    from rayexp.diff import floors
    from rayexp.diff.pair import read
    from rayexp.diff.pairs import diff_pairs
    from rayexp.diff.report import Asked, answer

    whole: list[Ref] = []
    for ref in refs:
        if whole and isinstance(ref, str) and ref.isdecimal():
            raise UserError(f"{ref}: an epoch has its @ before it: {refs[0]} @{ref}")
        alone = whole and isinstance(ref, str) and ref.startswith("@") and not ref.startswith(NEWEST)
        whole.append(_run_of(whole[-1]) + str(ref) if alone else ref)
    places = [find(ref, runs) for ref in whole]
    for place in places:
        need(*place)

    def seeds(epoch: int) -> list[tuple[Run, int]]:
        """The runs of the baseline, those without an epoch at that one, where they have it."""
        found = []
        for ref in wanted.baseline:
            if isinstance(ref, str) and reference(ref).run != ref:
                found.append(find(ref, runs))
            else:
                run = ref if isinstance(ref, Run) else Run.find(ref, runs)
                found.append((run, epoch if run.predictions_path(epoch).exists() else run.epoch("last")))
        for place in found:
            need(*place)
        return found

    asked = Asked(
        tolerance=wanted.tolerance,
        max_drop=wanted.max_drop,
        floors=floors.named(seeds) if wanted.baseline else floors.stored(runs, note),
        attributes=wanted.slices,
        weights=wanted.weights,
    )
    checkpoints = [read(*place) for place in places]
    if len(checkpoints) > 2:
        return diff_pairs(checkpoints, asked)
    return answer(checkpoints[0], checkpoints[1], asked)


def _run_of(ref: Ref) -> str:
    """The reference without its epoch."""
    return str(ref.root) if isinstance(ref, Run) else reference(ref).run
