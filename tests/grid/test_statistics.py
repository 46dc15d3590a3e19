"""The statistics of a device grid, against cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayexp.grid import statistics
from rayexp.grid.statistics import Estimate


def noisy(values, spread, seed=0):
    rng = np.random.default_rng(seed)
    return [v * (1 + spread * rng.standard_normal()) for v in values]


# ---------------------------------------------------------------------- estimates


def test_an_interval_is_student_s_on_the_logarithms():
    """Four runs; the quantile of t with 3 degrees of freedom, 3.1824, is from a table."""
    rates = [90.0, 100.0, 105.0, 110.0]
    logs = np.log(rates)
    reach = 3.182446 * logs.std(ddof=1) / 2
    estimate = Estimate.of(rates)
    assert estimate.value == pytest.approx(np.exp(logs.mean()))
    assert estimate.interval == pytest.approx((np.exp(logs.mean() - reach), np.exp(logs.mean() + reach)))
    assert estimate.to_json() == {"value": estimate.value, "low": estimate.interval[0], "high": estimate.interval[1]}


def test_one_run_has_no_interval_nor_has_what_is_made_of_it():
    lone, several = Estimate.of([100.0]), Estimate.of([90.0, 100.0])
    for estimate in (lone, lone.over(several), several.over(lone), lone.times(2), Estimate(1.0).over(lone)):
        assert estimate.interval is None
        assert estimate.to_json() == {"value": estimate.value, "low": None, "high": None}
    assert several.interval is not None


def test_a_ratio_is_welch_s():
    """Against scipy's own Welch interval for the difference of the logarithms."""
    from scipy.stats import ttest_ind

    a, b = [200.0, 210.0, 190.0, 205.0, 220.0], [100.0, 101.0, 99.0]
    found = ttest_ind(np.log(a), np.log(b), equal_var=False).confidence_interval(0.95)
    estimate = Estimate.of(a).over(Estimate.of(b))
    assert estimate.interval == pytest.approx((np.exp(found.low), np.exp(found.high)))
    assert estimate.value == pytest.approx(np.exp(np.log(a).mean() - np.log(b).mean()))


def test_a_number_that_is_given_adds_no_uncertainty():
    estimate = Estimate.of([200.0, 220.0, 190.0])
    assert estimate.over(Estimate(2.0)).interval == pytest.approx([end / 2 for end in estimate.interval])
    assert estimate.times(0.5).interval == pytest.approx([end / 2 for end in estimate.interval])
    assert Estimate(3.0).interval == (3.0, 3.0)


def test_runs_that_are_far_apart_reach_far_and_stay_numbers():
    low, high = Estimate.of([1e-9, 1e9]).bounds
    assert 0 <= low < 1e-50
    assert 1e50 < high < float("inf")


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
