"""What a driver hands to its workers: one value, which travels as plain JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from rayexp.config import ExperimentConfig
from rayexp.config.fields import explain
from rayexp.errors import UserError, nearest

FILE = "job.json"


class WorkerJob(BaseModel):
    """The work of every worker of one attempt; alike for all ranks.

    In JSON every field is written out, and reading it back takes all of them and no other: a driver and a worker of
    different versions must not guess what the other means.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    run: Path
    """The run directory: an absolute path on the driver's host."""
    config: ExperimentConfig
    """What to train, with absolute paths."""
    device: Literal["cpu", "cuda"]
    """The kind of device that the workers compute on; which GPU is a worker's own affair."""
    cpus: float | None = None
    """Cores that each worker may use, above 0; a fraction shares a core. None: all that the process may use."""
    started: Mapping[str, Any] | None = None
    """When the command began (system.clock.mark, seconds of the driver's host); None: start-up is not timed."""
    max_steps: int | None = None
    """Save and stop after that many steps, counted over the whole run. None: train to the end."""
    trace: bool = False
    """Write the sha256 of every tensor after every step to trace.jsonl (`rayexp verify`)."""
    measure_link: bool = False
    """Time bare all-reductions before training (`rayexp compare`)."""
    timeout_s: float = 1800.0
    """Seconds that workers that have joined wait for one that says nothing."""
    go_on: str = ""
    """The end of a line that says why the run has ended: the command that resumes it, as it can be typed where the
    driver runs (resuming.go_on). Empty: there is none."""

    driver: str = ""
    """On Ray: the driver's hold of the run's lock (locks.Driver.token); once it is let go, workers write no more."""
    nonce: str = ""
    """On Ray: this attempt's own word, by which a worker knows the driver's run directory when it sees it."""
    nodes: int = 1
    """On Ray: how many machines there are."""
    shared_gpu: bool = False
    """On Ray: whether several workers compute on one GPU."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, of every field."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], source: str = "job") -> Self:
        """The inverse of `to_json`.

        Args:
            fields: what came in.
            source: names it in errors.

        Raises:
            UserError: a field is missing or unknown, or a value is not allowed; the line names it.
        """
        if missing := [name for name in cls.model_fields if name not in fields]:
            raise UserError(f"{source}: missing: {', '.join(missing)}")
        if unknown := [name for name in fields if name not in cls.model_fields]:
            known = tuple(cls.model_fields)
            raise UserError(f"{source}: unknown: {', '.join(unknown)}{nearest(unknown[0], known)}")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise UserError(f"{source}: {explain(error, cls)}") from None

    def write(self) -> Path:
        """Write it into the run directory, for processes of this host; returns the file's path."""
        path = self.run / FILE
        path.write_text(json.dumps(self.to_json()))
        return path

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` wrote.

        Raises:
            UserError: as `from_json`, or the file holds no JSON.
        """
        try:
            fields = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: not JSON: {error}") from None
        return cls.from_json(fields, str(path))
