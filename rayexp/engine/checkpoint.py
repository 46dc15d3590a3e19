"""Checkpoints: the state as bytes and back, and the hashes that tell whether two models are the same.

A checkpoint is two files: state.safetensors (tensors named `model.*`, `optimizer.<buffer>.<parameter>`, and for
recurrent states `carry.<shard>.*`) and state.json (epoch, step, schedule, running sums, hashes of tensors and files).
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from rayexp.engine.settings import set_threads
from rayexp.engine.workload import Workload
from rayexp.errors import RunError
from rayexp.runs.manifest import sealed

TENSORS, FIELDS = "state.safetensors", "state.json"


@dataclass(frozen=True)
class State:
    """Everything that a run needs to continue.

    Attributes:
        fields: the plain values of state.json: `epoch` (finished epochs), `step` (global), `step_in_epoch`, `steps` (of
            an epoch), `schedule`, `loss_sum` and `loss_count` of the begun epoch.
        tensors: the tensors of state.safetensors by name, on the CPU or a GPU; they may be views.
    """

    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the model's state_dict, by name without the prefix `model.`."""
        return {n.removeprefix("model."): t for n, t in self.tensors.items() if n.startswith("model.")}


def sha(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hexadecimal) over the names, dtypes, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{tuple(tensor.shape)}|".encode())
        flat = tensor.cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def snapshot(state: State, buffers: dict[str, Tensor]) -> State:
    """Copy the state into `buffers` (host memory, allocated on first use), so that training can go on at once."""
    copies = {}
    for name, tensor in state.tensors.items():
        held = buffers.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        held.copy_(tensor)
        copies[name] = held
    return State(dict(state.fields), copies)


def encode(state: State, fields: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """The files of a checkpoint, by name.

    state.json holds the hashes of the tensors and of state.safetensors, and a seal over itself (see runs/manifest.py).

    Args:
        fields: what state.json holds beside the state's own fields.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    data = safetensors.torch.save(tensors)
    described = {
        **state.fields,
        "weights_sha": sha(state.weights()),
        "state_sha": sha(state.tensors),
        **(fields or {}),
        "files": {TENSORS: hashlib.sha256(data).hexdigest()},
    }
    return {TENSORS: data, FIELDS: json.dumps(sealed(described), indent=2).encode()}


def decode(files: Mapping[str, bytes]) -> State:
    """The inverse of `encode`. Never unpickles.

    Raises:
        RunError: a file is missing or damaged.
    """
    try:
        fields = json.loads(files[FIELDS])
        tensors = safetensors.torch.load(files[TENSORS])
    except Exception as error:
        raise RunError(f"checkpoint: cannot be read ({type(error).__name__}: {error})") from error
    return State(fields, tensors)


def load_model(workload: Workload, files: Mapping[str, bytes]) -> nn.Module:
    """The model of a checkpoint, in eval mode on the CPU.

    Raises:
        RunError: the checkpoint is damaged or of another model.
    """
    model = workload.model()
    try:
        model.load_state_dict(decode(files).weights())
    except RuntimeError as error:
        raise RunError(f"checkpoint: does not fit this model ({' '.join(str(error).split())})") from error
    return model.eval()


class CheckpointWriter:
    """Runs writes one after another in a background thread; at most one is waiting.

    An error in a write is raised by the next `submit`, `wait` or `close`.
    """

    def __init__(self) -> None:
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._thread.start()

    def submit(self, write: Callable[[], None]) -> None:
        """Queue a write; blocks while another one is queued."""
        self._check()
        self._queue.put(write)

    def idle(self) -> bool:
        """Whether nothing is being written."""
        return self._queue.unfinished_tasks == 0

    def wait(self) -> None:
        """Wait until everything is on disk."""
        self._queue.join()
        self._check()

    def close(self) -> None:
        """Finish the queued writes and end the thread."""
        self._queue.put(None)
        self._thread.join()
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self) -> None:
        set_threads(1)
        while (write := self._queue.get()) is not None:
            try:
                if self._error is None:
                    write()
            except BaseException as error:
                self._error = error
            finally:
                self._queue.task_done()
        self._queue.task_done()
