"""What the cache keeps of a user's own code: data that it has made, and copies of it."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayexp.config import DataConfig, references
from rayexp.data import open_data, prune, uses
from rayexp.system.disk import TEMPORARY

IMAGES = """
import numpy as np
import helper
def D(split, n: int = 4, root=None):
    return [(np.full((8, 8), 10 * i, np.uint8), i % 2) for i in range(n if root is None else len(list(root.iterdir())))]
"""
TEXT = "def D(split, n: int = 3, root=None):\n    return [f'{split} a b'] * n\n"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The user's code."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, text in (("images", IMAGES), ("text", TEXT), ("helper", "x = 1"), ("other", "y = 1")):
        (folder / f"{name}.py").write_text(text)
    return folder


def opened(home: Path, kind: str = "images", **keys: Any) -> None:
    config = DataConfig.model_validate({"name": f"{kind}.py:D", "image_size": 8, **keys})
    open_data(config, (str(home),), text=kind == "text")
    gc.collect()  # nothing has it mapped any more


def made() -> list[prune.Entry]:
    return [entry for entry in prune.entries() if entry.what != "code of yours"]


@pytest.mark.parametrize("kind", ["images", "text"])
def test_what_is_packed_stays_as_long_as_its_code_makes_it(home: Path, kind: str) -> None:
    opened(home, kind)
    (entry,) = made()
    assert (entry.of, entry.state, entry.stale) == (f"{kind}.py:D", f"for {kind}.py:D of {home}", False)
    (home / "other.py").write_text("y = 2")  # which the dataset does not import
    assert [one.stale for one in made()] == [False]
    code = (home / f"{kind}.py").read_text()
    (home / f"{kind}.py").write_text(f"{code}# more")
    (entry,) = made()
    assert (entry.state, entry.stale) == (f"{kind}.py:D of {home} has changed since", True)
    opened(home, kind)
    assert sorted(one.stale for one in made()) == [False, True]
    (home / f"{kind}.py").write_text(code)  # back again
    assert sorted(one.stale for one in made()) == [False, True]
    assert [one.state for one in prune.prune() if one.what != "code of yours"] == [
        f"{kind}.py:D of {home} has changed since"
    ]
    assert [one.stale for one in made()] == [False]


def test_nothing_of_the_users_is_run_to_look(home: Path, tmp_path: Path) -> None:
    opened(home)
    (home / "images.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{IMAGES}")
    references._forget()
    assert [one.stale for one in made()] == [True]
    assert not (tmp_path / "ran").exists()


def test_each_place_from_which_it_is_read_keeps_it(home: Path, tmp_path: Path) -> None:
    """As a run's copy of the code does, after the code has been edited or is gone."""
    copy = Path(shutil.copytree(home, tmp_path / "run" / "code"))
    opened(home)
    opened(copy)
    (entry,) = made()
    shutil.rmtree(home)
    (entry,) = made()
    assert (entry.state, entry.stale) == (f"for images.py:D of {copy}", False)
    shutil.rmtree(copy)
    (entry,) = made()
    assert entry.stale
    assert entry.state.startswith("images.py:D: its code or data is no longer there (code: ")


def test_who_reads_it_again_is_noted_once(home: Path) -> None:
    opened(home)
    opened(home)
    (entry,) = made()
    assert [one["code"] for one in uses.recipes(entry.path)] == [[str(home)]]


def test_options_and_the_files_below_root_count(home: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name in "abcd":
        (root / name).touch()
    opened(home, root=root)
    opened(home, n=6)
    assert [one.stale for one in made()] == [False, False]
    (root / "e").touch()
    assert sorted((one.stale, one.state) for one in made()) == [
        (False, f"for images.py:D of {home}"),
        (True, f"images.py:D of {home} has changed since"),
    ]
    shutil.rmtree(root)
    assert f"{root} is gone" in [one.state for one in made()]


def test_data_of_an_older_rayexp_is_kept(home: Path) -> None:
    opened(home)
    (entry,) = made()
    (entry.path / uses.USED).unlink()
    assert [(one.state, one.stale) for one in made()] == [("kept: it is not known of what code", False)]


def test_an_installed_dataset_has_no_code_that_travels(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "installed_text.py").write_text(TEXT)
    monkeypatch.syspath_prepend(tmp_path / "site")
    open_data(DataConfig.model_validate({"name": "installed_text:D"}), None, text=True)
    installed = tmp_path / "site" / "installed_text.py"
    assert [(one.state, one.stale) for one in made()] == [(f"for installed_text:D of {installed}", False)]
    installed.write_text(f"{TEXT}# more")
    assert [one.stale for one in made()] == [True]


# ---------------------------------------------------------------------- copies of code


def copies() -> dict[str, tuple[str, bool]]:
    return {one.path.name: (one.state, one.stale) for one in prune.entries() if one.what == "code of yours"}


def test_a_copy_is_kept_while_a_process_imports_from_it(home: Path) -> None:
    root = references.use([str(home)])
    assert root is not None
    assert copies() == {root.name: (prune.IN_USE, False)}
    assert list(prune.prune()) == []
    (home / "helper.py").write_text("x = 2")
    other = references.use([str(home)])
    assert copies() == {root.name: ("copied again when it is needed", True), other.name: (prune.IN_USE, False)}  # type: ignore[union-attr]
    assert [one.path for one in prune.prune()] == [root]
    assert not root.exists()
    (home / "helper.py").write_text("x = 1")
    assert references.use([str(home)]) == root
    assert (root / "helper.py").read_text() == "x = 1"


def test_a_copy_is_kept_while_another_process_imports_from_it(home: Path) -> None:
    code = (
        "import sys; from rayexp.config import references\n"
        f"references.use([{str(home)!r}]); print('open', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    assert [state for state, _ in copies().values()] == [prune.IN_USE]
    process.communicate()
    assert [stale for _, stale in copies().values()] == [True]


def test_half_a_copy_is_left_to_its_writer(home: Path, cache: Path) -> None:
    from rayexp.system.locks import locked

    half = cache / "code" / f"{TEMPORARY}0123abcd-{'e' * 32}"
    half.mkdir(parents=True)
    (half / "net.py").touch()
    with locked(half.with_name(f"{'e' * 32}.lock")):
        assert copies() == {half.name: (prune.IN_USE, False)}
    assert copies() == {half.name: ("left by a process that was stopped", True)}
    assert len(list(prune.prune())) == 1
    assert copies() == {}
