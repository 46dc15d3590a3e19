"""A dataset of the user's own: a class or a function, named by reference, that gives images with labels, or text.

It is called with `split="train"` and `split="val"` (text: and `split="test"`), with `root` if it asks for that, and
with its options. What it gives is packed once into the cache, under the hash of its recipe (see recipe.py); from then
on it is data like any other.

Images: `len(dataset)`, and `dataset[i]` an (image, label). An image is of Pillow's, an array [height, width(, 1 or 3)]
or a tensor [1 or 3, height, width], of bytes or of floats from 0 to 1; a label counts from 0. Attributes that save time
or give names: `targets` (the labels), `classes` (a name of each), `names` (a name of each image).
Text: an iterable of lines; words have white space between them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rayexp.config import DataConfig
from rayexp.config.references import failure
from rayexp.data import ImageData, TextData, pool, recipe, text, uses
from rayexp.data.decode import answer, eight_bits, fit
from rayexp.data.fetch import FileSource
from rayexp.data.folder_cache import home
from rayexp.data.pack import Item, PackPlan, done, pack
from rayexp.data.packed import open_packed
from rayexp.data.recipe import Recipe
from rayexp.errors import UserError

CHUNK = 256  # samples whose labels are read in one call


@dataclass(frozen=True, slots=True)
class OwnPlan(PackPlan):
    """A PackPlan whose decoder is told the recipe instead of a file."""

    recipe: str = ""

    def call(self, part: Sequence[Item]) -> list[Any]:
        """See PackPlan."""
        return [self.recipe, [file for file, _, _ in part], [label for _, _, label in part], self.size]


def open_data(config: DataConfig, code: Sequence[str] | None, text: bool) -> ImageData | TextData:
    """The images, or the text, of a dataset of the user's own."""
    return open_text(config, code) if text else open_images(config, code)


# ---------------------------------------------------------------------- images


def open_images(config: DataConfig, code: Sequence[str] | None) -> ImageData:
    """The images of a dataset of the user's own, packed on first use.

    Raises:
        UserError: it cannot be imported or made, or a sample is no image with a label; the line says where.
    """
    made = Recipe.of(config, code)
    ingredients = made.ingredients(config.image_size)
    key = recipe.key(ingredients)
    packed = home() / recipe.folder_name(ingredients, key)
    if not done(packed):
        pack(packed, lambda: make_plan(made, key))
    uses.note(packed, ingredients)
    data = open_packed(packed, config)
    uses.hold(packed, data.train.images)
    return data


def make_plan(recipe: Recipe, key: str = "") -> OwnPlan:
    """Plan how to pack a dataset: its labels and names are read, its images are not.

    Raises:
        UserError: as `open_images`.
    """
    datasets = {split: recipe.make(split) for split in ("train", "val")}
    labels = {split: _labels(recipe, split, dataset) for split, dataset in datasets.items()}
    classes = _classes(recipe, datasets["train"], labels)
    splits = {}
    for split, dataset in datasets.items():
        given = _listed(recipe, split, "names", dataset) or ()
        names = [str(name) for name in given] or [f"{split}_{i}" for i in range(len(labels[split]))]
        if len(names) != len(labels[split]):
            raise UserError(
                f"data.name: {recipe.name} has {len(names)} names and {len(labels[split])} samples ({split})"
            )
        splits[split] = [
            (f"{split}/{i}", name, label) for i, (name, label) in enumerate(zip(names, labels[split], strict=True))
        ]
    # Its listing, of which the key is made, stands for the dataset.
    source = FileSource(Path(recipe.name), "", {recipe.name: (0, int(key or "0", 16))}, url=recipe.name)
    return OwnPlan(
        dataset="own",
        source=source,
        classes=classes,
        splits=splits,
        size=recipe.config.image_size,
        resize=True,
        layout=f"{recipe.name}, split train and val",
        decoder="rayexp.data.own:decode",
        recipe=recipe.to_json(),
    )


