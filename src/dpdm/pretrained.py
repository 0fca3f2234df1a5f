"""The pretrained releases that come with dpdm: names and folders. Nothing is downloaded."""

from pathlib import Path

from dpdm.errors import InputError

FOLDER = Path(__file__).with_name("pretrained")


def names() -> list[str]:
    """Returns the names of all pretrained releases, such as mnist_eps_1.0, in order."""
    return sorted(path.parent.name for path in FOLDER.glob("*/privacy.json"))


def folder(name: str) -> Path:
    """Returns the release folder of a name.

    Raises:
        InputError: if there is none of that name.
    """
    if name not in names():
        raise InputError(f"Expected a pretrained release, one of {listing()}, got {name!r}: choose one of these.")
    return FOLDER / name


def listing() -> str:
    """Returns all names in one line."""
    return ", ".join(names()) or "none (this dpdm comes without)"


def resolve(path: Path) -> Path:
    """Returns ``path``, or if there is nothing and it is a pretrained release's name, that release's folder."""
    return FOLDER / path if not path.exists() and str(path) in names() else path
