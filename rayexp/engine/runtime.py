"""The device, threads and settings with which a worker computes, all pinned in one place (`configure`).

The bits of a result depend on what engine/fingerprint.py lists, not on the number of workers, nor on the number of
replicas that a worker runs side by side.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray

from rayexp.config import ExperimentConfig
from rayexp.engine import cpu, gpu
from rayexp.engine.settings import WORKSPACE, Settings, pin_models, pin_precision, set_threads
from rayexp.system import threads as sharing
from rayexp.system.cores import cores

STREAMS = 8
"""Replicas of a worker on a GPU; more small batches side by side gain nothing (measured on an H200)."""
T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """Where this worker computes. On a CPU, replicas compute shards side by side, each in a thread that has `threads`
    intra-op threads. What rounds is computed by `run` and `each`: beside replicas the calling thread has one thread.

    Attributes:
        device: cpu, or cuda:N.
        replicas: threads that compute side by side; 1 on a GPU.
        threads: intra-op threads of each of them.
        pool: these threads; None where there is one.
        before: the process's earlier settings, restored at the end of the context.
        streams: of a GPU, on which its replicas run side by side; none: its one replica runs on the present stream.
        static: whether a step works on tensors that stay in their place, so that a GPU can capture it.
    """

    device: torch.device
    replicas: int
    threads: int
    pool: ThreadPoolExecutor | None
    before: Settings
    streams: tuple[torch.cuda.Stream, ...] = ()
    static: bool = False
    _peaks: list[int] = field(default_factory=list)  # peaks of the GPU's memory before its books began anew

    @property
    def side_by_side(self) -> int:
        """How many replicas compute shards side by side."""
        return max(self.replicas, len(self.streams))

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()
        self.before.restore()

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Run tasks side by side, at most one for each replica; the first error is raised after all have ended."""
        if len(tasks) > 1 and self.streams:
            return gpu.side_by_side(self.streams, tasks)
        if self.pool is None:
            return [task() for task in tasks]
        futures = [self.pool.submit(task) for task in tasks]
        results = [f.exception() for f in futures]
        for error in results:
            if error is not None:
                raise error
        return [f.result() for f in futures]

    def each(self, work: Callable[[int], T]) -> list[T]:
        """`work(0)` to `work(replicas - 1)` side by side, as `run` does it. (On a GPU that is one call.)"""
        return self.run([functools.partial(work, replica) for replica in range(self.replicas)])

    def graph(
        self, work: Callable[[], object], generators: Iterable[torch.Generator], pool: Any
    ) -> Callable[[], object]:
        """`work` as a graph (see `gpu.Graph` for arguments and errors); on a CPU, where there are none, itself."""
        return gpu.Graph(work, generators, pool) if self.device.type == "cuda" else work

    def synchronize(self) -> None:
        """Wait for the GPU to finish, so that a clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def mark(self) -> Any:
        """The present moment: of a CPU its clock, of a GPU an event on the present stream."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self, mark: Any) -> None:
        """Wait until a moment has come."""
        if self.device.type == "cuda":
            mark.synchronize()

    def seconds(self, start: Any, stop: Any) -> float:
        """Seconds from one moment to another; both have come."""
        return float(start.elapsed_time(stop)) / 1000 if self.device.type == "cuda" else float(stop - start)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, which is there when a `mark` that is set now has come."""
        if self.device.type != "cuda":
            return tensor.clone()
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

    def has_bf16(self) -> bool:
        """Whether there are instructions for bfloat16; without them products are emulated, 13 to 28 times slower than
        float32 on an AVX2 processor. True where PyTorch does not tell."""
        if self.device.type == "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        known: Callable[[], Mapping[str, Any]] | None = getattr(torch.cpu, "get_capabilities", None)  # not in every 2.x
        return known is None or platform.machine() not in ("x86_64", "AMD64") or known().get("avx512_bf16") is not False

    def has_tf32(self) -> bool:
        """Whether the device computes products in TF32."""
        return self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0)

    def free_memory(self) -> int:
        """Bytes of the GPU's memory that nobody uses, when PyTorch has given back what it does not use at present."""
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def transient(self, work: Callable[[], T]) -> tuple[T, int]:
        """What `work` returns, and the bytes of the GPU's memory that it took meanwhile and gave back; 0 on a CPU. (The
        allocator's books are kept here, not on the GPU, which need not be waited for.)"""
        if self.device.type != "cuda":
            return work(), 0
        self._peaks.append(torch.cuda.max_memory_allocated(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)
        result = work()
        return result, torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)

    def peak_memory(self) -> dict[str, int]:
        """Peak memory of this process in bytes: `host` (resident set), and on a GPU `device` (PyTorch's allocator)."""
        import resource

        # Linux counts ru_maxrss in KiB, macOS in bytes.
        unit = 1 if platform.system() == "Darwin" else 1024
        peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
        if self.device.type == "cuda":
            peak["device"] = max([*self._peaks, torch.cuda.max_memory_allocated(self.device)])
        return peak

    def gpu_id(self) -> str | None:
        """The GPU's UUID as NVML has it; None on a CPU, and where PyTorch does not tell."""
        if self.device.type != "cuda":
            return None
        uuid = getattr(torch.cuda.get_device_properties(self.device), "uuid", None)
        return None if uuid is None else f"GPU-{uuid}"

    def energy(self) -> dict[str, float]:
        """Joules that this worker's GPU has used since its driver was loaded, by the GPU's id. Empty where NVML does
        not tell (it takes nvidia-ml-py, and a GPU of the Volta generation or later)."""
        uuid = self.gpu_id()
        if uuid is None:
            return {}
        try:
            import pynvml

            pynvml.nvmlInit()
            return {uuid: pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(uuid)) / 1000}
        except Exception:  # no library, no driver, no permission, no counter
            return {}


