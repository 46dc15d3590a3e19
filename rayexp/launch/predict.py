"""What a trained model says of pictures or texts that are in no data set of its run."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rayexp.config import ExperimentConfig
from rayexp.data.decode import SUFFIXES, fit, rgb
from rayexp.data.text import decode
from rayexp.data.tiny_imagenet import natural
from rayexp.display import csv_cell, plain
from rayexp.errors import UserError
from rayexp.launch.local import on_gpu
from rayexp.runs.records import one_line
from rayexp.runs.run import Run

if TYPE_CHECKING:
    from rayexp.engine.portable import Portable

Source = tuple[str, Any]
"""A name, and what it names: a file's path, a picture or an array of pixels."""


@dataclass(frozen=True, slots=True)
class PicturePrediction:
    """The likeliest classes of one picture, likeliest first, and the model's confidence in each, from 0 to 1. Both are
    empty where the model's output is not finite."""

    name: str
    classes: tuple[int, ...]
    confidences: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LinePrediction:
    """One line of text, judged by itself: the mean `loss` of its `tokens` (words, and the line's end) in nats, and the
    words that the model does not know."""

    name: str
    text: str
    tokens: int
    unknown: tuple[str, ...]
    loss: float

    @property
    def ppl(self) -> float:
        """The perplexity of the line."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True, slots=True)
class Answers:
    """What a checkpoint says of some pictures or texts.

    Attributes:
        run, epoch, weights_sha: the checkpoint.
        categories: (id, readable name) of each class, by its number; empty for texts.
        rows: one for each picture or line that could be read, in the order in which they were given.
        unreadable: (name, why) of each file that could not be read.
    """

    run: str
    epoch: int
    weights_sha: str
    categories: tuple[tuple[str, str], ...]
    rows: tuple[PicturePrediction | LinePrediction, ...]
    unreadable: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[PicturePrediction | LinePrediction]:
        return iter(self.rows)

    def words(self, label: int) -> str:
        """The readable name of a class."""
        return self.categories[label][1]

    def to_dict(self) -> dict[str, Any]:
        """As `rayexp predict --json` prints it."""
        rows: list[dict[str, Any]] = []
        for row in self.rows:
            if isinstance(row, PicturePrediction):
                pairs = zip(row.classes, row.confidences, strict=True)
                top = [
                    {"label": c, "id": self.categories[c][0], "words": self.words(c), "confidence": p} for c, p in pairs
                ]
                rows.append({"name": row.name, "top": top})
            else:
                rows.append({**asdict(row), "unknown": list(row.unknown), "ppl": row.ppl})
        head = {"run": self.run, "epoch": self.epoch, "weights_sha": self.weights_sha}
        bad = [{"name": name, "why": why} for name, why in self.unreadable]
        return dict(plain({**head, "rows": rows, "unreadable": bad}))

    def to_csv(self) -> str:
        """A line for each picture and class (`rank` from 1), or for each line of text."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        if self.categories:
            writer.writerow(("name", "rank", "label", "id", "words", "confidence"))
            for row in self.rows:
                assert isinstance(row, PicturePrediction)
                for rank, (label, confidence) in enumerate(zip(row.classes, row.confidences, strict=True), 1):
                    named = map(csv_cell, self.categories[label])
                    writer.writerow((csv_cell(row.name), rank, label, *named, f"{confidence:.6f}"))
        else:
            writer.writerow(("name", "tokens", "unknown", "loss", "ppl", "text"))
            for row in self.rows:
                assert isinstance(row, LinePrediction)
                figures = (row.tokens, len(row.unknown), f"{row.loss:.6f}", f"{row.ppl:.3f}")
                writer.writerow((csv_cell(row.name), *figures, csv_cell(row.text)))
        return out.getvalue()


def predict(run: Run, epoch: int, sources: Sequence[Source], top: int = 5) -> Answers:
    """The answers of a checkpoint of image classification or of a language model. Needs the run directory only.

    Args:
        sources: pictures, by path or as they are; for a language model lines of text, as (name, text).
        top: how many classes of each picture.

    Raises:
        UserError: the epoch has no checkpoint, the workload answers no such questions, or an array is no picture.
        RunError: the checkpoint is damaged.
    """
    from rayexp.workloads.saved import open_portable

    config, portable = run.config(), open_portable(run, epoch)
    if "vocabulary" in portable.about:
        return _read(run, epoch, config, portable, sources)
    if "categories" in portable.about:
        return _look(run, epoch, config, portable, sources, top)
    raise UserError(f"{run.id}: predict answers for pictures and texts; this run is of {config.workload}")


