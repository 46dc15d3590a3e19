"""Signals that ask a run to stop, and errors at the end of a run or before its first step."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rayexp.config import ExperimentConfig
from rayexp.errors import HeadLostError, RunError, Stopped, UserError
from rayexp.launch import local, stopping
from rayexp.launch.driver import run
from rayexp.launch.job import WorkerJob
from rayexp.launch.resuming import go_on
from rayexp.launch.stopping import Stopping, stoppable
from rayexp.runs.run import Run
from rayexp.runs.writer import RunWriter
from rayexp.system import signals

Tiny = Callable[..., ExperimentConfig]
Command = Callable[..., "subprocess.Popen[str]"]
Until = Callable[..., None]
HANGUP = signal.SIGHUP


def shas(made: Run) -> list[str]:
    return [record.state_sha for record in made.records()]


def only(folder: Path) -> Run:
    (found,) = Run.all(folder)
    return found


@contextlib.contextmanager
def not_stopped() -> Iterator[None]:
    """Fail the test where an interruption would otherwise end all tests."""
    try:
        yield
    except Stopped as stopped:
        pytest.fail(f"it was stopped by {stopped.number}")


@pytest.fixture
def begun(tiny: Tiny, tmp_path: Path, until: Until) -> Callable[[], Run]:
    """Write c.yaml; the function waits until a run of it has done a step."""
    (tmp_path / "c.yaml").write_text(tiny(epochs=400).to_yaml())

    def wait() -> Run:
        until(lambda: any(made.stepping() for made in Run.all(tmp_path / "runs")))
        return only(tmp_path / "runs")

    return wait


# ---------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.slow),  # all four take one way
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),  # see test_a_closed_terminal_saves
    ],
)
def test_a_signal_saves_and_has_its_exit_code(
    begun: Callable[[], Run], command: Command, number: int, code: int
) -> None:
    process = command("train", "c.yaml")
    made = begun()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert not out
    assert made.meta()["status"] == "stopped"
    step = next(made.resumable())[1]["step"]
    assert err.splitlines()[-2:] == [
        f"stopped; saved up to step {step}",
        f"go on with: rayexp train --resume {made.id}",
    ]
    assert not made.stop_path.exists()
    assert not made.progress_path.exists()


@pytest.mark.slow  # in this process: test_a_stopped_run_goes_on_at_its_step of test_driver.py
def test_a_stopped_run_goes_on_to_the_same_weights(tiny: Tiny, tmp_path: Path, command: Command, until: Until) -> None:
    config = tiny(epochs=16)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    process = command("train", "c.yaml")
    until(lambda: any(made.stepping() for made in Run.all(tmp_path / "runs")))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    done = command("train", "--resume", only(tmp_path / "runs").id, "--json")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert json.loads(out)["epochs"][-1]["state_sha"] == shas(run(config, argv=[]))[-1]


def test_a_closed_terminal_saves(begun: Callable[[], Run], tmp_path: Path) -> None:
    keyboard, screen = pty.openpty()
    code = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, "-m", "rayexp", "train", "c.yaml"],
        cwd=tmp_path,
        stdin=screen,
        stdout=screen,
        stderr=screen,
        start_new_session=True,
    )
    try:
        os.close(screen)
        made = begun()
        os.close(keyboard)  # the system sends SIGHUP, and whoever writes to the terminal now gets an error
        assert process.wait(60) == 129
    finally:
        process.kill()
        process.wait()
    assert made.meta()["status"] == "stopped"
    assert list(made.resumable())


def test_under_nohup_a_closed_terminal_is_none_of_our_business() -> None:
    before = signal.signal(HANGUP, signal.SIG_IGN)
    try:
        with signals.ending():
            with not_stopped():
                os.kill(os.getpid(), HANGUP)
            with pytest.raises(Stopped) as caught:
                os.kill(os.getpid(), signal.SIGUSR1)
        assert caught.value.number == signal.SIGUSR1
        assert signal.getsignal(HANGUP) is signal.SIG_IGN
    finally:
        signal.signal(HANGUP, before)


def test_a_handler_from_outside_python_stays(faults: Callable[..., dict[str, str]]) -> None:
    code = (
        "import signal\nfrom rayexp.system import signals\n"
        "assert signal.getsignal(signal.SIGUSR1) is None\n"
        "with signals.handled(lambda number: print(number.name, flush=True)):\n"
        "    signal.raise_signal(signal.SIGTERM)\n    signal.raise_signal(signal.SIGUSR1)\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
    )
    environment = faults(handler=int(signal.SIGUSR1))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "SIGTERM\n", "handled outside Python\n")


def test_what_ray_makes_of_an_interruption_keeps_the_signal() -> None:
    def call_to_ray() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    with pytest.raises(Stopped) as caught, signals.ending():
        call_to_ray()
    assert caught.value.number == signal.SIGTERM


def test_other_commands_end_with_the_signals_code_too(tmp_path: Path, until: Until) -> None:
    code = (
        "import time\nfrom rayexp.cli import _app\n"
        "@_app.app.command()\ndef wait() -> None:\n"
        "    open('there', 'w').close()\n    try:\n        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n        open('cleaned', 'w').close()\n        raise\n"
        "_app.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, "wait"], cwd=tmp_path)
    until((tmp_path / "there").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert (tmp_path / "cleaned").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_interrupted_within_ray_ends_with_the_signals_code(
    tiny: Tiny, tmp_path: Path, number: int, code: int
) -> None:
    """`train --dry-run` and `compare` ask a Ray what it has, and its calls raise a plain KeyboardInterrupt."""
    (tmp_path / "c.yaml").write_text(tiny().to_yaml())
    planted = (
        "import signal\nfrom rayexp.cli import main\nfrom rayexp.launch import driver\n"
        "def outline(*given):\n    try:\n        signal.raise_signal({number})\n"
        "    except KeyboardInterrupt:\n        raise KeyboardInterrupt from None\n"
        "driver.outline = outline\nmain()"
    )
    command = [sys.executable, "-c", planted.format(number=int(number)), "train", "c.yaml", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_one_request_may_come_as_several_signals(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Run.create(tiny(), argv=[])
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    asked, said = Stopping(made), []
    asked.say = said.append
    RunWriter(made).progress({"step": 1})
    assert not asked()
    asked.ask(signal.SIGTERM)
    assert asked()
    assert made.stop_path.exists()
    now[0] += 0.5  # `timeout` sends it to the process and to its group, a batch system to each process and its parent
    with not_stopped():
        asked.ask(signal.SIGTERM)
        asked.ask(signal.SIGHUP)
    assert len(said) == 1
    now[0] += 0.6
    with pytest.raises(Stopped):
        asked.ask(signal.SIGTERM)


def test_before_the_first_step_a_signal_ends_the_run_at_once(tiny: Tiny) -> None:
    made = Run.create(tiny(), argv=[])
    made.stop_path.touch()  # of a driver that was killed
    with stoppable(made) as asked:
        assert not made.stop_path.exists()
        RunWriter(made).progress({"warnings": ["lr: high"]})  # written before any step
        with pytest.raises(Stopped) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.number == signal.SIGTERM
    assert asked()


# ---------------------------------------------------------------------- what comes after the end, or without the data


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Let an attempt end with an error after it has done all its work."""
    real = local.attempt

    def end(error: BaseException) -> None:
        def attempt(made: Run, job: WorkerJob) -> str:
            real(made, job)
            raise error

        monkeypatch.setattr(local, "attempt", attempt)

    return end


