"""The statistics of a device grid, against cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayexp.grid import statistics
from rayexp.grid.statistics import DRAWS, Estimate


def noisy(values, spread, seed=0):
    rng = np.random.default_rng(seed)
    return [v * (1 + spread * rng.standard_normal()) for v in values]


def measured(value, spread=0.0, seed=0):
    return Estimate(value, value * (1 + spread * np.random.default_rng(seed).standard_normal(DRAWS)))


# ---------------------------------------------------------------------- estimates


def of_counts(repeats):
    """Steps of 256 samples at these rates."""
    return [(np.full(len(rates), 256.0), 256 / np.asarray(rates)) for rates in repeats]


def test_throughput_and_its_interval_hold_the_truth():
    held = 0
    for trial in range(40):
        rng = np.random.default_rng(trial)
        seconds = [rng.gamma(4, 0.25, 25) for _ in range(3)]  # one second on average
        estimate = statistics.ratio([(np.full(25, 100.0), s) for s in seconds], seed=trial)
        assert estimate.value == pytest.approx(100 * 75 / np.concatenate(seconds).sum())
        low, high = estimate.interval
        held += low <= 100 <= high
    assert held >= 34  # nominally 38 of 40


def test_throughput_counts_the_steps_that_wait_for_all():
    """A loader of four processes hands over in bursts: three steps of 1 ms, then one of 97 ms."""
    seconds = np.tile([0.001, 0.001, 0.001, 0.097], 50)
    estimate = statistics.ratio([(np.full(200, 50.0), seconds)], seed=0)
    assert estimate.value == pytest.approx(2000)  # the median step would say 50,000
    low, high = estimate.interval
    assert low < 2000 < high < 5000


def test_throughput_sees_what_differs_from_run_to_run():
    steps = np.full(50, 1.0)
    alike = statistics.ratio(of_counts([steps * 100] * 3), seed=1)
    apart = statistics.ratio(of_counts([steps * 90, steps * 100, steps * 110]), seed=1)
    assert alike.interval == pytest.approx((100.0, 100.0))
    low, high = apart.interval
    assert low < 95
    assert high > 105


def test_long_repeats_are_summed_up_without_moving_the_answer():
    rng = np.random.default_rng(3)
    long = [(np.full(20_001, 8.0), rng.lognormal(3, 0.2, 20_001)) for _ in range(2)]
    estimate = statistics.ratio(long, seed=3)
    assert estimate.value == pytest.approx(sum(a.sum() for a, _ in long) / sum(b.sum() for _, b in long))
    low, high = estimate.interval
    assert low < estimate.value < high
    assert (high - low) / estimate.value < 0.05
    short = [(np.full(20, 8.0), np.full(20, 8.0)), long[0]]  # a repeat counts with its own number of steps
    assert np.median(statistics.ratio(short * 5, seed=3).draws) == pytest.approx(
        statistics.ratio(short, 3).value, rel=0.1
    )


def test_the_same_measurements_give_the_same_interval():
    rng = np.random.default_rng(5)
    repeats = of_counts([rng.lognormal(3, 0.2, 30) for _ in range(3)])
    assert statistics.ratio(repeats, seed=9).interval == statistics.ratio(repeats, seed=9).interval


def test_ratio_of_an_estimate_to_itself_is_one():
    estimate = measured(50.0, 0.1)
    ratio = estimate.over(estimate)
    assert ratio.value == 1
    assert ratio.interval == (1.0, 1.0)


def test_ratio_carries_both_uncertainties():
    a, b = measured(200.0, 0.05, seed=1), measured(100.0, 0.05, seed=2)
    low, high = a.over(b).interval
    assert low < 2 < high
    assert 0.2 < high - low < 0.8  # about 2 * 2 * 1.96 * 0.05 * sqrt(2) = 0.55


# ---------------------------------------------------------------------- speed-up


@given(st.floats(0, 1), st.integers(2, 1024))
def test_karp_flatt_inverts_amdahl(serial, p):
    speedup = 1 / (serial + (1 - serial) / p)
    assert statistics.karp_flatt(speedup, p) == pytest.approx(serial, abs=1e-9)


def test_karp_flatt_of_a_speedup_beyond_linear_is_negative():
    assert statistics.karp_flatt(2.2, 2) < 0


def amdahl(n, first=100.0, sigma=0.05):
    return first * n / (1 + sigma * (n - 1))


def usl(n, first=100.0, sigma=0.03, kappa=0.002):
    return first * n / (1 + sigma * (n - 1) + kappa * n * (n - 1))


def test_amdahl_is_recovered_with_an_interval_that_holds_it():
    counts = [n for n in (1, 2, 4, 8) for _ in range(3)]
    fit = statistics.fit_amdahl(counts, noisy([amdahl(n) for n in counts], 0.01))
    assert fit.refused is None
    value, low, high = fit.parameters["sigma"]
    assert low < 0.05 < high
    assert abs(value - 0.05) < 0.02
    assert fit.points == (12, 4)
    assert fit.rate(16) == pytest.approx(amdahl(16), rel=0.1)
    assert fit.peak is None


def test_a_rate_that_falls_from_the_first_device_on_peaks_at_one():
    parameters = {"rate1": (100.0, 90.0, 110.0), "sigma": (1.2, 1.1, 1.3), "kappa": (0.01, 0.005, 0.02)}
    assert statistics.ScalingFit("USL", statistics.USL, parameters, None, (8, 5)).peak == 1
    parameters["sigma"] = (0.03, 0.02, 0.04)
    assert statistics.ScalingFit("USL", statistics.USL, parameters, None, (8, 5)).peak == pytest.approx(
        (0.97 / 0.01) ** 0.5
    )


def test_usl_is_recovered_and_names_its_peak():
    counts = [n for n in (1, 2, 4, 8, 16, 32) for _ in range(3)]
    fit = statistics.fit_usl(counts, noisy([usl(n) for n in counts], 0.01))
    assert fit.refused is None
    for name, truth in (("sigma", 0.03), ("kappa", 0.002)):
        _, low, high = fit.parameters[name]
        assert low < truth < high
    assert fit.peak == pytest.approx(((1 - 0.03) / 0.002) ** 0.5, rel=0.15)


def test_perfect_points_fit_perfectly():
    counts = [1, 2, 4, 8]
    fit = statistics.fit_amdahl(counts, [amdahl(n, sigma=0.1) for n in counts])
    assert fit.refused is None
    assert fit.parameters["sigma"][0] == pytest.approx(0.1)
    assert fit.error == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("law", "counts"), [(statistics.fit_amdahl, [1, 2]), (statistics.fit_amdahl, [4]), (statistics.fit_usl, [1, 2, 4])]
)
def test_too_few_device_counts_are_refused_however_many_repeats(law, counts):
    points = [n for n in counts for _ in range(10)]
    fit = law(points, noisy([amdahl(n) for n in points], 0.01))
    assert "device counts" in fit.refused
    assert not fit.parameters
    assert fit.to_json()["refused"] == fit.refused


def test_more_than_linear_is_refused_by_amdahl():
    counts = [n for n in (1, 2, 4, 8) for _ in range(3)]
    fit = statistics.fit_amdahl(counts, noisy([100 * n**1.2 for n in counts], 0.01))
    assert "more than linear" in fit.refused


def test_a_rate_that_falls_is_refused_by_amdahl():
    counts = [n for n in (1, 2, 4, 8) for _ in range(3)]
    fit = statistics.fit_amdahl(counts, noisy([100 / n**0.15 for n in counts], 0.01))
    assert fit.refused


def test_points_that_leave_the_serial_fraction_open_are_refused():
    rng = np.random.default_rng(2)
    counts = [1, 2, 3]
    fits = [statistics.fit_amdahl(counts, list(100 * rng.uniform(0.7, 2, 3))) for _ in range(20)]
    assert sum(fit.refused is not None for fit in fits) >= 15


def test_usl_without_growing_loss_is_refused():
    counts = [n for n in (1, 2, 4, 8, 16) for _ in range(3)]
    fit = statistics.fit_usl(counts, [usl(n, sigma=0.1, kappa=-0.002) for n in counts])
    assert "kappa" in fit.refused


def test_a_serial_fraction_that_is_open_to_one_side_only_is_fitted():
    counts = [1, 2, 4, 8] * 2
    rates = [amdahl(n, sigma=0.97) * (1.015 if i % 3 else 0.98) for i, n in enumerate(counts)]
    fit = statistics.fit_amdahl(counts, rates)
    assert fit.refused is None
    _, low, high = fit.parameters["sigma"]
    assert 0 < low < 1 < high


def test_the_error_of_a_fit_is_that_of_its_points():
    counts = [1, 2, 4, 8] * 2
    rates = [amdahl(n) * (1.02 if i < 4 else 0.98) for i, n in enumerate(counts)]
    fit = statistics.fit_amdahl(counts, rates)
    misses = [fit.rate(n) / rate - 1 for n, rate in zip(counts, rates, strict=True)]
    assert fit.error == pytest.approx(np.sqrt(np.mean(np.square(misses))))
    assert 0.01 < fit.error < 0.03
