"""Hashes of the files that are read back from a run directory.

    state.json   has a seal: `sha256` over everything else in it, which includes the hashes of the checkpoint's other
                 files, the configuration, and the data's hashes
    run.json     `files`: name -> sha256 of config.yaml, data.json and weights.safetensors, and of epochs.jsonl,
                 steps.jsonl and metrics.csv once the run has ended
    epochs.jsonl `predictions_sha`: the sha256 of each epoch's predictions as training stored them
    predictions  have a seal at the file's end where `evaluate` made them again with other bytes (`seal_predictions`)

Runs of the first version have none of these; what can be checked without a hash is checked there too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rayexp.errors import UserError
from rayexp.runs.records import one_line
from rayexp.system.disk import inside, read_file

SEAL = "sha256"
WEIGHTS = "weights.safetensors"  # what a run starts from, where it does not draw its weights
_SEAL_BYTES = 2 * 64  # two sha256 in hexadecimal
# The fields of state.json that a resume reads, and their types.
STATE: Mapping[str, type | tuple[type, ...]] = {
    "epoch": int,
    "step": int,
    "step_in_epoch": int,
    "steps": int,
    "schedule": dict,
    "loss_sum": (int, float),
    "loss_count": int,
    "files": dict,
}
CONFIG = ("name", "workload", "data", "model", "epochs", "batch_size", "lr", "seed")
DATA = ("kind", "val_sha")


def digest(data: bytes) -> str:
    """sha256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def seal_predictions(npz: bytes, weights_sha: str) -> bytes:
    """Add a seal to the predictions that `evaluate` made, as the comment of their ZIP archive: the sha256 of the
    checkpoint's weights, then a sha256 over all bytes before the seal and that first hash. numpy reads it as usual."""
    body = npz[:-2] + _SEAL_BYTES.to_bytes(2, "little")  # the comment's length, at the end of an archive without one
    return body + _predictions_seal(body, weights_sha)


def has_valid_seal(npz: bytes, weights_sha: str) -> bool:
    """Whether the file ends with the seal that `seal_predictions` adds for these weights."""
    body, seal = npz[:-_SEAL_BYTES], npz[-_SEAL_BYTES:]
    return seal == _predictions_seal(body, weights_sha)


def _predictions_seal(body: bytes, weights_sha: str) -> bytes:
    return f"{weights_sha}{digest(body + weights_sha.encode())}".encode()


def sealed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of state.json with their seal."""
    plain = json.loads(json.dumps({k: v for k, v in fields.items() if k != SEAL}))
    return {**plain, SEAL: _seal(plain)}


def _seal(plain: Mapping[str, Any]) -> str:
    return digest(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())


def state_fault(state: Any, name: str) -> str | None:
    """What is wrong with the content of state.json in the checkpoint directory `name` (`epoch_007`, `step_00000123`),
    or None."""
    if not isinstance(state, dict):
        return "no JSON object"
    if SEAL in state and _seal({k: v for k, v in state.items() if k != SEAL}) != state[SEAL]:
        return "its content has not the hash that it names"
    for key, kind in STATE.items():
        if key not in state:
            # A valid seal means the file is as it was written, but perhaps not by training: it may hold only weights.
            if SEAL in state and key != "files":
                continue
            return f"{key} is missing"
        if not isinstance(state[key], kind) or isinstance(state[key], bool):
            return f"{key}: {state[key]!r}"
    if SEAL not in state and not {"factor", "best"} <= state["schedule"].keys():
        return f"schedule: {state['schedule']!r}"
    if not state["files"] or not all(isinstance(sha, str) for sha in state["files"].values()):
        return f"files: {state['files']!r}"
    if STATE.keys() <= state.keys():
        epoch, step, inner, steps = (int(state[key]) for key in ("epoch", "step", "step_in_epoch", "steps"))
        if epoch < 0 or not 0 <= inner <= steps or step != epoch * steps + inner:
            return f"step {step} is not step {inner} of {steps} after epoch {epoch}"
    kind_of, _, number = name.partition("_")
    if number.isdecimal() and state.get(kind_of, int(number)) != int(number):
        return f"it is of {kind_of} {state[kind_of]}"
    return None


def broken(checkpoint: Path) -> str | None:
    """Why a checkpoint directory cannot be used, or None.

    A usable one has an intact state.json that belongs to this directory, and every file has the hash named there.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_bytes())
        if why := state_fault(state, checkpoint.name):
            return f"state.json is damaged ({why})"
        for name, sha in state["files"].items():
            with inside(checkpoint, name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha:
                return f"{name} is damaged (sha256 {found[:12]}, expected {sha[:12]})"
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name} cannot be read ({error.strerror})"
    except (ValueError, RecursionError, UserError) as error:
        return f"state.json is damaged ({error})"
    return None


def file_fault(data: bytes, name: str, files: Mapping[str, str]) -> str | None:
    """What is wrong with config.yaml, data.json, epochs.jsonl or steps.jsonl, or None.

    Args:
        files: the manifest in run.json. A file that it does not name is checked for the keys that it must have.
    """
    if name in files:
        found, wanted = digest(data), str(files[name])
        return None if found == wanted else f"not what the run wrote (sha256 {found[:12]}, expected {wanted[:12]})"
    if name == "config.yaml":
        return _lacks(_yaml(data), CONFIG, "no resolved configuration")
    if name == "data.json":
        return _lacks(_json(data), DATA, "no description of data")
    return None


def _lacks(tree: Any, keys: tuple[str, ...], what: str) -> str | None:
    if not isinstance(tree, dict):
        return what
    missing = [key for key in keys if key not in tree]
    return f"{what}: {', '.join(missing)} missing" if missing else None


def _yaml(data: bytes) -> Any:
    try:
        return yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def read_meta(path: Path, newest: int) -> dict[str, Any]:
    """run.json.

    Args:
        newest: the layout that is known here.

    Raises:
        UserError: it is not a run's, is damaged, or was written by a newer rayexp.
    """
    try:
        meta = json.loads(read_file(path))
        layout = meta["layout"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a run's description ({one_line(error)})") from error
    if not isinstance(layout, int) or layout > newest:
        raise UserError(f"{path}: layout {layout} is newer than this rayexp knows ({newest}); upgrade rayexp")
    if not isinstance(meta.get("status"), str):
        raise UserError(f"{path}: damaged, it has no status")
    return dict(meta)