def cpu_capability() -> str:
    """The instruction set that PyTorch's kernels use here: DEFAULT, AVX2 or AVX512."""
    return str(torch.backends.cpu.get_cpu_capability())


def upload(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array on the device. To a GPU it is copied asynchronously from pinned memory."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def gpus() -> int:
    """Number of CUDA devices that PyTorch can use here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_names() -> list[str]:
    """Names of the CUDA devices."""
    return [torch.cuda.get_device_name(i) for i in range(gpus())]


def device(name: str, index: int = 0) -> torch.device:
    """`cpu`, or the `index`-th `cuda` device."""
    return torch.device("cuda", index) if name == "cuda" else torch.device("cpu")


def configure(
    config: ExperimentConfig,
    device: torch.device,
    shards: int,
    cpus: float | None = None,
    static: bool | None = None,
) -> Runtime:
    """Pin determinism, threads and the allocator of this process, and start the replicas' threads.

    The runtime is a context manager: at its end the threads are gone, and threads and determinism are set as before
    (the allocator goes on keeping freed memory).

    Args:
        config: precision, reduction and cpu_kernels decide what is pinned.
        device: where this worker computes.
        shards: shards that this worker computes in a step.
        cpus: cores that this worker may use; None: all of the process's.
        static: see `Runtime`; None: on a GPU.
    """
    before = Settings.now()
    # Makes cuBLAS deterministic; set over what is there, since another workspace may mean other kernels.
    os.environ[WORKSPACE] = ":4096:8"
    cpu.save_page_faults(config.cpu_kernels)
    # As torch.use_deterministic_algorithms, which would also tell a compiler: importing that takes seconds.
    torch.set_deterministic_debug_mode("error" if config.reduction == "exact" or device.type == "cpu" else "default")
    torch.backends.cudnn.benchmark = device.type == "cuda" and config.reduction == "ddp"
    pin_precision(tf32=config.precision == "tf32" and device.type == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_grad_enabled(True)
    pin_models()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
        torch.set_num_threads(1)
        streams = gpu.streams(device, replicas_of(config, shards, on_gpu=True))
        return Runtime(device, 1, 1, None, before, streams, static is not False)
    replicas = replicas_of(config, shards, cpus)
    threads = config.threads_per_shard or 1
    set_threads(threads if replicas == 1 else 1)
    pool = (
        ThreadPoolExecutor(replicas, "replica", initializer=set_threads, initargs=(threads,)) if replicas > 1 else None
    )
    return Runtime(device, replicas, threads, pool, before, static=bool(static))


def replicas_of(config: ExperimentConfig, shards: int, cpus: float | None = None, on_gpu: bool = False) -> int:
    """Number of replicas of a worker on a CPU or on a GPU (other arguments as for `configure`)."""
    if not on_gpu:
        fitting = sharing.replicas(_budget(cpus), config.threads_per_shard or 1, shards)
    elif config.reduction == "ddp":
        return 1  # one large batch keeps a GPU busy; several small ones do when they run side by side
    else:
        fitting = STREAMS
    return min(config.scaling.lanes or fitting, shards)


def _budget(cpus: float | None) -> int:
    return max(1, min(cores(), int(cpus) if cpus else cores()))
