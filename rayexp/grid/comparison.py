"""A comparison on disk: a plan of cells, one result for every cell and repeat that ran, and their run directories.

    runs/<utc>-<name>-<4 hex>/
      compare.json   status, the plan, the rows, the environment
      compare.yaml   the resolved grid;  base.yaml  its base experiment: `rayexp compare X/compare.yaml` repeats it
      cells/         an ordinary run directory for every row
      code/          the user's code, copied at the beginning: all cells run it, whatever is edited meanwhile

compare.json is rewritten whole after every row, so that a killed comparison goes on with what is missing.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from rayexp.config import CompareConfig, ExperimentConfig, read, yaml_tree
from rayexp.config.code import FOLDER, read_code
from rayexp.errors import UserError
from rayexp.runs.code import code_faults, hashes_of, keep_code, kept
from rayexp.runs.run import Run
from rayexp.system.disk import directories, find_directory, make_directory, now, read_file, write_atomic, write_json
from rayexp.system.locks import is_locked

LAYOUT = 1
PLAIN = "plain"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid.

    Attributes:
        id: `cpu-x2-exact`; names the cell in rows and run directories.
        kind: `cpu` or `gpu`.
        workers: 0 is in-process.
        devices: GPUs, or CPU cores, over all workers; what speed-up is counted against.
        precision: fp32, tf32 or bf16; auto on GPUs only, where the run decides.
        reduction: exact, ddp, or `plain`: the single-process PyTorch script, without rayexp's engine.
        skip: why it does not run, or None.
        config: the cell's whole ExperimentConfig as plain values (empty where it could not be made).
        modes: of what scaling it is a point: `strong`, `weak`, or both (one worker); none: a plain script.
        batch: the grid's batch size that it is of; with weak scaling each worker has such a batch.
    """

    id: str
    kind: str
    workers: int
    devices: float
    precision: str
    reduction: str
    skip: str | None
    config: Mapping[str, Any]
    modes: tuple[str, ...]
    batch: int

    @property
    def where(self) -> str:
        """`cpu, in-process`, `gpu x 8`, `cpu, plain script`."""
        if self.reduction == PLAIN:
            return f"{self.kind}, plain script"
        return f"{self.kind} x {self.workers}" if self.workers else f"{self.kind}, in-process"