def _labels(recipe: Recipe, split: str, dataset: Any) -> list[int]:
    """The labels of a split: its `targets`, or what its samples say."""
    if not (hasattr(type(dataset), "__len__") and hasattr(type(dataset), "__getitem__")):
        raise UserError(
            f"data.name: {recipe.name} gives a {type(dataset).__name__} for split={split!r}; expected a dataset with "
            "__len__ and __getitem__"
        )
    count = _asked(recipe, split, "__len__", lambda: len(dataset))
    if not count:
        raise UserError(f"data.name: {recipe.name} has no samples for split={split!r}")
    _check_repeats(recipe, split, dataset)
    targets = _listed(recipe, split, "targets", dataset)
    if targets is not None:
        labels = [_label(recipe, split, i, value) for i, value in enumerate(targets)]
        if len(labels) != count:
            raise UserError(f"data.name: {recipe.name} has {len(labels)} targets and {count} samples ({split})")
        return labels
    text = recipe.to_json()
    calls = [[text, split, start, min(count, start + CHUNK)] for start in range(0, count, CHUNK)]
    found = pool.ordered("rayexp.data.own:labels", iter(calls), min(pool.cores(), len(calls)))
    return [int(label) for part in found for label in np.frombuffer(part, np.int64)]


def _asked(recipe: Recipe, split: str, what: str, ask: Callable[[], Any]) -> Any:
    """What a dataset says of itself (UserError where its code fails)."""
    try:
        return ask()
    except (Exception, SystemExit) as error:
        why = failure(error, recipe.code)
        raise UserError(f"data.name: {recipe.name}: {what} of split={split!r} fails ({why})") from error


def _listed(recipe: Recipe, split: str, attribute: str, dataset: Any) -> list[Any] | None:
    """The values of an attribute of a dataset; None where it has none."""

    def values() -> list[Any] | None:
        found = getattr(dataset, attribute, None)
        return None if found is None else list(found)

    found: list[Any] | None = _asked(recipe, split, attribute, values)
    return found


def _check_repeats(recipe: Recipe, split: str, dataset: Any) -> None:
    """Refuse a dataset that gives another image when asked again."""
    first, second = (np.asarray(_picture(recipe, split, 0, _sample(recipe, split, dataset, 0)[0])) for _ in range(2))
    if not np.array_equal(first, second):
        raise UserError(
            f"data.name: {recipe.name} gives another image when sample 0 of {split} is read again; images are packed "
            "once, and what is random belongs into data.augment"
        )


def _classes(recipe: Recipe, dataset: Any, labels: Mapping[str, list[int]]) -> tuple[tuple[str, str], ...]:
    """(id, name) of each class, by the dataset's `classes`, else the labels' numbers."""
    most = max(max(of) for of in labels.values()) + 1
    given = _listed(recipe, "train", "classes", dataset)
    if given is None:
        if most > max(2, sum(map(len, labels.values()))):
            raise UserError(
                f"data.name: {recipe.name} has labels up to {most - 1}, more than samples; labels count from 0, and "
                "`classes` names those without a sample"
            )
        return tuple((str(i), str(i)) for i in range(max(2, most)))
    names = [tuple(map(str, one)) if isinstance(one, tuple | list) else (str(one), str(one)) for one in given]
    if len(names) < most or len(names) < 2 or any(len(one) != 2 for one in names):
        raise UserError(f"data.name: {recipe.name} has {len(names)} classes, and labels up to {most - 1}")
    return tuple((one[0], one[1]) for one in names)


def labels(recipe: str, split: str, start: int, stop: int) -> bytes:
    """The labels of some samples, int64, in the pool."""
    made, dataset = _made(recipe, split)
    found = [_label(made, split, i, _sample(made, split, dataset, i)[1]) for i in range(start, stop)]
    return np.array(found, np.int64).tobytes()


def decode(recipe: str, names: list[str], labels: list[int], size: int) -> bytes:
    """The pixels of some samples, in the pool (see decode.decode); names are `train/17`."""
    pixels = np.empty((len(names), size, size, 3), np.uint8)
    for row, (name, label) in enumerate(zip(names, labels, strict=True)):
        split, _, number = name.partition("/")
        made, dataset = _made(recipe, split)
        image, found = _sample(made, split, dataset, int(number))
        if _label(made, split, int(number), found) != label:
            raise UserError(
                f"data.name: {made.name}: sample {number} of {split} has the label {found}, its targets say {label}"
            )
        pixels[row] = np.asarray(fit(_picture(made, split, int(number), image), size))
    return answer(pixels)


