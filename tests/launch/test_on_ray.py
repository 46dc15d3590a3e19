"""Runs on a real Ray: one session for all of them, eight workers at most, two cores."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rayexp.config import ExperimentConfig
from rayexp.errors import RunError, UserError
from rayexp.launch.driver import run
from rayexp.runs.manifest import sealed
from rayexp.runs.run import Run
from rayexp.system import locks

pytestmark = pytest.mark.ray
Tiny = Callable[..., ExperimentConfig]
Until = Callable[..., None]


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray of our own for all tests of this file."""
    from rayexp.cluster import discovery
    from rayexp.launch.on_ray import session

    # Not one that happens to run on this machine.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discovery, "started_here", lambda: None)
        patch.delenv("RAY_ADDRESS", raising=False)
        with session.session(None):
            yield


def shas(made: Run) -> list[str]:
    return [record.state_sha for record in made.records()]


def workers_pids(made: Run, rank: int) -> list[int]:
    log = made.logs / f"rank_{rank}.log"
    return [int(pid) for pid in re.findall(r"pid (\d+)", log.read_text())] if log.exists() else []


def test_a_ray_for_one_run_has_no_dashboard(ray_here: None) -> None:
    import ray

    context = ray.init(ignore_reinit_error=True)
    assert not context.address_info["webui_url"]


