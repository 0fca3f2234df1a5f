"""``model.init``: training that begins with the weights of a release, and what a statement then says of these.

A release is taken whose own statement tells what its weights give away: a public model (trained without privacy on
public images), or a private release. Weights of which nobody can know what they were trained on are refused: a
checkpoint of the original, and a release that was converted from one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from dpdm import config as configs
from dpdm import pretrained
from dpdm.config import Config
from dpdm.errors import InputError
from dpdm.evaluation.guarantee import UNITS, round_up
from dpdm.published_words import LONGEST_NAME, check_words
from dpdm.untrusted import MAX_WEIGHTS_BYTES, MAX_WORDS_BYTES, clean, parse_json, read_bytes

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MAX_SOURCES = 10  # one after the other: a release that began with a release that began ...
LABELS = "label_embedding.weight"  # one row per class: the only weights that other classes cannot share
REMEDY = "check model.init"


@dataclass(frozen=True)
class Source:
    """A release with which weights began, in the words of its own statement.

    Attributes:
        sha256: of its weights file.
        kind: "public model": trained without privacy on public images; "private release": with a guarantee.
        images: what its images are called, None if they have no name.
        number: of its images, or groups of them.
        unit: what it protects, None of a public model; so, too, epsilon and delta.
        fresh: names of weights that could not be taken and were initialised.
    """

    sha256: str
    kind: Literal["public model", "private release"]
    images: str | None
    number: int
    epsilon: float | None
    delta: float | None
    unit: str | None
    fresh: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fresh": list(self.fresh)}


@dataclass(frozen=True)
class Initial:
    """Weights to begin with: those that were taken, by name, and where they are from, the nearest source first."""

    weights: dict[str, Tensor]
    sources: tuple[Source, ...]


def open_initial(config: Config) -> Initial:
    """Reads the release at ``model.init`` for the config's network, whose data facts are filled in.

    All weights are taken; of a network for another number of classes, all but the label embedding.

    Guarantee: what is returned is a function of a file with the hash in ``sources[0]``, which is the one that this
    release's own statement names. Whether that statement is true is not looked into: ``dpdm verify`` does.

    Raises:
        InputError: if there is no such release, it is of unknown origin, or its network is another one.
    """
    folder = _folder(pretrained.resolve(Path(config.model.init or "")))
    try:
        statement = parse_json(read_bytes(folder / "privacy.json", MAX_WORDS_BYTES))
        content, words = read_bytes(folder / WEIGHTS, MAX_WEIGHTS_BYTES), read_bytes(folder / CONFIG, MAX_WORDS_BYTES)
        theirs = configs.load([folder / CONFIG], quiet=True)
        sources = (_source(statement, theirs), *read_sources(statement.get("initial_weights", [])))
        named = (statement["files"][WEIGHTS], statement["files"][CONFIG])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"Expected a release in {folder}, could not read it: {clean(error)}; {REMEDY}.") from None
    if len(sources) > MAX_SOURCES:
        raise InputError(f"Expected at most {MAX_SOURCES} releases that began one with another, got more: {REMEDY}.")
    found = sha256(content).hexdigest()
    if named != (found, sha256(words).hexdigest()):
        raise InputError(
            f"Expected the weights and config that the statement in {folder} names, got others: dpdm verify says more; "
            f"{REMEDY}."
        )
    for source in sources:
        if problems := check_words("its name", source.images or ""):
            raise InputError(
                f"Expected the images of the release in {folder} to have a name that may be published, got "
                f"{clean(source.images, 60)!r}: {problems[0]}; {REMEDY}."
            )
    if config.model.init_sha256 not in (None, found):
        raise InputError(
            f"Expected weights with sha256 {config.model.init_sha256} in {folder}, got {found}: a run cannot go on "
            "from others; bring them back, or start a new run without model.init_sha256."
        )
    if not config.dp.enabled and any(source.kind != "public model" for source in sources):
        raise InputError(
            f"Expected a public model in {folder} for a run without privacy, got a private release: its own guarantee "
            "would be lost sight of; set dp.enabled=true."
        )
    _check_kind(theirs, config, folder)
    weights, fresh = _fitting(content, configs.build_denoiser(config).network, folder)
    return Initial(weights, (replace(sources[0], fresh=fresh), *sources[1:]))


def take(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Overwrites the parameters of ``network`` that are in ``weights``."""
    with torch.no_grad():
        for name, weight in weights.items():
            network.get_parameter(name).copy_(weight)


def read_sources(entries: Any) -> tuple[Source, ...]:
    """Returns the sources in a statement's ``initial_weights``, which may be a stranger's.

    Raises:
        ValueError: with the reason, if they are none.
    """
    if not isinstance(entries, list) or len(entries) > MAX_SOURCES:
        raise ValueError(f"initial_weights is no list of at most {MAX_SOURCES} releases")
    return tuple(_read_source(entry) for entry in entries)


def sentences(sources: Sequence[Source], unit: str | None) -> list[str]:
    """Returns what a statement says of each source: for whom its own promise does not hold.

    Args:
        sources: the nearest first.
        unit: what the statement itself protects; None without a guarantee.
    """
    whose = ("the weights", *("that release" for _ in sources))
    return [_sentence(source, unit, began) for source, began in zip(sources, whose, strict=False)]


