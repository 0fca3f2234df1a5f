"""What is looked at while training: figures on the terminal, pictures of the present model. For the owner alone.

Called when the checkpoint of the step is on disk, so that nothing is seen that could be drawn anew. Curves are computed
without noise; whoever stops or changes a run because of them makes a choice that the guarantee does not cover.
"""

import copy
import csv
import math

import numpy as np

from dpdm import distributed
from dpdm.checkpoint import TrainState
from dpdm.config import Config
from dpdm.diffusion.denoiser import Denoiser
from dpdm.evaluation.fid import FidMeter
from dpdm.files import atomic_path
from dpdm.generate import as_drawn, draw, draw_some, grid
from dpdm.progress import say
from dpdm.workdir import Workdir


class Monitor:
    """Looks at a run every so many steps, as its config wishes.

    Args:
        config: its keys ``train.log_every``, ``train.snapshot_every``, ``evaluation.fid_every`` and their like.
        workdir: where ``private/snapshots/`` and ``private/fid.csv`` are.
        denoiser: in training; its shape is copied, its weights are not touched.
    """

    def __init__(self, config: Config, workdir: Workdir, denoiser: Denoiser) -> None:
        self._config, self._workdir, self._denoiser = config, workdir, denoiser
        self._meter: FidMeter | None = None
        if config.evaluation.fid_every is not None:
            network = denoiser.network
            shape = (network.num_channels, network.resolution, network.resolution)
            self._meter = FidMeter(config.evaluation, shape, device=next(denoiser.parameters()).device)

    def is_due(self, step: int) -> bool:
        """Whether ``look`` would show anything after ``step`` steps."""
        return self._logs(step) or self._draws(step) or self._measures(step)

    def look(self, state: TrainState) -> None:
        """Shows what is due after the state's last step."""
        if self._logs(state.step) and distributed.is_main():
            text = f"Step {state.step} (private figures): loss {self._mean(state, 'loss'):.4g}"
            if "clip_fraction" in state.curves:
                text += f", {100 * self._mean(state, 'clip_fraction'):.0f} % of gradients clipped"
                lost = self._mean(state, "num_nonfinite")
                if lost > 0:
                    text += f", {lost:.3g} of them in a step infinite or NaN, which count as 0"
            say(text)
        if self._draws(state.step) and distributed.is_main():
            self._workdir.snapshots.mkdir(exist_ok=True)
            images, labels = draw(self._averaged(state), as_drawn(self._config, state))
            with atomic_path(self._workdir.snapshots / f"{state.step:06d}.png") as temporary:
                grid(images, labels).save(temporary, format="PNG")
        if self._meter is not None and self._measures(state.step):
            self._measure(state, self._meter)

    def _logs(self, step: int) -> bool:
        train = self._config.train
        return _is_due(step, train.log_every, train.log_threshold)

    def _draws(self, step: int) -> bool:
        train = self._config.train
        return _is_due(step, train.snapshot_every, train.snapshot_threshold)

    def _measures(self, step: int) -> bool:
        evaluation = self._config.evaluation
        return _is_due(step, evaluation.fid_every, evaluation.fid_threshold)

    def _measure(self, state: TrainState, meter: FidMeter) -> None:
        """Draws as many images as the config says, by all processes; keeps the FID in ``private/fid.csv``."""
        indices = distributed.share(self._config.evaluation.fid_samples)
        found = meter.measure(draw_some(self._averaged(state), as_drawn(self._config, state), indices))
        if not distributed.is_main():
            return
        rows = {(state.step, path): value for path, value in found.items()}
        for (_, path), value in rows.items():
            text = f"Step {state.step} (private figures): FID {value:.4g} to {path} ({meter.extractor.name})"
            say(text)
        if self._workdir.fid.exists():
            with self._workdir.fid.open(newline="", encoding="utf-8") as file:
                old = {(int(row["step"]), row["statistics"]): float(row["fid"]) for row in csv.DictReader(file)}
            rows = old | rows  # a step that is repeated after a crash is one row
        lines = [("step", "statistics", "fid"), *((*key, value) for key, value in sorted(rows.items()))]
        with atomic_path(self._workdir.fid) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)

    def _mean(self, state: TrainState, name: str) -> float:
        """Returns the mean of a curve since the last look; empty batches, which have none, left out."""
        values = np.array(state.curves.get(name, [])[-(self._config.train.log_every or 1) :])
        return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan

    def _averaged(self, state: TrainState) -> Denoiser:
        """Returns a denoiser with the averaged weights, as a release would have them."""
        averaged = copy.deepcopy(self._denoiser)
        averaged.network.load_state_dict(state.ema)
        return averaged


def _is_due(step: int, every: int | None, threshold: int) -> bool:
    return every is not None and step >= threshold and step % every == 0
