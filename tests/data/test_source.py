from __future__ import annotations

import zipfile

import pytest

from rayexp.data.fetch import open_source
from rayexp.errors import UserError
from rayexp.system.cache import cache_dir


def test_marker_at_the_top_or_below(tmp_path, tiny):
    for prefix in ("", "top/", "a/b/"):
        path = tiny.write_zip(tmp_path / "a.zip", {"m.txt": b"1", "sub/x": b"22"}, top=prefix)
        source = open_source(path, "m.txt")
        assert (source.prefix, sorted(source.files), source.read("sub/x")) == (prefix, ["m.txt", "sub/x"], b"22")
        assert source.where("sub/x") == f"{path}:{prefix}sub/x"
    for prefix in ("", "top"):
        root = tiny.write_folder(tmp_path / f"f{prefix}" / prefix, {"m.txt": b"1", "sub/x": b"22"})
        source = open_source(tmp_path / f"f{prefix}", "m.txt")
        assert (sorted(source.files), source.read("sub/x")) == (["m.txt", "sub/x"], b"22")
        assert source.where("sub/x") == str(root / "sub/x")


def test_the_shallowest_marker_counts_and_mac_leftovers_do_not(tmp_path, tiny):
    files = {"__MACOSX/m.txt": b"", "deep/er/m.txt": b"wrong", "data/m.txt": b"right"}
    source = open_source(tiny.write_zip(tmp_path / "a.zip", files, top=""), "m.txt")
    assert source.text("m.txt") == "right"


def test_key_changes_with_the_content(tmp_path, tiny):
    keys = set()
    for files in ({"m.txt": b"1"}, {"m.txt": b"2"}, {"m.txt": b"1", "n": b""}):
        keys.add(open_source(tiny.write_zip(tmp_path / "a.zip", files), "m.txt").key())
        keys.add(open_source(tiny.write_zip(tmp_path / "b.zip", files), "m.txt").key())
    assert len(keys) == 3


def test_missing(tmp_path, tiny):
    with pytest.raises(UserError, match=r"no such file or folder"):
        open_source(tmp_path / "none.zip", "m.txt")
    with pytest.raises(UserError, match=r"a\.zip: no m\.txt in it; expected this"):
        open_source(tiny.write_zip(tmp_path / "a.zip", {"x": b""}), "m.txt", layout="this")
    source = open_source(tiny.write_folder(tmp_path / "f", {"m.txt": b""}), "m.txt")
    with pytest.raises(UserError, match=r"f/gone: missing"):
        source.read("gone")


def test_links_in_folders_are_followed_once(tmp_path, tiny):
    root = tiny.write_folder(tmp_path / "f", {"m.txt": b"1"})
    tiny.write_folder(tmp_path / "elsewhere", {"x": b"5"})
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    (root / "dangling").symlink_to(tmp_path / "none")
    source = open_source(root, "m.txt")
    assert sorted(source.files) == ["linked/x", "m.txt"]
    assert source.read("linked/x") == b"5"


def test_encrypted_and_huge_entries(tmp_path, tiny):
    path = tiny.write_zip(tmp_path / "a.zip", {"m.txt": b"1"}, top="")
    data = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(magic) + offset] |= 1  # the flag of a password
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.zip:m\.txt: cannot be read \(.*(password|encrypted)"):
        open_source(path, "m.txt").read("m.txt")
    data = bytearray(tiny.write_zip(path, {"m.txt": b"1"}, top="").read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 24 : at + 28] = b"\xff\xff\xff\xfe"  # the size it claims to have
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"claims 4\.3 GB; refused"):
        open_source(path, "m.txt")


def test_an_archive_that_changes_is_opened_again(tmp_path, tiny):
    for content in (b"1", b"22", b"333"):
        path = tiny.write_zip(tmp_path / "a.zip", {"m.txt": content})
        assert open_source(path, "m.txt").read("m.txt") == content


def test_unknown_compression(tmp_path, tiny):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m.txt", b"1")
    data = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        data[data.index(magic) + offset] = 97
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"m\.txt: cannot be read"):
        open_source(path, "m.txt").read("m.txt")


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("RAYEXP_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("RAYEXP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "rayexp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "rayexp"
