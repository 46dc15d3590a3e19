"""Stretches of a run that are trained again are proven, and what was altered or damaged is found."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rayexp.config import ExperimentConfig, load
from rayexp.engine import checkpoint
from rayexp.engine.checkpoint import State
from rayexp.errors import RunError, UserError
from rayexp.launch import audit as auditing
from rayexp.launch import stretch as one
from rayexp.launch.audit import audit
from rayexp.launch.driver import run as train
from rayexp.launch.stretch import Stretch, stretches
from rayexp.runs.integrity import faults
from rayexp.runs.manifest import SEAL, WEIGHTS, digest, sealed
from rayexp.runs.run import Run

Tiny = Callable[..., ExperimentConfig]
Words = Callable[..., ExperimentConfig]
Only = Callable[..., None]
IMAGES = {
    "workload": "image_classification",
    "data": {"name": "shapes", "max_train_samples": 32, "max_val_samples": 16, "image_size": 32},
    "model": {"name": "squeezenet1_1"},
    "batch_size": 16,
    "lr": 0.01,
    "optimizer": {},
    "epochs": 2,
}


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Only:
    """Let a run have these stretches only."""

    def set_to(*there: Stretch) -> None:
        monkeypatch.setattr(auditing, "stretches", lambda run: list(there))

    return set_to


def contents(run: Run) -> dict[str, bytes]:
    return {str(path.relative_to(run.root)): path.read_bytes() for path in run.root.rglob("*") if path.is_file()}


def forge(run: Run, epoch: int) -> str:
    """Alter one weight after an epoch, and write every hash that covers it anew; returns the tensor's name."""
    folder = run.checkpoint(epoch)
    state = checkpoint.decode({file.name: file.read_bytes() for file in folder.iterdir()})
    name = next(name for name in state.tensors if name.startswith("model.") and "weight" in name)
    state.tensors[name].view(-1)[0] += 1e-3
    hashes = {"weights_sha": checkpoint.sha(state.weights()), "state_sha": checkpoint.sha(state.tensors)}
    kept = {key: value for key, value in state.fields.items() if key != SEAL}
    kept["record"] = {**kept["record"], **hashes}
    for file, data in checkpoint.encode(State({}, state.tensors), {**kept, **hashes}).items():
        (folder / file).write_bytes(data)
    fields = json.loads((folder / "state.json").read_bytes())
    (folder / "state.json").write_text(json.dumps(sealed(fields)))
    rewrite(run, epoch, **hashes)
    return name.removeprefix("model.")


def rewrite(run: Run, epoch: int, **changes: Any) -> None:
    """Change an epoch's line in epochs.jsonl, and the hash of the file."""
    lines = [json.loads(line) for line in run.epochs_path.read_text().splitlines()]
    lines[epoch - 1] |= changes
    text = "".join(json.dumps(line) + "\n" for line in lines)
    run.epochs_path.write_text(text)
    run.update(files={**run.files(), "epochs.jsonl": digest(text.encode())})


# ---------------------------------------------------------------------- proven


def test_every_stretch_is_proven_and_nothing_is_written(made: Run) -> None:
    before = contents(made)
    found = audit(made, segments=9, workers=0, seed=1)
    assert [(str(each.stretch), each.outcome) for each in found.retrained] == [
        ("epoch 0 -> 1", "proven"),
        ("epoch 1 -> 2", "proven"),
        ("epoch 2 -> 3", "proven"),
        ("epoch 3 -> 4", "proven"),
    ]
    assert (found.outcome, found.share, found.machine, found.trained_with) == ("proven", 1.0, (), (0,))
    assert found.sentence() == "proven: 4 of 4 stretches (100.0 % of the steps) came to the stored bits in one process"
    assert found.whole_seconds == pytest.approx(sum(each.seconds for each in found.retrained))
    assert contents(made) == before


def test_a_stretch_spans_epochs_whose_checkpoints_are_gone(made: Run) -> None:
    for epoch in (1, 2):
        shutil.rmtree(made.checkpoint(epoch))
    steps = made.meta()["steps_per_epoch"]
    assert stretches(made) == [Stretch(0, 3, 3 * steps), Stretch(3, 4, steps)]
    found = audit(made, segments=1, workers=0, seed=1)
    assert [str(each.stretch) for each in found.retrained] == ["epoch 0 -> 3"]
    assert (found.outcome, found.share) == ("proven", 0.75)
    assert found.whole_seconds == pytest.approx(found.retrained[0].seconds * 4 / 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, IMAGES, {"model": {"name": "transformer", "emsize": 16, "nhead": 2, "nhid": 16}}]
)
def test_a_run_of_each_workload_is_proven_with_two_workers(tiny: Tiny, changes: dict[str, Any]) -> None:
    made = train(tiny(**{"epochs": 2, "schedule": {"name": "cosine"}, **changes}), argv=[])
    found = audit(made, segments=2)
    assert (found.outcome, found.workers, found.share) == ("proven", 2, 1.0)
    assert found.sentence().endswith("came to the stored bits with 2 workers")