@pytest.mark.parametrize("error", [Stopped(signal.SIGTERM), HeadLostError("Ray's head has ended")])
def test_what_comes_after_the_end_does_not_change_it(
    tiny: Tiny, after: Callable[[BaseException], None], error: BaseException
) -> None:
    after(error)
    with not_stopped():
        made = run(tiny(), argv=[])
    assert made.meta()["status"] == "done"
    assert made.meta()["error"] is None


@pytest.mark.parametrize("kind", [UserError, HeadLostError])
def test_nothing_that_can_be_resumed_is_removed(
    tiny: Tiny, tmp_path: Path, after: Callable[[BaseException], None], kind: type[Exception]
) -> None:
    after(kind("data.root: not there"))
    with pytest.raises(kind, match=r"^data.root: not there; saved up to step 2; go on with: rayexp train --resume \S+"):
        run(tiny(checkpoint={"every_steps": 1}), argv=[], max_steps=2)
    made = only(tmp_path / "runs")
    assert made.epochs() == []
    assert (made.meta()["status"], made.meta()["error"]) == ("failed", "data.root: not there")


@pytest.mark.parametrize("kind", [UserError, RunError])
def test_what_goes_wrong_in_a_run_that_was_asked_to_stop_is_told(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[UserError | RunError]
) -> None:
    """For example a disk that is full when the last step is to be saved."""

    def attempt(made: Run, job: WorkerJob) -> str:
        RunWriter(made).progress({"step": 1})
        signal.raise_signal(signal.SIGTERM)
        raise kind("state.json: cannot be written", go_on(made.root))

    monkeypatch.setattr(local, "attempt", attempt)
    with pytest.raises(Stopped) as caught:
        run(tiny(), argv=[])
    made = only(tmp_path / "runs")
    assert caught.value.number == signal.SIGTERM
    fault = f"stopped; state.json: cannot be written; nothing is saved yet in {made.id}"
    assert str(caught.value) == fault + go_on(made.root)
    assert (made.meta()["status"], made.meta()["error"]) == ("stopped", "state.json: cannot be written")


def test_a_ray_that_the_same_signal_has_ended_is_no_error_of_the_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(made: Run, job: WorkerJob) -> str:
        RunWriter(made).progress({"step": 1})
        signal.raise_signal(signal.SIGTERM)
        raise HeadLostError("Ray's head has ended")

    monkeypatch.setattr(local, "attempt", attempt)
    with pytest.raises(Stopped, match=r"^stopped; nothing is saved yet in"):
        run(tiny(), argv=[])
    assert "ended at once" in only(tmp_path / "runs").meta()["error"]


@pytest.mark.parametrize("what", ["checkpoints/epoch_001", "checkpoints/step_00000003", "predictions", "epochs.jsonl"])
def test_anything_that_training_has_made_is_kept(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def attempt(made: Run, job: WorkerJob) -> str:
        (made.root / what).mkdir(parents=True)
        (made.root / what / "a").touch()
        raise UserError("wrong")

    monkeypatch.setattr(local, "attempt", attempt)
    with pytest.raises(UserError, match="wrong"):
        run(tiny(), argv=[])
    assert (only(tmp_path / "runs").root / what / "a").exists()


def test_the_last_word_does_not_hide_what_ended_the_run(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(made: Run, job: WorkerJob) -> str:
        raise RunError("the network is gone")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local, "attempt", attempt)
    monkeypatch.setattr(RunWriter, "end", full)
    with pytest.raises(RunError, match="the network is gone"):
        run(tiny(), argv=[])
