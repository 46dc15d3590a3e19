"""What changed by attribute: a CSV file says which samples are night shots, or from which hospital (`--slice FILE`).

The first column is `name` (of an image or sample in data.json, or of an article) or `index` (the position in the
validation data, from 0; of text the number of the document). Every further column is an attribute; each of its values
is a slice, an empty cell is none.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayexp.diff.documents import documents
from rayexp.diff.outcome import Outcome, adjusted, outcome
from rayexp.diff.pair import Checkpoint
from rayexp.diff.samples import sample_names
from rayexp.diff.text import titles_of, vocabulary_of
from rayexp.display import counted, plain
from rayexp.errors import UserError, nearest

KEYS = ("name", "index")
SHOWN = 5  # unknown names that an error lists


@dataclass(frozen=True, slots=True)
class Slice:
    """The samples whose `attribute` has this `value`."""

    attribute: str
    value: str
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Attributes:
    """What a file says of the n samples that checkpoints judged.

    Attributes:
        source: the file's name.
        things: what its rows are of: `images`, `samples`, `articles` or `blocks`.
        rows: of these that the file describes.
        missing: of these without a row; they are in no slice.
        parts: attribute, value, and bool[n], the samples that have it; in the file's order.
    """

    source: str
    things: str
    rows: int
    missing: int
    parts: tuple[tuple[str, str, NDArray[np.bool_]], ...]


@dataclass(frozen=True, slots=True)
class SlicesReport:
    """The slices of one comparison, adjusted for their number together; of several comparisons in one table, for all of
    theirs.

    Attributes:
        kind: of the predictions.
        source, things, rows, missing: of the file, see Attributes.
        slices: by attribute, in the file's order, the largest fall first.
        tests: for how many outcomes they are adjusted.
    """

    kind: str
    source: str
    things: str
    rows: int
    missing: int
    slices: tuple[Slice, ...]
    tests: int

    def note(self) -> str:
        """What is left out, as a sentence; empty where nothing is."""
        if not self.missing:
            return ""
        total = self.rows + self.missing
        return f"{self.missing:,} of {total:,} {self.things} have no row in {self.source} and are in no slice"

    @property
    def changed(self) -> int:
        """Slices that changed by more than chance."""
        return sum(s.outcome.adjusted_p is not None and s.outcome.adjusted_p < 0.05 for s in self.slices)

    def to_json(self) -> dict[str, Any]:
        """Every slice with its outcome."""
        rows = [{"attribute": s.attribute, "value": s.value, **s.outcome.to_json(self.kind)} for s in self.slices]
        head = {"file": self.source, "of": self.things, "rows": self.rows, "missing": self.missing}
        return dict(plain({**head, "correction": "Benjamini-Hochberg", "adjusted_for": self.tests, "slices": rows}))


def diff_slices(a: Checkpoint, b: Checkpoint, path: Path, tolerance: float = 0.0) -> SlicesReport:
    """Compare A and B on each slice of a file.

    Args:
        a, b: of the same data (`pair.check`).
        tolerance: see `outcome`.

    Raises:
        UserError: see `read_attributes`.
    """
    return slice_pairs(read_attributes(a, path), [(a, b)], tolerance)[0]


def slice_pairs(
    attributes: Attributes, pairs: Sequence[tuple[Checkpoint, Checkpoint]], tolerance: float
) -> list[SlicesReport]:
    """Compare A and B of each pair on each slice; p is adjusted for all slices of all pairs together."""
    kind = pairs[0][0].predictions.kind
    rows = []
    for number, (a, b) in enumerate(pairs):
        found = [(x, y, outcome(a, b, keep, tolerance)) for x, y, keep in attributes.parts]
        order = {x: i for i, x in enumerate(dict.fromkeys(x for x, _, _ in found))}
        found.sort(key=lambda row: (order[row[0]], _worst(row[2], kind)))
        rows += [(number, *row) for row in found]
    outcomes = adjusted([o for *_, o in rows])
    slices: list[list[Slice]] = [[] for _ in pairs]
    for (number, x, y, _), o in zip(rows, outcomes, strict=True):
        slices[number].append(Slice(x, y, o))
    head = attributes.source, attributes.things, attributes.rows, attributes.missing
    return [SlicesReport(kind, *head, tuple(part), len(rows)) for part in slices]


def read_attributes(a: Checkpoint, path: Path) -> Attributes:
    """Read a file that says something of the samples that A judged.

    Raises:
        UserError: the file cannot be read, has no attributes, or names what was not judged.
    """
    things, names, unit_of = _units(a)
    attributes, rows = _read(path)
    key = attributes.pop(0)
    if key == "name" and names is None:
        raise UserError(f"{path}: the first column is `name`, but {a.run.data_path} names no samples; allowed: index")
    count = max(int(unit_of.max()) + 1, len(names or ()))
    positions = _positions(path, key, [row[0] for row in rows], names, count, things)
    judged = np.zeros(count, dtype=bool)
    judged[unit_of] = True  # a file may describe samples beyond those that were judged
    parts = []
    for column, attribute in enumerate(attributes, 1):
        values = np.full(count, "", dtype=object)
        values[positions] = [row[column].strip() for row in rows]
        for value in dict.fromkeys(v for v in values[judged] if v):
            parts.append((attribute, value, np.asarray((values == value)[unit_of], dtype=bool)))
    if not parts:
        raise UserError(f"{path}: describes none of the {things} that were judged")
    described = np.zeros(count, dtype=bool)
    described[positions] = True
    return Attributes(
        source=path.name,
        things=things,
        rows=int((described & judged).sum()),
        missing=int((judged & ~described).sum()),
        parts=tuple(parts),
    )


def _worst(o: Outcome, kind: str) -> float:
    """Sorts the largest fall of accuracy, or rise of a loss, first; what is not finite before all."""
    fall = o.difference if kind == "images" else -o.difference
    return fall if fall == fall else -np.inf


def _units(a: Checkpoint) -> tuple[str, tuple[str, ...] | None, NDArray[np.int64]]:
    """What a row of the file is of, the names of these, and int64[n]: to which of them each sample belongs."""
    p = a.predictions
    if p.kind != "tokens":
        return a.run.unit() if p.kind == "samples" else "images", sample_names(a), p["index"]
    words = vocabulary_of(a, a)
    document, count, unit = documents(p["token"], p["offset"], words)
    return unit, tuple(titles_of(p, document, count, words, unit)), document


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    """The head and the rows."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--slice: {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--slice: {path}: not UTF-8 (byte {error.start + 1}); save it as CSV in UTF-8") from error
    try:
        head, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except (csv.Error, ValueError) as error:
        raise UserError(f"--slice: {path} is no table in CSV ({error if text.strip() else 'it is empty'})") from error
    head = [column.strip() for column in head]
    if head[0] not in KEYS or len(head) < 2 or not all(head) or len(set(head)) < len(head):
        raise UserError(
            f"{path}: the first line is {','.join(head)!r}; expected `name` or `index`, then a name for each "
            "attribute, with commas between"
        )
    for number, row in enumerate(rows, 2):
        if len(row) != len(head):
            raise UserError(f"{path}: row {number} has {counted(len(row), 'cell')}; expected {len(head)}")
    return head, rows


