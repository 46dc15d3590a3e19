"""Hosts whose processors compute otherwise: `exact` refuses them by name before the first step, `ddp` says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayexp.engine.runtime import cpu_capability

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(cpu_capability() != "AVX512", reason="only an AVX-512 processor can play an AVX2 one"),
]


@pytest.fixture
def unlike(lab: Any) -> Any:
    """The lab with a host `old` whose kernels are those of an AVX2 processor, in the place of `two`."""
    lab.two.unplug()
    lab.two.boot()
    lab.give_token(lab.two)
    command = lab.two.command
    lab.two.command = lambda *words, **env: command(*words, **{"ATEN_CPU_CAPABILITY": "avx2", **env})
    lab.join("two")
    return lab


def test_unlike_hosts(unlike: Any, tiny: Path) -> None:
    words = ("scaling.num_workers=2", "scaling.cpus_per_worker=2", "epochs=1")

    def submit(*more: str) -> Any:
        return unlike.desk.rayexp(
            "submit", str(tiny), *words, *more, "--wait", "--address", unlike.url, check=False, timeout=220
        )

    refused = submit("name=refused")
    said = refused.stdout + refused.stderr
    assert refused.returncode == 2, said
    line = next(line for line in said.splitlines() if "needs workers that compute alike" in line)
    assert "AVX2, not cpu x86_64 AVX512" in line or "AVX512, not cpu x86_64 AVX2" in line
    assert " on one" in line
    assert " on two" in line
    assert line.endswith("allowed here: ddp")
    assert "Traceback" not in said
    warned = submit("name=warned", "reduction=ddp")
    assert warned.returncode == 0, warned.stdout + warned.stderr
    assert "do not compute alike" in warned.stdout + warned.stderr
