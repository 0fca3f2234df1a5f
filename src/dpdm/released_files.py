"""The files of a release and what is in them: the weights a network needs and no others, words without paths or keys.

The files are a stranger's: each check returns one line for each thing that should not be there, and reads no more than
it needs.
"""

import base64
import binascii
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dpdm import config as configs
from dpdm.config import Config
from dpdm.data.pixels_only import Form, check_jpeg, check_png, scan_archive, scan_npz, scan_samples
from dpdm.errors import RunError
from dpdm.untrusted import MAX_WEIGHTS_BYTES, MAX_WORDS_BYTES, clean, open_regular, parse_json, read_bytes

ALLOWED = ("model.safetensors", "config.json", "privacy.json", "README.md")
SECTIONS = ("data", "model", "loss", "optim", "dp", "train", "sampler")
REDACTED = ("data.path", "model.ckpt", "model.init", "dp.seed", "train.seed", "sampler.seed")  # no paths, no seeds
CONVERTED_SECTIONS = ("data", "model", "loss", "sampler")  # what sampling needs; dp.epsilon would read as a promise
MAX_HEADER_BYTES = 4 * 2**20
MAX_TENSORS = 10_000
TENSORS_PER_BLOCK = 8  # at least, of a residual block
MAX_PAGE_BYTES = 16 * 2**20
BYTES_PER_READ = 2**24
FLOAT32, FLOAT16 = ("F32", "<f4"), ("F16", "<f2")  # in safetensors' words and numpy's
PICTURE = re.compile(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/=]*)")
Shapes = Mapping[str, tuple[int, ...]]


def redacted(config: Config) -> dict[str, Any]:
    """Returns the config that may be shared: no paths, no set-up, no seeds."""
    sections = {name: asdict(getattr(config, name)) for name in SECTIONS}
    for key in REDACTED:
        section, name = key.split(".")
        del sections[section][name]
    return json.loads(json.dumps(sections))


def sha256(path: Path, max_bytes: int) -> str:
    """Returns a plain file's hash; ValueError with the reason if it cannot be had."""
    with open_regular(path, max_bytes) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> tuple[Any, list[str]]:
    """Returns a JSON file's content, and a line if it is not written exactly as dpdm writes it.

    Other spaces, escapes or digits would be room for something to hide in.

    Raises:
        ValueError: with the reason, if it is no JSON.
    """
    content = read_bytes(path, MAX_WORDS_BYTES)
    value = parse_json(content)
    written = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    if written.encode("utf-8", errors="replace") != content:
        return value, [f"{path.name} is not written as dpdm writes it: it holds other spaces, escapes or digits"]
    return value, []


def network_shapes(config: Config, num_tensors: int) -> Shapes:
    """Returns names and shapes of the network's weights, without making them.

    Args:
        config: of the release, which may be a stranger's.
        num_tensors: how many there are said to be, so that no endless network has to be laid out.

    Raises:
        ValueError: with the reason, if the config makes no network, or one of another number of tensors.
    """
    network = config.model.network
    blocks = len(network.channel_multipliers) * network.num_res_blocks
    if num_tensors > MAX_TENSORS or TENSORS_PER_BLOCK * blocks > num_tensors:
        raise ValueError(f"holds {num_tensors} tensors, config.json asks for {blocks} blocks and more")
    try:
        with torch.device("meta"):
            made = configs.build_denoiser(config).network
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # torch's own words for a gigantic shape
        raise ValueError(f"cannot be compared: config.json makes no network ({clean(error, 100)})") from None
    return {name: tuple(parameter.shape) for name, parameter in made.named_parameters()}


