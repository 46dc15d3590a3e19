"""Names that come from outside: whatever they say, the path lies below the folder, and no link leads out of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayexp.errors import UserError
from rayexp.system.disk import inside, relative

OUT = [
    "", "/", ".", "..", "./", "../x", "x/..", "x/../../y", "/etc/passwd", "//etc", "logs//abs", "a/./b", "a/b//",
    "..\\x", "a\\..\\..\\x", "\\x", "C:/x", "C:\\x", "a\0b", "./../x", "././x",
]  # fmt: skip


@pytest.mark.parametrize("name", OUT)
def test_a_name_that_leads_out_is_refused_and_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="leads out"):
        relative(name)
    with pytest.raises(UserError) as caught:
        inside(tmp_path, name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "path"),
    [("a", "a"), ("a/b.txt", "a/b.txt"), ("./a/b", "a/b"), ("a/", "a"), (".hidden", ".hidden"), ("..a/b..", "..a/b..")],
)
def test_ordinary_names_are_kept(tmp_path: Path, name: str, path: str) -> None:
    assert str(relative(name)) == path
    assert inside(tmp_path, name) == tmp_path / path


@given(st.lists(st.sampled_from(["a", "..", ".", "", "/", "b\\", "\\", "c:"]), max_size=6).map("/".join))
def test_what_is_accepted_resolves_below_the_folder(name: str) -> None:
    root = Path("/somewhere/deep")
    try:
        path = inside(root, name)
    except UserError:
        return
    assert path.resolve().is_relative_to(root)
    assert path.resolve() != root


def test_no_link_stands_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "real" / "file").symlink_to(tmp_path / "outside" / "file")  # dangling
    for name in ("link", "link/x", "real/file"):
        with pytest.raises(UserError, match="symbolic link"):
            inside(root, name)
    assert inside(root, "real/other") == root / "real" / "other"
