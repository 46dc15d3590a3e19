"""Check a run directory: everything that a resume or a reader relies on is compared with its hashes.

Used by `rayexp runs RUN --check`, by `collect`, and before a resume. Never writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rayexp.config import ExperimentConfig, parse, read
from rayexp.config.code import FOLDER
from rayexp.config.identity import flat
from rayexp.errors import UserError
from rayexp.runs import metrics_csv, retention
from rayexp.runs.code import code_faults
from rayexp.runs.manifest import SEAL, WEIGHTS, digest, has_valid_seal, state_fault
from rayexp.runs.records import EpochRecord, Predictions, read_lines, step_line
from rayexp.runs.run import Run, broken, epoch_name

# Keys that say where and how a run is trained, not what is trained: a resume may change them. Whether data.root holds
# the same data is checked by hash; the run keeps its name and its directory.
LOCATION = ("storage_path", "name", "data.root")
FREE = ("scaling", "checkpoint", "tracking", "capture", "data.resident", "max_failures", *LOCATION)
RECORDS = ("config.yaml", "data.json", "epochs.jsonl", "steps.jsonl", metrics_csv.FILE, WEIGHTS)


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of checking one part of a run.

    Attributes:
        what: a path in the run directory.
        state: `ok`: its hash matches. `not covered`: readable and consistent, but an older rayexp stored no hash of
            it. `not kept`: a checkpoint that was removed as `checkpoint.keep` asks. `damaged`: anything else.
        detail: what is wrong, or why it was not kept.
    """

    what: str
    state: Literal["ok", "not covered", "not kept", "damaged"]
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.detail}" if self.detail else f"{self.what}: {self.state}"


def examine(run: Run) -> list[Finding]:
    """Check every part of a run directory. A run that is still running may be examined too."""
    try:
        run.meta()
    except UserError as error:
        return [Finding("run.json", "damaged", str(error))]
    code = (_finding(f"{FOLDER}/{name}", why, covered=True) for name, why in code_faults(run.root, run.meta()))
    return [*described(run), *code, *_predictions(run), *_removed(run), *_checkpoints(run)]


def faults(run: Run) -> list[str]:
    """One line for each damaged part of a run directory."""
    return [str(finding) for finding in examine(run) if finding.state == "damaged"]


def described(run: Run) -> Iterator[Finding]:
    """Check config.yaml, data.json, epochs.jsonl and steps.jsonl.

    Raises:
        UserError: run.json cannot be read.
    """
    meta, files = run.meta(), run.files()
    trained = run.checkpoints.is_dir() or run.predictions_path(1).parent.is_dir()
    wanted = {"config.yaml", *files, *(("data.json",) if trained else ())}
    for name in RECORDS:
        if name not in wanted and not (run.root / name).exists():
            continue
        why = run.fault(name) or _lines_fault(run, name, str(meta["status"]))
        yield _finding(name, why, covered=name in files)


def _lines_fault(run: Run, name: str, status: str) -> str | None:
    """What is wrong with the lines of epochs.jsonl or steps.jsonl (unreadable, missing, out of order), or None."""
    try:
        if name == "steps.jsonl":
            read_lines(run.steps_path, step_line)
        if name == "epochs.jsonl":
            epochs = [record.epoch for record in run.records()]
            if epochs != list(range(1, len(epochs) + 1)):
                return f"its epochs are {epochs}"
            if status == "done" and not run.fault("config.yaml") and len(epochs) < run.config().epochs:
                return f"the run is done, and {len(epochs)} of {run.config().epochs} epochs are there"
    except UserError as error:
        return str(error).removeprefix(f"{run.root / name}: ")
    return None


def _predictions(run: Run) -> Iterator[Finding]:
    """Check the predictions of every epoch that has a record."""
    for record in _records(run):
        # The baseline script of a comparison writes records only.
        if record.weights_sha:
            path = run.predictions_path(record.epoch)
            yield _finding(f"predictions/{path.name}", predictions_fault(path, record), bool(record.predictions_sha))


def predictions_fault(path: Path, record: EpochRecord) -> str | None:
    """What is wrong with the predictions of an epoch, or None."""
    try:
        data = path.read_bytes()
        if record.predictions_sha:
            found, wanted = digest(data), record.predictions_sha
            whole = found == wanted or has_valid_seal(data, record.weights_sha)
            return None if whole else f"damaged (sha256 {found[:12]}, expected {wanted[:12]})"
        Predictions.from_npz(data, path.name)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except UserError as error:
        return str(error).removeprefix(f"{path.name}: ")
    return None


def _removed(run: Run) -> Iterator[Finding]:
    """The checkpoints that are not there, and should not be."""
    for epoch, keep in retention.not_kept(run).items():
        yield Finding(f"checkpoints/{epoch_name(epoch)}", "not kept", f"checkpoint.keep: {keep}")


