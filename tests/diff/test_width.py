"""The tables of `diff` on a terminal of 80 and of 100 columns: no name of an image, a class or a checkpoint is cut."""

from __future__ import annotations

import numpy as np

from rayexp.cli import _diff_tables
from rayexp.diff.churn import diff_all
from rayexp.diff.images import diff_images
from rayexp.diff.pair import read_pair
from rayexp.diff.text import diff_text
from rayexp.diff.weights import diff_weights

CLASSES = ["Egyptian cat", "dugong, Dugong dugon", "barbershop", "yurt", "Chihuahua", "sombrero, a broad-brimmed hat"]


def test_images(makes, terminal):
    names = [f"validation_image_{i:05d}.JPEG" for i in range(300)]
    run = makes.random_images(300, 6, 3, name="tiny_imagenet", names=names, words=CLASSES)
    report = diff_images(*read_pair((run, 1), (run, 3)))
    _diff_tables.show_images(report, 20)
    out = terminal()
    assert all(f"  {flip.name}  " in out for flip in report.flips[:20])
    assert out.count(f"{run.id}@") >= 2
    assert "Egyptian" in out


def test_weights(makes, terminal):
    names = [f"features.denseblock{i}.denselayer24.conv2" for i in (1, 2)]
    weights = [{f"{name}.weight": np.full((1024, 512), e, np.float32) for name in names} for e in (1, 2)]
    run = makes.random_images(20, 3, 2, weights=weights)
    _diff_tables.show_weights(diff_weights((run, 1), (run, 2)), 5)
    out = terminal()
    assert all(f" {name} " in out for name in names)


def test_text(makes, arrays, terminal):
    loss = np.linspace(1, 5, 200)
    tokens = np.arange(200) % 8
    words = ["<unk>", "<eos>", "=", "internationalisation", "the", "of", "a", "dog"]
    epochs = [arrays.tokens(tokens, loss), arrays.tokens(tokens, loss[::-1])]
    run = makes.text(epochs, words, name="quickstart-language")
    _diff_tables.show_text(diff_text(*read_pair((run, 1), (run, 2))), 5)
    assert f"{run.id}@2" in terminal()


def test_churn(makes, terminal):
    run = makes.random_images(100, 5, 24, name="tiny_imagenet")
    _diff_tables.show_churn(diff_all(run, run.epochs()))
    assert run.id in terminal()
