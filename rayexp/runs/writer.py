"""The run writer: everything that training writes into a run directory goes through a RunWriter.

Its methods take only plain values and bytes, so that the writer may live in another process than training (on several
hosts it is a Ray actor on the driver's host). An epoch's predictions are written first, then its line in steps.jsonl,
then its checkpoint, then its line in epochs.jsonl: a line there means that the rest of the epoch is on disk, and a
checkpoint that its steps are.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayexp.config import UNDECIDED
from rayexp.config.code import FOLDER
from rayexp.runs import metrics_csv
from rayexp.runs.code import code_of
from rayexp.runs.manifest import SEAL, STATE, WEIGHTS, digest, state_fault
from rayexp.runs.records import EpochRecord, read_lines, step_line
from rayexp.runs.retention import prune
from rayexp.runs.run import Run, broken, epoch_name, step_name
from rayexp.system.clock import since
from rayexp.system.disk import append_line, now, remove_directory, sweep, write_atomic, write_directory

if TYPE_CHECKING:
    from rayexp.runs.trackers.tracker import Tracker

KEEP_SNAPSHOTS = 2
GROWING = ("epochs.jsonl", "steps.jsonl", metrics_csv.FILE)  # the manifest names them once the run has ended


class RunWriter:
    """Writes one run. Use it from one process at a time."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._trackers: list[Tracker] | None = None  # None: not opened yet
        self._ends: dict[Path, int] = {}  # the last epoch in each file that holds one line per epoch
        self._rows: list[dict[str, Any]] | None = None  # the lines of epochs.jsonl; None: not read yet

    # ------------------------------------------------------------------ reading for a resume

    def resume(self) -> tuple[dict[str, bytes] | None, list[str]]:
        """Repair the run and read the checkpoint from which to resume.

        Removes what a killed writer left behind, restores a record that was lost between the checkpoint and
        epochs.jsonl, and drops the records of epochs after the checkpoint.

        Returns:
            The files of the newest intact checkpoint by name (None: start from the beginning), and one line for each
            damage: a newer checkpoint that was skipped, an older one with a damaged state.json, a repaired file.
        """
        sweep(self.run.root)
        sweep(self.run.checkpoints)
        sweep(self.run.root / "predictions")
        notes = []
        for name in self.run.files():
            # The driver has refused another config.yaml; weights are the user's, and a whole checkpoint has them all.
            if name not in ("config.yaml", WEIGHTS) and (why := self.run.fault(name)):
                notes.append(f"{name}: {why}; it is made anew")
        self.run.uncover(*GROWING)
        files: dict[str, bytes] | None = None
        done = 0
        for path, state in self.run.resumable():
            why = broken(path) if files is None else state_fault(state, path.name)
            if not why and not STATE.keys() <= state.keys():
                why = f"state.json lacks {', '.join(sorted(STATE.keys() - state.keys()))}"
            if why:
                notes.append(f"{path.name}: passed over, {why}")
            elif files is None:
                done, files = int(state["epoch"]), {file.name: file.read_bytes() for file in path.iterdir()}
        if files is None and notes and any(self.run.resumable()):
            notes.append("no checkpoint is whole: starting from the beginning")
        return files, [*notes, *self._mend(done)]

    def _mend(self, done: int) -> list[str]:
        """Rewrite epochs.jsonl and steps.jsonl so that they end with epoch `done`; return one line for each damage."""
        notes: list[str] = []
        records = {
            r.epoch: r.to_json()
            for r in read_lines(self.run.epochs_path, EpochRecord.from_json, notes)
            if r.epoch <= done
        }
        for path, state in self.run.resumable():
            if path.name.startswith("epoch_") and state.get("epoch", done + 1) <= done and "record" in state:
                record = dict(state["record"])
                if SEAL in state and not state_fault(state, path.name):
                    records[record["epoch"]] = record  # a hash covers it, so it is trusted more than the line
                else:
                    records.setdefault(int(path.name.partition("_")[2]), record)
        notes = [f"{self.run.epochs_path.name}: {note}" for note in notes]
        if lost := [epoch for epoch in range(1, done + 1) if epoch not in records]:
            notes.append(f"{self.run.epochs_path.name}: the lines of epochs {lost} are lost")
        if records or self.run.epochs_path.exists():
            self._write_lines(self.run.epochs_path, [records[e] for e in sorted(records)])
        damaged: list[str] = []
        steps = [line for line in read_lines(self.run.steps_path, step_line, damaged) if line["epoch"] <= done]
        if self.run.steps_path.exists():
            self._write_lines(self.run.steps_path, steps)
        notes += [f"{self.run.steps_path.name}: {note}" for note in damaged]
        self._tabulate()
        return notes

    def code(self) -> dict[str, bytes]:
        """The files of the run's code, by name (UserError where one is damaged)."""
        return code_of(self.run.root)

    def weights(self) -> tuple[bytes, dict[str, Any]]:
        """The run's copy of the weights that it starts from, and what run.json says of them; empty where it has none
        that is whole."""
        about = self.run.meta().get("weights")
        if not isinstance(about, dict) or self.run.fault(WEIGHTS):
            return b"", {}
        return (self.run.root / WEIGHTS).read_bytes(), about

    # ------------------------------------------------------------------ writing

    def keep_weights(self, data: bytes, about: Mapping[str, Any]) -> None:
        """Keep the weights that the run starts from.

        Args:
            data: a safetensors file.
            about: for run.json.
        """
        write_atomic(self.run.root / WEIGHTS, data)
        self.run.update(weights=dict(about), files={**self.run.files(), WEIGHTS: digest(data)})

    def decide(self, key: str, value: Any) -> Any:
        """Put into config.yaml what a key that it leaves open comes to, unless an earlier attempt has decided that.

        Args:
            key: one of config.UNDECIDED.
            value: what is proposed.

        Returns:
            The value that the run has from now on.
        """
        config = self.run.config()
        if getattr(config, key) == UNDECIDED[key]:
            config = config.model_copy(update={key: value})
            self.run.write(self.run.config_path.name, config.to_yaml(FOLDER))
        return getattr(config, key)

    def note(self, fields: Mapping[str, Any]) -> None:
        """Set fields of run.json."""
        self.run.update(**fields)

    def first_step(self, began: Mapping[str, Any] | None, in_worker: float) -> None:
        """Note in run.json how long it took from the command to the first step.

        The time is taken here because the writer runs on the driver's host. Nothing is noted where it does not, or
        where an earlier worker of the same command has noted it already.

        Args:
            began: when the command began (`clock.mark`).
            in_worker: how many of these seconds passed since the worker began.
        """
        if began is None or self.run.meta().get("began") == began:
            return
        whole = since(began)
        parts = {"to_worker": max(0.0, whole - in_worker), "to_first_step": whole} if whole is not None else None
        self.run.update(began=dict(began), startup_seconds=parts)

    def begin(self, meta: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Begin training: set fields of run.json, and write the description of the data to data.json."""
        self.run.update(**meta)
        self.run.write("data.json", json.dumps(data, indent=2, default=str) + "\n")
        for tracker in self._opened():
            tracker.begin()

    def graph(self, events: bytes) -> None:
        """Store an event file that holds the model's graph beside the run's own; empty bytes store nothing."""
        if events:
            write_atomic(self.run.tb / "events.out.tfevents.0.graph", events)

    def progress(self, fields: Mapping[str, Any]) -> None:
        """Write how far the epoch is, for the driver's progress bar. Not flushed to disk: a crash makes it useless."""
        temporary = self.run.progress_path.with_suffix(".tmp")
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(dict(fields)))
            temporary.replace(self.run.progress_path)

    def snapshot(self, step: int, files: Mapping[str, bytes]) -> None:
        """Write a checkpoint inside an epoch, and keep the newest two."""
        write_directory(self.run.checkpoints / step_name(step), files)
        for old in sorted(self.run.checkpoints.glob("step_*"))[:-KEEP_SNAPSHOTS]:
            remove_directory(old)

    def epoch(
        self,
        record: Mapping[str, Any],
        files: Mapping[str, bytes],
        predictions: bytes,
        steps: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a finished epoch: its predictions, its steps (`Run.steps`), its checkpoint, its record. Then what it
        makes superfluous goes: snapshots, and checkpoints that `checkpoint.keep` does not ask for."""
        epoch = int(record["epoch"])
        write_atomic(self.run.predictions_path(epoch), predictions)
        if steps is not None:
            self._append(self.run.steps_path, steps)
        write_directory(self.run.checkpoints / epoch_name(epoch), files)
        self._append(self.run.epochs_path, record)
        self._tabulate(record)
        for old in self.run.checkpoints.glob("step_*"):
            remove_directory(old)
        prune(self.run, epoch)
        self._plot(EpochRecord.from_json(record))

    def trace(self, fields: Mapping[str, Any]) -> None:
        """Add a step's hashes to trace.jsonl, for `rayexp verify`."""
        append_line(self.run.root / "trace.jsonl", json.dumps(dict(fields)))

    def log(self, rank: int, text: str) -> None:
        """Add a line to logs/rank_<rank>.log. A log that cannot be written does not stop the training."""
        with contextlib.suppress(OSError):
            self.run.logs.mkdir(exist_ok=True)
            with (self.run.logs / f"rank_{rank}.log").open("a") as file:
                file.write(f"{now()} {text}\n")

    def end(self, status: str, error: str | None = None, **fields: Any) -> None:
        """Close the run with the status `done`, `failed` or `stopped`."""
        warnings = self._end_trackers(status)
        self.run.progress_path.unlink(missing_ok=True)
        written = (path for path in (self.run.root / name for name in GROWING) if path.is_file())
        files = self.run.files() | {path.name: digest(path.read_bytes()) for path in written}
        if warnings:
            fields = {"warnings": list(dict.fromkeys([*self.run.meta().get("warnings", ()), *warnings])), **fields}
        self.run.update(status=status, error=error, finished=now(), files=files, **fields)

    def stop_requested(self) -> bool:
        """Whether someone asked the run to save and stop."""
        return self.run.stop_path.exists()

    # ------------------------------------------------------------------ trackers

    def _opened(self) -> list[Tracker]:
        if self._trackers is None:
            from rayexp.runs.trackers.opening import opened

            self._trackers = opened(self.run)
        return self._trackers

    def plot_steps(self, first: int, loss: Sequence[float | None], lr: Sequence[float | None]) -> list[str]:
        """Tell the trackers of optimizer steps; the curves of TensorBoard are on disk when this returns.

        Args:
            first: number of the first step in the whole run, from 1. The first call of an attempt begins where an epoch
                does: what earlier attempts plotted from there on is replaced.
            loss, lr: of this step and those after it; what is None is left out.

        Returns:
            A warning, where a tracker has met with an error since the last call.
        """
        for tracker in self._opened():
            tracker.steps(first, loss, lr)
        return self._take_warnings()

    def _plot(self, record: EpochRecord) -> None:
        for tracker in self._opened():
            tracker.epoch(record)

    def _end_trackers(self, status: str) -> list[str]:
        """End what was told of this run, by this writer or by that of a worker that is gone; returns warnings."""
        if self._trackers is None:
            from rayexp.runs.trackers.opening import told

            self._trackers = told(self.run)
        for tracker in self._trackers:
            tracker.end(status)
        warnings = self._take_warnings()
        self._trackers = None
        return warnings

    def _take_warnings(self) -> list[str]:
        return [warning for tracker in self._trackers or () for warning in tracker.take_warnings()]

    # ------------------------------------------------------------------ one line per epoch

    def _append(self, path: Path, line: Mapping[str, Any]) -> None:
        """Add an epoch's line; lines of this and later epochs, left by an earlier attempt, are removed first."""
        epoch = int(line["epoch"])
        self.run.uncover(path.name)  # a driver that gave up may have put its hash into the manifest already
        if path not in self._ends:
            self._ends[path] = max((each["epoch"] for each in self._lines(path)), default=0)
        if epoch <= self._ends[path]:
            self._write_lines(path, [each for each in self._lines(path) if each["epoch"] < epoch])
        append_line(path, json.dumps(dict(line)))
        self._ends[path] = epoch

    def _lines(self, path: Path) -> list[dict[str, Any]]:
        return self.run.steps() if path == self.run.steps_path else [r.to_json() for r in self.run.records()]

    def _write_lines(self, path: Path, lines: list[dict[str, Any]]) -> None:
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._ends[path] = lines[-1]["epoch"] if lines else 0

    def _tabulate(self, record: Mapping[str, Any] | None = None) -> None:
        """Bring metrics.csv in step with epochs.jsonl; with `record`, its new last line."""
        if record is None or self._rows is None:
            self._rows = [each.to_json() for each in self.run.records()]
        else:
            self._rows = [*(row for row in self._rows if row["epoch"] < record["epoch"]), dict(record)]
        path = self.run.root / metrics_csv.FILE
        self.run.uncover(path.name)
        if self._rows:
            metrics_csv.write(path, self._rows)
        else:
            path.unlink(missing_ok=True)
