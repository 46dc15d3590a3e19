"""The yardstick: an ordinary single-process PyTorch script of the same model, data, batch and optimizer.

    python -m rayexp.grid.baseline JOB.json        (a WorkerJob: its run, config, device and started)

It is what one would write without rayexp, after pytorch/examples `imagenet/main.py` and `word_language_model/main.py`:
torchvision's transforms in a DataLoader, one forward and backward for the whole batch, torch.optim. It uses nothing of
rayexp's engine; it only reads the same packed data, so it has no JPEGs to decode. Any other workload or text model is
trained in the same loop by its own model, batches and loss. Two differences remain: batch normalisation sees the whole
batch and not a shard, and the learning rate stays at `lr`. It leaves epochs.jsonl and steps.jsonl in the run directory,
so that it is measured like any other cell.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayexp.config import ExperimentConfig
from rayexp.data import ImageSplit, open_data
from rayexp.engine import rng
from rayexp.engine.workload import Batch
from rayexp.launch.job import WorkerJob
from rayexp.runs.records import EpochRecord
from rayexp.runs.traits import Traits
from rayexp.system.busy import BusyMeter
from rayexp.system.clock import since
from rayexp.system.cores import cores
from rayexp.workloads import open_workload, workload_class
from rayexp.workloads.image_classification.workload import MEAN, STD, ImageClassification

COLUMNS = ("count", "total", "data", "transfer", "compute", "optimizer")
LOADERS = 4  # the default of imagenet/main.py
Step = tuple[Tensor, Tensor]


class Script(Protocol):
    """What the loop asks of a script: a model, batches of any kind, and a mean loss."""

    model: nn.Module

    def batches(self) -> Iterator[Any]:
        """The batches of an epoch, as the loader gives them."""

    def moved(self, batch: Any) -> tuple[Any, int]:
        """The batch on the device, and how many loss terms it has."""

    def loss(self, batch: Any) -> Tensor:
        """The mean loss of a batch on the device."""

    def evaluate(self) -> dict[str, float]:
        """`val_loss` and the workload's metrics; the model is in eval mode."""


def moved(step: Step, device: torch.device) -> tuple[Step, int]:
    """Inputs and targets on the device, and how many targets."""
    inputs, targets = (tensor.to(device, non_blocking=True) for tensor in step)
    return (inputs, targets), len(targets)


class Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Packed images through torchvision's transforms, one by one."""

    def __init__(self, split: ImageSplit, transform: Any) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.split.read(np.array([i]))[0])), int(self.split.labels[i])


class Images:
    """Model, loaders and loss for image classification."""

    def __init__(self, config: ExperimentConfig, device: torch.device) -> None:
        from torchvision import transforms as t

        self.device = device
        workload = ImageClassification(config)  # for its data and its model, which may be the user's own
        data = workload.data
        tail = [t.ToTensor(), t.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD])]
        recipe, size = config.data.augment, config.data.image_size
        head: list[Any] = []
        if recipe is not None:
            cut = (
                t.RandomCrop(size, recipe.pad) if recipe.pad else t.RandomResizedCrop(size, recipe.scale, recipe.ratio)
            )
            head = [cut, *([t.RandomHorizontalFlip()] if recipe.flip else [])]
        options: dict[str, Any] = {
            "batch_size": config.batch_size,
            "pin_memory": device.type == "cuda",
            "persistent_workers": True,
        }
        options["num_workers"] = min(LOADERS, cores())
        self.train = torch.utils.data.DataLoader(Pictures(data.train, t.Compose(head + tail)), shuffle=True, **options)
        self.val = torch.utils.data.DataLoader(Pictures(data.val, t.Compose(tail)), **options)
        self.smoothing = config.label_smoothing
        self.model = workload.make(len(data.classes), size)

    def batches(self) -> Iterator[Step]:
        """Shuffled, augmented images and labels."""
        yield from self.train

    def moved(self, batch: Step) -> tuple[Step, int]:
        """Images and labels on the device."""
        return moved(batch, self.device)

    def loss(self, batch: Step) -> Tensor:
        """Mean cross-entropy."""
        inputs, targets = batch
        return F.cross_entropy(self.model(inputs), targets, label_smoothing=self.smoothing)

    def evaluate(self) -> dict[str, float]:
        """Validation loss and accuracies."""
        loss, right1, right5, n = 0.0, 0, 0, 0
        for inputs, labels in self.val:
            targets = labels.to(self.device)
            logits = self.model(inputs.to(self.device))
            loss += float(F.cross_entropy(logits, targets, reduction="sum"))
            top = logits.topk(min(5, logits.shape[1]), 1).indices == targets[:, None]
            top &= ~logits.log_softmax(1).isnan().any(1, keepdim=True)  # topk puts NaN first
            right1, right5, n = right1 + int(top[:, :1].sum()), right5 + int(top.sum()), n + len(labels)
        return {"val_loss": loss / n, "acc1": 100 * right1 / n, "acc5": 100 * right5 / n}


