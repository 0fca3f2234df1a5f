"""How many processes a config's wish for GPUs starts."""

from pathlib import Path

import pytest
import torch

from dpdm import config
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
    with pytest.raises(InputError, match=r"n_gpus_per_node <= 4, the GPUs of this machine, got 5"):
        wanted("setup.n_gpus_per_node=5")


def test_one_process_and_those_that_were_started_start_no_others(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(4)
    assert wanted() == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert wanted("setup.n_gpus_per_node=2") == 0
