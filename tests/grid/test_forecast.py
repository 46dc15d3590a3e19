"""Forecasts and the link between workers, against arithmetic by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rayexp.grid import forecast
from rayexp.grid.forecast import Link, StepModel
from rayexp.grid.statistics import DRAWS, Estimate


def measured(value, spread=0.0, seed=0):
    return Estimate(value, value * (1 + spread * np.random.default_rng(seed).standard_normal(DRAWS)))


# ---------------------------------------------------------------------- link and forecast


def test_one_worker_exchanges_nothing():
    assert forecast.exchange_seconds(1, 1e9, 1e9, 1e-3) == 0


def test_exchange_is_bandwidth_optimal():
    # 2 (n-1)/n volume / bandwidth + 2 (n-1) latency
    assert forecast.exchange_seconds(4, 8e6, 1e9, 1e-5) == pytest.approx(2 * 3 / 4 * 8e-3 + 6e-5)


def points(bandwidth, latency, workers, volume=45e6):
    """Bare all-reductions of a row."""
    return [(w, volume, Estimate.exact(forecast.exchange_seconds(w, volume, bandwidth, latency))) for w in workers]


def test_link_is_recovered_from_two_worker_counts():
    link = forecast.measure_link(points(2e9, 50e-6, (2, 8)), None, None)
    assert link.bandwidth.value == pytest.approx(2e9, rel=1e-6)
    assert link.latency.value == pytest.approx(50e-6, rel=1e-6)
    assert link.source.startswith("measured")


def test_one_worker_count_gives_an_effective_bandwidth():
    link = forecast.measure_link(points(2e9, 0, (2,)), None, None)
    assert link.bandwidth.value == pytest.approx(2e9)
    assert link.latency.value == 0


def test_a_given_bandwidth_leaves_the_latency_to_be_measured():
    link = forecast.measure_link(points(2e9, 30e-6, (4,)), 2e9, None)
    assert link.bandwidth.value == pytest.approx(2e9)
    assert link.latency.value == pytest.approx(30e-6)
    assert "given" in link.source
    assert "measured" in link.source


def test_a_given_latency_leaves_the_bandwidth_to_be_measured():
    link = forecast.measure_link(points(2e9, 30e-6, (4,)), None, 30e-6)
    assert link.bandwidth.value == pytest.approx(2e9)


def test_a_given_link_needs_no_measurement():
    link = forecast.measure_link([], 5e9, 2e-6)
    assert (link.bandwidth.value, link.latency.value, link.source) == (5e9, 2e-6, "given")
    words = link.to_json()  # 40 Gbit/s, 2 microseconds
    assert (words["bandwidth_gbit"]["value"], words["latency_us"]["value"]) == pytest.approx((40, 2))


def test_errors_are_relative_so_small_messages_tell_the_latency():
    large = [(2, 8e6, Estimate.exact(0.010)), (2, 16e6, Estimate.exact(0.024))]  # these two leave less than nothing
    small = (2, 100.0, Estimate.exact(2e-4))
    assert forecast.measure_link([*large, small], None, None).latency.value == pytest.approx(1e-4, rel=0.05)


def test_no_link_without_anything():
    assert forecast.measure_link([], None, None) is None
    assert forecast.measure_link([], None, 1e-6) is None


def test_small_messages_tell_the_latency_at_one_worker_count():
    both = points(2e9, 30e-6, (2,)) + points(2e9, 30e-6, (2,), volume=64)
    link = forecast.measure_link(both, None, None)
    assert link.bandwidth.value == pytest.approx(2e9, rel=1e-6)
    assert link.latency.value == pytest.approx(30e-6, rel=1e-6)


def model(weak=False, parallel=0.8, spread=0.0, workers=1, reduce=0.0):
    link = Link(Estimate.exact(1e9), Estimate.exact(0.0), "given")
    fixed, waited = Estimate.exact(0.02), Estimate.exact(reduce)
    return StepModel(workers, measured(parallel, spread), fixed, waited, 45e6, 256, link, weak)


def test_the_model_gives_back_what_it_was_made_from():
    # Two workers exchange for 45 ms, of which 30 ms hid behind the backward pass.
    assert model(workers=2, reduce=0.015).seconds(2).value == pytest.approx(0.8 + 0.02 + 0.015)
    # They waited 60 ms for each other: 15 ms beyond the bare exchange.
    assert model(workers=2, reduce=0.060).seconds(2).value == pytest.approx(0.8 + 0.02 + 0.060)


def test_less_hides_behind_a_shorter_backward_pass():
    four = model(workers=2, reduce=0.015).exchange(4).value
    assert four == pytest.approx(2 * 3 / 4 * 0.045 - 0.030 / 2)
    assert model(workers=2, reduce=0.015, weak=True).exchange(4).value == pytest.approx(2 * 3 / 4 * 0.045 - 0.030)


def test_waiting_beyond_the_bare_exchange_stays():
    assert model(workers=2, reduce=0.060).exchange(4).value == pytest.approx(2 * 3 / 4 * 0.045 + 0.015)


def test_a_step_is_of_strong_scaling_unless_it_says_so():
    step = model()
    assert not StepModel(
        step.workers, step.parallel, step.fixed, step.reduce, step.volume, step.samples, step.link
    ).weak


def test_forecast_of_a_strong_step():
    found, miss = forecast.forecast(model(), 1.0, [4], {}, shards=8)
    expected = 0.8 / 4 + 0.02 + 2 * 3 / 4 * 0.045
    assert found[0].rate == pytest.approx(256 / expected)
    assert found[0].share_reduce == pytest.approx(2 * 3 / 4 * 0.045 / expected)
    assert miss is None
    assert found[0].note == "not checked at any measured count"
    assert found[0].to_json()["measured"] is False


def test_forecast_of_a_weak_step_keeps_the_work_of_a_worker():
    found, _ = forecast.forecast(model(weak=True), 1.0, [4], {}, shards=8)
    assert found[0].rate == pytest.approx(4 * 256 / (0.8 + 0.02 + 2 * 3 / 4 * 0.045))


def test_forecast_is_widened_by_its_worst_miss():
    plain, _ = forecast.forecast(model(spread=0.01), 1.0, [8], {}, shards=8)
    true2 = model().rate(2).value
    wide, miss = forecast.forecast(model(spread=0.01), 1.0, [8], {2: true2 / 1.25}, shards=8)
    assert miss == pytest.approx(0.25)
    assert wide[0].low == pytest.approx(plain[0].low * 0.75)
    assert wide[0].high == pytest.approx(plain[0].high * 1.25)
    assert wide[0].low < wide[0].rate < wide[0].high


def test_forecast_beyond_the_shards_says_so():
    found, _ = forecast.forecast(model(), 2.0, [8, 16], {2: 1.0}, shards=8)
    assert found[0].note == ""
    assert "divisible by 16" in found[1].note
    assert [one.devices for one in found] == [16, 32]
