"""Forecasts and the link between workers, against arithmetic by hand."""

from __future__ import annotations

import pytest

from rayexp.grid import forecast
from rayexp.grid.forecast import Link, StepModel, StepTimes
from rayexp.grid.statistics import Estimate

# ---------------------------------------------------------------------- link and forecast


def test_one_worker_exchanges_nothing():
    assert forecast.exchange_seconds(1, 1e9, 1e9, 1e-3) == 0


def test_exchange_is_bandwidth_optimal():
    # 2 (n-1)/n volume / bandwidth + 2 (n-1) latency
    assert forecast.exchange_seconds(4, 8e6, 1e9, 1e-5) == pytest.approx(2 * 3 / 4 * 8e-3 + 6e-5)


def points(bandwidth, latency, workers, volume=45e6):
    """Bare all-reductions of a row."""
    return [(w, volume, forecast.exchange_seconds(w, volume, bandwidth, latency)) for w in workers]


def test_link_is_recovered_from_two_worker_counts():
    link = forecast.measure_link(points(2e9, 50e-6, (2, 8)), None, None)
    assert link.bandwidth == pytest.approx(2e9, rel=1e-6)
    assert link.latency == pytest.approx(50e-6, rel=1e-6)
    assert link.source.startswith("measured")


def test_one_worker_count_gives_an_effective_bandwidth():
    link = forecast.measure_link(points(2e9, 0, (2,)), None, None)
    assert link.bandwidth == pytest.approx(2e9)
    assert link.latency == 0


def test_a_given_bandwidth_leaves_the_latency_to_be_measured():
    link = forecast.measure_link(points(2e9, 30e-6, (4,)), 2e9, None)
    assert link.bandwidth == pytest.approx(2e9)
    assert link.latency == pytest.approx(30e-6)
    assert "given" in link.source
    assert "measured" in link.source


def test_a_given_latency_leaves_the_bandwidth_to_be_measured():
    link = forecast.measure_link(points(2e9, 30e-6, (4,)), None, 30e-6)
    assert link.bandwidth == pytest.approx(2e9)


def test_a_given_link_needs_no_measurement():
    link = forecast.measure_link([], 5e9, 2e-6)
    assert (link.bandwidth, link.latency, link.source) == (5e9, 2e-6, "given")
    words = link.to_json()  # 40 Gbit/s, 2 microseconds
    assert (words["bandwidth_gbit"]["value"], words["latency_us"]["value"]) == pytest.approx((40, 2))


def test_errors_are_relative_so_small_messages_tell_the_latency():
    large = [(2, 8e6, 0.010), (2, 16e6, 0.024)]  # these two leave less than nothing
    small = (2, 100.0, 2e-4)
    assert forecast.measure_link([*large, small], None, None).latency == pytest.approx(1e-4, rel=0.05)


def test_no_link_without_anything():
    assert forecast.measure_link([], None, None) is None
    assert forecast.measure_link([], None, 1e-6) is None


def test_small_messages_tell_the_latency_at_one_worker_count():
    both = points(2e9, 30e-6, (2,)) + points(2e9, 30e-6, (2,), volume=64)
    link = forecast.measure_link(both, None, None)
    assert link.bandwidth == pytest.approx(2e9, rel=1e-6)
    assert link.latency == pytest.approx(30e-6, rel=1e-6)


LINK = Link(1e9, 0.0, "given")


def model(weak=False, parallel=0.8, workers=1, reduce=0.0):
    return StepModel(workers, parallel, 0.02, reduce, 45e6, 256, LINK, weak)


def test_the_model_gives_back_what_it_was_made_from():
    # Two workers exchange for 45 ms, of which 30 ms hid behind the backward pass.
    assert model(workers=2, reduce=0.015).seconds(2) == pytest.approx(0.8 + 0.02 + 0.015)
    # They waited 60 ms for each other: 15 ms beyond the bare exchange.
    assert model(workers=2, reduce=0.060).seconds(2) == pytest.approx(0.8 + 0.02 + 0.060)


