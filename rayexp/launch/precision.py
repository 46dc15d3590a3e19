"""What `precision: auto` comes to. The workers decide it together once a run, because they alone know their devices."""

from __future__ import annotations

from rayexp.config import ExperimentConfig
from rayexp.engine.group import WorkerGroup
from rayexp.engine.runtime import Runtime
from rayexp.launch.job import WorkerJob
from rayexp.runs.writer import RunWriter


def decided(job: WorkerJob, group: WorkerGroup, writer: RunWriter, runtime: Runtime) -> WorkerJob:
    """The job with the precision in which the run trains: bf16 if every worker has a GPU that computes in it, else
    fp32, unless an earlier attempt has decided otherwise, maybe on other devices.

    Every worker must call it; rank 0 puts the decision into the run's config.yaml.
    """
    if job.config.precision != "auto":
        return job
    capable = runtime.device.type == "cuda" and runtime.has_bf16()
    everyone = group.gather(b"bf16" if capable else b"fp32")
    found = "bf16" if all(one == b"bf16" for one in everyone) else "fp32"
    kept = group.broadcast(writer.decide("precision", found).encode() if group.rank == 0 else None).decode()
    return job.model_copy(update={"config": job.config.model_copy(update={"precision": kept})})


def lacking(config: ExperimentConfig, runtime: Runtime) -> list[str]:
    """A line where this worker's device does not compute in the precision that the configuration names."""
    on_gpu = runtime.device.type == "cuda"
    if config.precision == "bf16" and not runtime.has_bf16():
        what = "GPU" if on_gpu else "processor"
        return [f"precision: this {what} has no instructions for bf16; fp32 is many times as fast here"]
    if config.precision == "tf32" and on_gpu and not runtime.has_tf32():
        return ["precision: this GPU has no TF32 (compute capability 8.0 and above have it): it is fp32 here"]
    return []