def to_half(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights rounded to float16, each to the nearest that there is.

    Raises:
        RunError: if one is beyond float16's largest number, 65,504.
    """
    rounded = {name: tensor.half().contiguous() for name, tensor in weights.items()}
    for name, tensor in rounded.items():
        if not tensor.isfinite().all():
            raise RunError(f"Expected weights up to 65,504 to be rounded to float16, got more in {name}: omit --half.")
    return rounded


def check_weights(path: Path, config: Config, *, half: bool = False) -> list[str]:
    """Returns what is wrong with ``model.safetensors``: it must hold the config's network and no more.

    As float32, or with ``half`` as float16, as the statement says.

    Checked are names, shapes and types, that the tensors fill the file without a gap, that the header has no metadata
    and no room for any, and that all numbers are finite. What they encode beyond a model cannot be seen.
    """
    try:
        with open_regular(path, MAX_WEIGHTS_BYTES) as file:
            header, start = _read_header(file)
            shapes = network_shapes(config, len(header))
            number, form = FLOAT16 if half else FLOAT32
            end = _check_header(header, shapes, number, np.dtype(form).itemsize)
            if file.seek(0, 2) != start + end:
                raise ValueError("has bytes behind its tensors, or too few")
            file.seek(start)
            while content := file.read(BYTES_PER_READ):
                if not np.isfinite(np.frombuffer(content, form)).all():
                    raise ValueError("holds a number that is not finite")
    except ValueError as error:
        return [f"{path.name} {clean(error)}"]
    return []


def scan_images(path: Path, config: Config) -> tuple[int, list[str]]:
    """Returns how many images are at ``path``, a folder or archive, and what beside images and labels is in it."""
    data = config.data
    form = Form(data.num_channels or 0, data.resolution or 0, data.num_classes or 0)
    try:
        if path.suffix == ".npz":
            return scan_npz(path, form), []
        count, problems = (scan_samples if path.is_dir() else scan_archive)(path, form)
    except ValueError as error:
        return 0, [f"{path.name} {clean(error)}"]
    return count, [f"{path.name}: {clean(problem)}" for problem in problems]


def split_page(path: Path) -> tuple[str, list[str]]:
    """Returns a report page's text with its pictures cut out, and what is wrong with the pictures."""
    text = read_bytes(path, MAX_PAGE_BYTES).decode("utf-8")
    problems = []
    for kind, digits in PICTURE.findall(text):
        try:
            content = base64.b64decode(digits, validate=True)
            check_png(content) if kind == "png" else check_jpeg(content)
        except (ValueError, binascii.Error) as error:
            problems.append(f"{path.name}: a picture {clean(error)}")
    return PICTURE.sub("", text), problems


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Returns a safetensors file's header, and where its tensors begin."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise ValueError("is no safetensors file")
    content = file.read(length)
    header = parse_json(content)
    if not isinstance(header, dict):
        raise ValueError("is no safetensors file")
    # Padding to a multiple of 8 is all that the format adds.
    if len(content) >= len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()) + 8:
        raise ValueError("has a longer header than its tensors need")
    return header, 8 + length


def _check_header(header: dict[str, Any], shapes: Shapes, number: str, num_bytes: int) -> int:
    """Returns how many bytes the tensors take; ValueError unless they are those of ``shapes``, one behind the other.

    ``number`` is the type that all have, ``num_bytes`` what one number takes.
    """
    if "__metadata__" in header:
        raise ValueError("holds metadata")
    missing, unknown = sorted(shapes.keys() - header.keys()), sorted(header.keys() - shapes.keys())
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"holds {clean(unknown[0], 60)}"
        raise ValueError(f"{what}, by config.json ({len(missing)} tensors missing, {len(unknown)} too many)")
    spans = []
    for name, shape in shapes.items():
        entry, size = header[name], num_bytes * math.prod(shape)
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"says odd things of {name}")
        if entry["dtype"] != number or entry["shape"] != list(shape):
            found = clean(f"{entry['dtype']} {entry['shape']}", 60)
            said = "config.json" if entry["shape"] != list(shape) else "privacy.json"
            raise ValueError(f"holds {name} as {found}, by {said} it is {number} {list(shape)}")
        offsets = entry["data_offsets"]
        if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
            raise ValueError(f"says odd things of {name}")
        spans.append((*offsets, size))
    position = 0
    for begin, end, size in sorted(spans):
        if (begin, end) != (position, position + size):
            raise ValueError("has tensors that overlap, or bytes between them")
        position = end
    return position
