"""Starting several processes on this machine, and joining those that torchrun has started. Loads no torch for one."""

import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from dpdm.errors import InputError, RunError

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
    if not any(override.startswith("setup.n_gpus_per_node=") for override in overrides):
        wanted = min(wanted, gpus)
    elif 0 < gpus < wanted:
        raise InputError(f"Expected setup.n_gpus_per_node <= {gpus}, the GPUs of this machine, got {wanted}.")
    elif wanted > (most := max(8, os.cpu_count() or 1)):
        raise InputError(f"Expected setup.n_gpus_per_node <= {most} on this machine's processors, got {wanted}.")
    return wanted if wanted > 1 else 0


def start(count: int, arguments: list[str]) -> int:
    """Runs the command of these ``arguments`` in ``count`` processes under torchrun; returns the exit status.

    Raises:
        RunError: if a process ends early.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    threads = str(max(1, (os.cpu_count() or 1) // count))
    done = subprocess.run(
        [*command, "-m", "dpdm", *arguments], env={"OMP_NUM_THREADS": threads, **os.environ}, check=False
    )
    if done.returncode:
        raise RunError(f"Of {count} processes one ended early; its message stands above. What was saved is kept.")
    return 0
