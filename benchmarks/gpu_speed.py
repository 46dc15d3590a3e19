"""The speed of gpu.py: steady steps beside both peers, and whole trainings by `rayexp train`."""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import images
import language
from bench import Bench
from table import Speed

from rayexp.config import load
from rayexp.launch import driver
from rayexp.runs.run import Run
from rayexp.system.cores import cores

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
WARM_UP = 10  # steps that are not counted: kernels are chosen, graphs captured
ANOTHER_S = 60.0  # what a second training of 20 epochs takes, with its start
WHOLE = 100_000  # images of Tiny-ImageNet; an accuracy is expected of all of them only


def speed(bench: Bench) -> None:
    """Both peers, then rayexp in this process by its ordinary launcher."""
    batch, steps = (16, 8) if bench.small else (256, 40)
    picture = {
        "data": {**bench.data, "max_train_samples": batch * steps, "max_val_samples": batch},
        "batch_size": batch,
        "lr": 0.01,
        "optimizer": {"nesterov": True, "decay_norm_and_bias": False},  # as configs/tiny_imagenet.yaml
        "epochs": 2 if bench.small else 3,
    }
    peers = {"images": peer(bench, "images", lambda: image_peer(bench, batch, steps))}
    tokens, words = default_lstm(bench)
    peers["tokens"] = peer(bench, "tokens", lambda: text_peer(bench, words, 60 if bench.small else 200))
    ddp = {"reduction": "ddp"}
    for what, tree, unit, least, aim, times in (
        ("resnet18 exact bf16", {**picture, "precision": "bf16"}, "images", 45_000, 60_000, 3),
        ("resnet18 ddp bf16", {**picture, **ddp, "precision": "bf16"}, "images", 60_000, 80_000, 3),
        ("resnet18 exact tf32", {**picture, "precision": "tf32"}, "images", 35_000, 45_000, 0),
        ("default LSTM exact tf32", tokens, "tokens", 130_000, 180_000, 1),
        ("default LSTM ddp tf32", {**tokens, **ddp}, "tokens", 250_000, 350_000, 1),
        # The last one, since nobody knows how long a compiler takes.
        ("resnet18 ddp bf16 compiled", {**picture, **ddp, "precision": "bf16", "compile": True}, "images",
         60_000, 80_000, 3),
    ):  # fmt: skip
        needed = Speed(0, 0, 0) if bench.small else Speed(least, aim, times)
        bench.attempt(what, functools.partial(rate, bench, what, tree, unit, peers[unit], needed))


def rate(bench: Bench, what: str, tree: Mapping[str, Any], unit: str, peer: float | None, needed: Speed) -> None:
    """Train, and say how fast that was."""
    run = driver.run(bench.parse(tree), argv=sys.argv)
    rate, capture = steady(run), run.meta().get("capture")
    met = rate >= needed.least and (peer is None or rate >= needed.times * peer)
    note = f"capture: {capture}" if capture else ""
    bench.say(what, rate, f"{unit}/s", ok=met, needed=str(needed), peer=peer, note=note)


def peer(bench: Bench, unit: str, measure: Callable[[], float | None]) -> float | None:
    """A peer's rate; None where it was not given, or failed."""

    def work() -> float | None:
        rate = measure()
        bench.say(f"the peer in {unit}", rate, f"{unit}/s", note="" if rate else "peer: not given")
        return rate

    return bench.attempt(f"the peer in {unit}", work)


def image_peer(bench: Bench, batch: int, steps: int) -> float | None:
    """imagenet/main.py at 64 px."""
    if bench.examples is None or bench.archive is None:
        return None
    jpegs = images.image_folder(bench.archive, bench.folder, batch * steps)
    rates = images.run_peer(images.peer_script(bench.examples, bench.folder), jpegs, batch, min(16, cores()))
    return statistics.median(rates[min(WARM_UP, len(rates) // 2) :])


def default_lstm(bench: Bench) -> tuple[dict[str, Any], Path | None]:
    """The default LSTM's configuration, and the folder with the peer's texts."""
    keys = [f"data.{name}={'null' if value is None else value}" for name, value in bench.text.items()]
    tree = load(CONFIGS / "wikitext2.yaml", keys).model_dump(mode="json")
    tree["data"] |= {"max_train_tokens": (40 if bench.small else 200) * 700, "max_val_tokens": 20_000}
    return {**tree, "precision": "tf32", "epochs": 2}, bench.text.get("root")


def text_peer(bench: Bench, root: Path | None, steps: int) -> float | None:
    """word_language_model/main.py with its defaults: 20 columns, 35 words."""
    if bench.examples is None or root is None:
        return None
    plain = bench.folder / "plain"
    plain.mkdir()
    for name, words in language.plain_text(Path(root)).items():
        (plain / f"{name}.txt").write_text(words, encoding="utf-8")
    device = ["--accel"] if bench.device.type == "cuda" else []
    return 20 * 35 / language.step_time(language.peer(bench.examples, plain, steps, 1111, device))


def recipe(bench: Bench) -> None:
    """The whole of a training by the command."""
    least = {"tiny_imagenet_fast": 57.5, "tiny_imagenet": 48.0}
    for name in ("quickstart",) if bench.small else tuple(least):
        if name == "tiny_imagenet" and bench.until - time.monotonic() < ANOTHER_S:
            bench.say(name, None, note="left out: no time for a second training")
            continue
        bench.attempt(name, lambda: say_recipe(bench, name, train(bench, name), least.get(name, 0.0)))  # noqa: B023


def train(bench: Bench, name: str) -> Run:
    """`rayexp train` of a configuration of this project; its finished run."""
    storage = bench.folder / name
    words = [f"data.{key}={value}" for key, value in bench.data.items()] + [f"storage_path={storage}"]
    if bench.small:
        words += ["batch_size=16", "data.max_train_samples=64", "data.max_val_samples=32"]
    command = [sys.executable, "-m", "rayexp", "train", str(CONFIGS / f"{name}.yaml"), *words]
    left = None if bench.small else max(30.0, bench.until - time.monotonic())
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=left)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    (run,) = Run.all(storage)
    return run


def say_recipe(bench: Bench, name: str, run: Run, least: float) -> None:
    """What a finished run tells."""
    records, data = run.records(), run.data()
    top1, whole = records[-1].metrics["acc1"], data["train_samples"] >= WHOLE
    bench.say(
        f"{name}, top-1 after {len(records)} epochs",
        top1,
        "%",
        ok=not whole or top1 >= least,
        needed=f"{least}" if whole else "",
        note=f"{steady(run):,.0f} images/s, {sum(r.seconds['total'] for r in records):.1f} s"
        + ("" if whole or bench.small else f"; {data['train_samples']:,} images are not all, so nothing is needed"),
    )
    images_each = 10_000 / data["val_samples"]
    evaluated = statistics.median(r.seconds["evaluate"] for r in records[1:] or records) * images_each
    started = float(run.meta()["startup_seconds"]["to_first_step"])
    for what, seconds, most, aim in (("evaluation of 10,000 images", evaluated, 0.3, ""),
                                     ("command to first step", started, 8.0, ", aim 6")):  # fmt: skip
        needed = "" if bench.small else f"at most {most:g}{aim}"
        bench.say(f"{name}, {what}", seconds, "s", ok=bench.small or seconds <= most, needed=needed)


def steady(run: Run) -> float:
    """Samples per second: the median over the steps of a run without the first ones."""
    rates = [count / total for line in run.steps() for count, total in zip(line["count"], line["total"], strict=True)]
    return statistics.median(rates[min(WARM_UP, len(rates) // 2) :])
