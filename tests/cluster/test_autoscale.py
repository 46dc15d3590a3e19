"""From zero machines to as many as a run needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rayexp.runs.run import Run


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_brings_its_machines(bare_head: Any, tiny: Path, undisturbed: list[str]) -> None:
    config = {
        "cluster_name": "pretended",
        "max_workers": 2,
        "upscaling_speed": 8.0,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": f"{bare_head.address}:{bare_head.port}",
        },
        # The pretended provider's name for it: under another, the autoscaler adds and removes heads all the time.
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "two": {
                "resources": {"CPU": 2, "object_store_memory": 80_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in ("cluster_synced_files", "initialization_commands", "setup_commands")},
        **{f"{who}_{what}_commands": [] for who in ("head", "worker") for what in ("setup", "start_ray")},
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }
    path = bare_head.home / "ray_bootstrap_config.yaml"
    path.write_text(yaml.safe_dump(config))
    bare_head.start(f"--autoscaling-config={path}", cpus=0, RAY_FAKE_CLUSTER="1", AUTOSCALER_UPDATE_INTERVAL_S="1")
    # Without a working directory: the pretended machines share one disk and would take it from each other.
    words = ("scaling.num_workers=2", "scaling.cpus_per_worker=2")
    sent = ("ray", "job", "submit", "--address", bare_head.url, "--")
    done = bare_head.run(*sent, "python", "-m", "rayexp", "train", str(tiny), *words)
    assert "waiting for machines" in done.stdout
    (run,) = Run.all(bare_head.home / "runs")
    assert [r.weights_sha for r in run.records()] == undisturbed[:2]
    assert run.records()[0].world_size == 2
