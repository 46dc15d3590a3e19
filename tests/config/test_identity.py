"""What of a configuration the noise between seeds belongs to."""

from __future__ import annotations

import pytest

from rayexp.config import ExperimentConfig, parse
from rayexp.config.identity import ELSEWHERE, identity, identity_key

BASE = {"data": {"name": "shapes"}, "model": {"name": "resnet18", "width": 8}, "optimizer": {"name": "adamw"}}


def config(**more):
    return parse({**BASE, **more}, ExperimentConfig, "test")


@pytest.mark.parametrize(
    "more",
    [
        {"seed": 5},
        {"name": "other"},
        {"storage_path": "/elsewhere"},
        {"scaling": {"num_workers": 4, "use_gpu": False}},
        {"epochs": 7},
        {"threads_per_shard": 2},
        {"max_failures": 0},
        {"checkpoint": {"every_steps": 5}},
        {"data": {"name": "shapes", "root": "/data", "resident": False}},
        {"capture": False},
        {"lr": 0.1},  # which is the default
    ],
)
def test_who_computes_it_and_where_is_another_matter(more):
    assert identity(config(**more)) == identity(config())
    assert identity_key(config(**more)) == identity_key(config())


@pytest.mark.parametrize(
    "more",
    [
        {"lr": 0.2},
        {"batch_size": 128},
        {"shards": 4},
        {"reduction": "ddp"},
        {"precision": "bf16"},
        {"model": {"name": "resnet18", "width": 16}},
        {"data": {"name": "shapes", "max_train_samples": 64}},
        {"data": {"name": "shapes", "augment": None}},
        {"schedule": {"name": "cosine"}},
        {"optimizer": {"name": "sgd"}},
    ],
)
def test_what_is_trained_counts(more):
    assert identity_key(config(**more)) != identity_key(config())


def test_the_identity_names_what_is_set():
    assert identity(config(lr=0.3, seed=4)) == {"lr": 0.3, "model.width": 8, "optimizer.name": "adamw"}


def test_code_counts_by_its_content(tmp_path):
    """Each run has a copy of its own."""
    for folder, text in (("a", "x = 1"), ("b", "x = 1"), ("c", "x = 2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(text)
    a, b, c = (config(code=[str(tmp_path / folder)]) for folder in "abc")
    assert identity_key(a) == identity_key(b) != identity_key(c)
    assert identity_key(a) != identity_key(config())
    (tmp_path / "a" / "mine.py").unlink()
    (tmp_path / "a").rmdir()
    assert str(tmp_path / "a") in identity(a)["code"]  # it opens, and is like no other


def test_every_key_that_does_not_count_is_one():
    for key in ELSEWHERE:
        section, _, leaf = key.partition(".")
        fields = ExperimentConfig.model_fields
        if key != "tracking":
            assert section in fields
            assert not leaf or leaf in fields[section].annotation.model_fields