def _checkpoints(run: Run) -> Iterator[Finding]:
    """Check the hashes of every checkpoint, and that it belongs to this run."""
    lines = {record.epoch: record for record in _records(run)}
    data = {} if run.fault("data.json") else run.data()
    for path, state in sorted(run.resumable(), key=lambda found: found[0].name):
        why = broken(path)
        if why and not path.exists():
            continue  # the run goes on, and has removed this snapshot
        if not why:
            why = _foreign(run, path, state, lines.get(state.get("epoch", 0)), data)
        yield _finding(f"checkpoints/{path.name}", why, SEAL in state)


def _foreign(run: Run, path: Path, state: dict[str, Any], line: EpochRecord | None, data: dict[str, Any]) -> str | None:
    if line and path.name == epoch_name(line.epoch) and line.weights_sha != state.get("weights_sha"):
        return "its weights are not those of the line in epochs.jsonl"
    if data and isinstance(state.get("data"), dict) and state["data"].get("val_sha") != data["val_sha"]:
        return "it is of other data than data.json"
    then = _then(state)
    if then and not run.fault("config.yaml") and (changed := changes(then, run.config())):
        return f"it is of another configuration than config.yaml: {changed}"
    return None


def _records(run: Run) -> list[EpochRecord]:
    """The records of the lines that can be read."""
    try:
        return read_lines(run.epochs_path, EpochRecord.from_json, [])
    except UserError:
        return []


def _finding(what: str, why: str | None, covered: bool) -> Finding:
    return Finding(what, "damaged", why) if why else Finding(what, "ok" if covered else "not covered")


# ---------------------------------------------------------------------- the configuration


def changes(before: ExperimentConfig, after: ExperimentConfig, free: tuple[str, ...] | None = None) -> str:
    """`lr 1.0 -> 9.0; seed 2 -> 3`: the keys outside `free` that differ; empty where none does.

    Args:
        before, after: what to compare.
        free: beside `code`, of which the content is compared (code.check_code). None: FREE, and `epochs` where the run
            only gets longer and its steps so far stay what they are.
    """
    if free is None:
        longer = after.epochs > before.epochs and not after.schedule.depends_on_epochs
        free = (*FREE, "epochs") if longer else FREE
    # A run without this key has trained with one: see launch.driver.
    first, second = (
        flat(config.model_dump(mode="json", exclude={"code"}) | {"threads_per_shard": config.threads_per_shard or 1})
        for config in (before, after)
    )
    return "; ".join(
        f"{key} {first.get(key)} -> {second.get(key)}"
        for key in sorted({*first, *second})
        if first.get(key) != second.get(key) and not any(f"{key}.".startswith(f"{name}.") for name in free)
    )


def check_config(run: Run) -> None:
    """Make sure that config.yaml is the configuration that the run has been trained under so far.

    Raises:
        UserError: the file is damaged, or differs from the configuration in the newest checkpoint; the line names the
            keys where the checkpoint holds them.
    """
    then, where = next(
        ((config, path.name) for path, state in run.resumable() if (config := _then(state, path.name))), (None, "")
    )
    why, now = run.fault("config.yaml"), None
    try:
        now = read(run.config_path)
    except UserError as error:
        why = why or str(error)
    changed = changes(then, now, LOCATION if why else None) if then and now else ""
    if why or changed:
        told = f"; since checkpoints/{where}: {changed}" if changed else ""
        raise UserError(
            f"{run.id}: config.yaml: {why or 'not the configuration that the run was trained under'}{told}; put the "
            f"run's own back (changes of {', '.join(FREE)} are given as KEY=VALUE)"
        )


def check_unchanged(run: Run, config: ExperimentConfig) -> None:
    """Refuse to resume a run under a configuration that would train another model, or one with a changed config.yaml.

    Raises:
        UserError: it names the changed keys.
    """
    check_config(run)
    before = run.config()
    if not (changed := changes(before, config)):
        return
    why = f"the configuration has changed: {changed}; allowed: {', '.join(FREE)}"
    if not changes(before, config, (*FREE, "epochs")):
        schedule = before.schedule.name
        why = (
            f"{changed}: a run can be trained on, not cut short; allowed: from {before.epochs}"
            if config.epochs < before.epochs
            else f"{changed}: schedule.name is {schedule}, where every learning rate depends on the number of epochs; "
            "more can be added with constant, step or plateau"
        )
    raise UserError(f"--resume {run.id}: {why}")


def is_finished(run: Run, config: ExperimentConfig) -> bool:
    """Whether a run has done all epochs of the configuration and nothing that a resume would mend is damaged; its last
    checkpoint may be missing, as in a run that was collected without it."""
    if run.meta()["status"] != "done" or any(finding.state == "damaged" for finding in described(run)):
        return False
    last = run.checkpoint(config.epochs)
    return len(run.records()) >= config.epochs and not (last.is_dir() and broken(last))


def _then(state: dict[str, Any], name: str = "") -> ExperimentConfig | None:
    """The configuration that a checkpoint was trained under; None where it is missing or damaged."""
    try:
        return None if name and state_fault(state, name) else parse(state["config"], ExperimentConfig, "state.json")
    except (KeyError, UserError):
        return None
