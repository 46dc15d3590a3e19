"""generate: reproducible, nothing recomputed, unknown words said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayexp.config import ExperimentConfig, parse
from rayexp.engine import order
from rayexp.engine.checkpoint import State, encode
from rayexp.errors import RunError, UserError
from rayexp.runs.run import Run
from rayexp.system.disk import write_directory, write_json
from rayexp.workloads import open_workload
from rayexp.workloads.language_model.generate import choose, generate, lines, open_generator, read_prompt

SMALL = {"emsize": 16, "nhid": 16, "nlayers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "lstm": {"name": "lstm", **SMALL},
    "gru tied": {"name": "gru", **SMALL, "tied": True},
    "transformer": {"name": "transformer", **SMALL, "nhead": 2},
}


@pytest.fixture
def make_run(tmp_path: Path):
    """A run with one checkpoint, whose weights are made larger so that words are far from equally likely."""

    def make(model: dict[str, Any], data: dict[str, Any] | None = None) -> Run:
        tree = {
            "workload": "language_model",
            "data": {"name": "python_docs", "bptt": 10, **(data or {})},
            "model": model,
            "storage_path": str(tmp_path / "runs"),
        }
        config = parse(tree, ExperimentConfig, "test")
        work = open_workload(config)
        tensors = {f"model.{name}": tensor * 8 for name, tensor in work.model().state_dict().items()}
        run = Run.create(config, argv=[])
        write_json(run.data_path, {"kind": work.kind, **work.describe()})
        write_directory(run.checkpoint(1), encode(State({"epoch": 1, "step": 1}, tensors)))
        return run

    threads = torch.get_num_threads()
    yield make
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", MODELS)
def test_every_word_follows_from_all_words_before_it(make_run, name: str) -> None:
    """Against a model that reads the whole text anew for each word."""
    writer = open_generator(make_run(MODELS[name]), 1)
    start = [5, 7, 9]
    found = list(generate(writer.net, start, 7, seed=3))
    seen = list(start)
    for word in generate(writer.net, start, 7, seed=3):
        with torch.no_grad():
            logits = writer.net(torch.tensor(seen)[:, None])[0][-1, 0].double().numpy()
        draw = order.uniform(order.key(3, "generate"), np.array([len(seen) - 3]), 1)[0, 0]
        assert word == choose(logits, draw)
        seen.append(word)
    assert seen[3:] == found


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_is_a_text(make_run, name: str) -> None:
    run = make_run(MODELS[name])
    writer = open_generator(run, 1)
    torch.manual_seed(0)
    first = list(generate(writer.net, [1], 60, seed=1))
    torch.manual_seed(7)
    assert list(generate(open_generator(run, 1).net, [1], 60, seed=1)) == first
    assert list(generate(writer.net, [1], 30, seed=1)) == first[:30]
    assert list(generate(writer.net, [1], 60, seed=2)) != first
    assert len(set(first)) > 10


def test_temperature_and_top_k(make_run) -> None:
    net = open_generator(make_run(MODELS["lstm"]), 1).net
    greedy = list(generate(net, [1], 20, temperature=0))
    assert list(generate(net, [1], 20, temperature=0, seed=9)) == greedy
    assert list(generate(net, [1], 20, top_k=1, seed=4)) == greedy
    assert list(generate(net, [1], 20, temperature=1e-6, seed=4)) == greedy
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="temperature"):
            list(generate(net, [1], 1, temperature=wrong))


def test_a_model_generates_in_evaluation_mode(make_run) -> None:
    assert not any(
        module.training for module in open_generator(make_run({**MODELS["lstm"], "dropout": 0.5}), 1).net.modules()
    )


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20), st.floats(0, 1, exclude_max=True), st.integers(1, 25))
def test_only_the_k_likeliest_can_come(logits: list[float], draw: float, k: int) -> None:
    values = np.array(logits)
    word = choose(values, draw, top_k=k)
    assert (values > values[word]).sum() < k


def test_words_come_as_often_as_the_model_says() -> None:
    logits = np.log(np.array([0.1, 0.0001, 0.6, 0.2999]))
    draws = (np.arange(10_000) + 0.5) / 10_000
    counts = np.bincount([choose(logits, d) for d in draws], minlength=4)
    assert counts.tolist() == [1000, 1, 6000, 2999]
    colder = np.bincount([choose(logits, d, temperature=0.5) for d in draws], minlength=4) / 10_000
    squares = np.exp(2 * logits) / np.exp(2 * logits).sum()
    np.testing.assert_allclose(colder, squares, atol=2e-4)


def test_unknown_words_of_a_prompt_are_told(make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = open_generator(make_run(MODELS["lstm"]), 1)
    numbers, unknown = read_prompt("The zorgle, is", writer)
    assert unknown == ["zorgle"]
    assert [writer.vocabulary[n] for n in numbers] == ["The", "<unk>", ",", "is"]
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text("a b , c\n" * 2000)
    monkeypatch.setenv("RAYEXP_CACHE", str(tmp_path / "cache"))
    writer = open_generator(make_run(MODELS["lstm"], {"name": "text", "root": str(tmp_path)}), 1)
    # Other texts are split at white space only.
    assert read_prompt("a b, c", writer)[1] == ["b,"]
    assert read_prompt("", writer) == ([], [])


def test_lines() -> None:
    assert lines(["a", "b", "<eos>", "c"]) == "a b\nc\n"
    assert lines(["<eos>", "a", "<eos>", "<eos>", "b", "<eos>"]) == "\na\n\nb\n\n"


def test_wrong_runs_are_named(make_run, tmp_path: Path) -> None:
    run = make_run(MODELS["lstm"])
    with pytest.raises(UserError, match="no checkpoint"):
        open_generator(run, 2)
    state = run.checkpoint(1) / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-5])
    with pytest.raises(RunError, match="damaged"):
        open_generator(run, 1)
    images = Run.create(parse({"storage_path": str(tmp_path / "r")}, ExperimentConfig, "test"), argv=[])
    with pytest.raises(UserError, match="needs a language_model"):
        open_generator(images, 1)


def test_the_command(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from rayexp.cli import main

    run = make_run(MODELS["lstm"])

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rayexp", "generate", *args, "--runs", str(run.root.parent)])
        with pytest.raises(SystemExit) as done:
            main()
        told = capsys.readouterr()
        return int(done.value.code or 0), told.out, told.err

    out = tmp_path / "generated.txt"
    code, text, said = call(f"{run.id}@last", "--words", "40", "--prompt", "The zorgle", "--seed", "2")
    assert code == 0
    assert text.startswith("The <unk> ")
    assert "zorgle" in said
    assert len(text.replace("\n", " <eos> ").split()) == 43  # and the text's own last line end
    assert call(f"{run.id}@1", "--words", "40", "--prompt", "The zorgle", "--seed", "2", "--out", str(out))[:2] == (
        0,
        "",
    )
    assert out.read_text() == text
    with monkeypatch.context() as terminal:
        terminal.setattr(type(sys.stdout), "isatty", lambda stream: True)
        terminal.setenv("COLUMNS", "30")
        shown = call(f"{run.id}@last", "--words", "40", "--prompt", "The zorgle", "--seed", "2")[1]
    assert shown.split() == text.split()
    assert max(map(len, shown.splitlines())) <= 30
    assert call(f"{run.id}@7")[0] == 2
    assert call(run.id, "--temperature", "-1")[0] == 2
    assert call(run.id, "--words", "0")[0] == 2
