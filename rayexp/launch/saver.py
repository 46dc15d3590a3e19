"""What the first worker writes of its training: snapshots, finished epochs, the model's graph.

All of it is written in a background thread from a copy, so that training goes on meanwhile. The next snapshot or epoch
overwrites the copy, so it waits until the one before is on disk.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rayexp.engine import checkpoint
from rayexp.engine.checkpoint import CheckpointWriter, State
from rayexp.launch.step_log import CURVES
from rayexp.runs.manifest import digest
from rayexp.runs.records import EpochRecord, Predictions
from rayexp.runs.writer import RunWriter


class Saver:
    """Writes through a RunWriter in the background. An error there is raised by the next call, or by `wait` or `close`.

    Args:
        writer: writes the run directory.
        metadata: what state.json says beside the state: `fingerprint`, `data` (its hashes), `config`.
    """

    def __init__(self, writer: RunWriter, metadata: Mapping[str, Any]) -> None:
        self.writer, self.metadata = writer, metadata
        self._background = CheckpointWriter()
        self._buffers: dict[str, Any] = {}  # the tensors of the copy, by name, on the CPU

    def idle(self) -> bool:
        """Whether nothing is being written."""
        return self._background.idle()

    def wait(self) -> None:
        """Return when all is on disk."""
        self._background.wait()

    def close(self) -> None:
        """`wait`, and end the thread."""
        self._background.close()

    def copy(self, state: State) -> State:
        """A copy that is good until the next one; waits until the last one is on disk."""
        self._background.wait()
        return checkpoint.snapshot(state, self._buffers)

    def snapshot(self, step: int, copied: State, curves: Mapping[str, Any]) -> None:
        """Write a checkpoint inside an epoch.

        Args:
            step: steps of the whole run that are done.
            copied: from `copy`.
            curves: of the epoch's steps so far, from `StepLog.curves`.
        """
        metadata = {**self.metadata, CURVES: curves}
        self._background.submit(lambda: self.writer.snapshot(step, checkpoint.encode(copied, metadata)))

    def epoch(self, record: EpochRecord, copied: State, predictions: Predictions, steps: Mapping[str, Any]) -> None:
        """Write a finished epoch, with the hashes of what is in it.

        Args:
            record: the epoch's line, without hashes.
            copied: from `copy`.
            predictions: of the validation data.
            steps: its line of steps.jsonl, from `StepLog.end`.
        """

        def write() -> None:
            archive = predictions.to_npz()
            weights, state = checkpoint.sha(copied.weights()), checkpoint.sha(copied.tensors)
            hashed = dataclasses.replace(record, weights_sha=weights, state_sha=state, predictions_sha=digest(archive))
            line = hashed.to_json()
            hashes = {"weights_sha": weights, "state_sha": state}
            files = checkpoint.encode(copied, {**self.metadata, **hashes, "record": line})
            self.writer.epoch(line, files, archive, steps)

        self._background.submit(write)

    def graph(self, model: Any, example: tuple[Any, ...], failed: Callable[[str], None]) -> None:
        """Draw a model for TensorBoard.

        Args:
            model: a torch.nn.Module; it is copied.
            example: what its forward takes, on the CPU.
            failed: called in the background with a line that says why the model cannot be drawn.
        """
        from rayexp.runs.tensorboard import graph_events

        # Tracing runs the model twice, with gradients and without, and refuses one that takes another way each time, as
        # torch.nn.MultiheadAttention does (of ViT and Swin). Without parameters to train it takes the same.
        drawn = copy.deepcopy(model).cpu().eval().requires_grad_(False)

        def draw() -> None:
            events, why = graph_events(drawn, example)
            self.writer.graph(events)
            if why:
                failed(f"TensorBoard has no graph of this model: it cannot be traced ({why})")

        self._background.submit(draw)
