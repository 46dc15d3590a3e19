"""max_train_samples and max_val_samples: balanced, nested, independent of everything but the labels' order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayexp.data import ImageSplit
from rayexp.data.packed import balanced_rows, subset

labels = st.lists(st.integers(0, 6), min_size=1, max_size=60).map(lambda xs: np.array(xs, np.int64))


def by_hand(labels: list[int], most: int) -> list[int]:
    """The rule, said slowly: go from class to class, each time taking the first row not yet taken."""
    left = {c: [row for row, label in enumerate(labels) if label == c] for c in sorted(set(labels))}
    taken: list[int] = []
    while any(left.values()):
        for rows in left.values():
            if rows:
                taken.append(rows.pop(0))
    return sorted(taken[:most])


@given(labels, st.integers(1, 70))
def test_the_rule(labels, most):
    assert balanced_rows(labels, most).tolist() == by_hand(labels.tolist(), most)


@given(labels, st.integers(1, 70))
def test_balanced_and_nested(labels, most):
    rows = balanced_rows(labels, most)
    assert len(rows) == min(most, len(labels))
    assert (np.diff(rows) > 0).all()
    assert set(rows) <= set(balanced_rows(labels, most + 1))
    chosen, whole = np.bincount(labels[rows], minlength=7), np.bincount(labels, minlength=7)
    for c in range(7):  # no class is ahead of another by more than one, unless that one is used up
        assert chosen[c] == whole[c] or chosen[c] >= chosen.max() - 1


@given(labels, st.integers(1, 70))
def test_split(labels, most):
    n = len(labels)
    images = np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    whole = ImageSplit(images, labels, tuple(f"{k}.png" for k in range(n)), "ab" * 32)
    part = subset(whole, most)
    if most >= n:
        assert part is whole
        return
    assert np.shares_memory(part.images, images)
    assert len(part) == len(part.names) == most
    everything = np.arange(most)[::-1]
    assert np.array_equal(part.read(everything), whole.read(part.rows[everything]))
    assert part.names == tuple(f"{row}.png" for row in part.rows)
    assert np.array_equal(part.labels, labels[part.rows])
    assert part.sha not in (whole.sha, subset(whole, most + 1).sha)
    assert part.sha == subset(whole, most).sha


def test_read_copies():
    images = np.zeros((4, 2, 2, 3), np.uint8)
    split = ImageSplit(images, np.zeros(4, np.int64), ("a", "b", "c", "d"), "")
    out = split.read(np.array([1, 1, 3]))
    out[:] = 9
    assert out.shape == (3, 2, 2, 3)
    assert not images.any()
