"""What travels with a run that is sent."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import rayexp
from rayexp.cluster import job_context, package
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


def with_weights(text: str) -> ExperimentConfig:
    return ExperimentConfig.model_validate({"model": {"name": "resnet18", "weights": text}})


def test_a_file_of_weights_travels_and_is_used_where_it_came(
    tmp_path: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.pt").write_bytes(b"tensors")
    folder = tmp_path / "package"
    for text in (str(tmp_path / "own.pt"), "own.pt"):
        monkeypatch.chdir(tmp_path)
        packed = package.pack(with_weights(text), folder)
        assert packed.files["weights/own.pt"] == 7
        monkeypatch.chdir(folder)  # as the job does
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "j1"}}')
        weights = job_context.resolve_paths(load(folder / "config.yaml")).model.weights
        assert (weights, Path(str(weights)).read_bytes()) == ("weights/own.pt", b"tensors")
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("text", "there"),
    [("IMAGENET1K_V1", ""), ("first@best", ""), ("nets/own.pt", "home"), ("old/first@2", "home"), ("/nfs/own.pt", "")],
)
def test_weights_that_are_not_here_are_the_clusters(
    tmp_path: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch, text: str, there: str
) -> None:
    monkeypatch.chdir(tmp_path)
    packed = package.pack(with_weights(text), tmp_path / "package")
    assert not [name for name in packed.files if name.startswith("weights/")]
    config = load(tmp_path / "package" / "config.yaml")
    assert config.model.weights == text
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "j1"}}')
    expected = str(empty_home / text) if there else text
    assert job_context.resolve_paths(config).model.weights == expected


@pytest.mark.parametrize("text", ["runs/first@2", "runs/first/checkpoints/epoch_002", "me@lab/first@2"])
def test_a_checkpoint_here_is_refused_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    for folder in ("runs", "me@lab"):
        (tmp_path / folder / "first" / "checkpoints" / "epoch_002").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    line = rf"^model\.weights: {text} is a checkpoint on this machine, and only a file can be sent; `rayexp export RUN@"
    with pytest.raises(UserError, match=line):
        package.pack(with_weights(text), tmp_path / "package")


def test_weights_too_large_to_send_are_named(tmp_path: Path) -> None:
    with (tmp_path / "own.pt").open("wb") as file:
        file.truncate(101 * 2**20)
    with pytest.raises(UserError, match=r"Ray takes 100; largest: weights/own\.pt \(101\.0 MiB\)"):
        package.pack(with_weights(str(tmp_path / "own.pt")), tmp_path / "package")
