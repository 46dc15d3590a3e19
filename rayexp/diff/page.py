"""The page of `rayexp diff A B --html`, whatever was judged."""

from __future__ import annotations

from pathlib import Path

from rayexp.diff.images_page import image_page
from rayexp.diff.images_report import ImagesReport
from rayexp.diff.text import TextReport
from rayexp.diff.text_page import text_page
from rayexp.diff.weights import WeightsReport
from rayexp.pages.page import save


def write_page(path: Path, report: ImagesReport | TextReport, weights: WeightsReport | None = None) -> None:
    """Write the page of a comparison of images or of texts.

    Raises:
        UserError: `path` is a folder.
    """
    if isinstance(report, TextReport):
        save(path, text_page(report, weights))
    else:
        save(path, image_page(report, weights))