class RNN(nn.Module):
    """The RNNModel of word_language_model."""

    def __init__(self, name: str, words: int, emsize: int, nhid: int, nlayers: int, dropout: float, tied: bool) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(words, emsize)
        kind: Any = {"lstm": nn.LSTM, "gru": nn.GRU}.get(name, nn.RNN)
        extra = {"nonlinearity": name.removeprefix("rnn_")} if kind is nn.RNN else {}
        self.rnn = kind(emsize, nhid, nlayers, dropout=dropout, **extra)
        self.decoder = nn.Linear(nhid, words)
        if tied:
            self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def forward(self, tokens: Tensor, hidden: Any) -> tuple[Tensor, Any]:
        """Logits [time * columns, words], and the hidden state."""
        output, hidden = self.rnn(self.drop(self.encoder(tokens)), hidden)
        return self.decoder(self.drop(output)).flatten(0, 1), hidden


class Text:
    """Model, windows and loss for a recurrent language model."""

    def __init__(self, config: ExperimentConfig, device: torch.device) -> None:
        from rayexp.workloads.language_model.recurrent import RecurrentOptions

        self.device = device
        data = open_data(config.data, config.code, text=True)
        options = RecurrentOptions.model_validate(config.model.options)
        self.bptt = config.data.bptt
        self.hidden: Any = None
        self.train = self._columns(data.train, config.batch_size)
        self.val = self._columns(data.valid, config.data.eval_columns)
        self.model: nn.Module = RNN(config.model.name, len(data.vocabulary), **options.model_dump())

    @staticmethod
    def _columns(tokens: Any, columns: int) -> Tensor:
        length = len(tokens) // columns
        return torch.from_numpy(tokens[: length * columns].reshape(columns, length).T.astype(np.int64))

    def _windows(self, text: Tensor) -> Iterator[Step]:
        self.hidden = None
        for start in range(0, len(text) - 1, self.bptt):
            stop = min(start + self.bptt, len(text) - 1)
            yield text[start:stop], text[start + 1 : stop + 1].reshape(-1)

    def batches(self) -> Iterator[Step]:
        """Windows of the text, one after another."""
        return self._windows(self.train)

    def moved(self, batch: Step) -> tuple[Step, int]:
        """A window and its targets on the device."""
        return moved(batch, self.device)

    def loss(self, batch: Step) -> Tensor:
        """Mean cross-entropy; the hidden state is kept for the next window."""
        inputs, targets = batch
        logits, hidden = self.model(inputs, self.hidden)
        self.hidden = tuple(h.detach() for h in hidden) if isinstance(hidden, tuple) else hidden.detach()
        return F.cross_entropy(logits, targets)

    def evaluate(self) -> dict[str, float]:
        """Validation loss and perplexity."""
        total, n = 0.0, 0
        for window in self._windows(self.val):
            batch, count = self.moved(window)
            total += float(self.loss(batch)) * count
            n += count
        return {"val_loss": total / n, "ppl": math.inf if total / n >= 700 else math.exp(total / n)}


class OwnParts:
    """Any workload, by its own model, batches and loss, without the engine that would share them among workers."""

    def __init__(self, config: ExperimentConfig, device: torch.device) -> None:
        self.workload = open_workload(config.model_copy(update={"cpu_kernels": False}))
        self.device, self.shards = device, range(config.shards)
        self.model = ordinary(self.workload.model())
        self.epoch = 0
        self.state: Any = None

    def batches(self) -> Iterator[Batch]:
        """Whole batches, in the workload's order."""
        self.epoch, self.state = self.epoch + 1, None
        for step in range(self.workload.steps()):
            yield self.workload.batch(self.epoch, step, self.shards, self.device)

    def moved(self, batch: Batch) -> tuple[Batch, int]:
        """The workload has put it on the device."""
        return batch, batch.count

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss; a recurrent state is kept for the next batch."""
        if self.state is None:
            self.state = self.workload.initial_state(sum(batch.sizes), self.device)
        total, self.state = self.workload.loss(self.model, batch, self.state)
        return total / batch.count

    def evaluate(self) -> dict[str, float]:
        """As the workload judges its predictions."""
        streams = range(self.workload.val_streams())
        parts = [self.workload.predict(self.model, stream, self.device) for stream in streams]
        arrays = [{n: a.cpu().numpy() if isinstance(a, Tensor) else a for n, a in part.items()} for part in parts]
        return self.workload.metrics(self.workload.predictions(arrays))


def ordinary(model: nn.Module) -> nn.Module:
    """The model with PyTorch's own random layers in place of those that the engine tells what to draw."""
    from torchvision.ops import StochasticDepth

    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, rng.Dropout | rng.StochasticDepth):
            path, _, last = name.rpartition(".")
            plain = nn.Dropout(layer.p) if isinstance(layer, rng.Dropout) else StochasticDepth(layer.p, layer.mode)
            setattr(model.get_submodule(path), last, plain)
    return model


