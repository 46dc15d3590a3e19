"""Word-level text: a folder with train.txt, valid.txt and test.txt; and how every text dataset is packed and read.

Words are separated by white space, and every line ends with `<eos>`. A packed text is a folder with train.npy,
valid.npy and test.npy (int32 ids of words), vocabulary.txt (one word per line, in the order of the ids) and meta.json.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayexp.config import DataConfig
from rayexp.data import TextData, uses
from rayexp.errors import UserError
from rayexp.system.cache import cache_dir
from rayexp.system.disk import naming, write_directory
from rayexp.system.locks import locked

LAYOUT = 1
EOS, UNK = "<eos>", "<unk>"
SPLITS = ("train", "valid", "test")


def open_data(config: DataConfig) -> TextData:
    """The text in the folder `config.root`, packed on first use into the cache under the hash of its content.

    Raises:
        UserError: a file is missing, not UTF-8 or empty; the line names it.
    """
    folder = _folder(config)
    if (folder / "meta.json").is_file():
        return read_packed(folder, config)
    vocabulary, tokens = _pack_folder(folder)
    return capped(vocabulary, tokens, config)


def info(root: Path) -> dict[str, Any]:
    """The numbers of tokens, the size of the vocabulary, and the hashes of a text folder, packed or plain."""
    data = open_data(DataConfig(name="text", root=root))
    tokens = {name: len(getattr(data, name)) for name in SPLITS}
    return {"kind": "text", "root": str(root), "tokens": tokens, "vocabulary": len(data.vocabulary), "sha": data.sha}


# ---------------------------------------------------------------------- words


def decode(data: bytes, source: str) -> str:
    """Decode UTF-8 text with line ends as `\\n`; a UserError names the file and the offset of the first wrong byte."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise UserError(f"{source}: not UTF-8 (byte 0x{byte:02x} at offset {error.start})") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def words(text: str, source: str) -> list[str]:
    """The words of a text, with `<eos>` after every line.

    Raises:
        UserError: the text has no words.
    """
    lines = text.removesuffix("\n").split("\n")
    found = [word for line in lines for word in (*line.split(), EOS)]
    if len(found) == len(lines):
        raise UserError(f"{source}: the text is empty")
    return found


def encode(
    splits: Mapping[str, Sequence[str]], known: Iterable[str] = SPLITS, min_count: int = 1
) -> tuple[tuple[str, ...], dict[str, NDArray[np.int32]]]:
    """Number the words in order of first appearance.

    Args:
        splits: the words of each split.
        known: the splits whose words form the vocabulary; other words become `<unk>`.
        min_count: words that occur less often in these splits become `<unk>` too.

    Returns:
        The vocabulary (the word of each id), and the tokens of each split: int32[n].
    """
    known = tuple(known)
    counts: Counter[str] = Counter()  # keeps the order of first appearance
    for name in known:
        counts.update(splits[name])
    vocabulary = [word for word, count in counts.items() if count >= min_count or word in (EOS, UNK)]
    if UNK not in counts and (set(known) != set(splits) or len(vocabulary) < len(counts)):
        vocabulary.append(UNK)
    number = {word: n for n, word in enumerate(vocabulary)}
    unknown = number.get(UNK, -1)
    tokens = {
        name: np.fromiter((number.get(word, unknown) for word in split), np.int32, len(split))
        for name, split in splits.items()
    }
    return tuple(vocabulary), tokens


def _pack_folder(folder: Path) -> tuple[tuple[str, ...], dict[str, NDArray[np.int32]]]:
    """Encode a plain folder, or find it in the cache."""
    raw = raw_files(folder)
    cached = home() / key(raw)

    @functools.cache
    def encoded() -> tuple[tuple[str, ...], dict[str, NDArray[np.int32]]]:
        splits = {}
        for file, data in raw.items():
            source = str(folder / file)
            splits[file.removesuffix(".txt")] = words(decode(data, source), source)
        return encode(splits, known=("train",))

    try:
        found = pack_once(cached, lambda: packed_files("text", *encoded()))
    except OSError:
        return encoded()  # the cache cannot be written: the text will only be packed again
    uses.note(cached, folder.absolute())
    return found


def home() -> Path:
    """The folder of the cache that contains the packed texts."""
    return cache_dir() / "text"


