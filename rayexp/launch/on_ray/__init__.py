"""The only rooms that import Ray.

head       whether that Ray still lives
drive      attempts, one after another, until the run is done
session    join a running Ray or start one here, quietly
autoscale  machines that an autoscaler may add
fit        one attempt: a TorchTrainer from start to end
meeting    where its workers meet
member     what a worker of Ray Train does (imported by the workers)
pen        the recorder, held on the driver's host for workers that sit elsewhere

Where the start goes (two workers on a cold local Ray, seconds of a core; on two cores half of it can be seen):
    driver 2.7 (PyTorch and Ray Train are imported while Ray starts)
    Ray itself 1.5 (GCS, raylet and its agents)
    workers 2 x 4.3 (Ray 0.3, Ray Train 0.7, PyTorch 1.0, torchvision 1.0, which imports torch._dynamo; model and step)
What Ray would do besides, and does not here: start monitors and a dashboard for one run (session); start processes for
the controller, the workers' agreement on reports, Ray Data's datasets, a cleaner and a coordinator (fit: 3.5 s of a
core); import PyTorch in one worker phase after another (meeting), prestart processes that no worker can use because of
its environment (session), wait up to two seconds for every poll (fit).
"""
