"""Downloads from a web server on this machine: mirrors, checksums, and what is left behind."""

import hashlib
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dpdm import fetching
from dpdm.errors import RunError
from dpdm.fetching import fetch_file

CONTENT = bytes(range(256)) * 9000  # more than one chunk
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ANSWERS = {"good": CONTENT, "bad": CONTENT[:-1] + b"x", "short": CONTENT[:-1], "long": CONTENT + b"x"}


class Mirrors:
    """/good/FILE has it, others of ``ANSWERS`` something near, anything else nothing."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        mirrors = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                folder = self.path.split("/")[1]
                mirrors.requests.append(folder)
                self.send_response(200 if folder in ANSWERS else 404)
                self.end_headers()
                self.wfile.write(ANSWERS.get(folder, b""))

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def urls(self, *folders: str) -> list[str]:
        return [f"http://127.0.0.1:{self.server.server_port}/{folder}/file.pt" for folder in folders]


@pytest.fixture
def mirrors(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirrors]:
    monkeypatch.setenv("no_proxy", "*")
    running = Mirrors()
    yield running
    running.server.shutdown()
    running.server.server_close()


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/file.pt"


def fetch(path: Path, urls: list[str]) -> Path:
    return fetch_file(path, urls, f"sha256:{SHA256}", max_bytes=len(CONTENT), remedy="put it there yourself.")


def test_mirrors_are_tried_until_the_checksum_fits(mirrors: Mirrors, tmp_path: Path) -> None:
    path = fetch(tmp_path / "cache" / "file.pt", [closed_port(), *mirrors.urls("gone", "bad", "good", "later")])
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert mirrors.requests == ["gone", "bad", "good"]


def test_the_cache_is_used_and_a_damaged_one_replaced(mirrors: Mirrors, tmp_path: Path) -> None:
    path = fetch(tmp_path / "file.pt", mirrors.urls("good"))
    fetch(path, mirrors.urls("good"))
    assert mirrors.requests == ["good"]
    path.write_bytes(CONTENT[::-1])
    assert fetch(path, mirrors.urls("good")).read_bytes() == CONTENT
    assert mirrors.requests == ["good", "good"]


def test_no_right_mirror_is_one_line_and_no_file(mirrors: Mirrors, tmp_path: Path) -> None:
    urls = [closed_port(), *mirrors.urls("gone", "bad", "short", "long")]
    with pytest.raises(RunError) as caught:
        fetch(tmp_path / "file.pt", urls)
    message = str(caught.value)
    assert "\n" not in message
    for part in (*urls, "refused", "Not Found", f"expected SHA256 {SHA256}", "got more", "put it there yourself."):
        assert part in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "failure", [ssl.SSLError(1, "EOF occurred in violation of protocol"), TimeoutError("too slow")]
)
def test_a_connection_that_breaks_is_one_mirror_s_failure(
    mirrors: Mirrors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: OSError
) -> None:
    """Whatever kind of OSError it is: the disk has nothing to do with it, and the next mirror is tried."""
    download = fetching._download

    def breaks(url: str, path: Path, max_bytes: int) -> None:
        if "/short/" in url:
            raise failure
        download(url, path, max_bytes)

    monkeypatch.setattr(fetching, "_download", breaks)
    assert fetch(tmp_path / "file.pt", mirrors.urls("short", "good")).read_bytes() == CONTENT
    with pytest.raises(RunError) as raised:
        fetch(tmp_path / "other.pt", mirrors.urls("short"))
    assert f"short/file.pt: {failure.args[-1]}" in str(raised.value).replace("[SSL] ", "")


def test_a_cache_that_cannot_be_written_is_named(mirrors: Mirrors, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(RunError, match=r"Cannot write .*taken"):
        fetch(tmp_path / "taken" / "file.pt", mirrors.urls("good"))
