"""The engine on every workload of the table, in this process: bits, resumption, dropout, the two reductions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rayexp.config import ExperimentConfig
from rayexp.engine import checkpoint, replica
from rayexp.engine.trainer import EpochDone, StepDone, Trainer

Make = Callable[..., ExperimentConfig]
Open = Callable[[ExperimentConfig], Trainer]


def shas(session: Trainer, steps: int | None = None) -> list[str]:
    """state_sha after each step."""
    events = (e for e in session.train() if isinstance(e, StepDone))
    return [checkpoint.sha(session.state().tensors) for _ in itertools.islice(events, steps)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_replicas_do_not_change_a_bit(small: Make, session: Open, optimizer: str) -> None:
    found = {}
    for lanes in (1, 2, 3):
        words: dict[str, Any] = {"name": optimizer, "momentum": 0.9, "clip": 1.0}
        config = small(scaling={"lanes": lanes}, optimizer=words, lr=0.01)
        found[lanes] = shas(session(config), 3)
    assert len(set(found[1])) == 3
    assert found[1] == found[2] == found[3]


def test_ddp_is_the_same_mathematics(small: Make, session: Open) -> None:
    """After one step: a rounding that flips a ReLU moves a gradient by parts in a thousand, and steps drift apart."""
    exact, ddp = (session(small(reduction=r, lr=0.01)) for r in ("exact", "ddp"))
    before = exact.master.params.clone()
    one, other = next(exact.train()), next(ddp.train())
    assert isinstance(one, StepDone)
    assert isinstance(other, StepDone)
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    moved, moved_too = exact.master.params - before, ddp.master.params - before
    assert (moved - moved_too).norm() < 5e-2 * moved.norm()
    assert torch.allclose(exact.master.stats, ddp.master.stats, rtol=1e-4, atol=1e-5)


def test_another_seed_is_another_model(light: Make, session: Open) -> None:
    assert shas(session(light(seed=0)), 1) != shas(session(light(seed=1)), 1)


@pytest.mark.parametrize("reduction", ["exact", pytest.param("ddp", marks=pytest.mark.slow)])
def test_resume_at_every_step_gives_the_same_bits(light: Make, session: Open, reduction: str) -> None:
    config = light(reduction=reduction, epochs=2, lr=0.01)
    first = session(config)
    saved, expected = [], []
    for event in first.train():
        files = checkpoint.encode(first.state())
        saved.append(files)
        expected.append((type(event).__name__, checkpoint.sha(checkpoint.decode(files).tensors)))
    records = [e for e in expected if e[0] == "EpochDone"]
    assert len(records) == 2
    for at in (0, len(saved) // 2 - 1, len(saved) // 2, len(saved) - 2):
        again = session(config)
        again.load(checkpoint.decode(saved[at]))
        # From the first step on only a little way: the rest is what the others do.
        until = None if at else 4
        events = itertools.islice(again.train(), until)
        assert [(type(e).__name__, checkpoint.sha(again.state().tensors)) for e in events] == expected[at + 1 :][:until]


def test_what_an_epoch_says(light: Make, session: Open) -> None:
    config = light(epochs=1, lr=0.01)
    one = session(config)
    events = list(one.train())
    done = events[-1]
    assert isinstance(done, EpochDone)
    assert len(events) == one.steps + 1
    record = done.record
    assert record.step == one.steps
    phases = {k: v for k, v in record.seconds.items() if k not in ("total", "first_step")}
    assert sum(phases.values()) == pytest.approx(record.seconds["total"], rel=0.02)
    assert record.train_loss == pytest.approx(sum(e.loss for e in events[:-1]) / one.steps, rel=0.2)
    again = one.workload.metrics(done.predictions)
    assert again.pop("val_loss") == record.val_loss
    assert again == record.metrics


@pytest.mark.parametrize("small", ["language_model"], indirect=True)  # the workload has no part in it
def test_rates_leave_out_a_processes_first_step(small: Make, session: Open) -> None:
    """Of a fresh run and of resumed ones, whole epochs and begun ones; as records.py and the comparison have it."""
    config = small(epochs=2, lr=0.01)
    whole = session(config)
    last = {whole.steps - 1: "one step of epoch 1 is left", whole.steps + 1: "epoch 2 has begun"}
    saved = []

    def check(one: Trainer, epochs: tuple[int, ...]) -> None:
        steps: list[StepDone] = []
        seen = []
        for event in one.train():
            if isinstance(event, StepDone):
                steps.append(event)
                if one is whole and one.global_step in last:
                    saved.append(checkpoint.encode(one.state()))
                continue
            record, alone = event.record, len(steps) == 1
            assert [s.first for s in steps] == [i == 0 and not seen for i in range(len(steps))]
            counted = [s for s in steps if not s.first or alone]
            rate = sum(s.count for s in counted) / sum(s.count / s.rate for s in counted)
            assert record.samples_per_second == pytest.approx(rate, rel=1e-6)
            assert ("first_step" in record.seconds) is (not seen)
            if not seen:
                assert record.seconds["first_step"] == pytest.approx(steps[0].count / steps[0].rate, rel=1e-6)
            seen.append(record.epoch)
            steps = []
        assert tuple(seen) == epochs

    check(whole, (1, 2))
    for files, epochs in zip(saved, ((1, 2), (2,)), strict=True):
        resumed = session(config)
        resumed.load(checkpoint.decode(files))
        check(resumed, epochs)


def test_state_survives_a_round_trip(light: Make, session: Open) -> None:
    one = session(light(lr=0.01))
    shas(one, 2)
    state = one.state()
    files = checkpoint.encode(state)
    back = checkpoint.decode(files)
    assert checkpoint.sha(back.tensors) == checkpoint.sha(state.tensors)
    assert set(one.workload.model().state_dict()) == set(back.weights())


@pytest.mark.slow
def test_the_loss_falls(small: Make, session: Open) -> None:
    one = session(small(epochs=8))
    epochs = [e.record for e in one.train() if isinstance(e, EpochDone)]
    assert epochs[-1].train_loss < 0.99 * epochs[0].train_loss


TIED = {"name": "lstm", "emsize": 16, "nhid": 16, "nlayers": 1, "tied": True}


@pytest.mark.parametrize("small", ["language_model"], indirect=True)
def test_a_tied_matrix_has_the_same_bits_on_any_number_of_replicas(small: Make, session: Open) -> None:
    """A pass adds to its gradient twice, so shards must not share a buffer. One replica has pairs, eight none."""
    found = {tuple(shas(session(small(model=TIED, scaling={"lanes": lanes})), 2)) for lanes in (1, 3, 8)}
    assert len(found) == 1


@pytest.mark.parametrize("reduction", ["exact", "ddp"])
def test_gradient_buffers_are_used_again(
    small: Make, session: Open, monkeypatch: pytest.MonkeyPatch, reduction: str
) -> None:
    made = []
    true = replica.GradientBuffer
    monkeypatch.setattr(replica, "GradientBuffer", lambda *args: made.append(1) or true(*args))
    one = session(small(reduction=reduction, scaling={"lanes": 2}))
    counts = [len(made) for event in itertools.islice(one.train(), 3) if isinstance(event, StepDone)]
    assert counts[0] > 0
    assert counts == [counts[0]] * len(counts)


@pytest.mark.parametrize("small", ["language_model"], indirect=True)
def test_what_an_epochs_first_step_exchanges(small: Make, session: Open) -> None:
    """All of a buffer, but of an embedding only the rows of the words in the first window."""
    one = session(small())
    layout = one.layout
    (part,) = layout.touched({"encoder.weight": torch.arange(0)})
    first, second = (len(one.workload.touched_rows(1, step)["encoder.weight"]) for step in (0, 1))
    assert first != second
    assert one.stepper.exchange_bytes == 4 * (layout.buffer_size - (part.stop - part.start) + first * part.shape[1])


@pytest.mark.parametrize("small", ["language_model"], indirect=True)
def test_an_epoch_that_lacks_only_its_evaluation(small: Make, session: Open) -> None:
    """A run that was stopped in an epoch's last step: resumed, it tells the rate of that step."""
    config = small(epochs=2, lr=1.0, schedule={"name": "cosine"})
    whole = session(config)
    rates = [whole.schedule.lr(step) for step in range(2 * whole.steps)]
    for event in whole.train():
        if whole.step == whole.steps:
            saved = checkpoint.encode(whole.state())
        if isinstance(event, EpochDone):
            break
    resumed = session(config)
    resumed.load(checkpoint.decode(saved))
    done = next(resumed.train())
    assert isinstance(done, EpochDone)
    assert (done.record.epoch, done.record.lr) == (1, rates[whole.steps - 1])
    assert done.record.train_loss == event.record.train_loss
