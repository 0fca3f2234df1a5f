"""What is shown while training: when, of what, and that it is marked as private."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpdm import config
from dpdm.checkpoint import TrainState
from dpdm.diffusion.denoiser import Denoiser
from dpdm.evaluation import fid
from dpdm.monitor import Monitor
from dpdm.run import fresh_state
from dpdm.workdir import Workdir

TINY = [
    "data.resolution=8",
    "data.num_channels=1",
    "data.num_classes=2",
    "data.path=unused",
    "model.network.width=4",
    "model.network.channel_multipliers=[1]",
    "model.network.num_res_blocks=1",
    "sampler.num_steps=2",
    "sampler.num_images=4",
    "setup.device=cpu",
]


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., tuple[Monitor, TrainState, Workdir]]:
    def start(*overrides: str) -> tuple[Monitor, TrainState, Workdir]:
        settings = config.load([], [*TINY, *overrides])
        denoiser: Denoiser = config.build_denoiser(settings)
        workdir = Workdir(tmp_path / "w")
        workdir.private.mkdir(parents=True, exist_ok=True)
        return Monitor(settings, workdir, denoiser), fresh_state(denoiser), workdir

    return start


def test_figures_come_every_so_many_steps_and_say_that_they_are_private(begin, capsys) -> None:
    monitor, state, _ = begin("train.log_every=2", "train.log_threshold=4")
    state.curves = {"loss": [9.0, 9.0, 9.0, 9.0, math.nan, 3.0], "clip_fraction": [0.0, 0.0, 0.0, 0.0, math.nan, 0.5]}
    shown = []
    for step in range(1, 7):
        state.step = step
        assert monitor.is_due(step) == (step in (4, 6))
        monitor.look(state)
        shown.append(capsys.readouterr().err)
    assert [bool(text) for text in shown] == [False, False, False, True, False, True]
    # The mean since the last look, without the empty batch's NaN.
    assert shown[5] == "Step 6 (private figures): loss 3, 50 % of gradients clipped\n"
    for lost, told in ((0.0, ""), (3.0, ", 1.5 of them in a step infinite or NaN, which count as 0")):
        state.curves["num_nonfinite"] = [0.0, 0.0, 0.0, 0.0, 0.0, lost]
        monitor.look(state)
        assert capsys.readouterr().err == f"Step 6 (private figures): loss 3, 50 % of gradients clipped{told}\n"


def test_nothing_is_due_unless_asked_for(begin, capsys) -> None:
    monitor, state, workdir = begin()
    assert not any(monitor.is_due(step) for step in range(1, 200))
    monitor.look(state)
    assert capsys.readouterr().err == ""
    assert list(workdir.private.iterdir()) == []


def test_pictures_are_drawn_with_the_average_and_leave_training_alone(begin) -> None:
    monitor, state, workdir = begin("train.snapshot_every=5")
    state.step = 5
    before = {name: p.clone() for name, p in state.parameters.items()}
    random = torch.get_rng_state()
    monitor.look(state)
    (picture,) = workdir.snapshots.iterdir()
    assert picture.name == "000005.png"
    first = np.asarray(Image.open(picture))
    assert all(torch.equal(before[name], p) for name, p in state.parameters.items())
    assert torch.equal(random, torch.get_rng_state())
    for p in state.parameters.values():
        p.add_(1.0)
    monitor.look(state)
    assert np.array_equal(first, np.asarray(Image.open(picture)))  # the raw weights do not enter
    for average in state.ema.values():
        average.add_(torch.randn(average.shape, generator=torch.Generator().manual_seed(1)))
    monitor.look(state)
    assert not np.array_equal(first, np.asarray(Image.open(picture)))


def test_fid_is_kept_in_one_row_for_each_step(begin, tmp_path: Path, tiny_inception_file: Path, capsys) -> None:
    overrides = [f"evaluation.extractor={tiny_inception_file}", "evaluation.fid_every=2", "evaluation.fid_samples=6"]
    statistics = tmp_path / "real.npz"
    dimension = fid.open_extractor(str(tiny_inception_file), (1, 8, 8)).dimension
    np.savez(statistics, mu=np.zeros(dimension), sigma=np.eye(dimension))
    monitor, state, workdir = begin(*overrides, f"evaluation.fid_stats=[{statistics}]")
    for step in (4, 2, 4):
        state.step = step
        monitor.look(state)
    with workdir.fid.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["statistics"]) for row in rows] == [("2", str(statistics)), ("4", str(statistics))]
    assert all(float(row["fid"]) > 0 for row in rows)
    assert capsys.readouterr().err.count("(private figures): FID") == 3
