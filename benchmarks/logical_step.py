"""What a whole step of training costs, with images and noise made in the step, and ready beside it.

    python benchmarks/logical_step.py --examples 64 --draws 4 --device cpu --json

A whole step is a Poisson batch of EXAMPLES expected images with DRAWS each: reading them, the passes, clipping, noise,
Adam, the moving average and the digest of the weights; what is bought in the ledger is left out. The images are random
ones, eight times as many as a batch. The two ways take turns within one process:

    plain   setup.data_on_device=false, setup.overlap_noise=false
    ready   both true

``plain_waits`` and ``ready_waits``: how often a step makes the host wait for the GPU, counted by torch's own warnings.
"""

import argparse
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _charts import ROOT
from dp_step import NETWORKS, Problem, noise_seconds, seconds
from torch import Tensor

from dpdm import config as configs
from dpdm.data.archive import ArchiveWriter
from dpdm.privacy.noise import new_key
from dpdm.run import open_run
from dpdm.train import step_keys, take_step
from dpdm.workdir import Workdir

WAYS = {"plain": "false", "ready": "true"}
IMAGES_PER_EXAMPLE = 8


def write_images(path: Path, network: str, count: int) -> None:
    """Writes an archive of random images of the network's shape."""
    data = configs.load([ROOT / "configs" / network / "train_eps_10.0.yaml"], quiet=True).data
    side, channels, classes = data.resolution or 1, data.num_channels or 1, data.num_classes or 0
    random = np.random.default_rng(0)
    with ArchiveWriter(path, [str(label) for label in range(classes)] if classes else None) as writer:
        for index in range(count):
            image = random.integers(0, 256, (channels, side, side), np.uint8)
            writer.add(image, index % classes if classes else None)


def whole_step(arguments: argparse.Namespace, folder: Path, way: str) -> Callable[[], list[Tensor]]:
    """Returns a function that takes one more step of a run of its own."""
    keys = [f"data.path={folder / 'images.zip'}", f"train.expected_batch_size={arguments.examples}"]
    keys += [f"loss.noise_multiplicity={arguments.draws}", f"setup.device={arguments.device}"]
    keys += [f"setup.num_threads={arguments.threads}", "dp.epsilon=null", "dp.noise_multiplier=50"]
    keys += ["dp.delta=1e-6", "train.num_iterations=1000", "train.warmup.enabled=false", "train.num_epochs=null"]
    keys += [f"setup.{name}={WAYS[way]}" for name in ("data_on_device", "overlap_noise")]
    config = configs.load([ROOT / "configs" / arguments.network / "train_eps_10.0.yaml"], keys, quiet=True)
    run, _, state = open_run(config, Workdir(folder / way), resume=False)

    def step() -> list[Tensor]:
        take_step(run, state, step_keys(new_key()))
        return []

    return step


def count_waits(step: Callable[[], list[Tensor]]) -> int:
    """Returns how often one step makes the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of one network and shape."""
    with tempfile.TemporaryDirectory() as name:
        write_images(Path(name) / "images.zip", arguments.network, IMAGES_PER_EXAMPLE * arguments.examples)
        steps = {way: whole_step(arguments, Path(name), way) for way in WAYS}
        for step in steps.values():
            step()
        rounds = [
            {way: seconds(step, arguments.device) for way, step in steps.items()} for _ in range(arguments.rounds)
        ]
        waits = {way: count_waits(step) if arguments.device == "cuda" else None for way, step in steps.items()}
    figures = {name: getattr(arguments, name) for name in ("network", "examples", "draws", "rounds")}
    figures["device"] = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    figures |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for way in WAYS:
        figures[f"{way}_seconds"] = statistics.median(times[way] for times in rounds)
        figures[f"{way}_waits"] = waits[way]
    figures["ready_ratio"] = statistics.median(times["ready"] / times["plain"] for times in rounds)
    problem = Problem(arguments.network, 1, 1, arguments.device)
    figures["noise_share"] = noise_seconds(problem) / figures["plain_seconds"]
    figures["noise_share_ready"] = noise_seconds(problem, ready=True) / figures["ready_seconds"]
    return figures


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="mnist_28")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="on one line")
    arguments = parser.parse_args(given)
    print(json.dumps(measure(arguments), indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
