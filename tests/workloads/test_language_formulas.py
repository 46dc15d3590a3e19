"""The transformer written out from its papers in NumPy, and where dropout lies in all language models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayexp.config import ExperimentConfig, parse
from rayexp.engine.rng import Draws, Dropout, adopt, seeded
from rayexp.workloads import open_workload
from rayexp.workloads.language_model import transformer as rotating

Floats = NDArray[np.float64]
EPS = float(np.finfo(np.float64).eps)  # RMSNorm's own, for float64
SIZE, HEADS = 16, 2


def net(model: dict[str, Any]) -> Any:
    tree = {
        "workload": "language_model",
        "data": {"name": "python_docs", "max_train_tokens": 500, "max_val_tokens": 300, "bptt": 10},
        "model": model,
        "batch_size": 8,
        "shards": 4,
    }
    return open_workload(parse(tree, ExperimentConfig, "test")).model()


def rms_norm(x: Floats, scale: Floats) -> Floats:
    """Zhang and Sennrich 2019."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * scale


def rotate(x: Floats) -> Floats:
    """Su et al. 2021 over [time, size]: pairs (i, i + size / 2) turn by time * 10000^(-2i / size)."""
    half = x.shape[1] // 2
    angle = np.arange(len(x))[:, None] * 10_000.0 ** (-2 * np.arange(half) / x.shape[1])
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], 1)


def softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def transformer(weights: dict[str, Floats], tokens: NDArray[np.int64], blocks: int) -> Floats:
    """Logits [time, words] of one column."""
    x = weights["encoder.weight"][tokens]
    time, head = len(tokens), SIZE // HEADS
    future = np.triu(np.full((time, time), -np.inf), 1)
    for block in range(blocks):
        w = {n.removeprefix(f"body.blocks.{block}."): v for n, v in weights.items() if f"blocks.{block}." in n}
        query, key, value = np.split(rms_norm(x, w["attention_norm.weight"]) @ w["attention_in.weight"].T, 3, 1)
        outs = []
        for i in range(HEADS):
            part = slice(i * head, (i + 1) * head)
            scores = rotate(query[:, part]) @ rotate(key[:, part]).T / np.sqrt(head)
            outs.append(softmax(scores + future) @ value[:, part])
        x = x + np.concatenate(outs, 1) @ w["attention_out.weight"].T
        gate, up = np.split(rms_norm(x, w["forward_norm.weight"]) @ w["up.weight"].T, 2, 1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["down.weight"].T  # SwiGLU: Shazeer 2020
    x = rms_norm(x, weights["body.norm.weight"])
    return x @ weights.get("decoder.weight", weights["encoder.weight"]).T + weights["decoder.bias"]


@pytest.mark.parametrize("tied", [True, False])
def test_the_transformer_is_the_papers(tied: bool) -> None:
    options = {"emsize": SIZE, "nhid": 24, "nlayers": 3, "nhead": HEADS, "dropout": 0.3, "tied": tied}
    model = net({"name": "transformer", **options}).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # far from where it starts, so that every part has its say
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        tokens = torch.randint(100, (9, 2), generator=generator)
        found = model(tokens)[0].numpy()
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for column in range(2):
        wanted = transformer(weights, tokens[:, column].numpy(), 3)
        np.testing.assert_allclose(found[:, column], wanted, rtol=1e-5, atol=1e-6)  # angles are float32


@pytest.mark.parametrize(("name", "count"), [("lstm", 4), ("gru", 4), ("transformer", 8)])
def test_dropout_lies_on_words_between_parts_and_on_the_output(
    monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    """Recurrent, as in word_language_model: words, between layers, output. Transformer: words, both parts of every
    block, output."""
    extra = {"nhead": 2} if name == "transformer" else {}
    model = net({"name": name, "emsize": 16, "nhid": 24, "nlayers": 3, "dropout": 0.25, **extra}).train()
    draws = Draws()
    adopt(model, draws, 1)
    seen: list[tuple[Dropout, Tensor, Tensor]] = []
    forward = Dropout.forward

    def spy(self: Dropout, x: Tensor) -> Tensor:
        out = forward(self, x)
        seen.append((self, x, out))
        return out

    monkeypatch.setattr(Dropout, "forward", spy)
    into: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda module, words: into.append(words[0]))
    tokens = torch.randint(100, (5, 4), generator=torch.Generator().manual_seed(0))
    draws.begin(seeded([1, 2], torch.device("cpu")), [2, 2])
    model(tokens, torch.zeros(20, dtype=torch.int64))
    assert len(seen) == count
    assert all(module.p == 0.25 and module.dim == 1 for module, _, _ in seen)
    assert torch.equal(seen[0][1], model.encoder.weight[tokens])
    assert into[0] is seen[-1][2]
    inner = {x.shape[-1] for _, x, _ in seen[1:-1]}
    assert inner == ({16} if name == "transformer" else {24})


def test_rotation_knows_distances_only() -> None:
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 8, generator=g, dtype=torch.float64)
    turn = rotating.rotation(50, 8, torch.device("cpu")).double()

    def turned(x: Tensor, at: int) -> Tensor:
        return rotating.rotate(x[None], turn[:, at : at + 1])

    def score(i: int, j: int) -> float:
        return float(turned(query, i) @ turned(key, j).t())

    assert score(7, 3) == pytest.approx(score(44, 40), abs=1e-5)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)
    assert score(0, 0) == pytest.approx(float(query @ key), abs=1e-6)
