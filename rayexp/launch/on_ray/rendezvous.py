"""Where the workers of Ray Train meet. Nothing here needs PyTorch."""

from __future__ import annotations

import os
from typing import Any

from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig


class Meeting(BackendConfig):
    """Tells the workers where to meet; they join torch.distributed themselves, all at once.

    Ray's own TorchConfig does the same one phase after another: PyTorch is imported in all, then they join.
    """

    backend = "gloo"  # TorchTrainer asks for it; the workers decide

    @property
    def backend_cls(self) -> type[Backend]:
        """The actions that belong to this configuration."""
        return _Meet


class _Meet(Backend):
    share_cuda_visible_devices = True  # NCCL's direct paths between GPUs of a node need it

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_set_address, address, port)


def _set_address(address: str, port: int) -> None:
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
