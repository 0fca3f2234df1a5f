"""Whether a release's files agree with its own statement: asked before it is released, and by ``dpdm verify`` of any.

A release may be made to deceive or to do harm: files are read up to a size, links and special files not at all.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpdm import config as configs
from dpdm import statement
from dpdm.config import Config
from dpdm.errors import InputError, RunError
from dpdm.model_cards import claim_card, model_card, public_card
from dpdm.published_words import check_words
from dpdm.released_files import (
    ALLOWED,
    CONVERTED_SECTIONS,
    check_weights,
    read_json,
    redacted,
    sha256,
)
from dpdm.untrusted import MAX_WEIGHTS_BYTES, MAX_WORDS_BYTES, clean, read_bytes

NAMES_SHOWN = 20


@dataclass
class Findings:
    """What was found.

    Attributes:
        statement: the content of ``privacy.json``.
        epsilons: by dp-accounting and by the second accountant; None where it was not computed.
        problems: a line for each thing that does not fit. Without any the release is consistent.
        notices: a line for each thing that could not be compared and is no problem.
        images: number of synthetic images that were looked through, by the name of their file or folder.
    """

    statement: dict[str, Any]
    epsilons: tuple[float | None, float | None] = (None, None)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    images: dict[str, int] = field(default_factory=dict)

    @property
    def is_public(self) -> bool:
        """Whether it is the release of a public model, for which no guarantee is given."""
        return statement.is_public(self.statement)


def check_folder(release: Path) -> tuple[Findings, Config | None]:
    """Checks the files of a release folder; returns what was found, and the config if it can be used.

    That a converted checkpoint has no guarantee is no problem here.

    Raises:
        InputError: if there is no statement.
        RunError: if it cannot be read.
    """
    path = release / "privacy.json"
    if not path.is_symlink() and not path.exists():
        raise InputError(f"Expected a statement at {path}, found none: give a release folder.")
    try:
        content, problems = read_json(path)
        mechanisms = statement.parse(content)
    except ValueError as error:
        raise RunError(f"Expected a privacy statement in {path}, could not read it: {clean(error)}.") from None
    found = Findings(content, problems=problems)
    found.problems += _check_files(release, content["files"])
    config = _read_config(release / "config.json", found)
    if config is None:
        return found, None
    if mechanisms or found.is_public:
        recomputed = (
            statement.recompute(content, mechanisms, config) if mechanisms else statement.check_public(content, config)
        )
        found.epsilons = recomputed.epsilons
        found.notices += recomputed.notices
        found.problems += recomputed.problems
    found.problems += check_weights(release / "model.safetensors", config, half="rounding" in content)
    found.problems += _check_words(release, content, config)
    return found, config


def _check_files(release: Path, hashes: Mapping[str, Any]) -> list[str]:
    """Returns what is not on the allow-list, is missing, or differs from the statement's hashes."""
    names = sorted(path.name for path in release.iterdir())
    extra = [name for name in names if name not in ALLOWED]
    problems = [f"{clean(name, 100)} is not on the allow-list" for name in extra[:NAMES_SHOWN]]
    problems += [f"{len(extra) - NAMES_SHOWN} more files are not on it"] if len(extra) > NAMES_SHOWN else []
    for name in ALLOWED:
        if name not in names:
            problems.append(f"{name} is missing")
        elif name != "privacy.json":
            try:
                most = MAX_WEIGHTS_BYTES if name == "model.safetensors" else MAX_WORDS_BYTES
                if sha256(release / name, most) != hashes[name]:
                    problems.append(f"{name} differs from the statement's hash")
            except ValueError as error:
                problems.append(f"{name} {clean(error)}")
    return problems


def _read_config(path: Path, found: Findings) -> Config | None:
    """Returns the released config, None if it cannot be used; what is odd about it goes to ``found``.

    A key that it lacks has its default: a release is read for years, by versions with more keys than it was written
    with. One that it has beside those that are shared is a problem.
    """
    try:
        content, problems = read_json(path)
        if "${" in json.dumps(content):  # OmegaConf takes it for a reference, to the environment even
            raise ValueError("it holds ${")
        config = configs.load([path], quiet=True)
    except (ValueError, RecursionError) as error:
        found.problems.append(f"config.json cannot be used: {clean(error)}")
        return None
    shared = redacted(config)
    if not (found.statement["mechanisms"] or found.is_public):
        shared = {name: shared[name] for name in CONVERTED_SECTIONS}
    odd, lacking = _differences(content, shared)
    if odd:
        problems.append(f"config.json is not that of a release: {clean(', '.join(odd[:5]))}")
    if lacking:
        more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        found.notices.append(
            f"config.json lacks {', '.join(lacking[:5])}{more}, as one from before there were such keys does: they "
            "have their defaults."
        )
    found.problems += problems
    return config


def _differences(
    content: Mapping[str, Any], shared: Mapping[str, Any], prefix: str = ""
) -> tuple[list[str], list[str]]:
    """Returns which keys of a released config are not shared or not read as they are written, and which it lacks."""
    odd, lacking = [], [f"{prefix}{name}" for name in shared if name not in content]
    for name, value in content.items():
        own = shared.get(name)
        if isinstance(value, dict) and isinstance(own, dict):
            more_odd, more_lacking = _differences(value, own, f"{prefix}{name}.")
            odd += more_odd
            lacking += more_lacking
        elif name not in shared or json.dumps(value) != json.dumps(own):  # for ==, 1 is true
            odd.append(f"{prefix}{name}")
    return odd, lacking


def _check_words(release: Path, content: dict[str, Any], config: Config) -> list[str]:
    """Returns which words seem to be a path or a key, and whether the model card is another than the statement's."""
    hashes = hashes_named(content, config)
    try:
        card = read_bytes(release / "README.md", MAX_WORDS_BYTES).decode("utf-8")
    except ValueError:
        card = ""  # which is a problem already
    words = {"README.md": [card], "privacy.json": words_in(content), "config.json": words_in(redacted(config))}
    problems = [line for name, texts in words.items() for line in check_words(name, "\n".join(texts), hashes)]
    if statement.writer(content) == version("dpdm") and card != _own_card(content, config):
        problems.append("README.md is not the model card that dpdm makes of this statement")
    return problems


def hashes_named(content: dict[str, Any], config: Config) -> frozenset[str]:
    """Returns the hashes that a release may name: of its own files, and of weights that it began with."""
    sources, _ = statement.check_sources(content, config)
    named = [content.get("checkpoint_sha256"), config.model.init_sha256, *(source.sha256 for source in sources)]
    return frozenset(str(value).lower() for value in [*content["files"].values(), *named])


def _own_card(content: dict[str, Any], config: Config) -> str | None:
    """Returns the model card that this version of dpdm makes of a statement; None if it can make none of it."""
    try:
        if statement.is_public(content):
            return public_card(content, config)
        return model_card(content, config) if content["mechanisms"] else claim_card(content, config)
    except (LookupError, TypeError, ValueError):
        return None


def words_in(content: Any) -> Iterator[str]:
    """Yields all names and texts in nested sections and lists."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield name
            yield from words_in(value)
    elif isinstance(content, list):
        for value in content:
            yield from words_in(value)
    elif isinstance(content, str):
        yield content
