"""An elastic run on a cluster whose nodes come and go. Not beside test_on_ray: its session would be used instead."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rayexp.config import ExperimentConfig
from rayexp.launch.audit import audit
from rayexp.launch.driver import run
from rayexp.runs.run import Run

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_an_elastic_run_grows_and_shrinks_with_its_cluster(
    tiny: Callable[..., ExperimentConfig],
    tmp_path: Path,
    until: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.cluster_utils import Cluster

    from rayexp.launch.on_ray import supervise

    monkeypatch.setattr(supervise, "GROW_S", 0.5)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # a Cluster's nodes are started without
    elastic = {"num_workers": (1, 2), "cpus_per_worker": 1}
    config = tiny(epochs=5000, checkpoint={"every_steps": 5}, scaling=elastic)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ended: list[BaseException] = []

    def train() -> None:
        try:
            run(config, argv=[], address=cluster.address)
        except BaseException as error:
            ended.append(error)

    def size() -> int:
        records = [record for made in Run.all(tmp_path / "runs") for record in made.records()]
        return records[-1].world_size if records else 0

    training = threading.Thread(target=train)
    training.start()
    try:
        until(lambda: not training.is_alive() or size() == 1)
        node = cluster.add_node(num_cpus=1)
        until(lambda: not training.is_alive() or size() == 2)
        cluster.remove_node(node, allow_graceful=False)
        until(lambda: not training.is_alive() or size() == 1)
        (made,) = Run.all(tmp_path / "runs")
        monkeypatch.setattr(supervise, "GROW_S", 1e9)
        made.stop_path.touch()
        training.join(60)
        assert isinstance(ended[0], KeyboardInterrupt)
    finally:
        cluster.shutdown()
    assert {record.world_size for record in made.records()} == {1, 2}
    found = audit(made, segments=3)
    assert (found.trained_with, found.workers, found.outcome) == ((1, 2), 0, "proven")
    alone = run(tiny(epochs=made.records()[-1].epoch), argv=[])
    assert [record.state_sha for record in alone.records()] == [record.state_sha for record in made.records()]
