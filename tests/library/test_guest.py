"""A call leaves the process as it was: threads, settings, random numbers, environment, signals, files."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import rayexp
from rayexp.engine.settings import HOLDERS, kept
from rayexp.library.guest import guest


def files() -> dict[str, str]:
    """What this process has open, by the number of the descriptor."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            found[link.name] = str(link.readlink())
        except OSError:
            continue  # that of the listing itself
    return {number: target for number, target in found.items() if not target.startswith("/proc/")}


def snapshot() -> dict[str, Any]:
    """All of a process that a program may notice."""
    return {
        "threads of torch": torch.get_num_threads(),
        "threads between operations": torch.get_num_interop_threads(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled),
        "precision": [torch.get_float32_matmul_precision(), *(holder.fp32_precision for holder in HOLDERS)],
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "random of torch": torch.get_rng_state().tolist(),
        "random of numpy": repr(np.random.get_state()),
        "random": random.getstate(),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "filters": list(warnings.filters),
        "hooks": (sys.excepthook, threading.excepthook),
        "argv": list(sys.argv),
        "path": list(sys.path),
        "streams": (sys.stdout, sys.stderr),
        "signals": {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)},
        "files": files(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "children": sorted(child.pid for child in psutil.Process().children(recursive=True)),
    }


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program that has settings of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("OF_THE_PROGRAM", "own")
    monkeypatch.setenv("GOES", "own")
    monkeypatch.setattr(sys, "excepthook", lambda *error: None)
    monkeypatch.setattr(sys, "argv", ["program", "--unknown"])
    with kept(), warnings.catch_warnings():
        warnings.simplefilter("default", ResourceWarning)
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.manual_seed(11)
        random.seed(12)
        np.random.seed(13)
        yield


def train(runs: Path, ref: str, **changes: Any) -> rayexp.Run:
    """A run like that one, in another folder."""
    config = rayexp.Run.find(ref, runs).config()
    return rayexp.train(config, changes, runs=runs / "more", progress=False)


CALLS: dict[str, Callable[[Path], object]] = {
    "train": lambda runs: train(runs, "pictures", epochs=1, **{"scaling.lanes": 2}),
    "train a language model": lambda runs: train(runs, "words"),
    "evaluate": lambda runs: rayexp.evaluate("pictures@best", runs=runs),
    "predict": lambda runs: rayexp.predict("pictures@best", np.zeros((8, 8, 3), np.uint8), runs=runs),
    "predict words": lambda runs: rayexp.predict("words@last", "The module", runs=runs),
    "generate": lambda runs: rayexp.generate("words@last", 5, runs=runs),
    "load_model": lambda runs: rayexp.load_model("pictures@1", runs=runs),
    "export": lambda runs: rayexp.export("words@1", runs / "words.pt", force=True, runs=runs),
    "diff": lambda runs: rayexp.diff("pictures@1", "@2", runs=runs),
}


QUICK = ("train a language model", "predict", "generate")


@pytest.mark.parametrize("call", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in CALLS])
def test_nothing_is_left_changed(call: str, runs: Path, pictures: Any, words: Any, own: None) -> None:
    CALLS[call](runs)  # what is imported for the first time may open files of its own
    before = snapshot()
    CALLS[call](runs)
    after = snapshot()
    assert {name: (value, after[name]) for name, value in before.items() if value != after[name]} == {}


def test_an_error_leaves_nothing_changed(runs: Path, words: Any, own: None) -> None:
    before = snapshot()
    with pytest.raises(rayexp.UserError, match="unknown model"):
        train(runs, "words", **{"model.name": "nothing"})
    after = snapshot()
    assert {name: (value, after[name]) for name, value in before.items() if value != after[name]} == {}


def test_training_twice_in_one_process_gives_one_hash_whatever_was_set(runs: Path, words: Any) -> None:
    with kept():
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
        torch.manual_seed(5)
        again = train(runs, "words")
    assert again.records()[0].weights_sha == words.records()[0].weights_sha


def test_two_threads_at_once_are_refused_and_one_after_the_other_is_not(runs: Path, words: Any) -> None:
    refused: list[str] = []

    class Nosy:
        def on_epoch(self, record: object) -> None:
            try:
                rayexp.evaluate("words@1", runs=runs)
            except rayexp.UserError as error:
                refused.append(str(error))

    rayexp.train(words.config(), runs=runs / "more", callbacks=[Nosy()], progress=False)
    assert refused == ["evaluate: train is at work in this process; allowed: one after the other"]
    rayexp.evaluate("words@1", runs=runs)


