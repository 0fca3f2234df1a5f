"""Several processes that work on one run: who am I, what is my share, what do the others have.

Everything works without them as well: alone, ``rank()`` is 0, ``size()`` is 1 and nothing is sent. Values travel by
torch.distributed as pickles, neither encrypted nor authenticated: all processes, and the network between their
machines, must be trusted as the owner of the data is.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dpdm.errors import PeerError, RunError

T = TypeVar("T")
# Others wait while rank 0 prepares images or trains the warm-up; one that dies is noticed by its closed connection.
TIMEOUT = timedelta(days=1)


def rank() -> int:
    """Returns this process's number among ``size()``; 0 alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size() -> int:
    """Returns how many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank() == 0


def share(count: int) -> range:
    """Returns this process's part of ``range(count)``; the parts of all ranks, in order, make up the whole."""
    return range(count * rank() // size(), count * (rank() + 1) // size())


@contextmanager
def processes() -> Iterator[None]:
    """Joins the group that torchrun's environment describes, and leaves it at the end; does nothing alone.

    Tensors on a CPU travel by gloo, those on a GPU by NCCL.

    Raises:
        RunError: if the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or size() > 1:
        yield
        return
    with _reaching_others():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        # Gloo's threads now and then abort a process that takes its group down: they end with the process (cli.main).
        if torch.cuda.is_available():
            dist.destroy_process_group()


def on_main(function: Callable[[], T]) -> T:
    """Runs ``function`` on rank 0 alone and returns its value everywhere.

    Raises:
        PeerError: on the other ranks, if it failed on rank 0, which raises the error itself.
        RunError: if a process cannot be reached.
    """
    if size() == 1:
        return function()
    outcome: list[T] = []
    try:
        if is_main():
            outcome = [function()]
    finally:  # whatever was raised, the others must not wait for it
        outcome = broadcast(outcome)
    if not outcome:
        raise PeerError("Another process of this run failed; its message says why.")
    return outcome[0]


@contextmanager
def together() -> Iterator[None]:
    """Ends the block on all ranks or on none: if it fails on one, it fails on all, and one of them says why.

    What it holds must not wait for other ranks. An interruption is not agreed upon: the others notice the lost contact.

    Raises:
        PeerError: on all ranks but the first that failed, which raises the error itself.
        RunError: if a process cannot be reached.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if size() == 1:
            raise
        failure = error
    failed = [there for there, has in enumerate(gather(failure is not None)) if has]
    if failure is not None and failed[0] == rank():
        raise failure
    if failed:
        raise PeerError("Another process of this run failed; its message says why.")


def broadcast(value: T) -> T:
    """Returns rank 0's ``value`` on all ranks."""
    if size() == 1:
        return value
    box = [value]
    with _reaching_others():
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather(value: T) -> list[T]:
    """Returns everybody's ``value``, in rank order, on all ranks. Goes through the CPU."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    with _reaching_others():
        dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits until all ranks are here."""
    gather(None)


def broadcast_tensors(tensors: Sequence[Tensor]) -> None:
    """Overwrites ``tensors`` with those of rank 0; all of one type, on one device."""
    if size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with _reaching_others():
        dist.broadcast(flat, src=0)
    _scatter_into(tensors, flat)


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Overwrites ``tensors`` with their sums over all ranks; all of one type, on one device.

    Added in rank order, on every rank: the same bits everywhere and each time, which no ring that reduces promises.
    """
    if size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    parts = [torch.empty_like(flat) for _ in range(size())]
    with _reaching_others():
        dist.all_gather(parts, flat)
    total = parts[0]
    for part in parts[1:]:
        total += part
    _scatter_into(tensors, total)


def _scatter_into(tensors: Sequence[Tensor], flat: Tensor) -> None:
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


@contextmanager
def _reaching_others() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # DistError and DistBackendError are RuntimeErrors
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"Process {os.environ.get('RANK', '0')} lost contact with another one of this run ({reason}). What was "
            "saved is kept; the same command goes on (dpdm train: add --resume)."
        ) from None
