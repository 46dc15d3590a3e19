"""The benchmarks that run anywhere."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """gpu.py's, in its section of bits."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    found = importlib.import_module("bench").Bench(False, torch.device("cpu"), tmp_path, {}, {})
    found.begin("bits", 1.0, float("inf"))
    return found


def test_what_the_gpu_benchmark_calls_not_ok(bench: Any) -> None:
    for way, sha, capture in (
        ("eager", "a", "eager: capture is false"),
        ("captured", "a", "graph"),
        ("2 processes", "a", None),  # ordinary runs on a CPU tell nothing
        ("4 streams", "b", "graph"),
        ("8 streams", "a", "eager: a value was asked for"),
    ):
        importlib.import_module("gpu_bits").same(bench, "lstm", way, sha, capture)
    assert [line.ok for line in bench.lines] == [True, True, True, False, False]
    assert bench.lines[3].note == "the first was a"
    assert "a value was asked for" in bench.lines[4].note


def test_the_gpu_benchmark_goes_on_after_a_failure(bench: Any) -> None:
    def fails() -> None:
        raise SystemExit("the peer failed: its last words\nand more")

    assert bench.attempt("the peer", fails) is None
    assert bench.attempt("another", lambda: 7) == 7
    bench.until = 0.0
    assert bench.attempt("a third", lambda: 7) is None
    assert [(line.what, line.ok) for line in bench.lines] == [("the peer", False), ("a third", False)]
    assert bench.lines[0].note == "SystemExit: the peer failed: its last words"
    assert "no time was left" in bench.lines[1].note


def test_the_gpu_benchmark_that_is_cut_off_has_written_what_it_found(
    bench: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = importlib.import_module("gpu")
    bench.json = bench.folder / "gpu.json"

    def section(bench: Any) -> None:
        bench.say("one", 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(
        gpu, "SECTIONS", {"bits": (9.0, lambda bench: bench.say("none", None)), "speed": (9.0, section)}
    )
    with pytest.raises(KeyboardInterrupt):
        gpu.run(bench, ["speed"])
    found = json.loads(bench.json.read_text())
    assert [line["what"] for line in found["lines"]] == ["one"]
    assert (found["complete"], found["ok"]) == (False, True)
    assert "speed: the whole section" in capsys.readouterr().err
    assert bench.write(complete=True)["complete"] is json.loads(bench.json.read_text())["complete"] is True


def test_what_a_speed_must_be(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = importlib.import_module("gpu_speed")
    monkeypatch.setattr(gpu.driver, "run", lambda config, argv: type("", (), {"meta": lambda self: {}})())
    monkeypatch.setattr(gpu, "steady", lambda run: 100.0)
    for least, times, peer in ((100, 2, 50.0), (101, 0, None), (50, 3, 50.0), (50, 3, None)):
        gpu.rate(bench, "resnet18", {}, "images", peer, gpu.Speed(least, 200, times))
    assert [line.ok for line in bench.lines] == [True, False, False, True]
    assert "2.00x of 50" in bench.lines[0].row()


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    found = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--small", "--json", str(found)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = json.loads(found.read_text())
    assert table["ok"]
    assert table["complete"]
    assert table["small"]
    assert {"cpu", "cores", "torch"} <= set(table["machine"])
    lines: dict[str, list[dict[str, object]]] = {}
    for line in table["lines"]:
        lines.setdefault(str(line["section"]), []).append(line)
    assert list(lines) == ["bits", "repeats", "workers", "speed", "recipe", "resume"]
    assert len(lines["bits"]) == 2 * 8 + 4 * 6
    assert len(lines["repeats"]) == 6
    hashes: dict[str, set[object]] = {}
    for line in (*lines["bits"], *lines["workers"], *lines["resume"]):
        hashes.setdefault(str(line["what"]).partition(",")[0], set()).add(line["value"])
    assert [len(found) for found in hashes.values()] == [1] * 6
    rates = [line for line in lines["speed"] if not str(line["what"]).startswith("the peer")]
    assert len(rates) == 6
    assert all(isinstance(line["value"], float) and line["value"] > 0 for line in rates)
    assert {line["note"] for line in lines["speed"] if line not in rates} == {"peer: not given"}
    assert {line["unit"] for line in lines["recipe"]} == {"%", "s"}


def test_the_gpu_benchmark_says_what_it_needs() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("--data and --text are needed, except with --small")
