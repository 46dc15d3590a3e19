"""Any folder of images: root/train/<class>/... and root/val/<class>/..., or root/<class>/... alone.

Without a val folder every fifth image of each class, chosen by the hash of its name, is kept for validation. Images of
any size are resized and cropped to `data.image_size` and packed into the cache; a folder in which a file came, went
or changed is packed anew.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

from rayexp.config import DataConfig
from rayexp.data import ImageData
from rayexp.data.fetch import Source, cache_dir, list_folder
from rayexp.data.pack import SUFFIXES, Item, Plan, done, pack
from rayexp.data.packed import class_table, open_packed
from rayexp.data.tiny_imagenet import natural
from rayexp.errors import UserError

__all__ = ["info", "make_plan", "open_data"]

LAYOUT = "train/<class>/*.jpg and val/<class>/*.jpg, or <class>/*.jpg"
Classes = dict[str, list[str]]


def open_data(config: DataConfig) -> ImageData:
    """The images below `config.root` (or what is packed there), packed into the cache on first use.

    Raises:
        UserError: the folder does not exist or has no such layout, or an image cannot be decoded; the line names it.
    """
    root = (config.root or Path()).expanduser().absolute()
    if done(root):
        return open_packed(root, config)
    if not root.is_dir():
        raise UserError(f"data.root: {root} is no folder")
    plan = make_plan(root, config.image_size)
    packed = cache_dir() / "folders" / f"{root.name}-{plan.key()[:16]}"
    pack(packed, lambda: plan)
    return open_packed(packed, config)


def info(root: Path) -> dict[str, Any]:
    """Counts and classes of a folder that is not packed (UserError: see `make_plan`)."""
    plan = make_plan(root, DataConfig().image_size)
    labels = {split: [label for _, _, label in items] for split, items in plan.splits.items()}
    counts = {split: len(items) for split, items in plan.splits.items()}
    return {
        "kind": "images",
        "name": "folder",
        "root": str(root),
        "packed": "no: on first use, into the cache",
        **counts,
        "classes": class_table(plan.classes, labels),
    }


def make_plan(root: Path, size: int) -> Plan:
    """Classes in alphabetical order (as torchvision's ImageFolder), images by class and number.

    Raises:
        UserError: no classes, only one, an empty one, or a class of val that train does not have.
    """
    source = Source(root, "", list_folder(root))
    images = [name for name in source.files if _is_image(name)]
    if _has_splits(images):
        train = _by_class(images, "train/")
        val = _by_class(images, "val/")
        _no_empty_class(root / "train", train)
        if unknown := sorted(val.keys() - train.keys()):
            raise UserError(f"{root / 'val' / unknown[0]}: a class that {root / 'train'} does not have")
    else:
        train, val = _by_class(images, ""), {}
        _no_empty_class(root, train)
    if len(train) < 2:
        found = f"only the class {next(iter(train))}" if train else "no images in class folders"
        raise UserError(f"{root}: {found}; expected {LAYOUT}")
    if not val:
        val = {name: _held_out(names) for name, names in train.items()}
        train = {name: [n for n in names if n not in set(val[name])] for name, names in train.items()}
    if not any(val.values()):
        raise UserError(f"{root}: too few images to keep some for validation; give at least two of a class")
    label = {name: number for number, name in enumerate(sorted(train))}
    return Plan(
        dataset="folder",
        source=source,
        classes=tuple((name, name) for name in label),
        splits={"train": _items(train, label), "val": _items(val, label)},
        size=size,
        resize=True,
    )


def _has_splits(images: list[str]) -> bool:
    """train/ with class folders in it, and no images in other folders than train, val and test: a class may well be
    called `train`, but then it has images of its own or brothers."""
    tops = {name.split("/")[0] for name in images}
    return (
        tops <= {"train", "val", "test"}
        and "train" in tops
        and all(name.count("/") >= 2 for name in images if name.startswith("train/"))
    )


def _by_class(images: list[str], below: str) -> Classes:
    """class -> its files, those in deeper folders too."""
    classes: Classes = defaultdict(list)
    for name in images:
        inside = name.removeprefix(below)
        if name.startswith(below) and "/" in inside:
            classes[inside.split("/")[0]].append(name)
    return {name: sorted(files, key=natural) for name, files in classes.items()}


def _no_empty_class(folder: Path, classes: Classes) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith((".", "__")) and path.name not in classes:
            raise UserError(f"{path}: class folder without images ({', '.join(SUFFIXES)})")


def _held_out(names: list[str]) -> list[str]:
    """A fifth of a class, at least one where there are two. By hash: a new file moves few others across."""
    by_hash = sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())
    return sorted(by_hash[: max(len(names) // 5, int(len(names) > 1))], key=natural)


def _items(classes: Classes, label: dict[str, int]) -> list[Item]:
    """Known by their path from the class folder's parent on: file names alone repeat from class to class."""
    return [
        (file, file.removeprefix("train/").removeprefix("val/"), number)
        for name, number in label.items()
        for file in classes.get(name, [])
    ]


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
