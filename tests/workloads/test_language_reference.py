"""A language model's training against a plain loop in float64: pytorch/examples word_language_model with torch.optim.

`nn.LSTM` as a stack, whole logits, `F.cross_entropy`; the hidden state goes from window to window and starts anew in
every epoch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayexp.config import ExperimentConfig, parse
from rayexp.engine.group import WorkerGroup
from rayexp.engine.runtime import configure
from rayexp.engine.trainer import StepDone, Trainer
from rayexp.workloads import open_workload
from rayexp.workloads.language_model import workload as language_model
from rayexp.workloads.language_model.workload import LanguageModel

BATCH, BPTT = 8, 20


class Example(nn.Module):
    """RNNModel of the example, without dropout."""

    def __init__(self, kind: type[nn.RNNBase], net: Any, tied: bool) -> None:
        super().__init__()
        words, size = net.encoder.weight.shape
        self.encoder = nn.Embedding(words, size)
        self.rnn = kind(size, size, 2)
        self.decoder = nn.Linear(size, words)
        with torch.no_grad():
            self.encoder.weight.copy_(net.encoder.weight)
            self.decoder.bias.copy_(net.decoder.bias)
            for layer in range(2):
                for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                    getattr(self.rnn, f"{part}_l{layer}").copy_(getattr(net.body.layers[layer], f"{part}_l0"))
        if tied:
            self.decoder.weight = self.encoder.weight
        else:
            self.decoder.weight.data.copy_(net.decoder.weight)

    def forward(self, tokens: Tensor, hidden: Any) -> tuple[Tensor, Any]:
        out, hidden = self.rnn(self.encoder(tokens), hidden)
        return self.decoder(out).flatten(0, 1), hidden


@pytest.mark.parametrize("reduction", ["exact", "ddp"])
@pytest.mark.parametrize(("name", "tied"), [("lstm", False), ("gru", True)])
def test_training_is_the_example_s(name: str, tied: bool, reduction: str) -> None:
    tree = {
        "workload": "language_model",
        "data": {"name": "python_docs", "max_train_tokens": 700, "max_val_tokens": 300, "bptt": BPTT},
        "model": {"name": name, "emsize": 12, "nhid": 12, "nlayers": 2, "dropout": 0.0, "tied": tied},
        "batch_size": BATCH,
        "shards": 4,
        "epochs": 2,
        "lr": 2.0,
        "weight_decay": 0.0,
        "optimizer": {"momentum": 0.0, "clip": 0.25},
        "reduction": reduction,
        "scaling": {"lanes": 2},
    }
    config = parse(tree, ExperimentConfig, "test")
    workload = open_workload(config)
    session = Trainer(config, workload, WorkerGroup(), configure(config, torch.device("cpu"), 4, 1))
    plain = Example({"lstm": nn.LSTM, "gru": nn.GRU}[name], workload.model(), tied).double()
    optimizer = torch.optim.SGD(plain.parameters(), lr=2.0)
    text = torch.from_numpy(np.array(workload.data.train[:700])).long()  # type: ignore[attr-defined]
    columns = text.narrow(0, 0, 700 // BATCH * BATCH).view(BATCH, -1).t()
    hidden: Any = None
    steps = 0
    for event in session.train():
        if not isinstance(event, StepDone):
            continue
        if event.step == 1:
            hidden = None
        start = (event.step - 1) * BPTT
        window = columns[start : start + BPTT + 1]
        logits, hidden = plain(window[:-1], hidden)
        hidden = tuple(h.detach() for h in hidden) if isinstance(hidden, tuple) else hidden.detach()
        loss = F.cross_entropy(logits, window[1:].reshape(-1))
        assert event.loss == pytest.approx(loss.item(), rel=1e-5)
        assert event.count == (len(window) - 1) * BATCH
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.25)
        optimizer.step()
        steps += 1
    assert steps == 10
    found = session.master.tensors(0)
    torch.testing.assert_close(found["encoder.weight"].double(), plain.encoder.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["decoder.bias"].double(), plain.decoder.bias.detach(), rtol=1e-4, atol=1e-5)
    for layer in range(2):
        mine = found[f"body.layers.{layer}.weight_hh_l0"].double()
        torch.testing.assert_close(mine, getattr(plain.rnn, f"weight_hh_l{layer}").detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lstm", "rnn_tanh"])
def test_evaluation_carries_the_state_from_window_to_window(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """However long its windows are (the last may hold one row), it says the same of every token; a state that starts
    anew in every window says another."""
    tree = {
        "workload": "language_model",
        "data": {"name": "python_docs", "max_train_tokens": 500, "max_val_tokens": 290, "bptt": 7, "eval_columns": 4},
        "model": {"name": name, "emsize": 12, "nhid": 12, "nlayers": 2},
        "batch_size": BATCH,
        "shards": 2,
    }
    work = open_workload(parse(tree, ExperimentConfig, "test"))
    net = work.model().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)  # what is remembered matters
    found = []
    for tokens in (1, 40, 10**6):
        monkeypatch.setattr(language_model, "EVAL_TOKENS", tokens)
        with torch.inference_mode():
            found.append([work.predict(net, stream, torch.device("cpu"))["loss"] for stream in range(2)])
    for losses in found[:2]:
        np.testing.assert_allclose(losses, found[2], rtol=1e-4, atol=1e-5)
    begin = work.initial_state
    monkeypatch.setattr(language_model, "EVAL_TOKENS", 1)
    monkeypatch.setattr(work, "_window", lambda m, t, y, c: LanguageModel._window(work, m, t, y, begin(2, t.device)))
    with torch.inference_mode():
        anew = work.predict(net, 0, torch.device("cpu"))["loss"]
    assert not np.allclose(anew, found[2][0], rtol=1e-2)
