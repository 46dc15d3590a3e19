"""A folder of runs: listing, names, references; and what is damaged is named and keeps nothing else back."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rayexp.cli import app
from rayexp.config import ExperimentConfig
from rayexp.errors import UserError, WriteError
from rayexp.grid.comparison import Comparison
from rayexp.runs.records import EpochRecord, RunRef, reference
from rayexp.runs.run import Run, resolve
from rayexp.system.disk import find_directory, matching, write_json

Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run directory with a line for each accuracy; its losses fall from 2.0 by 0.1."""

    def one(name: str, *accuracies: float, losses: tuple[float, ...] = ()) -> Run:
        run = Run.create(ExperimentConfig(name=name, storage_path=tmp_path / "runs", epochs=9), argv=["rayexp"])
        lines = []
        for epoch, accuracy in enumerate(accuracies, 1):
            loss = losses[epoch - 1] if losses else 2.0 - epoch / 10
            record = EpochRecord(
                epoch, epoch * 4, loss, loss, {"acc1": accuracy}, 0.1, 9.0, {"total": 1.0}, f"{epoch:064d}"
            )
            lines.append(json.dumps(record.to_json()) + "\n")
        run.epochs_path.write_text("".join(lines))
        run.update(status="done")
        return run

    return one


@pytest.fixture
def command() -> Callable[..., Any]:
    """`rayexp ARGS`: its result; an error that is not the user's is raised."""

    def run(*args: str) -> Any:
        return CliRunner().invoke(app, list(args), catch_exceptions=False)

    return run


# ---------------------------------------------------------------------- references


@pytest.mark.parametrize("write", ["write_atomic", "write_json", "keep_code"])
def test_a_run_that_cannot_be_written_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    def full(path: Path, *rest: object) -> None:
        raise WriteError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(f"rayexp.runs.run.{write}", full)
    with pytest.raises(WriteError):
        Run.create(ExperimentConfig(storage_path=tmp_path), argv=[])
    assert list(tmp_path.iterdir()) == []


def test_best_is_the_best_and_last_the_last(make: Make, tmp_path: Path) -> None:
    run = make("txt", 30.0, 50.0, 40.0)
    for text, epoch in ((f"{run.id}@best", 2), (f"{run.id}@last", 3), (run.id, 3), (f"{run.id}@1", 1)):
        assert resolve(text, tmp_path / "runs") == (Run(run.root.resolve()), epoch)
    assert run.best() == 2


def test_best_passes_over_what_is_not_finite(make: Make) -> None:
    assert make("a", 30.0, 50.0, 40.0, losses=(1.0, math.nan, 1.0)).best() == 3
    assert make("b", math.nan, 50.0, 60.0, losses=(1.0, 1.0, math.inf)).best() == 2


def test_a_run_that_was_never_finite_has_no_best_but_a_last(make: Make, tmp_path: Path) -> None:
    run = make("lost", 5.0, 5.0, losses=(math.nan, math.inf))
    with pytest.raises(UserError, match=r"lost-.*@best: no finite validation loss in epochs 1-2"):
        resolve(f"{run.id}@best", tmp_path / "runs")
    assert resolve(f"{run.id}@last", tmp_path / "runs")[1] == 2
    with pytest.raises(UserError, match="no epoch has finished"):
        make("fresh").best()


def test_an_epoch_that_is_not_there_is_refused_with_those_that_are(make: Make, tmp_path: Path) -> None:
    run = make("txt", 1.0, 2.0, 3.0)
    run.checkpoint(7).mkdir(parents=True)  # a checkpoint whose line was lost counts
    for wrong in (4, 8):
        with pytest.raises(UserError, match=rf"@{wrong}: no such epoch; there are 1-3, 7$"):
            run.epoch(wrong)
    assert run.epoch("last") == 7
    with pytest.raises(UserError, match="no epoch has finished"):
        make("fresh").epoch(1)


# ---------------------------------------------------------------------- names


def test_a_path_may_hold_the_sign_before_an_epoch(make: Make, tmp_path: Path) -> None:
    made = make("one", 20.0, 40.0)
    run = Run(Path(shutil.copytree(made.root, tmp_path / "me@lab" / made.id)))
    for storage in (tmp_path, tmp_path / "me@lab"):
        assert resolve(str(run.root), storage) == (run, 2)
        assert resolve(f"{run.root}@1", storage) == (run, 1)
        assert Run.open(str(run.root), storage) == Run.open(run.root, storage) == Run.open(f"{run.root}@1") == run
    assert (reference(f"{run.root}@1").run, reference(str(run.root)).run) == (str(run.root),) * 2
    assert str(reference("x" * 300)) == "x" * 300 + "@last"


