"""Fetching one published file from mirrors into a cache, checked against its published checksum."""

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from dpdm.errors import RunError
from dpdm.files import atomic_path
from dpdm.progress import Progress

TIMEOUT_SECONDS = 30.0
CHUNK_BYTES = 2**20


class _WrongContentError(Exception):
    """A mirror sent something else."""


def fetch_file(path: Path, urls: Sequence[str], sha256: str, *, num_bytes: int, remedy: str) -> Path:
    """Puts a published file at ``path`` unless it is there and right; returns ``path``.

    Args:
        path: where to keep it.
        urls: mirrors, tried in order.
        sha256: published checksum, in hex.
        num_bytes: published length; a mirror that sends more is left at that point.
        remedy: what to do without a network, for the message.

    Raises:
        RunError: in one line with every mirror's failure and ``remedy``, if no mirror gives the right file.
    """
    if path.is_file() and file_sha256(path) == sha256:
        return path
    failures = []
    for url in urls:
        try:
            with atomic_path(path) as temporary:
                _download(url, temporary, sha256, num_bytes)
            return path
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            failures.append(f"{url}: {getattr(error, 'reason', None) or error}")
        except _WrongContentError as error:
            failures.append(f"{url}: {error}")
        except OSError as error:
            raise RunError(f"Cannot write {path}: {error.strerror or error}.") from error
    raise RunError(f"Cannot download {path.name} ({'; '.join(failures)}): {remedy}")


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(url: str, path: Path, sha256: str, num_bytes: int) -> None:
    digest, received = hashlib.sha256(), 0
    request = urllib.request.Request(url, headers={"User-Agent": "dpdm"})
    with (
        urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response,
        path.open("wb") as file,
        Progress(f"download {url.rpartition('/')[2]}", num_bytes, unit="bytes") as progress,
    ):
        while chunk := response.read(CHUNK_BYTES):
            received += len(chunk)
            if received > num_bytes:
                raise _WrongContentError(f"expected {num_bytes} bytes, got more")
            digest.update(chunk)
            file.write(chunk)
            progress.advance(len(chunk))
    if digest.hexdigest() != sha256:
        raise _WrongContentError(f"expected SHA-256 {sha256}, got {digest.hexdigest()}")
