"""The only rooms that import Ray.

drive      attempts, one after another, until the run is done
session    join a running Ray or start one here, quietly
autoscale  machines that an autoscaler may add
fit        one attempt: a TorchTrainer from start to end
meeting    where its workers meet (imported by the controller)
member     what a worker of Ray Train does (imported by the workers)
pen        the recorder, held on the driver's host for workers that sit elsewhere

Where the start goes (two workers on a cold local Ray, seconds of a core; on two cores half of it can be seen):
    driver 2.7 (PyTorch and Ray Train are imported while Ray starts)
    Ray itself 3.0 (GCS, raylet, dashboard and its agents, monitors)
    Ray Train 3.5 (controller 1.3, autoscaling coordinator 1.1, synchronisation actor 1.1)
    workers 2 x 4.3 (Ray 0.3, Ray Train 0.7, PyTorch 1.0, torchvision 1.0, which imports torch._dynamo; model and step)
What Ray Train would do besides, and does not here: import PyTorch in the controller and then in each worker one phase
after another (meeting), start a manager for Ray Data's datasets and a cleaner (fit), prestart processes that no worker
can use because of its environment (session), wait up to two seconds for every poll (fit).
"""
