"""cluster.yaml and cluster-onprem.yaml by Ray's own schema, rayjob.yaml by KubeRay's fields; all ask for the token."""

from __future__ import annotations

import json
import re
import subprocess
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayexp.config import ExperimentConfig, load

ROOT = Path(__file__).parents[2]
LAUNCHED = ("cluster.yaml", "cluster-onprem.yaml")


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / name).read_text()))


def validate(config: dict[str, Any]) -> None:
    """By the schema that comes with Ray."""
    jsonschema = pytest.importorskip("jsonschema", reason="ray[default] brings it")
    schema = json.loads((files("ray.autoscaler") / "ray-schema.json").read_text(encoding="utf-8"))
    # For machines of one's own, `ray up` takes this key itself, before the schema.
    own = ("min_workers",) if config["provider"]["type"] == "local" else ()
    jsonschema.validate({key: value for key, value in config.items() if key not in own}, schema)


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_takes_it(name: str) -> None:
    validate(read(name))
    assert read(name)["idle_timeout_minutes"] > 0


@pytest.mark.parametrize("name", LAUNCHED)
def test_rays_schema_does_refuse(name: str) -> None:
    with pytest.raises(Exception, match="Additional properties"):
        validate({**read(name), "idle_timeout": 5})


def test_gpu_groups_from_zero_to_a_maximum() -> None:
    config = read("cluster.yaml")
    groups = {t["resources"].get("GPU", 0): t for t in config["available_node_types"].values()}
    assert set(groups) == {0, 1, 8}
    for gpus in (1, 8):
        assert groups[gpus]["min_workers"] == 0
        assert groups[gpus]["max_workers"] * gpus == 8
    assert groups[0]["max_workers"] == 0


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_start_wants_the_token_and_the_dashboard_stays_local(name: str) -> None:
    config = read(name)
    starts = [c for kind in ("head", "worker") for c in config[f"{kind}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in command for command in config["setup_commands"])
    assert "0.0.0.0" not in (ROOT / name).read_text()


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_versions_are_the_tested_ones(name: str) -> None:
    config = read(name)
    assert any("--constraint ~/rayexp/constraints.txt ~/rayexp" in c for c in config["setup_commands"])
    pinned = re.search(r"(?m)^ray==(.+)$", (ROOT / "constraints.txt").read_text())
    assert pinned
    for file in ("cluster.yaml", "rayjob.yaml", "Dockerfile"):
        found = re.findall(r"ray:(\d+\.\d+\.\d+)-|rayVersion: \"(.+)\"", (ROOT / file).read_text())
        assert found
        assert {a or b for a, b in found} == {pinned[1]}


# Fields of the custom resource that the manifest may use (KubeRay 1.5).
JOB = {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def test_the_ray_job_has_the_shape_that_kuberay_knows() -> None:
    job = read("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job["spec"]) == JOB
    cluster = job["spec"]["rayClusterSpec"]
    assert set(cluster) == CLUSTER
    assert cluster["authOptions"] == {"mode": "token"}
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    gpus = {}
    for group in cluster["workerGroupSpecs"]:
        assert set(group) == GROUP
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        gpus[container["resources"]["limits"]["nvidia.com/gpu"]] = group["maxReplicas"]
    assert gpus == {1: 8, 8: 1}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert {m["name"] for c in pod["containers"] for m in c["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_the_ray_jobs_command_is_one_that_rayexp_takes() -> None:
    words = read("rayjob.yaml")["spec"]["entrypoint"].split()
    assert words[:4] == ["python", "-m", "rayexp", "train"]
    config = load(ROOT / Path(words[4]).relative_to("/rayexp"), words[5:])
    assert isinstance(config, ExperimentConfig)
    assert config.scaling.num_workers in config.allowed_workers
    assert f"rayexp:{version('rayexp')}" in (ROOT / "rayjob.yaml").read_text()


def test_the_batch_script_for_slurm_uses_options_that_ray_has() -> None:
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import symmetric_run

    page = (ROOT / "docs" / "on-a-cluster.md").read_text()
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", page, re.DOTALL)
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    (line,) = re.findall(r"srun ray symmetric-run (.*) -- python -m rayexp train (.*)", re.sub(r"\\\n *", "", script))
    options = set(re.findall(r"--[a-z-]+", line[0]))
    assert options <= {o for command in (symmetric_run, start) for p in command.params for o in p.opts}
    assert "RAY_AUTH_MODE=token" in script
    path, *overrides = line[1].split()
    load(ROOT / path, overrides)
