"""The root config, made of the dataclasses of those who use them, and its loading from files and overrides.

Later files win over earlier ones, ``key=value`` overrides over files. Every key is known and typed; a misspelt one is
an error that names the nearest.
"""

import difflib
import functools
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpdm import reference
from dpdm.data.archive import ImageArchive, Unit
from dpdm.data.table import MAX_CLASSES
from dpdm.data.transforms import MAX_RESOLUTION
from dpdm.device import total_memory
from dpdm.diffusion.adapters import ALL, MAX_RANK
from dpdm.diffusion.denoiser import Denoiser, DenoiserKind
from dpdm.diffusion.image_noise import image_labels
from dpdm.diffusion.loss import LossConfig
from dpdm.diffusion.sampling import SamplerConfig
from dpdm.diffusion.unet import NetworkConfig, UNet
from dpdm.errors import InputError
from dpdm.evaluation.fid import EvaluationConfig
from dpdm.files import write_text
from dpdm.optimizer import OptimConfig
from dpdm.plain_yaml import MAX_BYTES, as_plain, check_plain, leaves, read_overrides, read_yaml
from dpdm.privacy.central import WarmupConfig
from dpdm.privacy.dpsgd import DPConfig
from dpdm.progress import speaks

BYTES_PER_WEIGHT = 4
MAX_AVERAGES = 8
BYTES_PER_CLASS = 24  # at most, of a class's noisy frequency in a released config
AUTO = "auto"
# Keys that say what the weights mean beside model.denoiser, and to which of them.
PRECONDITIONING = {"loss.sigma_data": "edm", "loss.beta_min": "vp", "loss.beta_d": "vp"}


