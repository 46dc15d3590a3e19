"""Runs Python on an emulated GPU, to see on any machine whether what is written for CUDA computes what it should.

    python tests/emulator/run.py -m pytest -m gpu tests/engine/test_gpu.py
    python tests/emulator/run.py -m rayexp train configs/quickstart.yaml epochs=1 data.max_train_samples=64

PyTorch's own CUDA code runs: its allocator, streams, events, pinned memory, captures, graphs and generators. Below it
stand runtime.cpp and its kin in the place of NVIDIA's runtime, and operations.cpp in that of the kernels: they compute
what the CPU's do, as late as CUDA allows, and in any order that it allows (EMULATOR_SEED chooses one; EMULATOR_MIB is
the size of the memory). What forgets to wait, takes a value along in a graph, or does what a capture forbids shows at
once. Of every operation CUDA's own code is asked first, without its kernels: so it says what has no deterministic one,
and what waits. Speed, the rounding of NVIDIA's kernels, torch.compile and NCCL are not to be seen here.

It takes g++, and the headers of a CUDA toolkit of the major version of which this PyTorch is made.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def toolkit(major: str) -> Path | None:
    """The headers of a CUDA toolkit of this major version."""
    for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", f"/usr/local/cuda-{major}"):
        header = Path(folder or "/", "include", "cuda_runtime_api.h")
        if header.exists() and f"#define CUDART_VERSION  {major}0" in header.read_text(errors="replace"):
            return header.parent
    return None


def lacking() -> str | None:
    """What this machine has not; None where nothing is missing."""
    if torch.version.cuda is None:
        return "a PyTorch that is made for CUDA"
    if shutil.which("g++") is None:
        return "g++"
    major = torch.version.cuda.split(".")[0]
    return None if toolkit(major) else f"the headers of CUDA {major} (CUDA_HOME)"


def build(into: Path) -> None:
    """Compile what is not there yet, or older than its source."""
    into.mkdir(parents=True, exist_ok=True)
    home = Path(torch.__file__).parent
    include, cuda = home / "include", toolkit(str(torch.version.cuda).split(".")[0])
    headers = [include, include / "torch" / "csrc" / "api" / "include", cuda, sysconfig.get_paths()["include"]]
    libraries = ["c10", "c10_cuda", "torch", "torch_cpu", "torch_cuda", "torch_python"]
    runtime = ["runtime.h", "runtime.cpp", "graphs.cpp", "device.cpp"]
    linked = {
        "runtime": (runtime, ["-Wl,-soname,libcuda.so.1"]),  # where PyTorch looks for the driver
        "operations": (["operations.cpp"], [f"-L{home / 'lib'}", *(f"-l{name}" for name in libraries)]),
    }
    for name, (sources, options) in linked.items():
        built, making = into / f"emulator_{name}.so", into / f"{name}.{os.getpid()}"
        if built.exists() and built.stat().st_mtime > max((HERE / source).stat().st_mtime for source in sources):
            continue
        command = ["g++", "-O1", "-fPIC", "-shared", "-std=c++20", *(f"-I{path}" for path in headers)]
        command += [str(HERE / source) for source in sources if source.endswith(".cpp")]
        command += ["-DTORCH_EXTENSION_NAME=emulator_operations", *options, "-o", str(making)]
        subprocess.run(command, check=True)
        making.replace(built)


def main() -> None:
    """Become the process that was asked for."""
    if missing := lacking():
        sys.exit(f"the emulated GPU needs {missing}")
    built = HERE / "build" / f"torch-{torch.__version__}-{sys.implementation.cache_tag}"
    build(built)
    paths = [str(HERE), str(built), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        "LD_PRELOAD": str(built / "emulator_runtime.so"),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        # Bits depend on the number of threads, and a graph is replayed by whoever waits for it.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], env)


if __name__ == "__main__":
    main()