def test_an_exact_name_wins_over_parts_of_others(make: Make, tmp_path: Path) -> None:
    txt, oov = make("txt", 1.0), make("txt_oov", 1.0)
    storage = tmp_path / "runs"
    assert Run.find("txt", storage).id == txt.id
    assert Run.find("txt_oov", storage).id == Run.find("oov", storage).id == oov.id
    assert Run.find(txt.id, storage).id == Run.find(str(txt.root), storage).id == txt.id
    with pytest.raises(UserError, match="names several runs"):
        Run.find("xt", storage)
    again = make("txt", 1.0)
    with pytest.raises(UserError, match="names several runs") as caught:
        Run.find("txt", storage)
    assert oov.id not in str(caught.value)
    assert set(str(caught.value).partition(": ")[2].split(", ")) == {txt.id, again.id}


@pytest.mark.parametrize("words", [("runs",), ("report",), ("train", "--resume"), ("audit",), ("runs", "rm")])
def test_a_run_is_named_without_an_epoch(make: Make, typed: Callable[..., Any], words: tuple[str, ...]) -> None:
    make("txt", 1.0)
    done = typed(*words, "txt@best")
    assert done.returncode == 2
    assert "'txt@best' in runs: a run is named without an epoch, txt; give " in done.stderr


@pytest.mark.parametrize(
    ("last", "said"), [("a", "one, or @newest for the last of them: 2 older ones, "), ("b", "one: 1 older one, ")]
)
def test_of_many_runs_of_one_name_the_newest_are_listed(tmp_path: Path, last: str, said: str) -> None:
    names = [f"2026010{i}T000000Z-a-0f0f" for i in range(1, 10)] + [f"20260110T000000Z-{last}-0f0f"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").touch()
    own = [name for name in names if "-a-" in name]
    with pytest.raises(UserError) as caught:
        find_directory("a", tmp_path, "run.json", "run")
    assert str(caught.value).endswith(f"{said}{', '.join(own[-8:])}")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a", ["20260101T000000Z-a-0f0f"]),
        ("a-b", ["20260101T000000Z-a-b-0f0f"]),
        ("20260101T000000Z-a-0f0f", ["20260101T000000Z-a-0f0f"]),
        ("mine", ["mine"]),
        ("b-0f0f", ["20260101T000000Z-a-b-0f0f"]),
        ("0f0f", ["20260101T000000Z-a-0f0f", "20260101T000000Z-a-b-0f0f"]),
        ("", []),
        ("c", []),
        ("@newest", ["20260101T000000Z-a-b-0f0f"]),
    ],
)
def test_what_a_name_means(name: str, found: list[str]) -> None:
    assert matching(name, ["20260101T000000Z-a-0f0f", "20260101T000000Z-a-b-0f0f", "mine"]) == found


def test_the_newest_run_has_a_name(make: Make, tmp_path: Path, command: Callable[..., Any]) -> None:
    storage = tmp_path / "runs"
    with pytest.raises(UserError, match=r"no run '@newest' in .*runs"):
        Run.find("@newest", storage)
    made = make("z", 30.0, 50.0, 40.0)
    old = made.root.rename(storage / "20260101T000000Z-z-0000")
    made = make("a", 50.0, 40.0)
    old.rename(storage / "zzz")  # a copy of the user's with a name of its own is not the newest
    assert Run.find("@newest", storage).id == made.id
    assert resolve("@newest", storage) == resolve("@newest@last", storage) == (made, 2)
    assert resolve("@newest@best", storage) == resolve("@newest@1", storage) == (made, 1)
    shown = command("runs", "@newest", "--runs", str(storage)).stdout
    assert f"path      {made.root}" in shown
    for words in (["@newest@1", "@newest"], ["@newest@1", "@2"]):
        answer = CliRunner().invoke(app, ["diff", *words, "--runs", str(storage)])
        assert f"{made.id}" in f"{answer.exception} {answer.output}"  # of this run: it has no predictions


@pytest.mark.parametrize("text", ["@best", "@last", "@7", "@newer", "run@newest"])
def test_a_reference_to_no_run_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a checkpoint reference; write RUN@7, RUN@best or RUN@last"):
        RunRef.parse(text)


def test_a_name_that_is_none_is_one_line(make: Make, tmp_path: Path) -> None:
    make("txt", 1.0)
    for name in ("nothing", "x" * 5000, "", "a\0b"):
        with pytest.raises(UserError, match="no run"):
            Run.find(name, tmp_path / "runs")