@pytest.mark.slow
def test_a_run_that_was_stopped_inside_an_epoch_and_went_on_is_proven(tiny: Tiny) -> None:
    made = train(tiny(), argv=[], max_steps=13)
    assert made.status() == "stopped"
    train(tiny(), argv=[], resume=made)
    assert audit(made, segments=9, workers=0).outcome == "proven"


def test_an_old_run_is_compared_by_what_it_has(made: Run, only: Only) -> None:
    """The first version had no fingerprint in its checkpoints, and fewer hashes."""
    for epoch in made.epochs():
        path = made.checkpoint(epoch) / "state.json"
        fields = json.loads(path.read_bytes())
        path.write_text(json.dumps({k: v for k, v in fields.items() if k not in ("fingerprint", SEAL)}))
        rewrite(made, epoch, state_sha="", predictions_sha="")
    made.update(files={})
    assert audit(made, segments=1, workers=0, seed=3).outcome == "proven"
    forge_unsealed(made)
    only(Stretch(2, 3, 4))
    assert audit(made, workers=0).outcome == "inconclusive"


def forge_unsealed(run: Run) -> None:
    forge(run, 2)
    path = run.checkpoint(2) / "state.json"
    fields = json.loads(path.read_bytes())
    path.write_text(json.dumps({k: v for k, v in fields.items() if k != SEAL}))
    run.update(files={})


def test_a_workload_of_ones_own_is_proven_by_the_code_that_the_run_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYEXP_CACHE", str(tmp_path / "cache"))
    examples = Path(__file__).parents[2] / "examples"
    folder = Path(shutil.copytree(examples, tmp_path / "mine", ignore=shutil.ignore_patterns("*.ipynb")))
    words = ["data.samples=64", "batch_size=16", "shards=2", "epochs=2", f"storage_path={tmp_path / 'runs'}"]
    made = train(load(folder / "own_workload.yaml", words), argv=[])
    shutil.rmtree(folder)
    before = contents(made)
    found = audit(made, workers=0)
    assert (found.outcome, found.share) == ("proven", 1.0)
    assert contents(made) == before
    (made.root / "code" / "own_workload.py").write_text("# another\n")
    with pytest.raises(UserError, match=r"code/own_workload.py: not what the run wrote"):
        audit(made, workers=0)


def test_a_run_from_weights_with_frozen_parameters_is_proven_by_its_own_copy(
    trained: Run, words: Words, tmp_path: Path
) -> None:
    shutil.copytree(trained.checkpoint(1), tmp_path / "first")
    model = words().model.model_dump()
    model |= {"weights": str(tmp_path / "first" / "state.safetensors"), "freeze": ["encoder.*"]}
    run = train(words(epochs=2, model=model, seed=5), argv=[])
    shutil.rmtree(tmp_path / "first")
    before = contents(run)
    found = audit(run, segments=2, workers=0)
    assert (found.outcome, found.share, found.machine) == ("proven", 1.0, ())
    assert contents(run) == before
    (run.root / WEIGHTS).write_bytes(b"another")
    found = audit(run, segments=2, workers=0)
    assert (found.outcome, found.retrained[0].detail[:20]) == ("damaged", "weights.safetensors:")


@pytest.mark.parametrize("keep", ["best", 1])
def test_a_run_that_kept_some_checkpoints_is_proven_over_the_gaps(words: Words, keep: str | int) -> None:
    made = train(words(checkpoint={"keep": keep}), argv=[])
    assert len(kept := made.epochs()) < 4
    found = audit(made, segments=9, workers=0)
    assert [each.stretch.last for each in found.retrained] == kept
    assert (found.outcome, found.share) == ("proven", 1.0)


def test_a_run_of_several_world_sizes_is_trained_with_another(made: Run) -> None:
    for epoch, workers in ((2, 2), (3, 4)):
        rewrite(made, epoch, world_size=workers)
    found = audit(made, segments=1, seed=1, workers=0)
    assert (found.trained_with, found.outcome) == ((0, 2, 4), "proven")
    assert auditing._other_workers(made.config(), found.trained_with) == 1


def test_an_elastic_run_is_trained_with_one_number_of_workers(made: Run) -> None:
    config = made.config()
    elastic = config.model_copy(update={"scaling": config.scaling.model_copy(update={"num_workers": (1, 2)})})
    made.write("config.yaml", elastic.to_yaml())
    for epoch, workers in ((1, 1), (2, 2), (3, 2), (4, 1)):
        rewrite(made, epoch, world_size=workers)
    found = audit(made, segments=1, seed=1)
    assert (found.trained_with, found.workers, found.outcome) == ((1, 2), 0, "proven")


