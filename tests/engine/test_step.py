"""The step on static inputs, as a GPU runs it, here on a CPU: where "capturing" a step is calling the same function."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rayexp.config import ExperimentConfig
from rayexp.engine import checkpoint, trainer
from rayexp.engine.gradients import ReplicaModel
from rayexp.engine.passes import Passes
from rayexp.engine.programs import Program, Programs
from rayexp.engine.runtime import Runtime
from rayexp.engine.step import ControlFlags, Stepper, StepResult
from rayexp.engine.trainer import EpochDone, StepDone, Trainer
from rayexp.errors import UserError

Make = Callable[..., ExperimentConfig]
Open = Callable[..., Trainer]

TEXT = {"emsize": 16, "nhid": 16, "nlayers": 2, "dropout": 0.2}
MODELS: dict[str, dict[str, Any]] = {
    "lstm": {"name": "lstm", **TEXT},
    "gru": {"name": "gru", **TEXT},
    "rnn_relu": {"name": "rnn_relu", **TEXT},
    "tied": {"name": "lstm", **TEXT, "tied": True},
    "transformer": {"name": "transformer", **TEXT, "nhead": 2, "context": 4},
}
language = pytest.mark.parametrize("small", ["language_model"], indirect=True)


def states(one: Trainer, steps: int | None = None) -> list[tuple[float, str]]:
    """Loss and state_sha after each step, all of which are wanted."""
    found = []
    for event in one.train(wanted=lambda step: True):
        if isinstance(event, StepDone):
            assert event.settled
            found.append((event.loss, checkpoint.sha(one.state().tensors)))
            if len(found) == steps:
                break
    return found


def losses(one: Trainer) -> list[tuple[int, float, bool]]:
    """Step, loss, and whether the state was that of the step, as they come."""
    return [(e.step, e.loss, e.settled) for e in one.train() if isinstance(e, StepDone)]


# ---------------------------------------------------------------------- bits


@pytest.mark.parametrize("reduction", ["exact", "ddp"])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_bits_of_an_ordinary_step(small: Make, static: Open, precision: str, reduction: str) -> None:
    """Of a whole epoch, its shorter last batch too, on one replica and on two."""
    # ddp's bits depend on the number of replicas.
    found = {}
    for lanes in (1, 2):
        config = small(precision=precision, reduction=reduction, lr=0.01, scaling={"lanes": lanes})
        found[lanes] = states(static(config))
        assert found[lanes] == states(static(config, static=False))
        assert len({sha for _, sha in found[lanes]}) == len(found[lanes]) > 3
    assert (found[1] == found[2]) is (reduction == "exact")


@language
@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_language_model(small: Make, static: Open, model: str, precision: str) -> None:
    config = small(model=MODELS[model], precision=precision, lr=0.1)
    assert states(static(config), 3) == states(static(config, static=False), 3)


@pytest.mark.parametrize("changes", [{"name": "adamw", "clip": 0.5}, {"name": "sgd", "momentum": 0.9}])
def test_what_is_late_changes_no_bit(light: Make, static: Open, changes: dict[str, Any]) -> None:
    config = light(optimizer=changes, lr=0.01, epochs=2)
    late, ordinary = static(config), static(config, static=False)
    told, expected = losses(late), losses(ordinary)
    assert [t[:2] for t in told] == [t[:2] for t in expected]
    assert [settled for *_, settled in told] == [step == late.steps for step, *_ in told]
    assert all(settled for *_, settled in expected)
    assert checkpoint.sha(late.state().tensors) == checkpoint.sha(ordinary.state().tensors)


def test_a_program_for_each_shape_of_batch(light: Make, static: Open) -> None:
    one = static(light(epochs=2, lr=0.01))
    list(one.train())
    programs = list(one.stepper.programs)
    assert [program.runs for program in programs] == [2 * (one.steps - 1), 2]
    assert all(program.compute and program.update for program in programs)
    assert one.stepper.capture == "graph"


def test_nothing_watches_the_gradients_of_a_static_step(
    light: Make, static: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a watched parameter binds backward passes to the stream that was present then."""
    watched = []
    true = ReplicaModel.watch
    monkeypatch.setattr(ReplicaModel, "watch", lambda model, ready: watched.append(1) or true(model, ready))
    static(light())
    assert not watched
    static(light(), static=False)
    assert watched


# ---------------------------------------------------------------------- control


@pytest.mark.parametrize("flag", ["save", "stop"])
def test_a_flag_is_heard_while_the_next_step_is_under_way(light: Make, static: Open, flag: str) -> None:
    """It takes the state after that one, which every worker has."""
    one = static(light(lr=0.01))
    expected = [sha for _, sha in states(static(light(lr=0.01)))]
    calls = itertools.count(1)
    seen = []
    for event in one.train(lambda: ControlFlags(**{flag: next(calls) == 2})):
        if isinstance(event, StepDone):
            seen.append((event.step, event.settled, event.save or event.stopped))
            if event.save or event.stopped:
                assert one.global_step == 3
                assert checkpoint.sha(one.state().tensors) == expected[2]
    rest = [] if flag == "stop" else [(s, s == one.steps, False) for s in range(4, one.steps + 1)]
    assert seen == [(1, False, False), (2, False, False), (3, True, True), *rest]


