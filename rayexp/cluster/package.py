"""What a run needs wherever it is sent: a folder with the package's source, the configuration, the user's own code and
the file of weights to start from, and a command.

Data, runs and environments stay where they are. Every way of sending a run (`jobs` is Ray's) starts from here.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import rayexp
from rayexp.config import ExperimentConfig
from rayexp.config.code import FOLDER, read_code
from rayexp.errors import UserError

LIMIT = 100 * 2**20  # bytes; Ray's dashboard refuses larger packages
NAMED = 3  # files named in the refusal
CONFIG = "config.yaml"
WEIGHTS = "weights"  # the folder of the file that model.weights names


@dataclass(frozen=True, slots=True)
class Package:
    """What travels: `files` maps paths below `root` to sizes in bytes."""

    root: Path
    files: dict[str, int]

    @property
    def size(self) -> int:
        """Bytes, uncompressed."""
        return sum(self.files.values())


def pack(config: ExperimentConfig, into: Path) -> Package:
    """Copy the package's source, the user's code and the file of `model.weights`, if it lies here, into a folder, and
    write the configuration there.

    Raises:
        UserError: it is more than Ray takes (the largest files are named), or `model.weights` is a checkpoint that lies
            here.
    """
    source = Path(rayexp.__file__).parent
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in inner.parts):
            target = into / source.name / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    for name, data in read_code(config.code).items():
        target = into / FOLDER / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    config = _with_weights(config, into)
    (into / CONFIG).write_text(config.to_yaml(FOLDER), encoding="utf-8")
    files = {str(p.relative_to(into)): p.stat().st_size for p in sorted(into.rglob("*")) if p.is_file()}
    package = Package(into, files)
    if package.size > LIMIT:
        largest = sorted(files, key=lambda name: -files[name])[:NAMED]
        named = ", ".join(f"{name} ({files[name] / 2**20:,.1f} MiB)" for name in largest)
        raise UserError(
            f"the package has {package.size / 2**20:,.1f} MiB, Ray takes {LIMIT / 2**20:,.0f}; largest: {named}"
        )
    return package


def _with_weights(config: ExperimentConfig, into: Path) -> ExperimentConfig:
    """The configuration with the copied file of weights; what does not lie here is the cluster's."""
    if (text := config.model.weights) is None:
        return config
    path = Path(text).expanduser()
    if path.is_dir() or Path(text.rpartition("@")[0] or text).expanduser().is_dir():
        raise UserError(
            f"model.weights: {text} is a checkpoint on this machine, and only a file can be sent; "
            f"`rayexp export RUN@EPOCH --to weights.safetensors` writes one (a run of the cluster goes by its name)"
        )
    if not path.is_file():
        return config
    target = into / WEIGHTS / path.name
    target.parent.mkdir()
    shutil.copyfile(path, target)
    inner = config.model.model_copy(update={"weights": f"{WEIGHTS}/{path.name}"})
    return config.model_copy(update={"model": inner})


def command(python: str = "python", resume: str | None = None) -> list[str]:
    """The words that train the packed configuration; run them in the package's folder.

    Args:
        python: the interpreter there, with rayexp's dependencies.
        resume: the run there to go on with.
    """
    return [python, "-m", "rayexp", "train", CONFIG, *(["--resume", resume] if resume else [])]