def test_a_stretch_that_cannot_be_trained_tells_the_cause_and_names_nothing_that_is_gone(
    made: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayexp.launch.worker.Trainer", None)
    with pytest.raises(RunError, match=r"^TypeError: 'NoneType' object is not callable$"):
        audit(made, segments=1, workers=0)
    failing = [sys.executable, "-c", "1 / 0"]
    monkeypatch.setattr("rayexp.launch.processes.spawn.command", lambda *_: failing)
    with pytest.raises(RunError, match=r"^worker \d ended with 1: ZeroDivisionError: division by zero$"):
        audit(made, segments=1, workers=2)


# ---------------------------------------------------------------------- not proven


def test_a_weight_that_was_altered_with_all_its_hashes_is_found(made: Run) -> None:
    name = forge(made, 2)
    assert faults(made) == []  # nothing in the directory contradicts it
    found = audit(made, segments=9, workers=0)
    assert [each.outcome for each in found.retrained] == ["proven", "differs", "differs", "proven"]
    assert found.outcome == "differs"
    assert found.sentence() == (
        f"DIFFERENT: epoch 1 -> 2 comes to something else in one process, first in the tensor {name}"
    )
    assert found.share == 0.5


def test_a_metric_that_was_altered_is_found_where_no_checkpoint_is(made: Run, only: Only) -> None:
    rewrite(made, 2, val_loss=0.5)
    shutil.rmtree(made.checkpoint(2))
    only(Stretch(1, 3, 8))
    (found,) = audit(made, workers=0).retrained
    assert (found.outcome, found.detail) == ("differs", "val_loss of epoch 2 in epochs.jsonl")


def test_predictions_that_were_altered_are_found(made: Run, only: Only) -> None:
    stored = made.predictions(3)
    stored.arrays["loss"][0] += 1
    data = stored.to_npz()
    made.predictions_path(3).write_bytes(data)
    rewrite(made, 3, predictions_sha=digest(data))
    only(Stretch(2, 3, 4))
    (found,) = audit(made, workers=0).retrained
    assert (found.outcome, found.detail) == ("differs", "the predictions of epoch 3")


def test_a_schedule_that_was_altered_is_found(made: Run, only: Only) -> None:
    path = made.checkpoint(4) / "state.json"
    fields = json.loads(path.read_bytes())
    fields["schedule"]["factor"] = 0.25
    path.write_text(json.dumps(sealed(fields)))
    only(Stretch(3, 4, 4))
    (found,) = audit(made, workers=0).retrained
    assert (found.outcome, found.detail) == ("differs", "the schedule's state")


@pytest.mark.parametrize(
    ("file", "where"),
    [
        ("checkpoints/epoch_002/state.safetensors", "checkpoints/epoch_002: state.safetensors is damaged"),
        ("checkpoints/epoch_002/state.json", "checkpoints/epoch_002: state.json is damaged"),
        ("predictions/epoch_002.npz", "predictions/epoch_002.npz: damaged"),
        ("epochs.jsonl", "epochs.jsonl: not what the run wrote"),
    ],
)
def test_a_damaged_file_is_named_and_not_trained_from(
    made: Run, only: Only, monkeypatch: pytest.MonkeyPatch, file: str, where: str
) -> None:
    path = made.root / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    trained = []
    monkeypatch.setattr(one, "_train", lambda *args: trained.append(args))
    only(Stretch(1, 2, 4))
    found = audit(made, workers=0)
    assert (found.outcome, trained) == ("damaged", [])
    assert found.retrained[0].detail.startswith(where)
    assert found.whole_seconds is None
    assert found.sentence().startswith(f"DAMAGED: epoch 1 -> 2: {where}")


def test_other_bits_on_another_kind_of_machine_prove_nothing(made: Run, only: Only) -> None:
    forge(made, 2)
    for epoch in made.epochs():
        path = made.checkpoint(epoch) / "state.json"
        fields = json.loads(path.read_bytes())
        fields["fingerprint"]["torch"] = "1.0"
        path.write_text(json.dumps(sealed(fields)))
    only(Stretch(0, 1, 4), Stretch(1, 2, 4))
    found = audit(made, workers=0)
    assert [each.outcome for each in found.retrained] == ["proven", "inconclusive"]
    assert found.outcome == "inconclusive"
    assert found.machine == (f"torch {torch.__version__}, not 1.0",)
    assert found.sentence().startswith("INCONCLUSIVE: epoch 1 -> 2 differs in the tensor ")
