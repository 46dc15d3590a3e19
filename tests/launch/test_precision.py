"""`precision: auto` is decided once a run, by all workers together, and stays."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rayexp.config import ExperimentConfig
from rayexp.engine.group import WorkerGroup
from rayexp.engine.runtime import Runtime
from rayexp.errors import UserError
from rayexp.launch.driver import run as train
from rayexp.launch.job import WorkerJob
from rayexp.launch.precision import decided, lacking
from rayexp.runs.integrity import faults
from rayexp.runs.run import Run
from rayexp.runs.writer import RunWriter

Tiny = Callable[..., ExperimentConfig]


class Device(Runtime):
    """A device of this kind, with or without bfloat16 and TF32, which came together."""

    def __init__(self, kind: str, bf16: bool) -> None:
        object.__setattr__(self, "device", torch.device(kind))
        object.__setattr__(self, "bf16", bf16)

    def has_bf16(self) -> bool:
        return bool(self.bf16)

    def has_tf32(self) -> bool:
        return bool(self.bf16)


def job_of(run: Run, config: ExperimentConfig) -> WorkerJob:
    return WorkerJob(run=run.root, config=config, device="cpu")


def made(config: ExperimentConfig) -> Run:
    return Run.create(config, argv=[])


@pytest.mark.parametrize(
    ("kind", "bf16", "expected"),
    [("cuda", True, "bf16"), ("cuda", False, "fp32"), ("cpu", True, "fp32"), ("cpu", False, "fp32")],
)
def test_the_device_decides(tiny: Tiny, kind: str, bf16: bool, expected: str) -> None:
    run = made(tiny(precision="auto"))
    job = decided(job_of(run, run.config()), WorkerGroup(), RunWriter(run), Device(kind, bf16))
    assert job.config.precision == run.config().precision == expected
    assert job.config == run.config()
    assert run.fault("config.yaml") is None


@pytest.mark.parametrize("asked", ["fp32", "tf32", "bf16"])
def test_what_is_asked_for_by_name_stays(tiny: Tiny, asked: str) -> None:
    run = made(tiny(precision=asked))
    job = job_of(run, run.config())
    assert decided(job, WorkerGroup(), RunWriter(run), Device("cuda", True)) is job
    assert run.config().precision == asked


@pytest.mark.parametrize(("first", "second"), [(("cuda", True), ("cpu", False)), (("cpu", False), ("cuda", True))])
def test_another_attempt_elsewhere_keeps_it(tiny: Tiny, first: tuple[str, bool], second: tuple[str, bool]) -> None:
    """An elastic run that finds no GPU again; its driver still knows the configuration with `auto`."""
    run = made(tiny(precision="auto"))
    job = job_of(run, run.config())
    begun = decided(job, WorkerGroup(), RunWriter(run), Device(*first))
    again = decided(job, WorkerGroup(), RunWriter(run), Device(*second))
    assert begun.config.precision == again.config.precision == run.config().precision


class Table(WorkerGroup):
    """Workers that are threads of this process."""

    def __init__(self, rank: int, shared: list[bytes], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(shared))
        object.__setattr__(self, "shared", shared)
        object.__setattr__(self, "barrier", barrier)

    def gather(self, data: bytes) -> list[bytes]:
        self.barrier.wait()
        self.shared[self.rank] = data
        self.barrier.wait()
        return list(self.shared)

    def broadcast(self, data: bytes | None) -> bytes:
        return self.gather(data or b"")[0]


@pytest.mark.parametrize("capable", [(True, True), (True, False), (False, True)])
def test_workers_agree(tiny: Tiny, capable: tuple[bool, bool]) -> None:
    run = made(tiny(precision="auto"))
    job, barrier, shared = job_of(run, run.config()), threading.Barrier(2, timeout=20), [b"", b""]
    found = ["", ""]

    def worker(rank: int) -> None:
        writer: Any = RunWriter(run) if rank == 0 else None  # only rank 0 writes
        group = Table(rank, shared, barrier)
        found[rank] = decided(job, group, writer, Device("cuda", capable[rank])).config.precision

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [run.config().precision] * 2 == ["bf16" if all(capable) else "fp32"] * 2


def test_on_a_cpu_it_trains_as_fp32(tiny: Tiny) -> None:
    here = {"use_gpu": False}
    auto, plain = (train(tiny(precision=p, epochs=1, scaling=here), argv=[]) for p in ("auto", "fp32"))
    assert auto.config().precision == "fp32"
    assert auto.records()[-1].weights_sha == plain.records()[-1].weights_sha
    assert faults(auto) == []


def test_a_run_in_bf16_is_resumed_in_bf16(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it had begun on a GPU: on with it on this CPU, by its own configuration or by the file it came from."""
    here = {"use_gpu": False}
    with monkeypatch.context() as patched:
        patched.setattr("rayexp.launch.worker.decided", _as_on_a_gpu)
        run = train(tiny(precision="auto", scaling=here), argv=[], max_steps=3)
    assert run.config().precision == "bf16"
    train(run.config(), argv=[], resume=run, max_steps=6)
    with pytest.raises(UserError, match="precision bf16 -> fp32"):
        train(tiny(precision="fp32", scaling=here), argv=[], resume=run)
    train(tiny(precision="auto", scaling=here), argv=[], resume=run)
    assert run.config().precision == "bf16"
    whole = train(tiny(precision="bf16", scaling=here), argv=[])
    assert run.records()[-1].weights_sha == whole.records()[-1].weights_sha


def _as_on_a_gpu(job: WorkerJob, group: WorkerGroup, writer: RunWriter, runtime: Runtime) -> WorkerJob:
    return decided(job, group, writer, Device("cuda", True))


@pytest.mark.parametrize(
    ("asked", "kind", "has", "expected"),
    [
        ("bf16", "cuda", False, ["precision: this GPU has no instructions for bf16"]),
        ("bf16", "cpu", False, ["precision: this processor has no instructions for bf16"]),
        ("tf32", "cuda", False, ["precision: this GPU has no TF32 (compute capability 8.0 and above have it)"]),
        ("tf32", "cpu", False, []),  # what no CPU has is told elsewhere
        ("tf32", "cuda", True, []),
        ("bf16", "cuda", True, []),
        ("fp32", "cuda", False, []),
    ],
)
def test_what_a_device_does_not_have_is_told(tiny: Tiny, asked: str, kind: str, has: bool, expected: list[str]) -> None:
    found = lacking(tiny(precision=asked), Device(kind, has))
    assert [line.rpartition("; ")[0] or line.rpartition(": ")[0] for line in found] == expected
