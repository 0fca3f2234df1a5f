"""The keys of the original's YAML files and command line, mapped to ours: here, and nowhere else.

Facts about the original's keys: its readme and its public config files (https://github.com/nv-tlabs/DPDM).
"""

import copy
from collections.abc import Mapping
from typing import Any

from dpdm.errors import InputError

ALIASES = {
    "data.n_classes": "data.num_classes",
    "data.fid_stats": "evaluation.fid_stats",
    "model.denoiser_name": "model.denoiser",
    "model.network.nf": "model.network.width",
    "model.network.ch_mult": "model.network.channel_multipliers",
    "model.network.attn_resolutions": "model.network.attention_resolutions",
    "model.network.image_size": "data.resolution",
    "model.network.num_in_channels": "data.num_channels",
    "model.network.num_out_channels": "data.num_channels",
    "model.network.label_dim": "data.num_classes",
    "loss.version": "loss.type",
    "loss.n_noise_samples": "loss.noise_multiplicity",
    "loss.label_unconditioning_prob": "loss.label_dropout",
    "loss.beta_max": "loss.beta_d",
    "model.beta_min": "loss.beta_min",
    "model.beta_max": "loss.beta_d",
    "optim.params.lr": "optim.learning_rate",
    "optim.params.weight_decay": "optim.weight_decay",
    "dp.max_grad_norm": "dp.clipping_norm",
    "dp.max_physical_batch_size": "train.physical_batch_size",
    "dp.n_splits": "train.n_splits",
    "train.batch_size": "train.expected_batch_size",
    "train.n_epochs": "train.num_epochs",
    "train.log_freq": "train.log_every",
    "train.snapshot_freq": "train.snapshot_every",
    "train.save_freq": "train.checkpoint_every",
    "train.checkpoint_freq": "train.checkpoint_every",
    "train.save_threshold": "train.checkpoint_threshold",
    "train.fid_freq": "evaluation.fid_every",
    "train.fid_threshold": "evaluation.fid_threshold",
    "train.fid_samples": "evaluation.fid_samples",
    "sampler.tmin": "sampler.sigma_min",
    "sampler.tmax": "sampler.sigma_max",
    "sampler.guid_scale": "sampler.guidance_scale",
    "test.n_samples": "sampler.num_images",
    "test.seed": "sampler.seed",
    "test.batch_size": "sampler.batch_size",
    "setup.omp_n_threads": "setup.num_threads",
}
# Whatever they say, nothing is done: torchrun's environment, the reader of the data and the labels decide these here.
MEANINGLESS = (
    "setup.runner",
    "setup.n_nodes",
    "setup.node_rank",
    "setup.master_address",
    "setup.master_port",
    "data.one_hot",
    "data.dataloader_params",
    "data.dataset_params",
    "loss.n_classes",
    "sampler.snapshot_batch_size",
    "sampler.fid_batch_size",
)
# Of data.dataset_params, what would make another set of the images, of another N.
OTHER_DATA = {
    "data.dataset_params.max_size": "prepare as many images as are to be trained on, for N and epsilon are theirs",
    "data.dataset_params.xflip": "loss.flip=true mirrors images in half of the draws, and N stays",
}
ONLY_CHOICE = {"model.denoiser_network": "song", "optim.optimizer": "Adam", "optim.name": "Adam"}
KINDS = {"vpsde": "vp", "vesde": "ve"}

_ABSENT = object()


def translate(content: Mapping[str, Any], where: str, *, beta_min: float) -> tuple[dict[str, Any], list[str]]:
    """Returns one file's (or the command line's) sections with native keys in place of the original's.

    Keys that are neither are left for the caller to refuse.

    Args:
        content: nested sections.
        where: what to call them in errors.
        beta_min: in force unless ``content`` gives another; the original's ``loss.beta_max`` is counted from it.

    Returns:
        The sections, and the original's keys in them that mean nothing here.

    Raises:
        InputError: if two keys for the same thing disagree, or the original's key asks for what is not here.
    """
    changed = copy.deepcopy(dict(content))
    for key, remedy in OTHER_DATA.items():
        if _get(changed, key) not in (_ABSENT, None, False):
            raise InputError(f"Expected no {key} in {where}, got {_get(changed, key)!r}: {remedy}.")
    passed_over = [key for key in MEANINGLESS if _take(changed, key) is not _ABSENT]
    for key, choice in ONLY_CHOICE.items():
        value = _take(changed, key)
        if value is not _ABSENT and str(value).lower() != choice.lower():
            raise InputError(f"Expected {key}={choice} in {where}, got {value!r}: there is no other one here.")
    use_cfg = _take(changed, "model.network.use_cfg")
    given = {key: value for key in ALIASES if (value := _take(changed, key)) is not _ABSENT}
    if given.get("model.network.label_dim", _ABSENT) == 0 or (
        "model.network.label_dim" in given and given.get("data.n_classes", _ABSENT) is None
    ):
        given.pop("data.n_classes", None)  # a network without classes, whatever the labels of the images
    _convert(given, changed, where, beta_min)
    for key, value in given.items():
        _put(changed, ALIASES[key], value, key, given, where)
    _check_null_label(use_cfg, _get(changed, "data.num_classes"), where)
    return changed, passed_over


