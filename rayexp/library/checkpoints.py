"""Checkpoints: judge data with one, ask one, compare two, take one out of rayexp."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rayexp.errors import UserError
from rayexp.library.guest import guest
from rayexp.runs.run import Run, resolve

if TYPE_CHECKING:
    from torch import nn

    from rayexp.launch.evaluate import Evaluation
    from rayexp.launch.export import Export
    from rayexp.launch.predict import Answers

Ref = str | Run
"""A checkpoint: `RUN@7`, `RUN@best`, `RUN@last`, where RUN is a directory, its name, a part of it that fits one run
alone, or `@newest`; `RUN` alone, and a Run, are its last epoch. `run.at("best")` makes one of a Run."""


def evaluate(
    ref: Ref,
    *,
    root: str | PathLike[str] | None = None,
    mirror: bool = False,
    runs: str | PathLike[str] = "runs",
) -> Evaluation:
    """Judge the run's validation data with a checkpoint. Predictions that the run lacks are stored in it.

    Args:
        ref: the checkpoint.
        root: where the run's data lies now; None: where it was.
        mirror: average probabilities over each image and its mirror image; then nothing is stored.
        runs: the folder of run directories.

    Returns:
        An Evaluation: `metrics` (`val_loss`, and `acc1`, `acc5` in percent, or `ppl`), `predictions` (arrays, see
        `Run.predictions`), `weights_sha`, `stored`, and `equal` (to the stored ones, bit for bit).

    Raises:
        UserError: no such checkpoint, or the data is missing or not the run's.
        RunError: the checkpoint is damaged.

    Example:
        >>> found = rayexp.evaluate("quickstart@best", runs=tmp)
        >>> found.equal, sorted(found.metrics)
        (True, ['acc1', 'acc5', 'val_loss'])
    """
    from rayexp.launch import evaluate as evaluating

    with guest("evaluate"):
        run, epoch = find(ref, runs)
        return evaluating.evaluate(run, epoch, root=None if root is None else Path(root), mirror=mirror)


def predict(
    ref: Ref,
    inputs: Any,
    *,
    top: int = 5,
    skip_unreadable: bool = False,
    runs: str | PathLike[str] = "runs",
) -> Answers:
    """Ask a checkpoint about pictures, or a language model about texts. Needs the run directory only.

    Args:
        ref: the checkpoint.
        inputs: one or several. Pictures: paths of files, or of folders with pictures in and below them; PIL images;
            arrays uint8[height, width, 3], uint8[height, width] (grey), or all in one uint8[n, height, width, 3]. They
            are decoded, resized and cropped as the run's own were. A language model takes lines of text, and reads
            each by itself.
        top: how many classes of each picture.
        skip_unreadable: leave out pictures that cannot be read, and name them in `unreadable`.
        runs: the folder of run directories.

    Returns:
        Answers, in the order of the inputs. A row of a picture has `name`, `classes` and `confidences` (from 0 to 1);
        of a line `loss` (mean nats per token), `ppl`, `tokens` and `unknown` words. Also `words(label)`, `to_dict()`
        and `to_csv()`.

    Raises:
        UserError: no such checkpoint or file, a picture cannot be read, or an array is none.
        RunError: the checkpoint is damaged.

    Example:
        >>> pixels = np.zeros((2, 48, 64, 3), np.uint8)
        >>> [len(row.classes) for row in rayexp.predict("quickstart@best", pixels, top=3, runs=tmp)]
        [3, 3]
    """
    from rayexp.launch import predict as predicting

    with guest("predict"):
        run, epoch = find(ref, runs)
        sources = _texts(inputs) if run.kind() == "tokens" else _pictures(inputs)
        answers = predicting.predict(run, epoch, sources, top)
    if answers.unreadable and not skip_unreadable:
        name, why = answers.unreadable[0]
        raise UserError(f"{name}: cannot be read ({why}); skip_unreadable=True leaves such files out")
    return answers


def _texts(inputs: Any) -> list[tuple[str, Any]]:
    texts = [inputs] if isinstance(inputs, str) else list(inputs)
    if other := next((text for text in texts if not isinstance(text, str)), None):
        raise UserError(f"predict: a language model reads lines of text, got {type(other).__name__}")
    return [(str(at), text) for at, text in enumerate(texts)]


def _pictures(inputs: Any) -> list[tuple[str, Any]]:
    from PIL import Image

    from rayexp.launch.predict import pictures

    one = isinstance(inputs, str | PathLike | Image.Image) or (isinstance(inputs, np.ndarray) and inputs.ndim < 4)
    items: Iterable[Any] = [inputs] if one else inputs
    found: list[tuple[str, Any]] = []
    for at, item in enumerate(items):
        found += pictures([Path(item)]) if isinstance(item, str | PathLike) else [(str(at), item)]
    return found


def load_model(ref: Ref, *, runs: str | PathLike[str] = "runs") -> nn.Module:
    """The trained model of a checkpoint, in eval mode on the CPU: torchvision's own class, or for a language model a
    graph of PyTorch's layers (torch.fx), from int64[time, columns] to logits. `torch.save` of it needs no rayexp.

    `model.about` says what its numbers mean, as a dict: `categories` (id and name of each class, in order), `mean` and
    `std` (of RGB from 0 to 1), `image_size`, `input`, `output` (shapes in words), or `vocabulary`; and `run`, `epoch`,
    `weights_sha`, `metrics`.

    Args:
        ref: the checkpoint.
        runs: the folder of run directories.

    Raises:
        UserError: no such checkpoint.
        RunError: the checkpoint is damaged.

    Example:
        >>> model = rayexp.load_model("quickstart@best", runs=tmp)
        >>> type(model).__module__.split(".")[0], model.training, len(model.about["categories"])
        ('torchvision', False, 20)
    """
    from rayexp.workloads.saved import open_portable

    portable = open_portable(*find(ref, runs))
    model: Any = portable.model
    model.about = dict(portable.about)
    return model  # type: ignore[no-any-return]


def export(ref: Ref, to: str | PathLike[str], *, force: bool = False, runs: str | PathLike[str] = "runs") -> Export:
    """Write a checkpoint's model to a file for others, as `rayexp export` does.

    Args:
        ref: the checkpoint.
        to: .pt: a plain state_dict, and what is needed to use it in a JSON file beside it. .safetensors: the same, in
            its metadata. .onnx: the whole model (pip install 'rayexp[onnx]').
        force: replace files that are there.
        runs: the folder of run directories.

    Returns:
        An Export: `path`, `beside`, `build` (lines of Python that build the model without rayexp) and `about`.

    Raises:
        UserError: another suffix, a file that is there, no such checkpoint.
        RunError: the checkpoint is damaged, or PyTorch cannot export the model.

    Example:
        >>> rayexp.export("quickstart@best", tmp / "model.pt", runs=tmp).build[-1]
        'model = resnet18(num_classes=20)'
    """
    from rayexp.launch import export as exporting

    with guest("export"):
        return exporting.export(*find(ref, runs), Path(to), force)


def generate(
    ref: Ref,
    words: int = 100,
    *,
    prompt: str = "",
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    runs: str | PathLike[str] = "runs",
) -> str:
    """Text from a language model. The same seed gives the same text.

    Args:
        ref: the checkpoint.
        words: how many to write.
        prompt: words to go on from; none: a new line.
        temperature: below 1 bolder, above 1 wilder; 0: the likeliest word.
        top_k: only the k likeliest words can come.
        seed: of the draws.
        runs: the folder of run directories.

    Raises:
        UserError: no such checkpoint, or it is of no language model.
        RunError: the checkpoint is damaged, or its output is not finite.
    """
    from rayexp.data.text import EOS
    from rayexp.workloads.language_model import generate as writing

    with guest("generate"):
        from rayexp.engine.settings import threads

        with threads(1):
            writer = writing.open_generator(*find(ref, runs))
            start, _ = writing.read_prompt(prompt, writer)
            begin: Sequence[int] = start or [writer.vocabulary.index(EOS)]
            options = {"temperature": temperature, "top_k": top_k, "seed": seed}
            numbers = list(writing.generate(writer.net, begin, words, **options))  # type: ignore[arg-type]
    return writing.lines([writer.vocabulary[n] for n in (*start, *numbers)])


def find(ref: Ref, runs: str | PathLike[str]) -> tuple[Run, int]:
    """The run and the epoch of a reference (UserError where there is none)."""
    return (ref, ref.epoch("last")) if isinstance(ref, Run) else resolve(ref, Path(runs))
