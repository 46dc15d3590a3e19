"""The comparison of two checkpoints, whatever they judged: the kind of their predictions decides how."""

from __future__ import annotations

from rayexp.diff.images import diff_images
from rayexp.diff.images_report import ImagesReport
from rayexp.diff.pair import Checkpoint, check
from rayexp.diff.samples import SamplesReport, diff_samples
from rayexp.diff.text import TextReport, diff_text
from rayexp.errors import UserError

Report = ImagesReport | TextReport | SamplesReport


def compare(a: Checkpoint, b: Checkpoint, tolerance: float | None = None) -> Report:
    """What changed from A to B.

    Args:
        tolerance: of kind `samples`, by how much a loss must move to count; None: the default one.

    Raises:
        UserError: they cannot be compared, or there is a tolerance for classes or tokens.
    """
    check(a, b)
    kind = a.predictions.kind
    if kind == "samples":
        return diff_samples(a, b, tolerance)
    if tolerance is not None:
        raise UserError(f"--tolerance: {a.name} judged {kind}, which have a rule of their own; it is for samples")
    return diff_images(a, b) if kind == "images" else diff_text(a, b)