@functools.lru_cache(maxsize=2)
def _made(recipe: str, split: str) -> tuple[Recipe, Any]:
    made = Recipe.from_json(recipe)
    return made, made.make(split)


def _sample(recipe: Recipe, split: str, dataset: Any, number: int) -> tuple[Any, Any]:
    try:
        image, label = dataset[number]
    except (Exception, SystemExit) as error:
        why = failure(error, recipe.code)
        raise UserError(
            f"data.name: {recipe.name}: sample {number} of {split} cannot be read as (image, label) ({why})"
        ) from error
    return image, label


def _label(recipe: Recipe, split: str, number: int, value: Any) -> int:
    try:
        label = operator.index(value)
    except TypeError:
        label = -1
    if not 0 <= label < 2**31:
        raise UserError(
            f"data.name: {recipe.name}: sample {number} of {split} has the label {value!r}; expected a whole "
            "number from 0"
        )
    return label


def _picture(recipe: Recipe, split: str, number: int, image: Any) -> Image.Image:
    """A sample's image in RGB."""
    try:
        if not isinstance(image, Image.Image):
            image = Image.fromarray(_bytes(image))
        return eight_bits(image).convert("RGB")
    except Exception as error:  # Pillow reads a file now, and each of its formats has errors of its own
        raise UserError(f"data.name: {recipe.name}: sample {number} of {split} is no image ({error})") from error


def _bytes(image: Any) -> NDArray[np.uint8]:
    """An array or a tensor as uint8[height, width(, 3)]."""
    if hasattr(image, "detach"):  # a tensor of PyTorch's
        array = image.detach().cpu().numpy()
        if array.ndim == 3:
            array = np.moveaxis(array, 0, -1)
    else:
        array = np.asarray(image)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise ValueError(f"shape {np.shape(image)}; expected height x width, with 1 or 3 channels (a tensor: in front)")
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError("floats outside of 0 to 1")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"{array.dtype}; allowed: uint8, or floats from 0 to 1")
    return np.ascontiguousarray(array)


# ---------------------------------------------------------------------- text


def open_text(config: DataConfig, code: Sequence[str] | None) -> TextData:
    """The text of a dataset of the user's own, encoded on first use; the vocabulary is that of `train`.

    Raises:
        UserError: it cannot be imported or made, or gives no lines of text.
    """
    made = Recipe.of(config, code)
    ingredients = made.ingredients(None)
    packed = text.home() / recipe.folder_name(ingredients, recipe.key(ingredients))

    def files() -> dict[str, bytes]:
        splits = {to: text.words("\n".join(_lines(made, split)), f"{made.name}, split {split}") for to, split in _TEXT}
        return text.packed_files("own", *text.encode(splits, known=("train",)))

    found = text.pack_once(packed, files)
    uses.note(packed, ingredients)
    return text.capped(*found, config)


def gives_text(recipe: Recipe) -> bool:
    """Whether what comes first is a line of text (UserError: the dataset cannot be made)."""
    made = recipe.make("train")
    try:
        return isinstance(next(iter(made), None), str)
    except (Exception, SystemExit):  # who reads the samples tells of it, by their number
        return False


_TEXT = (("train", "train"), ("valid", "val"), ("test", "test"))


def _lines(recipe: Recipe, split: str) -> list[str]:
    made = recipe.make(split)
    try:
        lines = list(made)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"data.name: {recipe.name}: the lines of {split} cannot be read ({failure(error, recipe.code)})"
        ) from error
    for number, line in enumerate(lines):
        if not isinstance(line, str):
            raise UserError(
                f"data.name: {recipe.name}: line {number} of {split} is {type(line).__name__}; expected lines of text"
            )
    return [part for line in lines for part in line.removesuffix("\n").split("\n")]
