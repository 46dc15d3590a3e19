"""Stand-ins for data that is not there: of the right kind, with as many classes or words, and nothing in them; the size
of a model depends on no more."""

from __future__ import annotations

import numpy as np

from rayexp.config import ExperimentConfig
from rayexp.config.components import WORKLOADS
from rayexp.data import ImageData, ImageSplit, TextData, shapes, wikitext2
from rayexp.errors import UserError

# How many classes (text: words) a published dataset has.
OUTPUTS = {"tiny_imagenet": 200, "shapes": len(shapes.CLASSES), "wikitext2": wikitext2.WORDS}


def outline(config: ExperimentConfig, outputs: int) -> ImageData | TextData:
    """Data of the kind that `config.data` names, with `outputs` classes or words and just enough samples to train on.

    The samples are zeros that take no memory.

    Raises:
        UserError: the workload is the user's own.
    """
    data = config.data
    if config.workload not in WORKLOADS:
        raise UserError(
            f"--classes: {config.workload} says itself how large its model is; allowed for {', '.join(WORKLOADS)}"
        )
    if config.workload == "image_classification":
        count = 2 * config.shards
        pixels = np.broadcast_to(np.uint8(0), (count, data.image_size, data.image_size, 3))
        names = tuple(f"{number}.png" for number in range(count))
        split = ImageSplit(pixels, np.zeros(count, np.int64), names, "")
        return ImageData(split, split, tuple((str(number), str(number)) for number in range(outputs)))
    tokens = np.broadcast_to(np.int32(0), (max(config.batch_size * (data.bptt + 1), 2 * data.eval_columns),))
    words = ("<eos>", *(str(number) for number in range(1, outputs)))
    return TextData(tokens, tokens, tokens, words, dict.fromkeys(("train", "valid", "test"), ""))
