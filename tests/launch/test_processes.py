"""Workers as processes: of those that failed, a killed one is named as the reason, in whichever order they ended."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from rayexp.config import ExperimentConfig
from rayexp.errors import RunError, UserError
from rayexp.launch import process_worker, processes
from rayexp.launch.faults import LostError
from rayexp.launch.job import WorkerJob
from rayexp.launch.processes import WorkersFailedError
from rayexp.launch.worker_fault import WorkerFaultError, find
from rayexp.runs.run import Run
from rayexp.system import spawn


def start(*endings: str) -> list[subprocess.Popen[bytes]]:
    return [subprocess.Popen([sys.executable, "-c", f"import os, signal, time\n{ending}"]) for ending in endings]


LASTS = "time.sleep(60)"
KILLED, ABORTS, FAILS, DONE = "os.kill(os.getpid(), signal.SIGKILL)", "os.abort()", "exit(1)", "pass"


def failed(root: Path, workers: Sequence[subprocess.Popen[bytes]]) -> WorkersFailedError:
    (root / "logs").mkdir(exist_ok=True)
    for rank in range(len(workers)):
        (root / "logs" / f"rank_{rank}.out").write_text(f"some\nlast words of {rank}\n")
    with pytest.raises(WorkersFailedError) as caught:
        processes.wait(root, list(workers))
    assert all(worker.returncode is not None for worker in workers)
    return caught.value


@pytest.mark.parametrize("order", list(itertools.permutations([KILLED, ABORTS, FAILS])))
def test_the_killed_one_is_the_reason(tmp_path: Path, order: Sequence[str]) -> None:
    workers = start(*order)
    for worker in workers:
        worker.wait()
    error = failed(tmp_path, [*workers, *start(LASTS)])
    rank = order.index(KILLED)
    assert error.killed
    assert error.codes == {i: {KILLED: -9, ABORTS: -6, FAILS: 1}[ending] for i, ending in enumerate(order)}
    assert str(error).startswith(f"worker {rank} ended with -9: last words of {rank} (see ")


class Ending:
    """A process that ends with `code` when it has been asked `asked` times whether it has, unless it is killed first.

    One that was killed from outside takes a while to end, and a peer that misses it may be gone sooner."""

    def __init__(self, code: int | None, asked: int = 1) -> None:
        self.code, self.asked, self.returncode = code, asked, None

    def poll(self) -> int | None:
        self.asked -= 1
        if self.asked <= 0 and self.returncode is None:
            self.returncode = self.code
        return self.returncode

    def kill(self) -> None:
        self.returncode = -9 if self.returncode is None else self.returncode

    def wait(self) -> int | None:
        return self.returncode


ENDINGS = [Ending(None), Ending(-9, 60), Ending(-6, 5), Ending(1, 20), Ending(0)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(len(ENDINGS)), 4)))
def test_the_killed_one_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: Sequence[int]) -> None:
    """Whatever its rank, and although others end sooner."""
    clock = itertools.count()
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(processes.time, "monotonic", lambda: 0.05 * next(clock))
    workers = [copy.copy(ENDINGS[i]) for i in order]
    error = failed(tmp_path, workers)  # type: ignore[arg-type]
    assert error.killed == (1 in order)
    if error.killed:
        assert str(error).startswith(f"worker {order.index(1)} ended with -9: ")


def test_those_that_are_ended_here_were_not_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SETTLE_S", 0.2)
    error = failed(tmp_path, start(DONE, FAILS, LASTS))
    assert error.codes == {1: 1}
    assert not error.killed
    assert str(error).startswith("worker 1 ended with 1: ")


@pytest.mark.parametrize(
    ("codes", "rank", "expected"),
    [
        ([1, None], 0, "data.root: /nowhere: no such folder (see x)"),
        ([None, 1], 1, "data.root: /nowhere: no such folder (see x)"),
        ([-9, 1], 1, "worker 0 ended with -9: no output (see {out})"),  # whoever was killed is the reason
        ([-6, None], 0, "worker 0 ended with -6: "),  # of an earlier attempt, in the same file
    ],
)
def test_the_error_of_a_worker_is_raised_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: list[int | None], rank: int, expected: str
) -> None:
    monkeypatch.setattr(processes, "SETTLE_S", 0)
    (tmp_path / "logs").mkdir()
    for number in range(len(codes)):
        (tmp_path / "logs" / f"rank_{number}.out").touch()
    fault = WorkerFaultError.of(UserError("data.root: /nowhere: no such folder", " (see x)"))
    (tmp_path / "logs" / f"rank_{rank}.out").write_text(f"Traceback\nWorkerFaultError: {fault}\n")
    with pytest.raises(RunError if expected.startswith("worker") else UserError) as caught:
        processes.wait(tmp_path, [Ending(code) for code in codes])  # type: ignore[misc]
    assert str(caught.value).startswith(expected.format(out=tmp_path / "logs" / "rank_0.out"))


@pytest.mark.parametrize("kind", [UserError, RunError])
@pytest.mark.parametrize("lost", [0, 1])
def test_who_lost_touch_with_another_worker_is_not_the_cause(
    tmp_path: Path, kind: type[UserError | RunError], lost: int
) -> None:
    (tmp_path / "logs").mkdir()
    for rank, error in ((lost, LostError("lost touch with a peer")), (1 - lost, kind("the loss is not finite"))):
        (tmp_path / "logs" / f"rank_{rank}.out").write_text(
            f"Traceback\nWorkerFaultError: {WorkerFaultError.of(error)}\n"
        )
    with pytest.raises(kind, match="the loss is not finite"):
        processes.wait(tmp_path, [Ending(1), Ending(1)])  # type: ignore[list-item]
    (tmp_path / "logs" / f"rank_{1 - lost}.out").write_text("Segmentation fault")
    with pytest.raises(WorkersFailedError, match=f"^worker {1 - lost} ended with -11: Segmentation fault "):
        processes.wait(tmp_path, [Ending((1, -11)[rank != lost]) for rank in range(2)])  # type: ignore[misc]


def test_the_error_of_a_run_is_told_without_the_names_of_classes(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    fault = WorkerFaultError.of(RunError("the loss is not finite"))
    (tmp_path / "logs" / "rank_0.out").write_text(f"Traceback\nWorkerFaultError: {fault}\n")
    with pytest.raises(WorkersFailedError, match=r"^worker 0 ended with 1: the loss is not finite \(see "):
        processes.wait(tmp_path, [Ending(1)])  # type: ignore[list-item]


def test_a_worker_tells_its_errors(
    tmp_path: Path, tiny: Callable[..., ExperimentConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = UserError("data.root: /nowhere: no such folder", " (see x)")

    def work(*args: object) -> None:
        raise error

    watched: list[int] = []
    monkeypatch.setattr(process_worker, "end_with_parent", watched.append)
    monkeypatch.setattr(process_worker, "work", work)
    config = tiny()
    job = WorkerJob(run=Run.create(config, argv=[]).root, config=config, device="cpu").write()
    with pytest.raises(WorkerFaultError) as caught:
        process_worker.main([str(job), "0", "1", "127.0.0.1:1", "77"])
    found = find(f"X: {caught.value}")
    assert (type(found), str(found), watched) == (UserError, str(error), [77])

    def alone(*args: object) -> None:
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:545] Connection reset by peer")

    monkeypatch.setattr(process_worker, "work", alone)
    with pytest.raises(WorkerFaultError) as caught:
        process_worker.main([str(job), "0", "1", "127.0.0.1:1", "77"])
    found = find(f"X: {caught.value}")
    assert (type(found), str(found)) == (LostError, "lost touch with a peer")
    monkeypatch.setattr(process_worker, "work", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        process_worker.main([str(job), "0", "1", "127.0.0.1:1", "77"])


def test_an_attempt_does_not_inherit_the_errors_of_the_one_before(
    tmp_path: Path, tiny: Callable[..., ExperimentConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()
    made = Run.create(config, argv=[])
    made.logs.mkdir()
    old = WorkerFaultError.of(UserError("of the attempt before"))
    (made.logs / "rank_0.out").write_text(f"Traceback\nWorkerFaultError: {old}\n")
    job = WorkerJob(run=made.root, config=config, device="cpu")
    monkeypatch.setattr(spawn, "command", lambda *words: [sys.executable, "-c", "exit('of this one')"])
    with pytest.raises(WorkersFailedError, match=r"^worker 0 ended with 1: of this one "):
        processes.wait(made.root, processes.start(job, 1))


def test_all_well(tmp_path: Path) -> None:
    processes.wait(tmp_path, start(DONE, DONE))


def test_an_interruption_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    workers = start(LASTS, LASTS)
    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        processes.wait(tmp_path, workers)
    assert [worker.returncode for worker in workers] == [-9, -9]


def ended_with_its_parent(code: str, ready: Callable[[psutil.Process], object]) -> None:
    """Run code that starts a process and prints its number; kill it when that is ready, which must end then."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        left = psutil.Process(int(parent.stdout.readline()))
        while not ready(left):
            assert parent.poll() is None
            time.sleep(0.05)
        parent.kill()
    try:
        left.wait(30)
    finally:
        if left.is_running():
            left.kill()


def test_a_process_ends_with_its_parent_even_where_that_is_gone_before_it_looks() -> None:
    waiting = (
        "import sys, time\nfrom rayexp.launch.fence import end_with_parent\n"
        "end_with_parent(int(sys.argv[1]))\ntime.sleep(100)"
    )
    code = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {waiting!r}, str(os.getpid())])\n"
        "print(child.pid, flush=True)\nchild.wait()"
    )
    ended_with_its_parent(code, lambda process: True)


@pytest.mark.slow  # the two halves: test_a_worker_tells_its_errors and the one above
def test_a_worker_ends_with_its_parent(tmp_path: Path, tiny: Callable[..., ExperimentConfig]) -> None:
    config = tiny()
    job = WorkerJob(run=Run.create(config, argv=[]).root, config=config, device="cpu").write()
    # The other worker is never started, so this one waits.
    worker = spawn.command("rayexp.launch.process_worker", str(job), "0", "2", f"127.0.0.1:{processes.free_port()}")
    code = (
        f"import os, subprocess\nworker = subprocess.Popen([*{worker!r}, str(os.getpid())])\n"
        "print(worker.pid, flush=True)\nworker.wait()"
    )
    ended_with_its_parent(code, lambda worker: worker.net_connections())  # it waits for the other
