"""What every worker does, wherever it runs: open the data, take up the newest state, train, and let rank 0 write.

What comes in is plain JSON:
    run        absolute path of the run directory (on the driver's host)
    config     the resolved configuration
    device     "cpu" or "cuda"
    cpus       cores this worker may use (null: all it can see)
    started    when the command began (clock.mark)
    max_steps  stop after that many steps of the whole run (null: train to the end)
    trace      whether to hash every tensor after every step (for `rayexp verify`)
    measure_link  whether to time bare all-reductions before training (for `rayexp compare`)
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import json
import os
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rayexp import workloads
from rayexp.config import ExperimentConfig, parse
from rayexp.engine import checkpoint, link, place
from rayexp.engine.checkpoint import TENSORS, WORDS, State, Writer
from rayexp.engine.group import Group
from rayexp.engine.loop import EpochDone, Session, StepDone
from rayexp.engine.step import Wish
from rayexp.errors import UserError
from rayexp.recorder import Recorder

PROGRESS_SECONDS = 0.3


def work(
    payload: Mapping[str, Any], group: Group, pen: Recorder, device: torch.device, world_size: int | None = None
) -> str:
    """Train as one worker of the group; returns `done` or `stopped`.

    Args:
        payload: see the head of this file.
        group: the workers; this one's rank is in it.
        pen: only rank 0 writes with it; every rank logs. Anything with a Recorder's methods will do.
        device: where this worker computes.
        world_size: what records say (0: in-process); None: the group's size.

    Raises:
        UserError: the configuration or the data is wrong.
        RunError: training cannot go on.
    """
    try:
        return _Worker(payload, group, pen, device, world_size).run()
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise UserError(
            f"reduction: exact takes deterministic operations only, and {operation} has no such kernel for "
            f"{device.type}; allowed with this model: ddp"
        ) from error


class _Worker:
    def __init__(
        self, payload: Mapping[str, Any], group: Group, pen: Recorder, device: torch.device, world_size: int | None
    ) -> None:
        self.entered = time.monotonic()
        self.payload, self.group, self.pen = payload, group, pen
        self.config = parse(payload["config"], ExperimentConfig, "config")
        self.world_size = group.world if world_size is None else world_size
        self.lead = group.rank == 0
        shards = self.config.shards // group.world
        self.place = place.settle(self.config, device, shards, payload.get("cpus"))
        self.workload = workloads.open_workload(self.config)
        self.described = self.workload.describe()
        self.session = Session(self.config, self.workload, group, self.place)
        self.writer = Writer()
        self.buffers: dict[str, torch.Tensor] = {}
        self.steps: list[StepDone] = []  # of the present epoch
        self.energy: dict[str, float] = {}
        self.warnings: list[str] = []
        self.saved = self.told = time.monotonic()

    def run(self) -> str:
        where = f"{self.place.device}, {self.place.lanes} lanes, pid {os.getpid()} on {socket.gethostname()}"
        self._log(f"rank {self.group.rank} of {self.group.world}: {where}")
        if self.lead and self.config.precision == "bf16" and not self.place.has_bf16():
            self._warn("precision: this processor has no instructions for bf16; fp32 is many times as fast here")
        self._resume()
        measured = None
        if self.payload.get("measure_link") and self.group.world > 1:
            measured = link.measure(self.group, self.place, self.session.stepper.exchange_bytes)
        if self.lead:
            self._begin(measured)
        status = "done"
        self.energy = self._energy()
        try:
            for event in self.session.train(self._wish):
                if isinstance(event, EpochDone):
                    self._epoch(event)
                else:
                    self._step(event)
                    if event.stopped:
                        status = "stopped"
            self.writer.wait()
        finally:
            with contextlib.suppress(*([Exception] if sys.exc_info()[0] else [])):
                self.writer.close()
        if self.lead:
            self.pen.end(status)
        return status

    # ------------------------------------------------------------------ beginning

    def _resume(self) -> None:
        files: dict[str, bytes] | None = None
        if self.lead:
            files, notes = self.pen.resume()
            for note in notes:
                self._log(note)
        words = self.group.broadcast(files[WORDS] if files else b"")
        if not words:
            return
        tensors = self.group.broadcast(files[TENSORS] if files else None)
        state = checkpoint.decode({WORDS: words, TENSORS: tensors})
        self.session.load(state)
        self._log(f"resumed at epoch {self.session.epoch + 1}, step {self.session.step}")
        self._same_data(state.words.get("data"))
        then, now = state.words.get("fingerprint"), self.place.fingerprint()
        if self.lead and then and then != now:
            keys = [k for k in {**then, **now} if then.get(k) != now.get(k)]
            differs = ", ".join(f"{k} {then.get(k)} -> {now.get(k)}" for k in keys)
            self._warn(f"resumed under another fingerprint: {differs}; the bits may differ from here on")

    def _warn(self, warning: str) -> None:
        self._log(warning)
        self.warnings.append(warning)
        self._tell({})

    def _tell(self, progress: dict[str, Any]) -> None:
        # Warnings every time: a driver looks when it looks.
        self.pen.progress(progress | ({"warning": "; ".join(self.warnings)} if self.warnings else {}))

    def _same_data(self, then: Mapping[str, str] | None) -> None:
        now = self._words()["data"]
        if then is not None and then != now:
            differs = ", ".join(f"{k} {str(then.get(k))[:12]} -> {now[k][:12]}" for k in now if then.get(k) != now[k])
            raise UserError(
                f"data: {self.config.data.root or self.config.data.name} does not hold the data of this run ({differs})"
            )

    def _begin(self, measured: Mapping[str, float] | None) -> None:
        described = self.described
        layout = self.session.layout
        meta = {
            "status": "running",
            "world_size": self.world_size,
            "device": str(self.place.device.type),
            "lanes": self.place.lanes,
            "fingerprint": self.place.fingerprint(),
            "parameters": sum(slot.size for slot in layout.params),
            "exchange_bytes": self.session.stepper.exchange_bytes,
            "link": measured,
            "steps_per_epoch": self.session.steps,
            "data": {k: v for k, v in described.items() if not isinstance(v, list)},
        }
        self.pen.begin(meta, described)

    # ------------------------------------------------------------------ while it runs

    def _wish(self) -> Wish:
        last = self.payload.get("max_steps")
        stop = last is not None and self.session.global_step + 1 >= last
        if not self.lead:
            return Wish(stop, False)
        now, c = time.monotonic(), self.config.checkpoint
        save = c.every_seconds is not None and now - self.saved >= c.every_seconds and self.writer.idle()
        return Wish(stop or self.pen.stop_requested(), save)

    def _step(self, event: StepDone) -> None:
        if event.first and self.lead:
            self.pen.first_step(self.payload.get("started"), time.monotonic() - self.entered)
        if self.payload.get("trace"):
            self._trace(event)  # before the snapshot: a step that is saved is not done again
        every = self.config.checkpoint.every_steps
        due = event.save or (every is not None and self.session.global_step % every == 0)
        if event.stopped or (due and event.step < event.steps):
            self._snapshot()
        if not self.lead:
            return
        self.steps.append(event)
        now = time.monotonic()
        if now - self.told >= PROGRESS_SECONDS or event.step == event.steps:
            self.told = now
            self._tell(
                {
                    "epoch": event.epoch,
                    "epochs": self.config.epochs,
                    "step": event.step,
                    "steps": event.steps,
                    "loss": event.loss,
                    "rate": event.rate,
                    "unit": self.workload.unit,
                }
            )

    def _trace(self, event: StepDone) -> None:
        state = self.session.state()  # every worker must call it: each has the carried state of its own shards
        if self.lead:
            hashes = {name: checkpoint.sha({name: tensor}) for name, tensor in state.tensors.items()}
            weights, step = checkpoint.sha(state.weights()), self.session.global_step
            self.pen.trace({"step": step, "weights_sha": weights, "tensors": hashes, "rate": event.rate})

    def _snapshot(self) -> None:
        state = self.session.state()
        self.saved = time.monotonic()
        if self.lead:
            held = self._hold(state)
            step = self.session.global_step
            self.writer.submit(lambda: self.pen.snapshot(step, checkpoint.encode(held, self._words())))

    def _epoch(self, event: EpochDone) -> None:
        start = time.perf_counter()
        then, self.energy = self.energy, self._energy()
        if not self.lead:
            return
        held = self._hold(self.session.state())
        self.saved = time.monotonic()
        blocked = time.perf_counter() - start
        seconds = dict(event.record.seconds)
        seconds["checkpoint"] += blocked
        seconds["total"] += blocked
        energy = sum(self.energy[gpu] - then[gpu] for gpu in self.energy.keys() & then.keys()) or None
        record = dataclasses.replace(event.record, seconds=seconds, world_size=self.world_size, energy_joules=energy)
        predictions = event.predictions
        steps, self.steps = step_times(self.steps), []

        def write() -> None:
            weights, state = checkpoint.sha(held.weights()), checkpoint.sha(held.tensors)
            row = dataclasses.replace(record, weights_sha=weights, state_sha=state).to_json()
            files = checkpoint.encode(
                held, {**self._words(), "weights_sha": weights, "state_sha": state, "record": row}
            )
            self.pen.epoch(row, files, predictions.to_npz(), {"epoch": record.epoch, **steps})

        self.writer.submit(write)
        if record.epoch == 1 and not self.payload.get("trace"):
            # In the background and after the first epoch: a picture must not disturb the first steps' times.
            model = copy.deepcopy(self.session.master.model).cpu().eval()
            self.writer.submit(lambda: self.pen.graph(graph_events(model, self.workload.example())))

    def _energy(self) -> dict[str, float]:
        """The energy counters of all workers' GPUs; every worker must call it."""
        if self.place.device.type != "cuda":
            return {}
        parts = self.group.gather(json.dumps(self.place.energy()).encode())
        return {gpu: joules for part in parts for gpu, joules in json.loads(part).items()}

    def _hold(self, state: State) -> State:
        """A copy that the writer may read while training goes on; waits for the writer, which reads the same."""
        self.writer.wait()
        return checkpoint.snapshot(state, self.buffers)

    def _words(self) -> dict[str, Any]:
        data = {key: self.described[key] for key in ("train_sha", "val_sha")}
        return {"fingerprint": self.place.fingerprint(), "data": data}

    def _log(self, text: str) -> None:
        self.pen.log(self.group.rank, text)


