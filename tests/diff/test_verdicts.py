"""The sentence with which a page on two checkpoints begins."""

from __future__ import annotations

import numpy as np

from rayexp.diff.images import diff_images
from rayexp.diff.images_page import lead as images_lead
from rayexp.diff.pair import read_pair
from rayexp.diff.text import diff_text
from rayexp.diff.text_page import lead as text_lead


def test_what_the_verdict_says_of_images(makes, arrays):
    label = np.zeros(40, int)
    right, mixed, wrong = label, np.arange(40) % 2, label + 1
    run = makes.images([arrays.images(label, x, classes=3) for x in (right, mixed, wrong, mixed[::-1])], 3)
    said = [
        images_lead(diff_images(*read_pair((run, a), (run, b)))) for a, b in ((2, 1), (1, 2), (1, 1), (2, 4), (1, 3))
    ]
    assert said[0].startswith("B is better: acc1 50.00 → 100.00 % (+50.00 points, 95 % interval +")
    assert said[0].endswith("more than chance explains (p = 1.9e-06).")
    assert said[1].startswith("A is better: acc1 100.00 → 50.00 % (-50.00 points, 95 % interval -")
    assert said[2] == "A and B say the same of every image (acc1 100.00 %)."
    assert said[3].startswith("Neither is shown to be better: acc1 50.00 → 50.00 % (+0.00 points, 95 % interval -")
    assert said[3].endswith("which chance alone may do (p = 1.00).")


def test_what_the_verdict_says_of_texts(makes, arrays):
    rng = np.random.default_rng(0)
    token, loss = rng.integers(0, 4, 4000), rng.gamma(2, 1, 4000)
    other = loss + rng.normal(0, 0.5, 4000)
    epochs = [loss, loss + 0.5, other, np.where(token == 1, np.nan, loss)]
    run = makes.text([arrays.tokens(token, x) for x in epochs], ["<eos>", "b", "c", "d"])
    reports = [diff_text(*read_pair((run, a), (run, b))) for a, b in ((1, 2), (2, 1), (1, 1), (1, 3), (1, 4))]
    said = [text_lead(report) for report in reports]
    assert said[0].startswith("A is better: perplexity ")
    assert "(+64.87 %, 95 % interval +" in said[0]
    assert said[1].startswith("B is better: perplexity ")
    assert said[2].startswith("A and B give the same probability to every token (perplexity ")
    assert said[3].startswith("Neither is shown to be better: perplexity ")
    assert said[4].endswith(" of 4,000 have no finite probability, so neither can be called better.")
    short = makes.text([arrays.tokens(token[:30], x[:30]) for x in (loss, other)], ["<eos>", "b", "c", "d"], name="s")
    assert text_lead(diff_text(*read_pair((short, 1), (short, 2)))).startswith("The text is too short to tell")
