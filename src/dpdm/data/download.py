"""Fetching published data sets into a cache, checked against their published checksums."""

from dataclasses import dataclass
from pathlib import Path

from dpdm.fetching import fetch_file

MAX_IDX_BYTES = 64 * 2**20  # the largest file has 26 MB; a mirror that sends more is not a mirror
CIFAR10 = "cifar10"
CIFAR10_FILE = "cifar-10-python.tar.gz"
CIFAR10_MIRRORS = ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",)
# Its page publishes the MD5 c58f30108f718f92721af3b95e74349a; this is the SHA-256 that Keras checks.
CIFAR10_CHECKSUM = "sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
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
        md5: checksums in the order of ``FILE_NAMES``; nothing stronger is published.
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
    remedy = f"of {name}, put {', '.join(FILE_NAMES)} into a folder and give that folder as the source."
    for file, md5 in zip(FILE_NAMES, data_set.md5, strict=True):
        urls = [mirror + file for mirror in data_set.mirrors]
        fetch_file(folder / file, urls, f"md5:{md5}", max_bytes=MAX_IDX_BYTES, remedy=remedy)
    return folder


def fetch_cifar10(folder: Path) -> Path:
    """Puts CIFAR-10's tar into ``folder`` unless it is there and right; returns its path.

    Raises:
        RunError: in one line with the way round, if no mirror gives the right file.
    """
    remedy = f"download {CIFAR10_FILE} elsewhere and give its path as the source."
    path = folder / CIFAR10_FILE
    return fetch_file(path, CIFAR10_MIRRORS, CIFAR10_CHECKSUM, max_bytes=CIFAR10_BYTES, remedy=remedy)
