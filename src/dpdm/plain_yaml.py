"""YAML that may be a stranger's: plain values, of bounded depth and size, without references; overrides."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpdm.errors import InputError
from dpdm.untrusted import read_bytes

MAX_DEPTH = 8
MAX_BYTES = 2**19
# What YAML cannot hold, or reads as the end of a line: the file that dpdm writes of it would be another, or none.
UNWRITABLE = re.compile("[^\t\n\r -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class _Loader(yaml.SafeLoader):
    """YAML without aliases, of which a page of text can unfold to gigabytes, and without keys that occur twice.

    Texts are dates, words such as yes and off, and numbers such as 007 and 1:30, which YAML 1.1 takes for others.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias (*name): write the value itself")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names: set[Any] = set()
        for name in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if name in names:
                raise yaml.YAMLError(f"{str(name)[:60]} stands there twice: join the two")
            names.add(name)
        return super().construct_mapping(node, deep)


TAG = "tag:yaml.org,2002:"
PLAIN = {f"{TAG}bool": re.compile("true|True|TRUE|false|False|FALSE"), f"{TAG}int": re.compile("[-+]?(0|[1-9][0-9]*)")}
SIXTIES = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


class _Plain:
    """A pattern of YAML's, and one that the whole text must match, or must not."""

    def __init__(self, tag: str, pattern: "re.Pattern[str]") -> None:
        self._tag, self._pattern = tag, pattern

    def match(self, text: str) -> bool:
        if self._tag in PLAIN:
            return bool(PLAIN[self._tag].fullmatch(text))
        return bool(self._pattern.match(text)) and not SIXTIES.fullmatch(text)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, _Plain(tag, pattern)) for tag, pattern in resolvers if tag != f"{TAG}timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """Returns the value of a YAML text.

    Raises:
        ValueError: with the reason, if it is none.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # "!!int ''" is an IndexError, "!!timestamp x" an AttributeError, and so on
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from None


def read_yaml(path: Path) -> Any:
    """Returns the value of a YAML file.

    Raises:
        InputError: if it cannot be read, or is larger than ``MAX_BYTES``.
    """
    try:
        return parse_yaml(read_bytes(path.resolve(), MAX_BYTES).decode("utf-8-sig"))
    except ValueError as error:
        raise InputError(f"Expected a YAML file at {path}, could not read it: {error}.") from None


def check_plain(value: Any, where: str, key: str = "", depth: int = 0) -> None:
    """Raises InputError unless a value from YAML is made of sections, lists, texts, numbers, true, false and null.

    Whole numbers are to fit 64 bits, texts to come back as they are from a YAML file. ``${`` is refused: OmegaConf
    would look elsewhere for what it names, in the environment even, and a config is published with the model.
    """
    what = None
    if isinstance(value, dict) and depth < MAX_DEPTH:
        for name, item in value.items():
            if not isinstance(name, str):
                shown = name if isinstance(name, int) and name.bit_length() < 64 else f"a {type(name).__name__}"
                raise InputError(f"Expected a known key in {where}, got {shown}: keys are names, such as train.seed.")
            check_plain(name, where, "a key", depth + 1)
            check_plain(item, where, f"{key}.{name}".lstrip("."), depth + 1)
    elif isinstance(value, list) and depth < MAX_DEPTH:
        for item in value:
            check_plain(item, where, key, depth + 1)
    elif isinstance(value, dict | list):
        what = "lists or sections nested too deeply"
    elif isinstance(value, str):
        if "${" in value:
            what = f"{value!r}, which would refer to something else: write the value itself"
        elif found := UNWRITABLE.search(value):
            what = f"{value!r}, in which {found[0]!a} cannot be written as text: leave out that character"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        what = f"a whole number of {value.bit_length()} bits: 63 are the most"
    elif value is not None and not isinstance(value, bool | int | float):
        what = f"a {type(value).__name__}: give a text, a number, a list, true, false or null"
    if what is not None:
        raise InputError(f"Expected a plain value of {key} in {where}, got {what}.")


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the sections that ``key=value`` pairs ask for; of two for the same key the later one wins."""
    merged: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise InputError(f"Expected an override of the form section.key=value, got {override!r}.")
        try:
            content = parse_yaml(value)
        except ValueError as error:
            raise InputError(f"Expected a YAML value for {key}, got {value!r} ({error}).") from None
        if isinstance(content, str) and " #" in value and value.strip()[0] not in "'\"":
            content = value.strip()  # a path may hold what YAML takes for a comment
        *outer, last = key.split(".")
        sections: dict[str, Any] = {last: content}
        for section in reversed(outer):
            sections = {section: sections}
        _put_over(merged, sections)
    return merged


def sets(override: str, key: str) -> bool:
    """Whether an override sets ``key``, by itself or as a whole section that holds it."""
    return f"{key}.".startswith(f"{override.partition('=')[0]}.")


def _put_over(content: dict[str, Any], change: Mapping[str, Any]) -> None:
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            _put_over(content[key], value)
        else:
            content[key] = value


def leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields what is in nested sections as ("section.key", value)."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


def as_plain(value: Any) -> Any:
    """Returns a value with lists in place of tuples."""
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return value