# ---------------------------------------------------------------------- one damaged run among others


def loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path)


DAMAGE: dict[str, Callable[[Run], Any]] = {
    "a byte that is no UTF-8": lambda run: run.epochs_path.write_bytes(b"\xff" + run.epochs_path.read_bytes()[1:]),
    "such a byte in run.json": lambda run: run.meta_path.write_bytes(run.meta_path.read_bytes() + b"\xff"),
    "no status": lambda run: run.meta_path.write_text('{"layout": 1}'),
    "a status that is no text": lambda run: run.meta_path.write_text('{"layout": 1, "status": null}'),
    "a list": lambda run: run.meta_path.write_text("[]"),
    "a number": lambda run: run.meta_path.write_text("1"),
    "nothing": lambda run: run.meta_path.write_text(""),
    "another layout": lambda run: run.meta_path.write_text('{"layout": "x", "status": "done"}'),
    "a deep nesting": lambda run: run.meta_path.write_text("[" * 100_000),
    "a deep line": lambda run: run.epochs_path.write_text("[" * 100_000 + "\n"),
    "run.json is a folder": lambda run: (run.meta_path.unlink(), run.meta_path.mkdir()),
    "run.json is a pipe": lambda run: (run.meta_path.unlink(), os.mkfifo(run.meta_path)),
    "epochs.jsonl is a pipe": lambda run: (run.epochs_path.unlink(), os.mkfifo(run.epochs_path)),
    "run.json is a loop": lambda run: loop(run.meta_path),
    "config.yaml is a loop": lambda run: loop(run.config_path),
    "config.yaml is gone": lambda run: run.config_path.unlink(),
    "epochs.jsonl is a loop": lambda run: loop(run.epochs_path),
    "epochs.jsonl is a folder": lambda run: (run.epochs_path.unlink(), run.epochs_path.mkdir()),
    "a line of another shape": lambda run: run.epochs_path.write_text('{"epoch": "x"}\n'),
    "a line that is a list": lambda run: run.epochs_path.write_text("[1]\n"),
    "the directory is a loop": lambda run: (run.root.rename(run.root.with_name("was")), loop(run.root)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_run_is_named_and_all_others_are_listed(
    make: Make, tmp_path: Path, command: Callable[..., Any], kind: str
) -> None:
    good, bad, other = make("good", 50.0), make("bad", 50.0), make("other", 60.0)
    DAMAGE[kind](bad)
    storage = str(tmp_path / "runs")
    listed = {row["run"]: row for row in json.loads(command("runs", "--runs", storage, "--json").stdout)}
    assert listed[bad.id]["status"] == "damaged"
    assert listed[bad.id]["metric"]
    assert listed[good.id]["status"] == listed[other.id]["status"] == "done"
    assert (listed[good.id]["best"], listed[good.id]["metric"]) == (1, "acc1 50.00")
    assert bad.id in command("runs", "--runs", storage).stdout
    # Neither is in the way of the others' names, and its own is answered with one line.
    assert Run.find("good", tmp_path / "runs").id == good.id
    assert {good.id, other.id} <= {run.id for run in Run.readable(tmp_path / "runs")}
    with pytest.raises(UserError, match="bad"):
        resolve(f"{bad.id}@best" if bad.root.exists() else "bad", tmp_path / "runs")[0].config()


def test_the_line_of_the_damage_is_named(make: Make) -> None:
    run = make("bad", 1.0, 2.0, 3.0)
    lines = run.epochs_path.read_bytes().splitlines(keepends=True)
    run.epochs_path.write_bytes(lines[0] + b"\xff" + lines[1][1:] + lines[2])
    with pytest.raises(UserError, match=r"epochs\.jsonl: line 2 is damaged"):
        run.records()
    run.epochs_path.write_bytes(b"".join(lines[:2]) + lines[2][:40])  # a writer was killed in the middle of the line
    assert [r.epoch for r in run.records()] == [1, 2]
    run.epochs_path.write_bytes(b"".join(lines[:2]) + lines[2][:40] + b"\n")
    with pytest.raises(UserError, match="line 3"):
        run.records()


def test_check_names_what_is_damaged_and_exits_with_1(make: Make, tmp_path: Path, command: Callable[..., Any]) -> None:
    good, bad, gone = make("good", 50.0), make("bad", 50.0), make("gone", 50.0)
    for run in (good, bad, gone):  # lines only, as the plain script of a comparison leaves them
        run.epochs_path.write_text(run.epochs_path.read_text().replace(f"{1:064d}", ""))
        run.update(status="stopped")
    bad.config_path.write_text(bad.config_path.read_text() + "#")
    gone.meta_path.write_text("{}")
    storage = ["--runs", str(tmp_path / "runs"), "--check"]
    fine = command("runs", "good", *storage)
    assert fine.exit_code == 0
    assert f"{good.id}: ok (1 of 2 by their hashes, 1 not covered by one)" in fine.stdout
    for name, what in (("bad", "config.yaml"), ("gone", "run.json")):
        found = command("runs", name, *storage, "--json")
        assert found.exit_code == 1
        (told,) = json.loads(found.stdout)
        assert told["ok"] is False
        assert [part["what"] for part in told["checked"] if part["state"] == "damaged"] == [what]
        shown = command("runs", name, *storage)
        assert shown.exit_code == 1
        assert f": damaged: {what}: " in shown.stdout
    everything = command("runs", *storage, "--json")
    assert everything.exit_code == 1
    assert {told["run"]: told["ok"] for told in json.loads(everything.stdout)} == {
        good.id: True,
        bad.id: False,
        gone.id: False,
    }
    with pytest.raises(UserError, match="no run"):
        command("runs", "nothing", *storage)
    nothing = command("runs", "--runs", str(tmp_path / "nothing"), "--check")
    assert (nothing.exit_code, nothing.stdout) == (0, f"no runs in {tmp_path / 'nothing'}\n")
    assert command("runs", "--runs", str(tmp_path / "nothing"), "--check", "--json").stdout == "[]\n"


def test_a_damaged_comparison_is_not_called_missing(tmp_path: Path, command: Callable[..., Any]) -> None:
    (tmp_path / "20260101T000000Z-grid-0000").mkdir()
    (tmp_path / "20260101T000000Z-grid-0000" / "compare.json").write_text("{}")
    with pytest.raises(UserError, match=r"grid-0000/compare\.json: not a comparison's description"):
        command("report", "grid", "--runs", str(tmp_path))
    with pytest.raises(UserError, match="no run and no comparison 'other'"):
        command("report", "other", "--runs", str(tmp_path))


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_run_that_may_not_be_read_is_named(make: Make, tmp_path: Path, command: Callable[..., Any]) -> None:
    make("good", 50.0)
    bad = make("bad", 50.0)
    bad.root.chmod(0)
    try:
        rows = json.loads(command("runs", "--runs", str(tmp_path / "runs"), "--json").stdout)
    finally:
        bad.root.chmod(0o755)
    assert [row["status"] for row in rows] == ["done", "damaged"]


def test_a_run_that_was_never_finite_is_listed_as_such(make: Make, tmp_path: Path, command: Callable[..., Any]) -> None:
    run = make("lost", math.nan, 5.0, losses=(math.nan, math.nan))
    storage = str(tmp_path / "runs")
    (row,) = json.loads(command("runs", "--runs", storage, "--json").stdout)
    assert (row["status"], row["best"], row["metric"]) == ("done", None, "not finite")
    shown = command("runs", run.id, "--runs", storage).stdout
    assert "not finite" in shown
    assert "best" not in shown
    epochs = json.loads(command("runs", run.id, "--runs", storage, "--json").stdout)["epochs"]
    assert [(e["val_loss"], e["acc1"]) for e in epochs] == [(None, None), (None, 5.0)]


# ---------------------------------------------------------------------- comparisons


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b'{"layout": 1}', b'{"layout": 1, "status": "done", "plan": {}, "rows": []}', b"[" * 100_000],
)
def test_a_damaged_comparison_is_named_and_in_nobodys_way(tmp_path: Path, content: bytes) -> None:
    fields = {"layout": 1, "status": "done", "plan": [], "rows": []}
    for name in ("20260101T000000Z-grid-0000", "20260102T000000Z-other-0000"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "compare.json", fields)
    (tmp_path / "20260101T000000Z-grid-0000" / "compare.json").write_bytes(content)
    assert Comparison.find("other", tmp_path).rows() == []
    with pytest.raises(UserError, match=r"grid-0000/compare\.json"):
        Comparison.find("grid", tmp_path)


def test_damaged_rows_of_a_comparison_are_named(tmp_path: Path) -> None:
    write_json(tmp_path / "compare.json", {"layout": 1, "status": "done", "plan": [{"id": "x"}], "rows": [3]})
    made = Comparison(tmp_path)
    for read in (made.cells, made.rows):
        with pytest.raises(UserError, match=r"compare\.json: (plan|rows) is damaged"):
            read()
