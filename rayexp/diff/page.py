"""The page of `rayexp diff A B --html`, whatever was judged."""

from __future__ import annotations

from pathlib import Path

from rayexp.diff.images_page import image_page
from rayexp.diff.report import Report
from rayexp.diff.samples import SamplesReport
from rayexp.diff.samples_page import samples_page
from rayexp.diff.text import TextReport
from rayexp.diff.text_page import text_page
from rayexp.pages.page import save


def write_page(path: Path, report: Report) -> None:
    """Write the page of a comparison.

    Raises:
        UserError: `path` is a folder.
    """
    if isinstance(report, TextReport):
        save(path, text_page(report))
    elif isinstance(report, SamplesReport):
        save(path, samples_page(report))
    else:
        save(path, image_page(report))
