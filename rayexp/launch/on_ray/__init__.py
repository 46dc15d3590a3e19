"""The only rooms that import Ray.

session  join a running Ray or start one here, quietly
fit      one attempt: a TorchTrainer from start to end
member   what a worker of Ray Train does (imported by the workers)
pen      the recorder, held on the driver's host for workers that sit elsewhere
"""
