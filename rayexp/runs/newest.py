"""The checkpoints of a run by age."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def newest_first(checkpoints: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """All checkpoints in a folder with the content of their state.json; see Run.resumable."""
    found = []
    for path in checkpoints.glob("[es]*_*"):
        kind, _, digits = path.name.partition("_")
        if kind not in ("epoch", "step") or not digits.isdecimal():
            continue
        try:
            state = dict(json.loads((path / "state.json").read_bytes()))
        except (OSError, ValueError, RecursionError, TypeError):
            state = {}
        found.append((kind == "epoch", int(digits), path, state))
    lengths = [s["steps"] for _, _, _, s in found if isinstance(s.get("steps"), int) and s["steps"] > 0]
    steps = Counter(lengths).most_common(1)[0][0] if lengths else 1  # per epoch; one state.json may be damaged
    # After an epoch's last step there may be one of each kind; that of the epoch counts as the newer.
    found.sort(key=lambda f: (f[1] * steps if f[0] else f[1], f[0]), reverse=True)
    for _, _, path, state in found:
        yield path, state
