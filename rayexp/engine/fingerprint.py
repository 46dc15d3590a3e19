"""What the bits of a result depend on besides the configuration: the device, versions, and what libraries choose by.

Libraries choose a kernel by the processor's instructions (PyTorch, oneDNN, MKL), its maker (MKL), the sizes of its
caches (oneDNN's blocks), and variables of the environment that narrow the choice. The probe shows what no name tells:
it is a hash of small fixed operations of every kind that training uses.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayexp.engine.runtime import Runtime, cpu_capability

# Instructions that change what a kernel adds in which order, or rounds.
_INSTRUCTIONS = re.compile(r"avx|amx|fma|f16c|sse4|asimd|sve|sme(?!p)|bf16|i8mm")
# Variables by which kernels are chosen. (What ATEN_CPU_CAPABILITY comes to is in `device`.)
_CHOICES = (
    re.compile(r"(ONEDNN|DNNL)_(MAX_CPU_ISA|CPU_ISA_HINTS|DEFAULT_FPMATH_MODE)"),
    re.compile(r"MKL_(ENABLE_INSTRUCTIONS|CBWR|DEBUG_CPU_TYPE)|OPENBLAS_CORETYPE|NPY_(DIS|EN)ABLE_CPU_FEATURES"),
)
# Several threads may become fewer by these.
_THREAD_CHOICES = re.compile(r"OMP_(THREAD_LIMIT|DYNAMIC)")
_GPU_CHOICES = re.compile(
    r"NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|CUBLASLT_\w+|CUDNN_\w*HEUR\w*"
    r"|PYTORCH_SUM_INNER_TREE|TORCH_DISABLE_NATIVE_JIT"  # whether PyTorch takes kernels that it makes from Python
)


def fingerprint(runtime: Runtime) -> dict[str, Any]:
    """What the bits depend on, as plain values by name; runs the probe, which takes some milliseconds."""
    cuda = runtime.device.type == "cuda"
    choices = [*_CHOICES, *([_GPU_CHOICES] * cuda), *([_THREAD_CHOICES] * (runtime.threads > 1))]
    variables = {k: v for k, v in sorted(os.environ.items()) if any(choice.fullmatch(k) for choice in choices)}
    return {
        "device": _gpu(runtime.device) if cuda else f"cpu {platform.machine()} {cpu_capability()}",
        # A GPU computes the same whatever processor feeds it.
        "cpu": None if cuda else processor(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": (torch.version.cuda or f"ROCm {torch.version.hip}") if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,  # type: ignore[no-untyped-call]
        "libraries": _libraries(),
        "threads_per_lane": runtime.threads,
        "environment": " ".join(f"{name}={value}" for name, value in variables.items()) or None,
        "probe": runtime.run([lambda: probe(runtime.device)])[0],
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Where `other` differs from `one`, each as "name other's value, not one's value". Names that only one of them has
    are left out, since an older version of rayexp wrote fewer; so is what only a CPU or only a GPU has where one stands
    beside the other; and the probe where something with a name differs: it shows no more than that it matters."""
    found = {name for name in one.keys() & other.keys() if one[name] != other[name]}
    if (one.get("cuda") is None) != (other.get("cuda") is None):
        found -= {"cpu", "cuda", "cudnn"}
    named = found - {"probe"} or found
    pairs = [(name, one[name], other[name]) for name in other if name in named]
    return [f"{name} {_shown(theirs, mine)}, not {_shown(mine, theirs)}" for name, mine, theirs in pairs]


def _shown(value: Any, beside: Any) -> str:
    """A value; of two long ones only the words that `beside` lacks."""
    if value is None:
        return "unset"
    parts, others = str(value).split(), str(beside).split()
    if len(parts) <= 4:
        return str(value)
    return " ".join(part for part in parts if part not in others) or "without these"


