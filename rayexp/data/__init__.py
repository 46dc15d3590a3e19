"""Datasets: fetch, check, pack once, read. One file per dataset; `open_data` is the way in.

What comes out are mapped arrays (shared by all workers of a machine through the page cache), never copies.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayexp.config import DataConfig

# name -> module with `open_data(config: DataConfig) -> ImageData | TextData`
DATASETS = {
    "shapes": "rayexp.data.shapes",
    "tiny_imagenet": "rayexp.data.tiny_imagenet",
    "folder": "rayexp.data.folder",
    "python_docs": "rayexp.data.python_docs",
    "wikitext2": "rayexp.data.wikitext2",
    "text": "rayexp.data.text",
}


@dataclass(frozen=True, slots=True)
class ImageSplit:
    """n images of one split, or of a subset of it; `read` gets the pixels.

    Attributes:
        images: uint8[packed, height, width, 3], mapped: all that is packed, a subset or not.
        rows: int64[n], rising: the rows of `images` that belong to the subset; None where all do.
        labels: int64[n].
        names: file names, `val_1008.JPEG`; n of them.
        sha: names labels, names and pixels of exactly these samples. For a whole split see pack.split_sha; for a
            subset it is made from the whole split's and the subset's size (pack.subset), so no pixel is read again.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    sha: str
    rows: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Copy of the samples `indices` (int64[m], each 0 .. n-1): uint8[m, height, width, 3].

        The interpreter lock is free while numpy copies, so threads may read at the same time.
        """
        return self.images.take(indices if self.rows is None else self.rows[indices], axis=0)


@dataclass(frozen=True, slots=True)
class ImageData:
    """Training and validation images.

    Attributes:
        classes: (id, words) in label order.
        layout: what was taken for which split, as a line for people; empty where there was no choice.
    """

    train: ImageSplit
    val: ImageSplit
    classes: tuple[tuple[str, str], ...]
    layout: str = ""


@dataclass(frozen=True, slots=True)
class TextData:
    """Token streams int32[n], mapped; `vocabulary[id]` is the word.

    Attributes:
        sha: sha256 over the vocabulary and each split's tokens: keys train, valid, test.
    """

    train: NDArray[np.int32]
    valid: NDArray[np.int32]
    test: NDArray[np.int32]
    vocabulary: tuple[str, ...]
    sha: dict[str, str]


def open_data(config: DataConfig) -> Any:
    """The data that a configuration names, packed on first use: ImageData or TextData.

    Raises:
        UserError: the data is missing, damaged or too small; the line names file and folder.
    """
    return importlib.import_module(DATASETS[config.name]).open_data(config)
