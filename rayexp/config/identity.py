"""What of a configuration decides which model is trained, its seed apart: the key under which the noise between seeds
is kept."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from rayexp.config.code import code_sha, read_code
from rayexp.config.experiment import ExperimentConfig
from rayexp.errors import UserError

# Names and places, and who computes what, where and how. Some of these change the rounding, none the mathematics.
ELSEWHERE = (
    "name",
    "seed",
    "storage_path",
    "scaling",
    "checkpoint",
    "max_failures",
    "data.root",
    "data.resident",
    "threads_per_shard",
    "cpu_kernels",
    "compile",
    "capture",
    "tracking",
)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested mapping under dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return leaves


def identity(config: ExperimentConfig) -> dict[str, Any]:
    """The dotted keys, but for those of ELSEWHERE and `epochs`, that are set to something else than their default. So
    keys that a later rayexp adds change no identity. Code that travels counts by its content, wherever it lies."""
    leaves = flat(config.model_dump(mode="json", exclude_defaults=True))
    if config.code:
        leaves["code"] = code_content(config)
    return {key: leaves[key] for key in sorted(leaves) if key != "epochs" and not _elsewhere(key)}


def identity_key(config: ExperimentConfig) -> str:
    """sha256 of the identity, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True, default=str).encode()).hexdigest()


def code_content(config: ExperimentConfig) -> str | None:
    """The hash of the code that travels; None where there is none, its places where it cannot be read."""
    if not config.code:
        return None
    try:
        return code_sha(read_code(config.code))
    except UserError:
        return ", ".join(config.code)


def _elsewhere(key: str) -> bool:
    return any(key == part or key.startswith(f"{part}.") for part in ELSEWHERE)
