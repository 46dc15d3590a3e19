"""Shared by several folders: no usage reports, a command, a browser, file systems that lack something, and run
directories made from arrays."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import psutil
import pytest
import safetensors.numpy
from hypothesis import settings

from rayexp.config import ExperimentConfig, parse
from rayexp.runs.records import Predictions
from rayexp.runs.run import Run
from rayexp.runs.writer import RunWriter

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
settings.register_profile("untimed", settings(), deadline=None)  # no test asserts a time
settings.load_profile("untimed")

CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture
def tiny_images() -> dict[str, Any]:
    """The keys of a small image classification."""
    return {
        "data": {"name": "shapes", "max_train_samples": 64, "max_val_samples": 32, "image_size": 32},
        "batch_size": 16,
        "shards": 2,
        "epochs": 2,
        "lr": 0.01,
    }


@pytest.fixture
def alone() -> Iterator[dict[str, str]]:
    """An environment in which no Ray runs that another process has started here (its address lies in RAY_TMPDIR)."""
    folder = tempfile.mkdtemp(prefix="rx-")  # short: sockets lie below it
    yield {**{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, "RAY_TMPDIR": folder}
    shutil.rmtree(folder, ignore_errors=True)


def members(session: int) -> list[psutil.Process]:
    """The live processes of a session, its leader last."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return sorted(found, key=lambda process: process.pid == session)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `rayexp ...` in tmp_path, in a session of its own; what still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "rayexp", *words],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for child in members(process.pid):
            child.kill()
        process.communicate()