def pack_once(
    to: Path, files: Callable[[], Mapping[str, bytes]]
) -> tuple[tuple[str, ...], dict[str, NDArray[np.int32]]]:
    """Pack a text into a folder of the cache, unless it is there undamaged. Of several processes one writes it: none
    replaces what another one is reading.

    Args:
        files: makes the files by name, see `packed_files`.

    Returns:
        The vocabulary, and the tokens of each split: int32[n], mapped.

    Raises:
        OSError: the cache cannot be written (WriteError).
    """
    with contextlib.suppress(UserError):
        return _load(to)
    made = files()  # before anything is written: it may refuse the text
    with naming(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        with locked(to.with_name(f"{to.name}.lock")):
            with contextlib.suppress(UserError):
                return _load(to)
            write_directory(to, made)
    return _load(to)


def raw_files(folder: Path) -> dict[str, bytes]:
    """The three files of a plain folder by name (UserError if one cannot be read)."""
    return {f"{name}.txt": read_file(folder / f"{name}.txt") for name in SPLITS}


def key(raw: Mapping[str, bytes]) -> str:
    """The name under which a plain folder is cached: a hash of its content."""
    found = hashlib.sha256(f"text {LAYOUT}".encode())
    for data in raw.values():
        found.update(hashlib.sha256(data).digest())
    return found.hexdigest()[:32]


def read_file(path: Path) -> bytes:
    """The bytes of a file (UserError if it cannot be read)."""
    try:
        return path.read_bytes()
    except OSError as error:
        wanted = ", ".join(f"{name}.txt" for name in SPLITS)
        raise UserError(f"{path}: cannot be read ({error.strerror}); a text folder holds {wanted}") from None


# ---------------------------------------------------------------------- packed


def packed_files(
    name: str, vocabulary: Sequence[str], tokens: Mapping[str, NDArray[np.int32]], **extra: Any
) -> dict[str, bytes]:
    """The files of a packed text by name."""
    meta = {
        "layout": LAYOUT,
        "name": name,
        "tokens": {split: len(array) for split, array in tokens.items()},
        "vocabulary": len(vocabulary),
        "sha": hashes(vocabulary, tokens),
        **extra,
    }
    files = {"vocabulary.txt": "".join(f"{word}\n" for word in vocabulary).encode()}
    for split, array in tokens.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        files[f"{split}.npy"] = buffer.getvalue()
    files["meta.json"] = (json.dumps(meta, indent=2) + "\n").encode()
    return files


def check_target(folder: Path) -> None:
    """Refuse to pack into a folder with anything but a packed text in it, because packing replaces it (UserError)."""
    own = {"vocabulary.txt", "meta.json", *(f"{name}.npy" for name in SPLITS)}
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to: {folder} is a file; give a folder")
    other = sorted(path.name for path in folder.glob("*") if path.name not in own)
    if other:
        raise UserError(f"--to: {folder} holds other files ({other[0]}); give an empty or a new folder")


def read_packed(folder: Path, config: DataConfig) -> TextData:
    """A packed text, limited to the configured number of tokens.

    Raises:
        UserError: it is missing, damaged, or packed by another version of rayexp.
    """
    return capped(*_load(folder), config)


def capped(vocabulary: Sequence[str], tokens: Mapping[str, NDArray[np.int32]], config: DataConfig) -> TextData:
    """The first tokens of each split, limited to the configured number; the hashes cover exactly these."""
    caps = {"train": config.max_train_tokens, "valid": config.max_val_tokens, "test": config.max_val_tokens}
    cut = {name: tokens[name][: caps[name]] for name in SPLITS}
    return TextData(cut["train"], cut["valid"], cut["test"], tuple(vocabulary), hashes(vocabulary, cut))


def hashes(vocabulary: Sequence[str], tokens: Mapping[str, NDArray[np.int32]]) -> dict[str, str]:
    """sha256 over the vocabulary and each split's tokens."""
    head = hashlib.sha256("\n".join(vocabulary).encode())
    found = {}
    for name in SPLITS:
        whole = head.copy()
        whole.update(np.ascontiguousarray(tokens[name], "<i4").data)
        found[name] = whole.hexdigest()
    return found


def _folder(config: DataConfig) -> Path:
    if config.root is None:  # DataConfig does not allow this
        raise UserError(f"data.root: {config.name} needs a folder")
    if not config.root.is_dir():
        raise UserError(f"data.root: {config.root} is no folder")
    return config.root


def _load(folder: Path) -> tuple[tuple[str, ...], dict[str, NDArray[np.int32]]]:
    """The vocabulary and the memory-mapped tokens of a packed text, checked against its hashes."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        layout, sha = meta["layout"], meta["sha"]
        if layout == LAYOUT:
            vocabulary = tuple((folder / "vocabulary.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n"))
            tokens = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in SPLITS}
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"{folder}: not a packed text ({error})") from None
    if layout != LAYOUT:
        raise UserError(f"{folder}: packed in layout {layout}, this rayexp reads {LAYOUT}; fetch it again")
    found = hashes(vocabulary, tokens)
    for name in SPLITS:
        if found[name] != sha.get(name):
            raise UserError(f"{folder / name}.npy: damaged (not the tokens that meta.json names); fetch it again")
    return vocabulary, tokens
