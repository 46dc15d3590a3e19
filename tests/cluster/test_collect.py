"""The copy: whole, checked, taken up again; without Ray (test_head and test_hosts collect from clusters)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rayexp.cluster import collect as collecting
from rayexp.cluster.collect import collect, upload
from rayexp.cluster.sources import Storage, find, shown
from rayexp.config import load
from rayexp.errors import RunError, UserError
from rayexp.runs.manifest import digest
from rayexp.runs.run import Run, broken


def content(root: Path) -> dict[str, bytes]:
    """Every file of a run that a copy should have."""
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in root.rglob("*")
        if p.is_file() and p.name not in ("collected.json", "driver.lock")
    }


class Breaking(Storage):
    """A storage whose connection breaks after so many bytes."""

    def __init__(self, place: str, after: int) -> None:
        super().__init__(place)
        self.left = after

    def read(self, path: str) -> Iterator[bytes]:
        for piece in super().read(path):
            for start in range(0, len(piece), 1000):
                self.left -= 1000
                if self.left < 0:
                    raise RunError("the connection broke off")
                yield piece[start : start + 1000]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_the_copy_is_the_run(made_run: Run, tmp_path: Path, scheme: str) -> None:
    source, name = find(scheme + str(made_run.root), None)
    got = collect(source, name, tmp_path / "home")
    assert name == made_run.id
    assert content(got.run.root) == content(made_run.root)
    assert got.epochs == got.fetched == [1, 2, 3]
    assert Run.find(made_run.id, tmp_path / "home").predictions(2).kind == "images"


def test_two_do_not_write_into_one_copy(made_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, name = find(str(made_run.root), None)
    monkeypatch.setattr(collecting, "PATIENCE_S", 0.05)
    refused: list[str] = []

    def another(said: str) -> None:
        if not refused:
            with pytest.raises(UserError) as caught:
                collect(source, name, tmp_path / "home")
            refused.append(str(caught.value))

    got = collect(source, name, tmp_path / "home", say=another)
    assert refused == [f"{got.run.root}: another process is collecting it"]
    assert content(got.run.root) == content(made_run.root)
    broken_off = Breaking(str(made_run.root), 350_000)
    with pytest.raises(RunError, match="broke off"):
        collect(broken_off, name, tmp_path / "later")
    assert not list(tmp_path.rglob(".collecting*"))


def test_only_the_asked_checkpoints(made_run: Run, tmp_path: Path) -> None:
    source, name = find(str(made_run.root), None)
    got = collect(source, name, tmp_path / "home", "1,last")
    assert got.run.epochs() == [1, 3]
    assert [r.epoch for r in got.run.records()] == [1, 2, 3]
    assert got.run.predictions_path(2).exists()
    assert collect(source, name, tmp_path / "home", "none").epochs == [1, 3]  # what is there stays
    assert collect(source, name, tmp_path / "home", "1-2").fetched == [2]


@pytest.mark.parametrize("asked", ["4", "0", "x", "1-", "2-7", ""])
def test_epochs_that_are_not_there(made_run: Run, tmp_path: Path, asked: str) -> None:
    source, name = find(str(made_run.root), None)
    with pytest.raises(UserError, match="--epochs"):
        collect(source, name, tmp_path / "home", asked)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("after", [0, 1_000, 5_000, 200_000, 320_000, 650_000, 900_000])
def test_a_break_leaves_nothing_half_and_is_taken_up(made_run: Run, tmp_path: Path, after: int) -> None:
    home = tmp_path / "home"
    with pytest.raises(RunError, match="broke off"):
        collect(Breaking(str(made_run.root), after), made_run.id, home)
    assert Run.all(home) == []  # no run yet
    whole = Run(home / made_run.id)
    assert all(broken(whole.checkpoint(e)) is None for e in whole.epochs())
    before = sum(map(len, content(whole.root).values())) if whole.root.exists() else 0
    got = collect(Storage(str(made_run.root)), made_run.id, home)
    assert content(got.run.root) == content(made_run.root)
    everything = sum(map(len, content(made_run.root).values()))
    assert got.size < everything - before + 50_000  # checkpoints that had arrived were not fetched again


def test_no_file_is_read_twice(made_run: Run, tmp_path: Path) -> None:
    class Counting(Storage):
        def read(self, path: str) -> Iterator[bytes]:
            read.append(path)
            return super().read(path)

    read: list[str] = []
    collect(Counting(str(made_run.root)), made_run.id, tmp_path / "home")
    assert len(read) == len(set(read))


def test_again_fetches_only_what_is_new(made_run: Run, tmp_path: Path, write_run: Callable[..., Run]) -> None:
    source, name = find(str(made_run.root), None)
    collect(source, name, tmp_path / "home")
    assert collect(source, name, tmp_path / "home").fetched == []
    write_run(tmp_path, 5, made_run)
    got = collect(source, name, tmp_path / "home")
    assert got.fetched == [4, 5]
    assert content(got.run.root) == content(made_run.root)


def test_a_damaged_copy_is_mended(made_run: Run, tmp_path: Path) -> None:
    source, name = find(str(made_run.root), None)
    copy = collect(source, name, tmp_path / "home").run
    tensors = copy.checkpoint(2) / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    assert collect(source, name, tmp_path / "home").fetched == [2]
    assert content(copy.root) == content(made_run.root)


def test_damage_at_the_source_is_named_and_keeps_nothing_else_back(made_run: Run, tmp_path: Path) -> None:
    tensors = made_run.checkpoint(2) / "state.safetensors"
    tensors.write_bytes(b"x" + tensors.read_bytes()[1:])
    made_run.predictions_path(3).write_bytes(made_run.predictions_path(3).read_bytes()[:-300])
    source, name = find(str(made_run.root), None)
    with pytest.raises(RunError, match=r"epoch 2: .*damaged.*epoch 3: predictions"):
        collect(source, name, tmp_path / "home")
    copy = Run(tmp_path / "home" / name)
    assert copy.epochs() == [1, 3]
    assert [broken(copy.checkpoint(e)) for e in (1, 3)] == [None, None]
    assert not copy.predictions_path(3).exists()


def test_the_run_itself_is_never_written_into(made_run: Run) -> None:
    source, name = find(str(made_run.root), None)
    before = content(made_run.root)
    with pytest.raises(UserError, match="the run itself"):
        collect(source, name, made_run.root.parent)
    assert content(made_run.root) == before
    assert not (made_run.root / "collected.json").exists()


def test_a_checkpoint_cannot_name_a_file_outside(made_run: Run, tmp_path: Path) -> None:
    words = made_run.checkpoint(1) / "state.json"
    words.write_text(words.read_text().replace("state.safetensors", "../../../evil"))
    source, name = find(str(made_run.root), None)
    with pytest.raises(RunError, match="outside"):
        collect(source, name, tmp_path / "home")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("name", ["", "/", "..", "a/../../evil"])
def test_any_name_of_a_file_in_a_checkpoint_is_one_line(made_run: Run, tmp_path: Path, name: str) -> None:
    words = made_run.checkpoint(1) / "state.json"
    words.write_text(words.read_text().replace('"state.safetensors"', json.dumps(name)))
    assert "state.json is damaged" in str(broken(words.parent))
    with pytest.raises(RunError, match=r"epoch 1: checkpoints/epoch_001/state\.json names a file outside"):
        collect(Storage(str(made_run.root)), made_run.id, tmp_path / "home")


class Lying(Storage):
    """A storage that lists other names in some folders than are there, and gives bytes for them."""

    def __init__(self, place: str, listed: dict[str, list[str]]) -> None:
        super().__init__(place)
        self.listed = listed

    def list(self, folder: str) -> list[str]:
        return self.listed.get(folder) or super().list(folder)

    def read(self, path: str) -> Iterator[bytes]:
        try:
            yield b"".join(super().read(path))
        except RunError:
            yield b"outside"


@pytest.mark.parametrize("folder", ["logs", "tb"])
@pytest.mark.parametrize("listed", ["x/../../../../escaped", "../escaped", "{}/escaped", "x/y", "..", "../", "", "/"])
def test_a_listing_cannot_lead_outside(made_run: Run, tmp_path: Path, folder: str, listed: str) -> None:
    source = Lying(str(made_run.root), {folder: [listed.format(tmp_path / "away")]})
    with pytest.raises(RunError, match=rf"{folder}/") as caught:
        collect(source, made_run.id, tmp_path / "home")
    assert "refused" in str(caught.value)
    assert not list(tmp_path.rglob("*escaped*"))
    assert Run.all(tmp_path / "home") == []
    copy = Run(tmp_path / "home" / made_run.id)
    assert copy.epochs() == [1, 2, 3]  # nothing else is kept back


def test_a_listing_that_contains_itself_ends(made_run: Run, tmp_path: Path) -> None:
    nested = {"logs": ["rank_0.log", "itself/"]}
    nested |= {"logs" + "/itself" * depth: ["itself/", "other/"] for depth in range(1, 50)}
    with pytest.raises(RunError, match=r"logs/: .*contains itself; refused"):
        collect(Lying(str(made_run.root), nested), made_run.id, tmp_path / "home")


def test_a_link_that_leads_round_in_a_circle_ends(made_run: Run, tmp_path: Path) -> None:
    (made_run.logs / "loop").symlink_to(made_run.logs, target_is_directory=True)
    with pytest.raises(RunError, match=r"logs/: .*contains itself; refused"):
        collect(Storage(str(made_run.root)), made_run.id, tmp_path / "home")


def test_a_tree_of_files_without_end_ends(made_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "MAX_FILES", 20)
    (made_run.logs / "deep" / "er").mkdir(parents=True)
    for number in range(10):
        (made_run.logs / "deep" / "er" / f"{number}.log").write_text("x")
    collect(Storage(str(made_run.root)), made_run.id, tmp_path / "home")
    assert (tmp_path / "home" / made_run.id / "logs" / "deep" / "er" / "9.log").read_text() == "x"
    for number in range(10, 30):
        (made_run.logs / "deep" / f"{number}.log").write_text("x")
    with pytest.raises(RunError, match="more than 20 files"):
        collect(Storage(str(made_run.root)), made_run.id, tmp_path / "home")


@pytest.mark.parametrize("link", ["logs", "predictions", "checkpoints", "config.yaml", "tb"])
def test_a_link_in_the_copy_is_not_written_through(made_run: Run, tmp_path: Path, link: str) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    copy = collect(Storage(str(made_run.root)), made_run.id, home).run
    (copy.root / link).rename(away)
    (copy.root / link).symlink_to(away)
    before = content(away) if away.is_dir() else away.read_bytes()
    for path in away.rglob("*.npz"):
        path.unlink()
        before = content(away)
    with pytest.raises(RunError, match="symbolic link"):
        collect(Storage(str(made_run.root)), made_run.id, home)
    assert (content(away) if away.is_dir() else away.read_bytes()) == before


@pytest.mark.parametrize("name", ["..", "../x", "/x", "a/b", ""])
def test_a_run_cannot_be_called_something_outside(made_run: Run, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="refused"):
        collect(Storage(str(made_run.root)), name, tmp_path / "home" / "deep")
    assert not (tmp_path / "home").exists()


# ---------------------------------------------------------------------- the manifest

EMPTIED: dict[str, Callable[[Run], object]] = {
    "config.yaml": lambda run: run.config_path.write_text(""),
    "data.json": lambda run: run.data_path.write_text(""),
    "epochs.jsonl": lambda run: run.epochs_path.write_bytes(run.epochs_path.read_bytes()[:-200]),
    "steps.jsonl": lambda run: run.steps_path.write_text(""),
}


@pytest.mark.parametrize("name", EMPTIED)
@pytest.mark.parametrize("covered", [True, False])
def test_an_emptied_file_is_named(tmp_path: Path, write_run: Callable[..., Run], name: str, covered: bool) -> None:
    run = write_run(tmp_path / "remote", 3)
    run.update(files={} if not covered else run.files())
    run.config_path.write_text(run.config_path.read_text().replace("epochs: 1", "epochs: 3"))
    if covered:
        run.update(files=run.files() | {"config.yaml": digest(run.config_path.read_bytes())})
    collect(Storage(str(run.root)), run.id, tmp_path / "home")
    copy = content(tmp_path / "home" / run.id)
    EMPTIED[name](run)
    if name == "steps.jsonl" and not covered:
        return  # nothing tells
    with pytest.raises(RunError, match=name.replace(".", r"\.")):
        collect(Storage(str(run.root)), run.id, tmp_path / "home")
    assert content(tmp_path / "home" / run.id) == copy  # what was whole is not overwritten
    with pytest.raises(RunError, match=name.replace(".", r"\.")):
        collect(Storage(str(run.root)), run.id, tmp_path / "fresh")
    assert Run.all(tmp_path / "fresh") == []


def test_other_predictions_than_the_runs_are_named(made_run: Run, tmp_path: Path) -> None:
    made_run.predictions_path(2).write_bytes(made_run.predictions_path(1).read_bytes())
    with pytest.raises(RunError, match=r"epoch 2: predictions/epoch_002\.npz: damaged"):
        collect(Storage(str(made_run.root)), made_run.id, tmp_path / "home")


def test_what_does_not_fit_together_at_the_source_is_named(made_run: Run, tmp_path: Path) -> None:
    words = made_run.checkpoint(2) / "state.json"
    words.write_text(json.dumps(json.loads(words.read_bytes()) | {"weights_sha": "0" * 64}))
    with pytest.raises(RunError, match=r"checkpoints/epoch_002: its weights are not those of the line .* a true copy"):
        collect(Storage(str(made_run.root)), made_run.id, tmp_path / "home")
    assert content(tmp_path / "home" / made_run.id) == content(made_run.root)


def test_a_run_that_goes_on_while_it_is_read(made_run: Run, tmp_path: Path, write_run: Callable[..., Run]) -> None:
    class Moving(Storage):
        """After run.json has been read once, two more epochs end."""

        def read(self, path: str) -> Iterator[bytes]:
            yield from super().read(path)
            if path == "run.json" and len(made_run.records()) == 3:
                write_run(tmp_path, 5, made_run)

    got = collect(Moving(str(made_run.root)), made_run.id, tmp_path / "home")
    assert got.epochs == [1, 2, 3, 4, 5]
    assert content(got.run.root) == content(made_run.root)


def test_a_run_that_is_still_running_is_collected(made_run: Run, tmp_path: Path) -> None:
    made_run.update(status="running")
    made_run.uncover("epochs.jsonl", "steps.jsonl")
    made_run.epochs_path.write_bytes(b"".join(made_run.epochs_path.read_bytes().splitlines(True)[:2]))
    got = collect(Storage(str(made_run.root)), made_run.id, tmp_path / "home")
    assert [r.epoch for r in got.run.records()] == [1, 2]
    assert got.epochs == [1, 2]


def test_a_newer_layout_is_refused(made_run: Run, tmp_path: Path) -> None:
    made_run.meta_path.write_text(made_run.meta_path.read_text().replace('"layout": 1', '"layout": 99'))
    source, name = find(str(made_run.root), None)
    with pytest.raises(UserError, match="layout 99"):
        collect(source, name, tmp_path / "home")


@pytest.mark.parametrize("place", ["nowhere/run", "s4://bucket/run", "/nowhere"])
def test_places_that_are_none(place: str) -> None:
    with pytest.raises(UserError):
        find(place, "http://127.0.0.1:1")


def test_a_uri_is_shown_without_its_secret() -> None:
    assert shown("s3://key:secret@bucket/runs/a?token=b") == "s3://bucket/runs/a"


def test_to_an_object_store_and_back(made_run: Run, tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'bucket'}"
    place = upload(made_run, store)
    assert place == f"{store}/{made_run.id}"
    told: list[str] = []
    upload(made_run, store, told.append)
    assert told == []  # nothing has changed
    source, name = find(place, None)
    assert content(collect(source, name, tmp_path / "home").run.root) == content(made_run.root)


@pytest.mark.parametrize("key", ["storage_path=s3://bucket/runs", "storage_path=gs://bucket"])
def test_runs_are_not_written_to_an_object_store(tmp_path: Path, key: str) -> None:
    (tmp_path / "x.yaml").write_text("name: x")
    with pytest.raises(UserError, match=rf"{key}: expected a folder"):
        load(tmp_path / "x.yaml", [key])