def test_a_wanted_state_is_that_of_its_step(light: Make, static: Open) -> None:
    expected = [sha for _, sha in states(static(light(lr=0.01)))]
    one = static(light(lr=0.01))
    found = {}
    for event in one.train(wanted=lambda step: step == 2):
        if isinstance(event, StepDone) and event.settled:
            found[event.step] = checkpoint.sha(one.state().tensors)
    assert found == {2: expected[1], one.steps: expected[-1]}


@pytest.mark.parametrize("at", [1, 3])
def test_a_resumed_run_has_the_same_bits(light: Make, static: Open, at: int) -> None:
    """Its first step is a program's first, which is not captured yet; recurrent states come from the snapshot."""
    config = light(lr=0.01)
    first = static(config)
    expected = []
    for event in first.train(wanted=lambda step: True):
        if isinstance(event, StepDone):
            expected.append((event.loss, checkpoint.sha(first.state().tensors)))
            if event.step == at:
                files = checkpoint.encode(first.state())
    again = static(config)
    again.load(checkpoint.decode(files))
    assert states(again) == expected[at:]


# ---------------------------------------------------------------------- what cannot be captured


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception, half: str = "compute", times: int = 1000) -> list[Programs]:
    """Have the next captures fail, as they do on a GPU: generators that took part are of no use afterwards."""
    true = Programs._captured
    failed: list[Programs] = []

    def captured(programs: Programs, program: Program, of: str, work: Callable[[], None]) -> Any:
        if of == half and len(failed) < times:
            failed.append(programs)
            for generator in programs.passes.generators.values():
                torch.rand(1, generator=generator)
            raise error
        return true(programs, program, of, work)

    monkeypatch.setattr(Programs, "_captured", captured)
    return failed


@pytest.mark.parametrize("half", ["compute", "update"])
def test_what_cannot_be_captured_runs_as_it_stands(
    light: Make, static: Open, monkeypatch: pytest.MonkeyPatch, half: str
) -> None:
    expected = states(static(light(lr=0.01)), 3)
    failed = fail(monkeypatch, RuntimeError("\nCUDA error: not permitted\nwhen a stream is capturing"), half)
    one = static(light(lr=0.01))
    assert states(one, 3) == expected
    assert one.stepper.capture == "eager: CUDA error: not permitted"
    assert len(failed) == 1
    assert all(p.compute is p.update is None for p in one.stepper.programs)


@language
def test_capture_true_makes_that_an_error(light: Make, static: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, RuntimeError("this model waits"))
    one = static(light(capture=True))
    with pytest.raises(UserError, match=r"^capture: true.*this model waits.*allowed: auto, false"):
        states(one)


@language
def test_capture_false_captures_nothing(light: Make, static: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = fail(monkeypatch, RuntimeError("never"))
    one = static(light(capture=False))
    assert states(one, 3) == states(static(light(capture=False), static=False), 3)
    assert not failed
    assert one.stepper.capture.startswith("eager: ")


def test_a_capture_that_is_short_of_memory_has_fewer_replicas(
    light: Make, static: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = states(static(light(lr=0.01)), 3)
    failed = fail(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), times=2)
    one = static(light(lr=0.01, scaling={"lanes": 4}))
    assert states(one, 3) == expected
    assert len(failed) == 2
    assert len(one.stepper.passes.replicas) == 1
    assert one.stepper.capture == "graph"


@language
@pytest.mark.parametrize(("free", "replicas"), [(461, 4), (459, 2), (116, 1), (114, 0)])
def test_a_graph_that_would_not_fit_is_not_begun(
    light: Make, static: Open, monkeypatch: pytest.MonkeyPatch, free: int, replicas: int
) -> None:
    """Of a capture that has failed PyTorch keeps the memory."""
    expected = states(static(light(lr=0.01)), 3)
    monkeypatch.setattr(Runtime, "transient", lambda here, work: (work(), 100))
    monkeypatch.setattr(Runtime, "free_memory", lambda here: free)
    one = static(light(lr=0.01, scaling={"lanes": 4}))
    assert states(one, 3) == expected
    assert len(one.stepper.passes.replicas) == max(1, replicas)
    assert one.stepper.capture == ("graph" if replicas else "eager: too little memory for a graph")


@pytest.mark.parametrize(("half", "lanes"), [("compute", 1), ("update", 2)])
def test_too_little_memory_for_a_graph(
    light: Make, static: Open, monkeypatch: pytest.MonkeyPatch, half: str, lanes: int
) -> None:
    expected = states(static(light(lr=0.01)), 3)
    fail(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), half)
    one = static(light(lr=0.01, scaling={"lanes": lanes}))
    assert states(one, 3) == expected
    assert len(one.stepper.passes.replicas) == lanes
    assert one.stepper.capture == "eager: too little memory for a graph"