def test_less_hides_behind_a_shorter_backward_pass():
    four = model(workers=2, reduce=0.015).exchange(4)
    assert four == pytest.approx(2 * 3 / 4 * 0.045 - 0.030 / 2)
    assert model(workers=2, reduce=0.015, weak=True).exchange(4) == pytest.approx(2 * 3 / 4 * 0.045 - 0.030)


def test_waiting_beyond_the_bare_exchange_stays():
    assert model(workers=2, reduce=0.060).exchange(4) == pytest.approx(2 * 3 / 4 * 0.045 + 0.015)


def test_a_step_is_of_strong_scaling_unless_it_says_so():
    step = model()
    assert not StepModel(step.workers, step.parallel, step.floor, step.reduce, step.volume, step.samples, LINK).weak


def times(workers, work, optimizer=0.02, reduce=0.0, samples=256):
    return StepTimes(workers, work, optimizer, reduce, 45e6, samples)


def test_what_does_not_shrink_is_a_floor():
    """0.8 s are shared, 0.1 s are not; the optimizer is not, either."""
    made = StepModel.of([times(n, 0.8 / n + 0.1, reduce=0.05 * (n > 1)) for n in (1, 2, 4)], LINK)
    assert (made.workers, made.parallel, made.reduce) == (4, pytest.approx(0.2), 0.05)
    assert made.floor == pytest.approx(0.1 + 0.02)
    assert made.work(16) == pytest.approx(0.05)
    assert made.seconds(1 << 20) > 0.12


def test_work_that_shrinks_by_more_than_its_share_has_no_floor_below_the_optimizer():
    made = StepModel.of([times(1, 0.8), times(2, 0.3)], LINK)
    assert made.floor == pytest.approx(0.02)


def test_one_count_tells_of_no_floor_but_the_optimizer():
    made = StepModel.of([times(2, 0.4)], LINK)
    assert (made.parallel, made.floor) == (0.4, 0.02)


def test_weak_scaling_takes_the_largest_count_as_it_is():
    made = StepModel.of([times(1, 0.40, samples=64), times(4, 0.44, samples=256)], LINK, weak=True)
    assert (made.workers, made.parallel, made.floor, made.samples) == (4, 0.44, 0.02, 256)
    assert made.rate(8) == pytest.approx(512 / (0.44 + 0.02 + made.exchange(8)))


def test_forecast_of_a_strong_step():
    found = forecast.forecast([model(), model()], 1.0, [4], None, shards=8)
    expected = 0.8 / 4 + 0.02 + 2 * 3 / 4 * 0.045
    assert found[0].rate == pytest.approx(256 / expected)
    assert found[0].share_reduce == pytest.approx(2 * 3 / 4 * 0.045 / expected)
    assert (found[0].work_seconds, found[0].floor_seconds) == pytest.approx((0.2, 0.02))
    assert found[0].note == "not checked at any measured count"
    assert found[0].to_json()["measured"] is False


def test_forecast_of_a_weak_step_keeps_the_work_of_a_worker():
    found = forecast.forecast([model(weak=True)] * 2, 1.0, [4], 0.1, shards=6)
    assert found[0].rate == pytest.approx(4 * 256 / (0.8 + 0.02 + 2 * 3 / 4 * 0.045))
    assert found[0].note == ""


def test_the_interval_of_a_forecast_is_that_of_its_rounds_widened_by_the_error():
    models = [model(parallel=seconds) for seconds in (0.76, 0.8, 0.85)]
    (plain,), (wide,) = (forecast.forecast(models, 1.0, [8], miss, shards=8) for miss in (0.0, 0.25))
    low, high = Estimate.of([one.rate(8) for one in models]).interval
    assert (plain.low, plain.high) == pytest.approx((low, high))
    assert (wide.low, wide.high) == pytest.approx((low * 0.75, high * 1.25))
    assert wide.low < wide.rate < wide.high


def test_forecast_beyond_the_shards_says_so():
    found = forecast.forecast([model()] * 2, 2.0, [8, 16], 0.0, shards=8)
    assert found[0].note == ""
    assert "divisible by 16" in found[1].note
    assert [one.devices for one in found] == [16, 32]
