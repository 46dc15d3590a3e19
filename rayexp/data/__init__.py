"""Datasets: fetch, check, pack once, read. One file per dataset; the entry point is `open_data`.

The data are memory-mapped arrays, never copies: all workers of a machine share them through the page cache.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
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
OWN = "rayexp.data.own"


@dataclass(frozen=True, slots=True)
class ImageSplit:
    """n images of one split, or of a subset of it; `read` returns the pixels.

    Attributes:
        images: uint8[packed, height, width, 3], mapped: all packed images of the split, also for a subset.
        labels: int64[n], the number of each image's class.
        names: n file names, such as `val_1008.JPEG`.
        sha: identifies the labels, names and pixels of exactly these samples. For a whole split see pack.split_sha; for
            a subset it is derived from that of the split and the subset's size (packed.subset), without reading pixels.
        rows: int64[n], increasing: the rows of `images` that belong to the subset; None if all do.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    sha: str
    rows: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """A copy of the samples `indices` (int64[m], each from 0 to n-1): uint8[m, height, width, 3].

        numpy releases the interpreter lock while it copies, so that threads can read in parallel.
        """
        return self.images.take(indices if self.rows is None else self.rows[indices], axis=0)


@dataclass(frozen=True, slots=True)
class ImageData:
    """Training and validation images.

    Attributes:
        train, val: the two splits.
        classes: (id, readable name) of each class, in label order.
        layout: which folders were used for which split, as a line for people; empty if there was no choice.
    """

    train: ImageSplit
    val: ImageSplit
    classes: tuple[tuple[str, str], ...]
    layout: str = ""


@dataclass(frozen=True, slots=True)
class TextData:
    """Three token streams.

    Attributes:
        train, valid, test: int32[n], mapped: the ids of the tokens.
        vocabulary: the word of each id.
        sha: split (train, valid, test) -> sha256 over the vocabulary and the split's tokens.
    """

    train: NDArray[np.int32]
    valid: NDArray[np.int32]
    test: NDArray[np.int32]
    vocabulary: tuple[str, ...]
    sha: dict[str, str]


def open_data(config: DataConfig, code: Sequence[str] | None = None, text: bool = False) -> Any:
    """The data that a configuration names, packed on first use: ImageData or TextData.

    Args:
        config: the section `data`.
        code: the configuration's `code`, for a dataset of the user's own.
        text: whether such a one gives text, not images.

    Raises:
        UserError: the data is missing, damaged, too small, or cannot be read; the line names file and folder.
    """
    from rayexp.data.fetch import check_readable

    if config.root is not None:
        check_readable(root := config.root.expanduser())
        config = config.model_copy(update={"root": root})
    if config.name not in DATASETS:
        return importlib.import_module(OWN).open_data(config, code, text)
    return importlib.import_module(DATASETS[config.name]).open_data(config)
