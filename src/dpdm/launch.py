"""Starting several processes on this machine, and joining those that torchrun has started. Loads no torch for one."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING

from dpdm.errors import InputError, RunError
from dpdm.plain_yaml import leaves, read_overrides
from dpdm.signals import ending_signals

if TYPE_CHECKING:
    from dpdm.config import Config


def group() -> AbstractContextManager[None]:
    """Returns the group of processes that this one was started in, to be entered; torch is loaded for that alone."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return nullcontext()
    from dpdm.distributed import processes

    return processes()


def processes_to_start(config: "Config", overrides: list[str]) -> int:
    """Returns how many processes to start for setup.n_gpus_per_node; 0 if this process is to do the work itself.

    A file may come from another machine: what it asks for is cut to the GPUs there are. The command line is obeyed.
    """
    wanted = config.setup.n_gpus_per_node
    if wanted == 1 or "WORLD_SIZE" in os.environ:
        return 0
    import torch

    gpus = 0 if config.setup.device == "cpu" else torch.cuda.device_count()
    if "setup.n_gpus_per_node" not in dict(leaves(read_overrides(overrides))):
        wanted = min(wanted, gpus)
    elif 0 < gpus < wanted:
        raise InputError(f"Expected setup.n_gpus_per_node <= {gpus}, the GPUs of this machine, got {wanted}.")
    elif wanted > (most := max(8, os.cpu_count() or 1)):
        raise InputError(f"Expected setup.n_gpus_per_node <= {most} on this machine's processors, got {wanted}.")
    return wanted if wanted > 1 else 0


def start(count: int, arguments: list[str]) -> int:
    """Runs the command of these ``arguments`` in ``count`` processes under torchrun; returns the exit status.

    A Ctrl-C, a polite kill and the end of the terminal are passed on: the processes save and end, and then this one.

    Raises:
        RunError: if a process ends early.
        KeyboardInterrupt: if they were told to end.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    # In a group of its own, so that a Ctrl-C in the terminal, too, reaches it once, through here.
    process = subprocess.Popen([*command, "-m", "dpdm", *arguments], env=environment, process_group=0)
    with _passed_on_to(process) as received:
        status = process.wait()
    if received:
        raise KeyboardInterrupt
    if status:
        raise RunError(f"Of {count} processes one ended early; its message stands above. What was saved is kept.")
    return 0


@contextmanager
def _passed_on_to(process: "subprocess.Popen[bytes]") -> Iterator[list[int]]:
    """Passes ``ending_signals`` on to ``process``, that of the terminal's end as SIGTERM; yields what came."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    old = {number: signal.signal(number, pass_on) for number in ending_signals()}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
