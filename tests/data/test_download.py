import gzip
import hashlib
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from dpdm.data import download
from dpdm.data.download import FILE_NAMES, PUBLISHED, Published, fetch
from dpdm.data.sources import open_source
from dpdm.errors import RunError

CONTENTS = [
    gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, 3, 2, 2) + bytes(range(12))),
    gzip.compress(struct.pack(">4BI", 0, 0, 8, 1, 3) + bytes([9, 0, 4])),
    gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, 2, 2, 2) + bytes(range(8))),
    gzip.compress(struct.pack(">4BI", 0, 0, 8, 1, 2) + bytes([1, 2])),
]
MD5 = tuple(hashlib.md5(content).hexdigest() for content in CONTENTS)


class Mirrors:
    """A web server on this machine: /good/ has the files, /bad/ damaged ones, anything else nothing."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        mirrors = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirrors.requests.append(self.path)
                _, folder, file = self.path.split("/")
                content = CONTENTS[FILE_NAMES.index(file)]
                self.send_response(200 if folder in ("good", "bad") else 404)
                self.end_headers()
                self.wfile.write(content if folder == "good" else content[:-1])

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def url(self, folder: str) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/{folder}/"


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
        return f"http://127.0.0.1:{free.getsockname()[1]}/"


def test_mirrors_are_tried_until_the_checksum_fits(tmp_path: Path, mirrors: Mirrors) -> None:
    addresses = (
        closed_port(),
        mirrors.url("gone"),
        mirrors.url("bad"),
        mirrors.url("good"),
        mirrors.url("later"),
    )
    folder = fetch("toy", Published(addresses, MD5, ("a",)), tmp_path / "cache" / "toy")
    assert [(folder / name).read_bytes() for name in FILE_NAMES] == CONTENTS
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILE_NAMES)
    assert mirrors.requests == [f"/{part}/{name}" for name in FILE_NAMES for part in ("gone", "bad", "good")]


def test_the_cache_is_used_and_repaired(tmp_path: Path, mirrors: Mirrors) -> None:
    data_set = Published((mirrors.url("good"),), MD5, ("a",))
    fetch("toy", data_set, tmp_path)
    mirrors.requests.clear()
    fetch("toy", data_set, tmp_path)
    assert mirrors.requests == []
    (tmp_path / FILE_NAMES[2]).write_bytes(b"damaged")
    fetch("toy", data_set, tmp_path)
    assert mirrors.requests == [f"/good/{FILE_NAMES[2]}"]
    assert (tmp_path / FILE_NAMES[2]).read_bytes() == CONTENTS[2]


def test_offline_is_one_line_with_the_way_round(tmp_path: Path, mirrors: Mirrors) -> None:
    addresses = (closed_port(), mirrors.url("gone"), mirrors.url("bad"))
    with pytest.raises(RunError) as caught:
        fetch("toy", Published(addresses, MD5, ("a",)), tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (*addresses, "refused", "Not Found", f"expected MD5 {MD5[0]}", *FILE_NAMES, "folder"):
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_an_endless_mirror_is_left(tmp_path: Path, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MAX_IDX_BYTES", 20)
    with pytest.raises(RunError, match="expected at most 20 bytes, got more"):
        fetch("toy", Published((mirrors.url("good"),), MD5, ("a",)), tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_a_name_is_downloaded_and_opened(
    tmp_path: Path, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class_names = PUBLISHED[name].class_names
    assert len(class_names) == 10
    monkeypatch.setitem(PUBLISHED, name, Published((mirrors.url("good"),), MD5, class_names))
    splits = open_source(name, cache_dir=tmp_path)
    assert (splits["train"].num_images, splits["holdout"].num_images) == (3, 2)
    assert splits["train"].class_names == list(class_names)
    assert [splits["train"].label(index) for index in range(3)] == [9, 0, 4]
    np.testing.assert_array_equal(splits["train"].read(2), [[8, 9], [10, 11]])
    assert (tmp_path / name / FILE_NAMES[0]).exists()
