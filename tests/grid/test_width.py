"""A grid's plan and tables on a terminal of 80 and of 100 columns."""

from __future__ import annotations

import hashlib

import pytest

from rayexp.cli import _grid_tables
from rayexp.grid.report import read_report

SHA = hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize("kind", ["images", "tokens"])
def test_tables_fit_and_no_cell_or_hash_is_broken(grids, terminal, kind):
    more = {"base": {"workload": "language_model", "data": {"name": "python_docs"}}} if kind == "tokens" else {}
    comparison = grids.plan(target={"val_loss": 1.5}, price_per_device_hour={"cpu": 0.04}, **more)
    report = read_report(grids.fill(comparison, grids.rates, spread=0.01, sha=SHA, kind=kind, energy=1234.5))
    _grid_tables.show(report)
    out = terminal()
    for cell in report.cells:
        assert out.count(f"\n {cell.cell.id} ") >= 3
    assert out.count(f"  {SHA[:8]}") >= len(report.cells)
    assert SHA[:9] not in out


def test_the_plan_fits(grids, terminal):
    comparison = grids.plan(precision=["fp32", "bf16"], scaling=[{"num_workers": n, "use_gpu": True} for n in (1, 8)])
    _grid_tables.show_plan(comparison.cells(), comparison.config())
    out = terminal()
    assert all(f"\n {cell.id} " in out for cell in comparison.cells())
    assert "1 GPU " in out
    assert "8 GPUs" in out