def test_two_workers_do_what_this_process_does(tiny: Tiny, ray_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train import Result

    from rayexp.launch.on_ray.attempt import Attempt

    kept: list[str] = []
    monkeypatch.setattr(Attempt, "close", lambda attempt: kept.append(attempt.storage))
    alone = run(tiny(), argv=[])
    made = run(tiny(scaling={"num_workers": 2}), argv=[])
    told = Result.from_path(f"{kept[0]}/attempt")
    shutil.rmtree(kept[0])
    assert told.metrics is not None
    assert (told.metrics["epoch"], told.metrics["val_loss"]) == (2, made.records()[-1].val_loss)
    assert shas(made) == shas(alone)
    assert made.meta()["status"] == "done"
    assert made.meta()["world_size"] == 2
    assert [r.world_size for r in made.records()] == [2, 2]
    for rank in (0, 1):
        assert workers_pids(made, rank)[0] != os.getpid()
    assert {path.name for path in made.root.iterdir()} == {path.name for path in alone.root.iterdir()}


@pytest.mark.slow
def test_a_killed_worker_costs_no_bit(tiny: Tiny, ray_here: None, until: Until, tmp_path: Path) -> None:
    config = tiny(epochs=30, checkpoint={"every_steps": 3}, scaling={"num_workers": 2})

    def kill() -> None:
        (root,) = (tmp_path / "runs").iterdir()
        os.kill(workers_pids(Run(root), 1)[-1], signal.SIGKILL)

    killer = threading.Thread(target=lambda: (until(lambda: list(tmp_path.glob("runs/*/epochs.jsonl"))), kill()))
    killer.start()
    made = run(config, argv=[])
    killer.join()
    assert len(workers_pids(made, 1)) == 2, "there was no second attempt"
    assert "resumed at epoch" in (made.logs / "rank_0.log").read_text()
    assert shas(made) == shas(run(tiny(epochs=30), argv=[]))


def test_workers_without_the_drivers_disk_write_through_its_keeper(
    tiny: Tiny, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayexp.launch.on_ray import session, supervise

    # A nonce file that no worker finds, and a second node, as the driver sees it.
    monkeypatch.setattr(supervise, "NONCE", "elsewhere")
    nodes = session.nodes()
    monkeypatch.setattr(session, "nodes", lambda: [*nodes, *nodes])
    made = run(tiny(scaling={"num_workers": 2, "cpus_per_worker": 0.5}), argv=[])
    assert shas(made) == shas(run(tiny(), argv=[]))
    assert made.meta()["status"] == "done"
    assert workers_pids(made, 1)


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", [False, True])
def test_weights_to_start_from_and_kept_checkpoints_on_workers(
    tiny: Tiny, ray_here: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, elsewhere: bool
) -> None:
    """Also through the writer of a driver whose disk the workers have not."""
    from rayexp.launch.on_ray import session, supervise
    from rayexp.runs.manifest import WEIGHTS
    from rayexp.runs.retention import not_kept

    first = run(tiny(epochs=1), argv=[])
    file = tmp_path / "first.safetensors"
    shutil.copy(first.checkpoint(1) / "state.safetensors", file)
    model = {"name": "lstm", "emsize": 16, "nhid": 16, "nlayers": 1, "dropout": 0.2}
    changes = {
        "epochs": 4,
        "checkpoint": {"keep": 1},
        "seed": 7,
        "model": {**model, "weights": str(file), "freeze": ["encoder.*"]},
    }
    alone = run(tiny(**changes), argv=[])
    if elsewhere:
        monkeypatch.setattr(supervise, "NONCE", "elsewhere")
        nodes = session.nodes()
        monkeypatch.setattr(session, "nodes", lambda: [*nodes, *nodes])
    made = run(tiny(**changes, scaling={"num_workers": 2, "cpus_per_worker": 0.5}), argv=[])
    assert shas(made) == shas(alone)
    assert made.epochs() == alone.epochs() != [1, 2, 3, 4]
    assert not_kept(made) == not_kept(alone)
    assert (made.root / WEIGHTS).read_bytes() == (alone.root / WEIGHTS).read_bytes()
    assert made.meta()["weights"] == alone.meta()["weights"]
    assert made.meta()["frozen"] == alone.meta()["frozen"] > 0


@pytest.mark.slow
def test_mistakes_are_not_tried_again(
    tiny: Tiny, ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"model.name"):
        run(tiny(model={"name": "lstn"}, scaling={"num_workers": 2}), argv=[])
    with pytest.raises(UserError, match="4 workers of 4 CPU each can never be placed"):
        run(tiny(shards=4, scaling={"num_workers": 4, "cpus_per_worker": 4}), argv=[])
    from rayexp.launch.on_ray import session

    # Where there are several nodes, it is said on which one the data is missing.
    nodes = session.nodes()
    monkeypatch.setattr(session, "nodes", lambda: [*nodes, *nodes])
    missing = {"name": "text", "root": str(tmp_path / "missing")}
    with pytest.raises(UserError, match=r"^node \S+ \(\S+\): .*missing"):
        run(tiny(data=missing, scaling={"num_workers": 2, "cpus_per_worker": 0.5}), argv=[])
    assert Run.all(tmp_path / "runs") == []


def test_a_failure_of_the_training_code_is_told_in_one_line(tiny: Tiny, ray_here: None, tmp_path: Path) -> None:
    made = run(tiny(), argv=[], max_steps=2)
    newest = next(made.resumable())[0]
    words = newest / "state.json"
    state = json.loads(words.read_bytes())
    words.write_text(json.dumps(sealed({**state, "steps": state["steps"] + 100})))
    with pytest.raises(RunError, match="an epoch had") as caught:
        run(tiny(scaling={"num_workers": 2}), argv=[], resume=made)
    assert "\n" not in str(caught.value)
    assert made.meta()["status"] == "failed"
    assert len(workers_pids(made, 1)) == 1, "it was tried again"


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_workers_of_a_driver_that_has_ended_write_nothing(
    tiny: Tiny, ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int
) -> None:
    from rayexp.launch import driver
    from rayexp.launch.on_ray import session, supervise

    @contextlib.contextmanager
    def driving(made: Run, fresh: bool) -> Iterator[locks.Driver]:
        yield locks.Driver(1, "here", "a token that is not in the lock")

    monkeypatch.setattr(driver, "_driving", driving)
    if nodes == 2:  # as in test_workers_without_the_drivers_disk_write_through_its_keeper
        monkeypatch.setattr(supervise, "NONCE", "elsewhere")
        there = session.nodes()
        monkeypatch.setattr(session, "nodes", lambda: [*there, *there])
    said = r"workers were lost 1 time .*its driver has ended.*; go on with: rayexp train --resume \S+ --runs \S+$"
    with pytest.raises(RunError, match=said):
        run(tiny(scaling={"num_workers": 2, "cpus_per_worker": 0.5}, max_failures=0), argv=[])
    (made,) = Run.all(tmp_path / "runs")
    assert {path.name for path in made.root.iterdir()} <= {"run.json", "config.yaml", "logs"}
    assert workers_pids(made, 0) == []


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("raise", "OSError: [Errno 28] No space left on device"),
        pytest.param("die", "exit", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_cannot_start_names_its_host_and_the_cause(ray_here: None, how: str, why: str) -> None:
    import ray
    from ray.exceptions import RayActorError
    from ray.train import ControllerError

    from rayexp.launch.on_ray.attempt import _cause

    class Starting:
        def __init__(self) -> None:
            if how == "die":
                os._exit(1)
            raise OSError(errno.ENOSPC, "No space left on device")

        def ready(self) -> None:
            pass

    actor = ray.remote(num_cpus=0.1)(Starting).remote()
    try:
        ray.get(actor.ready.remote())
    except RayActorError:  # told by Ray Train as here
        failure = RuntimeError(f"One of the worker actors failed to initialize due to error:\n{traceback.format_exc()}")
    line = str(_cause(ControllerError(failure)))
    assert line.startswith(f"a worker could not be started on {ray.util.get_node_ip_address()}: ")
    assert why in line
    assert "\n" not in line
