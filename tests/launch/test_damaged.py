"""A run whose files were changed is refused, or resumed from what is whole, and ends with the same bits."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from rayexp.config import ExperimentConfig, read
from rayexp.errors import UserError
from rayexp.launch.driver import run
from rayexp.runs.integrity import examine, faults
from rayexp.runs.manifest import digest
from rayexp.runs.run import Run

Tiny = Callable[..., ExperimentConfig]


def shas(made: Run) -> list[str]:
    return [record.state_sha for record in made.records()]


def steps(made: Run) -> list[Path]:
    return sorted(made.checkpoints.glob("step_*"))


@pytest.mark.parametrize(
    ("old", "new"),
    [('"step_in_epoch": 7', '"step_in_epoch": 6'), ('"factor": 1.0', '"factor": 3.0'), ('"epoch"', '"epocX"')],
)
def test_one_character_is_named_and_the_one_before_is_taken(tiny: Tiny, old: str, new: str) -> None:
    config = tiny(checkpoint={"every_steps": 2}, epochs=1)
    whole = run(config, argv=[])
    made = run(config, argv=[], max_steps=7)
    state = steps(made)[-1] / "state.json"
    assert old in state.read_text()
    state.write_text(state.read_text().replace(old, new, 1))
    screen = io.StringIO()
    again = run(config, argv=[], resume=made, console=Console(file=screen, width=400))
    assert shas(again) == shas(whole)
    said = f"{state.parent.name}: passed over, state.json is damaged"
    assert said in screen.getvalue()
    log = (made.logs / "rank_0.log").read_text()
    assert said in log
    assert "resumed at epoch 1, step 6" in log
    assert faults(again) == []


def test_a_damaged_line_of_epochs_is_named_and_comes_back(tiny: Tiny) -> None:
    config = tiny(epochs=3)
    whole = run(config, argv=[])
    made = run(config, argv=[], max_steps=24)
    first, *others = made.epochs_path.read_text().splitlines(keepends=True)
    made.epochs_path.write_text("".join([first.replace("train_loss", "train_lozz"), *others]))
    screen = io.StringIO()
    again = run(config, argv=[], resume=made, console=Console(file=screen, width=400))
    assert shas(again) == shas(whole)
    assert "epochs.jsonl: line 1 is damaged" in screen.getvalue()
    assert faults(again) == []


def test_an_edited_configuration_is_refused_and_the_key_is_named(tiny: Tiny) -> None:
    config = tiny(epochs=1)
    whole = run(config, argv=[])
    made = run(config, argv=[], max_steps=3)
    kept = made.config_path.read_text()
    before = made.meta_path.read_bytes()
    for changed, said in (
        (kept.replace("lr: 1.0", "lr: 9.0"), r"since checkpoints/step_00000003: lr 1\.0 -> 9\.0; put"),
        ("", r"config\.yaml: not what the run wrote .* since .*: .*workload language_model -> image_classification"),
        ("}", "config.yaml: not what the run wrote"),
        (kept.replace("max_failures: 3", "max_failures: 4"), r"max_failures 3 -> 4; put"),
    ):
        assert changed != kept
        made.config_path.write_text(changed)
        for given in (config, *([read(made.config_path)] if changed != "}" else [])):
            with pytest.raises(UserError, match=said) as caught:
                run(given, argv=[], resume=made)
            assert "\n" not in str(caught.value)
        assert made.meta_path.read_bytes() == before
        assert made.config_path.read_text() == changed
    made.config_path.unlink()
    with pytest.raises(UserError, match=r"config\.yaml: cannot be read"):
        run(config, argv=[], resume=made)
    made.config_path.write_text(kept)
    assert shas(run(config, argv=[], resume=made)) == shas(whole)


def test_an_edit_that_run_json_was_made_to_agree_with_is_still_refused(tiny: Tiny) -> None:
    made = run(tiny(), argv=[], max_steps=3)
    made.config_path.write_text(made.config_path.read_text().replace("lr: 1.0", "lr: 9.0"))
    for files in ({**made.files(), "config.yaml": digest(made.config_path.read_bytes())}, {}):
        made.update(files=files)
        with pytest.raises(
            UserError, match=r"the run was trained under; since checkpoints/step_00000003: lr 1\.0 -> 9"
        ):
            run(tiny(lr=9.0), argv=[], resume=made)


def test_an_emptied_configuration_of_the_first_edition_is_refused(tiny: Tiny) -> None:
    made = run(tiny(), argv=[], max_steps=3)
    made.update(files={})
    for path, state in made.resumable():
        del state["config"], state["sha256"]
        (path / "state.json").write_text(json.dumps(state))
    kept = made.config_path.read_text()
    for emptied in ("", "name: tiny\n", "[]"):
        made.config_path.write_text(emptied)
        with pytest.raises(UserError, match=r"config\.yaml: no resolved configuration"):
            run(tiny(), argv=[], resume=made)
    made.config_path.write_text(kept)
    assert run(tiny(), argv=[], resume=made).meta()["status"] == "done"


def test_what_may_change_is_changed_on_the_command_line_and_covered(tiny: Tiny) -> None:
    whole = run(tiny(epochs=1), argv=[])
    made = run(tiny(epochs=1), argv=[], max_steps=3)
    first = made.files()["config.yaml"]
    run(tiny(epochs=1, checkpoint={"every_steps": 2}, max_failures=7), argv=[], resume=made, max_steps=5)
    assert made.config().max_failures == 7
    assert made.files()["config.yaml"] == digest(made.config_path.read_bytes()) != first
    assert {finding.state for finding in examine(made)} == {"ok"}
    assert shas(run(made.config(), argv=[], resume=made)) == shas(whole)


def test_a_finished_run_is_covered_from_end_to_end(tiny: Tiny) -> None:
    made = run(tiny(), argv=[])
    assert {finding.what: finding.state for finding in examine(made)} == dict.fromkeys(
        (
            "config.yaml", "data.json", "epochs.jsonl", "metrics.csv", "steps.jsonl", "predictions/epoch_001.npz",
            "predictions/epoch_002.npz", "checkpoints/epoch_001", "checkpoints/epoch_002",
        ),
        "ok",
    )  # fmt: skip
    state = json.loads((made.checkpoint(2) / "state.json").read_bytes())
    assert state["config"] == made.config().model_dump(mode="json")
    assert state["data"] == {key: made.data()[key] for key in ("train_sha", "val_sha")}
    for record in made.records():
        assert record.predictions_sha == digest(made.predictions_path(record.epoch).read_bytes())
