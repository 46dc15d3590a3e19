"""A dataset of one's own: what it may give, how it is packed once, and how each mistake is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayexp.config import DataConfig
from rayexp.data import open_data, own
from rayexp.errors import UserError

Open = Callable[..., Any]
HEAD = """
import numpy as np
class D:
    classes = ("a", "b")
    def __init__(self, split, n: int = 6):
        self.n, self.split = n if split == "train" else 2, split
    def __len__(self): return self.n
    def __getitem__(self, i): return np.full((8, 12), 10 * i, np.uint8), i % 2
"""


class Tensor:
    """What a tensor of PyTorch's looks like from here."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        self.shape = array.shape

    def detach(self) -> Tensor:
        return self

    cpu = detach

    def numpy(self) -> np.ndarray[Any, Any]:
        return self.array


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """The data of a module's `D`, opened with these keys under `data`."""
    monkeypatch.setenv("RAYEXP_CACHE", str(tmp_path / "cache"))
    code = tmp_path / "code"
    code.mkdir()

    def open_it(text: str, *, is_text: bool = False, **keys: Any) -> Any:
        (code / "data.py").write_text(text)
        config = DataConfig.model_validate({"name": "data.py:D", "image_size": 8, **keys})
        return open_data(config, (str(code),), text=is_text)

    return open_it


RAMP = np.arange(8 * 12 * 3).reshape(8, 12, 3).astype(np.uint8)


@pytest.mark.parametrize(
    "image",
    [
        RAMP,
        Image.fromarray(RAMP),
        RAMP.astype(np.float32) / 255,
        Tensor(np.moveaxis(RAMP, -1, 0)),
        Tensor(np.moveaxis(RAMP / 255, -1, 0)),
        np.concatenate([RAMP, RAMP[:, :, :1]], 2),
    ],
)
def test_every_form_of_an_image_has_the_same_pixels(image: Any) -> None:
    recipe = own.Recipe("x:D", DataConfig(name="x:D"), None)
    assert np.array_equal(np.asarray(own._picture(recipe, "train", 0, image)), RAMP)


@pytest.mark.parametrize("image", [RAMP[:, :, 0], RAMP[:, :, :1], Tensor(RAMP[None, :, :, 0]), Tensor(RAMP[:, :, 0])])
def test_grey_images_have_three_equal_channels(image: Any) -> None:
    recipe = own.Recipe("x:D", DataConfig(name="x:D"), None)
    pixels = np.asarray(own._picture(recipe, "train", 0, image))
    assert all(np.array_equal(pixels[:, :, c], RAMP[:, :, 0]) for c in range(3))


def test_floats_are_rounded() -> None:
    assert own._bytes(np.array([[0.0, 0.4999, 0.5, 1.0]] * 2)).tolist() == [[0, 127, 128, 255]] * 2


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (RAMP.astype(np.int64), "int64; allowed: uint8"),
        (RAMP / 100, "floats outside of 0 to 1"),
        (RAMP / np.nan, "floats outside of 0 to 1"),
        (np.moveaxis(RAMP, -1, 0), r"shape \(3, 8, 12\); expected height x width"),
        (RAMP[:0], "shape"),
        (RAMP.ravel(), "shape"),
        ("x", "shape"),
    ],
)
def test_what_is_no_image(image: Any, why: str) -> None:
    recipe = own.Recipe("x:D", DataConfig(name="x:D"), None)
    with pytest.raises(UserError, match=rf"^data.name: x:D: sample 3 of val is no image \({why}"):
        own._picture(recipe, "val", 3, image)


