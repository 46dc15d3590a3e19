"""Which of a user's files travel, under which names, and what a configuration's references become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rayexp.config import CompareConfig, ExperimentConfig, code, load
from rayexp.errors import UserError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder of experiments, with much in it that is no code."""
    folder = tmp_path / "mine"
    files = (
        *("net.py", "helpers.py", "labels.txt", "nets/__init__.py", "nets/deep.py", "nets/words.json", "plain/cnn.py"),
        *(".hidden.py", ".git/x.py", "__pycache__/net.py", "plain/net.pyc", "venv/pyvenv.cfg", "venv/lib.py"),
        *("runs/one/run.json", "runs/one/code/net.py"),
    )
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n")
    return folder


def travelling(*entries: Path | str) -> set[str]:
    return set(code.sources([str(entry) for entry in entries]))


def test_what_an_entry_stands_for(tree: Path) -> None:
    assert travelling(tree / "net.py") == {"net.py"}
    assert travelling(tree / "nets") == {"nets/__init__.py", "nets/deep.py", "nets/words.json"}
    assert travelling(tree / "plain") == {"cnn.py"}
    assert travelling(f"{tree}/**/*.py") == {"net.py", "helpers.py", "nets/__init__.py", "nets/deep.py", "plain/cnn.py"}
    assert travelling(f"{tree}/*.py", tree / "labels.txt") == {"net.py", "helpers.py", "labels.txt"}
    assert travelling(f"{tree}/nets/d*.py") == {"deep.py"}
    everything = {"net.py", "helpers.py", "labels.txt", "nets/__init__.py", "nets/deep.py", "nets/words.json"}
    assert travelling(tree) == everything | {"plain/cnn.py"}


@pytest.mark.parametrize("name", ["exp [v2]", "what?", "all * of it", "[ab]"])
def test_folders_may_have_the_signs_of_a_pattern_in_their_names(tree: Path, name: str) -> None:
    (tree / "a").mkdir()
    (tree / "a" / "other.py").touch()
    (folder := tree / name).mkdir()
    (folder / "net.py").write_text("class Net: ...")
    (folder / "mine.yaml").write_text("model: {name: './net.py:Net'}")
    config = load(folder / "mine.yaml")
    assert config.model.name == "net.py:Net"
    assert travelling(*(config.code or ())) == {"net.py"}


def test_a_folder_that_is_named_may_be_that_of_a_run(tree: Path) -> None:
    """As its copy's is; only what lies below one is left out."""
    before = travelling(tree)
    (tree / "run.json").touch()
    assert travelling(tree) == before | {"run.json"}


def test_links_that_lead_nowhere_do_not_travel(tree: Path) -> None:
    (tree / "plain" / "old.py").symlink_to(tree / "gone.py")
    assert travelling(tree / "plain") == travelling(f"{tree}/plain/*.py") == {"cnn.py"}


