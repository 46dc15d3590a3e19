"""A call leaves the process as it was: threads, settings, random numbers, environment, signals, files."""

from __future__ import annotations

import asyncio
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


@pytest.mark.parametrize("call", CALLS)
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