def test_images_are_packed_once_and_anew_where_code_or_options_change(opened: Open, tmp_path: Path) -> None:
    data = opened(HEAD)
    assert (len(data.train), len(data.val)) == (6, 2)
    assert data.classes == (("a", "a"), ("b", "b"))
    assert data.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.val.names == ("val_0", "val_1")
    assert data.train.images.shape == (6, 8, 8, 3)
    assert data.train.read(np.arange(6))[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50]
    packed = tmp_path / "cache" / "folders"
    before = {path: (path / "meta.json").stat().st_mtime_ns for path in packed.iterdir()}
    again = opened(HEAD, max_train_samples=4)
    assert {path: (path / "meta.json").stat().st_mtime_ns for path in packed.iterdir()} == before
    assert len(again.train) == 4
    assert opened(HEAD, n=4).train.sha != data.train.sha
    assert opened(HEAD.replace("10 * i", "9 * i")).train.sha != data.train.sha
    assert len(list(packed.iterdir())) == 3
    same = opened(HEAD.replace("import numpy", "\nimport numpy"))  # other code, the same pixels
    assert (same.train.sha, same.val.sha) == (data.train.sha, data.val.sha)


def test_a_folder_that_is_asked_for_counts_with_its_files(opened: Open, tmp_path: Path) -> None:
    text = HEAD.replace("n: int = 6):", "root):\n        n = int((root / 'n').read_text())")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "n").write_text("4")
    assert len(opened(text, root=tmp_path / "root").train) == 4
    (tmp_path / "root" / "n").write_text("10")
    assert len(opened(text, root=tmp_path / "root").train) == 10
    with pytest.raises(UserError, match=r"^data.root: data.py:D asks for a folder \(data.root=DIR\)$"):
        opened(text)
    optional = HEAD.replace("n: int = 6):", "root=5):\n        n = root")
    assert len(opened(optional).train) == 5


@pytest.mark.parametrize("targets", ["[0, 1, 0, 1, 0, 1][:self.n]", "np.arange(self.n) % 2"])
def test_targets_save_asking_for_every_label(
    opened: Open, tmp_path: Path, targets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own.pool, "ordered", lambda *args: pytest.fail("every sample is asked for its label"))
    text = HEAD + f"    @property\n    def targets(self): return {targets}\n"
    (own_config := DataConfig.model_validate({"name": "data.py:D", "image_size": 8}))
    opened_code = str(tmp_path / "code")
    Path(opened_code, "data.py").write_text(text)
    plan = own.make_plan(own.Recipe("data.py:D", own_config, (opened_code,)))
    assert [label for _, _, label in plan.splits["train"]] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("split, n: int = 6", "n: int = 6, split2=0"), r"takes no `split`; it is called with split='train' and"),
        (("return np.full", "1 / 0; return np.full"), r"sample 0 of train cannot be read as \(image, label\) \("),
        ((", i % 2", ", 'a'"), r"sample 0 of train has the label 'a'; expected a whole number from 0"),
        ((", i % 2", ", -1"), r"has the label -1; expected a whole number from 0"),
        ((", i % 2", ", 2 + i % 2"), r"has 2 classes, and labels up to 3"),
        (('("a", "b")', '("a",)'), r"has 1 classes, and labels up to 1"),
        (("def __len__", "def len"), r"gives a D for split='train'; expected a dataset with __len__ and __getitem__"),
        (("else 2", "else 0"), r"has no samples for split='val'"),
        (("10 * i", "np.random.randint(99)"), r"gives another image when sample 0 of train is read again"),
        (('("a", "b")', '("a", "b")\n    names = ("x",)'), r"has 1 names and 6 samples \(train\)"),
        (('("a", "b")', '("a", "b")\n    targets = (0, 1)'), r"has 2 targets and 6 samples \(train\)"),
        (('("a", "b")', '("a", "b")\n    targets = property(lambda s: [1] * s.n)'), r"has the label 0, its targets"),
        (("(8, 12)", "(8,)"), r"sample 0 of train is no image \(shape"),
        (("return np.full", "raise SystemExit(3); return np.full"), r"sample 0 of train cannot .*SystemExit: 3"),
        (("return self.n", "raise OSError('gone')"), r"__len__ of split='train' fails \(line 7 of .*OSError: gone\)$"),
        (('("a", "b")', '("a", "b")\n    targets = property(lambda s: 1 / 0)'), r"targets of split='train' fails \("),
        (("classes = (\"a\", \"b\")", "classes = property(lambda s: 1 / 0)"), r"classes of split='train' fails \("),
        (('("a", "b")', '("a", "b")\n    names = property(lambda s: 1 / 0)'), r"names of split='train' fails \("),
        (('("a", "b")', '("a", "b")\n    targets = (1 // i for i in (1, 0))'), r"targets of split='train' fails \("),
        (('("a", "b")', "3"), r"classes of split='train' fails \(TypeError"),
        ((", i % 2", ", 10**30"), r"has the label 10+; expected a whole number from 0"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_line_and_nothing_is_left(
    opened: Open, tmp_path: Path, change: tuple[str, str], line: str
) -> None:
    assert HEAD.count(change[0]) == 1
    with pytest.raises(UserError, match=rf"^data.name: data.py:D.*{line}"):
        opened(HEAD.replace(*change))
    folders = tmp_path / "cache" / "folders"
    assert not folders.exists() or not any(folders.iterdir())


def test_labels_without_names_are_bounded_by_the_samples(opened: Open) -> None:
    nameless = HEAD.replace('classes = ("a", "b")', "")
    assert opened(nameless).classes == (("0", "0"), ("1", "1"))
    assert len(opened(nameless.replace("i % 2", "i + 2")).classes) == 8
    with pytest.raises(UserError, match=r"^data.name: data.py:D has labels up to 8, more than samples; labels count"):
        opened(nameless.replace("i % 2", "i + 3"))


def test_classes_may_be_numbers(opened: Open) -> None:
    assert opened(HEAD.replace('("a", "b")', "[7, 9]")).classes == (("7", "7"), ("9", "9"))


@pytest.mark.parametrize("first", [True, False])
def test_a_file_that_is_cut_short_is_named(opened: Open, tmp_path: Path, first: bool) -> None:
    """Pillow opens it, and fails when it is read: in a helper process, unless it is the first sample."""
    Image.effect_noise((90, 90), 90).save(whole := tmp_path / "whole.jpg")
    (cut := tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:900])
    text = "from PIL import Image\n" + HEAD.replace(
        "return np.full((8, 12), 10 * i, np.uint8)",
        f"return Image.open({str(cut)!r} if i == {0 if first else 3} else {str(whole)!r})",
    )
    with pytest.raises(UserError, match=rf"^data.name: data.py:D: sample {0 if first else 3} of train is no image \("):
        opened(text)