def test_a_step_that_is_short_of_memory_starts_again_with_fewer_replicas(
    light: Make, static: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the others had computed leaves nothing behind: no recurrent state, no number drawn."""
    expected = states(static(light(lr=0.01)), 3)
    true = Passes.compute
    calls = itertools.count(1)

    def compute(passes: Passes, number: int, *args: Any) -> float:
        seconds = true(passes, number, *args)
        if number == 3 and next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return seconds

    monkeypatch.setattr(Passes, "compute", compute)
    one = static(light(lr=0.01, scaling={"lanes": 4}))
    assert states(one, 3) == expected
    assert len(one.stepper.passes.replicas) == 2


@language
def test_one_replica_that_is_short_of_memory_fails(light: Make, static: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(*args: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Passes, "compute", compute)
    with pytest.raises(torch.OutOfMemoryError):
        states(static(light(scaling={"lanes": 2})), 1)


def test_where_memory_is_short_beside_graphs_they_go(
    light: Make, static: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for the first shorter batch, or an evaluation."""
    expected = states(static(light(lr=0.01)))
    one = static(light(lr=0.01, scaling={"lanes": 1}))
    true = Passes.compute

    def compute(passes: Passes, number: int, inputs: Any, *args: Any) -> float:
        if len(list(one.stepper.programs)) > 1 and one.stepper.programs._first_graph is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true(passes, number, inputs, *args)

    monkeypatch.setattr(Passes, "compute", compute)
    assert states(one) == expected
    assert one.stepper.capture == "eager: too little memory beside graphs"


@language
@pytest.mark.parametrize(
    ("lanes", "left", "capture"), [(4, 2, "graph"), (1, 1, "eager: too little memory beside graphs")]
)
def test_where_an_evaluation_finds_too_little_memory_graphs_go(
    light: Make, static: Open, monkeypatch: pytest.MonkeyPatch, lanes: int, left: int, capture: str
) -> None:
    first = static(light(lr=0.01, epochs=1))
    expected = list(first.train())[-1]
    one = static(light(lr=0.01, epochs=1, scaling={"lanes": lanes}))
    true = trainer.predict

    def predict(*args: Any) -> Any:
        if one.stepper.programs._first_graph is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true(*args)

    monkeypatch.setattr(trainer, "predict", predict)
    found = list(one.train())[-1]
    assert isinstance(found, EpochDone)
    assert isinstance(expected, EpochDone)
    assert found.record.val_loss == expected.record.val_loss
    assert len(one.stepper.passes.replicas) == left
    assert one.stepper.capture == capture


def test_an_epoch_still_ends_with_its_record(light: Make, static: Open) -> None:
    one = static(light(lr=0.01))
    done = list(one.train())[-1]
    assert isinstance(done, EpochDone)
    assert done.record.step == one.steps


@language
def test_every_step_has_its_own_seconds_and_no_capture(
    light: Make, static: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although a step is launched before the one before it is told, and captured at its shape's second step."""
    clock, captures = [0.0], []
    launch, captured = Stepper.launch, Programs._captured

    def launched(*args: Any) -> Callable[[], StepResult]:
        clock[0] += 10.0
        result = launch(*args)

        def told() -> StepResult:
            clock[0] += 1.0
            return result()

        return told

    def capture(*args: Any, **options: Any) -> Any:
        clock[0] += 500.0
        captures.append(clock[0])
        return captured(*args, **options)

    monkeypatch.setattr(Stepper, "launch", launched)
    monkeypatch.setattr(Programs, "_captured", capture)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    steps: list[StepDone] = []
    for event in static(light(epochs=3, lr=0.01)).train():
        if isinstance(event, StepDone):
            steps.append(event)
            assert event.count / event.rate == pytest.approx(11.0)
            assert event.seconds["compute"] < 1.0
            assert event.seconds["optimizer"] < 1.0
            continue
        seconds = event.record.seconds
        rate = sum(step.count for step in steps[1 if steps[0].first else 0 :])
        assert event.record.samples_per_second == pytest.approx(rate / 11 / (len(steps) - steps[0].first))
        assert seconds.get("first_step", 11.0) == pytest.approx(11.0)
        assert seconds["total"] == pytest.approx(11 * len(steps) + 500 * len(captures))
        assert seconds["other"] >= 500 * len(captures)
        assert len(captures) == {1: 2, 2: 2, 3: 0}[event.record.epoch]  # the shorter last batch comes again in epoch 2
        steps.clear()
        captures.clear()
