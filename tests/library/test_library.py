"""The public names, and what they give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rayexp
from rayexp.errors import RunError, UserError
from rayexp.runs.run import Run


def python(code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_instant_and_all_names_are_there() -> None:
    python(
        "import sys, rayexp\n"
        "heavy = {'torch', 'ray', 'numpy', 'pydantic', 'rich', 'scipy', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(rayexp.__all__) <= set(dir(rayexp))\n"
    )
    for name in rayexp.__all__:
        assert getattr(rayexp, name) is not None
    assert (Path(rayexp.__file__).parent / "py.typed").exists()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rayexp.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_diff_is_a_function_whoever_imports_the_package_first() -> None:
    python(
        "import rayexp, rayexp.diff.images, rayexp.diff.text\n"
        "from rayexp.diff import churn\n"
        "import rayexp.cli.diff\n"
        "assert rayexp.diff.__name__ == 'diff' and callable(rayexp.diff)\n"
        "from rayexp import diff\n"
        "assert callable(diff)\n"
    )


def test_configurations_are_files_names_dicts_or_themselves(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 2\ndata: {image_size: 32}\n")
    overrides = {"lr": 0.25, "data.augment": None, "scaling.num_workers": (1, 2), "storage_path": tmp_path, "name": "7"}
    words = ["lr=0.25", "data.augment=null", "scaling.num_workers=[1,2]", f"storage_path={tmp_path}", "name=7"]
    read = rayexp.load_config(file, overrides)
    assert read == rayexp.load_config({"epochs": 2, "data": {"image_size": 32}}, words)
    assert read == rayexp.load_config(rayexp.load_config(str(file)), overrides)
    assert (read.epochs, read.data.augment, read.scaling.num_workers, read.name) == (2, None, (1, 2), "7")
    assert rayexp.load_config("quickstart").name == "quickstart"


def test_a_dict_is_left_as_it_was() -> None:
    tree = {"data": {"image_size": 32}}
    rayexp.load_config(tree, {"data.image_size": 48})
    assert tree == {"data": {"image_size": 32}}


@pytest.mark.parametrize(
    ("config", "overrides", "line"),
    [
        ("nothing", (), "nothing: no such file"),
        ({"epoch": 2}, (), "config: unknown key epoch .did you mean epochs"),
        ({"data.root": "x"}, (), r"config: unknown key data.root .did you mean data: {root: \.\.\.}\?"),
        ({"data.boot": "x"}, (), "config: unknown key data.boot .did you mean data.."),
        ({}, {"epochs": "many"}, """^'epochs="many"': expected a whole number"""),
        ({}, ["lr=1", "epochs=many"], "^epochs=many: expected a whole number"),
        ({}, "epochs=2", "overrides: expected a list of KEY=VALUE or a dict"),
        ({}, 3, "overrides: expected a list of KEY=VALUE or a dict, got 3"),
        ({}, [3], r"overrides: expected a list of KEY=VALUE or a dict, got \[3\]"),
        (7, (), "config: expected a path, a name, a dict or ExperimentConfig, got int"),
        ({"compile": True}, (), "config: compile: for reduction ddp only"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said(config: Any, overrides: Any, line: str) -> None:
    with pytest.raises(rayexp.UserError, match=line):
        rayexp.load_config(config, overrides)


class Told:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.steps: list[tuple[int, int]] = []

    def on_epoch(self, record: Any) -> None:
        assert record.weights_sha
        self.epochs.append(record.epoch)

    def on_step(self, progress: dict[str, Any]) -> None:
        assert progress["unit"] == "tokens"
        self.steps.append((progress["epoch"], progress["step"]))


class Once:
    """Fails at an epoch's end."""

    def on_epoch(self, record: Any) -> None:
        raise ValueError(f"not after epoch {record.epoch}")


def test_callbacks_hear_every_epoch_of_this_call_and_a_resume_only_its_own(runs: Path, words: Run) -> None:
    first, second = Told(), Told()
    run = rayexp.train(words.config(), {"epochs": 2}, callbacks=[first], runs=runs / "told", progress=False)
    assert first.epochs == [1, 2]
    assert first.steps
    assert first.steps == sorted(set(first.steps))
    again = rayexp.train(None, {"epochs": 3}, resume=run, callbacks=[second], progress=False)
    assert again.root == run.root
    assert second.epochs == [3]
    assert {epoch for epoch, _ in second.steps} <= {3}


def test_a_callback_that_fails_lets_the_run_save_and_names_itself(runs: Path, words: Run) -> None:
    heard = Told()
    changes = {"epochs": 20, "name": "failing"}
    with pytest.raises(RunError, match=r"callback Once.on_epoch: ValueError: not after epoch 1; saved up to step \d+"):
        rayexp.train(words.config(), changes, callbacks=[Once(), heard], runs=runs / "failing", progress=False)
    run = Run.find("failing", runs / "failing")
    assert run.status() == "stopped"
    assert run.meta()["error"] == "callback Once.on_epoch: ValueError: not after epoch 1"
    assert heard.epochs == []
    assert 1 <= len(run.records()) < 20
    done = rayexp.train(resume="failing", runs=runs / "failing", progress=False)
    assert done.status() == "done"