@pytest.mark.parametrize("fails", [False, True])
def test_whatever_is_changed_inside_a_call_is_restored(own: None, tmp_path: Path, fails: bool) -> None:
    """A model or a callback of the user's may change anything."""
    (tmp_path / "below").mkdir()
    before = snapshot()
    with contextlib.suppress(ValueError), guest("call"):
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float16)
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = True
        torch.set_grad_enabled(False)
        torch.manual_seed(1)
        random.seed(2)
        np.random.seed(3)
        os.environ["RAYEXP_NEW"] = "1"
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        os.environ["OF_THE_PROGRAM"] = "another"
        del os.environ["GOES"]
        os.chdir("below")
        warnings.simplefilter("ignore")
        sys.excepthook = threading.excepthook = print
        if fails:
            raise ValueError("inside")
    after = snapshot()
    assert {name: (value, after[name]) for name, value in before.items() if value != after[name]} == {}


def test_an_error_lets_the_next_call_in() -> None:
    with pytest.raises(ValueError, match="inside"), guest("one"):
        raise ValueError("inside")
    with guest("two"):
        pass


def test_outside_the_main_thread_no_signal_is_handled(runs: Path, words: Any) -> None:
    handlers: list[object] = []
    hashes: list[str] = []

    class Look:
        def on_epoch(self, record: rayexp.EpochRecord) -> None:  # type: ignore[name-defined]
            handlers.append(signal.getsignal(signal.SIGINT))

    def work() -> None:
        run = rayexp.train(words.config(), runs=runs / "more", callbacks=[Look()], progress=False)
        hashes.append(run.records()[0].weights_sha)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [before]
    assert hashes == [words.records()[0].weights_sha]


def test_it_works_where_a_notebook_calls(runs: Path, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event loop runs, and stdout and stderr are no files: progress goes where stderr goes."""
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", shown)

    async def cell() -> Any:
        return rayexp.train(words.config(), runs=runs / "more")

    run = asyncio.run(cell())
    assert f"run: {run.root}" in shown.getvalue()
    assert "epoch 1  train_loss" in shown.getvalue()
    assert sys.stdout.getvalue() == ""  # type: ignore[attr-defined]


def ours(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What differs, without what Ray's library keeps in a process: log files, sockets, a folder on the path."""
    kept_by_ray = ("files", "path")
    return {name: (v, after[name]) for name, v in before.items() if name not in kept_by_ray and v != after[name]}


@pytest.mark.ray
@pytest.mark.slow
def test_workers_change_nothing_and_a_second_ray_follows_the_first(runs: Path, words: Any, own: None) -> None:
    streams = [os.fstat(number)[:3] for number in (1, 2)]
    before = snapshot()
    hashes = set()
    for _ in range(2):
        run = train(runs, "words", **{"scaling.num_workers": 2})
        hashes.add(run.records()[0].weights_sha)
        assert ours(before, snapshot()) == {}
        assert [os.fstat(number)[:3] for number in (1, 2)] == streams
    assert hashes == {words.records()[0].weights_sha}


@pytest.mark.slow
def test_verify_leaves_nothing_changed(runs: Path, words: Any, own: None) -> None:
    before = snapshot()
    verdict = rayexp.verify(
        words.config(), workers=[0, 2], steps=3, launcher="processes", contrast=False, progress=False
    )
    assert verdict.ok
    assert verdict.to_dict()["ok"]
    assert ours(before, snapshot()) == {}


@pytest.mark.ray
@pytest.mark.slow
def test_compare_leaves_nothing_changed(runs: Path, words: Any, own: None, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(words.config().to_yaml())
    grid = {"base": "base.yaml", "scaling": [{"num_workers": 0}], "repeats": 1, "baseline": False}
    before = snapshot()
    report = rayexp.compare(grid, runs=tmp_path / "grids", progress=False)
    assert [row.cell.workers for row in report.cells] == [0]
    assert report.equal
    assert report.to_dict()["status"] == "done"
    assert ours(before, snapshot()) == {}
    again = rayexp.compare(grid, resume=report.comparison.root, progress=False)
    assert again.to_dict()["cells"] == report.to_dict()["cells"]


@pytest.mark.slow
def test_ctrl_c_saves_and_raises_and_the_run_goes_on(runs: Path, words: Any, own: None) -> None:
    class Interrupt:
        def on_epoch(self, record: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    before = snapshot()
    with pytest.raises(KeyboardInterrupt, match=r"stopped; saved up to step \d+; go on with") as stopped:
        rayexp.train(words.config(), {"epochs": 30}, callbacks=[Interrupt()], runs=runs / "interrupted", progress=False)
    assert isinstance(stopped.value, rayexp.Stopped)
    assert ours(before, snapshot()) == {}
    (run,) = rayexp.Run.all(runs / "interrupted")
    assert run.status() == "stopped"
    assert 1 <= len(run.records()) < 30
