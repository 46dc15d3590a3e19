"""Which file a user means by CONFIG: their own, or one that comes with rayexp, in a checkout or installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from rayexp.config import (
    CompareConfig,
    ExperimentConfig,
    find_config,
    headline,
    load,
    parse,
    read,
    shipped,
    shipped_configs,
)
from rayexp.errors import UserError
from rayexp.grid.plan import base_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml", Path("quickstart")])
def test_a_shipped_configuration_is_found_by_name_from_any_folder(text: str | Path) -> None:
    assert find_config(text) == ROOT / "configs" / "quickstart.yaml"
    assert load(text).name == "quickstart"
    assert load("quickstart_devices", kind=CompareConfig).name == "quickstart-devices"


@pytest.mark.parametrize("typed", ["quickstart", "quickstart.yaml", "./quickstart", "./quickstart.yaml"])
def test_a_file_of_the_users_wins(here: Path, typed: str) -> None:
    (here / "quickstart.yaml").write_text("name: mine\n")
    assert load(typed).name == "mine"


def test_a_file_without_an_ending_wins_and_a_folder_does_not(here: Path) -> None:
    (here / "wikitext2").mkdir()  # as a folder of data may be called
    assert find_config("wikitext2") == shipped("wikitext2")
    (here / "quickstart").write_text("name: bare\n")
    (here / "quickstart.yaml").write_text("name: mine\n")
    assert load("quickstart").name == "bare"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("quickstrat", "quickstrat: no such file, and .* (did you mean quickstart?); `rayexp configs` lists them"),
        ("configs/wikitex2.yaml", "configs/wikitex2.yaml: no such file, .* (did you mean wikitext2?)"),
        ("other/quickstart.yaml", "other/quickstart.yaml: no such file"),
        ("zzz", "zzz: no such file, and no configuration of that name comes with rayexp; `rayexp configs` lists them"),
        ("x" * 5000, "cannot be read (File name too long)"),
        ("a\0b", "no such file"),
        ("", "a folder; expected a YAML file"),
        (".", "a folder; expected a YAML file"),
    ],
)
def test_what_is_not_there_is_named_with_the_nearest(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load(text)
    for part in said.split(" .* "):
        assert part in str(caught.value)


def test_the_directory_of_a_run_leads_to_its_configuration(here: Path) -> None:
    for kind, file in (("run", "config.yaml"), ("comparison", "compare.yaml")):
        (here / kind).mkdir()
        (here / kind / file).write_text("")
        with pytest.raises(UserError, match=f"the directory of a {kind}; its configuration is {kind}/{file}"):
            find_config(kind)


def test_a_grid_finds_its_base_beside_it_here_or_among_the_shipped(here: Path) -> None:
    grid = parse({"base": "quickstart", "scaling": [{"num_workers": 0}]}, CompareConfig, "test")
    assert base_of(grid, here / "grids").name == "quickstart"
    (here / "quickstart.yaml").write_text("name: here\n")
    assert base_of(grid, here / "grids").name == "here"
    (here / "grids").mkdir()
    (here / "grids" / "quickstart.yaml").write_text("name: beside\n")
    assert base_of(grid, here / "grids").name == "beside"
    missing = grid.model_copy(update={"base": "none.yaml"})
    with pytest.raises(UserError, match=r"grids/none\.yaml: no such file"):
        base_of(missing, here / "grids")


# ---------------------------------------------------------------------- the other kind


@pytest.mark.parametrize("overrides", [(), ("epochs=2",)])
def test_a_grid_is_no_experiment_and_the_reverse(overrides: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"devices\.yaml: a grid, for `rayexp compare`; .* base quickstart\.yaml"):
        load("devices", overrides)
    with pytest.raises(UserError, match=r"quickstart\.yaml: an experiment, for `rayexp train`; expected a grid"):
        load("quickstart", overrides, CompareConfig)


def test_every_shipped_file_is_of_one_kind() -> None:
    for path in shipped_configs().values():
        right, wrong = ExperimentConfig, CompareConfig
        if "base" in yaml.safe_load(path.read_text()):
            right, wrong = wrong, right
        read(path, kind=right)
        with pytest.raises(UserError, match="expected a"):
            read(path, kind=wrong)


def test_a_misspelt_key_is_still_named(here: Path) -> None:
    (here / "a.yaml").write_text("name: a\nepoch: 2\n")
    with pytest.raises(UserError, match=r"unknown key epoch \(did you mean epochs"):
        load("a")
    (here / "b.yaml").write_text("base: a.yaml\nscaling: [{}]\nrepeat: 1\n")
    with pytest.raises(UserError, match=r"unknown key repeat \(did you mean repeats"):
        load("b", kind=CompareConfig)
    (here / "c.yaml").write_text("scaling: {num_workers: 2}\n")  # a key that both have
    assert load("c").scaling.num_workers == 2


# ---------------------------------------------------------------------- installed


def test_an_installed_package_has_its_configurations(here: Path) -> None:
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    site = here / "site"
    for package in included["packages"]:
        shutil.copytree(ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    (site / "configs").mkdir()  # a folder of another package does not stand in
    for source, target in included["force-include"].items():
        shutil.copytree(ROOT / source, site / target)
    code = """
from rayexp.config import CompareConfig, find_config, load
from rayexp.grid.plan import base_of
print(find_config("quickstart"))
print(base_of(load("devices", kind=CompareConfig), find_config("devices").parent).name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=here, env={"PYTHONPATH": str(site)}
    )
    assert done.stdout.splitlines() == [str(site / "rayexp" / "configs" / "quickstart.yaml"), "quickstart"], done.stderr


# ---------------------------------------------------------------------- what each is


def test_each_file_begins_with_what_it_is() -> None:
    for name, path in shipped_configs().items():
        said = headline(path)
        assert len(said) > 30, name
        assert said.endswith("."), name
        assert "rayexp " not in said, name  # the commands come after it


def test_the_first_sentence_of_a_head(here: Path) -> None:
    path = here / "a.yaml"
    path.write_text("# A net of 3.5 layers, as many\n# others have. It is small.\nname: a\n")
    assert headline(path) == "A net of 3.5 layers, as many others have."
    path.write_text("# One line\n#   rayexp train a.yaml\n# More.\n")
    assert headline(path) == "One line"
    path.write_text("name: a\n# Late.\n")
    assert headline(path) == ""
