"""Image folders: known layouts are read and said, everything else is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rayexp.config import DataConfig
from rayexp.data import folder, layouts, open_data
from rayexp.data.describe import describe
from rayexp.errors import UserError


def lay(root: Path, tiny, *names: str) -> Path:
    """Make images (or other files) of these names; one that ends in `/` is an empty folder."""
    for k, name in enumerate(names):
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tiny.picture(k, size=(8, 8), format="PNG") if name.endswith("png") else b"text")
    return root


def two(split: str, n: int = 2) -> list[str]:
    """n images in each of two classes."""
    return [f"{split}/{c}/{k}.png" for c in "ab" for k in range(n)]


def taken(root: Path) -> tuple[list[str], list[str], list[str]]:
    plan = folder.make_plan(root, 8)
    train, val = (sorted(file for file, _, _ in plan.splits[split]) for split in ("train", "val"))
    return [name for name, _ in plan.classes], train, val


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training"])
@pytest.mark.parametrize("val", ["val", "Val", "valid", "Validation", "dev"])
def test_splits_of_any_known_name(tmp_path, tiny, train, val):
    root = lay(tmp_path / "d", tiny, *two(train, 3), *two(val))
    assert taken(root) == (["a", "b"], two(train, 3), two(val))
    plan = folder.make_plan(root, 8)
    assert plan.layout == f"2 classes; train from {train}/; val from {val}/"
    assert [name for _, name, _ in plan.splits["val"]] == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (two("test"), "; test/ set aside"),
        (["Test/x.png"], "; Test/ set aside"),
        (["test/"], "; test/ set aside"),
        (["x.png"], "; 1 image outside the class folders left out: x.png"),
        (["train/x.png", "val/y.png"], "; 2 images outside the class folders left out: train/x.png, val/y.png"),
        (
            [f"{k}.png" for k in range(5)],
            "; 5 images outside the class folders left out: 0.png, 1.png, 2.png and 2 more",
        ),
        (["plots/readme.txt", "labels.csv"], ""),
        ([".cache/x.png", "__MACOSX/y.png"], ""),
        (["train/c/9.png"], "; val/ has none of c"),
        (["\x1b[2J.png"], "; 1 image outside the class folders left out: \\x1b[2J.png"),
        (["caf\udce9.png"], "; 1 image outside the class folders left out: caf\\xe9.png"),
    ],
)
def test_what_lies_beside_known_splits(tmp_path, tiny, extra, said):
    root = lay(tmp_path / "d", tiny, *two("train"), *two("val"), *extra)
    classes, train, val = taken(root)
    assert train == sorted([*two("train"), *(name for name in extra if name == "train/c/9.png")])
    assert val == two("val")
    assert len(classes) == 2 + ("train/c/9.png" in extra)
    assert folder.make_plan(root, 8).layout == f"{len(classes)} classes; train from train/; val from val/{said}"


def test_train_alone_and_train_with_test(tmp_path, tiny):
    """A share is held out, and the test images are not touched."""
    root = lay(tmp_path / "d", tiny, *two("train", 5))
    assert folder.make_plan(root, 8).layout == "2 classes; train from train/; val: a fifth of each class, held out"
    before = taken(root)
    lay(root, tiny, *two("test", 5))
    assert taken(root) == before
    assert folder.make_plan(root, 8).layout.endswith("held out; test/ set aside")


def test_class_folders(tmp_path, tiny):
    root = lay(tmp_path / "d", tiny, "cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png", "x.png")
    assert taken(root)[0] == ["cat", "dog"]
    assert folder.make_plan(root, 8).layout == (
        "2 classes; train from the class folders; val: a fifth of each class, held out; "
        "1 image outside the class folders left out: x.png"
    )


@pytest.mark.parametrize("name", ["valley", "testudo", "train_station", "validator", "devil", "trainer"])
def test_classes_whose_names_only_begin_like_a_split(tmp_path, tiny, name):
    root = lay(tmp_path / "d", tiny, *(f"{c}/{k}.png" for c in ("cat", name) for k in range(2)))
    assert taken(root)[0] == sorted(["cat", name])


@pytest.mark.parametrize("sizes", [{"train": 6, "car": 2}, {"train": 2, "car": 9}, {"train": 7, "car": 1, "bus": 3}])
def test_a_class_called_train_among_classes_of_like_size(tmp_path, tiny, sizes):
    root = lay(tmp_path / "d", tiny, *(f"{c}/{k}.png" for c, n in sizes.items() for k in range(n)))
    assert taken(root)[0] == sorted(sizes)


FLAT = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
REFUSED = {
    "plots": ([*two("train"), *two("val"), "plots/loss.png"], "beside train/ there is plots/ with 1 image; move it"),
    "two vals": ([*two("train"), *two("val"), *two("validation")], "val/ and validation/ both look like val/"),
    "two trains": ([*two("train"), *two("Train"), *two("val")], "Train/ and train/ both look like train/"),
    "unsorted val": ([*two("train"), "val/0.png", "val/1.png"], "val/ holds 2 images and no class folders"),
    "empty val": ([*two("train"), "val/"], "val/ holds no images; without val/, a share of train/ is held out"),
    "val of text": ([*two("train"), "val/a/x.txt"], "val/ holds no images"),
    "unsorted both": (
        ["train/0.png", "val/0.png"],
        "val/ looks like a split, and there are no class folders in train/",
    ),
    "no train": ([*two("valid"), *two("test")], "test/ looks like a split, and there is no train/ beside it"),
    "classes and val": ([*FLAT, "val/0.png"], "val/ looks like a split, and there is no train/ beside it"),
    "classes and test": ([*FLAT, "test/0.png"], "test/ looks like a split"),
    "classes and sorted train": ([*FLAT, *two("train")], "beside train/ there is cat/ with 2 images"),
    "train alone, unsorted": (["train/0.png", "train/1.png"], "train/ holds 2 images and no class folders"),
    "train alone, empty": (["train/", "x.png"], "train/ holds no images"),
    "train, unsorted, and plots": (
        [*(f"train/{k}.png" for k in range(4)), "plots/0.png", "plots/1.png"],
        "train/ holds 4 images and no class folders, and beside it is plots/ with 2, which is no second class",
    ),
    "train, unsorted, a class and masks": (
        [f"{folder}/{k}.png" for folder in ("train", "cat", "Masks") for k in range(3)],
        "train/ holds 3 images and no class folders, and beside it is Masks/ with 3",
    ),
    "train, unsorted, and something small": (
        [*(f"train/{k}.png" for k in range(7)), "holdout/0.png", "holdout/1.png"],
        "train/ holds 7 images and no class folders, and beside it is holdout/ with 2",
    ),
    "train and unknown": ([*two("train"), *two("holdout")], "beside train/ there is holdout/ with 4 images; move it"),
    "train and eval": ([*two("train"), *two("eval")], "beside train/ there is eval/ with 4 images; move it away"),
    "years": (["train2017/0.png", "val2017/0.png"], "train2017/ looks like a split"),
    "sets": ([*two("train_set"), *two("test_set")], "test_set/ looks like a split"),
    "images": ([*two("train-images"), *two("cat")], "train-images/ looks like a split"),
    "one deeper": ([f"data/{name}" for name in two("train")], "train lie in data/; name that folder: data.root="),
    "one deeper, with val": ([f"d/{s}/a/0.png" for s in ("train", "val")], "train, val lie in d/; name that folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(tmp_path, tiny, cache, case):
    names, message = REFUSED[case]
    root = lay(tmp_path / "d", tiny, *names)
    with pytest.raises(UserError, match=rf"^{root}: .*{re.escape(message)}.*; accepted: train/<class>/ with") as caught:
        open_data(DataConfig(name="folder", root=root, image_size=8))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=re.escape(message)):
        describe(str(root))
    assert list(cache.iterdir()) == []


def test_raw_tiny_imagenet_is_sent_to_its_own_reader(tmp_path, tiny):
    root = tiny.write_folder(tmp_path / "d", tiny.layout())
    with pytest.raises(UserError, match=rf"val/images: a class that .*; this is Tiny-ImageNet: .*--from {root}"):
        folder.make_plan(root, 64)


def test_what_was_taken_is_in_the_data(tmp_path, tiny):
    root = lay(tmp_path / "d", tiny, *two("train"), *two("valid"), *two("test"))
    data = open_data(DataConfig(name="folder", root=root, image_size=8))
    assert data.layout == "2 classes; train from train/; val from valid/; test/ set aside"
    assert describe(str(root))["layout"] == data.layout
    # A copy with another folder set aside shares the packed arrays, and says its own.
    other = lay(tmp_path / "x" / "d", tiny, *two("train"), *two("valid"), "x.png")
    data = open_data(DataConfig(name="folder", root=other, image_size=8))
    assert (
        data.layout
        == "2 classes; train from train/; val from valid/; 1 image outside the class folders left out: x.png"
    )


NAMES = st.sampled_from(
    ["train", "val", "Val", "valid", "test", "cat", "dog", "plots", "val2017", "x.png", "notes.txt"]
)


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(NAMES, st.tuples(NAMES, st.sampled_from(["a", "b", "0.png"])).map("/".join)).map(
            lambda name: name if name.endswith(("png", "txt")) else f"{name}/1.png"
        ),
        unique=True,
        min_size=1,
        max_size=8,
    )
)
def test_no_split_is_ever_taken_for_a_class(tmp_path_factory, names):
    """Whatever lies there: refused, or no class is called like a split (but for a `train` of images among classes)."""
    root = tmp_path_factory.mktemp("d")
    clean = [name for name in names if not any(other.startswith(f"{name}/") for other in names)]
    for name in clean:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if not (root / name).is_dir():
            (root / name).write_bytes(b"")
    try:
        layout = layouts.find_layout(root, [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()])
    except UserError:
        return
    splits = {name for name in layout.train if layouts.SPLIT_LIKE.fullmatch(name)}
    assert splits <= {"train"}
    files = {file for files in (*layout.train.values(), *layout.val.values()) for file in files}
    assert not any(file.startswith(("test/", "plots/")) for file in files) or "plots" in layout.train
    assert not any(file.lower().startswith("val") for files in layout.train.values() for file in files)


def two_of(classes: tuple[str, str], n: int, below: str = "") -> list[str]:
    return [f"{below}{c}/{k}.png" for c in classes for k in range(n)]


@pytest.mark.parametrize(
    ("files", "train", "val"),
    [
        ([*two("train", 3), *two("val", 2)], "fa464bf6e5c50416", "ea1a98883591193e"),
        ([*two("train", 6), *two("test", 2)], "ce572ec77afc64a3", "eaf0f128e773e33c"),
        (two_of(("car", "train"), 6), "d430920e3a47ede9", "642d659588f66c5a"),
        (
            [name for split in ("train", "val") for name in two_of(("train", "val"), 2, f"{split}/")],
            "d9cb5dcbe6dcffa3",
            "7fd0ea6e76a14bfb",
        ),
        (two_of(("cat", "val"), 3, "train/"), "5d611c46f41eb061", "6ac650f062300b11"),
        (
            [f"{c}/{d}/{k}.png" for c in ("car", "dog") for d in "xy" for k in range(3)],
            "d08fc40c45200fb5",
            "dde520478ecb23d6",
        ),
    ],
)
def test_hashes_of_the_first_edition_stay(tmp_path, files, train, val):
    """As commit ae3aa16 gave them: runs that were trained then compare them on resume and in a diff."""
    for k, name in enumerate(files):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (k, 2 * k, 3 * k)).save(tmp_path / name)
    data = open_data(DataConfig(name="folder", root=tmp_path, image_size=8))
    assert (data.train.sha[:16], data.val.sha[:16]) == (train, val)
