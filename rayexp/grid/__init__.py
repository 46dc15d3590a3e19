"""The device grid: plan its cells, run them under Ray Tune, and say what follows from the measurements."""
