"""The workload language_model: how the text is cut and evaluated, the state, the models, and wrong options."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayexp.config import ExperimentConfig, parse
from rayexp.engine.rng import Draws, adopt, seeded
from rayexp.errors import UserError
from rayexp.runs.tensorboard import graph_events
from rayexp.workloads import open_workload
from rayexp.workloads.language_model.recurrent import RecurrentOptions
from rayexp.workloads.language_model.workload import LanguageModel

CPU = torch.device("cpu")
RECURRENT = ("rnn_tanh", "rnn_relu", "lstm", "gru")
SMALL = {"emsize": 16, "nhid": 16, "nlayers": 2, "dropout": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    **{name: {"name": name, **SMALL} for name in RECURRENT},
    "lstm tied": {"name": "lstm", **SMALL, "tied": True},
    "transformer": {"name": "transformer", **SMALL, "nhead": 2},
    "transformer context": {"name": "transformer", **SMALL, "nhead": 2, "context": 7, "tied": False},
}


def make(model: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **top: Any) -> LanguageModel:
    tree = {
        "workload": "language_model",
        "data": {"name": "python_docs", "bptt": 10, "max_train_tokens": 1003, "max_val_tokens": 505, **(data or {})},
        "model": model or MODELS["lstm"],
        "batch_size": 8,
        "shards": 4,
        **top,
    }
    workload = open_workload(parse(tree, ExperimentConfig, "test"))
    assert isinstance(workload, LanguageModel)
    return workload


def logits(net: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return net.eval()(tokens)[0]


# ---------------------------------------------------------------------- the cut


def test_windows_are_those_of_the_example() -> None:
    """batchify and get_batch of pytorch/examples word_language_model, written out."""
    work = make()
    text = torch.from_numpy(np.array(work.data.train[:1003])).long()
    columns = text.narrow(0, 0, 1003 // 8 * 8).view(8, -1).t().contiguous()
    starts = range(0, len(columns) - 1, 10)
    assert work.steps() == len(starts) == 13
    for step, i in enumerate(starts):
        length = min(10, len(columns) - 1 - i)
        batch = work.batch(1, step, range(4), CPU)
        assert torch.equal(batch.inputs[0], columns[i : i + length])
        assert torch.equal(batch.targets, columns[i + 1 : i + 1 + length].reshape(-1))
        assert batch.count == length * 8
        assert batch.sizes == (2, 2, 2, 2)
    assert length == 4  # the last window is shorter


def test_shards_are_neighbouring_columns_whoever_asks() -> None:
    work = make()
    whole = work.batch(1, 3, range(4), CPU)
    parts = [work.batch(2, 3, range(s, s + 1), CPU) for s in range(4)]  # every epoch reads the same text
    assert torch.equal(whole.inputs[0], torch.cat([p.inputs[0] for p in parts], 1))
    assert torch.equal(whole.targets.view(10, 8), torch.cat([p.targets.view(10, 2) for p in parts], 1))
    assert sum(p.count for p in parts) == whole.count


@pytest.mark.parametrize("name", MODELS)
def test_a_shard_has_the_same_loss_alone_and_among_others(name: str) -> None:
    work = make(MODELS[name])
    net = work.model().eval()
    whole, _ = work.loss(net, work.batch(1, 0, range(4), CPU), work.initial_state(8, CPU))
    parts = [work.loss(net, work.batch(1, 0, range(s, s + 1), CPU), work.initial_state(2, CPU))[0] for s in range(4)]
    assert whole.item() == pytest.approx(sum(p.item() for p in parts), rel=1e-6)


@pytest.mark.parametrize("name", [*RECURRENT, "lstm tied"])
def test_the_hidden_state_goes_from_window_to_window(name: str) -> None:
    short, long = make(MODELS[name]), make(MODELS[name], {"bptt": 20})
    net = short.model().eval()
    state = short.initial_state(2, CPU)
    total = 0.0
    for step in range(2):
        loss, state = short.loss(net, short.batch(1, step, range(1), CPU), state)
        total += loss.item()
        assert not any(tensor.requires_grad for tensor in state.values())
    whole, after = long.loss(net, long.batch(1, 0, range(1), CPU), long.initial_state(2, CPU))
    assert total == pytest.approx(whole.item(), rel=1e-5)
    assert state.keys() == after.keys() == ({"h", "c"} if "lstm" in name else {"h"})
    for part, tensor in state.items():
        assert tensor.shape == (2, 2, 16)
        torch.testing.assert_close(tensor, after[part], rtol=1e-4, atol=1e-5)
    alone, _ = short.loss(net, short.batch(1, 1, range(1), CPU), short.initial_state(2, CPU))
    assert abs(total - whole.item()) < abs(alone.item() + total - loss.item() - whole.item())


def test_the_order_of_a_restored_state_does_not_matter() -> None:
    work = make()
    net = work.model().eval()
    _, state = work.loss(net, work.batch(1, 0, range(1), CPU), work.initial_state(2, CPU))
    batch = work.batch(1, 1, range(1), CPU)
    turned = dict(sorted(state.items()))
    assert list(turned) != list(state)
    assert torch.equal(work.loss(net, batch, state)[0], work.loss(net, batch, turned)[0])


def test_the_context_of_a_transformer_is_the_words_before_the_window() -> None:
    work = make(MODELS["transformer context"])
    net = work.model().eval()
    eos = work.data.vocabulary.index("<eos>")
    state = work.initial_state(2, CPU)
    assert (state["tokens"] == eos).all()
    seen = state["tokens"]
    for step in range(3):
        batch = work.batch(1, step, range(1), CPU)
        seen = torch.cat([seen, batch.inputs[0]])[-17:]
        found, state = work.loss(net, batch, state)
        wanted = F.cross_entropy(logits(net, seen)[-10:].flatten(0, 1), batch.targets, reduction="sum")
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert torch.equal(state["tokens"], seen[-7:])


def test_touched_rows_are_those_with_a_gradient() -> None:
    work = make()
    net = work.model().train()
    for step in (0, 12):
        net.zero_grad()
        work.loss(net, work.batch(1, step, range(4), CPU), work.initial_state(8, CPU))[0].backward()
        rows = work.touched_rows(1, step)["encoder.weight"]
        assert np.array_equal(rows, net.encoder.weight.grad.abs().sum(1).nonzero()[:, 0].numpy())
    assert make(MODELS["lstm tied"]).touched_rows(1, 0) == {}


# ---------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_the_loss_of_every_token_is_predicted_once(name: str) -> None:
    work = make(MODELS[name], {"eval_columns": 7})
    net = work.model().eval()
    with torch.inference_mode():
        found = work.predictions([work.predict(net, s, CPU) for s in range(work.val_streams())])
    length = 505 // 7
    wanted = [column * length + row for column in range(7) for row in range(1, length)]
    assert found["offset"].tolist() == wanted
    assert found["offset"].dtype == np.int64
    assert found["token"].dtype == np.int32
    assert found["loss"].dtype == np.float32
    text = np.array(work.data.valid)
    assert np.array_equal(found["token"], text[found["offset"]])
    # Each column in one go, with the whole logits.
    columns = torch.from_numpy(text[: length * 7].reshape(7, length).T.astype(np.int64))
    true = F.cross_entropy(logits(net, columns[:-1]).flatten(0, 1), columns[1:].reshape(-1), reduction="none")
    np.testing.assert_allclose(found["loss"], true.view(length - 1, 7).t().reshape(-1).numpy(), rtol=1e-4, atol=1e-5)
    metrics = work.metrics(found)
    assert metrics["val_loss"] == pytest.approx(float(true.double().mean()), rel=1e-6)
    assert metrics["ppl"] == pytest.approx(math.exp(metrics["val_loss"]))


@pytest.mark.parametrize("name", ["lstm", "transformer", "transformer context"])
def test_the_streams_do_not_change_the_predictions(name: str) -> None:
    results = []
    for shards in (1, 4, 8):
        work = make(MODELS[name], shards=shards)
        net = work.model().eval()
        with torch.inference_mode():
            results.append(work.predictions([work.predict(net, s, CPU) for s in range(work.val_streams())]))
    for other in results[1:]:
        assert np.array_equal(other["offset"], results[0]["offset"])
        np.testing.assert_allclose(other["loss"], results[0]["loss"], rtol=1e-4, atol=1e-5)
        assert other.data_sha == results[0].data_sha


def test_the_data_sha_names_what_is_evaluated() -> None:
    base = make()
    assert make(seed=5).val_sha == base.val_sha == base.describe()["val_sha"]
    others = [make(data={"max_val_tokens": 400}), make(data={"eval_columns": 5})]
    assert len({base.val_sha, *(other.val_sha for other in others)}) == 3


def test_test_metrics_read_the_test_text() -> None:
    work = make()
    net = work.model().eval()
    with torch.no_grad():
        net.decoder.bias.zero_()
        net.decoder.weight.zero_()
    found = work.test_metrics(net, CPU)
    assert found["test_ppl"] == pytest.approx(len(work.data.vocabulary), rel=1e-5)
    assert found["test_loss"] == pytest.approx(math.log(len(work.data.vocabulary)), rel=1e-6)


# ---------------------------------------------------------------------- the models


def test_initialisation_is_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = make(seed=3).model().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two, three = make(seed=3).model().state_dict(), make(seed=4).model().state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["encoder.weight"], three["encoder.weight"])
    assert not torch.equal(one["encoder.weight"], one["decoder.weight"])


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_initialised_in_its_range(name: str) -> None:
    net = make(MODELS[name]).model()
    for key, parameter in net.named_parameters():
        assert parameter.isfinite().all(), key
        if key == "decoder.bias":
            assert not parameter.any()
        elif "norm" in key:
            assert (parameter == 1).all()
        else:
            wide = 0.1 if name != key and key in ("encoder.weight", "decoder.weight") else 0.25
            assert 0 < parameter.abs().max() <= wide, key
            assert parameter.mean().abs() < parameter.std(), key


def test_the_lstm_equals_pytorchs_stack() -> None:
    work = make()
    net = work.model().eval()
    whole = nn.LSTM(16, 16, 2)
    with torch.no_grad():
        for layer in range(2):
            for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(whole, f"{part}_l{layer}").copy_(getattr(net.body.layers[layer], f"{part}_l0"))
    tokens = work.batch(1, 0, range(4), CPU).inputs[0]
    with torch.no_grad():
        wanted = F.linear(whole(F.embedding(tokens, net.encoder.weight))[0], net.decoder.weight, net.decoder.bias)
    torch.testing.assert_close(logits(net, tokens), wanted, rtol=1e-4, atol=1e-5)


def test_a_tied_model_has_one_matrix_of_words() -> None:
    untied, tied = (make(MODELS[name]).model() for name in ("lstm", "lstm tied"))
    words = len(make().data.vocabulary)
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"decoder.weight"}
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 16 * words


@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns(name: str) -> None:
    work = make({**MODELS[name], "dropout": 0.1})
    net = work.model().train()
    draws = Draws()
    adopt(net, draws, work.batch_dim)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    state, losses = work.initial_state(8, CPU), []
    for step in range(12):
        batch = work.batch(1, step, range(4), CPU)
        draws.begin(seeded([step * 4 + s for s in range(4)], CPU), batch.sizes)
        loss, state = work.loss(net, batch, state)
        optimizer.zero_grad()
        (loss / batch.count).backward()
        assert all(p.grad is not None and p.grad.any() for p in net.parameters())
        optimizer.step()
        losses.append(loss.item() / batch.count)
    assert losses[0] == pytest.approx(math.log(len(work.data.vocabulary)), abs=0.3)
    assert losses[-1] < losses[0] - 1


def test_dropout_comes_from_the_given_draws_alone() -> None:
    work = make({**MODELS["lstm"], "dropout": 0.5})
    net = work.model().train()
    draws = Draws()
    adopt(net, draws, work.batch_dim)

    def loss(keys: list[int]) -> float:
        batch = work.batch(1, 0, range(4), CPU)
        draws.begin(seeded(keys, CPU), batch.sizes)
        return work.loss(net, batch, work.initial_state(8, CPU))[0].item()

    torch.manual_seed(0)
    first = loss([1, 2, 3, 4])
    torch.manual_seed(9)
    assert loss([1, 2, 3, 4]) == first
    assert loss([1, 2, 3, 5]) != first


@pytest.mark.parametrize("name", MODELS)
def test_no_position_sees_the_future(name: str) -> None:
    net = make(MODELS[name]).model()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 100, (9, 2)))
    base = logits(net, tokens)
    for t in (1, 4, 8):
        changed = tokens.clone()
        changed[t] += 1
        other = logits(net, changed)
        assert torch.equal(other[:t], base[:t])
        assert not torch.allclose(other[t], base[t])
        assert not torch.allclose(other[8], base[8])  # and the past is seen


@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_flows_back_from_the_future(name: str) -> None:
    net = make(MODELS[name]).model().double()
    x = torch.randn(9, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = net.body(x)[0]
    for t in (0, 3, 8):
        (grad,) = torch.autograd.grad(out[t].sum(), x, retain_graph=True)
        assert not grad[t + 1 :].any()
        assert all(grad[s].any() for s in range(t + 1))


@pytest.mark.parametrize("name", MODELS)
def test_word_by_word_says_what_the_whole_says(name: str) -> None:
    net = make(MODELS[name]).model().eval()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 100, (10, 2)))
    whole = logits(net, tokens)
    state = net.body.begin(2, CPU)
    with torch.no_grad():
        for part in (tokens[:1], tokens[1:5], tokens[5:6], tokens[6:]):  # several at once after a cache, too
            found, state = net.advance(part, state)
            end = int((tokens == part[-1]).all(1).nonzero()[-1])
            torch.testing.assert_close(found, whole[end], rtol=1e-4, atol=1e-5)


def test_the_cache_of_a_transformer_does_not_grow_beyond_its_span() -> None:
    net = make(MODELS["transformer context"]).model().eval()
    state = net.body.begin(1, CPU)
    with torch.no_grad():
        for word in range(40):
            found, state = net.advance(torch.tensor([[word]]), state)
    assert all(part.shape[2] == 17 for part in state)
    assert found.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_tensorboard_can_draw_the_model(name: str) -> None:
    work = make(MODELS[name])
    graph, _ = graph_events(work.model().eval(), work.example())
    assert b"decoder" in graph
    assert b"encoder" in graph


def test_a_model_that_cannot_be_drawn_has_no_graph(capfd: pytest.CaptureFixture[str]) -> None:
    events, why = graph_events(torch.nn.Linear(2, 3), (torch.zeros(1, 5),))
    assert events == b""
    assert why.startswith("RuntimeError: ")
    assert "mat1 and mat2 shapes cannot be multiplied" in why
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"name": "lstmm"}}, "model.name: unknown model 'lstmm' (did you mean lstm?)"),
        ({"model": {"name": "nets.Net"}}, "did you mean ./nets.py:Net or nets:Net?); allowed: rnn_tanh, "),
        ({"model": {"name": "lstm", "nhidden": 3}}, "unknown key model.nhidden (did you mean nhid?)"),
        ({"model": {"name": "lstm", "nhead": 2}}, "unknown key model.nhead"),
        ({"model": {"name": "gru", "dropout": 1.0}}, "model.dropout"),
        ({"model": {"name": "gru", "nlayers": 0}}, "model.nlayers"),
        ({"model": {"name": "gru", "tied": True, "nhid": 32}}, "model.tied: needs nhid = emsize"),
        ({"model": {"name": "transformer", "emsize": 30, "nhead": 4}}, "nhead"),
        ({"data": {"name": "shapes"}}, "data.name: language_model reads"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"batch_size": 400}, "need 4,400 training tokens, there are 1,003"),
        ({"data": {"name": "python_docs", "eval_columns": 300, "max_val_tokens": 505}}, "data.eval_columns"),
    ],
)
def test_wrong_input_is_named_in_one_line(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        make(**change)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_defaults_are_those_of_pytorch_examples() -> None:
    """word_language_model/main.py: --emsize 200 --nhid 200 --nlayers 2 --dropout 0.2, not --tied."""
    assert RecurrentOptions().model_dump() == {"emsize": 200, "nhid": 200, "nlayers": 2, "dropout": 0.2, "tied": False}
