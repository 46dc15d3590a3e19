"""Trackers: where a run can be followed while it trains (see tracker.py)."""
