"""Reading what strangers wrote: plain files of bounded size, JSON without surprises, words safe for a terminal."""

import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

LONGEST_WORDS = 300
MAX_WORDS_BYTES = 2**20  # of a release's config.json, privacy.json, README.md
MAX_WEIGHTS_BYTES = 8 * 2**30


def open_regular(path: Path, max_bytes: int) -> BufferedReader:
    """Opens a plain file for reading; never a link, a pipe, a device, or more than ``max_bytes``.

    Raises:
        ValueError: with the reason, if it is one of these, or cannot be read.
    """
    try:
        # Without O_NONBLOCK a pipe would be waited for before it can be told from a file.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError("is a link" if path.is_symlink() else f"cannot be read ({error.strerror})") from None
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_size <= max_bytes:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISREG(found.st_mode):
        raise ValueError(f"has {found.st_size:,} bytes, more than the {max_bytes:,} that are looked at")
    raise ValueError("is no plain file")


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Returns a plain file's content; see ``open_regular``."""
    with open_regular(path, max_bytes) as file:
        return file.read(max_bytes)


def parse_json(content: bytes) -> Any:
    """Reads JSON that means one thing alone: UTF-8, no key twice, no NaN. Infinity is read: a sampler key may be it.

    Raises:
        ValueError: with the reason.
    """
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def clean(words: object, limit: int = LONGEST_WORDS) -> str:
    """Returns words that are safe on a terminal: one line, printable characters alone, at most ``limit`` of them."""
    text = "".join(c if c.isprintable() else " " for c in str(words))
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("names a key twice")
    return found


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("holds NaN")
    return float(name)
