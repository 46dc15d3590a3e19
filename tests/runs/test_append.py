"""A line that could not be written leaves the file as it was."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rayexp.system import disk


def test_half_a_line_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "epochs.jsonl"
    disk.append_line(path, '{"epoch": 1}')
    before = path.read_bytes()

    def full(handle: int, data: bytes, at: int) -> int:
        os.lseek(handle, at, os.SEEK_SET)
        os.write(handle, data[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "pwrite", full)
        with pytest.raises(OSError, match="epochs"):
            disk.append_line(path, '{"epoch": 2}')
    assert path.read_bytes() == before
    disk.append_line(path, '{"epoch": 3}')
    assert path.read_bytes() == before + b'{"epoch": 3}\n'