def test_wrong_options_are_named(opened: Open) -> None:
    with pytest.raises(UserError, match=r"^unknown key data.m; allowed: n$"):
        opened(HEAD, m=3)
    with pytest.raises(UserError, match=r"^data.n: expected a whole number, got 'x'$"):
        opened(HEAD, n="x")


def test_text_of_ones_own(opened: Open, tmp_path: Path) -> None:
    text = "def D(split, n=3):\n    return [f'{split[0]} b c\\n' for _ in range(n)]\n"
    data = opened(text, is_text=True)
    assert data.vocabulary == ("t", "b", "c", "<eos>", "<unk>")
    assert data.train.tolist() == [0, 1, 2, 3] * 3
    assert data.valid.tolist() == [4, 1, 2, 3] * 3
    assert len(opened(text, is_text=True, n=5, max_train_tokens=7).train) == 7
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "text").rglob("*.npy")}
    opened(text, is_text=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "text").rglob("*.npy")} == before
    with pytest.raises(UserError, match=r"^data.name: data.py:D: line 0 of train is int; expected lines of text$"):
        opened("def D(split): return [1]", is_text=True)
    with pytest.raises(UserError, match=r"^data.name: data.py:D: the lines of train cannot be read \(line 2 of "):
        opened("def D(split):\n    yield 1 / 0", is_text=True)
    with pytest.raises(UserError, match=r"the lines of train cannot be read \(.*SystemExit: 3\)$"):
        opened("def D(split):\n    yield exit(3)", is_text=True)
