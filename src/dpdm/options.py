"""What several commands share: options, how words are read, a line of complaint."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dpdm.errors import InputError
from dpdm.progress import say
from dpdm.untrusted import clean

if TYPE_CHECKING:
    from dpdm.data.transforms import Resolution

PATH = click.Path(path_type=Path)
Command = Callable[..., int | None]
LONGEST_MESSAGE = 4000
TRANSFORMS = ("center-crop", "center-crop-wide")


def workdir_option(command: Command) -> Command:
    return click.option("--workdir", type=PATH, required=True, metavar="DIR", help="Folder of the run.")(command)


def pretrained_option(command: Command) -> Command:
    return click.option(
        "--pretrained",
        metavar="NAME",
        is_eager=True,
        callback=_list_pretrained,
        help="Take the release of this name that comes with dpdm; list: print the names.",
    )(command)


def _list_pretrained(context: click.Context, _option: click.Parameter, name: str | None) -> str | None:
    from dpdm import pretrained

    if name == "list":
        print(pretrained.listing())
        context.exit()
    return name


def config_options(command: Command) -> Command:
    """Adds --config and, after --, overrides; words without = are further files, as the original's habit is."""
    command = click.argument("words", nargs=-1, metavar="[-- key=value ...]")(command)
    return click.option(
        "--config", multiple=True, metavar="FILE", help="YAML file of keys; may be repeated, later files win."
    )(command)


def source_options(command: Command) -> Command:
    command = click.option(
        "--grey-bits",
        type=int,
        default=16,
        metavar="BITS",
        help="How many of their 16 bits grey images use, such as a scanner's 12; default: 16.",
    )(command)
    command = click.option(
        "--transform",
        type=click.Choice(TRANSFORMS),
        help="Cut images to their central square, or to the central part that has the shape of --resolution, which is "
        "then put between black bars.",
    )(command)
    return click.option(
        "--resolution",
        metavar="WxH",
        help="Such as 32x32, or with center-crop-wide 64x48; default: the images' own, if they agree.",
    )(command)


def groups_option(command: Command) -> Command:
    return click.option(
        "--groups",
        metavar="FILE|PATTERN",
        help="Whose images these are, to protect each person with all of theirs: a CSV file with the lines file,group, "
        "or a regular expression whose one pair of brackets is the group in a path.",
    )(command)


def extractor_option(command: Command) -> Command:
    return click.option(
        "--extractor",
        default="inception",
        show_default=True,
        metavar="NAME|FILE",
        help="inception (downloaded once), or a TorchScript file from somebody you trust.",
    )(command)


def split_words(config: tuple[str, ...], words: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Returns config files and overrides: words without ``=`` are further files."""
    for word in words:
        if "=" not in word and not Path(word).exists():
            raise InputError(f"Expected key=value or a config file, got {word!r}: there is no such file.")
    return [*config, *(w for w in words if "=" not in w)], [w for w in words if "=" in w]


def resolution_of(resolution: str | None) -> "Resolution | None":
    from dpdm.data.transforms import parse_resolution

    return None if resolution is None else parse_resolution(resolution)


def complain(message: str) -> None:
    """Prints one line that is safe on a terminal, whatever names and values are quoted in it."""
    say(f"dpdm: {clean(message, LONGEST_MESSAGE)}")
