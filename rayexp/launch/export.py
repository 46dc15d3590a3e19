"""A checkpoint as a file for others: a state_dict, safetensors, or ONNX."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayexp.display import plain
from rayexp.errors import UserError
from rayexp.runs.run import Run
from rayexp.system.disk import write_atomic

FORMATS = (".pt", ".safetensors", ".onnx")


@dataclass(frozen=True, slots=True)
class Export:
    """What was written.

    Attributes:
        path: the model.
        beside: for .pt the JSON with `about`, since a plain state_dict holds tensors alone; the other formats have it
            in their metadata, None.
        build: lines of Python that build a `model` for the weights without rayexp; for .onnx empty.
        about: what a user must know: classes or vocabulary, how inputs are prepared, where the model comes from.
    """

    path: Path
    beside: Path | None
    build: tuple[str, ...]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As `rayexp export --json` prints it."""
        return {"path": str(self.path), "beside": self.beside and str(self.beside), **self.about}


def export(run: Run, epoch: int, to: Path, force: bool = False) -> Export:
    """Write the model after an epoch; the suffix of `to` says as what.

    Args:
        force: replace files that are there.

    Raises:
        UserError: another suffix, a file is there, the epoch has no checkpoint, or ONNX is not installed.
        RunError: the checkpoint is damaged, or the model has no form in ONNX.
        WriteError: the file cannot be written.
    """
    if to.suffix not in FORMATS:
        raise UserError(f"--to: {to} ends in none of {', '.join(FORMATS)}")
    beside = to.with_suffix(".json") if to.suffix == ".pt" else None
    for path in (to, beside):
        if path is not None and path.is_dir():
            raise UserError(f"--to: {path} is a folder; give a file in it")
        if path is not None and path.exists() and not force:
            raise UserError(f"--to: {path} is there already; --force replaces it")
    from rayexp.engine import portable
    from rayexp.workloads.saved import open_portable

    model = open_portable(run, epoch)
    about = dict(plain(dict(model.about)))
    encode = {".pt": portable.to_pt, ".safetensors": portable.to_safetensors, ".onnx": portable.to_onnx}[to.suffix]
    data = encode(model)
    if beside is not None:
        before = beside.read_bytes() if beside.exists() else None
        write_atomic(beside, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    try:
        write_atomic(to, data)
    except BaseException:
        if beside is not None:
            with contextlib.suppress(OSError):
                beside.unlink() if before is None else write_atomic(beside, before)
        raise
    return Export(to, beside, () if to.suffix == ".onnx" else model.build, about)
