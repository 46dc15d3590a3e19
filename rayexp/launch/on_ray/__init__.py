"""What knows Ray Train, by public names only.

session        join a running Ray or start one here, quietly
supervise      attempts, one after another, until the run is done
attempt        one attempt: a stock TorchTrainer from start to end
train_worker   what its workers do (imported by them)
reports        epochs and preemptions, between workers and Ray Train
rendezvous     the network interface that a worker process uses
remote_writer  the run writer on the driver's host, for workers that sit elsewhere
autoscale      machines that an autoscaler may add
head           whether that Ray still lives

Where the start goes, two workers on a cold local Ray: Python imports, in some ten processes. Ray starts a monitor, an
API server and a log monitor beside its GCS and raylet; each run has a controller, an actor through which its workers
agree, one that frees their places should the controller die, and the workers, each of which imports Ray Train, PyTorch
(in one phase: Ray sets up torch.distributed before training begins) and torchvision. run.json's `startup_seconds` has a
run's own figures. What can be left out by documented means is: the dashboard, metrics, task events, the preemption
watcher (session), and a poll of two seconds (attempt); the driver imports PyTorch and Ray Train while Ray starts.

Given up, because only private names reach it: the controller in the driver's own thread, no actors but the workers, no
monitors at all, workers that import PyTorch while they wait for each other.
"""
