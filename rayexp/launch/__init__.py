"""Where a run runs: in this process, in processes of this machine, on Ray. The only rooms that may know Ray.

worker     what every worker does, wherever it runs (no Ray)
processes  workers as processes of this machine, without Ray
train      the driver: from a configuration to a finished run
"""
