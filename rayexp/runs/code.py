"""The copy of a user's code in a run's directory, `code/`: run.json has the hash of each file. All that is done with a
run afterwards takes this copy, so that a run opens, and goes on, without the files it was made of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rayexp.config import ExperimentConfig
from rayexp.config.code import FOLDER, manifest_sha, read_code
from rayexp.errors import UserError
from rayexp.runs.manifest import digest
from rayexp.system.disk import inside, write_directory

SHOWN = 5  # files named in an error


def keep_code(root: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Copy code into a run's directory; returns what run.json says of it: nothing without code."""
    if not files:
        return {}
    write_directory(root / FOLDER, files)
    hashes = {name: digest(data) for name, data in files.items()}
    return {"code": {"sha": manifest_sha(hashes), "files": hashes}}


def kept(root: Path, config: ExperimentConfig) -> ExperimentConfig:
    """The configuration with the run's copy in the place of the code it was made of."""
    return config.model_copy(update={"code": (str(root.absolute() / FOLDER),)}) if config.code else config


def hashes_of(meta: Mapping[str, Any]) -> dict[str, str]:
    """The sha256 of each file of the code, from run.json; none where there is no code."""
    code = meta.get("code")
    files = code.get("files") if isinstance(code, dict) else None
    return {str(name): str(sha) for name, sha in files.items()} if isinstance(files, dict) else {}


def code_of(root: Path) -> dict[str, bytes]:
    """The files of a run's copy, by name.

    Raises:
        UserError: a file is missing or is not what the run wrote.
    """
    meta = json.loads((root / "run.json").read_bytes())
    if faults := [f"{FOLDER}/{name}: {why}" for name, why in code_faults(root, meta) if why]:
        raise UserError(f"{root.name}: {faults[0]}")
    return {name: inside(root, f"{FOLDER}/{name}").read_bytes() for name in hashes_of(meta)}


def code_faults(root: Path, meta: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Each file of a run's code, and what is wrong with it, or None."""
    for name, sha in hashes_of(meta).items():
        try:
            found = digest(inside(root, f"{FOLDER}/{name}").read_bytes())
            yield name, None if found == sha else f"not what the run wrote (sha256 {found[:12]}, expected {sha[:12]})"
        except OSError as error:
            yield name, f"cannot be read ({error.strerror})"


def check_code(root: Path, meta: Mapping[str, Any], config: ExperimentConfig) -> None:
    """Refuse to resume a run under changed code. Files that the run has not are passed over: it goes on with its own.

    Raises:
        UserError: it names the files that differ, or the run's copy is damaged.
    """
    code_of(root)
    if config.code is None or tuple(config.code) == kept(root, config).code:
        return
    now = {name: digest(data) for name, data in read_code(config.code).items()}
    changed = [
        f"{name} {'has changed' if name in now else 'is gone'}"
        for name, sha in hashes_of(meta).items()
        if now.get(name) != sha
    ]
    if changed:
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise UserError(
            f"--resume {root.name}: the code has changed: {', '.join(changed[:SHOWN])}{more}; put the run's own back, "
            "or leave CONFIG out to go on with the copy that the run keeps"
        )