def _sentence(source: Source, unit: str | None, whose: str) -> str:
    images = f"{source.number} images" if source.unit != UNITS["group"] else f"images of {source.number} persons"
    named = "without a name" if source.images is None else f"called {clean(source.images, LONGEST_NAME)}"
    fresh = f" Not taken but fresh: {', '.join(source.fresh)}." if source.fresh else ""
    if source.kind == "public model":
        return (
            f"The public images of the model with which {whose} began, trained without differential privacy on "
            f"{images} {named}: whoever is on them is not protected. That they are public is its maker's word.{fresh}"
        )
    assert source.epsilon is not None and source.delta is not None  # noqa: PT018  # as read_sources found it
    more = (
        "Whoever is in both data sets is protected by both promises together: by the sums of epsilon and delta, or "
        "less (dpdm account --compose with both statements)."
        if source.unit == unit
        else "It does not protect the same, so for whoever is in both data sets there is no sum of the two."
    )
    return (
        f"The private images of the release with which {whose} began, {images} {named}: they have that release's own "
        f"promise, epsilon {round_up(source.epsilon)} at delta {round_up(source.delta)} for {source.unit}, which was "
        f"not recomputed here. {more}{fresh}"
    )


def _folder(path: Path) -> Path:
    folder = path if path.is_dir() else path.parent
    if not (path.is_dir() or path.name == WEIGHTS) or not (folder / "privacy.json").is_file():
        raise InputError(
            f"Expected model.init to be a release, a folder or its {WEIGHTS} beside privacy.json, got {path}: without "
            "a statement nobody knows what weights were trained on."
        )
    return folder


def _source(statement: Mapping[str, Any], config: Config) -> Source:
    """Returns what a release's own statement and config say of its weights."""
    hash_of_weights = statement["files"][WEIGHTS]
    if statement["mechanisms"]:
        entry = {name: statement[name] for name in ("epsilon", "delta", "unit")}
        entry |= {"kind": "private release", "images": config.data.name, "number": statement["dataset_size"]}
    elif "public_images" in statement:
        public = statement["public_images"]
        entry = {"kind": "public model", "images": public["name"], "number": public["number"]}
        entry |= dict.fromkeys(("epsilon", "delta", "unit"))
    else:
        raise ValueError(
            "its weights were converted, and what they were trained on is unknown: a run that began with them could "
            "promise nothing"
        )
    return _read_source({**entry, "sha256": hash_of_weights, "fresh": []})


def _read_source(entry: Any) -> Source:
    if not isinstance(entry, dict) or set(entry) != {item.name for item in fields(Source)}:
        raise ValueError("a release in initial_weights is not made of what it should be")
    private = entry["kind"] == "private release"
    numbers = [entry["epsilon"], entry["delta"]]
    fits = (
        isinstance(entry["sha256"], str)
        and re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        and entry["kind"] in ("public model", "private release")
        and (entry["images"] is None or (isinstance(entry["images"], str) and len(entry["images"]) <= LONGEST_NAME))
        and type(entry["number"]) is int
        and 0 < entry["number"] < 2**53
        and (entry["unit"] in UNITS.values() if private else entry["unit"] is None)
        and (all(type(n) is float and 0 < n < 1e6 for n in numbers) if private else numbers == [None, None])
        and entry["fresh"] in ([], [LABELS])
    )
    if not fits:
        raise ValueError("a release in initial_weights has a value that none can have")
    return Source(**{**entry, "fresh": tuple(entry["fresh"])})


def _check_kind(theirs: Config, ours: Config, folder: Path) -> None:
    asked = configs.differing(theirs, ours, ("model.denoiser", *configs.PRECONDITIONING))
    if asked:
        key, wanted, got = asked[0]
        raise InputError(
            f"Expected {key}={wanted}, as the release in {folder} has, got {got}: its weights mean nothing to another "
            "preconditioning."
        )


def _fitting(content: bytes, network: nn.Module, folder: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns the weights for ``network``, and the names of those for which the release has none that fit."""
    try:
        theirs = load(content)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"Expected safetensors weights in {folder}, could not read them: {clean(error)}.") from None
    ours = dict(network.named_parameters())
    fresh = () if LABELS not in ours or _shape(theirs, LABELS) == ours[LABELS].shape else (LABELS,)
    weights = {name: theirs.get(name) for name in ours if name not in fresh}
    odd = sorted(theirs.keys() - ours.keys() - {LABELS})
    odd += [name for name in weights if _shape(theirs, name) != ours[name].shape]
    if odd:
        found, wanted = _shape(theirs, odd[0]), ours.get(odd[0])
        raise InputError(
            f"Expected the network of the release in {folder}, got another: {clean(odd[0], 60)} is "
            f"{'missing' if found is None else tuple(found)} there and "
            f"{'missing' if wanted is None else tuple(wanted.shape)} here; give its model.network keys, from its "
            "config.json."
        )
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    types = (torch.float32, torch.float16)  # as releases have them
    if not all(weight.dtype in types and torch.isfinite(weight).all() for weight in kept.values()):
        raise InputError(f"Expected finite float32 or float16 weights in {folder}, got others: {REMEDY}.")
    return {name: weight.float() for name, weight in kept.items()}, fresh


def _shape(weights: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None