@dataclass(frozen=True, slots=True)
class CellResult:
    """What came of one repeat of a cell.

    Attributes:
        cell: the cell's id.
        repeat: counts from 1.
        status: `done` or `failed`.
        error: one line, or None.
        run: name of the run directory under cells/; None where there is none.
        wall_seconds: from the command to the end, the workers' shutdown included.
        finished: UTC.
    """

    cell: str
    repeat: int
    status: str
    error: str | None
    run: str | None
    wall_seconds: float
    finished: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison's directory."""

    root: Path

    @classmethod
    def create(
        cls, config: CompareConfig, base: ExperimentConfig, cells: tuple[Cell, ...], fields: Mapping[str, Any]
    ) -> Comparison:
        """Make the directory under `config.storage_path`.

        Args:
            config: the grid.
            base: its base experiment, with paths made absolute.
            cells: the plan.
            fields: more for compare.json: argv, environment.

        Raises:
            UserError: the directory cannot be made, or code that is to travel is not there.
        """
        storage = config.storage_path.expanduser().resolve()
        files = read_code(next((cell.config["code"] for cell in cells if cell.config.get("code")), None))
        made = cls(make_directory(storage, config.name))
        made.cells_path.mkdir()
        code = keep_code(made.root, files)
        tree = {**config.model_dump(mode="json"), "base": "base.yaml", "storage_path": str(storage)}
        write_atomic(made.root / "base.yaml", base.to_yaml())
        write_atomic(made.root / "compare.yaml", yaml_tree.dump(tree))
        plan = [asdict(cell) for cell in cells]
        meta = {"layout": LAYOUT, "id": made.root.name, "name": config.name, "status": "running", "created": now()}
        write_json(made.meta_path, {**meta, "pid": os.getpid(), **code, **fields, "plan": plan, "rows": []})
        return made

    @classmethod
    def find(cls, name: str, storage: Path) -> Comparison:
        """The comparison whose path, directory name, or unambiguous part of that name is `name`.

        Raises:
            UserError: none or several match, or it is of a newer layout.
        """
        found = cls(find_directory(name, storage, "compare.json", "comparison"))
        found.meta()
        return found

    @classmethod
    def all(cls, storage: Path) -> list[Comparison]:
        """All comparisons in a folder, oldest first, including those that cannot be read."""
        return [cls(path) for path in directories(storage, "compare.json")]

    @property
    def id(self) -> str:
        """The directory's name."""
        return self.root.name

    @property
    def meta_path(self) -> Path:
        """compare.json"""
        return self.root / "compare.json"

    @property
    def cells_path(self) -> Path:
        """cells/"""
        return self.root / "cells"

    def with_copy(self, config: ExperimentConfig) -> ExperimentConfig:
        """A cell's configuration with the comparison's copy in the place of the code it was made of; where there is no
        copy, as it is.

        Raises:
            UserError: the copy is damaged.
        """
        meta = self.meta()
        if not hashes_of(meta):
            return config
        if faults := [f"{FOLDER}/{name}: {why}" for name, why in code_faults(self.root, meta) if why]:
            raise UserError(f"{self.id}: {faults[0]}")
        return kept(self.root, config)

    def meta(self) -> dict[str, Any]:
        """compare.json.

        Raises:
            UserError: damaged, or written by a newer rayexp.
        """
        try:
            meta = json.loads(read_file(self.meta_path))
            layout = meta["layout"]
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            raise UserError(f"{self.meta_path}: not a comparison's description ({error})") from error
        if not isinstance(layout, int) or layout > LAYOUT:
            raise UserError(
                f"{self.meta_path}: layout {layout} is newer than this rayexp knows ({LAYOUT}); upgrade rayexp"
            )
        if not (
            isinstance(meta.get("status"), str)
            and isinstance(meta.get("plan"), list)
            and isinstance(meta.get("rows"), list)
        ):
            raise UserError(f"{self.meta_path}: damaged, its status, plan or rows are missing")
        return dict(meta)

    def status(self) -> str:
        """`running`, `done`, `failed` or `stopped`; `died`: compare.json says running, but nobody holds the lock."""
        status = str(self.meta()["status"])
        return "died" if status == "running" and not is_locked(self.root) else status

    def config(self) -> CompareConfig:
        """The resolved grid."""
        return read(self.root / "compare.yaml", kind=CompareConfig)

    def base(self) -> ExperimentConfig:
        """The base experiment, without the grid's overrides."""
        return read(self.root / "base.yaml")

    def cells(self) -> list[Cell]:
        """The plan, skipped cells too (UserError where it is damaged)."""
        return self._read("plan", self._cell)

    def rows(self) -> list[CellResult]:
        """What has run so far (UserError where it is damaged)."""
        return self._read("rows", CellResult)

    def _read(self, key: str, make: Callable[..., T]) -> list[T]:
        try:
            return [make(**fields) for fields in self.meta()[key]]
        except (TypeError, KeyError) as error:
            raise UserError(f"{self.meta_path}: {key} is damaged ({error})") from error

    def _cell(self, **fields: Any) -> Cell:
        if "modes" not in fields:  # planned before a grid could hold both kinds of scaling and several batch sizes
            plain, workers = fields["reduction"] == PLAIN, max(1, fields["workers"])
            (mode,) = self.config().mode
            fields["modes"] = () if plain else (mode,)
            fields["batch"] = fields["config"].get("batch_size", 0) // (workers if mode == "weak" and not plain else 1)
        return Cell(**{**fields, "modes": tuple(fields["modes"])})

    def run(self, row: CellResult) -> Run | None:
        """The row's run directory; None where it is gone or damaged."""
        return None if row.run is None or self.lost(row) else Run(self.cells_path / row.run)

    def lost(self, row: CellResult) -> str | None:
        """Why the row's run cannot be read, or None. One damaged run keeps no other of the comparison back."""
        run = Run(self.cells_path / row.run) if row.run else None
        if run is None or not run.meta_path.is_file():
            return "its run directory is gone"
        try:
            run.meta(), run.config(), run.records(), run.steps()
        except UserError as error:
            return str(error)
        return None

    def missing(self) -> list[tuple[Cell, int]]:
        """Cells and repeats that are not done: every cell's first repeat, then every cell's second, and so on.

        Repeats are interleaved, so that a machine that grows slower or faster does so for all cells alike.
        """
        there = {(row.cell, row.repeat) for row in self.rows() if row.status == "done"}
        cells = [cell for cell in self.cells() if cell.skip is None]
        repeats = range(1, self.config().repeats + 1)
        return [(cell, repeat) for repeat in repeats for cell in cells if (cell.id, repeat) not in there]

    def add(self, row: CellResult, session: str) -> None:
        """Put a row into compare.json; one of the same cell and repeat is replaced.

        Args:
            row: what has ended.
            session: as `begin` gave it. A process that outlived its killed driver has an old one, and its row is not
                wanted: the cell is measured anew, undisturbed.
        """
        meta = self.meta()
        if meta.get("session") != session:
            return
        others = [r for r in meta["rows"] if (r["cell"], r["repeat"]) != (row.cell, row.repeat)]
        write_json(self.meta_path, {**meta, "rows": [*others, asdict(row)]})

    def begin(self) -> str:
        """A driver starts on what is missing; returns the token that its results must carry."""
        session = secrets.token_hex(8)
        self.update(status="running", error=None, finished=None, pid=os.getpid(), session=session)
        return session

    def update(self, **fields: Any) -> None:
        """Set fields of compare.json."""
        write_json(self.meta_path, {**self.meta(), **fields})