# The workloads that have a script after pytorch/examples, and the models that it knows; none: all of the workload.
SCRIPTS: dict[str, tuple[Callable[[ExperimentConfig, torch.device], Script], tuple[str, ...]]] = {
    "image_classification": (Images, ()),
    "language_model": (Text, ("lstm", "gru", "rnn_tanh", "rnn_relu")),
}


def script_of(config: ExperimentConfig, device: torch.device) -> Script:
    """The script after pytorch/examples where there is one, else one of the workload's own parts."""
    make, models = SCRIPTS.get(config.workload, (OwnParts, ()))
    return (make if not models or config.model.name in models else OwnParts)(config, device)


def optimizer_of(config: ExperimentConfig, model: nn.Module) -> torch.optim.Optimizer:
    """torch.optim's own, with the configuration's numbers."""
    o = config.optimizer
    thin = [p for p in model.parameters() if p.ndim < 2 and not o.decay_norm_and_bias]
    thick = [p for p in model.parameters() if p.ndim >= 2 or o.decay_norm_and_bias]
    groups = [{"params": thick, "weight_decay": config.weight_decay}]
    groups += [{"params": thin, "weight_decay": 0.0}] if thin else []
    if o.name == "adamw":
        return torch.optim.AdamW(groups, config.lr, o.betas, o.eps)
    return torch.optim.SGD(groups, config.lr, o.momentum, nesterov=o.nesterov)


def precision_of(config: ExperimentConfig, device: torch.device) -> str:
    """fp32, tf32 or bf16; `auto` is bf16 on a GPU that computes in it, else fp32."""
    if config.precision != "auto":
        return config.precision
    capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if capable else "fp32"


def gpu_id(device: torch.device) -> str | None:
    """The GPU's UUID as NVML has it; None on a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


def main(argv: list[str]) -> int:
    """Train as the job says."""
    job = WorkerJob.read(Path(argv[0]))
    run, config, device = job.run, job.config, torch.device(job.device)
    precision = precision_of(config, device)
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    work = script_of(config, device)
    model = work.model.to(device)
    optimizer = optimizer_of(config, model)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    kind = workload_class(config)
    traits = Traits(kind.unit, kind.kind, kind.goals)
    meter = BusyMeter(cores(), gpu_id(device))
    done, parent = 0, os.getppid()
    for epoch in range(1, config.epochs + 1):
        began = time.perf_counter()
        columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
        losses = 0.0
        model.train()
        clock = time.perf_counter()
        for loaded in work.batches():
            marks = [clock, time.perf_counter()]
            batch, count = work.moved(loaded)
            marks.append(time.perf_counter())
            optimizer.zero_grad()
            with cast:
                loss = work.loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            losses += loss.item() * count
            marks.append(time.perf_counter())
            if config.optimizer.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            clock = time.perf_counter()
            marks.append(clock)
            spans = [round(b - a, 6) for a, b in itertools.pairwise(marks)]
            values = [count, round(clock - marks[0], 6), *spans]
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
            if done == 0 and job.started is not None:
                startup = {"startup_seconds": {"to_first_step": since(job.started)}}
                (run / "startup.json").write_text(json.dumps(startup | traits.to_json()))
            done += 1
            if os.getppid() != parent:
                return 1  # whoever measures this is gone
        trained = time.perf_counter()
        model.eval()
        with torch.inference_mode(), cast:
            metrics = work.evaluate()
        evaluated = time.perf_counter()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, run / "checkpoint.pt")
        total = time.perf_counter() - began
        phases = {k: sum(columns[k]) for k in ("data", "transfer", "compute", "optimizer")}
        phases |= {"reduce": 0.0, "evaluate": evaluated - trained, "checkpoint": time.perf_counter() - evaluated}
        phases["other"] = max(0.0, total - sum(phases.values()))
        # As the engine does: a process's first step is left out, unless it is all there is.
        later = slice(1 if epoch == 1 and len(columns["count"]) > 1 else 0, None)
        peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
        if device.type == "cuda":
            peak["device"] = torch.cuda.max_memory_allocated()
        record = {
            "epoch": epoch,
            "step": done,
            "train_loss": losses / sum(columns["count"]),
            **metrics,
            "lr": config.lr,
            "samples_per_second": sum(columns["count"][later]) / sum(columns["total"][later]),
            "seconds": {"total": total, **({"first_step": columns["total"][0]} if epoch == 1 else {}), **phases},
            "weights_sha": "",
            "world_size": 0,
            "peak_memory": peak,
            "busy": meter.take(),
        }
        with (run / "steps.jsonl").open("a") as file:
            file.write(json.dumps({"epoch": epoch, "first": epoch == 1, **columns}) + "\n")
        with (run / "epochs.jsonl").open("a") as file:
            file.write(json.dumps(EpochRecord.from_json(record).to_json()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
