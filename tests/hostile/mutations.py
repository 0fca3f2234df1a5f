"""A fuzzer of files: small damage anywhere, and damage that knows what a zip is."""

import io
import random
import struct
import zipfile
from collections.abc import Callable, Sequence
from functools import partial

NUMBERS = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFE,
    0xFFFFFFFF,
    2**32,
    2**63 - 1,
    2**64 - 1,
)
NAMES = (
    "../../escaped.png",
    "/tmp/escaped.png",
    "a\\..\\escaped.png",
    "a/" * 3000 + "x.png",
    "00000/img00000000.png",
    "dataset.json",
    "\x1b[31m\n.png",
    "..",
    "",
    "a/b/c/d/e.png",
    "__MACOSX/x.png",
    "train/a/x.png",
)
WORDS = (
    b"1e999",
    b"-1",
    b"NaN",
    b"null",
    b"{}",
    b"[" * 2000,
    b'"\\u0000"',
    b"9" * 400,
    b"true",
    b"\xff",
    b'"${oc.env:HOME}"',
)


def mutate(content: bytes, chance: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """Returns one to four mutations of a file, one behind the other; ``others`` are files to splice with."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        kinds = [*ANY, *(ZIP * 2 if content[:4] == b"PK\3\4" else []), partial(splice, others=others)]
        content = chance.choice(kinds)(content, chance)
    return content


def flip(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 3, 30)) if changed else 0):
        changed[_place(content, chance)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def overwrite(content: bytes, chance: random.Random) -> bytes:
    """Writes a number that lengths, offsets and counts are rarely meant to be."""
    number, kind = chance.choice(NUMBERS), chance.choice(["<H", ">H", "<L", ">L", "<Q", ">Q"])
    packed = struct.pack(kind, number & (2 ** (8 * struct.calcsize(kind)) - 1))
    place = _place(content, chance)
    return content[:place] + packed + content[place + len(packed) :]


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: _place(content, chance)]


def cut_out(content: bytes, chance: random.Random) -> bytes:
    first = _place(content, chance)
    return content[:first] + content[first + chance.choice((1, 2, 16, 100)) :]


def repeat(content: bytes, chance: random.Random) -> bytes:
    first = _place(content, chance)
    part = content[first : first + chance.choice((1, 4, 46, 500))]
    return content[:first] + part * chance.choice((2, 3, 300)) + content[first + len(part) :]


def insert(content: bytes, chance: random.Random) -> bytes:
    place = _place(content, chance)
    return content[:place] + chance.choice([*WORDS, chance.randbytes(8), bytes(1000)]) + content[place:]


def replace_number(content: bytes, chance: random.Random) -> bytes:
    """Puts another word in place of a decimal number, as JSON and lists have them."""
    places = [i for i in range(len(content)) if content[i : i + 1].isdigit() and not content[i - 1 : i].isdigit()]
    if not places:
        return flip(content, chance)
    first = end = chance.choice(places)
    while content[end : end + 1].isdigit():
        end += 1
    return content[:first] + chance.choice(WORDS) + content[end:]


def splice(content: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    other = chance.choice([content, *others])
    return content[: _place(content, chance)] + other[_place(other, chance) :]


def rename(content: bytes, chance: random.Random) -> bytes:
    def change(members: list[tuple[zipfile.ZipInfo, bytes]]) -> None:
        members[chance.randrange(len(members))][0].filename = chance.choice(NAMES)

    return _rewritten(content, change)


def duplicate(content: bytes, chance: random.Random) -> bytes:
    return _rewritten(content, lambda members: members.append(chance.choice(members)))


def drop(content: bytes, chance: random.Random) -> bytes:
    return _rewritten(content, lambda members: members.pop(chance.randrange(len(members))))


def link(content: bytes, chance: random.Random) -> bytes:
    """Makes a member a symbolic link to a file that is there."""

    def change(members: list[tuple[zipfile.ZipInfo, bytes]]) -> None:
        index = chance.randrange(len(members))
        info = zipfile.ZipInfo(members[index][0].filename)
        info.create_system, info.external_attr = 3, 0o120777 << 16
        members[index] = (info, b"/etc/passwd")

    return _rewritten(content, change)


def deflate(content: bytes, chance: random.Random) -> bytes:
    """Packs all members, one of which may become a bomb."""

    def change(members: list[tuple[zipfile.ZipInfo, bytes]]) -> None:
        for info, _ in members:
            info.compress_type = chance.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        if chance.random() < 0.5:
            index = chance.randrange(len(members))
            members[index] = (members[index][0], bytes(30 * 2**20))

    return _rewritten(content, change)


def inner(content: bytes, chance: random.Random) -> bytes:
    """Damages one member and leaves the zip around it whole."""

    def change(members: list[tuple[zipfile.ZipInfo, bytes]]) -> None:
        index = chance.randrange(len(members))
        members[index] = (members[index][0], chance.choice(ANY)(members[index][1], chance))

    return _rewritten(content, change)


def _rewritten(content: bytes, change: Callable[[list[tuple[zipfile.ZipInfo, bytes]]], object]) -> bytes:
    """Takes a zip apart, changes the list of its members, and puts them together; a damaged one stays as it is."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            members = [(info, file.read(info)) for info in file.infolist()]
        change(members)
        written = io.BytesIO()
        with zipfile.ZipFile(written, "w") as file:
            for info, member in members:
                file.writestr(info, member, compress_type=info.compress_type)
    except Exception:  # no zip, or no longer one
        return content
    return written.getvalue()


def _place(content: bytes, chance: random.Random) -> int:
    """Anywhere, and often near one of the ends, where formats keep what they say of themselves."""
    length = max(1, len(content))
    return min(
        length - 1,
        chance.choice(
            (
                chance.randrange(length),
                chance.randrange(min(length, 128)),
                length - 1 - chance.randrange(min(length, 128)),
            )
        ),
    )


ANY: list[Callable[[bytes, random.Random], bytes]] = [
    flip,
    flip,
    overwrite,
    overwrite,
    cut,
    cut_out,
    repeat,
    insert,
    replace_number,
]
ZIP: list[Callable[[bytes, random.Random], bytes]] = [rename, duplicate, drop, link, deflate, inner, inner]
