"""Fetching published data sets into a cache, checked against their published checksums."""

import hashlib
import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from dpdm.errors import InputError, RunError
from dpdm.fetching import TIMEOUT_SECONDS, fetch_file
from dpdm.files import atomic_path
from dpdm.progress import Progress

MAX_DOWNLOAD_BYTES = 64 * 2**20  # the largest file has 26 MB; a mirror that sends more is not a mirror
CIFAR10 = "cifar10"
CIFAR10_FILE = "cifar-10-python.tar.gz"
CIFAR10_MIRRORS = ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",)
# Its page publishes the MD5 c58f30108f718f92721af3b95e74349a; this is the SHA-256 that Keras checks.
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CIFAR10_BYTES = 170_498_071
FILE_NAMES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


@dataclass(frozen=True)
class Published:
    """A data set of four idx files.

    Attributes:
        mirrors: addresses of folders, tried in order.
        md5: checksums in the order of ``FILE_NAMES``, as published. They detect damage and a wrong file; MD5
            does not withstand somebody who forges a file on purpose, and nothing else is published.
        class_names: in the order of the labels.
    """

    mirrors: tuple[str, ...]
    md5: tuple[str, ...]
    class_names: tuple[str, ...]


PUBLISHED = {
    "mnist": Published(
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "http://yann.lecun.com/exdb/mnist/",
        ),
        md5=(
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
        class_names=tuple("0123456789"),
    ),
    "fashion_mnist": Published(
        mirrors=(
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
        md5=(
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
        class_names=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
    ),
}


def fetch(name: str, data_set: Published, folder: Path) -> Path:
    """Puts the four files into ``folder`` unless they are there and right; returns ``folder``.

    Raises:
        RunError: in one line with every mirror's failure and the way round, if no mirror gives the right
            file.
    """
    missing = [
        (file, md5) for file, md5 in zip(FILE_NAMES, data_set.md5, strict=True) if not _is_right(folder / file, md5)
    ]
    if not missing:
        return folder
    with Progress(f"download {name}", len(missing), unit="files") as progress:
        for file, md5 in missing:
            failures = []
            for mirror in data_set.mirrors:
                try:
                    content = _download(mirror + file, md5)
                except (OSError, http.client.HTTPException, InputError) as error:
                    failures.append(f"{mirror}: {getattr(error, 'reason', None) or error}")
                    continue
                _save(folder / file, content)
                break
            else:
                raise RunError(
                    f"Cannot download {file} of {name} ({'; '.join(failures)}): put "
                    f"{', '.join(FILE_NAMES)} into a folder and give that folder as the source."
                )
            progress.advance()
    return folder


def fetch_cifar10(folder: Path) -> Path:
    """Puts CIFAR-10's tar into ``folder`` unless it is there and right; returns its path.

    Raises:
        RunError: in one line with the way round, if no mirror gives the right file.
    """
    remedy = f"download {CIFAR10_FILE} elsewhere and give its path as the source."
    path = folder / CIFAR10_FILE
    return fetch_file(path, CIFAR10_MIRRORS, CIFAR10_SHA256, num_bytes=CIFAR10_BYTES, remedy=remedy)


def _download(url: str, md5: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "dpdm"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        content = response.read(MAX_DOWNLOAD_BYTES + 1)
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise InputError(f"expected MD5 {md5}, got {found}")
    return content


def _save(path: Path, content: bytes) -> None:
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error}.") from error


def _is_right(path: Path, md5: str) -> bool:
    if not path.is_file():
        return False
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == md5
