"""The rules between the keys of a configuration: what contradicts, what is blamed for it, and what no run uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayexp.config import ExperimentConfig, load, parse, passed_over, read, refuse_contradictions
from rayexp.errors import UserError


@pytest.mark.parametrize("name", ["tiny_imagenet", "folder", "wikitext2", "text"])
def test_data_from_files_needs_a_root(name: str) -> None:
    with pytest.raises(UserError, match=rf"data: root: {name} needs the folder .*data.root=DIR"):
        parse({"data": {"name": name}}, ExperimentConfig, "test")
    assert parse({"data": {"name": name, "root": "d"}}, ExperimentConfig, "").data.root == Path("d")


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (
            {"batch_size": 100},
            "shards: 8 does not divide batch_size 100; allowed: 1, 2, 4, 5, 10, 20, 25, 50, or a batch_size that it "
            "divides, such as 104",
        ),
        (
            {"batch_size": 4},
            "shards: 8 does not divide batch_size 4; allowed: 1, 2, 4, or a batch_size that it divides, such as 8",
        ),
        ({"scaling": {"num_workers": 3}}, "num_workers: 3 does not divide shards 8; allowed: 0, 1, 2, 4, 8"),
        ({"scaling": {"num_workers": 16}}, "num_workers: 16 does not divide shards 8"),
        ({"scaling": {"num_workers": [5, 7]}}, "nothing from 5 to 7 divides shards 8; allowed: 1, 2, 4, 8"),
        ({"scaling": {"num_workers": [9, 9]}, "shards": 4}, "nothing from 9 to 9 divides shards 4"),
        (
            {"scaling": {"num_workers": [4, 2]}},
            "test: scaling.num_workers: expected the smallest number, then the largest, got [4, 2]",
        ),
        (
            {"data": {"augment": {"scale": [0.5, 1.5]}}},
            "test: data.augment.scale: expected the smallest number, then the largest, at most 1, got [0.5, 1.5]",
        ),
        (
            {"data": {"augment": {"ratio": [2, 1]}}},
            "test: data.augment.ratio: expected the smallest number, then the largest, got [2, 1]",
        ),
        ({"optimizer": {"nesterov": True, "momentum": 0}}, "nesterov needs a momentum above 0"),
    ],
)
def test_rules_between_keys(tree: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(tree, ExperimentConfig, "test")
    assert expected in str(caught.value)


@pytest.mark.parametrize("shards", range(1, 25))
def test_the_workers_that_are_allowed(shards: int) -> None:
    config = parse({"shards": shards, "batch_size": shards * 3}, ExperimentConfig, "")
    assert config.allowed_workers == [n for n in range(1, 25) if shards % n == 0]
    for workers in range(1, 25):
        tree = {"shards": shards, "batch_size": shards, "scaling": {"num_workers": workers}}
        if shards % workers:
            with pytest.raises(UserError, match="does not divide shards"):
                parse(tree, ExperimentConfig, "")
        else:
            parse(tree, ExperimentConfig, "")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["schedule.name=cosine", "schedule.min_lr=0.2"], r"schedule.min_lr: 0.2 is above lr 0.1; allowed: 0 to lr"),
        (["schedule.name=onecycle", "lr=1e-3", "schedule.min_lr=0.01"], r"schedule.min_lr: 0.01 is above lr 0.001"),
        (["schedule.name=onecycle", "schedule.warmup_epochs=0.5"], r"schedule.warmup_epochs: onecycle rises by itself"),
        (["data.max_train_tokens=9"], r"data.max_train_tokens is for text .*; data.name is shapes"),
        (["data.max_val_tokens=9"], r"data.max_val_tokens is for text"),
        (["data.bptt=20"], r"data.bptt is for text"),
        (["data.eval_columns=2"], r"data.eval_columns is for text"),
        (["data.name=python_docs", "data.max_train_samples=9"], r"data.max_train_samples is for images"),
        (["data.name=python_docs", "data.max_val_samples=9"], r"data.max_val_samples is for images"),
        (["data.name=python_docs", "data.image_size=32"], r"data.image_size is for images"),
        (["data.name=python_docs", "data.augment=null"], r"data.augment is for images .*; data.name is python_docs"),
        (["compile=true"], r"compile: for reduction ddp only; exact refuses it, .*; allowed with exact: false"),
    ],
)
def test_a_contradiction_is_refused_where_it_is_written_and_not_where_an_old_run_has_it(
    tmp_path: Path, overrides: list[str], expected: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("{}")
    with pytest.raises(UserError, match=rf"^(?!.*c\.yaml).*{expected.partition(': ')[2] or expected}"):
        load(path, overrides)  # what was typed is named, and not the file
    (tmp_path / "written.yaml").write_text(read(path, overrides).to_yaml())
    with pytest.raises(UserError, match=f"written.yaml: {expected}"):
        load(tmp_path / "written.yaml")
    old = read(path, overrides)
    (tmp_path / "old.yaml").write_text(old.to_yaml())
    assert read(tmp_path / "old.yaml") == old
    with pytest.raises(UserError, match=f"^here: {expected}"):
        refuse_contradictions(old, "here")


@pytest.mark.parametrize(
    ("written", "overrides", "line"),
    [
        ("{}", ["epochs=0"], "epochs=0: expected a value above 0, got 0"),
        ("{}", ["lr=0.1", "epochs=0"], "epochs=0: expected a value above 0, got 0"),
        ("{}", ["epochs=0", "lr=-1"], "epochs=0: expected a value above 0, got 0"),  # one line: the first
        ("{}", ["epochs=0", "epochs=-1"], "epochs=-1: expected a value above 0, got -1"),
        ("epochs: 3", ["scaling={num_workers: -1}"], "'scaling={num_workers: -1}': scaling.num_workers: "),
        ("shards: 8", ["lr=1", "batch_size=100"], "batch_size=100: shards: 8 does not divide batch_size 100; allowed"),
        ("{}", ["shards=5", "batch_size=102"], "shards=5 batch_size=102: shards: 5 does not divide batch_size 102"),
        ("{}", ["epoch=3"], "epoch=3: unknown key epoch (did you mean epochs?)"),
        ("epochs: 0", ["lr=0.1"], "c.yaml: epochs: expected a value above 0, got 0"),
        ("epochs: 0", ["lr=-1"], "c.yaml: epochs: expected a value above 0, got 0"),
        ("lr: -1", ["epochs=0"], "epochs=0: expected a value above 0, got 0"),
        ("epochs: 0", [], "c.yaml: epochs: expected a value above 0, got 0"),
        ("{}", ["name=a b"], "'name=a b': "),
    ],
)
def test_what_was_typed_is_blamed_for_its_own_faults_alone(
    tmp_path: Path, written: str, overrides: list[str], line: str
) -> None:
    (tmp_path / "c.yaml").write_text(written)
    for reading in (read, load):
        with pytest.raises(UserError) as caught:
            reading(tmp_path / "c.yaml", overrides)
        assert str(caught.value).replace(f"{tmp_path}/", "").startswith(line)


@pytest.mark.parametrize("name", ["constant", "step", "cosine", "plateau"])
def test_other_schedules_warm_up(name: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{}")
    overrides = [f"schedule.name={name}", "schedule.warmup_epochs=1"]
    assert load(tmp_path / "c.yaml", overrides).schedule.warmup_epochs == 1


@pytest.mark.parametrize(
    ("tree", "on_cpu", "on_gpu"),
    [
        ({}, [], []),
        ({"precision": "tf32"}, ["precision: tf32"], []),
        ({"compile": True}, ["compile"], []),
        ({"precision": "bf16"}, [], []),
        ({"optimizer": {"name": "adamw", "momentum": 0}}, ["optimizer.momentum is for sgd"], None),
        ({"optimizer": {"name": "adamw", "nesterov": True}}, ["optimizer.nesterov is for sgd"], None),
        ({"optimizer": {"betas": [0.9, 0.95]}}, ["optimizer.betas is for adamw"], None),
        ({"optimizer": {"eps": 1e-6}}, ["optimizer.eps is for adamw, optimizer.name is sgd: not used"], None),
        ({"optimizer": {"name": "adamw", "betas": [0.9, 0.95], "eps": 1e-6, "clip": 1}}, [], None),
        ({"optimizer": {"momentum": 0, "clip": 1}}, [], None),
        ({"schedule": {"gamma": 0.5}}, ["schedule.gamma is for step and plateau, schedule.name is constant"], None),
        ({"schedule": {"name": "plateau", "gamma": 0.5}}, [], None),
        ({"schedule": {"name": "step", "gamma": 0.5, "step_epochs": 3}}, [], None),
        ({"schedule": {"name": "cosine", "step_epochs": 3}}, ["schedule.step_epochs is for step"], None),
        ({"schedule": {"name": "cosine", "min_lr": 0.01}}, [], None),
        ({"schedule": {"name": "onecycle", "min_lr": 0.01, "peak": 0.1}}, [], None),
        ({"schedule": {"name": "step", "min_lr": 0.01}}, ["schedule.min_lr is for cosine and onecycle"], None),
        ({"schedule": {"name": "cosine", "peak": 0.1}}, ["schedule.peak is for onecycle"], None),
    ],
)
def test_what_a_run_does_not_use_is_listed(tree: dict[str, Any], on_cpu: list[str], on_gpu: list[str] | None) -> None:
    config = parse(tree, ExperimentConfig, "")
    for gpu, expected in ((False, on_cpu), (True, on_cpu if on_gpu is None else on_gpu)):
        lines = passed_over(config, gpu)
        assert len(lines) == len(expected)
        for line, start in zip(lines, expected, strict=True):
            assert line.startswith(start)
