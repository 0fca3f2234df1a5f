"""YAML that may be a stranger's: plain values, of bounded depth and size, without references to anything else."""

from typing import Any

import yaml

from dpdm.errors import InputError

MAX_DEPTH = 8


class _Loader(yaml.SafeLoader):
    """YAML without aliases, of which a page of text can unfold to gigabytes; a date is a text."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias (*name): write the value itself")
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
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


def check_plain(value: Any, where: str, key: str = "", depth: int = 0) -> None:
    """Raises InputError unless a value from YAML is made of sections, lists, texts, numbers, true, false and null.

    Whole numbers are to fit 64 bits, texts to be writable as UTF-8. ``${`` is refused: OmegaConf would look elsewhere
    for what it names, in the environment even, and a config is published with the model.
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
        elif "\0" in value or not _is_utf_8(value):
            what = f"{value!r}, which cannot be written as text"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        what = f"a whole number of {value.bit_length()} bits: 63 are the most"
    elif value is not None and not isinstance(value, bool | int | float):
        what = f"a {type(value).__name__}: give a text, a number, a list, true, false or null"
    if what is not None:
        raise InputError(f"Expected a plain value of {key} in {where}, got {what}.")


def _is_utf_8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
