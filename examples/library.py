"""The library in one script: train, look, compare, ask, take the model elsewhere. Takes some seconds on a laptop.

    python examples/library.py [FOLDER]

FOLDER (default: runs) holds the run directory and what else is written.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import rayexp


class Best:
    """A callback: remembers the best epoch so far."""

    def __init__(self) -> None:
        self.epoch, self.loss = 0, float("inf")

    def on_epoch(self, record: rayexp.EpochRecord) -> None:
        """Called after every epoch."""
        if record.val_loss < self.loss:
            self.epoch, self.loss = record.epoch, record.val_loss


def main(folder: Path) -> None:
    """Train twice and look at what came of it."""
    best = Best()
    small = {"epochs": 3, "data.max_train_samples": 160, "data.max_val_samples": 80, "data.image_size": 32}
    run = rayexp.train("quickstart", small, callbacks=[best], runs=folder)
    print("validation loss by epoch:", run.table()["val_loss"], "smallest after epoch", best.epoch)

    again = rayexp.train(run.config(), runs=folder, progress=False)
    same = [record.weights_sha for record in again.records()] == [record.weights_sha for record in run.records()]
    print("the same bits again:", same)

    print("evaluated:", rayexp.evaluate(run.at("best")).metrics)
    report = rayexp.diff(run.at(1), run.at("last"))
    print(f"from epoch 1 to the last: {report.gained} gained, {report.lost} lost, p {report.mcnemar_p:.3f}")

    model = rayexp.load_model(run.at("best"))
    with torch.inference_mode():
        logits = model(torch.zeros(1, 3, 32, 32))
    print("grey is taken for", model.about["categories"][int(logits.argmax())][1])

    exported = rayexp.export(run.at("best"), folder / "model.pt", force=True)
    print("\n".join(["for others:", str(exported.path), *exported.build]))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
