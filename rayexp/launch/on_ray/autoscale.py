"""Machines that are not there yet: under an autoscaler, a run counts on what it can add, and waits for it."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import yaml

from rayexp.config import ExperimentConfig
from rayexp.errors import RunError, UserError
from rayexp.launch import placement as planning
from rayexp.launch.on_ray import session
from rayexp.launch.placement import Node, Placement, capacity

BOOTSTRAP = "~/ray_bootstrap_config.yaml"  # `ray up` writes it on the head, where drivers run
WAIT_S = 1800.0  # for machines to be found, booted and set up


def provide(config: ExperimentConfig, say: Callable[[str], None], stopped: Callable[[], bool]) -> Placement:
    """A plan whose machines are there; asks the autoscaler for those that are missing.

    An elastic run starts with what is there, if that is enough for its smallest number of workers.

    Raises:
        UserError: more than the cluster has, or can get, is asked for.
        RunError: the machines did not come within WAIT_S.
        KeyboardInterrupt: it was asked to stop while it waited.
    """
    nodes = session.nodes()
    more = addable(nodes)
    if isinstance(config.scaling.num_workers, tuple):
        with contextlib.suppress(UserError):
            return planning.make(config, nodes)
    plan = planning.make(config, [*nodes, *more])
    if not more or _fits(plan, nodes):
        return plan
    import ray.util

    say(f"waiting for machines: {plan}")
    # Other than request_resources, a placement group ends with its driver, however that ends.
    size = {"CPU": plan.cpus or 1.0} | ({"GPU": plan.gpus} if plan.gpu else {})
    group = ray.util.placement_group([size] * plan.workers)
    until = time.monotonic() + WAIT_S
    try:
        while not group.wait(1):
            if stopped():
                raise KeyboardInterrupt
            if time.monotonic() > until:
                raise RunError(f"waited {WAIT_S / 60:.0f} min for the autoscaler; `ray status` on the head says why")
    finally:
        ray.util.remove_placement_group(group)
    return plan


def addable(nodes: list[Node]) -> list[Node]:
    """The machines that the autoscaler may add to these; none where there is no autoscaler."""
    path = Path(BOOTSTRAP).expanduser()
    if not path.is_file():
        return []
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    there = Counter((node.cpus, node.gpus) for node in nodes)
    room = config["max_workers"] - (len(nodes) - 1)
    found = []
    for name, kind in config["available_node_types"].items():
        if name == config["head_node_type"] or not kind["resources"]:
            continue
        cpus, gpus = (float(kind["resources"].get(word, 0)) for word in ("CPU", "GPU"))
        left = int(kind.get("max_workers", config["max_workers"])) - there[cpus, gpus]
        found += [Node(f"{name} (not started)", cpus, gpus)] * max(0, min(left, room))
    return found


def _fits(plan: Placement, nodes: list[Node]) -> bool:
    return capacity(nodes, plan.cpus or 1.0, plan.gpus) >= plan.workers
