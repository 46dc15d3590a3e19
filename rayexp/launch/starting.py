"""`model.weights`: found and read by the driver before a run begins, and kept in the run directory, so that workers on
any host, and a resume, need the user's file no more.

    weights.safetensors   the tensors by name, as the file had them
    run.json `weights`    source, sha256 of the user's file, and how they fit the model; of a run's text its vocabulary
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayexp.config import ExperimentConfig
from rayexp.errors import RunError, UserError
from rayexp.runs.manifest import WEIGHTS, broken, digest
from rayexp.runs.records import RunRef
from rayexp.runs.retention import checkpoint_of
from rayexp.runs.run import Run
from rayexp.runs.writer import RunWriter

if TYPE_CHECKING:
    from rayexp.engine.group import WorkerGroup

STATE = "state.safetensors"


@dataclass(frozen=True, slots=True)
class Source:
    """Where weights come from.

    Attributes:
        file: their file.
        run: the run whose checkpoint they are; None: of no run that is known.
    """

    file: Path
    run: Run | None = None


def find(config: ExperimentConfig) -> Source:
    """The file that `model.weights` means.

    Raises:
        UserError: there is none; the line says where it was looked for.
        RunError: the checkpoint is damaged.
    """
    text = str(config.model.weights)
    path = Path(text).expanduser()
    if path.is_file():
        return Source(path)
    if path.is_dir() and (path / STATE).is_file():  # a checkpoint's directory
        _refuse_broken(path)
        run = Run(path.resolve().parents[1])
        return Source(path / STATE, run if run.meta_path.is_file() else None)
    if "@" in text:
        try:
            ref = RunRef.parse(text)
            run = Run.find(ref.run, config.storage_path)
            folder = checkpoint_of(run, run.epoch(ref.epoch))
        except UserError as error:
            raise UserError(f"model.weights: {error}") from error
        _refuse_broken(folder)
        return Source(folder / STATE, run)
    from rayexp.engine.starting import ALLOWED, cached

    try:
        if len(path.parts) > 1:
            raise UserError(f"model.weights: {text}: no such file; allowed: {ALLOWED}")
        return Source(cached(text, config.model.name))
    except UserError as error:
        raise UserError(f"{error}{_run_meant(text, config)}") from None


def _run_meant(text: str, config: ExperimentConfig) -> str:
    """What stands behind an error where a run is named without a checkpoint."""
    try:
        Run.find(text, config.storage_path)
    except UserError:
        return ""
    return f" (did you mean {text}@best?)"


def _refuse_broken(checkpoint: Path) -> None:
    if why := broken(checkpoint):
        raise RunError(f"model.weights: {checkpoint}: {why}")


def resolved(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration with `model.weights` as it means the same in any folder, and of RUN@best for ever: an absolute
    path, or the run's absolute path with the epoch's number. A name in torch's cache stays.

    Raises:
        UserError, RunError: as `find`.
    """
    text = config.model.weights
    if text is None:
        return config
    found = find(config)
    if Path(text).expanduser().exists():
        text = str(Path(text).expanduser().resolve())
    elif found.run is not None:
        ref = RunRef.parse(text)
        text = f"{found.run.root}@{found.run.epoch(ref.epoch)}"
    return config.model_copy(update={"model": config.model.model_copy(update={"weights": text})})


def as_begun(run: Run, config: ExperimentConfig) -> ExperimentConfig:
    """The configuration of a resume, with `model.weights` in the words that the run has for it, where it means the
    same: that place, which need not be there any more, or a file of the same content elsewhere."""
    text, begun = config.model.weights, run.config().model.weights
    if text is None or begun is None or text == begun:
        return config
    if str(Path(text).expanduser().resolve()) != begun and not _is_kept(run, config):
        return resolved(config)
    return config.model_copy(update={"model": config.model.model_copy(update={"weights": begun})})


def _is_kept(run: Run, config: ExperimentConfig) -> bool:
    """Whether `model.weights` is a file of the content that the run began with."""
    kept = run.meta().get("weights")
    return isinstance(kept, dict) and kept.get("sha256") == digest(_read(find(config).file))


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights that were read.

    Attributes:
        data: a safetensors file.
        about: for run.json: `source`, `sha256` of the user's file, `vocabulary_sha`.
    """

    data: bytes
    about: Mapping[str, Any]

    def keep(self, run: Run) -> None:
        """Write them into a new run's directory."""
        RunWriter(run).keep_weights(self.data, self.about)

    def tensors(self, vocabulary: Sequence[str] | None) -> dict[str, Any]:
        """The tensors by name.

        Args:
            vocabulary: of the data, where it is a text.

        Raises:
            UserError: the weights are of a run with another vocabulary.
        """
        from rayexp.engine import starting

        words = self.about.get("vocabulary_sha")
        if words is not None and words != vocabulary_sha(vocabulary):
            raise UserError(
                f"model.weights: {self.about['source']} was trained with another vocabulary than that of these data"
            )
        return starting.read(self.data, WEIGHTS) if self.data else {}


def read(config: ExperimentConfig) -> Weights | None:
    """The weights that a configuration names; None where it names none.

    Raises:
        UserError, RunError: as `find`; or the file holds no weights.
    """
    if config.model.weights is None:
        return None
    from rayexp.engine import starting

    source = find(config)
    data = _read(source.file)
    about: dict[str, Any] = {"source": config.model.weights, "sha256": digest(data)}
    if source.run is not None:
        about["vocabulary_sha"] = vocabulary_sha(source.run.data().get("vocabulary"))
    return Weights(starting.to_bytes(starting.read(data, source.file.name)), about)


def refuse_changed(run: Run, config: ExperimentConfig) -> None:
    """Refuse a resume that asks for weights which have changed since the run began (UserError); one that asks for a
    file that is gone takes the run's own copy."""
    kept = run.meta().get("weights")
    if config.model.weights is None or not isinstance(kept, dict):
        return
    try:
        found = find(config).file
    except UserError:
        return
    now, then = digest(_read(found)), str(kept.get("sha256"))
    if now != then:
        raise UserError(
            f"--resume {run.id}: model.weights: {found} has changed since the run began (sha256 {then[:12]} -> "
            f"{now[:12]}); the run has its own copy: leave it out"
        )


def share(
    config: ExperimentConfig, group: WorkerGroup, writer: RunWriter, vocabulary: Sequence[str] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors to start from, by name, and what run.json says of them, in every worker; empty where the weights are
    drawn. The first worker reads the run's copy.

    Args:
        config: may name weights.
        group: all call this.
        writer: of the run.
        vocabulary: of the data, where it is a text.

    Raises:
        UserError: the weights are of a run with another vocabulary.
    """
    if config.model.weights is None:
        return {}, {}
    lead = group.rank == 0
    data, found = writer.weights() if lead else (None, {})
    about = json.loads(group.broadcast(json.dumps(found).encode() if lead else None))
    return Weights(group.broadcast(data), about).tensors(vocabulary), about


def vocabulary_sha(words: Sequence[str] | None) -> str | None:
    """A hash of a vocabulary in its order; None where there is none."""
    return None if words is None else digest(json.dumps(list(words)).encode())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"model.weights: {path}: cannot be read ({error.strerror})") from error
