"""A folder that is there and cannot be read is called that, whoever asks; none of it is passed over."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rayexp.config import DataConfig
from rayexp.data import open_data
from rayexp.data.describe import describe
from rayexp.data.fetch import list_folder, open_source
from rayexp.errors import UserError


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Make a folder that cannot be listed, for root, too."""
    scandir = os.scandir

    def lock(folder: Path) -> Path:
        def refusing(path: str | Path = ".") -> object:
            if Path(path) == folder:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refusing)
        return folder

    return lock


@pytest.mark.parametrize("name", ["folder", "text", "tiny_imagenet", "wikitext2"])
def test_data_in_a_folder_that_cannot_be_read(tmp_path, locked, name) -> None:
    (tmp_path / "d").mkdir()
    root = locked(tmp_path / "d")
    said = rf"^{root}: cannot be read \(Permission denied\)$"
    with pytest.raises(UserError, match=said):
        open_data(DataConfig(name=name, root=root))
    with pytest.raises(UserError, match=said):
        describe(str(root))
    with pytest.raises(UserError, match=said):
        open_source(root, "wnids.txt")


def test_a_class_that_cannot_be_read_is_not_passed_over(tmp_path, tiny, locked) -> None:
    for k, name in enumerate(f"train/{c}/{n}.png" for c in "abc" for n in range(2)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(tiny.picture(k, size=(8, 8), format="PNG"))
    locked(tmp_path / "train" / "c")
    with pytest.raises(UserError, match=r"train/c: cannot be read \(Permission denied\)"):
        open_data(DataConfig(name="folder", root=tmp_path, image_size=8))


def test_a_file_that_cannot_be_looked_at_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    stat = Path.stat

    def refusing(path: Path, **options: bool) -> os.stat_result:
        if path.name == "a.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refusing)
    with pytest.raises(UserError, match=r"a\.png: cannot be read \(Input/output error\)"):
        list_folder(tmp_path)


def test_what_is_no_folder_is_called_something_else(tmp_path) -> None:
    for missing in (tmp_path / "none", Path("a\0b")):
        with pytest.raises(UserError, match=r"no folder|null (byte|character)"):
            open_data(DataConfig(name="folder", root=missing))
