"""The lines of `evaluate`: those of pytorch/examples for scripts, one line a batch on any terminal."""

from __future__ import annotations

import numpy as np
import pytest

from rayexp.cli._progress import Progress, summary


def lines(capsys: pytest.CaptureFixture[str], width: int | None) -> list[str]:
    progress = Progress(1, width)
    progress.begin(40)
    top5 = np.tile(np.arange(5), (8, 1))
    for batch in range(2):
        progress.seen(batch, {"loss": np.full(8, 1.9142), "label": np.arange(8), "top5": top5})
    return capsys.readouterr().out.splitlines()


def test_scripts_get_tabs_and_everything(capsys: pytest.CaptureFixture[str]) -> None:
    for line in lines(capsys, None):
        names = [part.split()[0] for part in line.split("\t")]
        assert names == ["Test:", "Time", "Loss", "Acc@1", "Acc@5"]


@pytest.mark.parametrize(
    ("width", "names"),
    [
        (120, ["Test:", "Time", "Loss", "Acc@1", "Acc@5"]),
        (100, ["Test:", "Loss", "Acc@1", "Acc@5"]),
        (80, ["Test:", "Acc@1", "Acc@5"]),
        (40, ["Test:", "Acc@5"]),
    ],
)
def test_a_terminal_gets_one_line_a_batch(capsys: pytest.CaptureFixture[str], width: int, names: list[str]) -> None:
    for line in lines(capsys, width):
        assert len(line) <= width
        assert "\t" not in line
        assert [name for name in ("Test:", "Time", "Loss", "Acc@1", "Acc@5") if name in line] == names


def test_a_loss_has_a_perplexity_only_where_it_is_of_words(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(1)
    progress.begin(2)
    progress.seen(0, {"loss": np.ones(4), "index": np.arange(4)})
    progress.seen(1, {"loss": np.ones(4), "offset": np.arange(4)})
    regression, words = capsys.readouterr().out.splitlines()
    assert "ppl" not in regression
    assert "ppl     2.72" in words


def test_the_last_line_has_the_metrics_of_any_workload() -> None:
    assert summary({"val_loss": 1.0, "acc1": 48.73, "acc5": 75.3}) == " * Acc@1 48.730 Acc@5 75.300"
    assert summary({"val_loss": 4.0, "ppl": 54.598}) == " * ppl 54.598"
    assert summary({"val_loss": 0.5, "rmse": 0.7071}) == " * val_loss 0.500 rmse 0.707"