def processor(info: Path = Path("/proc/cpuinfo"), caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> str:
    """The processor's maker, caches and instructions by which libraries choose kernels, in one line. What the machine
    does not report is missing."""
    try:
        lines = [line.partition(":")[::2] for line in info.read_text().partition("\n\n")[0].splitlines()]
    except OSError:
        return platform.processor()
    fields = {name.strip(): value.strip() for name, value in lines}
    maker = fields.get("vendor_id") or fields.get("CPU implementer", "")
    flags = (fields.get("flags") or fields.get("Features", "")).split()
    found = []
    for index in sorted(caches.glob("index*")):
        level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level}={size}")
    return " ".join([maker, *found, *sorted(flag for flag in flags if _INSTRUCTIONS.match(flag))]).strip()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "?"


def _gpu(device: torch.device) -> str:
    is_ = torch.cuda.get_device_properties(device)
    return f"{is_.name}, {is_.multi_processor_count} multiprocessors, compute {is_.major}.{is_.minor}"


def _libraries() -> str:
    """The C library, whose cosine and logarithm enter learning rates, and a hash of PyTorch's build settings."""
    built = [line for line in torch.__config__.show().splitlines() if "CPU capability" not in line]
    return f"{'-'.join(platform.libc_ver())} {hashlib.sha256(chr(10).join(built).encode()).hexdigest()[:12]}"


# ---------------------------------------------------------------------- probe


def probe(device: torch.device) -> str:
    """A hash of the results of some small operations here, forward and backward. Draws no random number."""
    digest = hashlib.sha256()
    for result in _results(device):
        digest.update(result.detach().float().cpu().contiguous().numpy().tobytes())
    digest.update(repr([f(x / 7) for f in _FUNCTIONS for x in range(1, 50)]).encode())
    return digest.hexdigest()[:12]


_FUNCTIONS: Sequence[Callable[[float], float]] = (math.cos, math.exp, math.log, math.sqrt)


def _results(device: torch.device) -> Iterator[Tensor]:
    with torch.enable_grad():
        x, weight = _values(device, 2, 64, 6, 6), _values(device, 64, 64, 3, 3)
        scale, shift = _values(device, 64), _values(device, 64)
        leaves = [x, weight, scale, shift]
        y = F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, padding=1)
        mean, var = torch.zeros(64, device=device), torch.ones(64, device=device)
        y = F.batch_norm(y, mean, var, scale, shift, training=True).relu()
        yield from (y, mean, var, *torch.autograd.grad(y.square().sum(), leaves))

        rows, matrix = _values(device, 24, 200), _values(device, 120, 200)
        z = F.linear(rows, matrix, _values(device, 120)) / 8  # close to each other, so that every term of a sum counts
        loss = F.cross_entropy(z, torch.arange(24, device=device), reduction="sum")
        yield from (z, F.softmax(z, 1), loss, *torch.autograd.grad(loss, [rows, matrix], retain_graph=True))
        yield from (F.layer_norm(z, (120,)), F.rms_norm(z, (120,)), z.sum(), z.mean(1))
        yield from (f(z) for f in (torch.exp, torch.tanh, torch.sigmoid, torch.erf, F.silu))
        heads = z.view(2, 3, 8, 60)
        yield F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        if device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False):
            yield (rows.bfloat16() @ matrix.bfloat16().t()).float()

        with torch.no_grad():
            layer = nn.LSTM(40, 40, device="meta").to_empty(device=device)
            for parameter in layer.parameters():
                parameter.copy_(_values(device, *parameter.shape) / 8)
            yield layer(_values(device, 5, 4, 40))[0]


def _values(device: torch.device, *shape: int) -> Tensor:
    """Numbers in [-1, 1) that are the same on every machine: multiples of 2^-15."""
    steps = torch.arange(math.prod(shape), dtype=torch.int64) * 40503 % 65536
    return ((steps - 32768).float() / 32768).view(shape).to(device).requires_grad_()
