"""The commands of docs/from-the-original.md, in order, as a user types them, on small real data.

The images are scikit-learn's digits in the layouts of MNIST, CIFAR-10, ImageNet and CelebA; the checkpoints are in the
original's format. Networks are small and steps few; all else is as the page says.
"""

import gzip
import re
import shlex
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from tests.cifar_file import batch, meta, tar
from torch import nn

from dpdm import config as configs
from dpdm.cli import run_command
from dpdm.data.archive import ImageArchive
from dpdm.reference_checkpoint import original_names

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "from-the-original.md").read_text(encoding="utf-8")
SMALL = ["model.network.width=4", "model.network.channel_multipliers=[1]", "model.network.num_res_blocks=1"]
SMALL += ["model.network.attention_resolutions=[]", "setup.device=cpu"]
QUICK = ["train.num_iterations=2", "train.expected_batch_size=20", "loss.noise_multiplicity=1", "dp.epsilon=null"]
QUICK += ["dp.noise_multiplier=3", "sampler.num_steps=2"]


def commands() -> list[list[str]]:
    return [shlex.split(line)[1:] for line in re.findall(r"^    (dpdm .*)$", PAGE, flags=re.MULTILINE)]


def digits(side: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns real digits (count, side, side) uint8, and their labels."""
    images, labels = load_digits(return_X_y=True)
    scaled = [
        np.asarray(Image.fromarray(np.rint(image / 16 * 255).astype(np.uint8).reshape(8, 8)).resize((side, side)))
        for image in images[:count]
    ]
    return np.stack(scaled), labels[:count].astype(np.uint8)


def write_idx(folder: Path) -> None:
    folder.mkdir(parents=True)
    images, labels = digits(28, 120)
    for split, rows in {"train": slice(0, 80), "t10k": slice(80, 120)}.items():
        for kind, values in {"images-idx3": images[rows], "labels-idx1": labels[rows]}.items():
            head = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))


def write_cifar(path: Path) -> None:
    images, labels = digits(32, 120)
    pixels = np.repeat(images.reshape(120, 1, -1), 3, axis=1).reshape(120, -1)
    members = {"batches.meta": meta([str(digit).encode() for digit in range(10)])}
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = slice(20 * number, 20 * number + 20)
        members[name] = batch(pixels[rows], labels[rows].tolist())
    tar(path, {f"cifar-10-batches-py/{name}": content for name, content in members.items()})


def write_folders(imagenet: Path, celeba: Path) -> None:
    images, labels = digits(60, 40)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = imagenet / f"n{label:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert("RGB").resize((80, 60)).save(folder / f"{index}.JPEG", format="JPEG")
        celeba.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert("RGB").resize((178, 218)).save(celeba / f"{index + 1:06d}.jpg")


def write_checkpoint(path: Path, config: str) -> None:
    """Writes random weights of the small network in the original's format, projections turned over."""
    denoiser = configs.build_denoiser(configs.load([config], SMALL))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    names = original_names(denoiser.network)
    weights = [
        p.detach().t().clone() if re.search(r"NIN_\d\.W$", name) else p.detach().clone()
        for name, p in zip(names, denoiser.network.parameters(), strict=True)
    ]
    model = {f"module.model.{name}": weight for name, weight in zip(names, weights, strict=True)}
    ema = {"decay": 0.999, "num_updates": 28, "shadow_params": weights}
    torch.save({"model": model, "ema": ema, "optimizer": {"state": {}, "param_groups": []}, "step": 28}, path)


class Features(nn.Module):
    """Stands for Inception: 6 averages of the pixels."""

    def forward(self, x: torch.Tensor, return_features: bool = True) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(x.float() / 255, (2, 1)).flatten(1)


THEIRS = {
    "setup": {"runner": "train_dpdm_base", "n_gpus_per_node": 8, "n_nodes": 1, "node_rank": 0, "omp_n_threads": 1},
    "data": {"name": "mnist", "resolution": 28, "num_channels": 1, "n_classes": 10, "one_hot": False},
    "model": {"denoiser_name": "edm", "denoiser_network": "song", "ema_rate": 0.999},
    "optim": {"optimizer": "Adam", "params": {"lr": 3e-4, "weight_decay": 0.0}},
    "dp": {"epsilon": 10.0, "delta": 1e-5, "max_grad_norm": 1.0, "n_splits": 2},
    "loss": {"version": "edm", "n_noise_samples": 32, "label_unconditioning_prob": 0.1, "p_mean": -1.2, "p_std": 1.2},
    "train": {"seed": 0, "batch_size": 40, "n_epochs": 1, "log_freq": 1, "snapshot_freq": 2},
    "sampler": {"type": "ddim", "stochastic": False, "num_steps": 50, "tmin": 0.002, "tmax": 80, "guid_scale": None},
}


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page takes for granted."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    raw = tmp_path / "data/raw"
    write_idx(raw / "mnist")
    write_cifar(raw / "cifar-10-python.tar.gz")
    write_folders(raw / "imagenet/ILSVRC/Data/CLS-LOC/train", raw / "celeba/img_align_celeba")
    write_checkpoint(tmp_path / "mnist_edm_1.0.pth", "configs/mnist_28/sample_eps_1.0.yaml")
    write_checkpoint(tmp_path / "celeba_edm_10.0.pth", "configs/celeba_32/sample_eps_10.0.yaml")
    torch.jit.script(Features()).save(str(tmp_path / "extractor.pt"))
    (tmp_path / "their_train_eps_10.0.yaml").write_text(yaml.safe_dump(THEIRS))
    return tmp_path


def extras(command: list[str]) -> list[str]:
    """What makes a command quick, in front of the page's own overrides."""
    if command[0] == "train":
        return [*SMALL, *QUICK]
    if command[0] in ("sample", "release") and "--config" in command:
        return [*SMALL, "sampler.num_images=6"]
    return []


@pytest.mark.slow
def test_every_command_of_the_page_runs(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands():
        at = command.index("--") if "--" in command else len(command)
        if made_quick := extras(command):
            command = [*command[:at], "--", *made_quick, *command[at + 1 :]]
        command = [word.replace("num_steps=1000", "num_steps=20") for word in command]
        assert run_command(command) == 0, (command, capsys.readouterr().err[-2000:])
    assert ImageArchive(Path("data/processed/cifar10.zip")).num_images == 100
    assert ImageArchive(Path("data/processed/imagenet.zip")).num_classes == 10
    assert ImageArchive(Path("data/processed/celeba.zip")).num_classes == 0
    assert set(Path("out/threes/samples/labels.csv").read_text().split()[1:]) == {f"{i:06d}.png,3" for i in range(6)}
    labels = [line.split(",")[1] for line in Path("out/random/samples/labels.csv").read_text().split()[1:]]
    assert len(set(labels)) > 2
    plain = Path("out/plain/samples/000001.png").read_bytes()
    for other in ("steps", "guided", "best"):
        assert Path(f"out/{other}/samples/000001.png").read_bytes() != plain
    assert "No privacy guarantee" in Path("converted/release/README.md").read_text()
    assert Path("runs/mnist/private/fid.csv").read_text().count("mnist.npz") == 1


def test_the_page_names_every_config() -> None:
    for path in sorted((ROOT / "configs").rglob("sample_*.yaml")):
        assert path.relative_to(ROOT).as_posix() in PAGE
