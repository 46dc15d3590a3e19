"""Word-level language modelling: predict the next word of a running text (after pytorch/examples word_language_model).

The training text is cut into `batch_size` columns of equal length. A step is a window of `data.bptt` rows, and the
recurrent state is handed from window to window. A shard is a group of neighbouring columns.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rayexp.config import IMAGE_DATA, TEXT_DATA, ExperimentConfig
from rayexp.data import TextData, open_data
from rayexp.engine import order
from rayexp.engine.evaluate import on_host
from rayexp.engine.portable import Portable
from rayexp.engine.runtime import upload
from rayexp.engine.workload import Batch, RecurrentState
from rayexp.errors import UserError
from rayexp.runs.records import Predictions
from rayexp.runs.traits import TOKENS
from rayexp.workloads.language_model.model import MODELS, build, options_of
from rayexp.workloads.language_model.plain import plain
from rayexp.workloads.language_model.recurrent import LAYERS, RecurrentOptions
from rayexp.workloads.own_model import OwnModel, is_own

# Tokens evaluated at once: a recurrent model gives the same losses for any window, and long windows are faster.
EVAL_TOKENS = 512


class LanguageModel:
    """The workload `language_model` (see engine/workload.py)."""

    unit, kind, goals = TOKENS.unit, TOKENS.kind, TOKENS.goals
    batch_unit = "columns"
    batch_dim = 1
    together = False

    def __init__(self, config: ExperimentConfig, opened: TextData | None = None) -> None:
        self.config = config
        data = config.data
        if data.name in IMAGE_DATA:
            raise UserError(
                f"data.name: language_model reads {', '.join(TEXT_DATA)} and datasets of your own, got {data.name!r}"
            )
        if config.label_smoothing:
            raise UserError("label_smoothing: language_model has none; set it to 0")
        own = is_own("model.name", config.model.name, lambda: MODELS)
        self.own = OwnModel.open(config, ("vocabulary",)) if own else None
        self.options = None if own else options_of(config)
        self.recurrent = isinstance(self.options, RecurrentOptions)
        # A tied matrix gets two gradients in a pass; the second one would be added after the other shard's.
        self.shares_buffer = self.options is None or not self.options.tied
        self.parts = ("h", "c") if config.model.name == "lstm" else ("h",)
        self.data: TextData = opened or open_data(data, config.code, text=True)
        self.words: int = len(self.data.vocabulary)
        needed = config.batch_size * (data.bptt + 1)
        if len(self.data.train) < needed:
            raise UserError(
                f"batch_size: {config.batch_size} columns of one window (data.bptt {data.bptt}) need {needed:,} "
                f"training tokens, there are {len(self.data.train):,}"
            )
        for name, tokens in (("valid", self.data.valid), ("test", self.data.test)):
            if len(tokens) < 2 * data.eval_columns:
                raise UserError(
                    f"data.eval_columns: {data.eval_columns} columns need {2 * data.eval_columns} tokens, "
                    f"{name} has {len(tokens)}"
                )
        self.columns: NDArray[np.int32] = _columns(self.data.train, config.batch_size)
        self.val_sha = hashlib.sha256(f"{self.data.sha['valid']} in {data.eval_columns} columns".encode()).hexdigest()

    def model(self) -> nn.Module:
        """A freshly initialised model on the CPU. What one of the user's own draws from PyTorch's generator follows
        from the seed; it takes the numbers of words int64[time, columns] and gives logits [time, columns, words]."""
        if self.own is None:
            return build(self.config, self.words)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(order.key(self.config.seed, "init"))
            return self.own.build(vocabulary=self.words)

    # ---------------------------------------------------------------------- training

    def steps(self) -> int:
        """Number of windows of an epoch; the last may be shorter."""
        return math.ceil((len(self.columns[0]) - 1) / self.config.data.bptt)

    def batch(self, epoch: int, step: int, shards: range, device: torch.device) -> Batch:
        """A window of the columns of consecutive shards: inputs (int64[time, columns],) and targets int64[time *
        columns]. The same in every epoch."""
        fed = {name: upload(array, device) for name, array in self.feed(epoch, step, shards).items()}
        return self.assemble(fed, self.sizes(step, shards))

    def feed(self, epoch: int, step: int, shards: range) -> dict[str, NDArray[Any]]:
        """`window` int64[time + 1, columns]: each row is the target of the row before it. Every window but an epoch's
        last has `data.bptt` targets."""
        size = self.config.batch_size // self.config.shards
        start = step * self.config.data.bptt
        rows = self.columns[shards.start * size : shards.stop * size, start : start + self.config.data.bptt + 1]
        return {"window": rows.T.astype(np.int64)}

    def assemble(self, fed: Mapping[str, Tensor], sizes: Sequence[int]) -> Batch:
        """Inputs int64[time, columns] and targets int64[time * columns]."""
        window = fed["window"]
        targets = window[1:].reshape(-1)
        return Batch((window[:-1],), targets, tuple(sizes), targets.numel())

    def sizes(self, step: int, shards: range) -> tuple[int, ...]:
        """Columns of each shard."""
        return (self.config.batch_size // self.config.shards,) * len(shards)

    def resident_bytes(self) -> int:
        """None: a window is a few kilobytes."""
        return 0

    def resident(self, device: torch.device) -> None:
        """Does nothing: windows are fed."""

    def initial_state(self, size: int, device: torch.device) -> RecurrentState:
        """Of a recurrent model the hidden state `h` (and `c`): zeros [layers, columns, hidden]. Of a transformer the
        `tokens` before the window: int64[context, columns], all ends of lines."""
        if isinstance(self.options, RecurrentOptions):
            shape = (self.options.nlayers, size, self.options.nhid)
            return {name: torch.zeros(shape, device=device) for name in self.parts}
        if self.options is None or self.options.context == 0:
            return {}
        return {"tokens": torch.full((self.options.context, size), self._line_end, device=device)}

    def loss(self, model: nn.Module, batch: Batch, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """The sum of the window's losses in nats, and the state after the window."""
        losses, after = self._window(model, batch.inputs[0], batch.targets, state)
        return losses.sum(), after

    def touched_rows(self, epoch: int, step: int) -> dict[str, NDArray[np.int64]]:
        """Of an untied embedding, the words of the global batch's window, sorted."""
        if self.options is None or self.options.tied or not self.recurrent:
            return {}  # a transformer's context reaches back into earlier windows
        start = step * self.config.data.bptt
        stop = min(start + self.config.data.bptt, self.columns.shape[1] - 1)
        return {"encoder.weight": np.unique(self.columns[:, start:stop]).astype(np.int64)}

    def _window(
        self, model: nn.Module, tokens: Tensor, targets: Tensor, state: RecurrentState
    ) -> tuple[Tensor, RecurrentState]:
        """The losses of a window, float32[time * columns], and the state after it."""
        if self.own is not None:
            logits = model(tokens)
            if logits.shape != (*tokens.shape, self.words):
                raise UserError(
                    f"model.name: {self.own.name} gives {tuple(logits.shape)} for words {tuple(tokens.shape)}; "
                    f"expected logits, {(*tokens.shape, self.words)}"
                )
            return F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none"), {}
        if self.recurrent:
            losses, after = model(tokens, targets, tuple(state[name] for name in self.parts))
            return losses, {name: part.detach() for name, part in zip(self.parts, after, strict=True)}
        if not state:
            return model(tokens, targets)[0], {}
        seen = torch.cat([state["tokens"], tokens])
        return model(seen, targets)[0], {"tokens": seen[len(tokens) :]}

    @functools.cached_property
    def _line_end(self) -> int:
        return self.data.vocabulary.index("<eos>")

    # ---------------------------------------------------------------------- evaluation

    def val_streams(self) -> int:
        """Number of groups of neighbouring columns of the validation text."""
        return min(self.config.shards, self.config.data.eval_columns)

    def predict(self, model: nn.Module, stream: int, device: torch.device) -> Mapping[str, NDArray[Any] | Tensor]:
        """Offset, word and loss of every predicted token of a group of columns, front to back."""
        return self._predict(model, self.data.valid, stream, device)

    def predictions(self, parts: Sequence[Mapping[str, NDArray[Any]]]) -> Predictions:
        """Put all groups together, sorted by offset."""
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in ("offset", "token", "loss")}
        by_offset = np.argsort(arrays["offset"], kind="stable")
        return Predictions("tokens", self.val_sha, {name: array[by_offset] for name, array in arrays.items()})

    def metrics(self, predictions: Predictions) -> dict[str, float]:
        """`val_loss` in nats per token, and the perplexity `ppl`."""
        loss = float(np.mean(predictions["loss"], dtype=np.float64))
        return {"val_loss": loss, "ppl": _perplexity(loss)}

    def test_metrics(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """`test_loss` and `test_ppl` of a model in eval mode on the test text, cut like the validation text."""
        with torch.inference_mode():
            parts = [self._predict(model, self.data.test, s, device) for s in range(self.val_streams())]
        losses = np.concatenate([on_host(part)["loss"] for part in parts])
        loss = float(np.mean(losses, dtype=np.float64))
        return {"test_loss": loss, "test_ppl": _perplexity(loss)}

    def _predict(
        self, model: nn.Module, text: NDArray[np.int32], stream: int, device: torch.device
    ) -> dict[str, NDArray[Any] | Tensor]:
        columns = _columns(text, self.config.data.eval_columns)
        group = order.share(len(columns), self.val_streams(), stream)
        ours = columns[group.start : group.stop]
        tokens = upload(ours.T.astype(np.int64), device)
        state = self.initial_state(len(group), device)
        window = self.config.data.bptt
        if self.recurrent:
            window = max(window, EVAL_TOKENS // len(group))
        losses = []
        for start in range(0, len(tokens) - 1, window):
            rows = tokens[start : start + window + 1]
            found, state = self._window(model, rows[:-1], rows[1:].reshape(-1), state)
            losses.append(found.float())
        positions = np.arange(text.size // len(columns) * len(columns), dtype=np.int64).reshape(columns.shape)
        return {
            "offset": positions[group.start : group.stop, 1:].T.reshape(-1),
            "token": np.ascontiguousarray(ours[:, 1:].T).reshape(-1),
            "loss": torch.cat(losses),
        }

    # ---------------------------------------------------------------------- describing

    def describe(self) -> dict[str, Any]:
        """The content of data.json."""
        return {
            "train_samples": len(self.data.train),
            "val_samples": len(self.data.valid),
            "test_samples": len(self.data.test),
            "train_sha": self.data.sha["train"],
            "val_sha": self.val_sha,
            "test_sha": self.data.sha["test"],
            "vocabulary": list(self.data.vocabulary),
        }

    def example(self) -> tuple[Any, ...]:
        """One column of one window."""
        return (torch.zeros(self.config.data.bptt, 1, dtype=torch.int64),)

    @classmethod
    def portable(
        cls, config: ExperimentConfig, described: Mapping[str, Any], weights: Mapping[str, Tensor]
    ) -> Portable:
        """See engine/workload.py. The model is a graph of PyTorch's layers, or the user's own."""
        vocabulary = list(described["vocabulary"])
        if is_own("model.name", config.model.name, lambda: MODELS):
            own = OwnModel.open(config, ("vocabulary",))
            with torch.random.fork_rng(devices=[]):
                found, build_lines = own.build(vocabulary=len(vocabulary)), own.lines(vocabulary=len(vocabulary))
            found.load_state_dict(weights)
            recurrent = False
        else:
            net = build(config, len(vocabulary))
            net.load_state_dict(weights)
            found, build_lines = plain(net.eval()), []
            recurrent = config.model.name in LAYERS
        return Portable(
            model=found.eval(),
            weights=weights,
            inputs=(torch.zeros(config.data.bptt, 2, dtype=torch.int64),),
            axes=({1: "columns"} if recurrent else {0: "time", 1: "columns"},),
            build=tuple(build_lines),
            about={
                "task": "language model",
                "architecture": config.model.name,
                "vocabulary": vocabulary,
                "input": "int64[time, columns]: numbers of words, in the order of vocabulary; <eos> ends a line",
                "output": f"float32[time, columns, {len(vocabulary)}]: logits of the word after each",
                # PyTorch exports recurrent layers for one length of text.
                **({"onnx": f"time is {config.data.bptt} in .onnx"} if recurrent else {}),
            },
        )


def _columns(tokens: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    """The text as `count` columns of equal length without the rest: int32[count, length], a view."""
    length = len(tokens) // count
    return tokens[: length * count].reshape(count, length)


def _perplexity(loss: float) -> float:
    """exp(loss): infinite where it exceeds a double, NaN where the loss is."""
    return math.inf if loss >= 700 else math.exp(loss)