def _look(
    run: Run, epoch: int, config: ExperimentConfig, portable: Portable, sources: Sequence[Source], top: int
) -> Answers:
    from rayexp.workloads.image_classification.classify import Classifier

    categories = tuple((str(one[0]), str(one[1])) for one in portable.about["categories"])
    rows: list[PicturePrediction] = []
    bad: list[tuple[str, str]] = []
    with Classifier(portable.model, config, on_gpu(config)) as classifier:
        for names, images in _batches(sources, config.data.image_size, config.batch_size, bad):
            classes, confidences = classifier(images, min(top, len(categories)))
            for name, found, sure in zip(names, classes.tolist(), confidences.tolist(), strict=True):
                finite = found[0] >= 0
                rows.append(PicturePrediction(name, tuple(found) if finite else (), tuple(sure) if finite else ()))
    return Answers(run.id, epoch, portable.about["weights_sha"], categories, tuple(rows), tuple(bad))


def _batches(
    sources: Iterable[Source], size: int, count: int, bad: list[tuple[str, str]]
) -> Iterator[tuple[list[str], NDArray[np.uint8]]]:
    """Names and pixels uint8[n, size, size, 3] of `count` readable pictures at a time; the others go to `bad`."""
    names: list[str] = []
    pixels: list[NDArray[np.uint8]] = []
    for name, source in sources:
        try:
            pixels.append(picture(source, size))
            names.append(name)
        except UserError:
            raise
        except Exception as error:  # Pillow may raise almost any error for a broken file
            bad.append((name, one_line(error)))
        if len(names) == count:
            yield names, np.stack(pixels)
            names, pixels = [], []
    if names:
        yield names, np.stack(pixels)


def picture(source: Any, size: int) -> NDArray[np.uint8]:
    """A picture's pixels uint8[size, size, 3], decoded, resized and cropped as packing does it.

    Args:
        source: a file's path, a PIL image, or an array of pixels: uint8[height, width, 3], or grey uint8[height,
            width].

    Raises:
        OSError, ValueError: as Pillow raises them for a file that is no picture.
        UserError: an array of another type or shape.
    """
    if isinstance(source, str | Path):
        return np.asarray(rgb(Path(source).read_bytes(), size))
    if isinstance(source, Image.Image):
        file = io.BytesIO()
        source.convert("RGB").save(file, "PPM")
        return np.asarray(rgb(file.getvalue(), size))
    array = np.asarray(source)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise UserError(
            f"predict: an array of {array.dtype}{list(array.shape)} is no picture; allowed: "
            "uint8[height, width, 3], or uint8[height, width] for grey"
        )
    return np.asarray(fit(Image.fromarray(array).convert("RGB"), size))


def _read(run: Run, epoch: int, config: ExperimentConfig, portable: Portable, sources: Sequence[Source]) -> Answers:
    from rayexp.workloads.language_model.score import score

    rows = []
    for name, text in sources:
        found = score(portable.model, portable.about["vocabulary"], config, text)
        rows.append(LinePrediction(name, text, found.tokens, found.unknown, found.loss))
    return Answers(run.id, epoch, portable.about["weights_sha"], (), tuple(rows), ())


def pictures(paths: Iterable[str | Path]) -> list[Source]:
    """Files as they are, and of each folder all pictures in it and below, in the order of their numbers and names.

    Raises:
        UserError: a path does not exist, or a folder holds no picture.
    """
    found: list[Source] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [
                file
                for file in path.rglob("*")
                if file.is_file()
                and file.suffix.lower() in SUFFIXES
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            ]
            if not inside:
                raise UserError(f"{path}: holds no picture ({', '.join(suffix[1:] for suffix in SUFFIXES)})")
            found += [(str(file), file) for file in sorted(inside, key=lambda file: natural(str(file)))]
        elif path.exists():
            found.append((str(path), path))
        else:
            raise UserError(f"{path}: no such file or folder")
    return found


def lines(paths: Iterable[str | Path]) -> tuple[list[Source], list[tuple[str, str]]]:
    """The lines of text files that have words, named `FILE:LINE`, and (name, why) of each file that cannot be read. Of
    a folder its *.txt.

    Raises:
        UserError: a path does not exist, or a folder holds no *.txt.
    """
    found: list[Source] = []
    bad: list[tuple[str, str]] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path}: holds no *.txt")
        for file in files:
            try:
                text = decode(file.read_bytes(), str(file))
            except (OSError, UserError) as error:
                bad.append((str(file), one_line(error).removeprefix(f"{file}: ")))
                continue
            found += [(f"{file}:{at}", line) for at, line in enumerate(text.split("\n"), 1) if line.strip()]
    return found, bad
