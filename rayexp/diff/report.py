"""The comparison of two checkpoints, whatever they judged: the kind of their predictions decides how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rayexp.diff.changes import default_tolerance
from rayexp.diff.floors import Floors, beside
from rayexp.diff.images import diff_images
from rayexp.diff.images_report import ImagesReport
from rayexp.diff.pair import Checkpoint, check
from rayexp.diff.samples import SamplesReport, diff_samples
from rayexp.diff.slices import diff_slices
from rayexp.diff.text import TextReport, diff_text
from rayexp.diff.weights import diff_weights
from rayexp.errors import UserError

Report = ImagesReport | TextReport | SamplesReport


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of a comparison beside the judgements that changed.

    Attributes:
        tolerance: of kind `samples`, by how much a loss must move to count; None: the default one.
        max_drop: what a checkpoint may be worse by than the first; None: no verdict.
        floors: what a reseed changes; None: unknown.
        attributes: a CSV file of attributes; None: no slices.
        weights: whether to say which tensors moved.
    """

    tolerance: float | None = None
    max_drop: float | None = None
    floors: Floors | None = None
    attributes: Path | None = None
    weights: bool = False


def answer(a: Checkpoint, b: Checkpoint, asked: Asked) -> Report:
    """What changed from A to B, with what was asked.

    Raises:
        UserError: they cannot be compared; a floor, the file of attributes or a checkpoint cannot be read or is of
            something else.
    """
    report = compare(a, b, asked.tolerance).within(asked.max_drop)
    tolerance = tolerance_of(a, b, asked)
    if asked.floors:
        report = report.beside(beside(asked.floors(a, b, tolerance), a, b, report.churn))
    return report.by(
        diff_slices(a, b, asked.attributes, tolerance) if asked.attributes else None,
        diff_weights((a.run, a.epoch), (b.run, b.epoch)) if asked.weights else None,
    )


def tolerance_of(a: Checkpoint, b: Checkpoint, asked: Asked) -> float:
    """By how much a loss must move to count."""
    return default_tolerance(a.predictions, b.predictions) if asked.tolerance is None else asked.tolerance


def compare(a: Checkpoint, b: Checkpoint, tolerance: float | None = None) -> Report:
    """What changed from A to B.

    Args:
        tolerance: of kind `samples`, by how much a loss must move to count; None: the default one.

    Raises:
        UserError: they cannot be compared, or there is a tolerance for classes or tokens.
    """
    check(a, b)
    kind = a.predictions.kind
    refuse_tolerance(a, tolerance)
    if kind == "samples":
        return diff_samples(a, b, tolerance)
    return diff_images(a, b) if kind == "images" else diff_text(a, b)


def refuse_tolerance(a: Checkpoint, tolerance: float | None) -> None:
    """Refuse (UserError) a tolerance for classes or tokens."""
    if tolerance is not None and a.predictions.kind != "samples":
        raise UserError(
            f"--tolerance: {a.name} judged {a.predictions.kind}, which have a rule of their own; it is for samples"
        )
