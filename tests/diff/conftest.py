"""Run directories as training leaves them, made from arrays."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy

from rayexp.config import ExperimentConfig, parse
from rayexp.runs.records import Predictions
from rayexp.runs.run import Run
from rayexp.runs.writer import RunWriter


def image_arrays(label, first, *, classes, confidence=None, loss=None, rest=None):
    """Prediction arrays with a given top-1; the rest of the top five are the next classes, so label may be in it."""
    label, first = np.asarray(label, dtype=np.int64), np.asarray(first, dtype=np.int32)
    n, k = len(label), min(5, classes)
    top5 = (first[:, None] + np.arange(k)) % classes if rest is None else np.asarray(rest)
    right = label == first
    confidence = np.where(right, 0.8, 0.6) if confidence is None else confidence
    loss = np.where(right, 0.2, 2.0) if loss is None else loss
    return {
        "index": np.arange(n, dtype=np.int64),
        "label": label,
        "top5": top5.astype(np.int32),
        "confidence": np.asarray(confidence, dtype=np.float32),
        "loss": np.asarray(loss, dtype=np.float32),
    }


def token_arrays(token, loss, offset=None):
    n = len(token)
    return {
        "offset": np.arange(1, n + 1, dtype=np.int64) if offset is None else np.asarray(offset, dtype=np.int64),
        "token": np.asarray(token, dtype=np.int32),
        "loss": np.asarray(loss, dtype=np.float32),
    }


class Makes:
    """Makes run directories under one folder."""

    def __init__(self, storage):
        self.storage = storage

    def _run(self, workload, epochs, kind, data, name, config, data_sha, weights):
        tree = {
            "name": name,
            "workload": workload,
            "storage_path": str(self.storage),
            "epochs": len(epochs),
            **(config or {}),
        }
        run = Run.create(parse(tree, ExperimentConfig, "test"), argv=[])
        writer = RunWriter(run)
        writer.begin({}, data)
        for epoch, arrays in enumerate(epochs, 1):
            predictions = Predictions(kind, data_sha, arrays)
            tensors = weights[epoch - 1] if weights else {"fc.weight": np.full((2, 2), epoch, dtype=np.float32)}
            state = safetensors.numpy.save({f"model.{k}": v for k, v in tensors.items()})
            sha = hashlib.sha256(state).hexdigest()
            loss = float(np.mean(arrays["loss"], dtype=np.float64))
            if kind == "images":
                right = arrays["top5"] == arrays["label"][:, None]
                metrics = {"acc1": 100 * float(right[:, 0].mean()), "acc5": 100 * float(right.any(1).mean())}
            else:
                metrics = {"ppl": float(np.exp(loss))}
            record = {
                "epoch": epoch, "step": epoch, "train_loss": loss, "val_loss": loss, **metrics, "lr": 0.1,
                "samples_per_second": 1.0, "seconds": {"total": 1.0}, "weights_sha": sha,
            }  # fmt: skip
            words = {
                "epoch": epoch,
                "step": epoch,
                "weights_sha": sha,
                "record": record,
                "files": {"state.safetensors": sha},
            }
            writer.epoch(
                record, {"state.safetensors": state, "state.json": json.dumps(words).encode()}, predictions.to_npz()
            )
        writer.end("done")
        return run

    def images(
        self, epochs, classes, *, name="pictures", names=None, config=None, data_sha="d" * 64, weights=None, words=None
    ):
        """A run whose epochs have these arrays."""
        n = len(epochs[0]["label"])
        data = {
            "kind": "images",
            "classes": [[f"n{i:08d}", words[i] if words else f"thing {i}, genus {i}"] for i in range(classes)],
            "val_names": names or [f"val_{i}.JPEG" for i in range(n)],
            "train_samples": n, "val_samples": n, "train_sha": "t" * 64, "val_sha": data_sha,
        }  # fmt: skip
        return self._run("image_classification", epochs, "images", data, name, config, data_sha, weights)

    def text(self, epochs, vocabulary, *, name="words", data_sha="e" * 64, weights=None):
        """A language run whose epochs have these arrays."""
        n = len(epochs[0]["token"])
        data = {
            "kind": "tokens", "vocabulary": list(vocabulary), "train_samples": n, "val_samples": n,
            "train_sha": "t" * 64, "val_sha": data_sha,
        }  # fmt: skip
        config = {"data": {"name": "python_docs"}}
        return self._run("language_model", epochs, "tokens", data, name, config, data_sha, weights)

    def random_images(self, n, classes, epochs, seed=0, **more):
        """A run that gets better from epoch to epoch and changes its mind less and less."""
        rng = np.random.default_rng(seed)
        label = rng.integers(0, classes, n)
        first = rng.integers(0, classes, n)
        made = []
        for epoch in range(1, epochs + 1):
            again = rng.random(n) < 1 / epoch
            skill = 0.3 + 0.5 * epoch / epochs
            drawn = np.where(rng.random(n) < skill, label, rng.integers(0, classes, n))
            first = np.where(again, drawn, first)
            confidence = rng.beta(3, 2, n)
            loss = np.where(first == label, -np.log(confidence), -np.log((1 - confidence) / 2))
            made.append(image_arrays(label, first, classes=classes, confidence=confidence, loss=loss))
        return self.images(made, classes, **more)


@pytest.fixture
def makes(tmp_path):
    return Makes(tmp_path / "runs")


@pytest.fixture
def arrays():
    """`arrays.images(label, first, ...)` and `arrays.tokens(token, loss, ...)`."""

    class Arrays:
        images = staticmethod(image_arrays)
        tokens = staticmethod(token_arrays)

    return Arrays
