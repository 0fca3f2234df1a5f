"""Files and words of strangers."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpdm.untrusted import clean, parse_json, read_bytes


def test_a_plain_file_is_read_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    for other, reason in (
        (path, "has 5 bytes, more than the 4 that are looked at"),
        (tmp_path / "link", "is a link"),
        (tmp_path / "pipe", "is no plain file"),
        (tmp_path, "is no plain file"),
        (Path("/dev/zero"), "is no plain file"),
        (tmp_path / "none", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_bytes(other, 4)


@pytest.mark.parametrize(
    "content",
    [b'{"a": 1, "a": 2}', b"NaN", b"[" * 10**5, b"\xff", b"{", b"", b"9" * 10_000, b'{"a": {"b": 1, "b": 1}}'],
)
def test_json_that_means_more_than_one_thing_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(content)


def test_json_is_read() -> None:
    assert parse_json(b'{"a": [1, 2.5, null, "\\u00e9", Infinity]}') == {"a": [1, 2.5, None, "é", float("inf")]}


@given(st.text(max_size=2000))
def test_cleaned_words_are_one_printable_line(words: str) -> None:
    text = clean(words)
    assert text.isprintable()
    assert len(text) <= 300
    text.encode()


def test_words_are_kept() -> None:
    assert clean("Größe\t3\x1b[31m\u202e red\ud800") == "Größe 3 [31m red"
