"""Tiny-ImageNet as many people keep it: the validation images sorted into class folders."""

from __future__ import annotations

import pytest

from rayexp.config import DataConfig
from rayexp.data import packed, tiny_imagenet
from rayexp.errors import UserError


def config(root):
    return DataConfig(name="tiny_imagenet", root=root)


def sort_val(files: dict[str, bytes], deeper: str, *, annotations: bool = False) -> dict[str, bytes]:
    """The validation images in class folders."""
    annotated = dict(line.split("\t")[:2] for line in files["val/val_annotations.txt"].decode().splitlines())
    found = {}
    for name, data in files.items():
        file = name.removeprefix("val/images/")
        found[f"val/{annotated[file]}/{deeper}{file}" if file != name else name] = data
    if not annotations:
        del found["val/val_annotations.txt"]
    return found


@pytest.mark.parametrize("deeper", ["", "images/"])
@pytest.mark.parametrize("annotations", [False, True])
def test_class_sorted_val_is_the_same_data(tmp_path, tiny, deeper, annotations):
    files = sort_val(tiny.layout(), deeper, annotations=annotations)
    tiny_imagenet.fetch(tiny.write_zip(tmp_path / "a.zip", files), tmp_path / "d")
    tiny_imagenet.fetch(tiny.write_zip(tmp_path / "b.zip", tiny.layout()), tmp_path / "r")
    ours, theirs = (packed.read_meta(tmp_path / d) for d in "dr")
    assert ours["sha"] == theirs["sha"]
    assert ours["layout"] == "3 classes; train from train/; val from val/<class>/"
    assert theirs["layout"] == "3 classes; train from train/; val from val/images/"


def test_class_sorted_val_whose_names_repeat(tmp_path, tiny):
    files = {name: data for name, data in tiny.layout().items() if not name.startswith("val/")}
    files |= {f"val/{w}/{k}.JPEG": tiny.picture(10 * i + k) for i, w in enumerate(tiny.wnids) for k in (9, 10)}
    tiny_imagenet.fetch(tiny.write_folder(tmp_path / "a", files), tmp_path / "d")
    data = tiny_imagenet.open_data(config(tmp_path / "d"))
    assert data.val.names == tuple(f"{w}/{k}.JPEG" for w in sorted(tiny.wnids) for k in (9, 10))
    assert data.val.labels.tolist() == [0, 0, 1, 1, 2, 2]


SORTED_REFUSALS = {
    "some not sorted": (
        lambda f: {**f, "val/images/val_0.JPEG": f["val/n03000003/val_0.JPEG"]},
        r"val/images/val_0\.JPEG: not in a class folder, as .*; allowed: all or none",
    ),
    "another class": (
        lambda f: {**f, "val/n07/x.JPEG": b""},
        r"val/n07: a class that wnids\.txt does not name",
    ),
    "class missing": (
        lambda f: {name: data for name, data in f.items() if not name.startswith("val/n02000002")},
        r"val/n02000002: class folder missing or without images",
    ),
    "another folder than annotated": (
        lambda f: {**f, "val/val_annotations.txt": b"val_0.JPEG\tn02000002\t0\n"},
        r"line 1: val_0\.JPEG of class 'n02000002' is in the folder of n03000003",
    ),
    "annotated and not there": (
        lambda f: {**f, "val/val_annotations.txt": b"val_99.JPEG\tn02000002\t0\n"},
        r"line 1: val_99\.JPEG of class 'n02000002' is in no class folder",
    ),
}


@pytest.mark.parametrize("case", SORTED_REFUSALS)
def test_class_sorted_val_refused(tmp_path, tiny, case):
    change, message = SORTED_REFUSALS[case]
    source = tiny.write_zip(tmp_path / "a.zip", change(sort_val(tiny.layout(), "")))
    with pytest.raises(UserError, match=message):
        tiny_imagenet.fetch(source, tmp_path / "d")
    assert not (tmp_path / "d").exists()
