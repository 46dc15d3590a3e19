"""Workers whose kernels round differently are refused by name under `exact`, and warned of under `ddp`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from rayexp.config import ExperimentConfig
from rayexp.engine.runtime import cpu_capability
from rayexp.errors import UserError
from rayexp.launch.alike import WorkerInfo, everyone, unlike, unlike_weights
from rayexp.launch.driver import run as train
from rayexp.launch.job import WorkerJob
from rayexp.launch.processes import free_port
from rayexp.launch.worker_fault import find
from rayexp.runs.run import Run

Tiny = Callable[..., ExperimentConfig]
Plant = Callable[[str], dict[str, str]]
needs_avx512 = pytest.mark.skipif(cpu_capability() != "AVX512", reason="AVX2 can be told from AVX-512 only there")


def colleague(rank: int, host: str = "a", sha: str = "w", **fields: Any) -> WorkerInfo:
    return WorkerInfo(rank, host, {"device": "cpu AVX512", "torch": "2", "probe": "p", **fields}, sha)


def test_alike() -> None:
    assert unlike([colleague(0)]) is None
    assert unlike([colleague(0), colleague(1, "b")]) is None
    assert unlike_weights([colleague(0), colleague(1, "b")]) is None


def test_the_odd_one_is_named_whichever_rank_it_has() -> None:
    odd = {"device": "cpu AVX2", "probe": "q"}
    said = unlike([colleague(0), colleague(1, "b", **odd), colleague(2, "c")])
    assert said == "rank 1 on b has device cpu AVX2, not cpu AVX512 as rank 0 on a (and 1 more)"
    said = unlike([colleague(0, **odd), colleague(1, "b"), colleague(2, "c")])
    assert said == "rank 0 on a has device cpu AVX2, not cpu AVX512 as rank 1 on b (and 1 more)"
    assert unlike([colleague(0), colleague(1, "b", probe="q")]) == "rank 1 on b has probe q, not p as rank 0 on a"


def test_many_kinds_stay_one_line() -> None:
    said = unlike([colleague(rank, f"h{rank}", torch=str(rank)) for rank in range(8)])
    assert said is not None
    assert said.count("rank") == 4
    assert said.endswith("and 4 kinds more")


def test_other_weights_are_named() -> None:
    said = unlike_weights([colleague(0), colleague(1, "b"), colleague(2, "c", sha="v" * 64)])
    assert said == "rank 2 on c starts from other weights (vvvvvvvvvvvv) than rank 0 on a (w)"


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let a run in this process see another worker beside itself, on the host `b`, which differs from it."""

    def see(device: str | None = None, sha: str | None = None) -> None:
        def both(group: Any, host: str, fingerprint: Any, own: str) -> list[WorkerInfo]:
            theirs = {**fingerprint, **({"device": device} if device else {})}
            return [*everyone(group, host, fingerprint, own), WorkerInfo(1, "b", theirs, sha or own)]

        monkeypatch.setattr("rayexp.launch.worker.everyone", both)

    return see


def test_exact_refuses_a_worker_that_differs(tiny: Tiny, beside: Callable[..., None], tmp_path: Path) -> None:
    for differs, said in (
        ({"device": "another"}, r"workers that compute alike, and rank 1 on b has device another, not .*"),
        ({"sha": "v" * 64}, r"the same weights everywhere, and rank 1 on b starts from other weights \(vvv.*"),
    ):
        beside(**differs)
        with pytest.raises(UserError, match=rf"^reduction: exact needs {said}; allowed here: ddp$"):
            train(tiny(), argv=["test"])
    assert Run.all(tmp_path / "runs") == []


@pytest.mark.parametrize("differs", [{"device": "another"}, {"sha": "v" * 64}])
def test_ddp_trains_with_a_worker_that_differs(
    tiny: Tiny, beside: Callable[..., None], differs: dict[str, str]
) -> None:
    beside(**differs)
    made = train(tiny(reduction="ddp", epochs=1), argv=["test"], max_steps=2)
    warned = [line for line in made.meta()["warnings"] if "do not compute alike: rank 1 on b has device" in line]
    assert len(warned) == ("device" in differs)
    assert [worker["host"] for worker in made.meta()["workers"]][1] == "b"


# ---------------------------------------------------------------------- workers