def test_a_callback_that_fails_after_the_last_epoch_fails_the_call_and_not_the_run(runs: Path, words: Run) -> None:
    with pytest.raises(RunError, match=r"callback Once.on_epoch: ValueError: not after epoch 1; .* is done"):
        rayexp.train(words.config(), callbacks=[Once()], runs=runs / "late", progress=False)
    (run,) = Run.all(runs / "late")
    assert run.status() == "done"


def test_an_object_without_a_callbacks_methods_is_refused_and_leaves_no_run(runs: Path, words: Run) -> None:
    with pytest.raises(UserError, match="callbacks: int has none of the methods on_epoch, on_step"):
        rayexp.train(words.config(), callbacks=[3], runs=runs / "none", progress=False)
    assert Run.all(runs / "none") == []


def test_training_needs_something_to_train() -> None:
    with pytest.raises(UserError, match="train: needs a config, or a run to resume"):
        rayexp.train()


def test_evaluate_says_again_what_training_stored(runs: Path, pictures: Run) -> None:
    found = rayexp.evaluate("pictures@2", runs=runs)
    assert found.equal
    assert found.weights_sha == pictures.records()[1].weights_sha
    assert rayexp.evaluate(pictures).metrics == found.metrics


def test_diff_is_what_the_command_prints(runs: Path, pictures: Run) -> None:
    report = rayexp.diff("pictures@1", "@2", max_drop=5, runs=runs)
    assert report.to_dict()["a"] == {
        "run": pictures.id,
        "epoch": 1,
        "weights_sha": pictures.records()[0].weights_sha,
    }
    assert report.to_dict()["b"]["epoch"] == 2
    assert report.verdict in ("PASS", "FAIL", "INCONCLUSIVE")
    assert rayexp.diff(pictures, "@1").to_dict()["churn"] == report.to_dict()["churn"]
    stored = pictures.predictions_path(1)
    kept = stored.read_bytes()
    stored.unlink()  # predictions that are missing are made
    assert (
        rayexp.diff(f"{pictures.root}@1", pictures).to_dict()["flips"]
        == rayexp.diff("pictures@1", "@2", runs=runs).to_dict()["flips"]
    )
    assert stored.read_bytes() == kept


def test_a_script_needs_no_guard_and_its_arguments_are_its_own(tmp_path: Path, words: Run) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, rayexp\n"
        f"run = rayexp.train({str(words.config_path)!r}, runs='mine')\n"
        "print(run.records()[0].weights_sha, sys.argv[1:], sys.stdout.isatty())\n"
    )
    done = subprocess.run(
        [sys.executable, script, "--epochs", "9"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{words.records()[0].weights_sha} ['--epochs', '9'] False\n"
    assert "epoch 1  train_loss" in done.stderr
    assert len(Run.all(tmp_path / "mine")) == 1


def test_predict_answers_for_arrays_pictures_and_files(runs: Path, pictures: Run, tmp_path: Path, words: Run) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)
    for at, one in enumerate(pixels):
        Image.fromarray(one).save(tmp_path / f"{at}.png")
    whole = rayexp.predict("pictures@best", pixels, top=2, runs=runs)
    assert len(whole) == 3
    assert [len(row.classes) for row in whole] == [2] * 3
    one_by_one = [Image.fromarray(pixels[0]), tmp_path / "1.png", pixels[2]]
    assert [row.classes for row in rayexp.predict("pictures@best", one_by_one, top=2, runs=runs)] == [
        row.classes for row in whole
    ]
    folder = rayexp.predict(pictures, tmp_path, top=2)
    assert [Path(row.name).name for row in folder] == ["0.png", "1.png", "2.png"]
    assert whole.words(0) == pictures.data()["classes"][0][1]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken.png: cannot be read .*skip_unreadable=True"):
        rayexp.predict(pictures, tmp_path)
    assert len(rayexp.predict(pictures, tmp_path, skip_unreadable=True).unreadable) == 1
    with pytest.raises(UserError, match=r"float64\[3, 3\] is no picture"):
        rayexp.predict(pictures, np.zeros((3, 3)))
    with pytest.raises(UserError, match="a language model reads lines of text, got int"):
        rayexp.predict("words@1", [3], runs=runs)


def test_a_model_of_ones_own_is_named_relative_to_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text("")
    monkeypatch.chdir(tmp_path)
    config = rayexp.load_config({"model": {"name": "./net.py:Net", "width": 3}}, {"epochs": 2})
    assert (config.model.name, config.code) == ("net.py:Net", (f"{tmp_path}/**/*.py",))
    monkeypatch.chdir("/")  # one that is a configuration already knows where its code lies
    assert rayexp.load_config(config, {"epochs": 2}) == config
