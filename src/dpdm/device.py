"""The machine that a run is on: its device, and everything that the rounding of a computation may depend on."""

import ctypes
import functools
import hashlib
import json
import os
import platform
import secrets
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from dpdm import distributed
from dpdm.errors import InputError

LIBRARIES = ("dpdm", "torch", "numpy", "cryptography", "dp-accounting")
Precision = Literal["auto", "float32", "bf16"]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
ROUNDING_VARIABLES = ("ATEN_", "ONEDNN_", "DNNL_", "MKL_", "OMP_", "CUBLAS_", "CUDNN_", "NVIDIA_", "TORCH_")


def pick_device(name: str) -> torch.device:
    """Returns the device called ``name``; auto is a GPU if there is one, under torchrun the one of this process.

    Raises:
        InputError: if it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name)
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("it is neither a CPU nor a CUDA device")
        if device.type == "cuda":
            if device.index is None:  # torch asks for a number in many places
                device = torch.device("cuda", torch.cuda.current_device())
            torch.cuda.set_device(device)  # NCCL takes the current one
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"Expected setup.device to be auto, cpu or a usable GPU, got {name!r}: {reason}") from None


def total_memory(device: torch.device) -> int:
    """Returns the bytes of memory of a GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: torch.device) -> int:
    """Returns the bytes of memory that are free now: of a GPU, or of the machine, what files only borrow included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return total_memory(device) // 2


def environment(device: torch.device) -> dict[str, str]:
    """Returns versions and hardware, for the reports."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {**{name: version(name) for name in LIBRARIES}, "python": platform.python_version(), "device": hardware}


def use_threads(wanted: int | None) -> None:
    """Lets torch compute by ``wanted`` threads, at most one a core; None: as many as it has chosen.

    More than cores wait for each other, and a config may come from a larger machine.
    """
    torch.set_num_threads(min(wanted or torch.get_num_threads(), os.cpu_count() or 1))


def use_full_precision() -> None:
    """Turns TF32 off, which rounds to 10 bits where float32 is asked for, and sums in less than float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cudnn.allow_tf32 = False


def use_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether the network computes its steps in bfloat16, with float32 weights; auto: on a GPU that has it.

    On a CPU only if asked for: it is faster on some alone (docs/performance.md), and on which one a run's course should
    not depend.
    """
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


def keep_freed_memory() -> None:
    """Lets the process keep the memory that it frees, for its next step; glibc gives large blocks back at once.

    A step frees and asks again for some hundred MB, and the system would clear each page anew: 5 % of a step's time
    (docs/performance.md). Elsewhere than with glibc this does nothing.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def execution(device: torch.device) -> str:
    """Returns all that rounding may depend on, so that a step computed otherwise is another step.

    On a CPU the same string means the same bits. On other devices kernels may add in any order, so there each process
    is told apart: a step that is repeated after a crash is a new one, with its own randomness, and is charged.
    """
    facts = {
        "environment": environment(device),
        "code": code_hash(),
        "threads": torch.get_num_threads(),
        "processes": distributed.size(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "matmul": torch.get_float32_matmul_precision(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(ROUNDING_VARIABLES)},
        "process": "" if device.type == "cpu" else secrets.token_hex(16),
    }
    return json.dumps(facts, sort_keys=True)


@functools.cache
def code_hash() -> str:
    """Returns a hash of all of dpdm's own code."""
    sha = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        sha.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
