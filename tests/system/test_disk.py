"""Files and directories under faults: at every call to the system what was there stays, or what is new is whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayexp.errors import UserError, WriteError
from rayexp.system import disk


class Faults:
    """Counts calls to the system, and lets one of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None, fail: Callable[[], Any]) -> None:
        self.at, self.fail = at, fail
        self.calls: list[str] = []
        for where, names in ((os, ("fsync", "pwrite", "ftruncate")), (Path, ("open", "replace", "mkdir"))):
            for name in names:
                monkeypatch.setattr(where, name, self.around(name, getattr(where, name)))

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*args: Any, **kwargs: Any) -> Any:
            self.hit(name)
            made = call(*args, **kwargs)
            if name == "open" and "w" in str(args[1:] + tuple(kwargs.values())):
                return Half(made, self)
            return made

        return faulty

    def hit(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) - 1 == self.at:
            self.fail()


class Half:
    """A file of which a write that fails leaves the first half."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self.file, self.faults = file, faults

    def __enter__(self) -> Half:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> None:
        try:
            self.faults.hit("write")
        except BaseException:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            raise
        self.file.write(data)


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


ACTIONS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None], str]] = {
    # (what stands there before, the write, how long its list of calls is at least)
    "file": (lambda p: disk.write_atomic(p / "x", "old"), lambda p: disk.write_atomic(p / "x", "new"), "x"),
    "new file": (lambda p: None, lambda p: disk.write_atomic(p / "a" / "x", b"new"), "x"),
    "directory": (
        lambda p: disk.write_directory(p / "d", {"one": b"old", "two": b"old"}),
        lambda p: disk.write_directory(p / "d", {"one": b"new", "three": b"new"}),
        "d",
    ),
    "new directory": (lambda p: None, lambda p: disk.write_directory(p / "d", {"one": b"new", "two": b"new"}), "d"),
    "line": (
        lambda p: (p / "x").write_bytes(b'{"a": 1}\n'),  # type: ignore[dict-item]
        lambda p: disk.append_line(p / "x", '{"a": 2}'),
        "x",
    ),
    "line after a torn one": (
        lambda p: (p / "x").write_bytes(b'{"a": 1}\n{"a":'),  # type: ignore[dict-item]
        lambda p: disk.append_line(p / "x", '{"a": 2}'),
        "x",
    ),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=repr)
def test_a_fault_at_any_call_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, error: BaseException
) -> None:
    before, write, name = ACTIONS[action]

    def fail() -> None:
        raise error

    (tmp_path / "whole").mkdir()
    before(tmp_path / "whole")
    old = whole(tree(tmp_path / "whole"))
    with monkeypatch.context() as patched:
        faults = Faults(patched, None, fail)
        write(tmp_path / "whole")
    new = tree(tmp_path / "whole")
    assert new != old
    assert {"file": 4, "directory": 8}.get(action.split()[-1], 2) <= len(faults.calls), faults.calls
    for at, call in enumerate(faults.calls):
        root = tmp_path / str(at)
        root.mkdir()
        before(root)
        with monkeypatch.context() as patched:
            Faults(patched, at, fail)
            with pytest.raises((WriteError, KeyboardInterrupt)) as caught:
                write(root)
        if isinstance(error, OSError):
            # `root / name`, and never a temporary name
            assert isinstance(caught.value, WriteError)
            assert Path(caught.value.filename).name == name, (call, caught.value)
        assert whole(tree(root)) in (old, new), (at, call)


def whole(files: dict[str, bytes]) -> dict[str, bytes]:
    """As a reader sees it: without a torn last line."""
    return {
        name: data if not data.startswith(b"{") or data.endswith(b"\n") else data[: data.rfind(b"\n") + 1]
        for name, data in files.items()
    }


@pytest.mark.parametrize("action", ["file", "new file", "directory", "new directory"])
def test_a_process_that_ends_at_any_call_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """Nothing runs after the call: neither `except` nor `finally`. `sweep` is what the next process does."""
    before, write, _ = ACTIONS[action]
    root = tmp_path / "0"
    for at in range(40):
        root = tmp_path / str(at)
        root.mkdir()
        before(root)
        old = tree(root)
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                Faults(monkeypatch, at, lambda: os._exit(3))
                write(root)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        for folder in (root, root / "a"):
            if folder.is_dir():
                disk.sweep(folder)
        found = tree(root)
        assert not list(root.rglob(".tmp-*"))
        if os.waitstatus_to_exitcode(status) == 0:
            break
        assert found in (old, {**old, **new(action)}, new(action)), at
    assert at > 3
    assert found == new(action)


def new(action: str) -> dict[str, bytes]:
    return {
        "file": {"x": b"new"},
        "new file": {"a/x": b"new"},
        "directory": {"d/one": b"new", "d/three": b"new"},
        "new directory": {"d/one": b"new", "d/two": b"new"},
    }[action]


def test_all_is_flushed_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut would lose: bytes and names that no fsync has followed."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def flushed(handle: int) -> None:
        events.append(("fsync", Path(f"/proc/self/fd/{handle}").readlink().name))
        fsync(handle)

    def renamed(path: Path, target: Path) -> Path:
        events.append(("rename", target.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    monkeypatch.setattr(disk, "_temporary", lambda path: path.with_name(f".tmp-{path.name}"))
    disk.write_atomic(tmp_path / "file", "x")
    assert events == [("fsync", ".tmp-file"), ("rename", "file"), ("fsync", tmp_path.name)]
    events.clear()
    disk.write_directory(tmp_path / "d", {"a": b"1", "b": b"2"})
    parts = [("fsync", "a"), ("fsync", "b"), ("fsync", ".tmp-d")]
    assert events == [*parts, ("rename", "d"), ("fsync", tmp_path.name)]
    events.clear()
    for _ in range(2):
        disk.append_line(tmp_path / "lines", "{}")
    assert events == [("fsync", "lines"), ("fsync", tmp_path.name), ("fsync", "lines")]


def test_a_line_that_cannot_be_added_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.append_line(tmp_path / "x", '{"a": 1}')
    before = (tmp_path / "x").read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError):
        disk.append_line(tmp_path / "x", '{"a": 2}')
    assert (tmp_path / "x").read_bytes() == before


def test_sweep_removes_what_is_half_and_nothing_else(tmp_path: Path) -> None:
    disk.write_directory(tmp_path / "epoch_001", {"a": b"1"})
    disk.write_atomic(tmp_path / "b", "2")
    kept = tree(tmp_path)
    (tmp_path / ".tmp-0123abcd-b").write_text("half")
    (tmp_path / ".tmp-0123abcd-epoch_001").mkdir()
    (tmp_path / ".tmp-0123abcd-epoch_001-old").mkdir()  # its successor is in place
    disk.sweep(tmp_path)
    assert tree(tmp_path) == kept
    (tmp_path / "epoch_001").rename(tmp_path / ".tmp-0123abcd-epoch_001-old")  # killed between the two renames
    (tmp_path / ".tmp-0123abcd-epoch_001").mkdir()
    disk.sweep(tmp_path)
    assert tree(tmp_path) == kept


# ---------------------------------------------------------------------- lines

ROWS = st.lists(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=5), max_size=3), max_size=6)


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, cut=st.integers(0, 10**6), tail=st.integers(1, 64))
def test_lines_come_back_whole_after_a_tear_anywhere(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], cut: int, tail: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(disk, "TAIL", tail)
        for row in rows:
            disk.append_line(path, json.dumps(row))
        data = path.read_bytes() if rows else b""
        assert [json.loads(line) for line in data.splitlines()] == rows
        torn = data[: cut % (len(data) + 1)]
        path.write_bytes(torn)
        disk.append_line(path, json.dumps({"new": 1}))
    found = [json.loads(line) for line in path.read_bytes().splitlines()]
    lines = data.splitlines(keepends=True)
    # A line that lacks nothing but its end is whole.
    kept = sum(len(b"".join(lines[: i + 1])) - 1 <= len(torn) for i in range(len(lines)))
    assert found == [*rows[:kept], {"new": 1}]
    assert path.read_bytes().endswith(b"\n")


def test_a_write_that_comes_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: pwrite(handle, data[:3], at))
    for i in range(3):
        disk.append_line(tmp_path / "x", json.dumps({"row": i}))
    assert (tmp_path / "x").read_text() == '{"row": 0}\n{"row": 1}\n{"row": 2}\n'


# ---------------------------------------------------------------------- directories of file systems


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_a_directory_that_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    fsync = os.fsync

    def refuse(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):  # noqa: PTH112
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    for write in (
        lambda: disk.write_atomic(tmp_path / "file", "x"),
        lambda: disk.write_directory(tmp_path / "directory", {"a": b"x"}),
        lambda: disk.append_line(tmp_path / "lines", "{}"),
    ):
        if number == errno.EIO:
            with pytest.raises(WriteError, match="Input/output error"):
                write()
        else:
            write()


def test_two_directories_made_at_once_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter(["aaaa", "aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(drawn))
    first, second = (disk.make_directory(tmp_path / "runs", "x") for _ in range(2))
    assert (first.name[-4:], second.name[-4:]) == ("aaaa", "bbbb")
    assert first.is_dir()
    monkeypatch.setattr(secrets, "token_hex", lambda _: "aaaa")
    monkeypatch.setattr(disk, "ATTEMPTS", 3)

    class Frozen(disk.datetime.datetime):  # type: ignore[name-defined,misc]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2026, 1, 2, tzinfo=tz)

    monkeypatch.setattr(disk.datetime, "datetime", Frozen)
    disk.make_directory(tmp_path / "runs", "x")
    with pytest.raises(UserError, match="no free name for x"):
        disk.make_directory(tmp_path / "runs", "x")


# ---------------------------------------------------------------------- what the user reads


@contextlib.contextmanager
def refusing(number: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number), ".tmp-01234567-x")

        patched.setattr(Path, "open", refuse)
        patched.setattr(Path, "mkdir", refuse)
        patched.setattr(os, "open", refuse)
        yield


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, r"cannot be written \(No space left on device\); free some space there, or choose another"),
        (errno.EDQUOT, r"cannot be written \(Disk quota exceeded\); free some space"),
        (errno.EACCES, r"cannot be written \(Permission denied\)$"),
        (errno.EROFS, r"cannot be written \(Read-only file system\)$"),
    ],
)
def test_an_error_names_what_the_user_knows(tmp_path: Path, number: int, expected: str) -> None:
    path = tmp_path / "page.html"
    for write in (
        lambda: disk.write_atomic(path, "x"),
        lambda: disk.write_directory(path, {}),
        lambda: disk.append_line(path, "x"),
    ):
        with refusing(number), pytest.raises(WriteError, match=f"^{path}: {expected}") as caught:
            write()
        assert caught.value.errno == number
        assert caught.value.wrong_path is (number in (errno.EACCES, errno.EROFS))
        again = pickle.loads(pickle.dumps(caught.value))  # it comes from workers on other hosts, too
        assert (str(again), again.errno) == (str(caught.value), number)
    with refusing(number), pytest.raises(UserError, match=f"^storage_path: {tmp_path / 'runs'}: {expected}"):
        disk.make_directory(tmp_path / "runs", "name")


def test_an_error_that_names_its_file_keeps_that_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="inner"), disk.naming(tmp_path / "outer"):
        disk.write_atomic(tmp_path / "file" / "inner", b"")


def test_folders_on_the_way_are_made(tmp_path: Path) -> None:
    made = disk.make_directory(tmp_path / "a" / "runs", "name")
    assert made.is_dir()
    assert made.parent == tmp_path / "a" / "runs"
    disk.append_line(tmp_path / "b" / "c" / "epochs.jsonl", "{}")
    assert (tmp_path / "b" / "c" / "epochs.jsonl").read_text() == "{}\n"


def test_a_directory_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    root = tmp_path / "run"
    for path in (root / "x", root / "a" / "x"):
        with pytest.raises(WriteError, match=rf"^{path}: cannot be written \(No such file or directory\)$"):
            disk.write_atomic(path, b"1", within=root)
    assert list(tmp_path.iterdir()) == []
    root.mkdir()
    for path in (root / "x", root / "a" / "b" / "x", tmp_path / "elsewhere" / "a" / "x"):
        disk.write_atomic(path, b"1", within=root)
        assert path.read_bytes() == b"1"


def test_a_storage_path_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(UserError, match=f"storage_path: {tmp_path / 'runs'} is not a folder"):
        disk.make_directory(tmp_path / "runs", "name")
