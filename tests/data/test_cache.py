"""The cache: pixels decide whether a folder is packed again, and what is stale can be seen and removed."""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rayexp.config import DataConfig
from rayexp.data import archive, folder_cache, open_data, prune, text, tiny_imagenet
from rayexp.data import pack as packing
from rayexp.errors import UserError

SIZE = 16


def config(root: Path, size: int = SIZE) -> DataConfig:
    return DataConfig(name="folder", root=root, image_size=size)


@pytest.fixture
def root(tmp_path, tiny) -> Path:
    files = {f"{c}/{k}.png": tiny.picture(k, size=(20, 16), format="PNG") for c in "ab" for k in range(5)}
    return tiny.write_folder(tmp_path / "pets", files)


def packed_folders(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "folders").iterdir() if not path.is_symlink())


def states(cache: Path) -> dict[str, tuple[str, bool]]:
    return {str(one.path.relative_to(cache)): (one.state, one.stale) for one in prune.entries()}


# ---------------------------------------------------------------------- pixels decide


def test_a_touched_image_is_compared_and_nothing_else(root, cache, counted):
    first = open_data(config(root))
    counted.clear()
    os.utime(root / "b" / "3.png", ns=(1, 1))
    again = open_data(config(root))
    assert counted == [["b/3.png"]]
    assert (again.train.sha, again.val.sha) == (first.train.sha, first.val.sha)
    assert len(packed_folders(cache)) == 1
    counted.clear()
    open_data(config(root))
    assert counted == []  # found by its new listing


def test_a_copy_of_the_folder_shares_what_is_packed(root, cache, tmp_path):
    first = open_data(config(root))
    for k, name in enumerate(("copy", "x/pets")):
        copy = shutil.copytree(root, tmp_path / name, copy_function=shutil.copyfile)
        os.utime(copy / "a" / "0.png", ns=(k, k))
        assert open_data(config(copy)).train.sha == first.train.sha
    assert len(packed_folders(cache)) == 1


def test_a_file_saved_anew_with_the_same_pixels(root, cache, tiny):
    first = open_data(config(root))
    path = root / "a" / "2.png"
    path.write_bytes(path.read_bytes() + b"trailing")
    assert open_data(config(root)).train.sha == first.train.sha
    assert len(packed_folders(cache)) == 1


@pytest.mark.parametrize("change", ["pixels", "new file", "gone", "renamed", "class renamed", "size"])
def test_a_change_is_packed(root, cache, tiny, change):
    first = open_data(config(root))
    size = SIZE
    if change == "pixels":
        (root / "b" / "3.png").write_bytes(tiny.picture(77, size=(20, 16), format="PNG"))
    elif change == "new file":
        (root / "b" / "9.png").write_bytes(tiny.picture(77, size=(20, 16), format="PNG"))
    elif change == "gone":
        (root / "b" / "3.png").unlink()
    elif change == "renamed":
        (root / "b" / "3.png").rename(root / "b" / "33.png")
    elif change == "class renamed":
        (root / "a").rename(root / "c")
    else:
        size = 8
    second = open_data(config(root, size))
    assert (second.train.sha, second.val.sha) != (first.train.sha, first.val.sha)
    assert len(packed_folders(cache)) == 2


def test_a_packed_folder_of_an_older_rayexp_is_found(root, cache, counted):
    """It has no list of files: all are compared once."""
    open_data(config(root))
    (packed,) = (cache / "folders").iterdir()
    for name in ("files.json", "used.json"):
        (packed / name).unlink()
    counted.clear()
    open_data(config(root))
    assert counted == []
    os.utime(root / "a" / "0.png", ns=(1, 1))
    open_data(config(root))
    assert sum(map(len, counted)) == 10
    assert len(packed_folders(cache)) == 1


def test_a_damaged_packed_folder_is_not_adopted(root, cache):
    open_data(config(root))
    (packed,) = (cache / "folders").iterdir()
    np.save(packed / "train_labels.npy", np.zeros(8, np.int64))
    os.utime(root / "a" / "0.png", ns=(1, 1))
    data = open_data(config(root))
    assert np.bincount(data.train.labels).tolist() == [4, 4]
    assert len(packed_folders(cache)) == 2


def test_a_link_to_nothing_is_packed_over(root, cache):
    open_data(config(root))
    os.utime(root / "a" / "0.png", ns=(1, 1))
    open_data(config(root))
    shutil.rmtree(cache / "folders" / packed_folders(cache)[0])
    assert len(open_data(config(root)).train) == 8
    assert len(packed_folders(cache)) == 1


