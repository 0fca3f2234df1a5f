"""How many processes a config's wish for GPUs starts, and what becomes of them when the command is to end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpdm import config, launch
from dpdm.errors import InputError
from dpdm.launch import processes_to_start


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def wanted(*overrides: str, file: Path | None = None) -> int:
    return processes_to_start(config.load([file] if file else [], list(overrides)), list(overrides))


@pytest.mark.parametrize(("present", "started"), [(0, 0), (1, 0), (3, 3), (8, 8), (16, 8)])
def test_a_file_s_wish_is_cut_to_the_gpus_there_are(gpus, tmp_path: Path, present: int, started: int) -> None:
    gpus(present)
    (tmp_path / "c.yaml").write_text("setup: {n_gpus_per_node: 8}")
    assert wanted(file=tmp_path / "c.yaml") == started


def test_the_command_line_is_obeyed(gpus) -> None:
    gpus(0)
    assert wanted("setup.n_gpus_per_node=2") == 2  # processes on the CPU
    gpus(4)
    assert wanted("setup.n_gpus_per_node=2") == 2
    assert wanted("setup.n_gpus_per_node=6", "setup.device=cpu") == 6
    assert wanted("setup={n_gpus_per_node: 2, device: cpu}") == 2
    with pytest.raises(InputError, match=r"n_gpus_per_node <= 4, the GPUs of this machine, got 5"):
        wanted("setup.n_gpus_per_node=5")


def test_one_process_and_those_that_were_started_start_no_others(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(4)
    assert wanted() == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert wanted("setup.n_gpus_per_node=2") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_asks_the_command_to_end_asks_its_processes(number: int) -> None:
    """Once each, and they are waited for: a process that went on alone would go on to buy steps."""
    program = (
        "import signal, sys, time\n"
        "got = []\n"
        "for number in (signal.SIGINT, signal.SIGTERM):  # what training notices\n"
        "    signal.signal(number, lambda *_: got.append(1))\n"
        "print('ready', flush=True)\n"
        "end = time.monotonic() + 2\n"
        "while not got and time.monotonic() < end: time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        "print(len(got), flush=True)\n"
    )
    before = signal.signal(number, signal.default_int_handler)  # these tests themselves may run under nohup
    try:
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, process_group=0) as process:
            assert process.stdout is not None
            with launch._passed_on_to(process) as received:
                assert process.stdout.readline() == b"ready\n"
                os.kill(os.getpid(), number)
                assert process.wait(timeout=30) == 0
            assert process.stdout.read() == b"1\n"
        assert received == [number]
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_who_began_under_nohup_goes_on_without_a_terminal() -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with (
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"], process_group=0) as process,
            launch._passed_on_to(process) as received,
        ):
            os.kill(os.getpid(), signal.SIGHUP)
            assert process.wait(timeout=30) == 0
        assert received == []
    finally:
        signal.signal(signal.SIGHUP, old)
