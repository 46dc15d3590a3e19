"""Start a run: in this process, in processes of this machine, or on Ray.

driver      from a configuration to a finished run: chooses where, follows every attempt, ends the run
job         WorkerJob: what the driver hands to its workers
worker      what every worker does, wherever it runs; saver: what rank 0 writes in the background
local, processes, on_ray/   the three places where workers run; only on_ray/ knows Ray
process_worker   what a process of `processes` does, as on_ray/train_worker for Ray
worker_fault     how the error of a worker in another process reaches the driver
"""
