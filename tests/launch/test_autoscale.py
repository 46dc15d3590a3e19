"""What the autoscaler may add (tests/cluster/test_autoscale.py lets it)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rayexp.launch.placement import Node

CLUSTER = {
    "max_workers": 3,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "one": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 8},
        "eight": {"resources": {"CPU": 96, "GPU": 8}, "max_workers": 1},
        "unknown": {"resources": {}, "max_workers": 1},
    },
}


def test_what_can_be_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayexp.launch.on_ray import autoscale

    monkeypatch.setattr(autoscale, "BOOTSTRAP", str(tmp_path / "bootstrap.yaml"))
    head = Node("head", 0)
    assert autoscale.addable([head]) == []  # no autoscaler
    (tmp_path / "bootstrap.yaml").write_text(yaml.safe_dump(CLUSTER))
    assert sorted(node.gpus for node in autoscale.addable([head])) == [1, 1, 1, 8]
    assert sorted(node.gpus for node in autoscale.addable([head, Node("a", 96, 8)])) == [1, 1]
    assert autoscale.addable([head, *[Node("a", 8, 1)] * 3]) == []
