"""A configuration written and read back, and the files that come with rayexp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rayexp.config import CompareConfig, ExperimentConfig, load, parse, passed_over, read, shipped

ROOT = Path(__file__).parents[2]

NAMES = st.sampled_from(
    ["123", "1e3", "1e-3", "0x1F", "010", "1_000", "null", "true", "no", "2026-11-23", "1.5", "0.", "y", "NaN"]
) | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True)
# What YAML cannot hold: control characters, and a NUL in a path.
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff\ufffe\uffff"), max_size=12)
PATHS = (NAMES | TEXT).filter(lambda text: "://" not in text)
MODELS = (NAMES | TEXT).filter(lambda text: ":" not in text)  # else it is a reference
NUMBERS = st.floats(1e-12, 1e12) | st.integers(1, 10**9)
OPTIONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NAMES | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
TREES = st.fixed_dictionaries(
    {},
    optional={
        "name": NAMES,
        "data": st.fixed_dictionaries(
            {"name": st.sampled_from(["folder", "text"]), "root": PATHS},
            optional={
                "augment": st.none() | st.fixed_dictionaries({"flip": st.booleans()}),
                "bptt": st.integers(1, 99),
            },
        ),
        "model": st.fixed_dictionaries({"name": MODELS, "option": OPTIONS, "other": OPTIONS}),
        "lr": NUMBERS,
        "weight_decay": st.just(0) | NUMBERS,
        "optimizer": st.fixed_dictionaries(
            {"name": st.sampled_from(["sgd", "adamw"]), "clip": st.none() | NUMBERS, "eps": NUMBERS}
        ),
        "seed": st.integers(0, 2**63 - 1),
        "precision": st.sampled_from(["fp32", "tf32", "bf16", "auto"]),
        "scaling": st.fixed_dictionaries(
            {
                "num_workers": st.sampled_from([0, 1, 2, 4, 8, [1, 8], [2, 4]]),
                "use_gpu": st.sampled_from(["auto", True, False]),
            }
        ),
        "storage_path": PATHS,
    },
)


@settings(max_examples=150, deadline=None)
@given(tree=TREES)
def test_to_yaml_reads_back_equal(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    config = parse(tree, ExperimentConfig, "test")
    text = config.to_yaml()
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(text, encoding="utf-8")
    again = read(path)
    assert again == config
    assert again.to_yaml() == text
    # Other readers of YAML, and rayexp before it had its own, see the same.
    assert yaml.safe_load(text) == config.model_dump(mode="json")


# ---------------------------------------------------------------------- the shipped files


def merged(tree: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    return tree | {k: merged(tree[k], v) if isinstance(v, dict) else v for k, v in top.items()}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_loads_whole(path: Path, tmp_path: Path) -> None:
    said = yaml.safe_load(path.read_text())
    if "base" in said:
        grid = load(path, kind=CompareConfig)
        assert len(grid.scaling) == len(said["scaling"])
        assert (path.parent / grid.base).is_file()
        return
    config = load(path)
    assert config.name == path.stem.replace("quickstart_language", "quickstart-language")
    assert passed_over(config, on_gpu=True) == []
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load(tmp_path / "again.yaml") == config
    # Nothing that the file says is lost on the way.
    read_back = config.model_dump(mode="json")
    assert merged(read_back, said) == read_back


def test_shipped_finds_every_shipped_file() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        assert shipped(path.name) == path
