"""Word-level text: numbering, packing, limits, and errors for bad input."""

from __future__ import annotations

import os
import threading
import time
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayexp.config import DataConfig
from rayexp.data import open_data, python_docs, text, wikitext2
from rayexp.errors import UserError

SMALL = {"train": "the cat sat\non the mat\n\n", "valid": "the dog sat\n", "test": "a cat\n"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    root.mkdir()
    for name, lines in SMALL.items():
        (root / f"{name}.txt").write_bytes(lines.encode())
    return root


def packed_texts(cache: Path) -> list[Path]:
    return [path for path in (cache / "text").iterdir() if path.is_dir()]


def said(data, split: str) -> str:
    return " ".join(data.vocabulary[n] for n in getattr(data, split))


def test_words_are_numbered_in_order_and_unknown_ones_are_marked(folder: Path) -> None:
    data = open_data(DataConfig(name="text", root=folder))
    assert data.vocabulary == ("the", "cat", "sat", "<eos>", "on", "mat", "<unk>")
    assert data.train.dtype == np.int32
    assert said(data, "train") == "the cat sat <eos> on the mat <eos> <eos>"
    assert said(data, "valid") == "the <unk> sat <eos>"
    assert said(data, "test") == "<unk> cat <eos>"


def test_a_text_with_its_own_unk_keeps_it() -> None:
    vocabulary, tokens = text.encode({"train": ["a", "<unk>", "<eos>"], "valid": ["b"]}, known=("train",))
    assert vocabulary == ("a", "<unk>", "<eos>")
    assert tokens["valid"].tolist() == [1]


def test_a_missing_last_line_end_and_other_line_ends_change_nothing() -> None:
    plain = text.words(text.decode(b"a b\nc\n", "x"), "x")
    for other in (b"a b\nc", b"a b\r\nc\r\n", b"a b\rc", b"\xef\xbb\xbfa b\nc\n", b" a\tb \nc \n"):
        assert text.words(text.decode(other, "x"), "x") == plain == ["a", "b", "<eos>", "c", "<eos>"]


def test_the_cache_is_used_until_the_text_changes(folder: Path, cache: Path) -> None:
    config = DataConfig(name="text", root=folder)
    first = open_data(config)
    (packed,) = packed_texts(cache)
    before = (packed / "train.npy").stat().st_mtime_ns
    assert open_data(config).sha == first.sha
    assert (packed / "train.npy").stat().st_mtime_ns == before
    (folder / "train.txt").write_text("the cow\n")
    assert open_data(config).vocabulary == ("the", "cow", "<eos>", "<unk>")
    assert len(packed_texts(cache)) == 2


def test_a_damaged_cache_is_made_anew(folder: Path, cache: Path) -> None:
    config = DataConfig(name="text", root=folder)
    good = open_data(config)
    valid = good.valid.tolist()
    (packed,) = packed_texts(cache)
    raw = bytearray((packed / "valid.npy").read_bytes())
    raw[-1] ^= 1
    (packed / "valid.npy").write_bytes(raw)
    again = open_data(config)
    assert again.sha == good.sha
    assert again.valid.tolist() == valid


def test_a_cache_that_cannot_be_written_is_done_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAYEXP_CACHE", str(tmp_path / "file"))
    assert said(open_data(DataConfig(name="text", root=folder)), "test") == "<unk> cat <eos>"


def test_caps_take_the_first_tokens_and_change_the_hash(folder: Path) -> None:
    whole = open_data(DataConfig(name="text", root=folder))
    capped = open_data(DataConfig(name="text", root=folder, max_train_tokens=3, max_val_tokens=2))
    assert capped.train.tolist() == whole.train[:3].tolist()
    assert capped.valid.tolist() == whole.valid[:2].tolist()
    assert len(capped.test) == 2
    assert all(capped.sha[name] != whole.sha[name] for name in text.SPLITS)
    loose = open_data(DataConfig(name="text", root=folder, max_train_tokens=10_000, max_val_tokens=10_000))
    assert loose.sha == whole.sha


def test_the_hash_covers_the_vocabulary() -> None:
    tokens = dict.fromkeys(text.SPLITS, np.arange(2, dtype=np.int32))
    assert text.hashes(["a", "b"], tokens) != text.hashes(["a", "c"], tokens)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("valid.txt", None, "valid.txt: cannot be read"),
        ("test.txt", b"abc\ndef\xe9g\n", "test.txt: not UTF-8 (byte 0xe9 at offset 7)"),
        ("train.txt", b"", "train.txt: the text is empty"),
        ("valid.txt", b"\n \n", "valid.txt: the text is empty"),
    ],
)
def test_bad_files_are_named(folder: Path, cache: Path, file: str, content: bytes | None, message: str) -> None:
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        open_data(DataConfig(name="text", root=folder))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(cache.iterdir())


def test_no_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        open_data(DataConfig(name="text", root=tmp_path / "nothing"))


