"""A model and a dataset of one's own go to hosts that have never seen their files, and come home."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from rayexp.config import load
from rayexp.launch.driver import run
from rayexp.runs.run import Run

pytestmark = pytest.mark.netns
EXAMPLES = Path(__file__).parents[3] / "examples"
SMALL = (
    *("data.count=64", "data.image_size=16", "data.side=16", "model.width=2", "model.depth=2", "batch_size=16"),
    *("shards=2", "epochs=2", "scaling.use_gpu=false"),
)


def test_own_code_travels_to_workers_on_other_hosts_and_home(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYEXP_CACHE", str(tmp_path / "cache"))
    alone = run(
        load(EXAMPLES / "own_dataset.yaml", [*SMALL, f"storage_path={tmp_path}", "threads_per_shard=1"]), argv=[]
    )
    mine = lab.desk.disk / "mine"
    shutil.copytree(EXAMPLES, mine)
    words = (*SMALL, "threads_per_shard=1", "scaling.num_workers=2", "scaling.cpus_per_worker=2", "name=own")
    sent = lab.desk.rayexp("submit", "/mnt/mine/own_dataset.yaml", *words, "--address", lab.url, "--wait", check=False)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    shutil.rmtree(mine)
    home = lab.desk.rayexp("collect", sent.stdout.split()[0], "--address", lab.url).stdout.strip()
    copy = Run(lab.desk.disk / Path(home).relative_to("/mnt"))
    assert [record.weights_sha for record in copy.records()] == [record.weights_sha for record in alone.records()]
    hosts = {worker["host"] for worker in copy.meta()["workers"]}
    assert hosts == {"one", "two"}
    judged = lab.desk.rayexp("evaluate", f"{copy.id}@2", "--runs", str(Path(home).parent), "--json")
    assert '"equal": true' in judged.stdout
