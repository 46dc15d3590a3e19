from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from rayexp.errors import HeadLostError, RunError, UserError
from rayexp.launch.doctor import examine
from rayexp.launch.faults import peer_lost, why_lost


def test_a_lost_peer_is_told_from_a_mistake() -> None:
    assert not peer_lost(ValueError("of ours"))
    assert peer_lost(RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer"))
    code = compile("raise RuntimeError('whatever')", "/site-packages/torch/distributed/distributed_c10d.py", "exec")
    with pytest.raises(RuntimeError) as caught:
        exec(code)
    assert peer_lost(caught.value)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (
            "NCCL error in: /torch/csrc/distributed/c10d/NCCLUtils.cpp:92, unhandled cuda error (run with "
            "NCCL_DEBUG=INFO for details), NCCL version 2.30.7\nncclUnhandledCudaError: Call to CUDA function failed.\n"
            "Last error:\nCuda failure 'API call is not supported in the installed CUDA driver'",
            "NCCL 2.30.7: unhandled cuda error: Cuda failure 'API call is not supported in the installed CUDA driver' "
            "(NCCL_DEBUG=INFO tells more)",
        ),
        (
            "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1269, internal error, NCCL version "
            "2.14.3\nncclInternalError: Internal check failed.\nLast error:\nProxy Call to rank 0 failed (Connect)\n",
            "NCCL 2.14.3: internal error: Proxy Call to rank 0 failed (Connect) (NCCL_DEBUG=INFO tells more)",
        ),
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer", "lost touch with a peer"),
    ],
)
def test_why_a_peer_is_lost_is_said_in_a_line(said: str, why: str) -> None:
    assert peer_lost(RuntimeError(said))
    assert why_lost(RuntimeError(said)) == why


@pytest.mark.parametrize("kind", [UserError, RunError, HeadLostError])
def test_an_error_comes_whole_from_another_process(kind: type[UserError | RunError]) -> None:
    error = pickle.loads(pickle.dumps(kind(OSError("full"), "; --resume this goes on")))
    assert type(error) is kind
    assert (str(error), error.fault, error.advice) == ("full; --resume this goes on", "full", "; --resume this goes on")
    assert str(kind("full")) == "full"


def test_doctor_finds_this_machine_in_order(tmp_path: Path) -> None:
    findings = {finding.what: finding for finding in examine(tmp_path / "not" / "yet")}
    assert findings["torch pair"].ok
    assert findings["disk"].ok
    assert not (tmp_path / "not").exists()


@pytest.mark.slow
def test_doctor_names_a_pair_that_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    done = subprocess.run(
        [sys.executable, "-m", "rayexp", "doctor"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "nms does not exist" in done.stdout
    assert "pip install --force-reinstall torch torchvision" in " ".join(done.stdout.split())