# ---------------------------------------------------------------------- WikiText-2


def make_zip(path: Path, splits: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, lines in splits.items():
            archive.writestr(f"wikitext-2/wiki.{name}.tokens", lines)
    return path


def test_wikitext2_is_packed_from_a_zip_with_one_vocabulary(tmp_path: Path) -> None:
    meta = wikitext2.fetch(make_zip(tmp_path / "w.zip", SMALL), tmp_path / "packed")
    assert len(meta["notes"]) == 4  # none of the counts is the published one
    data = open_data(DataConfig(name="wikitext2", root=tmp_path / "packed"))
    assert data.vocabulary == ("the", "cat", "sat", "<eos>", "on", "mat", "dog", "a")
    assert said(data, "valid") == "the dog sat <eos>"
    assert isinstance(data.train, np.memmap)
    # The same text read as a plain folder has the same training numbers.
    assert data.train.tolist() == [0, 1, 2, 3, 4, 0, 5, 3, 3]


def test_wikitext2_is_packed_from_a_folder_of_either_naming(tmp_path: Path, folder: Path) -> None:
    wikitext2.fetch(folder, tmp_path / "a")
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, lines in SMALL.items():
        (raw / f"wiki.{name}.tokens").write_text(lines)
    wikitext2.fetch(raw, tmp_path / "b")
    one, other = (open_data(DataConfig(name="wikitext2", root=tmp_path / name)) for name in "ab")
    assert one.sha == other.sha


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    broken = make_zip(tmp_path / "w.zip", {"train": "a\n", "valid": "b\n"})
    with pytest.raises(UserError, match=r"wiki\.test\.tokens: missing"):
        wikitext2.fetch(broken, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_fetch_never_replaces_other_files(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="holds other files"):
        wikitext2.fetch(make_zip(tmp_path / "w.zip", SMALL), folder)
    assert (folder / "train.txt").read_text() == SMALL["train"]


def test_a_packed_text_can_be_fetched_again(tmp_path: Path, folder: Path) -> None:
    wikitext2.fetch(folder, tmp_path / "packed")
    wikitext2.fetch(folder, tmp_path / "packed")
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == [
        "meta.json",
        "test.npy",
        "train.npy",
        "valid.npy",
        "vocabulary.txt",
    ]


@pytest.mark.parametrize("file", ["train.npy", "vocabulary.txt", "meta.json"])
@pytest.mark.parametrize("how", ["gone", "cut", "flipped"])
def test_a_damaged_packed_text_is_refused(tmp_path: Path, folder: Path, file: str, how: str) -> None:
    wikitext2.fetch(folder, tmp_path / "packed")
    path = tmp_path / "packed" / file
    raw = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    else:
        raw[raw.index(b'"sha"') + 15 if file == "meta.json" else -3] ^= 1
        path.write_bytes(raw)
    with pytest.raises(UserError):
        open_data(DataConfig(name="wikitext2", root=tmp_path / "packed"))


def test_wikitext2_that_was_not_fetched_is_said(folder: Path) -> None:
    with pytest.raises(UserError, match="rayexp data fetch wikitext2"):
        open_data(DataConfig(name="wikitext2", root=folder))


def corpus(files: list[Path]) -> tuple[list[str], list[list[int]]]:
    """Dictionary and Corpus of pytorch/examples word_language_model (data.py), in other words."""
    word2idx: dict[str, int] = {}
    idx2word: list[str] = []
    for file in files:
        with file.open(encoding="utf8") as lines:
            for line in lines:
                for word in [*line.split(), "<eos>"]:
                    if word not in word2idx:
                        idx2word.append(word)
                        word2idx[word] = len(idx2word) - 1
    ids = []
    for file in files:
        with file.open(encoding="utf8") as lines:
            ids.append([word2idx[word] for line in lines for word in [*line.split(), "<eos>"]])
    return idx2word, ids


WORDS = st.lists(st.sampled_from(["the", "cat", "<unk>", "=", "@-@", "é", "<eos>", "\u00a0", "x\u2028y"]), max_size=5)
TEXT = st.lists(WORDS.map(" ".join), min_size=1, max_size=6).map(lambda lines: "".join(f" {line} \n" for line in lines))


@settings(deadline=None, max_examples=40)  # each is packed on disk
@given(st.fixed_dictionaries({name: TEXT.filter(lambda lines: lines.strip()) for name in text.SPLITS}))
def test_wikitext2_is_numbered_as_by_the_example(tmp_path_factory: pytest.TempPathFactory, splits: dict) -> None:
    """One <eos> a line, empty ones too; words by first appearance in train, valid, test."""
    root = tmp_path_factory.mktemp("w")
    files = [root / f"wiki.{name}.tokens" for name in text.SPLITS]
    for file, lines in zip(files, splits.values(), strict=True):
        file.write_text(lines, encoding="utf8")
    words, ids = corpus(files)
    meta = wikitext2.fetch(root, root / "packed")
    data = open_data(DataConfig(name="wikitext2", root=root / "packed"))
    assert list(data.vocabulary) == words
    assert [getattr(data, name).tolist() for name in text.SPLITS] == ids
    assert meta["tokens"] == {
        **{name: len(of) for name, of in zip(text.SPLITS, ids, strict=True)},
        "vocabulary": len(words),
    }


@settings(deadline=None)
@given(
    st.lists(st.sampled_from("abcde"), min_size=1, max_size=30),
    st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=30),
    st.integers(1, 4),
    st.booleans(),
)
def test_unknown_words_against_counting_by_hand(train: list[str], valid: list[str], least: int, own: bool) -> None:
    """Known are the words that occur `least` times in train; <unk> is the last word, unless the text has its own."""
    train = [*train, "<eos>", *(["<unk>"] if own else [])]
    valid = [*valid, "<eos>"]
    vocabulary, tokens = text.encode({"train": train, "valid": valid}, known=("train",), min_count=least)
    known = [word for word in dict.fromkeys(train) if train.count(word) >= least or word in ("<eos>", "<unk>")]
    assert list(vocabulary) == (known if own else [*known, "<unk>"])
    for name, words in (("train", train), ("valid", valid)):
        assert [vocabulary[n] for n in tokens[name]] == [word if word in known else "<unk>" for word in words]


@pytest.mark.slow
@pytest.mark.skipif("RAYEXP_TEST_DATA" not in os.environ, reason="RAYEXP_TEST_DATA names no folder with real data")
def test_the_real_wikitext2_has_the_published_counts(tmp_path: Path) -> None:
    archive = Path(os.environ["RAYEXP_TEST_DATA"]) / "wikitext-2-v1.zip"
    meta = wikitext2.fetch(archive, tmp_path / "packed")
    assert meta["notes"] == []
    with zipfile.ZipFile(archive) as source:
        source.extractall(tmp_path)
    words, ids = corpus([next(tmp_path.glob(f"*/wiki.{name}.tokens")) for name in text.SPLITS])
    data = open_data(DataConfig(name="wikitext2", root=tmp_path / "packed"))
    assert list(data.vocabulary) == words
    assert [getattr(data, name).tolist() for name in text.SPLITS] == ids
    assert meta["tokens"] == {"train": 2_088_628, "valid": 217_646, "test": 245_569, "vocabulary": 33_278}


# ---------------------------------------------------------------------- Python's reference


def test_python_docs_need_no_file() -> None:
    data = open_data(DataConfig(name="python_docs"))
    assert len(data.train) > 5 * len(data.valid) > 1000
    assert len(data.test) > 1000
    assert "<eos>" in data.vocabulary
    counts = np.bincount(data.train, minlength=len(data.vocabulary))
    assert counts.min() >= 2  # rarer words are <unk>
    assert open_data(DataConfig(name="python_docs")).sha == data.sha


def test_python_docs_are_split_by_topic() -> None:
    found = [python_docs.split_of(f"topic {n}") for n in range(1000)]
    assert 700 < found.count("train") < 900
    assert found.count("valid") > 60 < found.count("test")
    assert [python_docs.split_of(name) for name in ("assert", "dict", "floating", "lambda")] == [
        "train",
        "valid",
        "valid",
        "train",
    ]


def test_python_docs_tokens() -> None:
    topic = 'The "x"\n*******\n\nIt isn\'t so::\n\n   >>> a_1 += 2...\n'
    assert python_docs.tokenise(topic) == 'The " x "\nIt isn\'t so ::\n>>> a_1 + = 2 ...\n'


def test_of_several_that_open_a_text_at_once_one_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, begin, calls = tmp_path / "cache" / "packed", threading.Barrier(4), []
    write = text.write_directory

    def slowly(path: Path, files: Mapping[str, bytes]) -> None:
        calls.append(path)
        time.sleep(0.05)
        write(path, files)

    monkeypatch.setattr(text, "write_directory", slowly)

    def files() -> dict[str, bytes]:
        return text.packed_files("text", ("a",), dict.fromkeys(text.SPLITS, np.zeros(2, np.int32)))

    def work() -> tuple[str, ...]:
        begin.wait()
        return text.pack_once(packed, files)[0]

    with ThreadPoolExecutor(4) as threads:
        found = [future.result() for future in [threads.submit(work) for _ in range(4)]]
    assert found == [("a",)] * 4
    assert calls == [packed]


@pytest.mark.parametrize("name", ["text", "wikitext2"])
def test_a_folder_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    files = text.packed_files("text", ("a",), dict.fromkeys(text.SPLITS, np.zeros(2, np.int32)))
    for file, data in files.items():
        (tmp_path / "words").mkdir(exist_ok=True)
        (tmp_path / "words" / file).write_bytes(data)
    assert open_data(DataConfig(name=name, root=Path("~/words"))).vocabulary == ("a",)
