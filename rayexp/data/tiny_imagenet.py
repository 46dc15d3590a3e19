"""Tiny-ImageNet-200 in the official layout, checked, relabelled and packed.

    wnids.txt  words.txt  train/<wnid>/images/*.JPEG  val/images/*.JPEG  val/val_annotations.txt   (test/ is ignored)

or, as many people keep it, with the validation images sorted by class: val/<wnid>/images/*.JPEG or val/<wnid>/*.JPEG.

Label l is the l-th class in alphabetical order, as in torchvision's ImageFolder and in label files that people keep
(`val_1008.JPEG 107`). The order of the lines of wnids.txt is another one.
Images are stored by class and number (train) or by number (val).
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from rayexp.config import DataConfig
from rayexp.data import ImageData
from rayexp.data.decode import SUFFIXES
from rayexp.data.download import TINY_IMAGENET as URL
from rayexp.data.fetch import FileSource, is_url, open_source
from rayexp.data.pack import PARTIAL, Item, PackPlan, done, pack
from rayexp.data.packed import info, read_meta
from rayexp.data.resize import open_resized
from rayexp.display import counted
from rayexp.errors import UserError

__all__ = ["fetch", "info", "make_plan", "open_data"]

SIZE = 64
LAYOUT = (
    "tiny-imagenet-200/{wnids.txt,words.txt,train/<wnid>/images/*.JPEG,val/{images/*.JPEG,val_annotations.txt}}, "
    "or val/<wnid>/*.JPEG"
)


def open_data(config: DataConfig) -> ImageData:
    """The packed images in `config.root`; for another `image_size`, a copy at that size, made on first use.

    Raises:
        UserError: as for `open_packed`; for an unpacked folder or archive, the line says how to pack it.
    """
    root = (config.root or Path("data/tiny_imagenet")).expanduser()
    if not done(root) and (root.is_file() or is_unpacked(root)):
        raise UserError(
            f"data.root: {root} is not packed; run `rayexp data fetch tiny_imagenet --from {root} --to DIR`"
        )
    if not (done(root) or (root / PARTIAL).exists()):
        raise UserError(
            f"data.root: no packed Tiny-ImageNet in {root}; "
            f"`rayexp data fetch tiny_imagenet --from ZIP|TAR|DIR|URL --to {root}` makes it"
        )
    return open_resized(root, config)


def is_unpacked(root: Path) -> bool:
    """Whether a folder contains the official files where `open_source` finds them."""
    return any(next(root.glob(f"{above}wnids.txt"), None) for above in ("", "*/", "*/*/"))


def fetch(source: str | Path | None, to: Path) -> bool:
    """Pack an archive, a folder or a URL (None: the official one) into `to`; return False if that was done before.

    Raises:
        UserError: the source has another layout (the line names the file), or `to` contains other data.
    """
    if done(to):
        meta = read_meta(to)
        gone = source is None or is_url(source) or not Path(source).expanduser().exists()
        same = source is None or meta["source"] in (str(source), str(Path(source).expanduser().absolute()))
        if gone and same:
            return False
        found = open_source(source or URL, "wnids.txt")
        found.release()
        if found.key() != meta["source_key"]:
            raise UserError(f"{to}: holds other data already (from {meta['source']}); choose another folder")
        return False
    found = open_source(source or URL, "wnids.txt", layout=LAYOUT)
    try:
        plan = make_plan(found, "tiny_imagenet")
        packed = pack(to, lambda: plan)
    except UserError:
        found.release()
        raise
    found.release()  # not after an interruption: the next call continues with it
    return packed


def make_plan(source: FileSource, dataset: str, size: int = SIZE) -> PackPlan:
    """Read the lists, compare them with the files, and determine labels and order (UserError names any mismatch)."""
    wnids = [line.strip() for line in source.text("wnids.txt").splitlines() if line.strip()]
    if not wnids:
        raise UserError(f"{source.where('wnids.txt')}: names no class")
    if twice := next((wnid for wnid in wnids if wnids.count(wnid) > 1), None):
        raise UserError(f"{source.where('wnids.txt')}: names {twice} twice")
    words = {}
    if "words.txt" in source:
        lines = (line.partition("\t") for line in source.text("words.txt").splitlines())
        words = {wnid.strip(): text.strip() for wnid, _, text in lines}
    order = sorted(wnids)
    label = {wnid: number for number, wnid in enumerate(order)}
    val = _sorted_val(source, label)
    of = "val/<class>/" if val else "val/images/"
    return PackPlan(
        dataset=dataset,
        source=source,
        classes=tuple((wnid, words.get(wnid, wnid)) for wnid in order),
        splits={"train": _train(source, label), "val": val or _val(source, label)},
        size=size,
        resize=size != SIZE,
        layout=f"{counted(len(order), 'class', 'classes')}; train from train/; val from {of}" * (dataset != "shapes"),
    )


def _train(source: FileSource, label: dict[str, int]) -> list[Item]:
    images: dict[str, list[str]] = defaultdict(list)
    for name in source.files:
        parts = name.split("/")
        if parts[0] == "train" and len(parts) == 4 and parts[2] == "images" and _is_image(parts[3]):
            images[parts[1]].append(parts[3])
    for wnid in label:
        if not images.get(wnid):
            raise UserError(f"{source.where(f'train/{wnid}/images')}: class folder missing or without images")
    if unknown := sorted(images.keys() - label.keys()):
        raise UserError(f"{source.where(f'train/{unknown[0]}')}: a class that wnids.txt does not name")
    return [
        (f"train/{wnid}/images/{name}", name, number)
        for wnid, number in label.items()
        for name in sorted(images[wnid], key=natural)
    ]


def _val(source: FileSource, label: dict[str, int]) -> list[Item]:
    listed = "val/val_annotations.txt"
    items: dict[str, Item] = {}
    for number, line in enumerate(source.text(listed).splitlines(), 1):
        if not line.strip():
            continue
        name, wnid = (*line.split("\t"), "")[:2]
        where = f"{source.where(listed)} line {number}"
        if wnid not in label:
            raise UserError(f"{where}: unknown class {wnid!r}; allowed are those of wnids.txt")
        if f"val/images/{name}" not in source:
            raise UserError(f"{where}: there is no image {source.where(f'val/images/{name}')}")
        if name in items:
            raise UserError(f"{where}: annotates {name} a second time")
        items[name] = (f"val/images/{name}", name, label[wnid])
    for path in source.files:
        folder, _, name = path.rpartition("/")
        if folder == "val/images" and _is_image(name) and name not in items:
            raise UserError(f"{source.where(path)}: has no annotation in {listed}")
    if not items:
        raise UserError(f"{source.where(listed)}: annotates no image")
    return [items[name] for name in sorted(items, key=natural)]


def _sorted_val(source: FileSource, label: dict[str, int]) -> list[Item]:
    """The validation images in class folders, by number; empty if there are none.

    The same images give the same data as in the official layout. If file names repeat in different classes, images are
    named by class and file name.
    """
    found: list[tuple[str, str, str]] = []
    for path in source.files:
        match path.split("/"):
            case ["val", wnid, "images", name] | ["val", wnid, name] if wnid != "images" and _is_image(name):
                if wnid not in label:
                    raise UserError(f"{source.where(f'val/{wnid}')}: a class that wnids.txt does not name")
                found.append((path, wnid, name))
    if not found:
        return []
    if loose := next((path for path in source.files if path.startswith("val/images/") and _is_image(path[11:])), None):
        sorted_one = source.where(found[0][0])
        raise UserError(f"{source.where(loose)}: not in a class folder, as {sorted_one} is; allowed: all or none")
    if missing := next((wnid for wnid in label if wnid not in {wnid for _, wnid, _ in found}), None):
        raise UserError(f"{source.where(f'val/{missing}')}: class folder missing or without images")
    if "val/val_annotations.txt" in source:
        _agree(source, {name: wnid for _, wnid, name in found})
    repeated = len({name for _, _, name in found}) < len(found)
    items = [(path, f"{wnid}/{name}" if repeated else name, label[wnid]) for path, wnid, name in found]
    return sorted(items, key=lambda item: natural(item[1]))


def _agree(source: FileSource, wnids: dict[str, str]) -> None:
    """Compare the class folders with the annotations beside them (UserError names any difference)."""
    listed = "val/val_annotations.txt"
    for number, line in enumerate(source.text(listed).splitlines(), 1):
        name, wnid = (*line.split("\t"), "")[:2]
        if line.strip() and wnids.get(name) != wnid:
            at = f"is in the folder of {wnids[name]}" if name in wnids else "is in no class folder"
            raise UserError(f"{source.where(listed)} line {number}: {name} of class {wnid!r} {at}")


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key: `val_9` before `val_10`."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"([0-9]+)", name)] + [(0, name)]


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")
