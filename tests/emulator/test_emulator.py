"""The tests for a GPU on the emulated one, and what the emulation itself promises."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
RUN = HERE / "run.py"


def emulated() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_name() == "emulated"


inside = [pytest.mark.gpu, pytest.mark.skipif(not emulated(), reason="inside of run.py")]


@pytest.fixture(scope="session")
def python() -> list[str]:
    """What runs Python on it."""
    if emulated():
        pytest.skip("this is the emulated GPU already")
    command = [sys.executable, str(RUN)]
    built = subprocess.run([*command, "-c", ""], capture_output=True, text=True)
    if "the emulated GPU needs" in built.stderr:
        pytest.skip(built.stderr.strip())
    assert built.returncode == 0, built.stderr
    return command


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_tests_for_a_gpu(python: list[str]) -> None:
    """With a seed that found a feeder that does not wait for its memory. What ran before in a process counts, too."""
    tests = [str(HERE.parent / "engine" / "test_gpu.py"), str(HERE)]
    done = subprocess.run(
        [*python, "-m", "pytest", "-q", "-n", "2", "-m", "gpu", "-p", "no:cacheprovider", *tests],
        capture_output=True,
        text=True,
        env={**os.environ, "EMULATOR_SEED": "3"},
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    assert " skipped" not in done.stdout.splitlines()[-1], done.stdout[-20_000:]


def cuda(*shape: int) -> Tensor:
    return torch.rand(*shape, device="cuda", requires_grad=True)


def backward(y: Tensor) -> None:
    y.sum().backward()  # type: ignore[no-untyped-call]


def rows() -> Tensor:
    return torch.tensor([0, 1, 0], device="cuda")


REFUSED: dict[str, Callable[[], object]] = {
    "adaptive average": lambda: backward(F.adaptive_avg_pool2d(cuda(1, 2, 5, 5), 3)),
    "adaptive maximum": lambda: backward(F.adaptive_max_pool2d(cuda(1, 2, 5, 5), 3)),
    "bicubic": lambda: backward(F.interpolate(cuda(1, 2, 5, 5), scale_factor=2, mode="bicubic")),
    "reflection": lambda: backward(F.pad(cuda(1, 2, 5), (1, 1), mode="reflect")),
    "cross entropy of maps": lambda: F.cross_entropy(cuda(1, 3, 2, 2), torch.zeros(1, 2, 2).long().cuda()),
    "put": lambda: torch.zeros(4, device="cuda").put_(rows(), torch.ones(3, device="cuda"), accumulate=True),
    "histogram": lambda: torch.histc(cuda(5).detach()),
    "weighted counts": lambda: torch.bincount(rows(), weights=cuda(3).detach()),
    "median and where": lambda: cuda(3, 4).detach().median(1),
    "product by index": lambda: cuda(4).detach().scatter_reduce(0, rows(), cuda(3).detach(), "prod"),
}
ALLOWED: dict[str, Callable[[], object]] = {
    "average to one": lambda: backward(F.adaptive_avg_pool2d(cuda(1, 2, 5, 5), 1)),
    "maximum": lambda: backward(F.max_pool2d(cuda(1, 2, 6, 6), 3, 2, 1)),
    "bilinear": lambda: backward(F.interpolate(cuda(1, 2, 5, 5), scale_factor=2, mode="bilinear")),
    "replication": lambda: backward(F.pad(cuda(1, 2, 5), (1, 1), mode="replicate")),
    "cross entropy": lambda: backward(F.cross_entropy(cuda(3, 4), rows())),
    "rows": lambda: backward(cuda(4, 3)[rows()]),
    "embedding": lambda: backward(F.embedding(rows(), cuda(4, 3))),
    "cumulated": lambda: backward(cuda(4, 3).cumsum(0)),
    "counts": lambda: torch.bincount(rows()),
    "median": lambda: cuda(3, 4).detach().median(),
    "sum by index": lambda: cuda(4).detach().scatter_reduce(0, rows(), cuda(3).detach(), "sum"),
}


class TestEmulated:
    """What it promises, on itself."""

    pytestmark = inside
    gpu = torch.device("cuda", 0)

    @pytest.fixture(autouse=True)
    def seeded(self) -> Iterator[None]:
        torch.manual_seed(0)
        yield
        torch.cuda.synchronize()

    @pytest.fixture
    def deterministic(self) -> Iterator[None]:
        torch.set_deterministic_debug_mode("error")
        yield
        torch.set_deterministic_debug_mode("default")

    @pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda kind: kind.__name__)
    def test_recurrent_layers_have_the_cpu_s_numbers(self, make: type[nn.RNNBase]) -> None:
        layers = make(8, 6, 2)
        agree(layers, torch.randn(5, 3, 8), lambda y: y[0].sin().sum() + torch.cat([*y[1]]).cos().sum())

    def test_other_layers_have_them(self) -> None:
        image = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        agree(image, torch.randn(4, 3, 10, 10), lambda y: y.sin().sum())
        agree(nn.Sequential(nn.RMSNorm(8), nn.LayerNorm(8)), torch.randn(4, 5, 8), lambda y: y.sin().sum())

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_attention_has_them(self, causal: bool, dtype: torch.dtype) -> None:
        heads = torch.randn(3, 2, 3, 6, 8).to(dtype)

        def found(heads: Tensor) -> list[Tensor]:
            leaf = heads.clone().requires_grad_()
            y = F.scaled_dot_product_attention(*leaf, is_causal=causal)
            (gradient,) = torch.autograd.grad(y.float().sin().sum(), leaf)
            return [y.detach().float().cpu(), gradient.float().cpu()]

        torch.testing.assert_close(found(heads.to(self.gpu)), found(heads.float()), rtol=0.02, atol=0.02)

    def test_what_is_read_too_early_is_old(self) -> None:
        here = torch.zeros(3, pin_memory=True)
        here.copy_(torch.ones(3, device=self.gpu), non_blocking=True)
        assert here.tolist() == [0, 0, 0]
        torch.cuda.synchronize()
        assert here.tolist() == [1, 1, 1]

    def test_what_waits_for_nothing_is_done_in_any_order(self) -> None:
        """Two streams that add to one tensor and multiply it."""

        def found(waits: bool) -> float:
            value, streams = torch.zeros((), device=self.gpu), [torch.cuda.Stream(), torch.cuda.Stream()]
            torch.cuda.synchronize()
            for stream, work in zip(streams, (lambda: value.add_(1), lambda: value.mul_(2)), strict=True):
                if waits:
                    stream.wait_stream(streams[0])
                with torch.cuda.stream(stream):
                    work()
            for stream in reversed(streams):
                stream.synchronize()
            return float(value)

        # Which order it is, is drawn: a hundred times, as what other tests have drawn before is not known.
        assert {found(waits=True) for _ in range(100)} == {2}
        assert {found(waits=False) for _ in range(100)} == {1, 2}

    def test_a_graph_does_again_what_was_launched(self) -> None:
        """With the values of then, and the tensors' and generators' of now."""
        rate, total, draws = (torch.zeros((), device=self.gpu) for _ in range(3))
        generator, factor = torch.Generator(self.gpu), 2

        def work() -> None:
            total.add_(rate * factor)
            draws.copy_(torch.empty((), device=self.gpu).uniform_(generator=generator))

        graph = torch.cuda.CUDAGraph()
        if torch.__version__ < "2.14":
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            work()
        assert total.item() == 0, "a capture does nothing"
        factor, found = 100, []
        for seed, present in ((1, 1.0), (2, 10.0), (1, 100.0)):
            rate.fill_(present)
            generator.manual_seed(seed)
            graph.replay()
            found.append(draws.item())
        assert total.item() == 222
        assert found[0] == found[2] != found[1]

    @pytest.mark.parametrize("seed", range(5))
    def test_branches_of_a_graph_go_on_by_themselves(self, seed: int) -> None:
        one, two = torch.zeros((), device=self.gpu), torch.zeros((), device=self.gpu)
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                one.add_(1)
                one.mul_(3)
            two.add_(2)
            torch.cuda.current_stream().wait_stream(side)
            two.add_(one)
        graph.replay()
        graph.replay()
        assert (one.item(), two.item()) == (12, 2 + 3 + 2 + 12)

    @pytest.mark.parametrize(
        ("work", "why"),
        [
            (lambda x: x.sum().item(), "captur"),
            (lambda x: x.cpu(), "captur"),
            (lambda x: torch.cuda.synchronize(), "captur"),
            (lambda x: x[x > 0], "captur"),
        ],
        ids=["item", "cpu", "synchronize", "mask"],
    )
    def test_a_capture_forbids_waiting(self, work: Callable[[Tensor], object], why: str) -> None:
        x = torch.ones(3, device=self.gpu)
        with pytest.raises(RuntimeError, match=why), torch.cuda.graph(torch.cuda.CUDAGraph()):
            work(x)

    def test_a_branch_of_a_capture_is_waited_for(self) -> None:
        x, side = torch.ones(3, device=self.gpu), torch.cuda.Stream()

        def capture() -> None:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    x.add_(1)

        with pytest.raises(RuntimeError, match="unjoined"):
            capture()

    @pytest.mark.parametrize("name", [*REFUSED, *ALLOWED])
    def test_what_has_no_deterministic_kernel_says_so_as_on_a_gpu(self, name: str, deterministic: None) -> None:
        """By PyTorch's own code: what its documentation lists, and under the same conditions."""
        if name in REFUSED:
            with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
                REFUSED[name]()
        else:
            ALLOWED[name]()
        torch.set_deterministic_debug_mode("default")
        (REFUSED | ALLOWED)[name]()

    def test_that_pytorch_s_code_is_asked_changes_nothing(self, deterministic: None) -> None:
        """It runs on the tensors themselves, without the kernels."""

        def found(device: str) -> list[Tensor]:
            x, at = torch.arange(12.0, device=device).view(4, 3), torch.tensor([1, 1, 3], device=device)
            ones, place = torch.ones(3, 3, device=device), at[:, None].expand(3, 3)
            return [
                x.clone().index_add_(0, at, ones),
                x.clone().index_put_((at,), ones, accumulate=True),
                x.clone().scatter_add_(0, place, ones),
                x.clone().index_copy_(0, torch.tensor([0, 2, 3], device=device), ones),
                x.clone().cumsum_(0).addmm_(x, torch.eye(3, device=device)),
                x.clone().sort(0, descending=True).values.zero_().add_(1),
            ]

        for ours, theirs in zip(found("cuda"), found("cpu"), strict=True):
            assert torch.equal(ours.cpu(), theirs)

    def test_what_waits_within_pytorch_s_code_cannot_be_captured(self) -> None:
        x, targets = torch.zeros(8, 2, 5, device=self.gpu), torch.ones(2, 3, dtype=torch.int, device=self.gpu)

        def lengths(length: int) -> Tensor:
            return torch.full((2,), length, device=self.gpu)

        def work() -> Tensor:
            return F.ctc_loss(x, targets, lengths(8), lengths(3))

        work()
        with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            work()

    def test_an_operation_that_is_not_emulated_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="not supported"):
            torch.ops.aten._masked_scale(torch.ones(3, device=self.gpu), torch.ones(3, device=self.gpu).byte(), 2.0)


def agree(layers: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
    """Results and gradients on both devices."""

    def found(device: str) -> list[Tensor]:
        leaf = x.detach().to(device).requires_grad_()
        value = loss(layers.to(device)(leaf))
        return [it.detach().cpu() for it in (value, *torch.autograd.grad(value, [leaf, *layers.parameters()]))]

    torch.testing.assert_close(found("cpu"), found("cuda"), rtol=1e-4, atol=1e-5)
