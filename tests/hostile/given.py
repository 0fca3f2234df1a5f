"""One small file of every kind that dpdm reads, all of them fine."""

import gzip
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tests.cifar_file import batch, meta
from tests.made_release import KEYS, make_release

from dpdm import config as configs
from dpdm.cli import run_command
from dpdm.data.archive import ArchiveWriter

SIDE = 8
TINY = (
    "dp.noise_multiplier=4",
    "train.num_iterations=2",
    "train.expected_batch_size=4",
    "model.network.width=4",
    "model.network.channel_multipliers=[1]",
    "model.network.num_res_blocks=1",
    "sampler.num_steps=2",
    "sampler.num_images=3",
    "setup.device=cpu",
    "setup.num_threads=1",
)


def make_given(folder: Path) -> Path:
    """Fills ``folder``; returns it."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (12, SIDE, SIDE), np.uint8)
    for index, image in enumerate(pixels):
        path = folder / "images" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    make_archive(folder / "archive.zip")
    make_image_files(folder / "formats")
    make_idx(folder / "idx")
    make_celeba(folder / "celeba")
    (folder / "cifar.tar.gz").write_bytes(make_cifar())
    (folder / "cifar.tar").write_bytes(gzip.decompress((folder / "cifar.tar.gz").read_bytes()))
    np.savez(folder / "samples.npz", pixels[..., None])
    (folder / "model.pth").write_bytes(make_original())
    (folder / "old.pth").write_bytes(make_original(new=False))
    (folder / "stats.npz").write_bytes(make_statistics())
    (folder / "config.yaml").write_text(configs.to_yaml(configs.load([], TINY)))
    (folder / "model.yaml").write_text(configs.to_yaml(configs.load([], KEYS)))
    make_release(folder / "released", images=4)
    path = folder / "run"
    keys = (f"data.path={folder / 'images'}", *TINY)
    assert run_command(["train", "--workdir", str(path), "--", *keys]) == 0
    return folder


def make_archive(path: Path) -> None:
    random = np.random.default_rng(1)
    with ArchiveWriter(path, ["a", "b"]) as writer:
        for index in range(8):
            writer.add(random.integers(0, 256, (1, SIDE, SIDE), np.uint8), index % 2)


def make_image_files(folder: Path) -> None:
    """Writes an image in each format that is read."""
    folder.mkdir()
    pixels = np.random.default_rng(2).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    for suffix in ("png", "jpg", "webp", "bmp", "gif", "tiff", "ppm"):
        Image.fromarray(pixels).save(folder / f"image.{suffix}")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(np.dstack([pixels, pixels[..., :1]])).save(folder / "transparent.png")


def make_idx(folder: Path) -> None:
    folder.mkdir()
    pixels = np.random.default_rng(3).integers(0, 256, (6, SIDE, SIDE), np.uint8)
    images = struct.pack(">4I", 0x803, *pixels.shape) + pixels.tobytes()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images, mtime=0))
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 6) + bytes([0, 1, 2, 0, 1, 2]))


def make_celeba(folder: Path) -> None:
    names = [f"{number:06d}.png" for number in range(1, 7)]
    (folder / "img").mkdir(parents=True)
    for name in names:
        Image.fromarray(np.full((SIDE, SIDE, 3), int(name[:6]) * 9, np.uint8)).save(folder / "img" / name)
    (folder / "list_eval_partition.txt").write_text(
        "".join(f"{name} {n % 3 // 2 * 2}\n" for n, name in enumerate(names))
    )
    rows = "".join(f"{name} {1 - 2 * (n % 2)} -1\n" for n, name in enumerate(names))
    (folder / "list_attr_celeba.txt").write_text(f"{len(names)}\nSmiling Young\n{rows}")


def make_cifar(change: Callable[[dict[str, bytes]], None] = lambda members: None) -> bytes:
    pixels = np.random.default_rng(4).integers(0, 256, (3, 3072), np.uint8)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    members = {name: batch(pixels, [0, 1, 2]) for name in names} | {"batches.meta": meta()}
    change(members)
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return written.getvalue()


def make_original(*, new: bool = True) -> bytes:
    """Returns a checkpoint as the original writes it, of the network of ``KEYS``."""
    network = configs.build_denoiser(configs.load([], KEYS)).network
    written = io.BytesIO()
    torch.save(
        {"ema": {"shadow_params": [p.detach() for p in network.parameters()]}, "step": 3},
        written,
        _use_new_zipfile_serialization=new,
    )
    return written.getvalue()


def make_statistics(dimension: int = 6) -> bytes:
    written = io.BytesIO()
    np.savez(written, mu=np.zeros(dimension), sigma=np.eye(dimension))
    return written.getvalue()
