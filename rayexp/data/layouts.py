"""Which folders of an image folder are splits and which are classes, by a table of known layouts; nothing is guessed.

    train/<class>/...  and  val/<class>/...      val may be called valid, validation or dev, in upper or lower case
    train/<class>/...  alone                     a part of each class is held out for validation
    <class>/...                                  the same; only if no folder's name looks like that of a split

A `train/` of images alone is a class only among classes: beside a folder that by its name holds none (`plots/`), or
with far more images than any other, it is refused, since it may be a split whose images nobody has sorted.

`test/` beside train/ is ignored. Images outside class folders are left out and reported. Anything else is refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayexp.data.decode import SUFFIXES
from rayexp.display import counted, printable
from rayexp.errors import UserError

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
ROLE = {name: role for role, names in SPLITS.items() for name in names}
# Names that look like a split rather than a class.
SPLIT_LIKE = re.compile(r"(train|val|valid|test|eval|dev)(ing|idation|uation)?[-_ ]?(sets?|images?|imgs|data|\d{4})?")
# Names of folders that lie beside images and are no classes.
NO_CLASS = frozenset(
    [
        "plot", "plots", "figs", "figures", "mask", "masks", "labels", "annotations", "segmentation",
        "segmentations", "data", "image", "images", "imgs", "sample", "samples", "extra", "unlabeled", "unlabelled",
        "unsorted", "output", "outputs", "predictions", "results", "thumbnails", "thumbs", "backup", "misc", "other",
        "temp", "tmp",
    ]
)  # fmt: skip
UNLIKE = 3  # a class called train has at most so many times the images of the largest other
ACCEPTED = (
    "accepted: train/<class>/ with val|valid|validation/<class>/ (test/ is set aside), train/<class>/, or <class>/"
)
Classes = dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class FolderLayout:
    """The layout of an image folder.

    Attributes:
        train, val: class -> its files, relative to the folder, in no order; `val` is empty if a part of `train` is to
            be held out.
        prefixes: the path before the classes in `train` and in `val`; an image is named by the rest of its path.
            Without split folders they are `train/` and `val/`, even if a class has that name: hashes of old runs depend
            on it.
        summary: which folders were used for which split, in a line.
    """

    train: Classes
    val: Classes
    prefixes: tuple[str, str]
    summary: str


def find_layout(root: Path, files: Iterable[str]) -> FolderLayout:
    """The layout of the folder `root` with these files (relative names; files that are not images are ignored).

    Raises:
        UserError: the layout is unknown; the line names what was found and what is accepted.
    """
    images = [name for name in files if is_image(name)]
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    loose = [name for name in images if "/" not in name]
    roles: dict[str, list[str]] = defaultdict(list)
    for name in folders:
        if name.lower() in ROLE:
            roles[ROLE[name.lower()]].append(name)
    for role in ("train", "val"):
        if len(roles[role]) > 1:
            raise _refused(root, f"{' and '.join(f'{name}/' for name in roles[role])} both look like {role}/")
    if roles["train"] and _has_classes(images, roles["train"][0]):
        return _splits(root, images, loose, folders, roles)
    suspects = [name for name in folders if SPLIT_LIKE.fullmatch(name.lower()) and name not in roles["train"]]
    if suspects:
        flat = f"are no class folders in {roles['train'][0]}/" if roles["train"] else "is no train/ beside it"
        raise _refused(root, f"{suspects[0]}/ looks like a split, and there {flat}")
    if roles["train"] and not any(_below(images, name) for name in folders if name not in roles["train"]):
        raise _refused(root, f"{roles['train'][0]}/ {_flat(images, roles['train'][0])}")
    if roles["train"]:
        _train_is_a_class(root, images, roles["train"][0])
    return _classes(root, images, loose, folders)


def _splits(
    root: Path, images: list[str], loose: list[str], folders: list[str], roles: dict[str, list[str]]
) -> FolderLayout:
    train, val, test = roles["train"][0], roles["val"], roles["test"]
    known = {train, *val, *test}
    if other := next((name for name in folders if name not in known and _below(images, name)), None):
        count = len(_below(images, other))
        raise _refused(root, f"beside {train}/ there is {other}/ with {counted(count, 'image')}; move it away")
    found = {name: by_class(images, f"{name}/") for name in (train, *val)}
    _no_empty_class(root / train, found[train])
    left = [*loose, *(image for name in found for image in _below(images, name) if image.count("/") == 1)]
    if val and not found[val[0]]:
        what = _flat(images, val[0])
        hint = (
            f"; this is Tiny-ImageNet: `rayexp data fetch tiny_imagenet --from {root}`"
            if (root / "wnids.txt").exists()
            else f"; without {val[0]}/, a share of {train}/ is held out"
        )
        raise _refused(root, f"{val[0]}/ {what}{hint}")
    if val and (unknown := sorted(found[val[0]].keys() - found[train].keys())):
        raise UserError(f"{root / val[0] / unknown[0]}: a class that {root / train} does not have{_official(root)}")
    parts = [f"train from {train}/", f"val from {val[0]}/" if val else "val: a fifth of each class, held out"]
    if val and (none := sorted(found[train].keys() - found[val[0]].keys())):
        parts.append(f"{val[0]}/ has none of {_some(none)}")
    if test:
        parts.append(f"{', '.join(f'{name}/' for name in test)} set aside")
    prefixes = (f"{train}/", f"{val[0] if val else 'val'}/")
    return FolderLayout(found[train], found[val[0]] if val else {}, prefixes, _line(parts, left))


def _classes(root: Path, images: list[str], loose: list[str], folders: list[str]) -> FolderLayout:
    classes = by_class(images, "")
    _no_empty_class(root, classes)
    if len(classes) == 1:
        (name,) = classes
        inside = sorted({image.split("/")[1] for image in classes[name] if image.count("/") > 1})
        if any(part.lower() in ROLE for part in inside):
            raise _refused(root, f"{_some(inside)} lie in {name}/; name that folder: data.root={root / name}")
    summary = _line(["train from the class folders", "val: a fifth of each class, held out"], loose)
    return FolderLayout(classes, {}, ("train/", "val/"), summary)


def _train_is_a_class(root: Path, images: list[str], train: str) -> None:
    """Refuse a folder `train` whose images may be unsorted rather than of one class."""
    counts = {name: len(files) for name, files in by_class(images, "").items()}
    own = counts.pop(train, 0)
    other = next((name for name in sorted(counts) if name.lower() in NO_CLASS), max(counts, key=lambda n: counts[n]))
    if other.lower() in NO_CLASS or own > UNLIKE * counts[other]:
        beside = f"beside it is {other}/ with {counts[other]:,}, which is no second class"
        raise _refused(root, f"{train}/ {_flat(images, train)}, and {beside}")


def by_class(images: Iterable[str], below: str) -> Classes:
    """class -> its files, including those in deeper folders."""
    classes: Classes = defaultdict(list)
    for name in images:
        inside = name.removeprefix(below)
        if name.startswith(below) and "/" in inside:
            classes[inside.split("/")[0]].append(name)
    return dict(classes)


def is_image(name: str) -> bool:
    """Whether a relative file name is that of an image, and no part of it is hidden."""
    return name.lower().endswith(SUFFIXES) and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _has_classes(images: Iterable[str], folder: str) -> bool:
    return any(name.startswith(f"{folder}/") and name.count("/") >= 2 for name in images)


def _below(images: Iterable[str], folder: str) -> list[str]:
    return [name for name in images if name.startswith(f"{folder}/")]


def _flat(images: Iterable[str], folder: str) -> str:
    """What is wrong with a split that holds no class."""
    count = len(_below(images, folder))
    return f"holds {counted(count, 'image')} and no class folders" if count else "holds no images"


def _no_empty_class(folder: Path, classes: Classes) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith((".", "__")) and path.name not in classes:
            raise UserError(f"{path}: class folder without images ({', '.join(SUFFIXES)})")


def _official(root: Path) -> str:
    found = (root / "wnids.txt").exists()
    return f"; this is Tiny-ImageNet: `rayexp data fetch tiny_imagenet --from {root}`" if found else ""


def _refused(root: Path, found: str) -> UserError:
    return UserError(f"{root}: {found}; {ACCEPTED}")


def _line(parts: list[str], left: Sequence[str]) -> str:
    if left:
        parts.append(f"{counted(len(left), 'image')} outside the class folders left out: {_some(sorted(left))}")
    return printable("; ".join(parts))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
