"""What bits depend on: whatever changes them changes the fingerprint, and nothing else does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import runtime
from rayexp.engine.fingerprint import differences, fingerprint, probe, processor

CODE = """
import json, torch
from rayexp.config import ExperimentConfig
from rayexp.engine import runtime
from rayexp.engine.fingerprint import fingerprint
with runtime.configure(ExperimentConfig(), torch.device("cpu"), 8) as here:
    print(json.dumps(fingerprint(here)))
"""


def taken(lanes: int = 1) -> dict[str, Any]:
    config = parse({"scaling": {"lanes": lanes}}, ExperimentConfig, "test")
    with runtime.configure(config, torch.device("cpu"), 8) as here:
        return fingerprint(here)


def elsewhere(**env: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**os.environ, **env}, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_it_is_the_same_again_on_any_replica_and_in_another_process() -> None:
    one = taken()
    assert taken(lanes=2) == one == elsewhere(OMP_NUM_THREADS="1", HOME="/nowhere")
    assert differences(one, taken()) == []


@pytest.mark.parametrize(
    ("variable", "value", "needs", "named"),
    [
        ("ATEN_CPU_CAPABILITY", "avx2", "AVX512", {"device", "probe"}),
        ("MKL_CBWR", "COMPATIBLE", "AVX", {"environment", "probe"}),
        pytest.param("ONEDNN_MAX_CPU_ISA", "AVX2", "AVX512", {"environment", "probe"}, marks=pytest.mark.slow),
        pytest.param("MKL_ENABLE_INSTRUCTIONS", "SSE4_2", "AVX", {"environment"}, marks=pytest.mark.slow),
    ],
)
def test_what_narrows_the_kernels_is_seen(variable: str, value: str, needs: str, named: set[str]) -> None:
    if needs not in runtime.cpu_capability():
        pytest.skip(f"this processor has no {needs}")
    one, other = taken(), elsewhere(**{variable: value})
    assert named <= {name for name in one if one[name] != other[name]} <= {*named, "probe"}
    assert any(text.startswith(min(named)) for text in differences(one, other))


def test_variables_that_narrow_the_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = taken()["environment"]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "SSE4_2")
    monkeypatch.setenv("MKL_ANYTHING_ELSE", "1")
    found = set((taken()["environment"] or "").split()) - set((before or "").split())
    assert found == {"ONEDNN_MAX_CPU_ISA=AVX2", "MKL_ENABLE_INSTRUCTIONS=SSE4_2"}


def test_threads_are_seen_and_what_makes_them_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_THREAD_LIMIT", "64")
    found = []
    for threads in (None, 1, 2):
        config = parse({"scaling": {"lanes": 2}, "threads_per_shard": threads}, ExperimentConfig, "test")
        with runtime.configure(config, torch.device("cpu"), 8) as here:
            found.append(fingerprint(here))
            seen = here.run([torch.get_num_threads] * 2)
        assert (seen, found[-1]["threads_per_lane"]) == ([threads or 1] * 2, threads or 1)
    assert found[0] == found[1]
    assert found[1]["environment"] is None
    assert found[2]["environment"] == "OMP_THREAD_LIMIT=64"


def test_the_probe_draws_nothing_and_leaves_no_gradient_mode_behind() -> None:
    before = torch.get_rng_state()
    with torch.no_grad():
        assert probe(torch.device("cpu")) == probe(torch.device("cpu"))
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_processor_in_words(tmp_path: Path) -> None:
    info = (
        "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu smep fma avx512f amx_tile rdtscp\n\nprocessor\t: 1\n"
    )
    (tmp_path / "cpuinfo").write_text(info)
    for i, (level, kind, size) in enumerate(
        [("1", "Data", "32K"), ("1", "Instruction", "64K"), ("2", "Unified", "1M")]
    ):
        folder = tmp_path / f"cache/index{i}"
        folder.mkdir(parents=True)
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    words = processor(tmp_path / "cpuinfo", tmp_path / "cache")
    assert words == "GenuineIntel L1=32K L2=1M amx_tile avx512f fma"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd sve2 crc32\nCPU implementer\t: 0x41\n")
    assert processor(tmp_path / "cpuinfo", tmp_path / "none") == "0x41 asimd sve2"


def test_differences_are_named_and_short() -> None:
    one = {"device": "cpu AVX512", "cpu": "A L1=32K L2=1M avx avx2 avx512f fma", "environment": None, "gone": 1}
    other = {"device": "cpu AVX2", "cpu": "A L1=32K L2=1M avx avx2 fma", "environment": "X=1", "new": 2}
    assert differences(one, other) == [
        "device cpu AVX2, not cpu AVX512",
        "cpu without these, not avx512f",
        "environment X=1, not unset",
    ]
    assert differences({"torch": "2.12", "probe": "a"}, {"torch": "2.13", "probe": "a"}) == ["torch 2.13, not 2.12"]
    # What an older version of rayexp did not write is not another machine.
    assert differences({"device": "x"}, {"device": "x", "probe": "a"}) == []


def test_between_a_cpu_and_a_gpu_the_device_says_it_all() -> None:
    cpu = {
        "device": "cpu AVX512",
        "cpu": "A L1=32K avx fma",
        "torch": "2.13",
        "cuda": None,
        "cudnn": None,
        "probe": "a",
    }
    gpu = {"device": "H100", "cpu": None, "torch": "2.14", "cuda": "13.0", "cudnn": 92400, "probe": "b"}
    assert differences(cpu, gpu) == ["device H100, not cpu AVX512", "torch 2.14, not 2.13"]
    assert differences(gpu, cpu) == ["device cpu AVX512, not H100", "torch 2.13, not 2.14"]
    # Between two GPUs their libraries are the difference, and where nothing has a name, the probe.
    assert differences(gpu, {**gpu, "cuda": "12.8", "cudnn": 91000, "probe": "c"}) == [
        "cuda 12.8, not 13.0",
        "cudnn 91000, not 92400",
    ]
    assert differences(gpu, {**gpu, "probe": "c"}) == ["probe c, not b"]
