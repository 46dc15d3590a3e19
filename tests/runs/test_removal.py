"""How much room runs take, and that a run is removed as a whole or refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayexp.config import ExperimentConfig
from rayexp.errors import UserError
from rayexp.runs import removal
from rayexp.runs.run import Run
from rayexp.system.locks import only_driver

Typed = Callable[..., subprocess.CompletedProcess[str]]
Said = Callable[..., tuple[int, str, str]]


def made(storage: Path, name: str = "one", status: str = "done") -> Run:
    run = Run.create(ExperimentConfig(storage_path=storage, name=name), argv=[])
    run.update(status=status)
    for part, size in (("checkpoints/epoch_001/x", 1000), ("predictions/y", 200), ("tb/z", 30), ("logs/w", 4)):
        path = run.root / part
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * size)
    return run


def test_bytes_by_part(tmp_path: Path) -> None:
    run = made(tmp_path / "runs")
    (tmp_path / "large").write_bytes(b"x" * 10**6)
    (run.root / "link").symlink_to(tmp_path / "large")  # counts as the link that it is
    found = removal.disk_use(run.root)
    assert (found.checkpoints, found.predictions, found.tb, found.logs) == (1000, 200, 30, 4)
    rest = run.meta_path.stat().st_size + run.config_path.stat().st_size + len(str(tmp_path / "large"))
    assert found.total == 1234 + rest
    assert removal.size(tmp_path / "nowhere") == 0


def test_a_run_is_removed_and_no_other(tmp_path: Path) -> None:
    one, other = made(tmp_path), made(tmp_path, "other")
    outside = tmp_path / "kept"
    outside.mkdir()
    (outside / "file").write_text("x")
    (one.root / "leads_out").symlink_to(outside)
    removal.remove(one, tmp_path)
    assert [run.id for run in Run.all(tmp_path)] == [other.id]
    assert (outside / "file").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([other.id, "kept"])


def test_a_kill_leaves_no_run_and_the_next_removal_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = made(tmp_path), made(tmp_path, "other")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    removal.remove(one, tmp_path)
    monkeypatch.undo()
    assert [run.id for run in Run.all(tmp_path)] == [other.id]
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".tmp-01234567-somebody").mkdir()  # is being made
    removal.sweep_removed(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-01234567-somebody", other.id]


def test_a_run_that_trains_is_refused(tmp_path: Path) -> None:
    run = made(tmp_path, status="running")
    with pytest.raises(UserError, match=rf"^{run.id} is running; stop it first$"):  # this process is its driver
        removal.remove(run, tmp_path)
    run.update(host="elsewhere")
    (run.root / "driver.lock").touch()
    with pytest.raises(UserError, match=rf"^{run.id} is running on elsewhere; stop it first$"):
        removal.remove(run, tmp_path)
    run.update(status="stopped")
    with only_driver(run.root), pytest.raises(UserError, match="another process is running it"):
        removal.remove(run, tmp_path)
    assert run.epochs() == [1]
    removal.remove(run, tmp_path)
    assert not run.root.exists()


def test_a_copy_of_a_run_that_trains_elsewhere_may_go(tmp_path: Path) -> None:
    """As `collect` brings it home while the run goes on."""
    run = made(tmp_path, status="running")
    run.update(host="elsewhere")
    removal.remove(run, tmp_path)
    assert Run.all(tmp_path) == []


def test_a_run_that_died_or_is_damaged_may_go(tmp_path: Path) -> None:
    died, damaged = made(tmp_path, status="running"), made(tmp_path)
    with only_driver(died.root):
        pass
    assert died.status() == "died"
    damaged.meta_path.write_text("{")
    for run in (died, damaged):
        removal.remove(run, tmp_path)
    assert Run.all(tmp_path) == []


def test_what_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    storage, run = tmp_path / "runs", made(tmp_path / "other")
    storage.mkdir()
    with pytest.raises(UserError, match=rf"^{run.id} is not in {storage} but in {tmp_path}/other; --runs"):
        removal.remove(run, storage)
    (storage / run.id).symlink_to(run.root)
    (linked,) = Run.all(storage)
    with pytest.raises(UserError, match=r": a link; "):
        removal.remove(linked, storage)
    assert run.epochs() == [1]
    (tmp_path / "way").symlink_to(run.root.parent)
    removal.remove(Run(run.root), tmp_path / "way")  # a link on the way to the folder names the same folder
    assert not run.root.exists()


def test_of_two_removals_at_once_one_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path)
    refuse = removal.refuse_removal
    told: list[bool] = []

    def meanwhile(run: Run, storage: Path) -> None:
        refuse(run, storage)
        if not told:  # another process comes first
            told.append(True)
            assert removal.remove(run, storage)

    monkeypatch.setattr(removal, "refuse_removal", meanwhile)
    assert removal.remove(run, tmp_path) is False
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=rf"^{run.id}: is gone; another process has removed it$"), only_driver(run.root):
        pass


def test_a_page_does_not_bring_a_removed_run_back(
    makes: Any, typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayexp.pages import run_page

    run = makes.random_images(8, 3, 1)
    drawn = run_page.run_page

    def meanwhile(*given: Any) -> str:
        page = drawn(*given)
        removal.remove(run, run.root.parent)
        return page

    monkeypatch.setattr(run_page, "run_page", meanwhile)
    done = typed("report", run.id)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{run.id}/report.html: cannot be written (No such file or directory)" in done.stderr
    assert list(run.root.parent.iterdir()) == []


# ---------------------------------------------------------------------- the commands


@pytest.fixture
def said(typed: Typed) -> Said:
    """Exit code, stdout and stderr of a command."""

    def run(*words: str) -> tuple[int, str, str]:
        done = typed(*words)
        return done.returncode, done.stdout, done.stderr

    return run


def test_the_commands(tmp_path: Path, said: Said) -> None:
    storage = tmp_path / "runs"
    one, other = made(storage), made(storage, "other")
    (other.root / "checkpoints" / "more").write_bytes(b"x" * 10**6)
    other.update(parent="grid-1")
    code, out, err = said("runs", "--du", "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [row["run"] for row in rows] == [other.id, one.id]  # the largest first
    assert rows[0]["checkpoints"] == 1000 + 10**6
    code, out, _ = said("runs", "--du")
    assert code == 0
    assert out.splitlines()[-1].startswith("2 directories, 1.0 MB")

    code, out, err = said("runs", "rm", one.id, "other")
    assert code == 2
    assert "grid-1" in out
    assert "there is no terminal to ask on; --yes removes without asking" in err
    assert len(Run.all(storage)) == 2
    assert said("runs", "rm", one.id, "nothing", "--yes")[0] == 2
    assert len(Run.all(storage)) == 2  # none goes where one is wrong
    code, out, err = said("runs", "rm", "--yes", one.id, one.id)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("removed: 1 run, ")
    code, out, _ = said("runs", "rm", "-y", "--json", "other")
    assert [(row["run"], row["comparison"]) for row in json.loads(out)] == [(other.id, "grid-1")]
    assert Run.all(storage) == []


def test_nothing_goes_where_one_is_refused(tmp_path: Path, said: Said) -> None:
    storage = tmp_path / "runs"
    done, trains = made(storage), made(storage, "other", status="running")
    code, out, err = said("runs", "rm", "--yes", done.id, trains.id)
    assert (code, out) == (2, "")
    assert f"{trains.id} is running; stop it first" in err
    assert len(Run.all(storage)) == 2


@pytest.mark.parametrize(("answer", "left"), [("n\n", 1), ("y\n", 0)])
def test_it_asks_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Said, answer: str, left: int
) -> None:
    import io
    import sys

    run = made(tmp_path)
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    code, _, err = said("runs", "rm", run.id, "--runs", str(tmp_path))
    assert "Remove 1 run, " in err
    assert code == left
    assert len(Run.all(tmp_path)) == left
    assert [path.name for path in tmp_path.iterdir()] == [run.id] * left


def test_help_names_both(said: Said) -> None:
    assert "rayexp runs rm RUN..." in said("runs", "-h")[1]
    code, out, _ = said("runs", "rm", "-h")
    assert code == 0
    assert out.startswith("Usage: rayexp runs rm [OPTIONS] ")
    assert "RUN" in out.splitlines()[0]
    code, _, err = said("runs", "rm")
    assert code == 2
    assert err.endswith("(see rayexp runs rm -h)\n")
