"""Packed images at another size: a copy in the cache, made from the packed pixels without the archive."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rayexp.config import DataConfig
from rayexp.data import ImageData, ImageSplit, uses
from rayexp.data.decode import answer, fit
from rayexp.data.fetch import FileSource
from rayexp.data.pack import SPLITS, Item, PackPlan, pack
from rayexp.data.packed import open_packed, read_meta
from rayexp.system.cache import cache_dir

WHOLE = ("tiny_imagenet", "shapes")  # packed without cropping; other images have lost what was cropped


def open_resized(root: Path, config: DataConfig) -> ImageData:
    """The packed images in `root` at `config.image_size`; if they are packed at another size, a copy in the cache.

    Raises:
        UserError: as for open_packed, or the cache cannot be written or its disk is full.
    """
    meta = read_meta(root)
    if meta["image_size"] == config.image_size or meta["dataset"] not in WHOLE:
        return open_packed(root, config)
    everything = {"image_size": meta["image_size"], "max_train_samples": None, "max_val_samples": None}
    whole = open_packed(root, config.model_copy(update=everything))
    plan = PackPlan(
        dataset=meta["dataset"],
        source=source_of(root.absolute(), meta),
        classes=whole.classes,
        splits={"train": _items("train", whole.train), "val": _items("val", whole.val)},
        size=config.image_size,
        resize=True,
        layout=whole.layout,
        decoder="rayexp.data.resize:resize",
    )
    packed = cache_dir() / "folders" / f"{root.absolute().name}-{config.image_size}px-{plan.key()[:16]}"
    pack(packed, lambda: plan)
    uses.note(packed, root.absolute())
    data = open_packed(packed, config)
    uses.hold(packed, data.train.images)
    return data


def source_of(root: Path, meta: dict[str, Any]) -> FileSource:
    """A packed folder as a source for packing; its key depends on the images, not on the path."""
    return FileSource(root, "", {split: (meta["counts"][split], int(meta["sha"][split], 16)) for split in SPLITS})


def _items(split: str, images: ImageSplit) -> list[Item]:
    labels = images.labels.tolist()
    return [(f"{split}/{row}", name, label) for row, (name, label) in enumerate(zip(images.names, labels, strict=True))]


def resize(path: str, prefix: str, names: list[str], size: int, resize: bool, shown: str) -> bytes:
    """Resize packed images in the pool, like decode.decode; names are `train/<row>` and `val/<row>` of the packed
    folder `path`."""
    pixels = np.empty((len(names), size, size, 3), np.uint8)
    for row, name in enumerate(names):
        split, _, at = name.partition("/")
        pixels[row] = np.asarray(fit(Image.fromarray(_mapped(path, split)[int(at)]), size))
    return answer(pixels)


@functools.cache
def _mapped(path: str, split: str) -> NDArray[np.uint8]:
    return np.asarray(np.load(Path(path) / f"{split}_images.npy", mmap_mode="r"))
