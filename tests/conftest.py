"""Fixtures for all tests."""

import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from dpdm import distributed

T = TypeVar("T")

if not torch.cuda.is_available():  # a GPU's kernels run on a CPU then: Triton asks when imported and in each launch
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked ``gpu`` where there is none, whether the mark is a test's or one parameter's."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[int], Any]], list[Any]]:
    """A group of processes in one: ``together(size, function)`` runs ``function(rank)`` in as many threads.

    To ``dpdm.distributed`` each has a rank of its own. Returns their results.
    """
    return lambda size, function: _together(monkeypatch, size, function)


def _together(monkeypatch: pytest.MonkeyPatch, size: int, function: Callable[[int], T]) -> list[T]:
    own, boxes, meeting = threading.local(), [None] * size, threading.Barrier(size, timeout=60)

    def gather(value: Any) -> list[Any]:
        boxes[own.rank] = value
        meeting.wait()
        values = list(boxes)
        meeting.wait()  # nobody overwrites a box before all have looked
        return values

    def sum_over_processes(tensors: Sequence[Tensor]) -> None:
        parts = gather([tensor.clone() for tensor in tensors])
        for tensor, *others in zip(tensors, *parts, strict=True):
            tensor.copy_(sum(others[1:], start=others[0]))

    def broadcast_tensors(tensors: Sequence[Tensor]) -> None:
        for tensor, first in zip(tensors, gather([tensor.clone() for tensor in tensors])[0], strict=True):
            tensor.copy_(first)

    def run(rank: int) -> T:
        own.rank = rank
        try:
            return function(rank)
        except BaseException:
            meeting.abort()
            raise

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "rank", lambda: own.rank)
        patch.setattr(distributed, "size", lambda: size)
        patch.setattr(distributed, "gather", gather)
        patch.setattr(distributed, "broadcast", lambda value: gather(value)[0])
        patch.setattr(distributed, "sum_over_processes", sum_over_processes)
        patch.setattr(distributed, "broadcast_tensors", broadcast_tensors)
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(run, range(size)))


class TinyInception(nn.Module):
    """Called as the published Inception file is, with 6 features and 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.output = nn.Linear(6, 5)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        features = self.layers((img.to(torch.float32) - 127.5) / 127.5).reshape(-1, 6)
        if return_features:
            return features
        if no_output_bias:
            return torch.softmax(features @ self.output.weight.t(), 1)
        return torch.softmax(self.output(features), 1)


@pytest.fixture(scope="session")
def tiny_inception() -> nn.Module:
    """A module with the published Inception file's way of being called."""
    module = TinyInception()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.fixture(scope="session")
def tiny_inception_file(tiny_inception: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a TorchScript file."""
    path = tmp_path_factory.mktemp("extractor") / "tiny.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(tiny_inception).save(path)
    return path
