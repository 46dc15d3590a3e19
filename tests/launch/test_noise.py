"""Seeds of one configuration: which runs are taken, gone on with or made; and the command from training to `diff`."""

from __future__ import annotations

import json

import pytest

from rayexp.config import ExperimentConfig, parse
from rayexp.errors import Stopped, UserError
from rayexp.launch import noise
from rayexp.runs.run import Run


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Instead of training: a run that is done, and what was asked for."""
    asked = []

    def train(config, *, argv, resume=None, **_):
        asked.append((config.seed, resume and resume.id))
        run = resume or Run.create(config, argv=argv)
        run.update(status="done", files={})
        return run

    monkeypatch.setattr(noise, "train", train)
    monkeypatch.setattr(noise, "is_finished", lambda run, config: run.meta()["status"] == "done")
    return asked


def config(tmp_path, **more):
    return parse({"name": "tour", "storage_path": str(tmp_path), "seed": 5, **more}, ExperimentConfig, "test")


def test_seeds_follow_the_first(trained, tmp_path):
    runs = noise.train_seeds(config(tmp_path), 3, argv=["noise"])
    assert [run.config().seed for run in runs] == [5, 6, 7]
    assert [run.meta()["name"] for run in runs] == ["tour-seed5", "tour-seed6", "tour-seed7"]
    assert trained == [(5, None), (6, None), (7, None)]


def test_what_is_there_is_taken(trained, tmp_path):
    first = noise.train_seeds(config(tmp_path), 2, argv=[])
    Run.create(config(tmp_path, seed=7, epochs=9), argv=[]).update(status="done")  # not of as many epochs
    Run.create(config(tmp_path, seed=7, lr=0.7), argv=[]).update(status="done")  # not the same model
    running = Run.create(config(tmp_path, seed=7), argv=[])  # its driver is at work
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    trained.clear()
    again = noise.train_seeds(config(tmp_path, name="another"), 3, argv=[])
    assert [run.id for run in again[:2]] == [run.id for run in first]
    assert trained == [(7, None)]
    assert again[2].id != running.id


@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_a_run_that_ended_early_is_gone_on_with(trained, tmp_path, status):
    broken_off = Run.create(config(tmp_path), argv=[])
    broken_off.update(status=status)
    noise.train_seeds(config(tmp_path, scaling={"num_workers": 2}), 2, argv=[])
    assert trained == [(5, broken_off.id), (6, None)]


def test_precision_that_a_run_has_decided_is_that_of_auto(trained, tmp_path):
    noise.train_seeds(config(tmp_path, precision="bf16"), 2, argv=[])
    trained.clear()
    noise.train_seeds(config(tmp_path, precision="auto"), 2, argv=[])
    assert trained == []
    noise.train_seeds(config(tmp_path, precision="fp32"), 2, argv=[])
    assert len(trained) == 2


def test_a_stop_ends_it(trained, tmp_path, monkeypatch):
    def train(config, **_):
        raise Stopped(2)

    monkeypatch.setattr(noise, "train", train)
    with pytest.raises(Stopped):
        noise.train_seeds(config(tmp_path), 3, argv=[])


def test_the_last_seeds_of_all_are_too_few(trained, tmp_path):
    with pytest.raises(UserError, match="leaves no room for 3 seeds"):
        noise.train_seeds(config(tmp_path, seed=2**63 - 2), 3, argv=[])
    assert trained == []


@pytest.mark.slow
def test_the_command(command, tmp_path, tiny_images):
    """Three short versions, a floor on disk, and a `diff` that finds it; the second call trains nothing."""
    (tmp_path / "c.yaml").write_text(json.dumps({"name": "tiny", **tiny_images, "epochs": 3}))

    def call(*words, code=0):
        process = command(*words)
        out, err = process.communicate()
        assert process.returncode == code, err
        return out, err

    tree = json.loads(call("noise", "c.yaml", "--epochs", "1", "--json")[0])
    floor = tree["floors"][-1]
    assert (floor["seeds"], floor["epochs"], floor["n"], len(floor["pairs"])) == ([0, 1, 2], 1, 32, 3)
    kept = sorted((tmp_path / "runs").iterdir())
    out, err = call("noise", "c.yaml", "--epochs", "1")
    assert "3 of them are trained already" in err
    assert "another seed changes" in out
    assert sorted((tmp_path / "runs").iterdir()) == kept
    call("train", "c.yaml", "name=long")
    out, _ = call("diff", "long@1", "@3")
    assert "in shorter runs than A's 3 epochs" in out
    assert "reseeding changes" in out
    assert "noise floor" not in call("noise", "c.yaml", "--seeds", "1", code=2)[1]


def test_how_many_are_there_already_is_said() -> None:
    config = ExperimentConfig(name="net", epochs=20)
    said = [noise.announced(config, 3, done) for done in (0, 1, 2)]
    assert said == [
        "3 seeds of net, 20 epochs each",
        "3 seeds of net, 20 epochs each; 1 of them is trained already",
        "3 seeds of net, 20 epochs each; 2 of them are trained already",
    ]