def test_what_cannot_travel(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for entry in ("gone.py", "*.txtx", "plain/*.json"):
        with pytest.raises(UserError, match=r"^code: .*: no such file or folder, or nothing in it$"):
            travelling(tree / entry)
    (tree / "plain" / "net.py").write_text("another")
    with pytest.raises(UserError, match=r"net.py and .*plain/net.py would both travel as net.py"):
        travelling(tree / "net.py", tree / "plain")
    (tree / "plain" / "net.py").write_text("# net.py\n")
    assert travelling(tree / "net.py", tree / "plain") == {"net.py", "cnn.py"}
    monkeypatch.setattr(code, "MOST_FILES", 3)
    with pytest.raises(UserError, match=r"4 files of 0\.0 MiB; allowed: 3 files of 16 MiB; largest: .*`code: "):
        travelling(tree / "nets", tree / "net.py")
    monkeypatch.setattr(code, "MOST_BYTES", 10)
    with pytest.raises(UserError, match="1 file of"):
        travelling(tree / "nets" / "deep.py")
    monkeypatch.setattr(code, "MOST_SEEN", 3)
    with pytest.raises(UserError, match="holds too much to look through"):
        travelling(tree)


def test_the_hash_is_of_names_and_contents() -> None:
    base = code.code_sha({"a.py": b"1", "b.py": b"2"})
    assert base == code.code_sha({"b.py": b"2", "a.py": b"1"})
    others = ({"a.py": b"1"}, {"a.py": b"2", "b.py": b"1"}, {"a.py": b"1", "c.py": b"2"}, {"a.py": b"1", "b.py": b"3"})
    assert len({base, *map(code.code_sha, others)}) == 5
    assert code.code_sha({}) == ""


# ---------------------------------------------------------------------- references


def opened(folder: Path, tree: dict[str, Any], *overrides: str) -> ExperimentConfig:
    (folder / "own.yaml").write_text(yaml.safe_dump(tree))
    return load(folder / "own.yaml", overrides)


def test_references_are_relative_to_the_file_that_holds_them(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tree.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "other.py").write_text("")
    (elsewhere / "json").mkdir()
    (elsewhere / "json" / "decoder.py").write_text("")
    monkeypatch.chdir(elsewhere)
    for name in ("./net.py:Net", "net.py:Net", str(tree / "net.py") + ":Net", "net:Net"):
        config = opened(tree, {"model": {"name": name}})
        assert config.model.name == "net.py:Net"
        assert config.code == (f"{tree}/**/*.py",)
    config = opened(tree, {"model": {"name": "net:Net"}, "data": {"name": "plain/cnn.py:D"}, "workload": "nets.deep:W"})
    assert (config.data.name, config.workload) == ("plain/cnn.py:D", "nets/deep.py:W")
    # On the command line they are relative to the working directory.
    config = opened(tree, {"model": {"name": "net:Net"}}, "model.name=./other.py:Net")
    assert (config.model.name, config.code) == ("other.py:Net", (f"{elsewhere}/**/*.py",))
    assert opened(tree, {"model": {"name": "json.decoder:JSONDecoder"}}, "epochs=2").code is None
    assert opened(tree, {"epochs": 2}).code is None


def test_a_grids_references_are_relative_to_the_grid_unless_they_are_typed(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tree.parent / "elsewhere"
    elsewhere.mkdir()
    for name in ("installed.py", "other.py"):
        (elsewhere / name).write_text("")
    monkeypatch.chdir(elsewhere)
    written = {"model.name": "./net.py:Net", "data.name": "installed:D", "workload": "nets.deep:W"}
    (tree / "grid.yaml").write_text(yaml.safe_dump({"base": "x", "scaling": [{}], "overrides": written}))

    def overrides(*typed: str) -> dict[str, Any]:
        return load(tree / "grid.yaml", typed, CompareConfig).overrides

    here = {"model.name": f"{tree}/net.py:Net", "data.name": "installed:D", "workload": f"{tree}/nets/deep.py:W"}
    assert overrides() == overrides("repeats=2") == here
    # Here `installed` is typed, and lies in the working directory.
    typed = overrides("overrides.data.name=installed:D", "overrides.model.name=./other.py:Net")
    assert typed["data"] == {"name": f"{elsewhere}/installed.py:D"}
    assert typed["model"] == {"name": f"{elsewhere}/other.py:Net"}
    whole = overrides("overrides={data: {name: 'installed:D'}, workload: ./other.py:W}")
    assert whole == {"data": {"name": f"{elsewhere}/installed.py:D"}, "workload": f"{elsewhere}/other.py:W"}


def test_a_package_keeps_its_name(tree: Path) -> None:
    config = opened(tree / "nets", {"model": {"name": "./deep.py:Net"}})
    assert (config.model.name, config.code) == ("nets/deep.py:Net", (str(tree / "nets"),))


def test_code_names_what_travels(tree: Path) -> None:
    config = opened(tree, {"model": {"name": "nets/deep.py:Net"}, "code": ["./nets", "labels.txt"]})
    assert config.model.name == "nets/deep.py:Net"
    assert set(code.read_code(config.code)) == {"nets/__init__.py", "nets/deep.py", "nets/words.json", "labels.txt"}
    config = opened(tree, {"model": {"name": "plain/cnn.py:Net"}, "code": ["./plain"]})
    assert config.model.name == "cnn.py:Net"
    # A file that is named and lies in none of the entries comes along.
    config = opened(tree, {"model": {"name": "./net.py:Net"}, "code": ["./plain"]})
    assert config.model.name == "net.py:Net"
    assert set(code.read_code(config.code)) == {"net.py", "cnn.py"}
    with pytest.raises(UserError, match=r"own.yaml: model.name: .*/gone.py: no such file$"):
        opened(tree, {"model": {"name": "./gone.py:Net"}})
    with pytest.raises(UserError, match=r"own.yaml: code: .*/gone: no such file or folder"):
        opened(tree, {"code": ["./gone"]})


def test_what_is_written_reads_back(tree: Path, tmp_path: Path) -> None:
    config = opened(tree, {"model": {"name": "net:Net", "width": 3}, "data": {"name": "plain/cnn.py:D", "n": [1, "x"]}})
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert load(tmp_path / "c.yaml") == config
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml("code"))
    for name, data in code.read_code(config.code).items():
        (tmp_path / "run" / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / "code" / name).write_bytes(data)
    again = load(tmp_path / "run" / "config.yaml")
    assert again == config.model_copy(update={"code": (str(tmp_path / "run" / "code"),)})
    assert code.read_code(again.code) == code.read_code(config.code)
