"""PyTorch's global settings in this process: what training pins, and what a program may have set for itself before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_BACKENDS: Any = torch.backends
# Where PyTorch keeps the precision of float32 products, the general before the particular, which it overwrites.
HOLDERS = (
    _BACKENDS,
    _BACKENDS.cudnn,
    _BACKENDS.mkldnn,
    _BACKENDS.cuda.matmul,
    _BACKENDS.cudnn.conv,
    _BACKENDS.cudnn.rnn,
    _BACKENDS.mkldnn.matmul,
    _BACKENDS.mkldnn.conv,
    _BACKENDS.mkldnn.rnn,
)


@dataclass(frozen=True)
class Settings:
    """The settings of a process that training changes, or that a model of the user's may change.

    The number of inter-op threads is none of them: PyTorch lets it be set once in the life of a process, and nothing
    here sets it.
    """

    threads: int
    deterministic: int
    fill: bool
    cudnn: tuple[bool, bool]
    precision: tuple[str, ...]
    matmul: str | None
    tf32: bool | None
    dtype: torch.dtype
    default_device: torch.device
    gradients: bool
    random: Tensor
    cuda_random: tuple[Tensor, ...]
    workspace: str | None
    device: int | None

    @classmethod
    def now(cls) -> Settings:
        """Those of this moment."""
        cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return cls(
            threads=torch.get_num_threads(),
            deterministic=torch.get_deterministic_debug_mode(),
            fill=torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
            cudnn=(torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
            precision=tuple(holder.fp32_precision for holder in HOLDERS),
            matmul=_readable(torch.get_float32_matmul_precision),
            tf32=_readable(lambda: torch.backends.cudnn.allow_tf32),
            dtype=torch.get_default_dtype(),
            default_device=torch.get_default_device(),
            gradients=torch.is_grad_enabled(),
            random=torch.get_rng_state(),
            cuda_random=tuple(torch.cuda.get_rng_state_all()) if cuda else (),
            workspace=os.environ.get(WORKSPACE),
            device=torch.cuda.current_device() if cuda else None,
        )

    def restore(self) -> None:
        """Set them again."""
        set_threads(self.threads)
        torch.set_deterministic_debug_mode(self.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = self.fill  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = self.cudnn
        if self.matmul is not None:
            torch.set_float32_matmul_precision(self.matmul)
        if self.tf32 is not None:
            torch.backends.cudnn.allow_tf32 = self.tf32
        for holder, precision in zip(HOLDERS, self.precision, strict=True):
            holder.fp32_precision = precision
        torch.set_default_dtype(self.dtype)
        if torch.get_default_device() != self.default_device:
            torch.set_default_device(self.default_device)
        torch.set_grad_enabled(self.gradients)
        torch.set_rng_state(self.random)
        if self.cuda_random:
            torch.cuda.set_rng_state_all(list(self.cuda_random))
        if self.workspace is None:
            os.environ.pop(WORKSPACE, None)
        else:
            os.environ[WORKSPACE] = self.workspace
        if self.device is not None:
            torch.cuda.set_device(self.device)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Restore the present settings after the block."""
    before = Settings.now()
    try:
        yield
    finally:
        before.restore()


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute with so many intra-op threads inside the block."""
    before = torch.get_num_threads()
    set_threads(number)
    try:
        yield
    finally:
        set_threads(before)


def set_threads(threads: int) -> None:
    """Set the number of intra-op threads of the calling thread.

    Every thread that computes beside replicas takes one: once GNU OpenMP has more threads than there are cores, all of
    them sleep at every barrier from then on.
    """
    torch.get_num_threads()  # otherwise the thread's first operation would set the number of the latest caller
    torch.set_num_threads(threads)


def pin_models() -> None:
    """Make models as float32 on the CPU."""
    torch.set_default_dtype(torch.float32)
    if torch.get_default_device().type != "cpu":
        torch.set_default_device("cpu")


@contextlib.contextmanager
def models() -> Iterator[None]:
    """`pin_models` inside the block. (No other setting is touched: another thread may be training.)"""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    pin_models()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)


def pin_precision(tf32: bool) -> None:
    """Compute float32 products in TF32 where the hardware has it, or in float32 throughout."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    for holder in HOLDERS:
        holder.fp32_precision = "tf32" if tf32 else "ieee"
    torch.backends.cudnn.allow_tf32 = tf32


def _readable(read: Callable[[], T]) -> T | None:
    """One of the older settings beside those of HOLDERS; None where the two contradict each other, which PyTorch
    refuses to read."""
    try:
        return read()
    except RuntimeError:
        return None
