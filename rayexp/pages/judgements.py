"""What a checkpoint says of the validation images: confusions, accuracy by class, and the images it judges worst."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayexp.display import printable, short_names
from rayexp.errors import UserError
from rayexp.pages.pictures import read_pictures
from rayexp.runs.records import Predictions
from rayexp.runs.run import Run

WORST = 24  # images
PAIRS = 15
FEW = 20  # classes whose matrix is a table that one can read


@dataclass(frozen=True, slots=True)
class Confusion:
    """Images of one class that are taken for another.

    Attributes:
        label, predicted: names of the classes.
        count: images.
        share: of the images of the class, from 0 to 1.
    """

    label: str
    predicted: str
    count: int
    share: float


@dataclass(frozen=True, slots=True)
class ClassAccuracy:
    """How well a class is recognised.

    Attributes:
        name: of the class.
        n: its images.
        right: those among them whose top-1 is right.
        mistaken: what it is taken for most often, where it is mistaken at all.
    """

    name: str
    n: int
    right: int
    mistaken: Confusion | None

    @property
    def share(self) -> float:
        """Accuracy from 0 to 1."""
        return self.right / self.n


@dataclass(frozen=True, slots=True)
class WorstImage:
    """An image with a high loss.

    Attributes:
        name: from data.json.
        label, predicted: names of the classes.
        right: whether they are the same.
        confidence: in the prediction, from 0 to 1.
        loss: in nats.
        picture: WebP in base64; empty where the data is not at hand.
    """

    name: str
    label: str
    predicted: str
    right: bool
    confidence: float
    loss: float
    picture: str


@dataclass(frozen=True, slots=True)
class ImageJudgements:
    """The judgements of one checkpoint.

    Attributes:
        epoch: of the checkpoint.
        n: images.
        not_finite: images for which the output is not finite; they are in no column of the matrix.
        names: of the classes that occur, by row and column of the matrix.
        matrix: int64[classes, classes], images by label and prediction.
        classes: the worst first.
        pairs: the most frequent confusions.
        worst: the images with the highest losses, the highest first.
        why_not: why they have no pictures; empty where they have.
    """

    epoch: int
    n: int
    not_finite: int
    names: tuple[str, ...]
    matrix: NDArray[np.int64]
    classes: tuple[ClassAccuracy, ...]
    pairs: tuple[Confusion, ...]
    worst: tuple[WorstImage, ...]
    why_not: str

    @property
    def few(self) -> bool:
        """Whether the matrix is small enough for a table."""
        return len(self.names) <= FEW


def judgements_of(run: Run, epoch: int) -> ImageJudgements:
    """Read the judgements of an epoch.

    Raises:
        UserError: its predictions are missing or damaged, or data.json does not fit them.
    """
    predictions = run.predictions(epoch)
    names, images = _names(run, predictions)
    label, finite = predictions["label"], predictions.finite
    first = predictions["top5"][:, 0].astype(np.int64)
    count = len(names)
    matrix = np.zeros((count, count), np.int64)
    np.add.at(matrix, (label[finite], first[finite]), 1)
    total = np.bincount(label, minlength=count)
    off = matrix - np.diag(matrix.diagonal())

    def confusion(a: int, b: int) -> Confusion:
        return Confusion(names[a], names[b], int(off[a, b]), float(off[a, b] / total[a]))

    labels, guesses = np.nonzero(off)
    often = np.argsort(-off[labels, guesses], kind="stable")[:PAIRS]
    classes = [
        ClassAccuracy(
            names[c], int(total[c]), int(matrix[c, c]), confusion(c, int(off[c].argmax())) if off[c].any() else None
        )
        for c in np.flatnonzero(total).tolist()
    ]
    occur = np.flatnonzero(total + matrix.sum(0))
    loss = np.nan_to_num(predictions["loss"].astype(np.float64), nan=np.inf)
    rows = np.argsort(-loss, kind="stable")[:WORST]
    shown, why_not = _pictures(run, predictions, rows)
    worst = [
        WorstImage(
            printable(images[index]),
            names[said],
            names[guess] if guess >= 0 else "not finite",
            said == guess,
            float(sure),
            float(height),
            picture,
        )
        for index, said, guess, sure, height, picture in zip(
            predictions["index"][rows].tolist(), label[rows].tolist(), np.where(finite, first, -1)[rows].tolist(),
            predictions["confidence"][rows], predictions["loss"][rows], shown, strict=True,
        )
    ]  # fmt: skip
    return ImageJudgements(
        epoch=epoch,
        n=len(predictions),
        not_finite=int((~finite).sum()),
        names=tuple(names[c] for c in occur),
        matrix=matrix[np.ix_(occur, occur)],
        classes=tuple(sorted(classes, key=lambda c: c.share)),
        pairs=tuple(map(confusion, labels[often].tolist(), guesses[often].tolist())),
        worst=tuple(worst),
        why_not=why_not,
    )


def _names(run: Run, predictions: Predictions) -> tuple[list[str], list[str]]:
    """Names of the classes and of the validation images, as many as the predictions speak of (else UserError)."""
    data, path = run.data(), run.data_path
    try:
        classes = short_names(tuple((str(key), str(words)) for key, words in data["classes"]))
        images = [str(name) for name in data["val_names"]]
        largest = max(int(predictions["label"].max(initial=0)), int(predictions["top5"].max(initial=0)))
        smallest = int(predictions["label"].min(initial=0))
        if smallest < 0 or largest >= len(classes) or int(predictions["index"].max(initial=0)) >= len(images):
            raise ValueError("the predictions name classes or images that are not in it")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: does not fit the predictions ({error})") from error
    return [printable(name) for name in classes], images


def _pictures(run: Run, predictions: Predictions, rows: NDArray[np.int64]) -> tuple[list[str], str]:
    try:
        return read_pictures(run, predictions.data_sha, predictions["index"][rows].tolist()), ""
    except UserError as error:
        return [""] * len(rows), str(error)
