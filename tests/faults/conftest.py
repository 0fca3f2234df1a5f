"""A process that forks commands, and runs that were stopped early, for all tests of faults."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults.struck import Server, copied, stop_early, write_images

from dpdm.workdir import Workdir


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "in")


@pytest.fixture(scope="session")
def stopped(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Workdir:
    """A run that died two steps after its checkpoint, both reserved."""
    return stop_early(images, tmp_path_factory.mktemp("stopped"))


@pytest.fixture(scope="session")
def other(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Workdir:
    """Another run on the same images, by the same config."""
    return stop_early(images, tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="session")
def finished(server: Server, stopped: Workdir, tmp_path_factory: pytest.TempPathFactory) -> Workdir:
    """How the stopped run ends if nothing happens to it."""
    run = copied(stopped, tmp_path_factory.mktemp("finished"))
    assert server("train", "--resume", "--workdir", run.root)[0] == 0
    return run