def test_a_touched_image_that_is_damaged_is_named(root):
    open_data(config(root))
    (root / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a/0\.png: cannot be decoded"):
        open_data(config(root))


# ---------------------------------------------------------------------- what is stale


def test_what_is_packed_for_a_folder_that_stands_stays(root, cache):
    open_data(config(root))
    open_data(config(root, 8))
    os.utime(root / "a" / "0.png", ns=(1, 1))
    assert {state for state, _ in states(cache).values()} == {f"for {root}, perhaps"}
    assert list(prune.prune()) == []
    open_data(config(root))  # by way of a link
    assert {stale for _, stale in states(cache).values()} == {False}
    assert list(prune.prune()) == []
    assert len(packed_folders(cache)) == 2


def test_what_a_changed_folder_left_behind_goes(root, cache, tiny):
    open_data(config(root))
    (old,) = packed_folders(cache)
    (root / "b" / "3.png").write_bytes(tiny.picture(77, size=(20, 16), format="PNG"))
    new = open_data(config(root)).train.sha
    gc.collect()
    assert states(cache)[f"folders/{old}"] == (f"{root} has changed since", True)
    (gone,) = prune.prune()
    assert gone.path.name == old
    assert gone.bytes > 10 * SIZE * SIZE * 3
    assert old not in packed_folders(cache)
    assert len(packed_folders(cache)) == 1
    assert open_data(config(root)).train.sha == new
    assert list(prune.prune()) == []


def test_what_is_packed_of_a_folder_that_is_gone_goes(root, cache, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    open_data(config(root))
    os.utime(copy / "a" / "0.png", ns=(1, 1))
    open_data(config(copy))
    gc.collect()
    root.rename(tmp_path / "elsewhere")
    assert list(prune.prune()) == []  # the copy uses it
    shutil.rmtree(copy)
    (gone,) = prune.prune()
    assert gone.state == f"{root} is gone"
    assert list((cache / "folders").iterdir()) == []  # links too


def test_what_a_process_has_mapped_stays(root, cache):
    data = open_data(config(root))
    shutil.rmtree(root)
    ((state, stale),) = states(cache).values()
    assert (state, stale) == (prune.IN_USE, False)
    assert list(prune.prune()) == []
    before = data.train.read(np.arange(8)).sum()
    del data
    gc.collect()
    assert len(list(prune.prune())) == 1
    assert before > 0


def test_what_was_taken_into_use_meanwhile_stays(root, cache):
    data = open_data(config(root))
    (packed,) = (cache / "folders").iterdir()
    assert prune._remove(prune.Entry(packed, "images", "", 1, "stale when it was looked at", True)) is False
    assert packing.done(packed)
    assert len(data.train) == 8


def test_what_another_process_has_mapped_stays(root, cache):
    code = (
        "import sys; from pathlib import Path\n"
        "from rayexp.config import DataConfig; from rayexp.data import open_data\n"
        f"data = open_data(DataConfig(name='folder', root=Path({str(root)!r}), image_size={SIZE}))\n"
        "print('open', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"open\n"
    shutil.rmtree(root)
    assert list(prune.prune()) == []
    process.communicate()
    assert len(list(prune.prune())) == 1


def test_a_folder_that_cannot_be_read_keeps_what_is_packed(root, cache):
    open_data(config(root))
    gc.collect()
    shutil.rmtree(root / "b")
    ((state, stale),) = states(cache).values()
    assert state.startswith(f"kept: {root}: only the class a")
    assert not stale


def test_unfinished_work(root, cache, monkeypatch):
    plan_of = packing._pack
    monkeypatch.setattr(packing, "_pack", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        open_data(config(root))
    monkeypatch.setattr(packing, "_pack", plan_of)
    ((path, (state, stale)),) = states(cache).items()
    assert (state, stale) == ("unfinished: packing was stopped", True)
    with packing._alone(cache / path):  # somebody goes on with it
        assert states(cache)[path] == (prune.IN_USE, False)
        assert list(prune.prune()) == []
    assert [one.state for one in prune.prune()] == ["unfinished: packing was stopped"]
    assert packed_folders(cache) == []


def test_text(tmp_path, cache):
    folder = tmp_path / "t"
    folder.mkdir()
    for name in text.SPLITS:
        (folder / f"{name}.txt").write_text("a b\n")
    config = DataConfig(name="text", root=folder)
    open_data(config)
    ((state, stale),) = states(cache).values()
    assert (state, stale) == (f"for {folder}", False)
    (folder / "train.txt").write_text("c d\n")
    assert list(states(cache).values()) == [(f"{folder} has changed since", True)]
    open_data(config)
    assert len(list(prune.prune())) == 1
    assert open_data(config).vocabulary == ("c", "d", "<eos>", "<unk>")
    ((path, _),) = states(cache).items()
    (cache / path / "used.json").unlink()  # of an older rayexp
    assert list(states(cache).values()) == [("kept: it is not known of what folder", False)]
    open_data(config)
    (folder / "test.txt").unlink()
    ((state, stale),) = states(cache).values()
    assert state.startswith(f"kept: {folder / 'test.txt'}: cannot be read")
    assert not stale
    shutil.rmtree(folder)
    assert [one.state for one in prune.prune()] == [f"{folder} is gone"]


def test_other_sizes_of_tiny_imagenet(tmp_path, tiny, cache):
    source = tiny.write_zip(tmp_path / "a.zip", tiny.layout())
    tiny_imagenet.fetch(source, tmp_path / "d")
    open_data(DataConfig(name="tiny_imagenet", root=tmp_path / "d", image_size=8))
    gc.collect()
    assert list(states(cache).values()) == [(f"for {tmp_path / 'd'}", False)]
    shutil.rmtree(tmp_path / "d")
    assert [one.state for one in prune.prune()] == [f"{tmp_path / 'd'} is gone"]


def test_downloads_and_old_drawings(cache):
    downloads = cache / "downloads"
    downloads.mkdir()
    (downloads / "1-a.zip").write_bytes(b"PK")
    (downloads / ".tmp-2-b.zip").write_bytes(b"half")
    (downloads / ".tmp-2-b.zip.version").write_bytes(b'"v1"')
    (downloads / ".tmp-2-b.zip.lock").write_bytes(b"")
    for version in (0, 1):
        home = cache / f"shapes-v{version}-1x1-seed0-64px"
        home.mkdir()
        (home / "meta.json").write_text("{}")
    found = states(cache)
    assert found["downloads/1-a.zip"][1] is False
    assert found["downloads/.tmp-2-b.zip"] == ("unfinished", True)
    assert found["shapes-v0-1x1-seed0-64px"] == ("of an older rayexp", True)
    assert found["shapes-v1-1x1-seed0-64px"] == ("made by rayexp", False)
    assert len(list(prune.prune())) == 2
    assert sorted(path.name for path in downloads.iterdir()) == [".tmp-2-b.zip.lock", "1-a.zip"]


def test_what_became_of_a_tar(cache, tiny, tmp_path):
    source = tiny.write_tar(tmp_path / "a.tar.gz", tiny.layout())
    made = archive.as_zip(source)
    assert states(cache) == {f"archives/{made.name}": ("left by a fetch that was stopped", True)}
    archive.list_zip(made, source)  # and it stays open
    assert [stale for _, stale in states(cache).values()] == [False]
    archive._open_archive.cache_clear()
    half = made.with_name(".tmp-0-half.zip")
    with zipfile.ZipFile(half, "w") as writing:
        archive._hold(writing)
        assert states(cache)[f"archives/{half.name}"] == (prune.IN_USE, False)
    assert len(list(prune.prune())) == 2


def test_the_command(root, cache, tiny, typed):
    rayexp = functools.partial(typed, "data", "cache")
    assert rayexp().stdout == f"stale: 0 of 0, 0.0 MB, in {cache}\n"
    open_data(config(root))
    (root / "b" / "3.png").write_bytes(tiny.picture(77, size=(20, 16), format="PNG"))
    open_data(config(root))
    gc.collect()
    shown = rayexp()
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "stale: 1 of 2" in shown.stdout
    assert "(--prune removes them)" in shown.stdout
    assert len(packed_folders(cache)) == 2  # showing removes nothing
    assert [one["stale"] for one in json.loads(rayexp("--json").stdout)].count(True) == 1
    removed = rayexp("--prune")
    assert removed.returncode == 0
    assert "has changed since" in removed.stdout
    assert "removed: 1, " in removed.stdout
    assert len(packed_folders(cache)) == 1
    assert f"removed: 0, 0.0 MB, from {cache}" in rayexp("--prune").stdout


def test_links_are_in_the_folder_itself(root, cache):
    """So that a cache can be moved."""
    open_data(config(root))
    os.utime(root / "a" / "0.png", ns=(1, 1))
    open_data(config(root))
    (link,) = [path for path in folder_cache.home().iterdir() if path.is_symlink()]
    assert "/" not in str(link.readlink())
