"""The screen shows every epoch of epochs.jsonl once, while the file grows, is torn, and is mended."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from rayexp.config import ExperimentConfig
from rayexp.launch import screen as screens
from rayexp.launch.screen import Screen, clock, epoch_line
from rayexp.runs.records import EpochRecord
from rayexp.runs.residency import Residency
from rayexp.runs.run import Run
from rayexp.system.disk import append_line, write_atomic


def record(epoch: int) -> EpochRecord:
    return EpochRecord(epoch, epoch, 1.0, 1.0, {"ppl": 2.7}, 0.1, 5.0, {"total": 1.0}, "0" * 64)


def line(epoch: int) -> str:
    return json.dumps(record(epoch).to_json())


def test_every_epoch_is_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(ExperimentConfig(storage_path=tmp_path), argv=[])
    append_line(run.epochs_path, line(1))  # before this driver
    text = io.StringIO()
    screen = Screen(run, Console(file=text, width=300))
    monkeypatch.setattr(Run, "records", lambda _: pytest.fail("all epochs were read for one"))

    def shown() -> list[str]:
        screen._epochs()
        return text.getvalue().splitlines()

    assert shown() == []
    append_line(run.epochs_path, line(2))
    assert shown() == shown() == [epoch_line(record(2))]
    with run.epochs_path.open("a") as file:
        file.write(line(3)[:50])
        file.flush()
        assert len(shown()) == 1
        file.write(line(3)[50:] + "\n")
    assert shown()[1:] == [epoch_line(record(3))]
    # A resume writes a new file: first with the same epochs, then with fewer and another line.
    write_atomic(run.epochs_path, "".join(f"{line(epoch)}\n" for epoch in (1, 2, 3)))
    assert len(shown()) == 2
    write_atomic(run.epochs_path, f"{line(1)}\n")
    assert len(shown()) == 2
    append_line(run.epochs_path, line(2))
    assert shown()[2:] == [epoch_line(record(2))]


def test_what_stood_there_before_is_not_shown_when_its_end_is_torn(tmp_path: Path) -> None:
    run = Run.create(ExperimentConfig(storage_path=tmp_path), argv=[])
    run.epochs_path.write_text(f"{line(1)}\n{line(2)[:30]}")
    text = io.StringIO()
    screen = Screen(run, Console(file=text, width=300))
    screen._epochs()
    append_line(run.epochs_path, line(2))
    screen._epochs()
    assert text.getvalue().splitlines() == [epoch_line(record(2))]


LONGEST = EpochRecord(
    120,
    48_000,
    12.3456,
    12.3456,
    {"acc1": 48.73, "acc5": 75.3, "acc10": 80.0},
    0.1,
    123_456.0,
    {"total": 1234.5},
    "f" * 64,
)
IMAGES = EpochRecord(
    12, 4800, 2.1034, 2.2001, {"acc1": 48.73, "acc5": 75.3}, 0.1, 1412.0, {"total": 61.2}, "0f3a1234" * 8
)
TEXT = EpochRecord(6, 4800, 5.1034, 5.2001, {"ppl": 181.29}, 20, 123412.0, {"total": 61.2}, "0f3a1234" * 8)


def test_the_line_of_an_epoch_at_the_width_of_a_terminal() -> None:
    whole = "epoch 12  train_loss 2.1034  val_loss 2.2001  acc1 48.73  acc5 75.30  1,412/s  61.2 s  weights 0f3a1234"
    assert epoch_line(IMAGES) == epoch_line(IMAGES, 120) == whole
    assert epoch_line(IMAGES, 100) == whole.replace("  1,412/s", "")
    assert epoch_line(IMAGES, 80) == "epoch 12  train 2.1034  val 2.2001  acc1 48.73  acc5 75.30  weights 0f3a1234"
    assert epoch_line(TEXT, 80) == "epoch 6  train 5.1034  val 5.2001  ppl 181.29  61.2 s  weights 0f3a1234"
    plain = dataclasses.replace(IMAGES, weights_sha="")  # of the script that a grid compares with
    assert epoch_line(plain) == whole.partition("  weights")[0]
    assert epoch_line(plain, 60) == "epoch 12  train 2.1034  val 2.2001  acc1 48.73  acc5 75.30"


@pytest.mark.parametrize("record", [LONGEST, IMAGES, TEXT])
def test_the_line_of_an_epoch_is_one_line_and_its_hash_whole_or_absent(record: EpochRecord) -> None:
    for width in range(40, 140):
        line = epoch_line(record, width)
        assert len(line) <= width
        assert line.startswith(f"epoch {record.epoch}  ")
        assert "weights" not in line or line.endswith(record.weights_sha[:8])
    assert "acc1 48.73" in epoch_line(LONGEST, 80)


def test_it_says_how_samples_reach_a_gpu(tmp_path: Path) -> None:
    run = Run.create(ExperimentConfig(storage_path=tmp_path), argv=[])
    text = io.StringIO()
    screen = Screen(run, Console(file=text, width=300))
    run.update(data={}, residency=Residency(True, 1_283_000_000, 80 * 10**9, "auto").to_json())
    screen._begun()
    assert text.getvalue().splitlines()[1:] == ["samples: 1.28 GB, kept in the GPU's memory"]


def test_a_terminal_gets_lines_of_its_width_and_a_file_whole_ones(tmp_path: Path) -> None:
    run = Run.create(ExperimentConfig(storage_path=tmp_path), argv=[])
    lines = {}
    for terminal in (True, False):
        text = io.StringIO()
        screen = Screen(run, Console(file=text, width=60, force_terminal=terminal))
        screen.shown = 0
        append_line(run.epochs_path, json.dumps(IMAGES.to_json()))
        screen._epochs()
        lines[terminal] = text.getvalue().splitlines()[0]
        run.epochs_path.unlink()
    assert lines == {True: epoch_line(IMAGES, 60), False: epoch_line(IMAGES)}


@pytest.mark.parametrize(
    ("width", "says"),
    [
        (100, "step 123/391  loss 4.1234 12,345 images/s 1:02:03 elapsed, 12:05 left"),
        (80, "step 123/391  loss 4.1234 12,345 images/s 12:05 left"),
        (60, "step 123/391  loss 4.1234 12:05 left"),
    ],
)
def test_times_beside_the_bar_say_what_they_are(monkeypatch: pytest.MonkeyPatch, width: int, says: str) -> None:
    from rich.progress import Task

    monkeypatch.setattr(Task, "elapsed", 3723.4)
    monkeypatch.setattr(Task, "time_remaining", 725.0)
    out = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    bar = screens.bar(out)
    bar.add_task("epoch 12/20", total=100, completed=50, figures="step 123/391  loss 4.1234", rate="12,345 images/s")
    with out.capture() as got:
        out.print(bar.make_tasks_table(bar.tasks))
    (line,) = got.get().splitlines()
    assert line.startswith("epoch 12/20 ━")
    assert line.rstrip().endswith(f" {says}")
    assert "…" not in line


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_terminal_has_room_to_show_ctrl_c_behind_the_bar(width: int) -> None:
    out = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    bar = screens.bar(out)
    bar.add_task("epoch 12/20", total=100, completed=50, figures="step 123/391  loss 4.1234", rate="12,345 images/s")
    lines = out.render_lines(bar.get_renderable(), pad=False)  # as a live display draws it
    assert [sum(piece.cell_length for piece in line) for line in lines] == [width - len("^C") - 1]


def test_before_the_first_step_only_what_has_passed_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    bar = screens.bar(out)
    bar.add_task("starting Ray", total=None, figures="", rate="")
    with out.capture() as got:
        out.print(bar.make_tasks_table(bar.tasks))
    assert got.get().rstrip().endswith("0:00 elapsed")


def test_the_clock() -> None:
    assert [clock(s) for s in (0.4, 59.9, 60, 754, 3600, 36061)] == [
        "0:00",
        "0:59",
        "1:00",
        "12:34",
        "1:00:00",
        "10:01:01",
    ]
