"""The machine beneath: clocks, cores, files, locks, processes, signals. Knows nothing of experiments."""
