"""What travels with a run that is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

import rayexp
from rayexp.cluster import package
from rayexp.config import ExperimentConfig, load
from rayexp.errors import UserError


def test_the_package_is_the_source_and_the_configuration(tmp_path: Path) -> None:
    config = ExperimentConfig(name="x", epochs=3)
    packed = package.pack(config, tmp_path / "package")
    assert load(tmp_path / "package" / "config.yaml") == config
    for name in ("rayexp/__main__.py", "rayexp/launch/driver.py", "rayexp/pages/templates/diff_base.html.j2"):
        assert packed.files[name] > 0
    tops = {Path(name).parts[0] for name in packed.files}
    assert tops == {"rayexp", "config.yaml"}
    assert not [n for n in packed.files if "__pycache__" in n or n.endswith(".pyc") or "/." in n]
    assert packed.size == sum(p.stat().st_size for p in (tmp_path / "package").rglob("*") if p.is_file())
    assert packed.size < 3_000_000


def test_too_large_a_package_names_the_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "rayexp"
    source.mkdir()
    (source / "__init__.py").write_text("")
    for name, size in (("a.bin", 60), ("b.bin", 41), ("c.bin", 2)):
        with (source / name).open("wb") as file:
            file.truncate(size * 2**20)
    monkeypatch.setattr(rayexp, "__file__", str(source / "__init__.py"))
    with pytest.raises(UserError, match=r"103\.0 MiB, Ray takes 100; largest: rayexp/a\.bin \(60\.0 MiB\), rayexp/b"):
        package.pack(ExperimentConfig(), tmp_path / "package")


def test_the_command_trains_the_packed_configuration() -> None:
    assert package.command() == ["python", "-m", "rayexp", "train", "config.yaml"]
    assert package.command("/opt/py", "run-1")[0] == "/opt/py"
    assert package.command("/opt/py", "run-1")[-2:] == ["--resume", "run-1"]