def step_times(steps: list[StepDone]) -> dict[str, Any]:
    """The steps of an epoch in columns; see `runs.Run.steps`. Microseconds are kept."""
    names = steps[0].seconds if steps else {}
    return {
        "first": bool(steps) and steps[0].first,
        "count": [step.count for step in steps],
        "total": [round(step.count / step.rate, 6) for step in steps],
        **{name: [round(step.seconds[name], 6) for step in steps] for name in names},
    }


def graph_events(model: torch.nn.Module, example: tuple[Any, ...]) -> bytes:
    """A TensorBoard event file with the model's graph; empty where the model cannot be traced."""
    from torch.utils.tensorboard import SummaryWriter

    # Tracing fails in many ways, and the temporary folder may be full: a missing picture must not cost a run.
    with contextlib.suppress(Exception), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        board = SummaryWriter(folder)
        with contextlib.suppress(Exception):
            board.add_graph(model, example)
        board.close()
        return next(Path(folder).iterdir()).read_bytes()
    return b""


def join(
    world: int,
    rank: int,
    address: str,
    timeout_s: float = 1800,
    backend: str = "gloo",
    device: torch.device | None = None,
) -> Group:
    """Initialise torch.distributed at tcp://address (host:port), and return the group."""
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # before NCCL, which otherwise takes the first
    torch.distributed.init_process_group(
        backend,
        init_method=f"tcp://{address}",
        world_size=world,
        rank=rank,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    return Group.join()


def leave(group: Group) -> None:
    """End what `join` began."""
    if group.world > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main(argv: list[str]) -> None:
    """`python -m rayexp.launch.worker PAYLOAD.json RANK WORLD HOST:PORT`: one worker of launch.processes."""
    from rayexp.runs import Run

    payload = json.loads(Path(argv[0]).read_text())
    rank, world = int(argv[1]), int(argv[2])
    there = place.gpus() if payload["device"] == "cuda" else 0
    device = place.device(payload["device"], rank % max(1, there))
    # NCCL refuses two workers on one GPU.
    group = join(world, rank, argv[3], backend="nccl" if 1 < world <= there else "gloo", device=device)
    work(payload, group, Recorder(Run(Path(payload["run"]))), device)
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written. Taking down gloo's threads in turn aborts now and then when another worker is gone already.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
