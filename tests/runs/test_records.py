"""Records, predictions and references: what is written is read back, and what is damaged is named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayexp.errors import UserError
from rayexp.runs.records import EpochRecord, Predictions, RunRef, best
from rayexp.runs.traits import Goal

RECORD = EpochRecord(
    epoch=2,
    step=20,
    train_loss=1.5,
    val_loss=1.25,
    metrics={"acc1": 37.94, "acc5": 66.38},
    lr=0.1,
    samples_per_second=812.5,
    seconds={"total": 3.0, "compute": 2.5},
    weights_sha="ab" * 32,
    state_sha="cd" * 32,
    world_size=2,
    peak_memory={"host": 1 << 30},
    energy_joules=None,
)
LOSSES = ("train_loss", "val_loss", "lr", "samples_per_second")


def strict(text: str) -> Any:
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is no JSON")

    return json.loads(text, parse_constant=refuse)


def plain(record: EpochRecord) -> dict[str, Any]:
    """Every number of a record by name, nan as None (nan equals nothing)."""
    flat = {name: getattr(record, name) for name in EpochRecord.__dataclass_fields__}
    flat |= {f"metric {k}": v for k, v in flat.pop("metrics").items()}
    flat |= {f"seconds {k}": v for k, v in flat.pop("seconds").items()}
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in flat.items()}


def test_a_line_has_the_keys_that_scripts_rely_on() -> None:
    row = strict(json.dumps(RECORD.to_json()))
    wanted = ["epoch", "step", "train_loss", "val_loss", "acc1", "acc5", "lr", "samples_per_second", "seconds"]
    assert list(row)[: len(wanted)] == wanted
    assert (row["epoch"], row["acc5"], row["seconds"]["total"], row["weights_sha"]) == (2, 66.38, 3.0, "ab" * 32)


number = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf])


@given(
    losses=st.tuples(number, number, number, number),
    metrics=st.dictionaries(st.sampled_from(["acc1", "acc5", "ppl", "mine"]), number),
    seconds=st.dictionaries(st.sampled_from(["total", "compute"]), number),
    energy=st.none() | number,
)
def test_every_record_is_json_and_comes_back(
    losses: tuple[float, ...], metrics: dict[str, float], seconds: dict[str, float], energy: float | None
) -> None:
    record = replace(
        RECORD, **dict(zip(LOSSES, losses, strict=True)), metrics=metrics, seconds=seconds, energy_joules=energy
    )
    again = EpochRecord.from_json(strict(json.dumps(record.to_json(), allow_nan=False)))
    expected = {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in plain(record).items()}
    assert plain(again) == expected
    assert set(again.metrics) == set(metrics)
    assert again.finite == math.isfinite(record.val_loss)


def test_not_finite_is_null_in_json_and_nan_in_memory() -> None:
    row = replace(RECORD, train_loss=math.inf, val_loss=math.nan, metrics={"acc1": 0.5, "ppl": math.inf}).to_json()
    assert (row["train_loss"], row["val_loss"], row["ppl"], row["acc1"]) == (None, None, None, 0.5)
    read = EpochRecord.from_json(row)
    assert math.isnan(read.train_loss)
    assert math.isnan(read.val_loss)
    assert math.isnan(read.metrics["ppl"])
    assert not read.finite


def test_lines_of_before_with_their_literals_still_open() -> None:
    text = json.dumps({**RECORD.to_json(), "val_loss": math.nan, "ppl": math.inf, "lr": -math.inf})
    assert "NaN" in text
    assert "Infinity" in text
    read = EpochRecord.from_json(json.loads(text))
    assert all(map(math.isnan, (read.val_loss, read.metrics["ppl"], read.lr)))
    strict(json.dumps(read.to_json()))


def test_a_record_of_an_older_edition_lacks_the_later_fields() -> None:
    row = RECORD.to_json()
    for name in ("state_sha", "world_size", "peak_memory", "energy_joules"):
        del row[name]
    read = EpochRecord.from_json(row)
    assert (read.state_sha, read.world_size, read.peak_memory, read.energy_joules) == ("", 0, {}, None)
    assert read.metrics == RECORD.metrics


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epoch", "2"), ("epoch", None), ("epoch", 2.5), ("step", []), ("world_size", "x"), ("val_loss", "1.0"),
        ("train_loss", {}), ("lr", True), ("weights_sha", 7), ("state_sha", None), ("energy_joules", "much"),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        EpochRecord.from_json({**RECORD.to_json(), name: value})


@pytest.mark.parametrize("name", ["epoch", "step", "train_loss", "val_loss", "lr", "weights_sha"])
def test_a_missing_field_is_named(name: str) -> None:
    row = RECORD.to_json()
    del row[name]
    with pytest.raises(TypeError, match=name):
        EpochRecord.from_json(row)


@pytest.mark.parametrize("row", [{**RECORD.to_json(), "seconds": 3}, {**RECORD.to_json(), "peak_memory": [1]}])
def test_parts_that_are_no_mappings_are_damage(row: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        EpochRecord.from_json(row)


# ---------------------------------------------------------------------- the best epoch


def epochs(values: list[float], metric: str | None) -> list[EpochRecord]:
    """One record for each value: of `metric`, with an equal loss throughout; of the loss where it is None."""
    rows = []
    for epoch, value in enumerate(values, 1):
        loss, metrics = (value, {"ppl": 1.0}) if metric is None else (1.0, {metric: value})
        rows.append(replace(RECORD, epoch=epoch, val_loss=loss, metrics=metrics))
    return rows


@pytest.mark.parametrize(
    ("values", "metric", "wanted"),
    [
        ([3.0, 1.0, 2.0], None, 2),  # the smallest loss, not the largest, not the last
        ([3.0, 1.0, 2.0], "acc1", 1),  # the largest accuracy
        ([1.0, 2.0, 3.0], "acc1", 3),
        ([2.0, 1.0, 1.0], None, 2),  # the earliest of equals
        ([5.0, 7.0, 7.0], "acc1", 2),
        ([math.nan, 4.0, 3.0], None, 3),
        ([-math.inf, 4.0, 5.0], None, 2),
        ([math.inf, math.nan, 5.0], "acc1", 3),
        ([math.nan, math.inf], None, None),
        ([], None, None),
    ],
)
def test_the_best_epoch(values: list[float], metric: str | None, wanted: int | None) -> None:
    found = best(epochs(values, metric), {"acc1": "max"})
    assert (found and found.epoch) == wanted


def test_accuracy_decides_over_the_loss_and_a_lost_loss_rules_an_epoch_out() -> None:
    rows = [
        replace(RECORD, epoch=1, val_loss=9.0, metrics={"acc1": 40.0}),
        replace(RECORD, epoch=2, val_loss=1.0, metrics={"acc1": 30.0}),
        replace(RECORD, epoch=3, val_loss=math.nan, metrics={"acc1": 95.0}),
    ]
    found = best(rows, {"acc1": "max", "acc5": "max"})
    assert found is not None
    assert found.epoch == 1


def test_a_perplexity_too_large_for_a_number_does_not_rule_out_a_finite_loss() -> None:
    for lost in (math.inf, math.nan):  # on disk both are null
        values = ((1, 800.0, lost), (2, 5.0, 9.0))
        rows = [replace(RECORD, epoch=epoch, val_loss=loss, metrics={"ppl": ppl}) for epoch, loss, ppl in values]
        assert best(rows[:1], {"ppl": "min"}) is rows[0]
        assert best(rows, {"ppl": "min"}) is rows[1]


@pytest.mark.parametrize(
    ("goals", "values", "wanted"),
    [
        ({"rmse": "min"}, [3.0, 1.0, 2.0], 2),
        ({"f1": "max"}, [3.0, 1.0, 3.0], 1),
        ({"rmse": "min", "f1": "max"}, [math.nan, 2.0, -math.inf], 2),
        ({"f1": "max"}, [math.inf, 1.0, math.nan], 2),
        ({"f1": "max"}, [math.nan, math.nan], None),
        ({"rmse": "min"}, [-math.inf], None),
        ({}, [1.0, 2.0], 1),  # by the loss, which is the same throughout
    ],
)
def test_the_first_goal_decides(goals: dict[str, Goal], values: list[float], wanted: int | None) -> None:
    name = next(iter(goals), "rmse")
    rows = [replace(RECORD, epoch=e, val_loss=1.0, metrics={"f1": 0.0, name: v}) for e, v in enumerate(values, 1)]
    found = best(rows, goals)
    assert (found and found.epoch) == wanted


@given(st.lists(st.floats(), min_size=1), st.booleans())
def test_no_other_epoch_is_better_than_the_best(values: list[float], accuracy: bool) -> None:
    finite = [v for v in values if math.isfinite(v)]
    found = best(epochs(values, "acc1" if accuracy else None), {"acc1": "max"})
    if not finite:
        assert found is None
        return
    assert found is not None
    wanted = max(finite) if accuracy else min(finite)
    assert values[found.epoch - 1] == wanted
    assert wanted not in values[: found.epoch - 1]


# ---------------------------------------------------------------------- predictions


def predictions() -> Predictions:
    return Predictions("tokens", "v" * 64, {"offset": np.arange(4), "loss": np.array([1, np.nan, np.inf, 0], "f4")})


def test_predictions_come_back() -> None:
    made = predictions()
    read = Predictions.from_npz(made.to_npz(), "x.npz")
    assert (read.kind, read.data_sha, len(read)) == ("tokens", "v" * 64, 4)
    for name, array in made.arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype


def test_a_sample_is_finite_where_all_its_numbers_are() -> None:
    assert predictions().finite.tolist() == [True, False, False, True]
    numbers = {"loss": np.array([1, np.nan, 1, 0], "f4"), "confidence": np.array([0.5, 0.5, np.inf, 1], "f4")}
    images = Predictions("images", "v", {"label": np.arange(4), **numbers})
    assert images.finite.tolist() == [True, False, False, True]


def test_the_same_predictions_are_the_same_where_both_are_finite() -> None:
    made = predictions()

    def other(*loss: float) -> Predictions:
        return replace(made, arrays={**made.arrays, "loss": np.array(loss, "f4")})

    assert made.same_as(other(1, np.nan, np.inf, 0))
    assert made.same_as(other(1, np.inf, np.nan, 0))  # which of them it is does not matter
    assert not made.same_as(other(1, np.nan, np.inf, 0.5))
    assert not made.same_as(other(1, np.nan, 1, 0))
    assert not made.same_as(other(1, np.nan, np.inf, np.nan))
    assert not made.same_as(replace(made, data_sha="w"))
    assert not made.same_as(replace(made, kind="images"))


def test_what_is_no_predictions_file_is_named() -> None:
    data = predictions().to_npz()
    pickled = Predictions("tokens", "v", {"loss": np.array([{}], dtype=object)}).to_npz()
    for wrong in (b"", data[:-30], b"x" + data[1:], pickled, b"{}"):
        with pytest.raises(UserError, match=r"epoch_001\.npz: not a predictions file"):
            Predictions.from_npz(wrong, "epoch_001.npz")


# ---------------------------------------------------------------------- references


@pytest.mark.parametrize(
    ("text", "run", "epoch"),
    [
        ("a@7", "a", 7), ("a@best", "a", "best"), ("a@last", "a", "last"), ("a", "a", "last"),
        ("me@host@12", "me@host", 12), ("runs/a@1", "runs/a", 1),
    ],
)  # fmt: skip
def test_references(text: str, run: str, epoch: int | str) -> None:
    assert RunRef.parse(text) == RunRef(run, epoch)
    assert RunRef.parse(str(RunRef(run, epoch))) == RunRef(run, epoch)


@pytest.mark.parametrize("text", ["a@0", "a@-1", "a@", "a@first", "@7", "@best", "a@1.5", "a@BEST"])
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="RUN@7, RUN@best or RUN@last"):
        RunRef.parse(text)
