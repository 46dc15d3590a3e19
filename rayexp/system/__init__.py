"""The operating system: clocks, cores, files, locks, processes, signals. Knows nothing about experiments."""
