"""What a configuration may say: every key with its default and its limits. The rules between keys: test_rules.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from rayexp.config import CompareConfig, ExperimentConfig, fields, parse
from rayexp.errors import UserError

# Written out by hand: what docs and old runs rely on.
DEFAULTS: dict[str, Any] = {
    "name": "run",
    "workload": "image_classification",
    "code": None,
    "data": {
        "name": "shapes",
        "root": None,
        "max_train_samples": None,
        "max_val_samples": None,
        "max_train_tokens": None,
        "max_val_tokens": None,
        "image_size": 64,
        "resident": "auto",
        "augment": {"scale": [0.08, 1.0], "ratio": [0.75, 4 / 3], "flip": True, "pad": 0},
        "bptt": 35,
        "eval_columns": 10,
    },
    "model": {"name": "resnet18", "weights": None, "freeze": [], "freeze_statistics": True},
    "epochs": 1,
    "batch_size": 256,
    "lr": 0.1,
    "weight_decay": 0.0001,
    "label_smoothing": 0,
    "optimizer": {
        "name": "sgd",
        "momentum": 0.9,
        "nesterov": False,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "clip": None,
        "decay_norm_and_bias": True,
    },
    "schedule": {"name": "constant", "warmup_epochs": 0, "step_epochs": 30, "gamma": 0.1, "min_lr": 0, "peak": 0.3},
    "seed": 0,
    "precision": "fp32",
    "reduction": "exact",
    "shards": 8,
    "threads_per_shard": None,
    "cpu_kernels": True,
    "compile": False,
    "capture": "auto",
    "scaling": {
        "num_workers": 0,
        "use_gpu": "auto",
        "cpus_per_worker": None,
        "gpus_per_worker": 1,
        "lanes": None,
    },
    "checkpoint": {"keep": "all", "every_steps": None, "every_seconds": None},
    "tracking": ["tensorboard"],
    "max_failures": 3,
    "storage_path": "runs",
}
COMPARE_DEFAULTS: dict[str, Any] = {
    "name": "compare",
    "overrides": {},
    "precision": [],
    "reduction": [],
    "repeats": 3,
    "mode": ["strong"],
    "batch_size": [],
    "target": {},
    "price_per_device_hour": {},
    "currency": "USD",
    "interconnect": {},
    "baseline": True,
    "storage_path": "runs",
}

COUNT = ([1, 10**6], [0, -1, 1.5, "x", True])
OPTIONAL_COUNT = ([None, *COUNT[0]], COUNT[1])
SHARE = ([0, 0.5, 1], [-0.01, 1.01, "x", float("nan"), True])
ABOVE_0 = ([1e-300, 3, 1e300], [0, -1, float("inf"), float("nan"), "x", True])
FROM_0 = ([0, 0.5, 1e300], [-1e-9, float("inf"), float("nan"), True])
SWITCH = ([True, False], ["perhaps", 2])
LIMITS: dict[str, tuple[list[Any], list[Any]]] = {
    "name": (["a", "0", "A.b_c-d", "x" * 64], ["", "-a", ".a", "a b", "a/b", "ä", "x" * 65, "a\nb"]),
    "workload": (["image_classification", "language_model", "a.b:C", "a.py:C"], ["image", "", None, "a:", "a/b:C"]),
    "code": ([None, [], ["./a.py", "b"]], ["a.py", 3, [3], [None]]),
    "data.name": (["shapes", "python_docs", "a.b:C", "./a.py:C"], ["shape", "", None, "a:", ":C", "a b:C"]),
    "data.root": ([None, "x", "/x/y"], [3, ["x"]]),
    "data.max_train_samples": OPTIONAL_COUNT,
    "data.max_val_samples": OPTIONAL_COUNT,
    "data.max_train_tokens": OPTIONAL_COUNT,
    "data.max_val_tokens": OPTIONAL_COUNT,
    "data.image_size": COUNT,
    "data.augment": ([None, {}, {"flip": False}], [3, True, {"flips": 1}]),
    "data.augment.scale": ([[0.1, 1], [0.5, 0.5]], [[0, 1], [0.6, 0.5], [0.5, 1.1], [0.5], [0.1, 0.2, 0.3]]),
    "data.augment.ratio": ([[1, 1], [0.5, 2]], [[2, 0.5], [0, 1], 1]),
    "data.augment.flip": SWITCH,
    "data.augment.pad": ([0, 4], [-1, 0.5]),
    "data.bptt": COUNT,
    "data.eval_columns": COUNT,
    "model.name": (["resnet18", "anything", "a.b:C", "/x/a.py:C.d"], [3, None, "a:", "a-b:C"]),
    "model.weights": ([None, "x.pt", "run@best", "DEFAULT"], [3, ["x"]]),
    "model.freeze": ([[], ["layer*", "fc.*"]], [None, 3, [3], {"a": 1}]),
    "model.freeze_statistics": SWITCH,
    "epochs": COUNT,
    "batch_size": ([8, 64], [0, -8, 12.5]),
    "lr": ABOVE_0,
    "weight_decay": FROM_0,
    "label_smoothing": ([0, 0.99], [-0.1, 1]),
    "optimizer.name": (["sgd", "adamw", "a.b:C", "a.py:C"], ["adam", None, "a:"]),
    "optimizer.momentum": SHARE,
    "optimizer.nesterov": SWITCH,
    "optimizer.betas": ([[0, 0.5], [0.9, 0.95]], [[0.9], [0.9, 1.1], [0.9, 1], [1, 0.9], 0.9]),
    "optimizer.eps": ABOVE_0,
    "optimizer.clip": ([None, *ABOVE_0[0]], ABOVE_0[1]),
    "optimizer.decay_norm_and_bias": SWITCH,
    "schedule.name": (["constant", "step", "cosine", "onecycle", "plateau", "a.b:C"], ["cos", None, "a:"]),
    "schedule.warmup_epochs": FROM_0,
    "schedule.step_epochs": COUNT,
    "schedule.gamma": ABOVE_0,
    "schedule.min_lr": FROM_0,
    "schedule.peak": SHARE,
    "seed": ([0, 2**63 - 1], [-1, 2**63, 0.5]),
    "precision": (["fp32", "tf32", "bf16", "auto"], ["fp16", 32]),
    "reduction": (["exact", "ddp"], ["fsdp"]),
    "shards": ([1, 2, 256], [0, 3, 512]),
    "threads_per_shard": OPTIONAL_COUNT,
    "cpu_kernels": SWITCH,
    "compile": SWITCH,
    "scaling.num_workers": ([0, 1, 8, [1, 8], [3, 4]], [-1, 3, 16, [8, 1], [0, 2], [3, 3], [1, 2, 4], True]),
    "data.resident": (["auto", True, False], ["perhaps", None]),
    "capture": (["auto", True, False], ["perhaps", None]),
    "scaling.use_gpu": (["auto", True, False], ["perhaps", None]),
    "scaling.cpus_per_worker": ([None, 0.5, 4], [0, -1]),
    "scaling.gpus_per_worker": ([0.25, 1, 2], [0, -1, None]),
    "scaling.lanes": OPTIONAL_COUNT,
    "checkpoint.keep": (["all", "best", 1, 30], ["some", 0, -1, 1.5, None, ["best"]]),
    "checkpoint.every_steps": OPTIONAL_COUNT,
    "checkpoint.every_seconds": ([None, 0.5, 600], [0, -1]),
    "tracking": ([[], ["tensorboard", "mlflow"], ["wandb"]], [["aim"], None, 3, {"mlflow": 1}]),
    "max_failures": ([0, 100], [-1, 0.5]),
    "storage_path": (["runs", "/x", "~/x"], ["s3://bucket/runs", "gs://x", 3]),
}
COMPARE_LIMITS: dict[str, tuple[list[Any], list[Any]]] = {
    "name": (["devices"], ["a b"]),
    "base": (["x.yaml"], [None, 3]),
    "overrides": ([{}, {"data.root": "x"}], [3]),
    "scaling": ([[{}], [{"num_workers": 2}, {"use_gpu": True}]], [[], {}, [{"workers": 2}]]),
    "precision": ([[], ["fp32", "bf16"], ["auto"]], [["fp31"], "fp32"]),
    "reduction": ([[], ["exact", "ddp"]], [["sum"]]),
    "repeats": COUNT,
    "mode": (["strong", ["weak"], ["strong", "weak"]], ["both", [], ["weak", "weak"], 3]),
    "batch_size": ([[], 64, [64, 256]], [[0], [64, 64], "many", True]),
    "target": ([{}, {"acc1": 40}], [{"acc1": "high"}, 40]),
    "price_per_device_hour": ([{}, {"cpu": 0, "gpu": 2.5}], [{"tpu": 1}, {"cpu": -1}]),
    "currency": (["EUR"], [3]),
    "interconnect": ([{}, {"bandwidth_gbit": 9, "latency_us": 5}], [{"bandwidth_gbit": 0}, {"speed": 1}]),
    "baseline": SWITCH,
    "storage_path": (["runs"], ["s3://x"]),
}


def leaves(tree: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted keys of a tree."""
    return {
        key
        for name, value in tree.items()
        for key in ([f"{prefix}{name}"] if not isinstance(value, dict) else leaves(value, f"{prefix}{name}."))
    }


