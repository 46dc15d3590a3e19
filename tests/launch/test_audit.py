"""`rayexp audit`: which stretches it chooses, with how many workers, what it refuses, and the command."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rayexp.config import ExperimentConfig
from rayexp.errors import UserError
from rayexp.launch import audit as auditing
from rayexp.launch.audit import audit
from rayexp.launch.stretch import Retrained, Stretch
from rayexp.runs.run import Run

Tiny = Callable[..., ExperimentConfig]
Typed = Callable[..., subprocess.CompletedProcess[str]]


def test_the_choice_follows_from_the_seed(made: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def proven(run: Run, config: Any, stretch: Stretch, *rest: Any) -> Any:
        return Retrained(stretch, "proven", "", 1.0), []

    monkeypatch.setattr(auditing, "retrain", proven)
    picks = {seed: [each.stretch for each in audit(made, segments=2, seed=seed).retrained] for seed in range(20)}
    assert len({tuple(pick) for pick in picks.values()}) > 3
    for seed, pick in picks.items():
        assert [each.stretch for each in audit(made, segments=2, seed=seed).retrained] == pick
        assert len(set(pick)) == 2
    assert len({audit(made, segments=1).seed for _ in range(3)}) == 3


@pytest.mark.parametrize(
    ("trained_with", "shards", "workers"),
    [((0,), 4, 2), ((2,), 4, 0), ((1, 2), 4, 0), ((0, 2), 4, 4), ((0,), 1, 1), ((0,), 9, 3), ((0, 2, 4), 4, 1)],
)
def test_another_number_of_workers_is_chosen(
    tiny: Tiny, trained_with: tuple[int, ...], shards: int, workers: int
) -> None:
    config = tiny(shards=shards, batch_size=36)
    assert auditing._other_workers(config, trained_with) == workers


def test_an_audit_tells_no_tracker(made: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(auditing, "retrain", lambda run, config, *rest: asked.append(config) or _proven(*rest))
    config = made.config().model_copy(update={"tracking": ("tensorboard", "mlflow", "wandb")})
    monkeypatch.setattr(Run, "config", lambda run: config)
    audit(made, segments=1, workers=0)
    assert [config.tracking for config in asked] == [()]


def _proven(stretch: Stretch, *rest: Any) -> tuple[Retrained, list[str]]:
    return Retrained(stretch, "proven"), []


# ---------------------------------------------------------------------- refused


def test_what_cannot_be_audited_is_refused_by_name(made: Run, tiny: Tiny) -> None:
    ddp = Run.create(tiny(reduction="ddp"), argv=[])
    ddp.update(status="done")
    with pytest.raises(UserError, match=rf"^{ddp.id}: reduction is ddp, which promises no equal bits"):
        audit(ddp)
    bare = Run.create(tiny(), argv=[])
    with pytest.raises(UserError, match=rf"^{bare.id}: is still running"):
        audit(bare)
    bare.update(status="done")
    with pytest.raises(UserError, match=rf"^{bare.id}: has no checkpoint of an epoch"):
        audit(bare)
    with pytest.raises(UserError, match=r"^--workers: scaling.num_workers: 3 does not divide shards 4"):
        audit(made, workers=3)
    made.update(device="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"was trained on a GPU, and this machine has none"):
            audit(made)


def test_other_data_than_the_runs_is_refused(made: Run) -> None:
    data = json.loads(made.data_path.read_bytes())
    made.write("data.json", json.dumps({**data, "train_sha": "0" * 64}))
    with pytest.raises(UserError, match=r"^data.root: python_docs does not hold the data of .* \(train_sha "):
        audit(made)


def test_data_of_which_an_old_run_has_no_hash_is_taken(made: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditing, "retrain", lambda run, config, *rest: _proven(*rest))
    data = json.loads(made.data_path.read_bytes())
    made.write("data.json", json.dumps({key: value for key, value in data.items() if key != "train_sha"}))
    assert audit(made, workers=0).outcome == "proven"


# ---------------------------------------------------------------------- the command


@pytest.mark.parametrize(("outcome", "code"), [("proven", 0), ("differs", 1), ("damaged", 1), ("inconclusive", 3)])
def test_exit_codes_and_words(
    made: Run, typed: Typed, monkeypatch: pytest.MonkeyPatch, outcome: Any, code: int
) -> None:
    def retrain(run: Run, config: Any, stretch: Stretch, *rest: Any) -> Any:
        return Retrained(stretch, outcome, "" if outcome == "proven" else "the tensor w", 2.0), ["torch 2, not 1"]

    monkeypatch.setattr(auditing, "retrain", retrain)
    words = ("audit", made.root, "--segments", "1", "--seed", "3")
    done = typed(*words)
    out = done.stdout
    assert done.returncode == code
    assert "this machine differs from the run's: torch 2, not 1; equal bits are a proof all the same" in out
    begun = f"{made.id}: 1 of 4 stretches (seed 3), in 2 processes; the run was trained in one process"
    assert done.stderr.splitlines()[0] == begun
    assert done.stderr.splitlines()[1].startswith(f"[1/1] epoch 1 -> 2: {outcome}")
    if outcome == "damaged":
        assert "would take" not in out
    else:
        assert out.splitlines()[-1] == "all 4 would take about 8 s here (seed 3)"
    assert "would take" not in typed("audit", made.root, "--segments", "4").stdout  # these are all
    done = typed(*words, "--json")
    assert done.returncode == code
    told = json.loads(done.stdout)
    assert (told["outcome"], told["seed"], told["workers"], told["stretches"]) == (outcome, 3, 2, 4)
    assert told["share"] == (0.25 if outcome == "proven" else 0)
    assert told["retrained"][0] | {"detail": ""} == {
        "first": 1, "last": 2, "steps": 4, "outcome": outcome, "detail": "", "seconds": 2.0,
    }  # fmt: skip


def test_only_the_place_of_the_data_can_be_set(made: Run, typed: Typed) -> None:
    done = typed("audit", made.root, "lr=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "audit takes data.root=DIR only" in done.stderr