@dataclass(frozen=True)
class DataConfig:
    """The images.

    Attributes:
        path: a prepared archive, or a source that ``dpdm prepare`` takes (it is then prepared into the workdir).
        name: what to call them in reports; public.
        public: everybody may see the images at ``path``: they may be trained on without privacy.
        unit: what is protected, and so sampled and clipped as a whole: an image, or a group of images (a person's, say)
            as ``dpdm prepare --groups`` notes them.
        resolution, num_channels, num_classes: checked against the data where given; public facts. num_classes 0
            trains an unconditional model, whatever labels there are.
        class_names: filled in from the data; public.
    """

    path: str | None = None
    name: str | None = None
    public: bool = False
    unit: Unit = "image"
    resolution: int | None = None
    num_channels: int | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.unit not in get_args(Unit):
            raise InputError(f"Expected data.unit to be one of {list(get_args(Unit))}, got {self.unit!r}.")
        for name, least, most in (
            ("resolution", 1, MAX_RESOLUTION),
            ("num_channels", 1, 3),
            ("num_classes", 0, MAX_CLASSES),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise InputError(
                    f"Expected data.{name} >= {least} and <= {most}, got {value}: null takes it from the images."
                )


@dataclass(frozen=True)
class ModelConfig:
    """Attributes:
    denoiser: preconditioning.
    ema_rate: of the weights' moving average, which is what is released.
    ema_rates: of further averages that are kept, so that ``dpdm release --ema`` may take one of them instead.
    ckpt: release folder, weights file or original checkpoint to sample from.
    init: release folder, or its weights file, with whose weights training begins; see ``initial``.
    init_sha256: of that weights file; filled in, so that no run goes on from others.
    trainable: parts of names: a weight is trained if one of them occurs in its name, and frozen otherwise; [all]: all.
    lora_rank: of the adapters that are trained beside frozen matrices (see ``adapters``); 0: none.
    use_ema: take the average from an original checkpoint, not the raw weights; a release holds the average alone.
    network: size of the network.
    """

    denoiser: DenoiserKind = "edm"
    ema_rate: float = 0.999
    ema_rates: tuple[float, ...] = ()
    ckpt: str | None = None
    init: str | None = None
    init_sha256: str | None = None
    trainable: tuple[str, ...] = (ALL,)
    lora_rank: int = 0
    use_ema: bool = True
    network: NetworkConfig = field(default_factory=NetworkConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ema_rates", tuple(self.ema_rates))
        for name, rates in (("ema_rate", (self.ema_rate,)), ("ema_rates", self.ema_rates)):
            for rate in rates:
                if not 0 <= rate < 1:
                    raise InputError(f"Expected 0 <= model.{name} < 1, got {rate}.")
        if len({self.ema_rate, *self.ema_rates}) <= len(self.ema_rates) or len(self.ema_rates) > MAX_AVERAGES:
            raise InputError(
                f"Expected at most {MAX_AVERAGES} model.ema_rates, none twice and none that is model.ema_rate, got "
                f"{list(self.ema_rates)}."
            )
        if self.denoiser not in get_args(DenoiserKind):
            raise InputError(
                f"Expected model.denoiser to be one of {list(get_args(DenoiserKind))}, got {self.denoiser!r}."
            )
        object.__setattr__(self, "trainable", tuple(self.trainable))
        if not all(self.trainable) or (ALL in self.trainable and len(self.trainable) > 1):
            raise InputError(
                f"Expected model.trainable to be [{ALL}], or parts of weights' names, got {list(self.trainable)}: see "
                "docs/configuration.md."
            )
        if not 0 <= self.lora_rank <= MAX_RANK:
            raise InputError(f"Expected model.lora_rank >= 0 and <= {MAX_RANK}, got {self.lora_rank}: 0 is off.")
        if self.lora_rank and self.trainable == (ALL,):
            raise InputError(
                f"Expected model.lora_rank=0 with model.trainable=[{ALL}], got {self.lora_rank}: adapters stand beside "
                "frozen weights; give model.trainable=[] for adapters alone, or what else is trained, as [norm,bias]."
            )
        if self.init_sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.init_sha256):
            raise InputError(f"Expected 64 hex digits for model.init_sha256, got {self.init_sha256!r}: leave it out.")


@dataclass(frozen=True)
class TrainConfig:
    """How long and in what pieces to train.

    Attributes:
        expected_batch_size: q N.
        num_epochs: passes over the data, floor(num_epochs / q) steps, unless
        num_iterations: steps; overrides num_epochs, for calibration and running alike.
        physical_batch_size: most examples in one forward pass; None: by a rule from the network's size and, on a GPU,
            from its memory.
        n_splits: cuts the physical batch to at most expected_batch_size / n_splits.
        log_every: steps between lines on the terminal with the mean loss of these steps; private. None: no lines.
        log_threshold: no such line before this step.
        snapshot_every: steps between pictures of the present model in private/snapshots/; None: no pictures.
        snapshot_threshold: no picture before this step.
        checkpoint_every: steps between checkpoints.
        checkpoint_threshold: no checkpoint for this reason before this step.
        seed: of the initial weights and the warm-up's training, never of privacy.
        warmup: on central images.
    """

    expected_batch_size: int = 256
    num_epochs: float | None = None
    num_iterations: int | None = None
    physical_batch_size: int | None = None
    n_splits: int = 1
    log_every: int | None = None
    log_threshold: int = 0
    snapshot_every: int | None = None
    snapshot_threshold: int = 0
    checkpoint_every: int = 50
    checkpoint_threshold: int = 0
    seed: int = 0
    warmup: WarmupConfig = field(default_factory=WarmupConfig)

    def __post_init__(self) -> None:
        for name in (
            "expected_batch_size",
            "num_epochs",
            "num_iterations",
            "physical_batch_size",
            "n_splits",
            "log_every",
            "snapshot_every",
            "checkpoint_every",
        ):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"Expected a finite train.{name} > 0, got {value}.")
        for name in ("log_threshold", "snapshot_threshold", "checkpoint_threshold"):
            if getattr(self, name) < 0:
                raise InputError(f"Expected train.{name} >= 0, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"Expected 0 <= train.seed < 2**63, got {self.seed}.")


@dataclass(frozen=True)
class SetupConfig:
    """Attributes:
    device: auto takes a GPU if there is one.
    num_threads: of the CPU, for each process, in training, drawing and dpdm audit run; None: torch's choice.
    n_gpus_per_node: processes on this machine, which share each step out; see also torchrun.
    precision: of the network in training: float32, or bf16 by torch.autocast; auto is bf16 on a GPU that has it.
        Clipping, sums, noise and weights are not affected.
    data_on_device: keeps all images, decoded, on the device; auto: on a GPU, if they take at most a quarter of its
        free memory.
    overlap_noise: makes a step's noise beside its passes over the network; auto: on a GPU.
        Neither of the two changes a bit of what is computed.
    """

    device: str = "auto"
    num_threads: int | None = None
    n_gpus_per_node: int = 1
    precision: Literal["auto", "float32", "bf16"] = "auto"
    data_on_device: bool | str = AUTO
    overlap_noise: bool | str = AUTO

    def __post_init__(self) -> None:
        for name in ("data_on_device", "overlap_noise"):
            if not isinstance(getattr(self, name), bool) and getattr(self, name) != AUTO:
                raise InputError(f"Expected setup.{name} to be auto, true or false, got {getattr(self, name)!r}.")
        if self.n_gpus_per_node < 1:
            raise InputError(f"Expected setup.n_gpus_per_node >= 1, got {self.n_gpus_per_node}.")
        if self.num_threads is not None and self.num_threads < 1:
            raise InputError(f"Expected setup.num_threads >= 1, got {self.num_threads}.")


@dataclass(frozen=True)
class Config:
    """All keys; the defaults are those of the dataclasses."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    dp: DPConfig = field(default_factory=DPConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    setup: SetupConfig = field(default_factory=SetupConfig)


def load(files: Sequence[str | Path] = (), overrides: Sequence[str] = (), *, quiet: bool = False) -> Config:
    """Returns the config of YAML ``files``, merged in order, then ``key.subkey=value`` overrides.

    The original's keys are taken as well (see ``reference.py``); those that mean nothing here are named on standard
    error, unless ``quiet``.

    Raises:
        InputError: for a file that cannot be read, an unknown key, a wrong type or a value out of range.
    """
    config, passed_over = _merged(files, overrides)
    try:
        loaded: Config = OmegaConf.to_object(config)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise InputError(f"Expected a plain value of {error.full_key}, got: {_first_line(error)}.") from None
    if passed_over and not quiet and speaks():
        print(f"dpdm: keys that mean nothing here: {', '.join(dict.fromkeys(passed_over))}.", file=sys.stderr)
    return loaded


def values(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Returns what ``load`` would make a config of, by key; whether values fit each other is not looked at."""
    return dict(leaves(OmegaConf.to_container(_merged(files, overrides)[0])))  # type: ignore[arg-type]


def _merged(files: Sequence[str | Path], overrides: Sequence[str]) -> tuple[Any, list[str]]:
    """Returns OmegaConf's config of files and overrides, and the original's keys in them that mean nothing here."""
    config = _defaults()
    passed_over: list[str] = []
    asked = [(str(file), _read_sections(Path(file))) for file in files]
    asked.append(("the command line", read_overrides(overrides)))
    for source, change in asked:
        check_plain(change, source)
        content, meaningless = reference.translate(change, source, beta_min=OmegaConf.select(config, "loss.beta_min"))
        passed_over += meaningless
        config = _merge(config, content, source)
    return config, passed_over


def load_to_train(files: Sequence[str | Path], overrides: Sequence[str]) -> Config:
    """Returns ``load(files, overrides)``; its ``dp.selection`` also names what was changed of settings with one.

    Where a file says how settings were chosen, that is no longer so of a key that a later file or an override changes.
    """
    asked = load(files, overrides)
    sets_it = ["dp.selection" in dict(leaves(_read_sections(Path(file)))) for file in files]
    if not any(sets_it):
        return asked
    last = len(files) - sets_it[::-1].index(True)
    before, after = values(files[:last]), values(files, overrides)
    said = before["dp.selection"]
    if asked.dp.selection != said:
        return asked
    changed = changed_settings(before, after)
    if not changed:
        return asked
    return replace(asked, dp=replace(asked.dp, selection=with_changes(said, changed)))


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Returns the keys of settings (not what is free, the data, dp.selection) whose ``values`` differ."""
    others = (key for key in after if not (_is_free(key) or key.startswith("data.") or key == "dp.selection"))
    return [key for key in (*others, "model.init") if after[key] != before[key]]


def differing(theirs: Config, ours: Config, keys: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """Returns the ``keys`` whose values differ, and both values; those of a preconditioning only where it has them."""
    first, second = (dict(leaves(asdict(config))) for config in (theirs, ours))
    kind = theirs.model.denoiser
    return [
        (key, first[key], second[key])
        for key in keys
        if first[key] != second[key] and PRECONDITIONING.get(key, kind) == kind
    ]


def check_guidance(config: Config) -> None:
    """Raises InputError if images are to be guided by what the model never learned."""
    if config.sampler.guidance_scale and config.loss.label_dropout == 0:
        raise InputError(
            f"Expected sampler.guidance_scale=0 with loss.label_dropout=0, got {config.sampler.guidance_scale}: "
            "guidance leads away from what a model draws that is not told the class, which this one never learned; "
            "train with loss.label_dropout=0.1."
        )


def with_changes(selection: str, keys: Sequence[str]) -> str:
    """Returns ``dp.selection`` of settings of which a user changed some keys."""
    return f"{selection}; the user changed {', '.join(keys)}, which is not accounted for"


@functools.cache  # a merge makes a copy
def _defaults() -> Any:
    config = OmegaConf.structured(Config)
    _make_writable(config)
    return config


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(as_plain(asdict(config)), sort_keys=False, allow_unicode=True)


def save(config: Config, path: Path) -> None:
    write_text(path, to_yaml(config), mode=0o600)


def fingerprint(*parts: Any) -> str:
    """Returns a SHA-256 hex digest of config parts (dataclasses or plain values)."""
    plain = [as_plain(asdict(part)) if is_dataclass(part) and not isinstance(part, type) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def check_whole(path: Path) -> None:
    """Raises InputError unless a config that dpdm wrote has all its sections: one that was cut off means defaults."""
    written = _read_sections(path)
    for section in SECTIONS:
        if section not in written:
            raise InputError(
                f"Expected the section {section} in {path}, found none: the file is damaged; bring the run's own back."
            )


def run_hash(config: Config) -> str:
    """Returns a hash of what may not change when a run goes on: not where data lie, how steps are cut and watched.

    Keys that have their default are left out, so that a run goes on by a later version, which has more keys.
    """
    usual = dict(leaves(asdict(Config())))
    asked = leaves(asdict(config))
    return fingerprint(sorted((key, value) for key, value in asked if value != usual[key] and not _is_free(key)))


def _is_free(key: str) -> bool:
    """Whether a key may change while a run is under way."""
    return key in FREE_KEYS or key.partition(".")[0] in FREE_SECTIONS


def resolve(config: Config, archive: ImageArchive) -> Config:
    """Returns ``config`` with the public facts of the data filled in.

    Raises:
        InputError: if the config and the data disagree.
    """
    data, found = config.data, {}
    for name in ("resolution", "num_channels"):
        found[name] = getattr(archive, name)
        if getattr(data, name) not in (None, found[name]):
            raise InputError(
                f"Expected data.{name}={getattr(data, name)}, got {found[name]} in {archive.path}: "
                f"leave data.{name} out, or give other images."
            )
    num_classes = archive.num_classes if data.num_classes is None else data.num_classes
    if num_classes and archive.labels is None:
        raise InputError(
            f"Expected labels for data.num_classes={num_classes}, got none in {archive.path}: sort the images into one "
            "folder per class, or set data.num_classes=0."
        )
    if num_classes not in (0, archive.num_classes):
        raise InputError(
            f"Expected data.num_classes={num_classes}, got {archive.num_classes} in {archive.path}: leave it out, or "
            "give 0 for a model without classes."
        )
    image_labels(config.sampler.labels, 0, (), num_classes, config.sampler.class_weights)  # refuses what does not fit
    if config.sampler.guidance_scale and not num_classes:
        raise InputError(
            f"Expected sampler.guidance_scale=0 without classes, got {config.sampler.guidance_scale}: leave it out."
        )
    check_guidance(config)
    names = tuple(archive.class_names or ()) if num_classes else ()
    check_plain(list(names), str(archive.path), "class_names")
    if data.class_names not in ((), names):
        raise InputError(
            f"Expected data.class_names to be those of {archive.path}, {list(names)[:20]}, got "
            f"{list(data.class_names)[:20]}: leave them out, and rename the folders of the images."
        )
    config = replace(config, data=replace(data, **found, num_classes=num_classes, class_names=names))
    forms = to_yaml(config), json.dumps(asdict(config), indent=2, ensure_ascii=False)  # as a run and a release keep it
    if (length := max(len(form.encode()) for form in forms) + BYTES_PER_CLASS * num_classes) > MAX_BYTES:
        raise InputError(
            f"Expected a config that takes at most {MAX_BYTES} bytes with the names of all classes in {archive.path}, "
            f"got {length} of {num_classes} classes: shorten the folders' names or dp.selection, or set "
            "data.num_classes=0."
        )
    return config


def build_denoiser(config: Config) -> Denoiser:
    """Returns a freshly initialised denoiser for a config whose data facts are filled in (see ``resolve``)."""
    data, loss = config.data, config.loss
    if data.resolution is None or data.num_channels is None or data.num_classes is None:
        raise InputError("Expected data.resolution, data.num_channels and data.num_classes, got null: give all three.")
    make = functools.partial(
        UNet,
        config.model.network,
        resolution=data.resolution,
        num_channels=data.num_channels,
        num_classes=data.num_classes,
    )
    with torch.device("meta"):  # costs no memory
        num_weights = sum(parameter.numel() for parameter in make().parameters())
    memory = total_memory(torch.device("cpu"))
    if BYTES_PER_WEIGHT * num_weights > memory:
        raise InputError(
            f"Expected a network that fits into {memory / 2**30:.0f} GiB of memory, got one of {num_weights:.3g} "
            "weights: lower model.network.width, channel_multipliers or num_res_blocks."
        )
    network = make(generator=torch.Generator().manual_seed(config.train.seed))
    return Denoiser(
        network, config.model.denoiser, sigma_data=loss.sigma_data, beta_min=loss.beta_min, beta_d=loss.beta_d
    )


def _merge(config: Any, content: Mapping[str, Any], where: str) -> Any:
    for key, value in leaves(content):
        if any(known.startswith(f"{key}.") for known in KNOWN_KEYS):
            example = next(known for known in KNOWN_KEYS if known.startswith(f"{key}."))
            raise InputError(
                f"Expected {key} in {where} to be a section of keys, got {value}: give keys in it, such as {example}."
            )
        if key not in KNOWN_KEYS:
            near = difflib.get_close_matches(key, KNOWN_KEYS, n=1) or _same_last_part(key)
            hint = f"did you mean {near[0]}?" if near else f"the sections are {', '.join(SECTIONS)}."
            raise InputError(f"Expected a known key in {where}, got {key}: {hint}")
    try:
        return OmegaConf.merge(config, content)
    except (OmegaConfBaseException, TypeError) as error:  # a section in place of a list is a TypeError
        key = getattr(error, "full_key", None) or "a key"
        value = dict(leaves(content)).get(key)
        raise InputError(f"Expected a fitting value of {key} in {where}, got {value!r}: {_first_line(error)}") from None


def _read_sections(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"Expected a config file at {path}, found none: check --config.")
    content = read_yaml(path)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise InputError(f"Expected sections and keys in {path}, got a {type(content).__name__}: see configs/.")
    return content


def _make_writable(node: Any) -> None:
    """Undoes OmegaConf's reading of frozen dataclasses as read-only sections."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _make_writable(child)


def _same_last_part(key: str) -> list[str]:
    last = {known.rpartition(".")[2]: known for known in KNOWN_KEYS}
    return [last[near] for near in difflib.get_close_matches(key.rpartition(".")[2], last, n=1)]


def _dataclass_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    for item in fields(kind):
        nested = item.default_factory() if callable(item.default_factory) else None
        if is_dataclass(nested):
            yield from _dataclass_keys(nested, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


def _first_line(error: Exception) -> str:
    return " ".join(str(error).splitlines()[:1]) or type(error).__name__


FREE_SECTIONS = {"sampler", "evaluation", "setup"}  # that may change while a run is under way, as may these keys
FREE_KEYS = {"data.path", "data.name", "model.ckpt", "model.init", "model.use_ema"} | {
    "train.physical_batch_size",
    "train.n_splits",
    "train.log_every",
    "train.log_threshold",
    "train.snapshot_every",
    "train.snapshot_threshold",
    "train.checkpoint_every",
    "train.checkpoint_threshold",
}
KNOWN_KEYS = list(_dataclass_keys(Config))
SECTIONS = [item.name for item in fields(Config)]
