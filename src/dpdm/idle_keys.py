"""Keys that were given and change nothing beside the others, which a run would pass over in silence."""

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import NamedTuple

from dpdm.config import Config
from dpdm.plain_yaml import leaves
from dpdm.privacy.central import WarmupConfig


class _Rule(NamedTuple):
    """Keys of one section that matter if ``matter`` says so; ``otherwise`` is why they do not."""

    section: str
    names: str
    matter: Callable[[Config], bool]
    otherwise: str


def _levels(config: Config) -> str:
    return config.loss.type or config.model.denoiser


RULES = (
    _Rule("loss", "p_mean p_std", lambda c: _levels(c) == "edm", "noise levels are not edm's"),
    _Rule("loss", "logsnr_min logsnr_max", lambda c: _levels(c) == "v", "noise levels are not v's"),
    _Rule("loss", "eps_t", lambda c: _levels(c) == "vp", "noise levels are not vp's"),
    _Rule("loss", "sigma_min sigma_max", lambda c: _levels(c) == "ve", "noise levels are not ve's"),
    _Rule("loss", "beta_min beta_d", lambda c: "vp" in (_levels(c), c.model.denoiser), "nothing is vp"),
    _Rule("loss", "sigma_data", lambda c: "edm" in (_levels(c), c.model.denoiser), "nothing is edm"),
    _Rule("optim", "noise_correction", lambda c: c.dp.enabled, "there is no noise without privacy"),
    _Rule("optim", "noise_floor", lambda c: c.optim.noise_correction, "optim.noise_correction is off"),
    _Rule("train", "num_epochs", lambda c: c.train.num_iterations is None, "train.num_iterations is given"),
    _Rule("train", "log_threshold", lambda c: c.train.log_every is not None, "train.log_every is null"),
    _Rule("train", "snapshot_threshold", lambda c: c.train.snapshot_every is not None, "train.snapshot_every is null"),
    _Rule(
        "train.warmup",
        "covariance_clipping_norm covariance_side covariance_rank covariance_scale",
        lambda c: c.train.warmup.covariance_noise_multiplier is not None,
        "no covariances are bought",
    ),
    _Rule(
        "train.warmup",
        " ".join(item.name for item in fields(WarmupConfig) if item.name != "enabled"),
        lambda c: c.train.warmup.enabled,
        "train.warmup.enabled is false",
    ),
    _Rule(
        "sampler", "guidance_min guidance_max", lambda c: c.sampler.guidance_scale != 0, "sampler.guidance_scale is 0"
    ),
    _Rule("sampler", "s_min s_max s_noise", lambda c: c.sampler.s_churn > 0, "sampler.s_churn is 0"),
)


def idle_keys(config: Config) -> dict[str, str]:
    """Returns the keys that do not have their default and change nothing, each with the reason; of two the last."""
    usual, asked = dict(leaves(asdict(Config()))), dict(leaves(asdict(config)))
    return {
        key: rule.otherwise
        for rule in RULES
        if not rule.matter(config)
        for key in (f"{rule.section}.{name}" for name in rule.names.split())
        if asked[key] != usual[key]
    }


def in_words(keys: dict[str, str]) -> str:
    """Returns one sentence on what ``idle_keys`` found."""
    return "Without effect: " + ", ".join(f"{key} ({why})" for key, why in keys.items()) + "."
