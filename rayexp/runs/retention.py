"""Which epochs' checkpoints stay on disk (`checkpoint.keep`), and what is said of those that do not.

A checkpoint goes only when a newer epoch is whole on disk, and never the best or the newest: from the newest a run
resumes. Before it goes, run.json notes why (`not_kept`), so that nobody takes it for lost; it then goes in one step, so
that it is complete or absent. Its line in epochs.jsonl, with the hash of its weights, and its predictions stay.
"""

from __future__ import annotations

from pathlib import Path

from rayexp.errors import UserError
from rayexp.runs.records import ranges
from rayexp.runs.run import Run
from rayexp.system.disk import remove_directory

NOTE = "not_kept"


def prune(run: Run, newest: int) -> None:
    """Remove the checkpoints that `checkpoint.keep` does not ask for.

    Args:
        run: its config.yaml says what to keep.
        newest: an epoch that is whole on disk; later ones, which an earlier attempt may have left, are not looked at.
    """
    try:
        keep = run.config().checkpoint.keep
        gone = [] if keep == "all" else superfluous(run, newest, 1 if keep == "best" else keep)
    except UserError:  # where it cannot be read what to keep, or which is the best, all of it is kept
        return
    if not gone:
        return
    run.update(**{NOTE: noted(run) | {str(epoch): str(keep) for epoch in gone}})
    for epoch in gone:
        remove_directory(run.checkpoint(epoch))


def superfluous(run: Run, newest: int, last: int) -> list[int]:
    """The epochs up to `newest` that have a checkpoint, without the best and the `last` ones.

    Raises:
        UserError: the records cannot be read, or no epoch is the best.
    """
    have = [epoch for epoch in run.epochs() if epoch <= newest]
    kept = {*have[-last:], run.best()}
    return [epoch for epoch in have if epoch not in kept]


def noted(run: Run) -> dict[str, str]:
    """What run.json says of removed checkpoints: epoch -> the `checkpoint.keep` of that time."""
    found = run.meta().get(NOTE)
    return {str(epoch): str(keep) for epoch, keep in found.items()} if isinstance(found, dict) else {}


def not_kept(run: Run) -> dict[int, str]:
    """The epochs whose checkpoints were removed, with the `checkpoint.keep` of that time; one that was trained and
    written again counts as kept."""
    there = set(run.epochs())
    found = {int(epoch): keep for epoch, keep in noted(run).items() if epoch.isdecimal()}
    return {epoch: found[epoch] for epoch in sorted(found.keys() - there)}


def reason(keep: str) -> str:
    """`not kept (checkpoint.keep: best)`"""
    return f"not kept (checkpoint.keep: {keep})"


def checkpoint_of(run: Run, epoch: int) -> Path:
    """The directory of an epoch's checkpoint, whole or not.

    Raises:
        UserError: the epoch has none; the line says why, and which epochs have one.
    """
    path = run.checkpoint(epoch)
    if path.is_dir():
        return path
    gone, have = not_kept(run), run.epochs()
    there = f"{'kept' if gone else 'there are'}: {ranges(have)}" if have else "none is there"
    if epoch in gone:
        raise UserError(f"{run.id}@{epoch}: the checkpoint of epoch {epoch} was {reason(gone[epoch])}; {there}")
    raise UserError(f"{run.id}@{epoch}: has no checkpoint in {path.parent}; {there}")
