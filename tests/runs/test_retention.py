"""`checkpoint.keep`: which checkpoints go, that none goes which is needed, and that nobody calls them damaged."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayexp.cli import main
from rayexp.cluster.collect import collect
from rayexp.cluster.sources import find
from rayexp.config import ExperimentConfig, parse
from rayexp.engine.checkpoint import TENSORS
from rayexp.errors import UserError
from rayexp.runs.integrity import changes, check_unchanged, examine, faults
from rayexp.runs.retention import checkpoint_of, not_kept, prune
from rayexp.runs.run import Run, broken, epoch_name
from rayexp.runs.writer import RunWriter
from rayexp.system import disk


def made(storage: Path, keep: Any, epochs: int = 20) -> Run:
    tree = {"storage_path": str(storage), "epochs": epochs, "checkpoint": {"keep": keep}}
    return Run.create(parse(tree, ExperimentConfig, "test"), argv=[])


def trained(epochs: Any, storage: Path, keep: Any, losses: list[float]) -> Run:
    run = made(storage, keep)
    writer = epochs.begun(run)
    for epoch, loss in enumerate(losses, 1):
        epochs.add(writer, epoch, loss)
    writer.end("stopped")
    return run


# ---------------------------------------------------------------------- what is kept


@pytest.mark.parametrize(
    ("keep", "kept"),
    [("all", [1, 2, 3, 4, 5]), ("best", [2, 5]), (1, [2, 5]), (2, [2, 4, 5]), (4, [2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])],
)
def test_what_is_kept(epochs: Any, tmp_path: Path, keep: Any, kept: list[int]) -> None:
    run = trained(epochs, tmp_path, keep, [3.0, 1.0, 2.0, 1.5, 1.0])  # of equals the earlier one is the best
    assert run.epochs() == kept
    assert not_kept(run) == {epoch: str(keep) for epoch in range(1, 6) if epoch not in kept}
    assert [r.weights_sha for r in run.records()] == [f"{epoch:064d}" for epoch in range(1, 6)]
    assert [len(run.predictions(epoch)) for epoch in range(1, 6)] == [3] * 5


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0, 9), min_size=1, max_size=6), st.sampled_from(["best", 1, 2]))
def test_after_each_epoch_the_best_and_the_newest_are_there(
    epochs: Any, tmp_path_factory: pytest.TempPathFactory, losses: list[float], keep: Any
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    run = made(folder, keep)
    writer = RunWriter(run)
    for epoch, loss in enumerate(losses, 1):
        epochs.add(writer, epoch, loss)
        assert {run.best(), epoch} <= set(run.epochs())
        assert len(run.epochs()) <= 1 + (1 if keep == "best" else keep)
        assert all(broken(run.checkpoint(e)) is None for e in run.epochs())
    shutil.rmtree(folder)


def test_a_loss_that_is_not_finite_is_never_the_best(epochs: Any, tmp_path: Path) -> None:
    assert trained(epochs, tmp_path, "best", [2.0, math.nan, math.nan, math.nan]).epochs() == [1, 4]


def test_where_no_epoch_is_the_best_all_are_kept(epochs: Any, tmp_path: Path) -> None:
    assert trained(epochs, tmp_path, "best", [math.nan] * 3).epochs() == [1, 2, 3]


def test_where_it_cannot_be_read_what_to_keep_all_are_kept(epochs: Any, tmp_path: Path) -> None:
    run = made(tmp_path, "best")
    writer = epochs.begun(run)
    run.config_path.write_text(run.config_path.read_text() + "# changed\n")
    for epoch in (1, 2, 3):
        epochs.add(writer, epoch, float(epoch))
    assert run.epochs() == [1, 2, 3]


def test_a_resume_goes_on_from_what_is_kept(epochs: Any, tmp_path: Path) -> None:
    run = trained(epochs, tmp_path, "best", [1.0, 3.0, 2.0])
    assert run.epochs() == [1, 3]
    found, notes = RunWriter(run).resume()
    assert notes == []
    assert found is not None
    assert json.loads(found["state.json"])["epoch"] == 3
    assert [r.epoch for r in run.records()] == [1, 2, 3]


def test_an_epoch_that_is_trained_again_is_kept_again(epochs: Any, tmp_path: Path) -> None:
    run = trained(epochs, tmp_path, "best", [1.0, 3.0, 2.0, 2.5])
    assert not_kept(run) == {2: "best", 3: "best"}
    (run.checkpoint(4) / TENSORS).write_bytes(b"damaged")
    writer = epochs.begun(run)  # from epoch 1, which is whole; that of epoch 4 stays until it is written again
    epochs.add(writer, 2, 3.0)
    assert run.epochs() == [1, 2, 4]
    assert not_kept(run) == {3: "best"}
    epochs.add(writer, 3, 2.0)
    epochs.add(writer, 4, 2.5)
    writer.end("stopped")
    assert run.epochs() == [1, 4]
    assert faults(run) == []


def test_a_resume_may_change_what_is_kept(epochs: Any, tmp_path: Path) -> None:
    run = trained(epochs, tmp_path, "all", [3.0, 1.0, 2.0])
    config = run.config()
    best = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"keep": "best"})})
    check_unchanged(run, best)
    assert changes(config, best, ()) == "checkpoint.keep all -> best"
    run.write("config.yaml", best.to_yaml())
    epochs.add(epochs.begun(run), 4, 2.0)
    assert run.epochs() == [2, 4]


@pytest.mark.parametrize("value", ["some", 0, -1, True, 1.5, "3.5", None, ["best"]])
def test_anything_else_is_refused_by_name(value: Any) -> None:
    with pytest.raises(UserError, match=r"^test: checkpoint\.keep: ") as refused:
        parse({"checkpoint": {"keep": value}}, ExperimentConfig, "test")
    assert "\n" not in str(refused.value)


# ---------------------------------------------------------------------- crashes


class Killed(BaseException):
    """As SIGKILL: nothing is done after it."""


def test_a_kill_at_any_point_leaves_each_checkpoint_whole_or_gone(
    epochs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of removing a directory's files."""

    def attempt(run: Run, at: int | None) -> int:
        writer = epochs.begun(run)
        for epoch, loss in enumerate([2.0, 1.0, 3.0], 1):
            epochs.add(writer, epoch, loss)
        writer.snapshot(35, epochs.files(35, 3))
        assert run.epochs() == [2, 3]
        calls = 0

        def killing(call: Any) -> Any:
            def called(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if at is not None and calls > at:
                    raise Killed
                return call(*args, **kwargs)

            return called

        # What follows is all that touches the disk from here on; a killed process does none of it any more.
        with monkeypatch.context() as patched:
            for where, name in ((os, "fsync"), (Path, "replace"), (Path, "mkdir"), (os, "pwrite")):
                patched.setattr(where, name, killing(getattr(where, name)))
            patched.setattr(os, "unlink", killing(os.unlink))  # of shutil.rmtree
            patched.setattr(os, "rmdir", killing(os.rmdir))
            if at is None:
                epochs.add(writer, 4, 2.0)
            else:
                with pytest.raises(Killed):
                    epochs.add(writer, 4, 2.0)
        return calls

    calls = attempt(made(tmp_path, "best"), None)
    assert calls > 25
    for at in range(calls):
        run = made(tmp_path, "best")
        attempt(run, at)
        assert {2} < set(run.epochs()) <= {2, 3, 4}, at
        for path, _ in run.resumable():
            assert broken(path) is None, (at, path.name)
        assert faults(run) == [], at
        found, notes = RunWriter(run).resume()
        assert notes == [], at
        assert found is not None
        assert json.loads(found["state.json"])["step"] in (35, 40), at
        assert not list(run.root.rglob(".tmp-*"))
        writer = epochs.begun(run)
        done = run.records()[-1].epoch
        for epoch in range(done + 1, 6):
            epochs.add(writer, epoch, 2.0)
        assert run.epochs() == [2, 5], at
        shutil.rmtree(run.root)


def test_what_cannot_be_removed_is_whole_and_named(
    epochs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(epochs, tmp_path, "all", [1.0, 2.0, 3.0])
    config = run.config()
    best = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"keep": "best"})})
    run.write("config.yaml", best.to_yaml())

    def refuse(*_: Any) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: refuse() if self.name == epoch_name(2) else replace(self, to))
    with pytest.raises(OSError, match=rf"^{run.checkpoint(2)}: cannot be written"):
        prune(run, 3)
    assert run.epochs() == [1, 2, 3]
    assert broken(run.checkpoint(2)) is None
    assert not_kept(run) == {}


