"""Read packed images: mapped arrays, checked against the hashes in meta.json, and balanced subsets of them. Labels and
names are checked whenever they are opened, pixels once (see integrity.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayexp.config import DataConfig
from rayexp.data import ImageData, ImageSplit, integrity
from rayexp.data.pack import FORMAT, PARTIAL, SPLITS, meta_sha, split_sha
from rayexp.errors import UserError


def open_packed(root: Path, config: DataConfig) -> ImageData:
    """The images in a packed folder, limited to `max_train_samples` and `max_val_samples`.

    Raises:
        UserError: nothing is packed there, an array differs from what was packed, the format is newer, or the images
            have another size than `image_size`.
    """
    meta = read_meta(root)
    if meta["image_size"] != config.image_size:
        raise UserError(
            f"data.image_size: {root} is packed at {meta['image_size']} pixels, got {config.image_size}; "
            f"allowed: {meta['image_size']}"
        )
    splits = {}
    for split, most in zip(SPLITS, (config.max_train_samples, config.max_val_samples), strict=True):
        whole = _open_split(root, meta, split)
        splits[split] = whole if most is None else subset(whole, most)
    classes = tuple((id, name) for id, name in meta["classes"])
    return ImageData(splits["train"], splits["val"], classes, str(meta.get("layout", "")))


def read_meta(root: Path) -> dict[str, Any]:
    """meta.json of a packed folder (UserError if it is missing, damaged or newer)."""
    path = root / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
    except FileNotFoundError:
        half = (root / PARTIAL).exists()
        why = "packing was interrupted; the same command as before goes on" if half else "`rayexp data fetch` makes it"
        raise UserError(f"{root}: no packed data there (no meta.json); {why}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(meta, dict) or meta.get("kind") != "images":
        raise UserError(f"{root}: holds other data, not packed images")
    try:
        if meta["format"] > FORMAT:
            raise UserError(
                f"{path}: format {meta['format']} is newer than this rayexp knows ({FORMAT}); upgrade rayexp"
            )
        if not all(len(meta["names"][split]) == meta["counts"][split] for split in SPLITS):
            raise ValueError("names and counts differ")
        if not {"sha", "classes", "image_size", "source_key", "chunk", "chunks"} <= meta.keys():
            raise KeyError("sha, classes, image_size, source_key, chunk or chunks")
        if meta_sha(meta) != meta.get("meta_sha", meta_sha(meta)):  # an older rayexp wrote no meta_sha
            raise ValueError("its text is not what was written")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); remove {root} and fetch again") from error
    return dict(meta)


def subset(split: ImageSplit, most: int) -> ImageSplit:
    """A balanced subset of `most` images, in stored order: the first image of each class, then the second, and so on.

    The pixels are not copied. `sha` is the sha256 of `<the whole split's sha> balanced <most>`: since the rule is
    fixed, this identifies exactly these samples. If nothing is left out, the split itself is returned.
    """
    if most >= len(split):
        return split
    rows = balanced_rows(split.labels, most)
    sha = hashlib.sha256(f"{split.sha} balanced {most}".encode()).hexdigest()
    return ImageSplit(split.images, split.labels[rows], tuple(split.names[row] for row in rows), sha, rows)


def balanced_rows(labels: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """The rows of a balanced subset, int64[min(most, n)], increasing: the first of each class, then the second of each,
    and so on.

    Args:
        labels: int64[n].
        most: the size of the subset.
    """
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    turn = np.empty(len(labels), np.int64)  # the number of earlier rows with the same label
    turn[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(np.lexsort((labels, turn))[:most])


def info(root: Path) -> dict[str, Any]:
    """A packed folder as `rayexp data info` prints it: counts, classes, hashes, bytes (UserError as for read_meta)."""
    meta = read_meta(root)
    labels = {split: _labels(root, meta, split) for split in SPLITS}
    return {
        "kind": "images",
        "name": meta["dataset"],
        "root": str(root),
        "source": meta["source"],
        "packed": meta["packed"],
        **({"layout": meta["layout"]} if meta.get("layout") else {}),
        "image_size": meta["image_size"],
        **meta["counts"],
        "bytes": sum(path.stat().st_size for path in root.iterdir() if path.is_file()),
        "sha": meta["sha"],
        "classes": class_table(meta["classes"], labels),
    }


def class_table(classes: Sequence[Sequence[str]], labels: Mapping[str, ArrayLike]) -> list[dict[str, Any]]:
    """A row for each class: `label`, `id`, `words` (its readable name), and its number of images in each split."""
    counts = {split: np.bincount(np.asarray(of, np.int64), minlength=len(classes)) for split, of in labels.items()}
    return [
        {"label": label, "id": id, "words": name, **{split: int(of[label]) for split, of in counts.items()}}
        for label, (id, name) in enumerate(classes)
    ]


def check(root: Path) -> None:
    """Read and hash everything, even what is remembered as good (UserError names an array that differs)."""
    meta = read_meta(root)
    for split in SPLITS:
        _open_split(root, meta, split, anew=True)


def _open_split(root: Path, meta: dict[str, Any], split: str, *, anew: bool = False) -> ImageSplit:
    labels = _labels(root, meta, split)
    size, path = meta["image_size"], root / f"{split}_images.npy"
    opened = _identity(path)
    images = _map(path, (len(labels), size, size, 3), np.uint8)
    integrity.check_images(path, images, opened, meta["chunk"], meta["chunks"][split], anew=anew)
    return ImageSplit(images, labels, tuple(meta["names"][split]), meta["sha"][split])


def _labels(root: Path, meta: dict[str, Any], split: str) -> NDArray[np.int64]:
    """The labels of a split. Together with the names and the hashes of the pixels they must give the split's hash."""
    path = root / f"{split}_labels.npy"
    labels = np.array(_map(path, (meta["counts"][split],), np.int64))
    if split_sha(meta["names"][split], labels.tolist(), meta["chunks"][split]) != meta["sha"][split]:
        raise UserError(
            f"{path}: damaged (with the names in meta.json, these are not the labels that were packed); remove {root}, "
            f"and the same command (or `rayexp data fetch`) packs it again"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(meta["classes"]):
        raise UserError(f"{path}: damaged (labels beyond the classes); remove {root} and fetch again")
    return labels


def _identity(path: Path) -> integrity.Identity:
    try:
        return integrity.identity(path)
    except OSError as error:
        raise UserError(
            f"{path}: missing or damaged ({error.strerror}); remove {path.parent} and fetch again"
        ) from error


def _map(path: Path, shape: tuple[int, ...], dtype: type[Any]) -> NDArray[Any]:
    """An array on disk, memory-mapped, as a plain ndarray."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); remove {path.parent} and fetch again") from error
    if array.shape != shape or array.dtype != dtype:
        raise UserError(f"{path}: is {array.dtype}{list(array.shape)}, meta.json says {np.dtype(dtype)}{list(shape)}")
    return np.asarray(array)
