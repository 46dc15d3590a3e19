"""Small pictures of validation images, to be set into a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from rayexp.errors import UserError
from rayexp.runs.run import Run

MAX_SIDE = 96  # pixels
QUALITY = 60
CHUNK = 256  # pictures read at a time


def read_pictures(run: Run, data_sha: str, indices: Sequence[int]) -> list[str]:
    """WebP pictures in base64 of a run's validation images.

    They are read from the packed data that the run's configuration names, if it is still what `data_sha` says.

    Raises:
        UserError: it is not, or is not at hand.
    """
    from rayexp.data import open_data

    try:
        split = open_data(run.config().data).val
        if split.sha != data_sha:
            raise UserError("the data in the run's data.root are not those that were judged")
        return _encode(split, indices)
    except (OSError, AttributeError) as error:
        raise UserError(str(error)) from error


def _encode(split: Any, indices: Sequence[int]) -> list[str]:
    from PIL import Image

    encoded = []
    for start in range(0, len(indices), CHUNK):
        for pixels in split.read(np.asarray(indices[start : start + CHUNK], dtype=np.int64)):
            image = Image.fromarray(pixels)
            image.thumbnail((MAX_SIDE, MAX_SIDE))
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=QUALITY, method=2)
            encoded.append(base64.b64encode(buffer.getvalue()).decode())
    return encoded