def _positions(
    path: Path, key: str, cells: list[str], names: tuple[str, ...] | None, count: int, things: str
) -> NDArray[np.int64]:
    """Of which image, sample or document each row is."""
    if twice := [cell for cell, often in Counter(cells).items() if often > 1]:
        raise UserError(f"{path}: {key} {twice[0]!r} has several rows")
    if key == "index":
        unknown = [c for c in cells if not c.strip().isdecimal() or int(c) >= count]
        known = {} if unknown else {c: int(c) for c in cells}
        allowed = f"0 to {count - 1}"
    else:
        assert names is not None
        where: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            where.setdefault(name, []).append(i)
        if several := [c for c in cells if len(where.get(c, [])) > 1]:
            raise UserError(f"{path}: {several[0]!r} names several {things}; `index` tells them apart")
        unknown = [c for c in cells if c not in where]
        known = {} if unknown else {c: where[c][0] for c in cells}
        allowed = f"names such as {names[0]!r}{nearest(unknown[0], names) if unknown else ''}"
    if unknown:
        more = f" and {len(unknown) - SHOWN:,} more" if len(unknown) > SHOWN else ""
        listed = ", ".join(map(repr, unknown[:SHOWN])) + more
        raise UserError(f"{path}: {key} {listed}: no such {things}; expected {allowed}")
    return np.array([known[c] for c in cells], dtype=np.int64)