class Workers:
    """Worker processes of one run, each with its own environment."""

    def __init__(self, config: ExperimentConfig, *environments: dict[str, str], **fields: Any) -> None:
        self.run = Run.create(config, argv=["test"])
        self.run.logs.mkdir(exist_ok=True)
        path = WorkerJob(run=self.run.root, config=config.absolute(), device="cpu", cpus=1, **fields).write()
        address = f"127.0.0.1:{free_port()}"
        command = (sys.executable, "-m", "rayexp.launch.process_worker")
        self.processes = [
            subprocess.Popen(
                [*command, str(path), str(rank), str(len(environments)), address, str(os.getpid())],
                env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", **env},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, env in enumerate(environments)
        ]

    def end(self) -> list[tuple[int, str]]:
        """Exit code and last line of each."""
        try:
            said = [process.communicate(timeout=240)[0].strip().splitlines() for process in self.processes]
        finally:
            for process in self.processes:
                process.send_signal(signal.SIGKILL)
        return [
            (process.returncode, lines[-1] if lines else "")
            for process, lines in zip(self.processes, said, strict=True)
        ]


@pytest.fixture
def plant(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """An environment in which Python runs this code first."""

    def make(code: str) -> dict[str, str]:
        (tmp_path / "planted").mkdir()
        (tmp_path / "planted" / "sitecustomize.py").write_text(code)
        return {"PYTHONPATH": f"{tmp_path / 'planted'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    return make


# As if the initialisation gave other weights.
OTHER_WEIGHTS = """
from rayexp.engine import order
key = order.key
order.key = lambda seed, purpose, *n: key(seed + purpose.startswith("init"), purpose, *n)
"""
SLOW = """
import time
from rayexp import workloads
open_workload = workloads.open_workload
workloads.open_workload = lambda config: time.sleep(9) or open_workload(config)
"""


@pytest.mark.slow  # in one process: test_exact_refuses_a_worker_that_differs
@needs_avx512
def test_exact_refuses_an_avx2_worker_beside_an_avx512_one(tiny: Tiny) -> None:
    workers = Workers(tiny(), {}, {"ATEN_CPU_CAPABILITY": "avx2"})
    ended = workers.end()
    assert all(code != 0 for code, _ in ended)
    # The slower one may fail because the other has ended already.
    line = next(str(found) for _, line in ended if isinstance(found := find(line), UserError))
    assert line.startswith("reduction: exact needs workers that compute alike, and rank 1 on ")
    assert "device cpu x86_64 AVX2, not cpu x86_64 AVX512 as rank 0 on" in line
    assert line.endswith("allowed here: ddp")
    assert workers.run.records() == []
    assert not (workers.run.root / "trace.jsonl").exists()


@pytest.mark.slow  # in one process: test_ddp_trains_with_a_worker_that_differs
@needs_avx512
def test_ddp_warns_and_starts_from_the_same_weights(tiny: Tiny, plant: Plant) -> None:
    planted = {**plant(OTHER_WEIGHTS), "ATEN_CPU_CAPABILITY": "avx2"}
    workers = Workers(tiny(reduction="ddp", epochs=1), {}, planted, trace=True, max_steps=2)
    assert [code for code, _ in workers.end()] == [0, 0]
    log = (workers.run.logs / "rank_0.log").read_text()
    assert "the workers do not compute alike: rank 1 on" in log
    meta = workers.run.meta()
    assert [worker["rank"] for worker in meta["workers"]] == [0, 1]
    assert [worker["fingerprint"]["device"].split()[-1] for worker in meta["workers"]] == ["AVX512", "AVX2"]
    assert meta["workers"][0]["fingerprint"] == meta["fingerprint"]
    assert meta["workers"][0]["host"]
    # The second worker took the weights of the first: both together get nearly what one alone gets.
    alone = train(tiny(reduction="ddp", epochs=1), argv=["test"], max_steps=2)
    one, other = (_weights(run) for run in (workers.run, alone))
    for name, weight in one.items():
        assert torch.allclose(weight, other[name], rtol=0, atol=1e-6), name


def _weights(run: Run) -> dict[str, torch.Tensor]:
    newest, _ = next(iter(run.resumable()))
    return safetensors.torch.load_file(newest / "state.safetensors")


@pytest.mark.slow  # in one process: test_exact_refuses_a_worker_that_differs
def test_exact_refuses_other_initial_weights(tiny: Tiny, plant: Plant) -> None:
    workers = Workers(tiny(), {}, plant(OTHER_WEIGHTS))
    ended = workers.end()
    assert all(code != 0 for code, _ in ended)
    assert any("exact needs the same weights everywhere, and rank 1 on " in line for _, line in ended)


# ---------------------------------------------------------------------- patience


@pytest.mark.slow
@pytest.mark.parametrize("slow", [0, 1])
def test_a_worker_that_packs_for_longer_than_the_limit_is_waited_for(tiny: Tiny, plant: Plant, slow: int) -> None:
    environments = [{}, {}]
    environments[slow] = plant(SLOW)
    workers = Workers(tiny(epochs=1), *environments, timeout_s=4, max_steps=2)
    assert workers.end() == [(0, ""), (0, "")]
