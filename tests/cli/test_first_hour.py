"""What README and the tour promise a new user: its lines take own images and text, its figures are true."""

from __future__ import annotations

import random
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import models

from rayexp.diff.pair import read_pair
from rayexp.diff.report import compare
from rayexp.runs.run import Run

Typed = Callable[..., subprocess.CompletedProcess[str]]
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SMALL = {
    "tiny_imagenet": ["data.image_size=32", "batch_size=8", "epochs=1"],
    "wikitext2": ["model.emsize=8", "model.nhid=8", "data.bptt=5", "batch_size=4", "epochs=1"],
}


def lines(section: str) -> list[list[str]]:
    """The commands of a section's first block, in words, without `rayexp`."""
    block = re.search(r"```console\n(.*?)```", README.partition(f"\n## {section}\n")[2], re.DOTALL)
    assert block is not None
    return [shlex.split(line)[1:] for line in block[1].splitlines()]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes in train/ and val/, in a folder whose name has a space and an umlaut."""
    root = tmp_path / "Bilder für mich"
    for split, count in (("train", 10), ("val", 4)):
        for number, name in enumerate(("kater", "schöne Hunde")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture = Image.new("RGB", (40, 36), (90 + 80 * number, 10 * i, 60))
                picture.save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Three files of words, in a folder whose name has a space and an umlaut."""
    root = tmp_path / "Texte, hübsche"
    root.mkdir()
    draw = random.Random(1)
    for name, count in (("train", 60), ("valid", 20), ("test", 20)):
        said = [" ".join(draw.choices(["eine", "Katze", "läuft", "heim", "."], k=9)) for _ in range(count)]
        (root / f"{name}.txt").write_text("\n".join(said) + "\n", encoding="utf-8")
    return root


def test_own_images_and_text_go_in_by_the_lines_of_the_readme(
    typed: Typed, tmp_path: Path, pictures: Path, text: Path
) -> None:
    look, images, words = lines("Your own images and text")
    for own, shown in ((pictures, "20 train and 8 val images of 2 classes"), (text, "tokens; 7 words")):
        told = typed(*[word.replace("DIR", own.name) for word in look])
        assert told.returncode == 0, told.stderr
        assert shown in told.stdout
    for line, own in ((images, pictures), (words, text)):
        done = typed(*[word.replace("DIR", own.name) for word in line], *SMALL[line[1]])
        assert done.returncode == 0, done.stderr
        name = next(word for word in line if word.startswith("name=")).removeprefix("name=")
        run = Run.find(name, tmp_path / "runs")
        assert run.status() == "done"
        assert done.stdout == f"{run.root}\n"
        assert f"run: runs/{run.id}\n" in done.stderr
    assert [words for _, words in Run.find("mine", tmp_path / "runs").data()["classes"]] == ["kater", "schöne Hunde"]


def test_a_checkpoint_takes_what_the_readme_says() -> None:
    with torch.device("meta"):
        weights = sum(tensor.numel() for tensor in models.resnet18(num_classes=200).state_dict().values())
    said = re.search(r"ResNet-18: (\d+) MB with SGD, (\d+) MB with AdamW", README)
    assert said is not None
    # The weights, and as much again for each buffer of the optimizer: one for momentum, two for AdamW.
    assert [int(mb) for mb in said.groups()] == [round(4 * weights * (1 + buffers) / 1e6) for buffers in (1, 2)]


@pytest.mark.slow
def test_the_tours_image_model_learns_and_its_checkpoints_differ_visibly(typed: Typed, tmp_path: Path) -> None:
    """As issued, the tour's model is better than 60 % right; from its first to its last epoch it gains far more images
    than it loses, and it does not judge nearly all of them differently."""
    done = typed("train", "quickstart", "tracking=[]")
    assert done.returncode == 0, done.stderr
    run = Run.find("@newest", tmp_path / "runs")
    assert run.records()[-1].metrics["acc1"] >= 60
    report = compare(*read_pair((run, 1), (run, run.epochs()[-1])), None)
    assert report.gained > 4 * report.lost
    assert report.n / 10 < report.churn < report.n * 9 / 10