@pytest.fixture
def typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `rayexp ...` in tmp_path and in this process: a new one takes seconds to import what a command needs."""
    from rayexp.cli import main

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = ["rayexp", *map(str, words)]
        capsys.readouterr()
        with monkeypatch.context() as patched:
            patched.chdir(tmp_path)
            patched.setattr(sys, "argv", command)
            with pytest.raises(SystemExit) as end:
                main()
        return subprocess.CompletedProcess(command, int(end.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(name="members")
def members_fixture() -> Callable[[int], list[psutil.Process]]:
    return members


@pytest.fixture(params=[80, 100])
def terminal(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], str]:
    """Stdout is a terminal of 80 or 100 columns; returns what was printed on it, no line of which may be broken but a
    word by itself."""
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda stream: True)  # the stream itself is another in the test
    monkeypatch.setenv("COLUMNS", str(request.param))

    def read() -> str:
        out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
        assert [line for line in out.splitlines() if len(line) > request.param and " " in line.strip()] == []
        return out

    return read


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """An environment for a process in which calls to the system fail: `faults(flock=errno.ENOSYS)`; see faults.c."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler here: nothing to preload")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = Path(__file__).with_name("faults.c")
    done = subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the C compiler cannot build a library: {done.stderr[-200:]}")

    def environment(**errors: int) -> dict[str, str]:
        named = {f"FAULT_{call.upper()}": str(number) for call, number in errors.items()}
        return {**os.environ, "LD_PRELOAD": str(library), **named}

    return environment


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run a headless browser with these arguments; returns its DOM or whatever else it prints."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        pytest.skip("chromium is not installed")
    profile = tmp_path_factory.mktemp("chromium")

    def run(*args: str) -> str:
        command = [found, *CHROMIUM_FLAGS, f"--user-data-dir={profile}", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return run


# What a page says of itself; each is an expression in JavaScript.
MEASURES = {
    # Elements that reach beyond the window or that scroll sideways, and how far the page itself does.
    "overflow": """
        [...document.querySelectorAll('body *')]
            .filter(e => e.getClientRects().length && !e.closest('.skip, noscript, svg *'))
            .filter(e => e.getBoundingClientRect().right > innerWidth + 1
                || (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== 'visible'))
            .map(e => `${e.tagName}.${e.getAttribute('class')}: ${e.textContent.trim().slice(0, 60)}`)
            .concat(document.documentElement.scrollWidth > innerWidth ? [document.documentElement.scrollWidth] : [])
            .slice(0, 9)""",
    # Words that stand on several lines; but for names that may be longer than a line.
    "broken": r"""
        (() => {
            const found = [], range = document.createRange();
            const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            while (texts.nextNode()) {
                const node = texts.currentNode;
                if (node.parentElement.closest('script, style, noscript, details:not([open]), pre')) continue;
                for (const word of node.data.matchAll(/[\p{L}\p{N}_.]+/gu)) {
                    if (word[0].length > 20) continue;
                    range.setStart(node, word.index);
                    range.setEnd(node, word.index + word[0].length);
                    if (new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1) found.push(word[0]);
                }
            }
            return found.slice(0, 9);
        })()""",
    # What went wrong in its scripts.
    "error": "document.documentElement.dataset.error || ''",
}
WATCH = "<script>addEventListener('error', e => document.documentElement.dataset.error = e.message)</script>"


@pytest.fixture
def measured(chromium: Callable[..., str], tmp_path: Path) -> Callable[[dict[str, str], int, str], dict[str, Any]]:
    """What pages, by name, say of themselves in windows so many pixels wide (see MEASURES, or any other expression).

    A window is not made as narrow as a telephone; a frame is, and one browser opens them all.
    """

    def measured(pages: dict[str, str], width: int, measure: str) -> dict[str, Any]:
        frames = []
        for number, page in enumerate(pages.values()):
            script = (
                f"<script>addEventListener('load', () => setTimeout(() => parent.postMessage("
                f"[{number}, {MEASURES.get(measure, measure)}], '*'), 50))</script></body>"
            )
            inside = page.replace("<head>", f"<head>{WATCH}", 1).replace("</body>", script)
            (tmp_path / f"inside{number}.html").write_text(inside)
            frames.append(f'<iframe src="inside{number}.html" width="{width}" height="800" style="border:0"></iframe>')
        collect = (
            "<pre id=found></pre><script>addEventListener('message', event => "
            "document.getElementById('found').append(btoa(encodeURIComponent(JSON.stringify(event.data))) + ' '))"
            "</script>"
        )
        (tmp_path / "outside.html").write_text(collect + "".join(frames))
        dom = chromium("--dump-dom", "--virtual-time-budget=20000", (tmp_path / "outside.html").as_uri())
        found = re.search(r'<pre id="found">([^<]*)</pre>', dom)
        assert found is not None, dom[:500]
        said = dict(json.loads(unquote(base64.b64decode(one).decode())) for one in found[1].split())
        assert sorted(said) == list(range(len(pages)))
        return {name: said[number] for number, name in enumerate(pages)}

    return measured


# ---------------------------------------------------------------------- runs made from arrays


def image_arrays(label, first, *, classes, confidence=None, loss=None, rest=None):
    """Prediction arrays with a given top-1; the rest of the top five are the next classes, so label may be in it."""
    label, first = np.asarray(label, dtype=np.int64), np.asarray(first, dtype=np.int32)
    n, k = len(label), min(5, classes)
    top5 = (first[:, None] + np.arange(k)) % classes if rest is None else np.asarray(rest)
    right = label == first
    confidence = np.where(right, 0.8, 0.6) if confidence is None else confidence
    loss = np.where(right, 0.2, 2.0) if loss is None else loss
    return {
        "index": np.arange(n, dtype=np.int64),
        "label": label,
        "top5": top5.astype(np.int32),
        "confidence": np.asarray(confidence, dtype=np.float32),
        "loss": np.asarray(loss, dtype=np.float32),
    }


def token_arrays(token, loss, offset=None):
    n = len(token)
    return {
        "offset": np.arange(1, n + 1, dtype=np.int64) if offset is None else np.asarray(offset, dtype=np.int64),
        "token": np.asarray(token, dtype=np.int32),
        "loss": np.asarray(loss, dtype=np.float32),
    }


class Makes:
    """Makes run directories under one folder."""

    def __init__(self, storage):
        self.storage = storage

    def _run(self, workload, epochs, kind, data, name, config, data_sha, weights):
        tree = {
            "name": name,
            "workload": workload,
            "storage_path": str(self.storage),
            "epochs": len(epochs),
            **(config or {}),
        }
        run = Run.create(parse(tree, ExperimentConfig, "test"), argv=[])
        writer = RunWriter(run)
        writer.begin({}, data)
        for epoch, arrays in enumerate(epochs, 1):
            predictions = Predictions(kind, data_sha, arrays)
            tensors = weights[epoch - 1] if weights else {"fc.weight": np.full((2, 2), epoch, dtype=np.float32)}
            state = safetensors.numpy.save({f"model.{k}": v for k, v in tensors.items()})
            sha = hashlib.sha256(state).hexdigest()
            loss = float(np.mean(arrays["loss"], dtype=np.float64))
            if kind == "images":
                right = arrays["top5"] == arrays["label"][:, None]
                metrics = {"acc1": 100 * float(right[:, 0].mean()), "acc5": 100 * float(right.any(1).mean())}
            else:
                metrics = {"ppl": float(np.exp(loss))} if kind == "tokens" else {}
            record = {
                "epoch": epoch, "step": epoch, "train_loss": loss, "val_loss": loss, **metrics, "lr": 0.1,
                "samples_per_second": 1.0, "seconds": {"total": 1.0}, "weights_sha": sha,
            }  # fmt: skip
            words = {
                "epoch": epoch,
                "step": epoch,
                "weights_sha": sha,
                "record": record,
                "files": {"state.safetensors": sha},
            }
            writer.epoch(
                record, {"state.safetensors": state, "state.json": json.dumps(words).encode()}, predictions.to_npz()
            )
        writer.end("done")
        return run

    def images(
        self, epochs, classes, *, name="pictures", names=None, config=None, data_sha="d" * 64, weights=None, words=None
    ):
        """A run whose epochs have these arrays."""
        n = len(epochs[0]["label"])
        data = {
            "kind": "images",
            "classes": [[f"n{i:08d}", words[i] if words else f"thing {i}, genus {i}"] for i in range(classes)],
            "val_names": names or [f"val_{i}.JPEG" for i in range(n)],
            "train_samples": n, "val_samples": n, "train_sha": "t" * 64, "val_sha": data_sha,
        }  # fmt: skip
        return self._run("image_classification", epochs, "images", data, name, config, data_sha, weights)

    def text(self, epochs, vocabulary, *, name="words", data_sha="e" * 64, weights=None):
        """A language run whose epochs have these arrays."""
        n = len(epochs[0]["token"])
        data = {
            "kind": "tokens", "vocabulary": list(vocabulary), "train_samples": n, "val_samples": n,
            "train_sha": "t" * 64, "val_sha": data_sha,
        }  # fmt: skip
        config = {"data": {"name": "python_docs"}}
        return self._run("language_model", epochs, "tokens", data, name, config, data_sha, weights)

    def samples(
        self, epochs, *, name="regression", names=None, unit="samples", goals=None, data_sha="f" * 64, config=None
    ):
        """A run of a foreign workload whose epochs have these losses, or these arrays."""
        made = [
            x if isinstance(x, dict) else {"index": np.arange(len(x)), "loss": np.asarray(x, dtype=np.float32)}
            for x in epochs
        ]
        n = len(made[0]["loss"])
        data = {"kind": "samples", "train_samples": n, "val_samples": n, "train_sha": "t" * 64, "val_sha": data_sha}
        data |= {"val_names": names} if names else {}
        run = self._run("image_classification", made, "samples", data, name, config, data_sha, None)
        run.update(unit=unit, kind="samples", goals={"val_loss": "min"} if goals is None else goals)
        return run

    def random_images(self, n, classes, epochs, seed=0, **more):
        """A run that gets better from epoch to epoch and changes its mind less and less."""
        rng = np.random.default_rng(seed)
        label = rng.integers(0, classes, n)
        first = rng.integers(0, classes, n)
        made = []
        for epoch in range(1, epochs + 1):
            again = rng.random(n) < 1 / epoch
            skill = 0.3 + 0.5 * epoch / epochs
            drawn = np.where(rng.random(n) < skill, label, rng.integers(0, classes, n))
            first = np.where(again, drawn, first)
            confidence = rng.beta(3, 2, n)
            loss = np.where(first == label, -np.log(confidence), -np.log((1 - confidence) / 2))
            made.append(image_arrays(label, first, classes=classes, confidence=confidence, loss=loss))
        return self.images(made, classes, **more)


@pytest.fixture
def makes(tmp_path):
    return Makes(tmp_path / "runs")


@pytest.fixture(scope="session")
def makes_in():
    """`makes_in(folder)` is a `makes` for a fixture that several tests share."""
    return Makes


@pytest.fixture(scope="session")
def arrays():
    """`arrays.images(label, first, ...)` and `arrays.tokens(token, loss, ...)`."""

    class Arrays:
        images = staticmethod(image_arrays)
        tokens = staticmethod(token_arrays)

    return Arrays
