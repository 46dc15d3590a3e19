"""The only rooms that import Ray.

drive    attempts, one after another, until the run is done
session  join a running Ray or start one here, quietly
fit      one attempt: a TorchTrainer from start to end
meeting  where its workers meet (imported by the controller)
member   what a worker of Ray Train does (imported by the workers)
pen      the recorder, held on the driver's host for workers that sit elsewhere
"""
