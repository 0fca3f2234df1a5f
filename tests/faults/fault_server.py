"""Runs dpdm commands in forked processes and lets a fault strike them: a start costs seconds once, not each time.

Reads one job a line, as JSON, and answers with its exit status (negative: killed by that signal). A job's keys:

    arguments  of dpdm
    log        file that gets what the command prints
    kill, how  kill it at the kill-th call that changes the disk, "before" or "after" it, or "half" way through a write
    seconds    kill it after so long
    full       from the full-th call that needs room on the disk on there is none
    largest    no file may grow beyond so many bytes (RLIMIT_FSIZE); what fits is written
    draws      file that gets a line each time that randomness of a purchase is about to be drawn: what, and its key
    clock      seed: both clocks jump at random, forwards and backwards
    pixels     wait so long (s) before each batch of images that is drawn
    hold       wait before a step of training until this file is there, a minute at most
"""

import builtins
import errno
import gc
import hashlib
import io
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # Adam loads it when it is first used
from safetensors import SafetensorError

import dpdm.central_model
import dpdm.checkpoint
import dpdm.data.prepare
import dpdm.evaluate
import dpdm.generate
import dpdm.privacy.central
import dpdm.release
import dpdm.synthesize
import dpdm.train
from dpdm import config as configs
from dpdm.cli import run_command
from dpdm.privacy.accounting import Mechanism, epsilon_spent

OS_CALLS = ("open", "write", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir")
real_open, real_write, real_save = os.open, os.write, dpdm.checkpoint.save_file


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def each_disk_call(around: Callable[..., Any]) -> None:
    """Calls ``around(name, real, arguments, named)`` in place of each call that changes something on the disk."""

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return real(*arguments, **named)
            if name == "file" and not set("wxa+") & set(str(named.get("mode", [*arguments, "r"][1]))):
                return real(*arguments, **named)
            return around(name, real, arguments, named)

        return called

    for name in OS_CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))
    io.open = builtins.open = wrap("file", io.open)  # pathlib takes the one, others the other
    dpdm.checkpoint.save_file = wrap("save", real_save)


def kill_at(number: int, how: str) -> None:
    calls = 0

    def around(name: str, real: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        nonlocal calls
        calls += 1
        if calls != number:
            return real(*arguments, **named)
        try:
            if how == "half" and name == "write":
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            elif how == "half" and name == "save":
                real(*arguments, **named)
                os.truncate(arguments[1], Path(arguments[1]).stat().st_size // 2)
            elif how != "before":
                real(*arguments, **named)
        finally:  # a folder may exist already
            die()

    each_disk_call(around)


def full_from(number: int) -> None:
    calls = 0

    def around(name: str, real: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        nonlocal calls
        needs_room = name not in ("unlink", "rmdir")
        calls += needs_room
        if not needs_room or calls < number:
            return real(*arguments, **named)
        if name == "save":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *(arguments[:1] if name in ("open", "file") else ()))

    each_disk_call(around)


def note_draws(path: str) -> None:
    step_keys, means = dpdm.train.step_keys, dpdm.central_model.noisy_class_means

    def note(what: str, key: bytes) -> None:
        descriptor = real_open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        real_write(descriptor, f"{what} {hashlib.sha256(key).hexdigest()}\n".encode())
        os.close(descriptor)

    def noted_keys(key: bytes) -> dpdm.train.StepKeys:
        note("DP-SGD", key)
        return step_keys(key)

    def noted_means(*arguments: Any, key: bytes, **named: Any) -> Any:
        note("central images", key)
        return means(*arguments, key=key, **named)

    dpdm.train.step_keys, dpdm.central_model.noisy_class_means = noted_keys, noted_means


def move_the_clock(seed: int) -> None:
    jumps = random.Random(seed)
    time.time = lambda: jumps.uniform(0, 4e9)
    time.monotonic = lambda: jumps.uniform(0, 4e6)


def draw_slowly(seconds: float) -> None:
    sample = dpdm.generate.sample

    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return sample(*arguments, **named)

    dpdm.generate.sample = slow


def hold_steps(file: Path) -> None:
    step = dpdm.train.private_step

    def held(*arguments: Any) -> Any:
        last = time.monotonic() + 60
        while not file.exists() and time.monotonic() < last:
            time.sleep(0.01)
        return step(*arguments)

    dpdm.train.private_step = held


def run(job: dict[str, Any]) -> int:
    if "draws" in job:
        note_draws(job["draws"])
    if "pixels" in job:
        draw_slowly(job["pixels"])
    if "hold" in job:
        hold_steps(Path(job["hold"]))
    if "clock" in job:
        move_the_clock(job["clock"])
    if "kill" in job:
        kill_at(job["kill"], job["how"])
    if "full" in job:
        full_from(job["full"])
    if "largest" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest"], job["largest"]))
    return run_command(job["arguments"])


def fork(job: dict[str, Any]) -> int:
    """Runs a job in a process of its own; returns its exit status."""
    reading, writing = os.pipe()  # no file: what the command prints must not fail by the limits that are set for it
    child = os.fork()
    if child == 0:
        status = 99
        try:
            for stream in (1, 2):
                os.dup2(writing, stream)
            status = run(job)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    printed = threading.Thread(target=keep, args=(reading, Path(job["log"])))
    printed.start()
    if "seconds" in job:
        time.sleep(job["seconds"])
        os.kill(child, signal.SIGKILL)  # if it has ended: it is waited for below, so its number is still its own
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    printed.join()
    return status


def keep(reading: int, log: Path) -> None:
    with os.fdopen(reading, "rb") as pipe:
        log.write_bytes(pipe.read())


def main() -> None:
    torch.set_num_threads(1)
    configs.load()
    epsilon_spent([Mechanism("DP-SGD", 0.5, 20.0, 1)], 1e-5)  # both load more when they are first used
    gc.freeze()  # collections in the forks pass over all that was imported
    for line in sys.stdin:
        print(fork(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
