"""Checkpoints of the original (https://github.com/nv-tlabs/DPDM), read into our network.

Such a file is a dict that ``torch.save`` wrote. Its ``model`` has raw weights under the original's names,
``module.model.all_modules.{i}....``; its ``ema`` has their moving average as ``shadow_params``, a list without names in
the order of the original's parameters, which is the order of ours. Nothing in a file is run.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpdm import config as configs
from dpdm.config import Config
from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.unet import UNet
from dpdm.errors import InputError
from dpdm.foreign_pickles import StrangePickleError, check_pickles

# Our names inside a residual block and an attention block, and the original's.
LAYERS = {
    "residual": {
        "norm_1": "GroupNorm_0",
        "conv_1": "Conv_0",
        "embed": "Dense_0",
        "norm_2": "GroupNorm_1",
        "conv_2": "Conv_1",
        "shortcut": "Conv_2",
    },
    "attention": {"norm": "GroupNorm_0", "query": "NIN_0", "key": "NIN_1", "value": "NIN_2", "out": "NIN_3"},
}
PROJECTION = {"weight": "W", "bias": "b"}
REMEDY = "check --config and model.ckpt"


def is_original(path: Path) -> bool:
    """Returns whether a file of weights is to be read as the original's: all are but safetensors files."""
    if path.suffix == ".safetensors":
        return False
    with path.open("rb") as file:
        return file.read(9)[8:] != b"{"  # eight bytes of length, then JSON


def load_denoiser(path: Path, config: Config) -> Denoiser:
    """Returns the denoiser of a checkpoint of the original, in evaluation mode, on the CPU.

    Args:
        path: the file.
        config: of the model; ``model.use_ema`` chooses between the average and the raw weights.

    Raises:
        InputError: if the file is no such checkpoint, holds code, or does not fit the config.
    """
    denoiser = configs.build_denoiser(config)
    content = _read(path)
    names = original_names(denoiser.network)
    found = _average(content, names, path) if config.model.use_ema else _raw(content, names, path)
    with torch.no_grad():
        for name, parameter, weight in zip(names, denoiser.network.parameters(), found, strict=True):
            # A 1x1 projection W is (in, out) there; ours are linear layers, (out, in).
            theirs = parameter.t() if name.endswith(".W") else parameter
            _check_weight(name, weight, theirs.shape, path)
            theirs.copy_(weight)
    return denoiser.eval()


def original_names(network: UNet) -> list[str]:
    """Returns the original's name of every parameter, ``all_modules.{i}...``, in the order of ``parameters()``."""
    blocks: dict[str, int] = {}
    names = []
    for name, _ in network.named_parameters():
        match = re.fullmatch(r"(.+)\.(residual|attention)\.(\w+)\.(\w+)", name)
        if match is None:
            block, _, leaf = name.rpartition(".")
        else:
            stage, kind, layer, leaf = match.groups()
            block = f"{stage}.{kind}"
            theirs = LAYERS[kind][layer]
            leaf = f"{theirs}.{PROJECTION[leaf] if theirs.startswith('NIN') else leaf}"
        names.append(f"all_modules.{blocks.setdefault(block, len(blocks))}.{leaf}")
    return names


def _read(path: Path) -> Mapping[str, Any]:
    _check_members(path)
    try:
        check_pickles(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of file formats of other versions
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"Expected a checkpoint of the original at {path}, could not read it: {error}.") from None
    except StrangePickleError as error:
        raise InputError(
            f"Expected a checkpoint of the original in {path}, got {error}: nothing was loaded; get the file from its "
            "authors."
        ) from None
    except Exception as error:  # a damaged or strange pickle fails in a dozen ways
        found = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and found:
            raise InputError(
                f"Expected nothing but tensors in {path}, got {found[1]}, which could run code: nothing was loaded; "
                "get the file from its authors."
            ) from None
        raise InputError(
            f"Expected a release or a checkpoint of the original in {path}, got another or a damaged file: download it "
            "again and check model.ckpt."
        ) from None
    if not isinstance(content, Mapping):
        raise InputError(
            f"Expected a checkpoint of the original in {path}, with model and ema, got a {type(content).__name__}: "
            "check model.ckpt."
        )
    return content


def _check_members(path: Path) -> None:
    """Raises InputError for a zip whose members unpack to more than the file, which torch would unpack whole."""
    try:
        with zipfile.ZipFile(path) as members:
            unpacked = sum(info.file_size for info in members.infolist())
    except Exception:  # no zip, but torch's older format, or damaged, which torch says
        return
    if unpacked > path.stat().st_size:
        raise InputError(
            f"Expected a checkpoint of the original in {path}, got a zip that unpacks to {unpacked} bytes: torch packs "
            "nothing; get the file from its authors."
        )


def _average(content: Mapping[str, Any], names: list[str], path: Path) -> list[Any]:
    """Returns the moving average, of which there are as many tensors as ``names``."""
    ema = content.get("ema")
    weights = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(weights, list | tuple):
        raise InputError(
            f"Expected averaged weights (ema, shadow_params) in {path}, got {_keys(content)}: check model.ckpt, or "
            "give model.use_ema=false for the raw weights."
        )
    if len(weights) != len(names):
        raise InputError(
            f"Expected {len(names)} averaged weights in {path}, as the config's network has, got {len(weights)}: it is "
            f"another network's; {REMEDY}."
        )
    return list(weights)


def _raw(content: Mapping[str, Any], names: list[str], path: Path) -> list[Any]:
    """Returns the raw weights, in the order of ``names``; what wrappers put before a name is cut off."""
    model = content.get("model")
    if not isinstance(model, Mapping):
        raise InputError(f"Expected raw weights (model) in {path}, got {_keys(content)}: check model.ckpt.")
    weights: dict[str, Any] = {}
    for key, value in model.items():
        before, layers, rest = str(key).rpartition("all_modules.")
        if not layers:
            continue  # a constant of the denoiser, such as its table of noise levels; ours come from the config
        if layers + rest in weights:
            raise InputError(f"Expected {layers}{rest} once in {path}, got {before}{layers}{rest} as well: {REMEDY}.")
        weights[layers + rest] = value
    missing = [name for name in names if name not in weights]
    unknown = sorted(weights.keys() - set(names))
    if missing or unknown:
        what = f"{missing[0]} in {path}, got none" if missing else f"{path} without {unknown[0]}, got it"
        raise InputError(
            f"Expected {what} ({len(missing)} missing, {len(unknown)} too many): it is another network's; {REMEDY}."
        )
    return [weights[name] for name in names]


def _check_weight(name: str, weight: Any, shape: torch.Size, path: Path) -> None:
    if not (isinstance(weight, Tensor) and weight.is_floating_point() and weight.layout == torch.strided):
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise InputError(f"Expected a tensor of floats for {name} in {path}, got {kind}: check model.ckpt.")
    if weight.shape != shape:
        raise InputError(
            f"Expected {name} of shape {tuple(shape)} in {path}, as the config's network has, got "
            f"{tuple(weight.shape)}: it is another network's; {REMEDY}."
        )
    if not torch.isfinite(weight).all():
        raise InputError(f"Expected finite numbers for {name} in {path}, got NaN or infinity: the file is unusable.")


def _keys(content: Mapping[str, Any]) -> str:
    return f"the keys {sorted(map(str, content))[:8]}"
