"""The job of a worker crosses from process to process as JSON, whole and with nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayexp.config import ExperimentConfig, parse
from rayexp.errors import UserError
from rayexp.launch import driver
from rayexp.launch.job import WorkerJob
from rayexp.launch.placement import Placement
from rayexp.runs.run import Run
from rayexp.system.clock import mark

CONFIG = parse(
    {
        "workload": "image_classification",
        "data": {"name": "shapes", "max_train_samples": 128},
        "model": {"name": "resnet18", "width": 0.1},
        "shards": 4,
        "lr": 0.1 + 0.2,
        "scaling": {"num_workers": [1, 4]},
        "checkpoint": {"every_seconds": 0.5},
    },
    ExperimentConfig,
    "test",
)
FULL = WorkerJob(
    run=Path("/a/run"),
    config=CONFIG,
    device="cuda",
    cpus=0.25,
    started=mark(12.5),
    max_steps=3,
    trace=True,
    measure_link=True,
    timeout_s=300,
    go_on="; go on with: rayexp train --resume a",
    driver="token",
    nonce="0123",
    nodes=2,
    shared_gpu=True,
)


def test_every_field_goes_and_comes(tmp_path: Path) -> None:
    job = FULL.model_copy(update={"run": tmp_path})
    assert job.write() == tmp_path / "job.json"
    assert WorkerJob.read(tmp_path / "job.json") == job
    # So that a field that is added later is not left out above.
    for name, field in WorkerJob.model_fields.items():
        assert field.is_required() or getattr(FULL, name) != field.default, name


@given(
    st.builds(
        WorkerJob,
        run=st.just(Path("/a/run")),
        config=st.just(CONFIG),
        device=st.sampled_from(["cpu", "cuda"]),
        cpus=st.none() | st.floats(0.125, 256),
        max_steps=st.none() | st.integers(1),
        timeout_s=st.floats(0, 1e6),
    )
)
def test_what_is_read_back_is_what_was_sent(job: WorkerJob) -> None:
    assert WorkerJob.from_json(json.loads(json.dumps(job.to_json()))) == job


@pytest.mark.parametrize("name", WorkerJob.model_fields)
def test_a_missing_field_is_named(name: str) -> None:
    fields = {key: value for key, value in FULL.to_json().items() if key != name}
    with pytest.raises(UserError, match=f"^job: missing: {name}$"):
        WorkerJob.from_json(fields)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"max_step": 3}, r"job\.json: unknown: max_step \(did you mean max_steps\?\)$"),
        ({"device": "tpu"}, r"job\.json: device: expected cpu or cuda, got 'tpu'$"),
        ({"nodes": "many"}, r"job\.json: nodes: expected a whole number, got 'many'$"),
        ({"config": {"shards": 3}}, r"job\.json: config.*shards"),
    ],
)
def test_what_does_not_belong_is_refused(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(FULL.to_json() | change))
    with pytest.raises(UserError, match=line):
        WorkerJob.read(path)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text('{"run": ')
    with pytest.raises(UserError, match=r"job\.json: not JSON: "):
        WorkerJob.read(path)


def test_a_job_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        FULL.max_steps = 4  # type: ignore[misc]


def test_the_driver_makes_a_job_of_a_plan(
    tiny: Callable[..., ExperimentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[WorkerJob] = []

    def supervise(run: Run, config: ExperimentConfig, job: Callable[..., WorkerJob], *_: object) -> str:
        made.append(job(Placement(2, True, 3.0, 0.5), 2))
        made.append(job(Placement(0, False, None), 1))
        made.append(job(Placement(1, True, 1.0, 1.0), 1))
        return "done"

    monkeypatch.setattr(driver, "_supervise", supervise)
    run = driver.run(tiny(), argv=[], started=12.5, max_steps=3, trace=True, parent="a comparison")
    shared, in_process, whole = made
    assert (shared.device, shared.cpus, shared.shared_gpu, shared.nodes) == ("cuda", 3.0, True, 2)
    assert (in_process.device, in_process.cpus, in_process.shared_gpu, in_process.nodes) == ("cpu", None, False, 1)
    assert not whole.shared_gpu
    assert len({job.nonce for job in made}) == 3, "workers of a lost attempt would pass for those of the next"
    assert len({job.driver for job in made}) == 1
    assert shared.driver
    for job in made:
        assert (job.run, job.started, job.max_steps, job.trace) == (run.root, mark(12.5), 3, True)
        assert (job.measure_link, job.timeout_s) == (True, driver.TIMEOUT_S)
        assert WorkerJob.from_json(job.to_json()) == job
    driver.run(tiny(), argv=[])
    assert not made[-1].measure_link
