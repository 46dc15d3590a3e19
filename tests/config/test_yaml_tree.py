"""YAML text and KEY=VALUE overrides: their values, and what is refused in one line."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rayexp.config import CompareConfig, ExperimentConfig, load, read, yaml_tree
from rayexp.errors import UserError

LOOKS = ["123", "1e3", "1.5", "0x1F", "010", "1_000", "1:30", "null", "~", "true", "no", "2026-11-23", ".5", ".nan"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "c.yaml"


def overridden(*overrides: str, kind: Any = ExperimentConfig) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for override in overrides:
        yaml_tree.set_override(tree, override, kind)
    return tree


def refused(file: Path, text: str) -> str:
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read(file)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{file}: ")
    return str(caught.value).removeprefix(f"{file}: ")


# ---------------------------------------------------------------------- text stays text


@pytest.mark.parametrize("text", LOOKS)
def test_text_is_text_however_it_looks(file: Path, text: str) -> None:
    assert overridden(f"name={text}") == {"name": text}
    assert overridden(f"model.name={text}") == {"model": {"name": text}}
    assert overridden(f"storage_path={text}") == {"storage_path": text}
    assert overridden(f"data={{root: {text}}}")["data"]["root"] == (None if text in ("null", "~") else text)
    file.write_text(f"name: {text}\nstorage_path: {text}\nmodel: {{name: {text}}}\n")
    assert yaml_tree.read(file, ExperimentConfig) == {"name": text, "storage_path": text, "model": {"name": text}}


@pytest.mark.parametrize(
    "path", ["a b", "x: y", "[x]", "{a: b}", "a #b", "*x", "&x", "@x", "%x", "x=y", "O'Brien's", "!x"]
)
def test_a_path_needs_no_quotes_in_an_override(path: str) -> None:
    assert overridden(f"storage_path={path}") == {"storage_path": path}
    assert overridden(f"data.root='{path.replace(chr(39), chr(39) * 2)}'") == {"data": {"root": path}}


@pytest.mark.parametrize("text", ["", "~", "null", "Null", "NULL"])
def test_null_where_null_is_allowed(text: str) -> None:
    assert overridden(f"data.root={text}", f"data.augment={text}") == {"data": {"root": None, "augment": None}}
    assert overridden("data.root='null'") == {"data": {"root": "null"}}


def test_a_grids_overrides_are_keys_of_the_base(file: Path) -> None:
    tree = overridden("overrides.data.root=2026", "overrides.name=1e3", "overrides.lr=1e-3", kind=CompareConfig)
    assert tree == {"overrides": {"data": {"root": "2026"}, "name": "1e3", "lr": 0.001}}
    file.write_text(
        "base: 7\nscaling: [{use_gpu: no}]\noverrides: {data.root: 2026, data: {root: 7}, model.name: 1e3}\n"
    )
    config = load(file, kind=CompareConfig)
    assert config.base == "7"
    assert config.scaling[0].use_gpu is False
    assert config.overrides == {"data.root": "2026", "data": {"root": "7"}, "model.name": "1e3"}


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("1_000", 1000),
        ("0x1f", 31),
        ("0", 0),
        ("010", "010"),
        ("1:30", "1:30"),
        ("1e3", 1000.0),
        ("1e-3", 0.001),
        ("-2E+2", -200.0),
        ("1.5e3", 1500.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("e3", "e3"),
        ("1e", "1e"),
        (".inf", float("inf")),
        ("2026-11-23", "2026-11-23"),
        ("true", True),
        ("off", False),
        ("null", None),
        ("", None),
        ("[1, [2, x]]", [1, [2, "x"]]),
        ("{a: {1: 2}}", {"a": {"1": 2}}),
        ("'3'", "3"),
        ('"a\\tb"', "a\tb"),
        ("a b", "a b"),
    ],
)
def test_values_of_other_keys(text: str, value: Any) -> None:
    (found,) = overridden(f"model.option={text}")["model"].values()
    assert found == value
    assert type(found) is type(value)


def test_numbers_are_numbers(file: Path) -> None:
    file.write_text("lr: 1e-3\nepochs: 010\nmodel: {name: x, rate: 1e-3}\n")
    config = read(file, ["weight_decay=5E-4", "seed=1_000"])
    assert (config.lr, config.epochs, config.weight_decay, config.seed) == (0.001, 10, 0.0005, 1000)
    assert config.model.options == {"rate": 0.001}


def test_overrides_are_applied_in_order(file: Path) -> None:
    file.write_text("epochs: 1\noptimizer: {clip: 1, momentum: 0.5}\nscaling:\n")
    config = read(
        file, ["epochs=2", "epochs=3", "optimizer.clip=2", "scaling.num_workers=[1,4]", "data.augment={pad: 4}"]
    )
    assert config.epochs == 3
    assert (config.optimizer.clip, config.optimizer.momentum) == (2, 0.5)
    assert config.scaling.num_workers == (1, 4)
    assert config.data.augment is not None
    assert config.data.augment.pad == 4


@pytest.mark.parametrize("override", ["lr", "=1", ".lr=1", "data.=1", "data..root=1", ""])
def test_an_override_without_key_or_value(override: str) -> None:
    with pytest.raises(UserError, match=r"expected KEY=VALUE, for example"):
        overridden(override)


@pytest.mark.parametrize(
    "value", ["{", "[1", "'x", "!!python/name:os.system", "1" * 5000, "[" * 5000, "{a: 1, a: 2}", "[*]"]
)
def test_a_value_that_is_no_yaml(value: str) -> None:
    with pytest.raises(UserError, match=r"the value is not YAML; .* is safe in quotes, as 'KEY=\[\"\*\"\]'"):
        overridden(f"model.option={value}")


def test_a_key_below_a_single_value() -> None:
    with pytest.raises(UserError, match=r"^lr.x: lr is a single value and has no keys under it"):
        overridden("lr=1", "lr.x=2")


# ---------------------------------------------------------------------- refused files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs: 1\nlr: 2\nepochs: 3\n", "not YAML (line 3 says epochs a second time)"),
        ("data: {name: shapes, name: shapes}", "not YAML (line 1 says name a second time)"),
        ("model:\n  name: x\n  a:\n    - {b: 1}\n    - b: 1\n      b: 2\n", "not YAML (line 6 says b a second time)"),
        ("1: a\n'1': b\n", "not YAML (line 2 says 1 a second time)"),
        ("[1, 2]", "expected a mapping of keys to values, found list"),
        ("3", "expected a mapping of keys to values, found int"),
        ("words", "expected a mapping of keys to values, found str"),
        ("on: 1", "unknown key on"),
        ("1: 2", "unknown key 1"),
        ("? [a]\n: 1", "not YAML"),
        ("a: [", "not YAML"),
        (
            "data:\n\timage_size: 32",
            "not YAML (line 2: found character '\\t' that cannot start any token; indent by",
        ),
        (
            "data:\n  name: shapes\n image_size: 32",
            "not YAML (line 3: expected <block end>, but found '<block mapping start>'; check the indentation)",
        ),
        ("lr: 1\n---\nlr: 2", "not YAML (line 2: expected a single document in the stream but found another document)"),
        ("!!python/object/apply:os.system [ls]", "not YAML (line 1: could not determine a constructor"),
        ("name: \x00", "not YAML"),
        ("seed: " + "1" * 5000, "not YAML (Exceeds the limit (4300 digits)"),
        ("lr: .nan", "lr: expected a finite number, got"),
        ("lr: 1e999", "lr: expected a finite number, got"),
    ],
)
def test_files_that_are_refused(file: Path, text: str, expected: str) -> None:
    assert refused(file, text).startswith(expected)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.yaml: cannot be read \(No such file"):
        read(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        read(tmp_path)
    (tmp_path / "latin").write_bytes(b"name: \xff\n")
    with pytest.raises(UserError, match=r"latin: not UTF-8 \(byte 7\); save it as UTF-8$"):
        read(tmp_path / "latin")


def test_what_editors_of_windows_write_is_read(file: Path) -> None:
    file.write_bytes("\ufeff# größer\r\nname: big\r\nlr: 0.5\r\ndata:\r\n  image_size: 32\r\n".encode())
    config = read(file)
    assert (config.name, config.lr, config.data.image_size) == ("big", 0.5, 32)


def test_a_file_that_is_read_again_is_as_it_stands(file: Path) -> None:
    file.write_text("code: [a]\nmodel: {name: resnet18}\n")
    tree = yaml_tree.read(file, ExperimentConfig)
    tree["code"].append("b")
    tree["model"]["name"] = "another"
    assert yaml_tree.read(file, ExperimentConfig) == {"code": ["a"], "model": {"name": "resnet18"}}
    file.write_text("lr: 3\n")
    assert yaml_tree.read(file, ExperimentConfig) == {"lr": 3}


def test_an_empty_file_has_all_defaults(file: Path) -> None:
    for text in ("", "\n# nothing\n", "---\n", "null"):
        file.write_text(text)
        assert read(file) == ExperimentConfig()


@pytest.mark.parametrize("text", ["[" * 3000, "{a: " * 3000, "a: " + "[" * 40 + "]" * 40, "- " * 100 + "x"])
def test_deep_nesting_is_one_line(file: Path, text: str) -> None:
    assert refused(file, text) == f"not YAML (nested deeper than {yaml_tree.DEPTH} levels)"


def test_nesting_that_is_not_deep(file: Path) -> None:
    deep = "[" * (yaml_tree.DEPTH - 2) + "]" * (yaml_tree.DEPTH - 2)
    file.write_text(f"model: {{name: x, a: {deep}, b: {deep}}}")
    assert set(read(file).model.options) == {"a", "b"}


@pytest.mark.parametrize("where", ["model: {name: x, bomb: *z}", "zz: 1"])
def test_an_alias_bomb_is_one_line(file: Path, where: str) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    names = "abcdefghijklmnopqrstuvwxyz"
    for before, name in pairwise(names):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]")
    assert refused(file, "\n".join([*lines, where])) in (
        f"not YAML (its aliases unfold to more than {yaml_tree.SIZE:,} values)",
        f"not YAML (its aliases nest deeper than {yaml_tree.DEPTH} levels)",
    )


def test_how_much_aliases_may_unfold_to(file: Path) -> None:
    text = f"model:\n  name: x\n  a: &a [{', '.join('x' * 99)}]\n  b: [{', '.join(['*a'] * 90)}]\n"
    file.write_text(text)
    assert len(read(file).model.options["b"]) == 90
    assert "unfold to more than 10,000 values" in refused(file, text.replace("b: [", "b: [" + "*a, " * 12))


def test_an_alias_of_itself_is_one_line(file: Path) -> None:
    line = f"not YAML (its aliases nest deeper than {yaml_tree.DEPTH} levels)"
    assert refused(file, "model: &m {name: x, inner: *m}") == line
    assert refused(file, "model:\n  name: x\n  a: &a [*a, *a]\n") == line


def test_anchors_and_merges_are_allowed_and_share_nothing(file: Path) -> None:
    file.write_text("model: {name: x, a: &a {n: 1}, b: *a}\noptimizer: &o {clip: 1}\ncheckpoint:\n  every_steps: 3\n")
    config = read(file, ["model.a.n=2"])
    assert config.model.options == {"a": {"n": 2}, "b": {"n": 1}}
    file.write_text("model:\n  name: x\n  base: &b {n: 1, m: 2}\n  more: {<<: *b, n: 3}\n")
    assert read(file).model.options["more"] == {"n": 3, "m": 2}


# ---------------------------------------------------------------------- there and back

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(LOOKS)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)


KEYS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6).filter(lambda key: key != "name")
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


@given(options=st.dictionaries(KEYS, VALUES, max_size=4))
def test_what_is_dumped_is_read_back(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    tree = {"model": options}
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(yaml_tree.dump(tree), encoding="utf-8")
    assert yaml_tree.read(path, ExperimentConfig) == tree
    # Any other reader of YAML sees the same.
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == tree