def _convert(given: dict[str, Any], changed: Mapping[str, Any], where: str, beta_min: float) -> None:
    """Replaces values that the original writes in another way."""
    for key in ("model.denoiser_name", "loss.version"):
        if key in given:
            given[key] = next((ours for theirs, ours in KINDS.items() if given[key] == theirs), given[key])
    if "sampler.guid_scale" in given and given["sampler.guid_scale"] is None:
        given["sampler.guid_scale"] = 0.0
    lowest = given.get("model.beta_min", _get(changed, "loss.beta_min"))
    for key in ("loss.beta_max", "model.beta_max"):
        if key not in given:
            continue
        try:
            first = beta_min if lowest is _ABSENT else float(lowest)
            beta_d = float(given[key]) - first
        except (TypeError, ValueError):
            raise InputError(f"Expected numbers for beta_min and {key} in {where}, got {given[key]!r}.") from None
        if not beta_d > 0:
            raise InputError(f"Expected {key} > beta_min = {first:g} in {where}, got {given[key]}.")
        given[key] = beta_d
    if isinstance(splits := given.get("dp.n_splits"), int) and splits <= 0:  # off
        given["dp.n_splits"] = 1


def _put(content: dict[str, Any], native: str, value: Any, key: str, given: Mapping[str, Any], where: str) -> None:
    """Sets a native key; refuses to if another key in ``content`` has said otherwise."""
    present = _get(content, native)
    if present is not _ABSENT and not _same(present, value):
        earlier = next((k for k in given if k != key and ALIASES[k] == native and _same(given[k], present)), native)
        raise InputError(
            f"Expected {earlier} and {key} in {where} to agree, got {present!r} and {value!r}: they are two names of "
            f"{native}; give one."
        )
    *sections, last = native.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            return  # the caller refuses a value in place of a section
    content[last] = value


def _check_null_label(use_cfg: Any, num_classes: Any, where: str) -> None:
    """The original's ``use_cfg`` is the label embedding's last row, which means "not told"."""
    if use_cfg is _ABSENT:
        return
    if not isinstance(use_cfg, bool):
        raise InputError(f"Expected model.network.use_cfg in {where} to be true or false, got {use_cfg!r}.")
    if not use_cfg and num_classes != 0:
        raise InputError(
            f"Expected model.network.use_cfg=true in {where}, got false: here a network with classes always has a "
            "label for 'not told'; model.network.label_dim=0 beside it means no classes."
        )
    if use_cfg and num_classes == 0:
        raise InputError(
            f"Expected model.network.use_cfg=false in {where} for a network without classes, got true: guidance needs "
            "classes."
        )


def _get(content: Mapping[str, Any], key: str) -> Any:
    node: Any = content
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return _ABSENT
        node = node[part]
    return node


def _take(content: dict[str, Any], key: str) -> Any:
    """Removes a key, and the sections that are empty without it; returns its value."""
    section, _, rest = key.partition(".")
    if section not in content:
        return _ABSENT
    if not rest:
        return content.pop(section)
    inner = content[section]
    if not isinstance(inner, dict):
        return _ABSENT
    value = _take(inner, rest)
    if value is not _ABSENT and not inner:
        del content[section]
    return value


def _same(a: Any, b: Any) -> bool:
    """Whether two values of YAML mean the same; a number may be a text there, such as 3e-4."""
    if isinstance(a, list) or isinstance(b, list):
        both = isinstance(a, list) and isinstance(b, list) and len(a) == len(b)
        return both and all(_same(x, y) for x, y in zip(a, b, strict=True))
    try:
        return float(a) == float(b)
    except (TypeError, ValueError):
        return a == b
