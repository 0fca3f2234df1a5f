"""A release that nobody trained: random weights under a true statement, in a moment."""

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from dpdm import config as configs
from dpdm import model_cards, own_statement, release
from dpdm.config import Config
from dpdm.generate import write_archive
from dpdm.privacy.accounting import Mechanism
from dpdm.released_files import ALLOWED, redacted, sha256, to_half
from dpdm.workdir import Workdir

DATASET_SIZE = 40
KEYS = (
    "data.name=squares",
    "data.resolution=8",
    "data.num_channels=1",
    "data.num_classes=2",
    "data.class_names=[a,b]",
    "dp.noise_multiplier=4",
    "train.num_iterations=3",
    "train.expected_batch_size=10",
    "train.warmup.enabled=true",
    "train.warmup.noise_multiplier=9",
    "model.network.width=4",
    "model.network.channel_multipliers=[1]",
    "model.network.num_res_blocks=1",
)
PUBLIC_KEYS = (
    "data.public=true",
    "dp.enabled=false",
    "dp.noise_multiplier=null",
    "train.warmup.enabled=false",
)
MECHANISMS = (Mechanism("central images", 1.0, 9.0, 1), Mechanism("DP-SGD", 0.25, 4.0, 3))


def make_config(keys: Sequence[str] = ()) -> Config:
    return configs.load([], [*KEYS, *keys])


def make_statement(
    config: Config, mechanisms: Sequence[Mechanism] = MECHANISMS, *, half: bool = False
) -> dict[str, Any]:
    plan = {"dataset_size": DATASET_SIZE, "num_iterations": config.train.num_iterations}
    return own_statement.make_statement(config, list(mechanisms), plan, half=half)


def make_weights(config: Config) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in configs.build_denoiser(config).network.named_parameters()}


def make_release(run: Path, *, images: int = 0, keys: Sequence[str] = (), half: bool = False) -> Path:
    """Writes ``release/`` into ``run``, and ``synthetic.zip`` with random images; returns the release."""
    config = make_config(keys)
    statement = make_statement(config, [*config.train.warmup.mechanisms(), MECHANISMS[-1]], half=half)
    card = model_cards.model_card(statement, config)
    weights = to_half(make_weights(config)) if half else make_weights(config)
    release.write_release(Workdir(run), weights, redacted(config), statement, card)
    if images:
        random = np.random.default_rng(1)
        drawn = random.integers(0, 256, (images, 1, 8, 8), np.uint8)
        write_archive(run / "synthetic.zip", drawn, random.integers(0, 2, images))
    return run / "release"


def make_public_release(run: Path, keys: Sequence[str] = ()) -> Path:
    """Writes ``release/`` of a public model into ``run``; returns it."""
    config = make_config([*PUBLIC_KEYS, *keys])
    statement = own_statement.public_statement(config, DATASET_SIZE)
    card = model_cards.public_card(statement, config)
    release.write_release(Workdir(run), make_weights(config), redacted(config), statement, card)
    return run / "release"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Changes a released JSON file, as its maker could, who makes hashes and card anew."""
    path = folder / name
    content = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, change(content) or content)
    hash_again(folder)


def hash_again(folder: Path) -> None:
    statement = json.loads((folder / "privacy.json").read_text(encoding="utf-8"))
    statement["files"] = {name: sha256(folder / name, 2**30) for name in ALLOWED if name != "privacy.json"}
    write_json(folder / "privacy.json", statement)


def rewrite_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any], **options: Any) -> None:
    """Changes the released weights and makes the hashes anew."""
    path = folder / "model.safetensors"
    weights = release.load_file(path)
    change(weights)
    save_file(weights, path, **options)
    hash_again(folder)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
