"""Any folder of images: root/train/<class>/... and root/val/<class>/..., or root/<class>/... alone (see layouts.py).

Without a val folder a fifth of the images of each class, chosen by the hash of their names, is held out for validation.
Images of any size are resized and cropped to `data.image_size` and packed into the cache. If a file is added, removed
or changed, the folder is packed again; not if a file is only touched or the folder is copied, since the pixels decide.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from rayexp.config import DataConfig
from rayexp.data import ImageData, uses
from rayexp.data.fetch import FileSource, list_folder
from rayexp.data.folder_cache import packed_for
from rayexp.data.layouts import ACCEPTED, Classes, find_layout
from rayexp.data.pack import Item, PackPlan, done
from rayexp.data.packed import class_table, open_packed
from rayexp.data.resize import open_resized
from rayexp.data.tiny_imagenet import natural
from rayexp.display import counted
from rayexp.errors import UserError

__all__ = ["info", "make_plan", "open_data"]


def open_data(config: DataConfig) -> ImageData:
    """The images below `config.root`, packed into the cache on first use; or the packed images in `config.root`.

    Raises:
        UserError: the folder does not exist or has another layout, or an image cannot be decoded; the line names it.
    """
    root = (config.root or Path()).expanduser().absolute()
    if done(root):
        return open_resized(root, config)
    if not root.is_dir():
        raise UserError(f"data.root: {root} is no folder")
    plan = make_plan(root, config.image_size)
    packed = packed_for(plan, root)
    data = dataclasses.replace(open_packed(packed, config), layout=plan.layout)
    uses.hold(packed, data.train.images)
    return data


def info(root: Path) -> dict[str, Any]:
    """Counts and classes of a folder that is not packed (UserError as for `make_plan`)."""
    plan = make_plan(root, DataConfig().image_size)
    labels = {split: [label for _, _, label in items] for split, items in plan.splits.items()}
    counts = {split: len(items) for split, items in plan.splits.items()}
    return {
        "kind": "images",
        "name": "folder",
        "root": str(root),
        "packed": "no: on first use, into the cache",
        "layout": plan.layout,
        **counts,
        "classes": class_table(plan.classes, labels),
    }


def make_plan(root: Path, size: int) -> PackPlan:
    """Plan how to pack a folder: classes in alphabetical order (as in torchvision's ImageFolder), images by class and
    number.

    Raises:
        UserError: the layout is unknown (see layouts.py), there are no classes or only one, a class is empty, or val
            has a class that train does not have.
    """
    source = FileSource(root, "", list_folder(root))
    layout = find_layout(root, source.files)
    train = _in_order(layout.train)
    if len(train) < 2:
        found = f"only the class {next(iter(train))}" if train else "no images in class folders"
        raise UserError(f"{root}: {found}; {ACCEPTED}")
    val = _in_order(layout.val)
    if not val:
        val = {name: _held_out(names) for name, names in train.items()}
        train = {name: [n for n in names if n not in set(val[name])] for name, names in train.items()}
    if not any(val.values()):
        raise UserError(f"{root}: too few images to keep some for validation; give at least two of a class")
    label = {name: number for number, name in enumerate(sorted(train))}
    return PackPlan(
        dataset="folder",
        source=source,
        classes=tuple((name, name) for name in label),
        splits={"train": _items(train, label, layout.prefixes), "val": _items(val, label, layout.prefixes)},
        size=size,
        resize=True,
        layout=f"{counted(len(label), 'class', 'classes')}; {layout.summary}",
    )


def _in_order(classes: Classes) -> Classes:
    return {name: sorted(files, key=natural) for name, files in classes.items()}


def _held_out(names: list[str]) -> list[str]:
    """A fifth of a class, at least one image if there are two; chosen by hash, so that a new file moves few others."""
    by_hash = sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())
    return sorted(by_hash[: max(len(names) // 5, int(len(names) > 1))], key=natural)


def _items(classes: Classes, label: dict[str, int], prefixes: tuple[str, str]) -> list[Item]:
    """Name each image by its path from the class folder on, since file names may repeat in different classes."""
    train, val = prefixes
    return [
        (file, file.removeprefix(train).removeprefix(val), number)
        for name, number in label.items()
        for file in classes.get(name, [])
    ]
