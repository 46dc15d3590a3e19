"""A dataset of your own: `data.name: ./own_dataset.py:Spots` in own_dataset.yaml.

It draws what it gives, so that the example needs no files. One that reads files asks for `root`, the folder that
`data.root` names.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Spots:
    """Grey images with one to three bright spots; the label is how many there are, less one.

    Args:
        split: `train` or `val`; rayexp gives it.
        count: images in the training split; a quarter of that validates.
        side: height and width in pixels.
    """

    classes = ("one spot", "two spots", "three spots")

    def __init__(self, split: str, count: int = 600, side: int = 32) -> None:
        self.split, self.side = split, side
        self.count = count if split == "train" else count // 4
        self.targets = [i % 3 for i in range(self.count)]  # optional: else every sample is asked for its label

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        """The same image whenever it is asked for: it is packed once, and data.augment varies it."""
        draws = np.random.default_rng([i, self.split == "val"])
        image = draws.integers(0, 60, (self.side, self.side)).astype(np.uint8)
        cells = draws.permutation(16)[: self.targets[i] + 1]  # of a grid of 4 x 4, so that no two spots touch
        for row, column in zip(*divmod(cells, 4), strict=True):
            y, x = (row * self.side // 4 + 2, column * self.side // 4 + 2)
            image[y : y + self.side // 8, x : x + self.side // 8] = 255
        return image, self.targets[i]
