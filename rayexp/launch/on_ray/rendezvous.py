"""What a worker process needs before Ray Train sets up torch.distributed in it."""

from __future__ import annotations

import os

import psutil
import ray.util


def choose_interface() -> None:
    """Name the interface that carries the node's address; gloo would look up the host's name, which may not resolve."""
    address = node_address()
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def node_address() -> str:
    """The address of this process's Ray node."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
