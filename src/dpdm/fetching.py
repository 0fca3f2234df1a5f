"""Fetching one published file from mirrors into a cache, checked against its published checksum."""

import hashlib
import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from dpdm.errors import RunError
from dpdm.files import atomic_path
from dpdm.progress import Progress

DEFAULT_CACHE = Path("~/.cache/dpdm")
TIMEOUT_SECONDS = 30.0
CHUNK_BYTES = 2**20


class _WrongContentError(Exception):
    """A mirror sent something else."""


def fetch_file(path: Path, urls: Sequence[str], checksum: str, *, max_bytes: int, remedy: str) -> Path:
    """Puts a published file at ``path`` unless it is there and right; returns ``path``.

    Args:
        path: where to keep it.
        urls: mirrors, tried in order.
        checksum: as published, ``algorithm:hex``, such as ``sha256:f58c...``. MD5 detects damage and a wrong file, but
            not somebody who forges a file on purpose; it is for files of which nothing else is published.
        max_bytes: published length, or a bound of it; a mirror that sends more is left at that point.
        remedy: what to do without a network, for the message.

    Raises:
        RunError: in one line with every mirror's failure and ``remedy``, if no mirror gives the right file.
    """
    algorithm, _, expected = checksum.partition(":")
    if path.is_file() and _digest(path, algorithm) == expected:
        return path
    failures = []
    for url in urls:
        try:
            with atomic_path(path) as temporary:
                _download(url, temporary, max_bytes)
                _check(temporary, algorithm, expected)
            return path
        except (urllib.error.URLError, ssl.SSLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            failures.append(f"{url}: {getattr(error, 'reason', None) or error}")
        except _WrongContentError as error:
            failures.append(f"{url}: {error}")
        except OSError as error:
            raise RunError(f"Cannot write {path}: {error.strerror or error}.") from error
    raise RunError(f"Cannot download {path.name} ({'; '.join(failures)}): {remedy}")


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content, in hex."""
    return _digest(path, "sha256")


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def _check(path: Path, algorithm: str, expected: str) -> None:
    found = _digest(path, algorithm)
    if found != expected:
        raise _WrongContentError(f"expected {algorithm.upper()} {expected}, got {found}")


def _download(url: str, path: Path, max_bytes: int) -> None:
    received = 0
    request = urllib.request.Request(url, headers={"User-Agent": "dpdm"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response, path.open("wb") as file:
        announced = response.headers.get("Content-Length", "")
        total = int(announced) if announced.isdecimal() else max_bytes
        with Progress(f"download {url.rpartition('/')[2]}", total, unit="bytes") as progress:
            while chunk := response.read(CHUNK_BYTES):
                received += len(chunk)
                if received > max_bytes:
                    raise _WrongContentError(f"expected at most {max_bytes} bytes, got more")
                file.write(chunk)
                progress.advance(len(chunk))
