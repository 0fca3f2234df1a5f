"""Feature extractors from outside: the Inception network by which FID is defined, other TorchScript files, any module.

They are called as NVIDIA's file is: ``module(images, return_features=True)`` with uint8 RGB (B, 3, H, W) of any size,
which the module itself scales. A module without that argument is called with the images alone.
"""

import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpdm import distributed
from dpdm.errors import InputError
from dpdm.evaluation.features import Extractor
from dpdm.fetching import DEFAULT_CACHE, fetch_file, file_sha256

INCEPTION = "inception"
INCEPTION_NAME = "Inception-v3 of FID (inception-2015-12-05)"
INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URLS = ("https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",)
# NVIDIA publishes none; this is the one that k-diffusion requires of the same address (k_diffusion/evaluation.py).
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
INCEPTION_BYTES = 95_607_719
BATCH_SIZE = 64
FEATURES = "return_features"  # the argument that asks for features
NO_BIAS = "no_output_bias"  # the argument that asks for the class probabilities of Salimans et al.'s score


def open_extractor(
    which: str,
    image_shape: tuple[int, int, int],
    *,
    device: torch.device | str = "cpu",
    cache_dir: Path | None = None,
) -> Extractor:
    """Opens an extractor by name or file, for images of one shape.

    A TorchScript file is a program in torch's own operations: opening it runs none of Python's pickled code, but
    it should come from somebody who is trusted like the author of a program.

    Args:
        which: "inception", downloaded once and checked by SHA-256, or the path of a TorchScript file.
        image_shape: (C, H, W); grey images are repeated to three channels where the module takes them so.
        device: where to compute.
        cache_dir: where the download is kept; ~/.cache/dpdm unless given.

    Raises:
        InputError: if the file is absent, no TorchScript, or does not take such images.
        RunError: if the download fails.
    """
    if which == INCEPTION:
        distributed.on_main(lambda: _fetch(cache_dir))
    with distributed.together():
        # Here Inception is at hand, unless this machine has another cache than the first process's.
        path = _fetch(cache_dir) if which == INCEPTION else Path(which).expanduser()
        digest = _digest(path)
        name = INCEPTION_NAME if digest == INCEPTION_SHA256 else f"TorchScript file with SHA-256 {digest[:16]}"
        return module_extractor(name, _load(path), image_shape, device=device)


def module_extractor(
    name: str,
    module: nn.Module,
    image_shape: tuple[int, int, int],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = BATCH_SIZE,
) -> Extractor:
    """Returns any module as an extractor, moved to ``device`` and in evaluation mode.

    It is tried on two images of noise: what it gives them tells its dimension and whether it takes grey images as
    RGB (tried first) or as they are. Features (B, D, 1, 1) count as (B, D).

    Args:
        name: to show beside every number.
        module: from uint8 (B, C, H, W) to features, called as this file's head says.
        image_shape: (C, H, W).
        device: where to compute.
        batch_size: images at a time.

    Raises:
        InputError: if it does not take such images, or gives anything but one row of finite numbers for each.
    """
    device = torch.device(device)
    module = module.to(device).eval()
    images = np.random.default_rng(0).integers(0, 256, (2, *image_shape), np.uint8)
    failures = []
    for repeats in (3, 1) if image_shape[0] == 1 else (1,):
        features = _Features(module, repeats)
        batch = torch.tensor(images, device=device)
        try:
            with torch.no_grad():
                found = features(batch)
                weights = _class_weights(features, batch, found)
        except Exception as error:  # another's module may raise anything
            failures.append(f"{image_shape[0] * repeats} channels: {_last_line(error)}")
            continue
        if found.ndim == 2 and len(found) == 2 and found.is_floating_point() and bool(found.isfinite().all()):
            return Extractor(name, found.shape[1], image_shape, features, device, batch_size, False, weights)
        failures.append(f"{image_shape[0] * repeats} channels: {found.dtype} of shape {tuple(found.shape)}")
    raise InputError(
        f"Expected the extractor ({name}) to give one row of numbers for each uint8 image of shape {image_shape}, got "
        f"{'; '.join(failures)}: give a module that is called as inception-2015-12-05.pt is."
    )


class _Features(nn.Module):
    """Calls ``module`` with images whose channels are repeated, and asks for features where it has to be asked."""

    def __init__(self, module: nn.Module, repeats: int) -> None:
        super().__init__()
        self.module = module
        self.repeats = repeats
        self.arguments = _arguments(module)

    def forward(self, images: Tensor) -> Tensor:
        rgb = self.channels(images)
        return (self.module(rgb, return_features=True) if FEATURES in self.arguments else self.module(rgb)).flatten(1)

    def channels(self, images: Tensor) -> Tensor:
        return images.repeat(1, self.repeats, 1, 1) if self.repeats > 1 else images


def _arguments(module: nn.Module) -> list[str]:
    forward: Any = module.forward
    if isinstance(module, torch.jit.ScriptModule):
        return [argument.name for argument in forward.schema.arguments]
    return list(inspect.signature(forward).parameters)


def _class_weights(features: _Features, images: Tensor, found: Tensor) -> np.ndarray | None:
    """Returns the weights behind the module's own class probabilities, or None if it has none that are understood.

    With them the Inception score needs no second pass. That softmax(features W^T) is what the module itself
    calls its probabilities is not assumed but seen.
    """
    weights = getattr(getattr(features.module, "output", None), "weight", None)
    if NO_BIAS not in features.arguments or not isinstance(weights, Tensor) or found.ndim != 2:
        return None
    if weights.ndim != 2 or weights.shape[1] != found.shape[1]:
        return None
    said = features.module(features.channels(images), no_output_bias=True)
    ours = torch.softmax(found.float() @ weights.float().T, dim=1)
    if said.shape != ours.shape or not torch.allclose(said.float(), ours, rtol=1e-3, atol=1e-5):
        return None
    return weights.detach().double().cpu().numpy()


def _fetch(cache_dir: Path | None) -> Path:
    return fetch_file(
        (cache_dir or DEFAULT_CACHE.expanduser()) / INCEPTION_FILE,
        INCEPTION_URLS,
        f"sha256:{INCEPTION_SHA256}",
        max_bytes=INCEPTION_BYTES,
        remedy=f"get {INCEPTION_FILE} in another way and give its path as the extractor.",
    )


def _digest(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"Expected extractor={path} to be {INCEPTION} or a TorchScript file, got no plain file.")
        return file_sha256(path)
    except OSError as error:
        raise InputError(
            f"Expected extractor={path} to be {INCEPTION} or a TorchScript file, could not read it ({error.strerror}): "
            "check the path."
        ) from None


def _load(path: Path) -> nn.Module:
    try:
        with warnings.catch_warnings():
            # torch advises newer formats to those who write files; the file by which FID is defined is this one.
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(path, map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"Expected a TorchScript file at {path}, could not open it as one ({_last_line(error)[:120]}): save one "
            "by torch.jit.script(module).save(path). Files of pickled Python objects (.pkl) are not opened."
        ) from None


def _last_line(error: Exception) -> str:
    """The line that says what is wrong: TorchScript's errors begin with its own traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