def tree(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def make(key: str, value: Any) -> ExperimentConfig:
    return parse(tree(key, value), ExperimentConfig, "test")


def make_compare(key: str, value: Any) -> CompareConfig:
    return parse({"base": "x.yaml", "scaling": [{}], key: value}, CompareConfig, "test")


# ---------------------------------------------------------------------- keys


def test_every_default() -> None:
    assert ExperimentConfig().model_dump(mode="json") == DEFAULTS
    assert parse({}, ExperimentConfig, "test") == ExperimentConfig()
    compare = make_compare("base", "x.yaml").model_dump(mode="json")
    assert compare == {**COMPARE_DEFAULTS, "base": "x.yaml", "scaling": [DEFAULTS["scaling"]]}


def test_every_key_has_its_limits_here() -> None:
    assert leaves(DEFAULTS) <= set(LIMITS) <= leaves(DEFAULTS) | {"data.augment"}
    assert set(COMPARE_LIMITS) == set(CompareConfig.model_fields)


@pytest.mark.parametrize("key", LIMITS)
def test_limits(key: str) -> None:
    allowed, refused = LIMITS[key]
    for value in allowed:
        found: Any = make(key, value).model_dump()
        for part in key.split("."):
            found = found[part]
        if not isinstance(value, dict):
            assert (list(found) if isinstance(found, tuple) else found) in (value, Path(str(value))), value
    for value in refused:
        with pytest.raises(UserError, match=rf"^test: .*{key.split('.')[-1]}") as caught:
            make(key, value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", COMPARE_LIMITS)
def test_limits_of_a_grid(key: str) -> None:
    allowed, refused = COMPARE_LIMITS[key]
    for value in allowed:
        make_compare(key, value)
    for value in refused:
        with pytest.raises(UserError, match=f"^test: .*{key}"):
            make_compare(key, value)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("epoch", "unknown key epoch (did you mean epochs?); allowed: name, workload, code, data,"),
        ("data.bppt", "unknown key data.bppt (did you mean bptt?); allowed: name, root,"),
        ("data.augment.flp", "unknown key data.augment.flp (did you mean flip?); allowed: scale, ratio, flip, pad"),
        ("optimizer.lr", "unknown key optimizer.lr (did you mean lr?); allowed: name, momentum"),
        ("max_train_samples", "unknown key max_train_samples (did you mean data.max_train_samples?); allowed: name, "),
        ("num_workers", "unknown key num_workers (did you mean scaling.num_workers?)"),
        ("flip", "unknown key flip (did you mean data.augment.flip?)"),
        ("optimizer.wd", "allowed: name, momentum, nesterov, betas, eps, clip, decay_norm_and_bias"),
        ("schedule.warmup", "did you mean warmup_epochs?"),
        ("scaling.workers", "did you mean num_workers?"),
        ("checkpoint.every", "allowed: keep, every_steps, every_seconds"),
        ("zzz", "unknown key zzz; allowed"),
    ],
)
def test_unknown_keys_name_the_nearest(key: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        make(key, 1)
    assert expected in str(caught.value)


def test_keys_of_the_base_are_looked_for_in_a_grid() -> None:
    with pytest.raises(UserError, match=r"unknown key epochs \(did you mean overrides.epochs\?\); allowed: name, base"):
        make_compare("epochs", 3)
    with pytest.raises(UserError, match=r"unknown key num_workers \(did you mean overrides.scaling.num_workers\?\)"):
        make_compare("num_workers", 3)


def test_a_models_other_keys_are_its_options() -> None:
    model = parse({"model": {"name": "x", "stem": "small", "n": 3}}, ExperimentConfig, "").model
    assert (model.name, model.options) == ("x", {"stem": "small", "n": 3})


def test_a_value_where_keys_belong_names_them() -> None:
    for value in (None, 3, "x", []):
        with pytest.raises(
            UserError, match=r"^test: checkpoint: expected keys under it \(keep, every_steps, every_seconds\)"
        ):
            make("checkpoint", value)


def test_all_that_a_field_takes_is_said() -> None:
    with pytest.raises(UserError) as caught:
        make("scaling.use_gpu", "perhaps")
    assert str(caught.value) == ("test: scaling.use_gpu: expected auto or true or false, got 'perhaps'")
    with pytest.raises(UserError) as caught:
        make("scaling.num_workers", "many")
    assert str(caught.value) == ("test: scaling.num_workers: expected a whole number or a list, as [1, 2], got 'many'")
    with pytest.raises(UserError) as caught:
        make("scaling.num_workers", [0, 2])
    assert str(caught.value) == "test: scaling.num_workers.0: expected a value above 0, got 0"


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ExperimentConfig().epochs = 3  # type: ignore[misc]


def test_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    config = make("data", {"name": "folder", "root": "pictures"}).absolute()
    assert (config.data.root, config.storage_path) == (tmp_path / "pictures", tmp_path / "runs")
    config = parse({"data": {"name": "folder", "root": "~/p"}, "storage_path": "~"}, ExperimentConfig, "").absolute()
    assert (config.data.root, config.storage_path) == (tmp_path / "me" / "p", tmp_path / "me")
    assert ExperimentConfig().absolute().data.root is None


def _fields(kind: type[BaseModel]) -> Iterator[tuple[str, str | None]]:
    """Every key under a kind of configuration, and its description."""
    for name, field in kind.model_fields.items():
        yield f"{kind.__name__}.{name}", field.description
        for inner in fields.models_of(field.annotation):
            yield from _fields(inner)


@pytest.mark.parametrize("kind", [ExperimentConfig, CompareConfig])
def test_every_key_is_described(kind: type[BaseModel]) -> None:
    described = dict(_fields(kind))
    assert len(described) > 15
    assert [key for key, text in described.items() if not text or not text.rstrip().endswith(".")] == []
