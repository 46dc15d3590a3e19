"""WikiText-2 (Merity et al. 2016, CC BY-SA): the words of three splits, numbered in order of first appearance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayexp.config import DataConfig
from rayexp.data import TextData, text
from rayexp.data.fetch import open_source
from rayexp.errors import UserError
from rayexp.system.disk import write_directory

# Counts of the published text, with one <eos> per line.
TOKENS = {"train": 2_088_628, "valid": 217_646, "test": 245_569}
WORDS = 33_278
LAYOUT = "wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens, or train.txt, valid.txt and test.txt"


def fetch(source: str | Path, to: Path) -> dict[str, Any]:
    """Read the three splits from an archive, a folder or a URL, number their words, and pack them into the folder `to`.

    The vocabulary is that of all three splits together, as in the published data, so that no word is unknown.

    Returns:
        `name`, `root`, `tokens` (counts, and the size of the vocabulary), and `notes`: every count that differs from
        the published text.

    Raises:
        UserError: a file is missing, damaged, empty or not UTF-8, or `to` contains something else; the line names it.
            Nothing is written then.
    """
    text.check_target(to)
    archive = open_source(source, "wiki.train.tokens", "train.txt", layout=LAYOUT)
    form = "wiki.{}.tokens" if "wiki.train.tokens" in archive else "{}.txt"
    splits = {}
    try:
        for name in text.SPLITS:
            where = archive.where(form.format(name))
            splits[name] = text.words(text.decode(archive.read(form.format(name)), where), where)
    finally:
        archive.release()
    vocabulary, tokens = text.encode(splits)
    found = {**{name: len(array) for name, array in tokens.items()}, "vocabulary": len(vocabulary)}
    notes = [
        f"{name}: {found[name]:,}, published {count:,}"
        for name, count in {**TOKENS, "vocabulary": WORDS}.items()
        if found[name] != count
    ]
    write_directory(to, text.packed_files("wikitext2", vocabulary, tokens, notes=notes, source=str(source)))
    return {"name": "wikitext2", "root": str(to), "tokens": found, "notes": notes}


def open_data(config: DataConfig) -> TextData:
    """The packed text in `config.root`, limited to the configured number of tokens.

    Raises:
        UserError: it has not been fetched, or is damaged.
    """
    root = config.root
    if root is None or not (root / "meta.json").is_file():
        raise UserError(
            f"data.root: no packed WikiText-2 in {root}; "
            f"`rayexp data fetch wikitext2 --from ZIP|DIR --to {root}` makes it"
        )
    return text.read_packed(root, config)


def info(root: Path) -> dict[str, Any]:
    """The numbers of tokens, the size of the vocabulary, and the hashes of the packed text."""
    return text.info(root)
