"""`verify` says which trial of how many it is at, which step of how many, and what came of each."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from rayexp.config import ExperimentConfig
from rayexp.launch.trial_screen import TrialScreen, last_step, steps_of, worded
from rayexp.launch.verify import verify
from rayexp.runs.run import Run

Tiny = Callable[..., ExperimentConfig]


def plain(text: io.StringIO) -> str:
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text.getvalue()).replace("\r", "\n")


def test_a_terminal_follows_the_steps_of_the_newest_run(tiny: Tiny, tmp_path: Path, until: Callable[..., None]) -> None:
    config = tiny(storage_path=str(tmp_path), epochs=2)
    older = Run.create(config, argv=[])
    (older.root / "trace.jsonl").write_text('{"step": 9}\n')
    text = io.StringIO()
    screen = TrialScreen(Console(file=text, width=80, force_terminal=True), tmp_path, total=9, steps=10)
    with screen.trial("2 workers"):
        run = Run.create(config, argv=[])
        (run.root / "trace.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
        until(lambda: "step 2 of 10" in plain(text), 20)
        run.update(steps_per_epoch=3)
        (run.root / "trace.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
        until(lambda: "step 3 of 6" in plain(text), 20)
    assert "step 9" not in plain(text)
    assert all(len(line) <= 80 for line in plain(text).splitlines())
    assert "trial 1 of 9: 2 workers" in plain(text)
    screen.ended("2 workers", "0f3a1234" * 8, 6, "1,234 images/s")
    assert plain(text).splitlines()[-1] == "[1/9] 2 workers: 6 steps, 1,234 images/s, weights 0f3a1234"


def test_a_file_gets_two_lines_a_trial(tmp_path: Path) -> None:
    text = io.StringIO()
    screen = TrialScreen(Console(file=text, width=80), tmp_path, total=2, steps=10)
    for name in ("in one process", "1 worker"):
        with screen.trial(name):
            pass
        screen.ended(name, "0f3a1234" * 8, 1, "5 images/s")
    assert text.getvalue().splitlines() == [
        "trial 1 of 2: in one process",
        "[1/2] in one process: 1 step, 5 images/s, weights 0f3a1234",
        "trial 2 of 2: 1 worker",
        "[2/2] 1 worker: 1 step, 5 images/s, weights 0f3a1234",
    ]


def test_the_terminal_is_released_when_a_trial_fails(tmp_path: Path) -> None:
    text = io.StringIO()
    screen = TrialScreen(Console(file=text, width=80, force_terminal=True), tmp_path, total=2, steps=10)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), screen.trial("1 worker"):
        raise KeyboardInterrupt
    assert time.monotonic() - began < 10
    assert text.getvalue().count("\x1b[?25h") == text.getvalue().count("\x1b[?25l") == 1  # the cursor is shown again


def test_the_newest_step_is_read_from_whole_lines(tmp_path: Path) -> None:
    assert last_step(tmp_path) == 0
    trace = tmp_path / "trace.jsonl"
    for text, step in (("", 0), ('{"step": 1', 0), ('{"step": 1}\n', 1), ('{"step": 1}\n{"step": 2}\n{"ste', 2)):
        trace.write_text(text)
        assert last_step(tmp_path) == step


def test_steps_are_known_once_training_has_begun(tiny: Tiny, tmp_path: Path) -> None:
    run = Run.create(tiny(storage_path=str(tmp_path), epochs=3), argv=[])
    assert steps_of(run.root) == 0
    run.update(steps_per_epoch=7)
    assert steps_of(run.root) == 21


def test_words() -> None:
    assert [worded(0), worded(1), worded(4, "one killed"), worded(0, "ddp"), worded(2, "ddp")] == [
        *("in one process", "1 worker", "4 workers, one killed", "ddp, in one process", "ddp, 2 workers")
    ]


def test_a_verification_counts_its_trials(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every count, the killed run, and ddp beside: the last line's number is the total."""
    monkeypatch.setattr("rayexp.launch.verify._Bench._processes", lambda self, config, workers: made(self, config))

    def made(bench: object, config: ExperimentConfig, **_: object) -> Run:
        run = Run.create(config, argv=[])
        run.write("data.json", "{}")
        lines = [json.dumps({"step": s, "weights_sha": "a" * 64, "tensors": {}, "rate": 5.0}) for s in (1, 2)]
        (run.root / "trace.jsonl").write_text("\n".join(lines) + "\n")
        return run

    monkeypatch.setattr("rayexp.launch.verify.train", lambda config, **_: made(None, config))
    monkeypatch.setattr(
        "rayexp.launch.verify._Bench.run_killed",
        lambda self, config, label, workers, steps: self.run(config, label, workers, "one killed"),
    )
    for contrast, kill, total in ((True, False, 4), (False, False, 2), (True, True, 5)):
        text = io.StringIO()
        console = Console(file=text, width=200)
        verify(tiny(), [0, 2], steps=2, launcher="processes", contrast=contrast, kill=kill, console=console)
        lines = text.getvalue().splitlines()
        assert len(lines) == 2 * total
        assert lines[-1].startswith(f"[{total}/{total}] ")
        assert lines[2] == f"trial 2 of {total}: 2 workers"