def test_removing_a_directory_is_renaming_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed
    disk.remove_directory(tmp_path / "x")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(disk.TEMPORARY)
    monkeypatch.undo()
    disk.sweep(tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- what is said


def test_a_removed_checkpoint_is_said_to_be_that(epochs: Any, tmp_path: Path) -> None:
    run = trained(epochs, tmp_path, "best", [3.0, 2.0, 1.0, 1.5])
    found = {finding.what: finding for finding in examine(run)}
    assert found["checkpoints/epoch_002"].state == "not kept"
    assert str(found["checkpoints/epoch_002"]) == "checkpoints/epoch_002: checkpoint.keep: best"
    assert {f.state for f in found.values() if "epoch_002" not in f.what and "epoch_001" not in f.what} <= {
        "ok", "not covered"
    }  # fmt: skip
    assert faults(run) == []
    assert run.epoch(2) == 2  # its predictions and its record are there
    with pytest.raises(UserError) as refused:
        checkpoint_of(run, 2)
    assert str(refused.value) == (
        f"{run.id}@2: the checkpoint of epoch 2 was not kept (checkpoint.keep: best); kept: 3-4"
    )
    assert checkpoint_of(run, 3) == run.checkpoint(3)


def test_a_checkpoint_that_was_lost_is_not_said_to_be_removed(epochs: Any, tmp_path: Path) -> None:
    run = trained(epochs, tmp_path, "all", [3.0, 2.0])
    shutil.rmtree(run.checkpoint(1))
    with pytest.raises(UserError, match=r"@1: has no checkpoint in \S+/checkpoints; there are: 2$"):
        checkpoint_of(run, 1)
    shutil.rmtree(run.checkpoint(2))
    with pytest.raises(UserError, match=r"; none is there$"):
        checkpoint_of(run, 2)


# ---------------------------------------------------------------------- what others make of such a run


def test_a_pruned_run_comes_home_as_it_is(epochs: Any, tmp_path: Path) -> None:
    run = trained(epochs, tmp_path / "there", "best", [3.0, 1.0, 2.0])
    source, name = find(str(run.root), None)
    got = collect(source, name, tmp_path / "home")
    assert got.epochs == got.run.epochs() == [2, 3]
    assert not_kept(got.run) == {1: "best"}
    assert faults(got.run) == []
    assert [record.epoch for record in got.run.records()] == [1, 2, 3]
    assert len(got.run.predictions(1)) == 3
    with pytest.raises(UserError, match=r"--epochs"):
        collect(source, name, tmp_path / "again", "1")
    assert not (tmp_path / "again").exists()


def test_the_commands_show_what_a_pruned_run_has(
    epochs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(epochs, tmp_path, "best", [3.0, 1.0, 2.0])

    def said(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["rayexp", *words, "--runs", str(tmp_path)])
        with contextlib.suppress(SystemExit):
            main()
        return capsys.readouterr().out

    shown = " ".join(said("runs", run.id).split())
    assert "checkpoints of 2-3 (checkpoint.keep: best)" in shown
    monkeypatch.setattr(Run, "kind", lambda run: "images")  # the page without a sample of the text
    said("report", run.id)
    page = (run.root / "report.html").read_text()
    assert all(f"{loss:.4g}" in page for loss in (3.0, 1.0, 2.0))


def test_a_pruned_run_as_the_library_has_it(epochs: Any, tmp_path: Path) -> None:
    run = trained(epochs, tmp_path, "best", [3.0, 1.0, 2.0])
    assert Run.open(run.id, tmp_path) == Run.open(run.root) == Run.open(f"{run.root}@1") == run
    assert Run.open(run.id[-4:], tmp_path) == run
    assert (run.at("best"), run.at("last"), run.at(1)) == tuple(f"{run.root}@{epoch}" for epoch in (2, 3, 1))
    with pytest.raises(UserError, match=r"@4"):
        run.at(4)
    with pytest.raises(UserError, match=r"^no run "):
        Run.open("none", tmp_path)
    frame = run.to_pandas()
    assert list(frame.index) == run.table()["epoch"] == [1, 2, 3]
    assert list(frame["val_loss"]) == run.table()["val_loss"] == [3.0, 1.0, 2.0]
    assert list(frame["seconds.total"]) == [1.0] * 3
    assert made(tmp_path, "all").to_pandas().empty
